"""A weighted mixture is exact: shares add up, every source runs through its own samples, ranks change nothing."""

import io
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.indexer import index_dataset
from datamodules.mixing import OrderStream, divide, mixture_spec
from datamodules.module import ClassificationDataModule
from datamodules.opening import MixtureSource
from datamodules.order import OrderSpec
from datamodules.sampler import TrainBatchSampler
from datamodules.transforms import EvalTransform, TrainTransform
from datamodules.types import DataError
from lightning_modules.callbacks.data_monitor import DataMonitor

TRAIN = TrainTransform(8, crop=False, auto_augment=None, color_jitter=0.0, random_erasing=0.5)
EVAL = EvalTransform(8, None, mean=(0, 0, 0), std=(1, 1, 1))
QUIET = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
relaxed = settings(deadline=None)  # shared machines stall


@relaxed
@given(st.integers(1, 200), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_add_up_and_are_within_one_of_the_exact_share(slots, weights):
    try:
        shares = divide(slots, weights)
    except DataError as error:
        assert "less than one of the" in str(error)
        assert min(weights) * slots / sum(weights) < 1
        return
    assert sum(shares) == slots
    assert min(shares) >= 1
    assert all(abs(s - slots * w / sum(weights)) < 1 for s, w in zip(shares, weights, strict=True))


@relaxed
@given(st.integers(0, 2**40), st.integers(1, 3), st.integers(1, 12), st.integers(0, 300))
def test_ranks_share_a_mixture_and_may_change_at_any_batch(seed, repeats, world, start):
    spec = mixture_spec(seed, [(9, 0, 5), (30,), (4, 4)], [1, 2, 0.5], 12 * repeats, 4, 7, repeats)
    whole = OrderStream(spec).batch(start, 0, spec.batch_size)
    parts = [next(iter(TrainBatchSampler(spec, rank, world, start))) for rank in range(world)]
    for column, name in zip(whole, ("ids", "repeats", "epochs"), strict=True):
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == column.tolist()


@relaxed
@given(st.integers(0, 2**40), st.lists(st.floats(0.1, 1), min_size=2, max_size=4), st.data())
def test_every_source_is_gone_through_in_whole_passes(seed, weights, data):
    counts = [(*data.draw(st.lists(st.integers(0, 9), max_size=3)), 12) for _ in weights]
    try:
        spec = mixture_spec(seed, counts, weights, 12, 3, 5)
    except DataError:
        return
    stream, batches = OrderStream(spec), 12
    ids, _, passes = map(np.concatenate, zip(*(stream.batch(b, 0, 12) for b in range(batches)), strict=True))
    ends = np.append(spec.first_ids[1:], spec.num_samples)
    for source, first, end, count in zip(spec.sources, spec.first_ids, ends, spec.samples_given(batches), strict=True):
        mine = (ids >= first) & (ids < end)
        assert mine.sum() == count == batches * source.batch_size
        for number in np.unique(passes[mine]):
            of_pass = ids[mine & (passes == number)]
            assert len(np.unique(of_pass)) == len(of_pass) <= source.num_samples
            if number < batches // source.batches_per_pass:
                assert len(of_pass) == source.batches_per_pass * source.batch_size


def test_every_rank_gets_its_share_of_each_source():
    spec = mixture_spec(0, [(1000,), (1000,)], [3, 1], 64, 8, 100)
    for rank in range(8):
        request = next(iter(TrainBatchSampler(spec, rank, 8)))
        assert (request.ids < 1000).sum() == 6


def test_a_mixture_is_pinned_by_its_golden_order():
    spec = mixture_spec(7, [(5, 9), (6,)], [2, 1], 6, 2, 4)
    assert [OrderStream(spec).batch(b, 0, 6)[0].tolist() for b in (0, 5)] == [
        [3, 19, 4, 8, 15, 9],
        [10, 19, 12, 3, 17, 1],
    ]


def test_a_mixture_of_one_has_the_batches_of_its_only_source():
    spec = mixture_spec(0, [(40,)], [5], 8, 4, 10)
    (source,) = spec.sources
    assert isinstance(source, OrderSpec)
    assert OrderStream(spec).batch(9, 0, 8)[0].tolist() == OrderStream(source).batch(9, 0, 8)[0].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1, 0]}, r"data.path has the weights \[1, 0\]; every weight must be above 0"),
        ({"weights": [1, float("nan")]}, r"every weight must be above 0"),
        ({"weights": [99, 1]}, r"data.path\[1\] has weight 1, less than one of the 8 samples in a batch; raise its"),
        ({"counts": [(9,), (1,)]}, r"data.path\[1\] has 1 training samples and its share of a batch is 4; lower its"),
        ({"repeats": 3}, r"data.batch_size 8 is not divisible by 3 repeats"),
        ({"lanes": 0}, r"data.lanes is 0; it must be at least 1"),
    ],
)
def test_impossible_mixtures_are_refused_with_the_mend(options, message):
    settings = {"counts": [(9,), (9,)], "weights": [1, 1], "batch_size": 8, "lanes": 2, "window": 4, **options}
    with pytest.raises(DataError, match=message) as error:
        mixture_spec(0, **settings)
    assert "\n" not in str(error.value)


