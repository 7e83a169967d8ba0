"""`mirrorla fit|validate|test|predict`: LightningCLI in subclass mode, wired to one run directory."""

import logging
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_modules import config_checks, console
from lightning_modules.callbacks.checkpointing import CheckpointConfig
from lightning_modules.callbacks.figures import MonitoringConfig
from lightning_modules.callbacks.preemption import has_started, is_validated
from lightning_modules.checkpoint import step_of
from lightning_modules.config_keys import KeyTree, load_class
from lightning_modules.errors import UsageError, is_users_mistake, one_line
from lightning_modules.exit_codes import GuardStop
from lightning_modules.guards import GuardConfig, Guards, guarded
from lightning_modules.parser import OneLineParser, one_line_complaint
from lightning_modules.run_directory import RunDirectory, default_run_dir, resolve_checkpoint
from lightning_modules.stop_signals import StopRequested
from lightning_modules.strategies import register_strategies
from lightning_modules.tensorboard import SCORES
from lightning_modules.wiring import Wiring, build_callbacks, build_logger, build_plugins, is_terminal

_log = logging.getLogger("mirrorla")
_NOT_OPTIONS = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
_TRAINER_DEFAULTS = {
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the samplers are ours: exact shares on any number of ranks
    "enable_model_summary": False,
    "log_every_n_steps": 10,
}


@dataclass(frozen=True)
class Request:
    """One command, its --config names already turned into files.

    Attributes:
        verb: fit, validate, test or predict.
        argv: its options.
        files: the configuration files, in order.
    """

    verb: str
    argv: list[str]
    files: list[Path]


def run(verb: str, argv: Sequence[str]) -> int:
    """Check the configuration, build everything, run the verb.

    Args:
        verb: fit, validate, test or predict.
        argv: its options.

    Returns:
        Exit code, see exit_codes.py.

    Raises:
        UsageError: a configuration that cannot be run.
    """
    console.quiet_libraries()
    console.speak(console.rank())
    register_strategies()
    try:
        with ExitStack() as closing:
            TrainingCLI(Request(verb, *config_checks.expand_configs(argv)), closing)
    except StopRequested as stop:
        mend = "; continue with --ckpt_path last" if verb == "fit" else ""
        _log.info("%s%s", stop, mend)
        return stop.exit_code
    except GuardStop as stop:
        _log.error("%s", stop)
        return stop.code
    except MisconfigurationException as error:
        mend = "; without a GPU add --config trainer/cpu" if "backend found" in str(error) else ""
        raise UsageError(one_line(error).rstrip(".!") + mend) from error
    finally:
        console.fall_silent()
    return 0


