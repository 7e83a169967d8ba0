"""Stop anywhere, resume: the trainer sees exactly the samples it had not yet trained on, in the same order."""

import os
import random
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from datamodules.module import ClassificationDataModule
from datamodules.transforms import EvalTransform, TrainTransform

TRAIN = TrainTransform(8, crop=False, auto_augment=None, color_jitter=0.0, random_erasing=0.0)
EVAL = EvalTransform(8, None)
BATCHES = 7  # 57 training samples in batches of 8
EPOCHS = 3
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def module(data, **options):
    options = {"batch_size": 8, "num_workers": 0, "train_transform": TRAIN, "eval_transform": EVAL, **options}
    return ClassificationDataModule(str(data), **options)


class Recorder(LightningModule):
    """A linear classifier that writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 3)
        self.train_ids, self.images, self.val_ids, self.weights = [], [], [], []

    def training_step(self, batch, batch_idx):
        self.train_ids.append(tuple(batch["id"].tolist()))
        self.images.append(batch["image"].double().sum().item())
        losses = torch.nn.functional.cross_entropy(
            self.layer(batch["image"].flatten(1)), batch["label"], reduction="none"
        )
        return (batch["weight"] * losses).mean()

    def validation_step(self, batch, batch_idx):
        self.val_ids += batch["id"].tolist()
        self.weights += batch["weight"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(*callbacks, **options):
    options = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, **options}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **QUIET, **options)


def fit(dm, *callbacks, ckpt=None, **options):
    seed_everything(0, verbose=False)
    model = Recorder()
    trainer(*callbacks, **options).fit(model, datamodule=dm, ckpt_path=ckpt)
    return model


class StopAfter(Callback):
    """Save after `batches` batches from one hook, then die the way a killed process does: without another hook."""

    def __init__(self, path, batches, hook="on_train_batch_end"):
        self.path, self.batches, self.seen = path, batches, 0
        self.hook = hook

    def on_fit_start(self, trainer, model):
        self.model = model

    def on_train_batch_end(self, trainer, *_):
        self.seen += 1
        self.save(trainer, "on_train_batch_end")

    def on_validation_end(self, trainer, *_):
        self.save(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer, "on_train_epoch_end")

    def save(self, trainer, hook):
        if hook == self.hook and self.seen >= self.batches:
            trainer.save_checkpoint(self.path)
            raise KilledError


class SaveAlways(Callback):
    """Keep the newest checkpoint of every batch's and every epoch's end."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.path)