def write(folder, count, colour, names=("even", "odd")):
    for split, samples in (("train", count), ("val", 5)):
        (folder / split).mkdir(parents=True)
        with tarfile.open(folder / split / f"{split}-0.tar", "w") as tar:
            for i in range(samples):
                image = io.BytesIO()
                Image.new("RGB", (8, 8), (colour, i, 0)).save(image, format="PNG")
                for name, content in ((f"{i}.png", image.getvalue()), (f"{i}.cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    index_dataset(folder, list(names))
    return str(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two datasets of 40 and 12 training samples; red tells which one an image is of, green which sample."""
    root = tmp_path_factory.mktemp("two")
    return [MixtureSource(write(root / "a", 40, 100), 3.0), MixtureSource(write(root / "b", 12, 200))]


def module(path, **options):
    options = {
        "batch_size": 8,
        "num_workers": 0,
        "lanes": 2,
        "train_transform": TRAIN,
        "eval_transform": EVAL,
        **options,
    }
    return ClassificationDataModule(path, **options)


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 2)
        self.ids, self.images, self.val = [], [], []

    def training_step(self, batch, batch_idx):
        self.ids += batch["id"].tolist()
        self.images += batch["image"].double().sum((1, 2, 3)).tolist()
        return torch.nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["label"])

    def validation_step(self, batch, batch_idx):
        pixels = (batch["image"][:, :2, 0, 0] * 255).round().int().tolist()
        self.val += [(*pixel, label) for pixel, label in zip(pixels, batch["label"].tolist(), strict=True)]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Save(Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(dm, *callbacks, ckpt=None, logger=False):
    model = Recorder()
    Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[*callbacks, DataMonitor()],
        logger=logger,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        **QUIET,
    ).fit(model, datamodule=dm, ckpt_path=ckpt)
    return model


def test_a_mixture_trains_and_resumes_with_the_same_samples_and_pixels(two, tmp_path):
    whole = fit(module(two, seed=3), Save(tmp_path / "x.ckpt", 8), logger=TensorBoardLogger(tmp_path, "", ""))
    assert len(whole.ids) == 3 * 8 * 6  # 52 samples: 6 batches an epoch
    assert sum(i >= 40 for i in whole.ids) == 3 * 6 * 2
    rest = fit(module(two, seed=3, num_workers=1, worker_start="fork"), ckpt=tmp_path / "x.ckpt")
    assert (rest.ids, rest.images) == (whole.ids[64:], whole.images[64:])
    assert whole.val == [(colour, i, i % 2) for colour in (100, 200) for i in range(5)] * 3
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("data/samples_given/a")] == [6.0 * step for step in range(1, 19)]
    assert events.Scalars("data/samples_given/b")[-1].value == 36.0


def test_samples_of_two_datasets_are_augmented_apart(two):
    dm = module([two[0], MixtureSource(two[0].path)])
    dataset = dm._dataset("train", TRAIN)
    images = [dataset.serve(sample).image for sample in range(80)]
    assert not any(torch.equal(images[i], images[40 + i]) for i in range(3))
    assert (dm.opened.names, len(dataset)) == (["a_0", "a_1"], 80)


def test_another_weight_is_another_order(two, tmp_path):
    fit(module(two), Save(tmp_path / "x.ckpt", 2))
    other = [two[0], MixtureSource(two[1].path, 2.0)]
    with pytest.raises(DataError, match=r"written with data.dataset_digest .* '\[dataset_digest\]'"):
        fit(module(other), ckpt=tmp_path / "x.ckpt")


def test_a_fault_in_a_mixture_names_its_dataset(two, tmp_path):
    third = write(tmp_path / "c", 12, 50)
    path = tmp_path / "c" / "train" / "train-0.tar"
    content = bytearray(path.read_bytes())
    for i in range(12):
        content[i * 2048 + 530] ^= 1
    path.write_bytes(content)
    dm = module([two[0], MixtureSource(third)], on_error="skip", max_skipped=100, quarantine_dir=str(tmp_path))
    dm.setup("fit")
    for batch in dm.train_dataloader():
        assert ((batch["weight"] == 0) == (batch["id"] >= 40)).all()
    assert dm.skipped_counts()["damaged"] == 12
    assert str(path) in (tmp_path / "quarantine.jsonl").read_text()


def test_datasets_of_other_classes_are_not_mixed(two, tmp_path):
    other = write(tmp_path / "x", 12, 0, ("even", "strange"))
    with pytest.raises(DataError, match=r"x has class 1 'strange' instead of 'odd' as .*a; datasets can be mixed only"):
        module([two[0], MixtureSource(other)]).setup("fit")
    more = write(tmp_path / "y", 12, 0, ("even", "odd", "more"))
    with pytest.raises(DataError, match=r"y has 3 classes instead of the 2 of .*a; datasets can be mixed only"):
        module([two[0], MixtureSource(more)]).setup("fit")
    with pytest.raises(DataError, match=r"data.path is an empty list; give a folder or a list of"):
        module([])