class TrainingCLI(LightningCLI):
    """Parse, build and run one verb; constructing it does all three.

    Args:
        request: the command.
        closing: takes what must be closed when the verb is done or has failed.
    """

    def __init__(self, request: Request, closing: ExitStack) -> None:
        self.request = request
        self._closing = closing
        self._guards: Guards | None = None
        self.run_directory = RunDirectory(Path())
        self.resume_from: Path | None = None
        self._word: str | None = None
        self.config_text = ""
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,  # RunRecord writes it, once the run really starts
            trainer_defaults=dict(_TRAINER_DEFAULTS),
            seed_everything_default=0,
            parser_kwargs={"prog": "mirrorla"},
            parser_class=OneLineParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the requested verb: building the other parsers would take longer than checking a config."""
        return {self.request.verb: _NOT_OPTIONS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that belong to a run and not to Lightning."""
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="Where everything is written; null: runs/<config's name>."
        )
        parser.add_class_arguments(CheckpointConfig, "checkpoint")
        parser.add_class_arguments(MonitoringConfig, "monitoring")
        parser.add_class_arguments(GuardConfig, "guard")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Refuse what jsonargparse would accept or explain badly, then parse."""
        verb, argv = self.request.verb, self.request.argv
        settings = [setting for path in self.request.files for setting in config_checks.read_settings(path)]
        settings += config_checks.command_settings(argv)
        config_checks.refuse_foreign_classes(settings)
        chosen = config_checks.chosen_classes(settings)
        classes = {key: load_class(path, key) for key, path in chosen.items()}
        words = [word for action in self._parser(verb)._actions for word in action.option_strings]
        options = [word[2:] for word in words if word.startswith("--")]
        config_checks.refuse_unknown_keys(settings, KeyTree(options, classes))
        is_help = any(word == "-h" or word.startswith("--help") or ".help" in word for word in argv)
        for key in ("model", "data"):
            if key not in chosen and not is_help:
                raise UsageError(f"no {key} is configured; give --config, for example --config digits/classification")
        self.config = parser.parse_args([verb, *argv])

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint never changes the configuration."""

    def before_instantiate_classes(self) -> None:
        """Settle the run directory and the checkpoint while nothing heavy exists yet."""
        verb = self.request.verb
        options = self.config[verb]
        first = self.request.files[0] if self.request.files else None
        self.run_directory = RunDirectory(Path(options.run_dir) if options.run_dir else default_run_dir(first))
        options.run_dir = str(self.run_directory.root)
        word = options.pop("ckpt_path")
        self.config_text = self._parser(verb).dump(options, skip_none=False)
        self.resume_from = resolve_checkpoint(
            word, self.run_directory, training=verb == "fit", hashes=console.rank() == 0
        )
        options.ckpt_path = None if self.resume_from is None else str(self.resume_from)
        if self.resume_from is None and verb != "fit" and not _has_pretrained(options.model):
            raise UsageError(
                f"{self.run_directory.checkpoints} holds no checkpoint; train with mirrorla fit, "
                "or give --run_dir RUN, --ckpt_path FILE or --model.backbone.pretrained FILE"
            )
        self._word = word

    def instantiate_classes(self) -> None:
        """Build data, model and Trainer; what their options refuse arrives here."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if is_users_mistake(error):
                raise
            raise UsageError(one_line_complaint(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with this project's callbacks, logger and checkpoint files."""
        options = self.config_init[self.request.verb]
        self._open_run_directory(options.guard)
        wiring = Wiring(
            verb=self.request.verb,
            run=self.run_directory,
            resume_from=self.resume_from,
            seed=int(options.seed_everything),
            config_text=self.config_text,
            checkpoint=options.checkpoint,
            monitoring=options.monitoring,
            guards=self._guards,
        )
        self.trainer_defaults["callbacks"] = build_callbacks(wiring, self.model, options.trainer.enable_progress_bar)
        try:
            return super().instantiate_trainer(
                default_root_dir=str(self.run_directory.root),
                enable_progress_bar=options.trainer.enable_progress_bar is not False and is_terminal(),
                logger=build_logger(wiring, options.trainer.logger),
                plugins=build_plugins(options.trainer.plugins),
                **kwargs,
            )
        except (TypeError, ValueError) as error:  # the Trainer checks its own options
            raise UsageError(f"trainer: {one_line(error)}") from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Keep Lightning's tables and collected predictions out of the way: ours say the same."""
        quiet = {"verbose": False, "return_predictions": False}
        given = super()._prepare_subcommand_kwargs(subcommand)
        return {key: quiet.get(key, value) for key, value in given.items()}

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; a user's mistake that shows only while running exits with 1."""
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if has_started(self.trainer) and is_users_mistake(error):
                error.exit_code = 1  # type: ignore[attr-defined]
            raise

    def after_fit(self) -> None:
        """Print the result and where it is."""
        if not is_validated(self.trainer) and self.trainer.limit_val_batches != 0:
            if not has_started(self.trainer):  # a finished run, started again: its curve is complete
                self.trainer.loggers = []
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        self._print_scores("val")
        _print(f"run directory   {self.run_directory.root}")
        _print(f"TensorBoard     {_tensorboard_program()} --logdir {self.run_directory.tensorboard}")

    def after_validate(self) -> None:
        """Print the scores."""
        self._print_scores("val")

    def after_test(self) -> None:
        """Print the scores."""
        self._print_scores("test")

    def _print_scores(self, split: str) -> None:
        metrics = self.trainer.callback_metrics
        weights = " (EMA)" if getattr(self.model, "ema", None) is not None else ""
        title = {"val": "validation", "test": "test"}[split]
        for name, label in SCORES.items():
            if f"{split}/{name}" in metrics:
                _print(f"{title} {label}{weights}  {float(metrics[f'{split}/{name}']):.2%}")

    def _open_run_directory(self, config: GuardConfig) -> None:
        """Only now, with a model that could be built, is anything written."""
        self.run_directory.prepare()
        if self.request.verb == "fit":
            step = 0 if self.resume_from is None else step_of(self.resume_from)
            guards = guarded(self.run_directory, config, console.rank(), step, self.config_text)
            self._guards = self._closing.enter_context(guards)
        console.also_log_to(self.run_directory.logs, console.rank())
        _log.info("run directory  %s", self.run_directory.root)
        if self.resume_from is not None:
            _log.info("checkpoint     %s", self.resume_from)
        elif self._word == "last":
            _log.info("checkpoint     none yet in %s: starting from step 0", self.run_directory.checkpoints)


def _tensorboard_program() -> str:
    """How this shell can start TensorBoard: by name, or beside the Python that runs without being activated."""
    beside = Path(sys.executable).with_name("tensorboard")
    if shutil.which("tensorboard") or not beside.is_file():
        return "tensorboard"
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


def _has_pretrained(model: Any) -> bool:
    backbone = model.init_args.get("backbone")
    return backbone is not None and backbone.get("pretrained") is not None


def _print(line: str) -> None:
    if console.rank() == 0:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
