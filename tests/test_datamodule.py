"""The data module opens a dataset, refuses what cannot work in one line, and gives batches of what it holds."""

import subprocess

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from datamodules.module import ClassificationDataModule
from datamodules.order import ORDER_VERSION
from datamodules.transforms import EvalTransform, TrainTransform
from datamodules.types import DataError

TRAIN = TrainTransform(8, crop=False, auto_augment=None, color_jitter=0.0, random_erasing=0.0)
EVAL = EvalTransform(8, None)
BATCHES = 7  # 57 training samples in batches of 8


def module(data, **options):
    options = {"batch_size": 8, "num_workers": 0, "train_transform": TRAIN, "eval_transform": EVAL, **options}
    return ClassificationDataModule(str(data), **options)


def test_without_a_trainer_the_loader_counts_epochs_itself(data):
    dm = module(data)
    dm.setup("fit")
    loader = dm.train_dataloader()
    assert len(loader) == dm.batches_per_epoch == BATCHES
    epochs = [[batch["id"].tolist() for batch in loader] for _ in range(3)]
    assert [len({sample for batch in batches for sample in batch}) for batches in epochs] == [8 * BATCHES] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert dm.state_dict() == {
        "committed": 0,
        "guard": {
            "seed": 0,
            "lanes": 8,
            "window": 8000,
            "batch_size": 8,
            "repeats": 1,
            "order_version": ORDER_VERSION,
            "dataset_digest": dm.dataset_digest,
        },
    }


class Reader(LightningModule):
    """Writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.ids = []

    def validation_step(self, batch, batch_idx):
        self.ids += batch["id"].tolist()

    def predict_step(self, batch, batch_idx):
        return batch["id"]


def test_evaluation_and_prediction_see_every_sample_once(data):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", **quiet)
    model, dm = Reader(), module(data, eval_batch_size=7)
    trainer.validate(model, datamodule=dm, verbose=False)
    assert model.ids == list(range(21))
    assert torch.cat(trainer.predict(model, datamodule=dm)).tolist() == list(range(21))


def test_the_probe_batch_is_fixed_and_its_pictures_come_back(data):
    dm = module(data)
    first, second = dm.probe_batch(5), module(data, seed=3).probe_batch(5)
    assert first["id"].tolist() == [0, 4, 8, 12, 16]
    assert torch.equal(first["image"], second["image"])
    pictures = dm.denormalise(first["image"])
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert torch.allclose(pictures * 255, (pictures * 255).round(), atol=1e-3)
    assert len(dm.probe_batch(1000)["id"]) == 21


def test_digits_are_packed_when_the_path_is_empty(tmp_path):
    dm = module(tmp_path / "digits", sources="digits", batch_size=64)
    assert (dm.num_classes, dm.class_names[7]) == (10, "7")
    assert not (tmp_path / "digits").exists()
    dm.prepare_data()
    dm.setup("fit")
    before = (tmp_path / "digits" / "dataset.json").stat().st_mtime_ns
    module(tmp_path / "digits", sources="digits").prepare_data()
    assert (tmp_path / "digits" / "dataset.json").stat().st_mtime_ns == before
    batch = next(iter(dm.train_dataloader()))
    assert batch["image"].shape == (64, 3, 8, 8)
    assert (dm.batches_per_epoch, dm.num_classes) == (22, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere"}, "nowhere does not exist; pack one, for example with `mirrorla shards pack"),
        (
            {"batch_size": 12},
            r"data.batch_size 12 is not divisible by 8 lanes; nearest valid: 8 or 16, or data.lanes 6",
        ),
        ({"batch_size": 64}, "batch_size 64 needs 64 different samples, the training split has 57; .* at most 56"),
        ({"eval_batch_size": 0}, "data.eval_batch_size is 0; it must be at least 1"),
        ({"num_workers": -1}, "data.num_workers is -1; it must be at least 0"),
        ({"worker_memory_gib": -1.0}, "data.worker_memory_gib is -1.0; it must be at least 0"),
        ({"max_skipped": -1}, "data.max_skipped is -1; it must be at least 0"),
        ({"timeout_s": -1.0}, "data.timeout_s is -1.0; it must be at least 0"),
        ({"train_transform": TrainTransform(8, hflip=2.0)}, "train_transform.hflip is 2.0"),
        ({"eval_transform": EvalTransform(8, 4)}, "eval_transform.resize is 4; it must be at least 8"),
    ],
)
def test_wrong_settings_are_refused_at_setup_in_one_line(data, options, message):
    path = options.pop("path", data)
    with pytest.raises(DataError, match=message) as error:
        module(path, **options).setup("fit")
    assert "\n" not in str(error.value)


def test_damage_found_by_a_worker_arrives_as_one_line(data, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", data, copy], check=True)
    dm = module(copy, num_workers=1)
    dm.setup("fit")
    for path in sorted((copy / "train").glob("*.tar")):
        content = bytearray(path.read_bytes())
        content[512] ^= 1
        path.write_bytes(content)
    loader = dm.train_dataloader()
    message = r"train-\d+.tar, sample '.*'.cls at byte 512: a checksum that does not fit"
    with pytest.raises(DataError, match=message) as error:
        list(loader)
    assert "\n" not in str(error.value)
    loader.close()
