"""Bad samples take their place and weigh nothing; they are listed once, counted by kind, and limited in number."""

import io
import json
import multiprocessing
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.dataset import SampleDataset
from datamodules.indexer import index_dataset
from datamodules.loader import EvalLoader, TrainLoader, WorkerConfig
from datamodules.manifest import open_split, read_dataset
from datamodules.module import ClassificationDataModule
from datamodules.order import OrderSpec
from datamodules.quarantine import Quarantine, format_fault, parse_faults, skip_budget
from datamodules.reader import ShardReader
from datamodules.sampler import EvalBatchSampler, TrainBatchSampler
from datamodules.tasks import CLASSIFICATION
from datamodules.transforms import EvalTransform, TrainTransform
from datamodules.types import DataError, Fault
from lightning_modules.callbacks.data_monitor import DataMonitor

TRAIN = TrainTransform(8, crop=False, auto_augment=None, color_jitter=0.0, random_erasing=0.0)
EVAL = EvalTransform(8, None)
QUIET = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
BAD = {5: "undecodable", 11: "over_limit", 17: "damaged"}


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def animation():
    stream = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(stream, format="WEBP", save_all=True, append_images=frames[1:])
    return stream.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 training and 10 validation samples of 2 classes; three training samples and one validation sample are bad."""
    folder = tmp_path_factory.mktemp("bad")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 10)):
        (folder / split).mkdir()
        with tarfile.open(folder / split / f"{split}-0.tar", "w") as tar:
            for i in range(count):
                image, extension = png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)), "png"
                if (split, i) in (("train", 5), ("val", 3)):
                    image = b"no image at all" * 10
                if (split, i) == ("train", 11):
                    image, extension = animation(), "webp"
                for name, content in ((f"{i:03d}.{extension}", image), (f"{i:03d}.cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    index_dataset(folder, ["even", "odd"])
    index = open_split(folder, read_dataset(folder), "train")
    shard = folder / "train" / "train-0.tar"
    content = bytearray(shard.read_bytes())
    content[index.locate(17).fields["png"].offset + 20] ^= 1
    shard.write_bytes(content)
    return folder


def dataset(data, split="train", transform=TRAIN, classes=2):
    return SampleDataset(
        ShardReader(open_split(data, read_dataset(data), split)), CLASSIFICATION, transform, classes, skips=True
    )


def module(data, **options):
    options = {"batch_size": 8, "num_workers": 0, "train_transform": TRAIN, "eval_transform": EVAL, **options}
    return ClassificationDataModule(str(data), on_error="skip", **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_skipped_sample_keeps_its_place_with_weight_zero_and_a_black_image(data, workers):
    faults = []
    sampler = TrainBatchSampler(OrderSpec(0, (40,), 8))
    loader = TrainLoader(dataset(data), sampler, WorkerConfig(workers, start="fork"), on_faults=faults.extend)
    batches = list(loader)
    loader.close()
    expected = iter(sampler)
    for batch in batches:
        assert batch["id"].tolist() == next(expected).ids.tolist()
        bad = torch.tensor([sample in BAD for sample in batch["id"].tolist()])
        assert torch.equal(batch["weight"], 1 - bad.float())
        assert batch["image"][bad].abs().sum() == 0
        assert (batch["image"][~bad].abs().sum((1, 2, 3)) > 0).all()
    assert {fault.sample: fault.kind for fault in faults} == BAD
    assert all(f"sample '{fault.sample:03d}'" in fault.message for fault in faults)


def test_a_label_that_is_no_class_is_a_fault_of_its_own_kind(data):
    served = dataset(data, "val", EVAL, classes=1).serve(1)
    assert (served.fault.kind, served.weight, served.id) == ("label", 0.0, 1)


def test_evaluation_counts_a_skipped_sample_as_padding(data):
    batches = list(EvalLoader(dataset(data, "val", EVAL), EvalBatchSampler(10, 4), WorkerConfig()))
    weights = {i: w for batch in batches for i, w in zip(batch["id"].tolist(), batch["weight"].tolist(), strict=True)}
    assert {sample for sample, weight in weights.items() if weight == 0 and sample >= 0} == {3}


relaxed = settings(deadline=None, max_examples=30)  # shared machines stall


@relaxed
@given(st.integers(1, 8))
def test_the_gradient_is_the_same_on_any_number_of_ranks(data, world):
    """The sum of the good samples' losses over the whole batch size, however the batch is shared."""
    spec, losses = OrderSpec(0, (40,), 8), np.random.default_rng(0).random(40)
    served = dataset(data)
    for step in range(5):
        of_ranks = []
        for rank in range(world):
            request = next(iter(TrainBatchSampler(spec, rank, world, step)))
            weights = np.array([sample.weight for sample in served.__getitems__(request)])
            of_ranks.append((weights * losses[request.ids]).mean())
        whole = next(iter(TrainBatchSampler(spec, start=step))).ids
        assert abs(np.mean(of_ranks) - sum(losses[i] for i in whole if i not in BAD) / 8) < 1e-6


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 2)

    def training_step(self, batch, batch_idx):
        logits = self.layer(batch["image"].flatten(1))
        losses = torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")
        return (batch["weight"] * losses).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(data, root, epochs=2, logger=False, **options):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=root,
        logger=logger,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        callbacks=[DataMonitor()],
        **QUIET,
    )
    trainer.fit(Linear(), datamodule=module(data, **options))
    return trainer


