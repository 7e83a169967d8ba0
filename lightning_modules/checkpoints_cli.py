"""`mirrorla checkpoints RUN`: list, verify, prune, convert. No torch but for converting."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_modules.checkpoint import Manifest, list_checkpoints, read_scores, step_of, verify
from lightning_modules.commit import discard, sync_directory, sync_file, temporary
from lightning_modules.errors import UsageError, one_line
from lightning_modules.lease import acquire
from lightning_modules.retention import surplus
from lightning_modules.run_directory import RunDirectory, resolve_checkpoint
from lightning_modules.verb_parser import VerbParser

_FILE_WIDTH = 140
_DESCRIPTION = "List the checkpoints of a run; verify, prune or convert them."
_EPILOG = "RUN is a run directory; --convert also takes one checkpoint's directory. Exit code 1: one is damaged."


def run(verb: str, argv: Sequence[str]) -> int:
    """Look at the checkpoints of a run, or change them.

    Args:
        verb: "checkpoints".
        argv: the directory and options.

    Returns:
        0; 1 if a checkpoint that was to be verified is damaged.

    Raises:
        UsageError: options that cannot be carried out.
        ValueError: a checkpoint to convert is damaged.
    """
    parser = VerbParser(verb, _DESCRIPTION, _EPILOG)
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with its hash")
    parser.add_argument(
        "--prune", type=int, metavar="N", help="keep the newest N and the best ranked, remove the others"
    )
    parser.add_argument("--convert", type=Path, metavar="OUT", help="write the best one's weights to OUT.safetensors")
    options = parser.parse_args(argv)
    if options.convert is not None:
        convert(options.run, options.convert)
        return 0
    directory = RunDirectory(options.run)
    if not directory.checkpoints.is_dir():
        raise UsageError(f"{options.run} is no run directory: it has no folder checkpoints")
    if options.prune is not None:
        prune_run(directory, options.prune)
    return show(directory, hashes=options.verify)


def show(directory: RunDirectory, *, hashes: bool) -> int:
    """Print the checkpoints of a run, oldest first; returns how many of them are damaged, at most 1."""
    table = Table("checkpoint", "epoch", "size", "written by", "attempt", "code", "rank", "state", box=None)
    ranks = {score.step: place for place, score in enumerate(read_scores(directory.checkpoints), 1)}
    is_damaged = False
    for path in list_checkpoints(directory.checkpoints):
        rank = str(ranks.get(step_of(path), ""))
        try:
            manifest = verify(path, hashes=hashes)
        except (ValueError, OSError) as error:
            is_damaged = True
            table.add_row(path.name, "", "", "", "", "", rank, Text(one_line(error)))
        else:
            table.add_row(path.name, *_cells(manifest), rank, "verified" if hashes else "whole, not read")
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    console.print(table if table.row_count else f"{directory.checkpoints} holds no checkpoint yet")
    return int(is_damaged)


def prune_run(directory: RunDirectory, keep_last: int) -> None:
    """Remove all but the newest verified and the ranked checkpoints, while no job holds the run.

    Raises:
        UsageError: nothing would stay, or a job holds the run; it is named.
    """
    if keep_last < 1:
        raise UsageError(f"--prune {keep_last} must be 1 or above")
    lease = acquire(directory.root)
    try:
        ranked = {score.step for score in read_scores(directory.checkpoints)}
        for path in surplus(directory.checkpoints, ranked, keep_last, hashes=True):
            discard(path)
            _print(f"removed {path.name}")
    finally:
        lease.release()


def convert(source: Path, out: Path) -> None:
    """Write the weights of a checkpoint, of whatever strategy, as one safetensors file.

    Args:
        source: a run directory, of which the best or else the newest is taken, or a checkpoint's directory.
        out: a new file.

    Raises:
        UsageError: `out` has another ending or exists.
        ValueError: the checkpoint is damaged or holds objects that would run code.
        FileNotFoundError: there is none.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"--convert {out} must end in .safetensors")
    if out.exists():
        raise UsageError(f"--convert {out} exists already; give another name, or remove it first")
    chosen = resolve_checkpoint(str(source), RunDirectory(source), training=False, hashes=False)
    assert chosen is not None
    from safetensors.torch import save_file
    from torch import Tensor

    from lightning_modules.checkpoint import load_plain

    weights = load_plain(chosen)["state_dict"]
    tensors = {name: value.contiguous() for name, value in weights.items() if isinstance(value, Tensor)}
    new = temporary(out)
    try:
        save_file(tensors, new, {"format": "pt", "checkpoint": chosen.name})
        sync_file(new)
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)
    sync_directory(out.parent)
    _print(f"{out}: {len(tensors)} tensors of {chosen}")


def _cells(manifest: Manifest) -> tuple[str, ...]:
    ranks = "1 rank" if manifest.world_size == 1 else f"{manifest.world_size} ranks"
    size = f"{manifest.bytes / 2**20:.1f} MiB"
    commit = (manifest.git or "")[:12]
    return str(manifest.epoch), size, f"{ranks}, {manifest.strategy}", str(manifest.attempt), commit


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
