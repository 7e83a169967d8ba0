"""What the mirrors do, on one fixed batch, after validations: the numbers and histograms of mirrorla.diagnostics."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_modules.callbacks.figures import MonitoringConfig, curve_step, is_last_validation
from mirrorla.diagnostics import mirror_histograms, mirror_metrics


class MirrorMetrics(Callback):
    """Log the mirror metrics of the evaluated network on rank 0; nothing for a network without mirrors.

    Args:
        config: how often and on how many images.
    """

    def __init__(self, config: MonitoringConfig) -> None:
        self._config = config
        self._num_validations = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure when it is time."""
        every = self._config.mirrors_every_n_validations
        if trainer.state.fn != "fit" or trainer.sanity_checking or every == 0:
            return
        is_time = self._num_validations % every == 0 or is_last_validation(trainer)
        self._num_validations += 1
        if not is_time or not trainer.is_global_zero or trainer.logger is None:
            return
        network: nn.Module = getattr(pl_module, "evaluated", pl_module)
        images = trainer.datamodule.probe_batch(self._config.num_probes)["image"].to(pl_module.device)  # type: ignore[attr-defined]
        step = curve_step(trainer)
        trainer.logger.log_metrics(mirror_metrics(network, images), step=step)
        for tag, values in mirror_histograms(network, images).items():
            trainer.logger.experiment.add_histogram(tag, values, step)  # type: ignore[attr-defined]