def listed(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_training_lists_its_bad_samples_once_and_shows_them_in_tensorboard(data, tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger

    fit(data, tmp_path, logger=TensorBoardLogger(tmp_path, name="", version=""), max_skipped=4)
    rows = listed(tmp_path / "quarantine.jsonl")
    expected = {("train", sample, kind) for sample, kind in BAD.items()} | {("val", 3, "undecodable")}
    assert {(row["split"], row["sample"], row["kind"]) for row in rows} == expected
    assert len(rows) == 4
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    values = [event.value for event in events.Scalars("data/skipped_samples")]
    assert (values[-1], values) == (4.0, sorted(values))
    assert events.Scalars("data/skipped_samples/undecodable")[-1].value == 2.0
    assert events.Scalars("data/skipped_samples/label")[-1].value == 0.0
    fit(data, tmp_path, max_skipped=4)  # another attempt in the same directory
    assert listed(tmp_path / "quarantine.jsonl") == rows


def test_above_the_budget_the_run_stops_with_one_line(data, tmp_path):
    with pytest.raises(DataError, match=r"2 samples were bad and data.max_skipped allows 1; .*jsonl lists") as error:
        fit(data, tmp_path, max_skipped=0.01)
    assert "\n" not in str(error.value)
    assert len(listed(tmp_path / "quarantine.jsonl")) == 2


def test_the_list_may_lie_elsewhere(data, tmp_path):
    fit(data, tmp_path, epochs=1, max_skipped=9, quarantine_dir=str(tmp_path / "lists"))
    assert len(listed(tmp_path / "lists" / "quarantine.jsonl")) == 4


def test_the_probe_batch_shows_a_bad_sample_black(data):
    batch = module(data).probe_batch(10)
    assert batch["weight"].tolist() == [1.0] * 3 + [0.0] + [1.0] * 6


@pytest.mark.parametrize(
    ("max_skipped", "samples", "budget"),
    [(0, 100, 0), (0.001, 1000, 1), (0.001, 1, 1), (0.5, 9, 5), (1, 9, 1), (30, 9, 30)],
)
def test_the_budget_is_a_number_or_a_share(max_skipped, samples, budget):
    assert skip_budget(max_skipped, samples) == budget


def test_a_negative_budget_is_refused(data):
    with pytest.raises(DataError, match=r"data.max_skipped is -1; it must be at least 0"):
        module(data, max_skipped=-1).setup("fit")


def test_a_list_cut_short_or_damaged_is_read_as_far_as_it_goes():
    line = format_fault("train", Fault(3, "damaged", "shard 'é'"))
    assert parse_faults(line + "rubbish\n" + line.replace("3", "4") + line[:20]) == {
        ("train", 3): "damaged",
        ("train", 4): "damaged",
    }


def _fill(folder, first, done):
    quarantine = Quarantine(folder, 1000)
    for sample in range(first, first + 200):
        quarantine.add("train", [Fault(sample, "damaged", "x" * 200)])
    done.put(sum(Quarantine(folder, 1000).counts().values()))


def test_ranks_share_one_list_and_one_budget(tmp_path):
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    ranks = [context.Process(target=_fill, args=(tmp_path, 100 * rank, done)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    kinds = parse_faults((tmp_path / "quarantine.jsonl").read_text())
    assert set(kinds) == {("train", sample) for sample in range(400)}
    with pytest.raises(DataError, match=r"401 samples were bad and data.max_skipped allows 399"):
        Quarantine(tmp_path, 399).add("val", [Fault(0, "label", "y")])
