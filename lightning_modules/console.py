"""What reaches the terminal: our own short lines, and none of the libraries' advertisements, tips and deprecations."""

import logging
import sys
import warnings
from pathlib import Path

_FORMAT = "%(message)s"
_FILE_FORMAT = "%(asctime)s %(levelname)s %(message)s"

_NOISE = (
    r".*srun.*command is available.*",
    r".*does not have many workers.*",
    r".*number of training batches .* is smaller than the logging interval.*",
    r".*dataloader is not resumable.*",
    r".*is not safe to call.*fork.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*callbacks used to create the checkpoint need to be provided.*",  # an evaluation has no use for their state
    r".*No positive samples in targets.*",
    r".*GPU available but not used.*",
    r".*Found .* module\(s\) in eval mode.*",
    r"(?s).*Grad strides do not match bucket view strides.*",
    r".*recommended to use `self\.log\(.*sync_dist=True.*",
)


def quiet_libraries() -> None:
    """Silence what a user can do nothing about; errors and our own warnings stay."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)


def rank() -> int:
    """Global rank of this process, as the launcher announced it; 0 before anything was launched."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    found: int = getattr(rank_zero_only, "rank", 0) or 0
    return found


def speak(rank: int) -> None:
    """Let the logger `mirrorla` write to the terminal from rank 0, and warnings from every rank.

    Args:
        rank: global rank of this process.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    fall_silent()
    logger = logging.getLogger("mirrorla")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def also_log_to(folder: Path, rank: int) -> None:
    """Append what the logger `mirrorla` says on this rank to logs/rank_<n>.log."""
    handler = logging.FileHandler(folder / f"rank_{rank}.log")
    handler.setFormatter(logging.Formatter(_FILE_FORMAT))
    logging.getLogger("mirrorla").addHandler(handler)


def fall_silent() -> None:
    """Close what `speak` and `also_log_to` opened."""
    logger = logging.getLogger("mirrorla")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
