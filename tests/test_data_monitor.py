"""Ranks that went through the data in different numbers of steps are an error of this program, and are told apart."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from lightning_modules.callbacks.data_monitor import DataMonitor, data_counts

# Lightning advises so only on machines with more than two cores.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class OtherRank(SingleDeviceStrategy):
    """Adds a rank that has taken one step fewer to every sum over ranks."""

    def __init__(self, device):
        super().__init__(device)
        self.world_size = 2

    def reduce(self, tensor, *args, **kwargs):
        return 2 * tensor - 1


class Plain(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.zeros(6, 1), batch_size=2)


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(strategy):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        max_epochs=1, log_every_n_steps=1, strategy=strategy, callbacks=[DataMonitor()], accelerator="cpu", **quiet
    )
    trainer.fit(Linear(), datamodule=Plain())


def test_equal_steps_pass_and_other_data_modules_count_nothing():
    fit(SingleDeviceStrategy("cpu"))
    assert data_counts(Plain()) == {}


def test_unequal_steps_are_reported_with_the_counts():
    with pytest.raises(RuntimeError, match="rank 0 has taken 3 steps since step 0, the 2 ranks together 5: they must"):
        fit(OtherRank("cpu"))
