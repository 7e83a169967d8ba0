"""What is wrong with a run, in words, each with its mend. No torch; a check takes what was read and says sentences."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.checkpoint import verify
from lightning_modules.crash_loop import MAX_RESTARTS, fruitless
from lightning_modules.exit_codes import ExitCode
from lightning_modules.health import Health, Rank

CONTINUE = "start the same command with --ckpt_path last"
MANY_SKIPS = 10
_LEAST_FREE = 1 << 30
_MENDS = {
    ExitCode.NO_SPACE: f"free some space, then {CONTINUE}",
    ExitCode.NOT_FINITE: "look at the newest folder in bundles/, then lower model.optim.lr or mend the data",
    ExitCode.CRASH_LOOP: "mend the cause, then start once with --guard.allow_crash_loop true",
    ExitCode.LEASE_LOST: "another job goes on with the run; nothing to do here",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        what: one sentence.
        mend: what to do.
        is_serious: whether the run is sick from it; otherwise it is just worth knowing.
    """

    what: str
    mend: str
    is_serious: bool = True


def diagnose(health: Health) -> list[Finding]:
    """Everything that is wrong with a run; reads its newest checkpoints whole."""
    return [finding for check in CHECKS for finding in check(health)]


def check_ranks(health: Health) -> Iterator[Finding]:
    """Dead, stopped, hanging, silent and missing ranks of a run that should be running."""
    if health.condition != "running":
        return
    for rank in health.ranks:
        yield from _check_rank(rank)
    world_size = max((rank.beat.world_size for rank in health.ranks), default=0)
    if missing := sorted(set(range(world_size)) - {rank.beat.rank for rank in health.ranks}):
        yield Finding(f"rank {missing[0]} of {world_size} has left no heartbeat", "look at its log; stop the job")


def check_owner(health: Health) -> Iterator[Finding]:
    """A holder that is gone, or an attempt that failed."""
    last = health.last
    if last is None:
        return
    if health.condition == "lost":
        who = f"process {last.pid} on {last.host}" + (f" (job {last.job})" if last.job else "")
        yield Finding(f"{who} died at step {health.step} without a word: killed, or out of memory", CONTINUE)
    elif health.condition == "failed":
        mend = _MENDS.get(ExitCode(last.code)) if last.code in set(ExitCode) else None
        default = f"see {health.root / 'logs'}, then {CONTINUE}"
        yield Finding(f"attempt {last.number} ended at step {health.step}: {last.reason}", mend or default)


def check_progress(health: Health) -> Iterator[Finding]:
    """A crash loop."""
    last = health.last
    if last is None or health.condition not in ("failed", "lost"):
        return
    row = fruitless(health.attempts, last.step, last.config)
    if len(row) >= MAX_RESTARTS:
        what = f"crash loop: the last {len(row)} attempts got no further than step {last.step}"
        yield Finding(what, _MENDS[ExitCode.CRASH_LOOP])


def check_checkpoints(health: Health) -> Iterator[Finding]:
    """Damaged checkpoints among the two newest, and leftovers of interrupted writes."""
    for path in health.checkpoints[-2:]:
        try:
            verify(path)
        except (ValueError, OSError) as error:
            yield Finding(" ".join(str(error).split()), f"remove {path}; a restart takes the one before it by itself")
    leftovers = sorted((health.root / "checkpoints").glob("*.tmp-*"))
    if leftovers and health.condition != "running":
        what = f"{leftovers[0]} was left behind by an interrupted write"
        yield Finding(what, "nothing to do: the next start removes it", is_serious=False)


def check_disk(health: Health) -> Iterator[Finding]:
    """Too little room for the next two checkpoints."""
    newest = health.checkpoints[-1] if health.checkpoints else None
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) if newest else 0
    needed = max(2 * size, _LEAST_FREE)
    if health.free_bytes < needed:
        what = f"the disk of {health.root} has {health.free_bytes >> 20} MiB left, the next checkpoints may need "
        yield Finding(f"{what}{needed >> 20} MiB", "free some space, or lower checkpoint.keep_last or keep_best")


def check_data(health: Health) -> Iterator[Finding]:
    """Datasets that are not where the configuration says, and more damaged samples than it allows."""
    data = _data_options(health.root / "config.yaml")
    folders = [Path(path) for path in _paths(data.get("path")) if "://" not in path]
    for folder in folders if data.get("sources") is None else []:
        if not folder.exists():
            hint = "" if folder.is_absolute() else f", seen from {Path.cwd()}"
            yield Finding(f"the data folder {folder} is missing{hint}", "mount or pack it", folder.is_absolute())
    quarantine = Path(data.get("quarantine_dir") or health.root) / "quarantine.jsonl"
    skipped = len(quarantine.read_text().splitlines()) if quarantine.is_file() else 0
    limit = _skip_budget(data.get("max_skipped", 0), folders)
    if skipped and limit is not None and skipped > limit:
        what = f"{skipped} damaged samples are listed in {quarantine}, data.max_skipped allows {limit}"
        yield Finding(what, "repair or repack their shards, then remove the list; or raise data.max_skipped")


def check_numbers(health: Health) -> Iterator[Finding]:
    """Steps that the latest attempt skipped because something was not finite."""
    skipped = health.last.skipped if health.last is not None else 0
    if skipped:
        what = f"{skipped} steps were skipped: the loss or a gradient was not finite"
        yield Finding(what, "lower model.optim.lr, or clip with trainer.gradient_clip_val", skipped > MANY_SKIPS)


CHECKS: tuple[Callable[[Health], Iterator[Finding]], ...] = (
    *(check_ranks, check_owner, check_progress, check_checkpoints, check_disk, check_data, check_numbers),
)


def _check_rank(rank: Rank) -> Iterator[Finding]:
    beat = rank.beat
    who = f"rank {beat.rank} on host {beat.process.host}"
    if rank.state == "gone":
        yield Finding(f"{who} is dead; it was in {beat}", f"stop the job if it does not end, then {CONTINUE}")
    elif rank.state == "stopped":
        yield Finding(f"{who} is held by a signal in {beat}", f"kill -CONT {beat.process.pid}, or stop the job")
    elif beat.note.silence_s is not None and rank.age_s > beat.note.silence_s:
        yield Finding(f"{who} has been silent for {rank.age_s:.0f} s in {beat}", "look at that machine; stop the job")
    elif beat.is_over_limit:
        what = f"{who} has been in {beat} for {beat.stuck_s:.0f} s (limit {beat.note.limit_s:.0f} s)"
        yield Finding(what, f"stop the job if it does not end by itself, then {CONTINUE}")


def _data_options(config: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(config.read_text())
        options = content["data"]["init_args"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return {}
    return options if isinstance(options, dict) else {}


def _paths(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(source["path"]) for source in value if isinstance(source, dict) and "path" in source]
    return [] if value is None else [str(value)]


def _skip_budget(max_skipped: float, folders: list[Path]) -> int | None:
    """Samples that may be skipped; None where a share of an unknown number of samples is meant."""
    if max_skipped >= 1:
        return int(max_skipped)
    try:
        counts = [json.loads((folder / "dataset.json").read_text())["splits"]["train"]["samples"] for folder in folders]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return math.ceil(max_skipped * sum(counts)) if counts else None
