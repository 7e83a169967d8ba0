"""What the run directory, TensorBoard and the terminal say about a run: command, environment, config, attempts."""

import json
import logging
import sys

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.attempts import Attempt
from lightning_modules.commit import commit_text
from lightning_modules.environment import describe_environment, redact
from lightning_modules.run_directory import RunDirectory
from lightning_modules.tensorboard import Tag, as_markdown

_log = logging.getLogger("mirrorla")


class RunRecord(Callback):
    """Record a training on rank 0: config.yaml, environment.json, and the same with the attempt as TensorBoard texts.

    Args:
        run: the run directory.
        config: the resolved configuration as YAML.
        attempt: this start of the run; None on other ranks, or where attempts are not counted.
    """

    def __init__(self, run: RunDirectory, config: str, attempt: Attempt | None) -> None:
        self._run = run
        self._config = redact(config)
        self._attempt = attempt

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record of this attempt."""
        if not trainer.is_global_zero:
            return
        environment = json.dumps(describe_environment(sys.argv), indent=2)
        commit_text(self._run.config, self._config)
        commit_text(self._run.environment, environment + "\n")
        if self._attempt is not None:
            _log.info("%s", self._attempt)
        if trainer.logger is None:
            return
        writer, step = trainer.logger.experiment, trainer.global_step  # type: ignore[attr-defined]
        writer.add_text(Tag.CONFIG, as_markdown(self._config), step)
        writer.add_text(Tag.ENVIRONMENT, as_markdown(environment, "json"), step)
        if self._attempt is not None:
            writer.add_text(Tag.ATTEMPT, str(self._attempt), step)


class Introduction(Callback):
    """Say in a few lines, once, what is about to run on what."""

    def __init__(self) -> None:
        self._is_done = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before training."""
        self._introduce(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before an evaluation that stands alone."""
        if trainer.state.fn != "fit":
            self._introduce(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a test."""
        self._introduce(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a prediction."""
        self._introduce(trainer, pl_module)

    def _introduce(self, trainer: Trainer, module: LightningModule) -> None:
        if self._is_done:
            return
        self._is_done = True
        describe = getattr(module, "describe", None)
        _log.info("model          %s", describe() if describe else type(module).__name__)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data is not None and hasattr(data, "dataset_digest"):
            _log.info("dataset        %s", data.opened)
            if trainer.state.fn == "test" and "test" not in data.opened.splits:
                _log.info("split          there is no test split: testing on the validation split")
        devices = f"{trainer.world_size} x {trainer.strategy.root_device.type}"
        _log.info("devices        %s, precision %s", devices, trainer.precision)
