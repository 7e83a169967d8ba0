"""Everything that `fit` refuses about its options, found out where the job is submitted and not after hours in a queue.

Options are parsed as `fit` parses them; model, transforms and Trainer are built, without data, devices or memory. Only
what a node alone can tell stays for the node: its devices and cores, and the data itself.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import StrategyRegistry

from cluster.deepspeed import require_stage
from datamodules.base_module import PackedDataModule
from lightning_modules import config_checks, console
from lightning_modules.callbacks.checkpointing import CheckpointConfig
from lightning_modules.callbacks.figures import MonitoringConfig
from lightning_modules.errors import UsageError, is_users_mistake, nearest, one_line
from lightning_modules.guards import GuardConfig
from lightning_modules.parser import one_line_complaint
from lightning_modules.strategies import register_strategies
from lightning_modules.training_cli import Request, TrainingCLI

# The Trainer's options that are not its own to check here: devices, what it would write, and global switches.
_ELSEWHERE = {
    "accelerator": "cpu",
    "strategy": "auto",
    "devices": 1,
    "num_nodes": 1,
    "precision": None,
    "sync_batchnorm": False,
    "benchmark": None,
    "deterministic": None,
    "detect_anomaly": False,
    "logger": False,
    "callbacks": None,
    "plugins": None,
    "profiler": None,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


class _Parsed(Exception):  # noqa: N818 - carries the result out of a constructor that would go on to train
    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options


class _ParseOnly(TrainingCLI):
    """The parsing of `fit`, and nothing of what it does afterwards."""

    def _set_seed(self) -> None:
        """The caller's randomness is not this command's."""

    def before_instantiate_classes(self) -> None:
        raise _Parsed(self.config["fit"])


def parse(argv: Sequence[str]) -> Any:
    """The options of `fit`, checked key by key.

    Raises:
        UsageError: an unknown key (the nearest is named), a wrong type, ….
    """
    console.quiet_libraries()
    register_strategies()
    with ExitStack() as closing:
        try:
            _ParseOnly(Request("fit", *config_checks.expand_configs(argv)), closing)
        except _Parsed as parsed:
            return parsed.options
    raise AssertionError("the parser does not stop before it builds")


def refuse_options(options: Any) -> None:
    """Build what the options describe, so that values which no key's type forbids are refused, too.

    Args:
        options: of `parse`.

    Raises:
        UsageError: in one line with the mend.
    """
    _refuse_names(options.trainer)
    _refuse_deepspeed(options.trainer.get("strategy"))
    for key, group in (("checkpoint", CheckpointConfig), ("monitoring", MonitoringConfig), ("guard", GuardConfig)):
        group(**options[key].as_dict())
    try:
        with torch.device("meta"):
            build_model(options.model)
        data = build_data(options.data)
        if isinstance(data, PackedDataModule):
            data.task.train_pipeline(data.train_transform)
            data.task.eval_pipeline(data.eval_transform)
    except ValueError as error:
        if is_users_mistake(error):
            raise
        raise UsageError(one_line_complaint(str(error))) from error
    try:
        Trainer(**{**options.trainer.as_dict(), **_ELSEWHERE})
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UsageError(f"trainer: {one_line(error)}") from error


def build_model(options: Any) -> LightningModule:
    """The module alone, without the weights it may start from and without its averaged copy.

    Args:
        options: `model` of the options.
    """
    written = options.as_dict()
    arguments = written.setdefault("init_args", {})
    if "ema_decay" in arguments:
        arguments["ema_decay"] = None
    if isinstance(arguments.get("backbone"), dict):
        arguments["backbone"]["pretrained"] = None
    model: LightningModule = _build(LightningModule, "model", written)
    return model


def build_data(options: Any) -> LightningDataModule:
    """The data module alone; it opens nothing before its set-up.

    Args:
        options: `data` of the options.
    """
    data: LightningDataModule = _build(LightningDataModule, "data", options.as_dict())
    return data


def _build(base: type, key: str, written: dict[str, Any]) -> Any:
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(base, key, required=True)
    return getattr(parser.instantiate_classes(parser.parse_object({key: written})), key)


def _refuse_deepspeed(strategy: Any) -> None:
    """A DeepSpeed configuration written out; the strategy itself would import DeepSpeed and look for devices."""
    config = None if strategy is None or isinstance(strategy, str) else strategy.get("init_args.config")
    if isinstance(config, dict):
        require_stage(config)


def _refuse_names(trainer: Any) -> None:
    """Names that Lightning looks up only when it has found its devices."""
    for key, known in (("strategy", StrategyRegistry), ("accelerator", AcceleratorRegistry)):
        name, valid = trainer.get(key), sorted({"auto", "gpu", *known} if key == "accelerator" else {"auto", *known})
        if isinstance(name, str) and name not in valid:
            near = nearest(name, valid)
            hint = f"nearest: {near}" if near else f"valid: {', '.join(valid)}"
            raise UsageError(f"trainer.{key} {name!r} is not known; {hint}")
