"""A checkpoint of another order is refused, naming what differs and the flag that allows it; allowed, it goes on."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from datamodules.indexer import index_dataset
from datamodules.module import ClassificationDataModule
from datamodules.resume import changed_fields
from datamodules.sampler import TrainBatchSampler
from datamodules.transforms import EvalTransform, TrainTransform
from datamodules.types import DataError

TRAIN = TrainTransform(8, crop=False, auto_augment=None, color_jitter=0.0, random_erasing=0.0)
EVAL = EvalTransform(8, None)
BATCHES = 7  # 57 training samples in batches of 8
EPOCHS = 3
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def module(data, **options):
    options = {"batch_size": 8, "num_workers": 0, "train_transform": TRAIN, "eval_transform": EVAL, **options}
    return ClassificationDataModule(str(data), **options)


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 3)
        self.train_ids = []

    def training_step(self, batch, batch_idx):
        self.train_ids.append(tuple(batch["id"].tolist()))
        losses = torch.nn.functional.cross_entropy(
            self.layer(batch["image"].flatten(1)), batch["label"], reduction="none"
        )
        return (batch["weight"] * losses).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class KilledError(Exception):
    pass


class SaveAlways(Callback):
    """Keep the newest checkpoint; die after one of them."""

    def __init__(self, path, last=None):
        self.path, self.last = path, last

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.path)
        if trainer.global_step == self.last:
            raise KilledError

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.path)


def fit(dm, *callbacks, ckpt=None, max_epochs=EPOCHS):
    seed_everything(0, verbose=False)
    model = Recorder()
    Trainer(accelerator="cpu", callbacks=list(callbacks), max_epochs=max_epochs, limit_val_batches=0, **QUIET).fit(
        model, datamodule=dm, ckpt_path=ckpt
    )
    return model


def interrupted(data, path, batches):
    with pytest.raises(KilledError):
        fit(module(data), SaveAlways(path, batches))


fields = st.sampled_from(["seed", "lanes", "window", "batch_size", "repeats", "dataset_digest", "order_version"])


@given(st.dictionaries(fields, st.integers(0, 2)), st.sets(fields))
def test_what_differs_is_refused_unless_it_is_allowed(changes, allowed):
    then = dict.fromkeys(("seed", "lanes", "window", "batch_size", "repeats", "order_version", "dataset_digest"), 0)
    differing = [name for name in then if changes.get(name, 0) != 0]
    refused = [name for name in differing if name not in allowed]
    if not refused:
        assert changed_fields(then, {**then, **changes}, allowed) == differing
        return
    with pytest.raises(
        DataError, match=f"written with data.{refused[0]} 0, this run has {changes[refused[0]]}; resume"
    ):
        changed_fields(then, {**then, **changes}, allowed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "the checkpoint was written with data.seed 0, this run has 1; resume with the same value"),
        ({"batch_size": 16}, "data.batch_size 8, this run has 16"),
        ({"lanes": 4}, "data.lanes 8, this run has 4"),
        ({"window": 10}, "data.window 8000, this run has 10"),
        ({"repeats": 2, "lanes": 4}, "data.lanes 8, this run has 4"),
    ],
)
def test_a_checkpoint_of_another_order_is_refused(data, tmp_path, options, message):
    interrupted(data, tmp_path / "x.ckpt", 2)
    with pytest.raises(DataError, match=message):
        fit(module(data, **options), ckpt=tmp_path / "x.ckpt")


def take(data, position, count, **options):
    """Ids of global batches from a position on, straight from the order."""
    dm = module(data, **options)
    stream = iter(TrainBatchSampler(dm.order, start=position))
    return [tuple(next(stream).ids.tolist()) for _ in range(count)]


@pytest.mark.parametrize(
    "options",
    [{"seed": 1}, {"lanes": 4}, {"window": 10}, {"batch_size": 16}, {"repeats": 2, "lanes": 2}],
    ids=lambda options: "-".join(options),
)
def test_an_allowed_change_goes_on_at_the_same_batch_of_the_new_order(data, tmp_path, caplog, options):
    interrupted(data, tmp_path / "x.ckpt", 9)
    with pytest.raises(DataError, match=r"allow the change with --data.allow_changed '\["):
        fit(module(data, **options), ckpt=tmp_path / "x.ckpt")
    model = fit(
        module(data, **options, allow_changed=list(options)), SaveAlways(tmp_path / "y.ckpt"), ckpt=tmp_path / "x.ckpt"
    )
    assert model.train_ids == take(data, 9, len(model.train_ids), **options)
    names = ", ".join(f"data.{name}" for name in module(data)._guard() if name in options)
    assert f"{names} changed, as allowed: samples of the epoch under way" in caplog.text
    caplog.clear()
    more = fit(module(data, **options), ckpt=tmp_path / "y.ckpt", max_epochs=EPOCHS + 1)  # now it is this run's order
    assert more.train_ids == take(data, 9 + len(model.train_ids), len(more.train_ids), **options)
    assert len(more.train_ids) == 57 // options.get("batch_size", 8)
    assert "changed" not in caplog.text


def test_another_dataset_is_refused_unless_allowed(data, tmp_path):
    interrupted(data, tmp_path / "x.ckpt", 2)
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    index_dataset(copy, ["a", "b", "other"])
    with pytest.raises(
        DataError, match=r"written with data.dataset_digest [0-9a-f]{64}, this run has [0-9a-f]{64}; resume"
    ):
        fit(module(copy), ckpt=tmp_path / "x.ckpt")
    model = fit(module(copy, allow_changed=["dataset_digest"]), ckpt=tmp_path / "x.ckpt")
    assert len(model.train_ids) == EPOCHS * BATCHES - 2


def test_another_version_of_the_order_is_refused_whatever_is_allowed(data, tmp_path):
    interrupted(data, tmp_path / "x.ckpt", 2)
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    content["ClassificationDataModule"]["guard"]["order_version"] = 0
    torch.save(content, tmp_path / "y.ckpt")
    with pytest.raises(
        DataError, match="order_version 0, this run has 1; resume with the version of this program that"
    ):
        fit(module(data, allow_changed=["seed", "dataset_digest"]), ckpt=tmp_path / "y.ckpt")


def test_a_checkpoint_whose_position_was_altered_is_refused(data, tmp_path):
    interrupted(data, tmp_path / "x.ckpt", 2)
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    content["ClassificationDataModule"]["committed"] = 3
    torch.save(content, tmp_path / "y.ckpt")
    with pytest.raises(DataError, match="data position is batch 3, its training loop's 2; it was altered"):
        fit(module(data), ckpt=tmp_path / "y.ckpt")
