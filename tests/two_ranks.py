"""Run by test_two_ranks.py, on one rank and on two: train, evaluate, write down what every rank was given."""

import json
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from datamodules.module import ClassificationDataModule
from datamodules.transforms import EvalTransform, TrainTransform

SAVED_AFTER = 8


class Recorder(LightningModule):
    """A linear classifier; its weights at the end tell whether the gradients were averaged rightly."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 3)
        self.train_ids, self.val_ids = [], []

    def training_step(self, batch, batch_idx):
        self.train_ids.append(batch["id"].tolist())
        logits = self.layer(batch["image"].flatten(1))
        losses = torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")
        return (batch["weight"] * losses).mean()

    def validation_step(self, batch, batch_idx):
        self.val_ids += list(zip(batch["id"].tolist(), batch["weight"].tolist(), strict=True))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Save(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == SAVED_AFTER:
            trainer.save_checkpoint(self.path)


def run(data, checkpoint, out, devices):
    """Train to the end of 3 epochs: from the start on one rank, which saves the checkpoint; from it on more."""
    seed_everything(0, verbose=False)
    transform = TrainTransform(8, crop=False, auto_augment=None, color_jitter=0.0, random_erasing=0.0)
    dm = ClassificationDataModule(
        str(data), 9, num_workers=0, lanes=3, train_transform=transform, eval_transform=EvalTransform(8, None)
    )
    trainer = Trainer(
        strategy="ddp" if devices > 1 else "auto",
        devices=devices,
        accelerator="cpu",
        max_epochs=3,
        callbacks=[] if devices > 1 else [Save(checkpoint)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    model = Recorder()
    trainer.fit(model, datamodule=dm, ckpt_path=checkpoint if devices > 1 else None)
    trainer.limit_val_batches = 1.0
    trainer.validate(model, datamodule=dm, verbose=False)
    record = {"train": model.train_ids, "val": model.val_ids, "weights": model.layer.weight.tolist()}
    (Path(out) / f"{devices}-{trainer.global_rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "The .srun. command is available", UserWarning)
    warnings.filterwarnings(
        "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning
    )  # Lightning 2.6
    run(sys.argv[1], sys.argv[2], sys.argv[3], 2)