class EpochCounter(Callback):
    """Notes after how many batches in all the trainer sees an epoch begin and end."""

    def __init__(self):
        self.starts, self.ends = [], []

    def on_train_epoch_start(self, trainer, *_):
        self.starts.append(trainer.fit_loop.epoch_loop.batch_progress.total.processed)

    def on_train_epoch_end(self, trainer, *_):
        self.ends.append(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted(data):
    return fit(module(data))


def interrupted(data, path, batches, hook="on_train_batch_end", **options):
    stop = StopAfter(path, batches, hook)
    with pytest.raises(KilledError):
        fit(module(data), stop, **options)
    return stop.model


def test_validation_sees_its_split_once_an_epoch(uninterrupted):
    assert len(uninterrupted.train_ids) == EPOCHS * BATCHES
    assert uninterrupted.val_ids == list(range(21)) * EPOCHS
    assert uninterrupted.weights == [1.0] * 21 * EPOCHS


@pytest.mark.parametrize(
    ("stop", "hook"),
    [(stop, "on_train_batch_end") for stop in (1, 3, 6, 7, 8, 14, 20)]
    + [(stop, hook) for stop in (7, 14) for hook in ("on_validation_end", "on_train_epoch_end")],
)
def test_resume_gives_the_uninterrupted_suffix(data, tmp_path, uninterrupted, stop, hook):
    first = interrupted(data, tmp_path / "x.ckpt", stop, hook)
    second = fit(module(data), ckpt=tmp_path / "x.ckpt")
    assert first.train_ids == uninterrupted.train_ids[:stop]
    assert second.train_ids == uninterrupted.train_ids[stop:]
    assert first.images + second.images == uninterrupted.images  # the augmented pixels, not only the ids
    torch.testing.assert_close(second.layer.weight, uninterrupted.layer.weight, rtol=0, atol=0)


@pytest.mark.parametrize("stop", [5, 7, 14])
@pytest.mark.parametrize("validate", [1.0, 0])
def test_resume_when_training_is_counted_in_steps(data, tmp_path, uninterrupted, stop, validate):
    """Stopping by max_steps at an epoch's end and asking for more is the commonest way to go on training."""
    limits = {"max_epochs": -1, "limit_val_batches": validate}
    counter = EpochCounter()
    first = fit(module(data), SaveAlways(tmp_path / "x.ckpt"), max_steps=stop, **limits)
    second = fit(module(data), counter, ckpt=tmp_path / "x.ckpt", max_steps=19, **limits)
    assert first.train_ids + second.train_ids == uninterrupted.train_ids[:19]
    assert counter.ends == [batches for batches in (7, 14) if batches > stop] + [19]


class DieWithin(StopAfter):
    """Save as a run ends by an exception inside a step: that step has begun, but not trained."""

    def on_train_batch_start(self, trainer, *_):
        if self.seen >= self.batches:
            raise KilledError

    def save(self, trainer, hook):
        pass

    def on_exception(self, trainer, *_):
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("seed", range(16))
def test_random_interruptions_lose_and_repeat_nothing(data, tmp_path, uninterrupted, seed):
    rng = random.Random(seed)
    path, seen, images, counter = None, [], [], EpochCounter()
    fixed = rng.choice([{}, {"val_check_interval": 3}, {"accumulate_grad_batches": 2}])
    while len(seen) < EPOCHS * BATCHES:
        kind = rng.choice([StopAfter, StopAfter, DieWithin])
        hook = rng.choice(["on_train_batch_end", "on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
        stop = kind(tmp_path / f"{len(seen)}.ckpt", rng.randrange(1, 9), hook)
        limits = rng.choice([{}, {"max_steps": EPOCHS * BATCHES}, {"limit_val_batches": rng.choice([0, 1])}])
        try:
            fit(module(data), counter, stop, ckpt=path, **fixed, **limits)
        except KilledError:
            path = stop.path
        seen += stop.model.train_ids[: stop.seen]
        images += stop.model.images[: stop.seen]
    assert seen == uninterrupted.train_ids
    assert images == uninterrupted.images
    assert set(counter.starts) <= {0, 7, 14}
    assert set(counter.ends) <= {7, 14, 21}


@pytest.mark.parametrize("stop", [2, 7, 10])
def test_workers_may_come_and_go_at_a_resume(data, tmp_path, uninterrupted, stop):
    first = StopAfter(tmp_path / "x.ckpt", stop)
    with pytest.raises(KilledError):
        fit(module(data, num_workers=2), first)
    second = fit(module(data, num_workers=1), ckpt=tmp_path / "x.ckpt")
    assert first.model.train_ids + second.train_ids == uninterrupted.train_ids
    assert second.images == uninterrupted.images[stop:]


def test_workers_across_epochs_and_validation_change_nothing(data, uninterrupted):
    model = fit(module(data, num_workers=2))
    assert (model.train_ids, model.images) == (uninterrupted.train_ids, uninterrupted.images)
    assert model.val_ids == uninterrupted.val_ids


def test_accumulation_resumes_at_an_optimizer_step(data, tmp_path):
    whole = fit(module(data), accumulate_grad_batches=3)
    interrupted(data, tmp_path / "x.ckpt", 10, accumulate_grad_batches=3)
    second = fit(module(data), ckpt=tmp_path / "x.ckpt", accumulate_grad_batches=3)
    assert second.train_ids == whole.train_ids[10:]
    torch.testing.assert_close(second.layer.weight, whole.layer.weight, rtol=0, atol=0)


def test_short_epochs_go_on_through_the_data(data, tmp_path, uninterrupted):
    """limit_train_batches makes epochs shorter, it does not show the same beginning of the data in each."""
    short = fit(module(data), max_epochs=4, limit_train_batches=5)
    assert short.train_ids == uninterrupted.train_ids[:20]
    interrupted(data, tmp_path / "x.ckpt", 8, max_epochs=4, limit_train_batches=5)
    second = fit(module(data), ckpt=tmp_path / "x.ckpt", max_epochs=4, limit_train_batches=5)
    assert second.train_ids == uninterrupted.train_ids[8:20]


def test_overfitting_shows_the_same_batches_in_every_epoch(data, uninterrupted):
    model = fit(module(data), overfit_batches=2)
    assert model.train_ids == uninterrupted.train_ids[:2] * EPOCHS


def test_the_stream_survives_a_failed_step(data, uninterrupted):
    """Batches that were fetched, but not trained on, come again when fit is called again."""
    dm, model = module(data), Recorder()
    run = trainer(StopAfter(Path(os.devnull), 99))
    original = model.training_step

    def failing(batch, batch_idx):
        if len(model.train_ids) == 4:
            raise KilledError
        return original(batch, batch_idx)

    model.training_step = failing
    with pytest.raises(KilledError):
        run.fit(model, datamodule=dm)
    assert dm.state_dict()["committed"] == 4
    loader = dm.train_dataloader()
    assert tuple(next(iter(loader))["id"].tolist()) == uninterrupted.train_ids[4]
