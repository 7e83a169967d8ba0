"""The run directory: where it is, whether it may be used, and which checkpoint a word like `last` means in it.

RUN/config.yaml, environment.json, attempts.jsonl, checkpoints/, tensorboard/, logs/
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lightning_modules.checkpoint import (
    LATEST,
    find,
    first_valid,
    list_checkpoints,
    newest_valid,
    read_latest,
    read_scores,
    verify,
)
from lightning_modules.errors import UsageError


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside one run directory.

    Attributes:
        root: the directory itself.
    """

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of the event files."""
        return self.root / "tensorboard"

    @property
    def logs(self) -> Path:
        """Folder of the text logs, one per rank."""
        return self.root / "logs"

    @property
    def config(self) -> Path:
        """The resolved configuration of the latest attempt."""
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, devices and command of the latest attempt."""
        return self.root / "environment.json"

    def prepare(self) -> None:
        """Create the directory, readable by its owner only, and prove that it can be written.

        Raises:
            PermissionError: naming the directory and the mend.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in (self.checkpoints, self.logs):
                folder.mkdir(exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise PermissionError(
                f"run_dir {self.root} cannot be written ({os.strerror(error.errno or 0)}); give another --run_dir"
            ) from error


def default_run_dir(config: Path | None) -> Path:
    """`runs/<name>`: configs/digits/classification.yaml gives runs/digits-classification.

    Args:
        config: the first --config file, None without one.
    """
    if config is None:
        return Path("runs/unnamed")
    parts = config.resolve().with_suffix("").parts
    if "configs" in parts[:-1]:
        last = len(parts) - 1 - parts[::-1].index("configs")
        return Path("runs") / "-".join(parts[last + 1 :])
    return Path("runs") / parts[-1]


def named_checkpoint(word: str, run_dir: Path | None) -> Path:
    """The checkpoint that a verb's CKPT means: a run, a checkpoint, or best or last of --run_dir.

    Args:
        word: as typed.
        run_dir: the run that best and last refer to.

    Raises:
        UsageError: best or last of no run.
        ValueError, FileNotFoundError: as resolve_checkpoint.
    """
    if word in ("best", "last") and run_dir is None:
        raise UsageError(f"{word} of which run? give --run_dir RUN, or the run itself")
    chosen = resolve_checkpoint(word, RunDirectory(run_dir or Path(word)), training=False)
    assert chosen is not None, "a word was given"
    return chosen


def resolve_checkpoint(word: str | None, run: RunDirectory, *, training: bool, hashes: bool = True) -> Path | None:
    """Turn --ckpt_path into a checkpoint that verifies.

    Args:
        word: "last", "best", a checkpoint directory, a LATEST file, another run directory, or None.
        run: the run directory of this command.
        training: fit (True) continues from `last`; the evaluating verbs prefer `best`.
        hashes: read all files of the candidates; ranks other than 0 need not, they take its choice.

    Returns:
        The directory; None when a training starts from step 0, or when nothing was trained and nothing was asked for.

    Raises:
        ValueError: training into a run that already has checkpoints without saying so, an http address, a checkpoint
            that is damaged or a link.
        FileNotFoundError: no such directory, or no checkpoint in the run.
    """
    if word is None:
        return _without_word(run, training, hashes)
    if word == "last" and training:
        return newest(run, hashes=hashes)
    if word in ("last", "best"):
        return _require(newest(run, hashes=hashes) if word == "last" else best(run, hashes=hashes), word, run)
    if "://" in word:
        raise ValueError(f"ckpt_path {word!r} is a remote address; copy the directory here first and give its path")
    path = Path(word)
    if path.name == LATEST and path.is_file():
        path = read_latest(path)
    if RunDirectory(path).checkpoints.is_dir():
        other = RunDirectory(path)
        chosen = None if training else best(other, hashes=hashes)
        return _require(chosen or newest(other, hashes=hashes), word, other)
    if path.is_file():
        raise ValueError(
            f"ckpt_path {word} is a file; a checkpoint is a directory, weights go to --model.backbone.pretrained"
        )
    if not path.exists():
        raise FileNotFoundError(f"ckpt_path {word} does not exist; use last, best, a checkpoint directory or a run")
    verify(path, hashes=hashes)
    return path


def newest(run: RunDirectory, *, hashes: bool = True) -> Path | None:
    """The checkpoint with the highest step that verifies, if any."""
    return newest_valid(run.checkpoints, hashes=hashes)


def best(run: RunDirectory, *, hashes: bool = True) -> Path | None:
    """The best evaluated checkpoint that still exists and verifies, if any."""
    found = (find(run.checkpoints, score.step) for score in read_scores(run.checkpoints))
    return first_valid([path for path in found if path is not None], hashes=hashes)


def _without_word(run: RunDirectory, training: bool, hashes: bool) -> Path | None:
    if not training:
        return best(run, hashes=hashes) or newest(run, hashes=hashes)
    if existing := list_checkpoints(run.checkpoints):
        raise ValueError(
            f"run_dir {run.root} already holds {existing[-1].name}; "
            "continue it with --ckpt_path last, or give another --run_dir"
        )
    return None


def _require(path: Path | None, word: str, run: RunDirectory) -> Path:
    if path is None:
        raise FileNotFoundError(f"ckpt_path {word}: nothing in {run.checkpoints} yet; train with mirrorla fit")
    return path
