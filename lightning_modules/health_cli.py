"""`mirrorla status RUN` and `mirrorla doctor RUN`: what a run is doing, and what is wrong with it. No torch."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.slurm import job_line
from lightning_modules.attempts import Record
from lightning_modules.diagnosis import diagnose
from lightning_modules.errors import UsageError
from lightning_modules.exit_codes import describe
from lightning_modules.health import Health, activity, examine, find_runs

_SHOWN_ATTEMPTS = 5
_SHOWN_RANKS = 16
_FILE_WIDTH = 140
_HELP = {
    "status": "usage: mirrorla status RUN\n\nWhat a run is doing: phase of every rank, step, throughput, checkpoint, "
    "attempts.\nRUN is a run directory, or a folder of them.\n",
    "doctor": "usage: mirrorla doctor RUN\n\nWhat is wrong with a run and what to do about it; reads its newest "
    "checkpoints whole.\nExit code: 0 healthy, 1 sick.\n",
}


def run(verb: str, argv: Sequence[str]) -> int:
    """Look at a run, or at a folder of runs.

    Args:
        verb: "status" or "doctor".
        argv: the directory.

    Returns:
        0; doctor: 1 if anything serious was found.

    Raises:
        UsageError: not one directory, or no run there.
    """
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write(_HELP[verb])
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UsageError(f"give one run directory: mirrorla {verb} RUN")
    folder = Path(argv[0])
    runs = find_runs(folder)
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    if verb == "doctor":
        return max(_examine(console, root) for root in runs)
    if runs == [folder]:
        show_run(console, examine(folder))
    else:
        console.print(table_of_runs([examine(root) for root in runs]))
    return 0


def _examine(console: Console, root: Path) -> int:
    """Print what is wrong with one run; 1 if anything serious is."""
    health = examine(root)
    findings = diagnose(health)
    is_sick = any(finding.is_serious for finding in findings)
    console.print(_text(f"{root}  {'sick' if is_sick else 'healthy'}, {activity(health)}"), soft_wrap=True)
    for finding in findings:
        mark = "wrong" if finding.is_serious else "note "
        console.print(_text(f"  {mark}  {finding.what}"), soft_wrap=True)
        console.print(_text(f"         {finding.mend}"), soft_wrap=True)
    return int(is_sick)


def show_run(console: Console, health: Health) -> None:
    """Print one screen about a run."""
    for label, text in _facts(health):
        console.print(_text(f"{label:12}{text}"), soft_wrap=True)
    if queued := job_line(health.root):
        console.print(_text(f"{'queue':12}{queued}"), soft_wrap=True)
    if health.ranks and health.condition in ("running", "lost"):
        console.print(table_of_ranks(health))
    if health.attempts:
        console.print(table_of_attempts(health.attempts))


def table_of_runs(runs: Sequence[Health]) -> Table:
    """One line per run."""
    table = _table("run", "condition", "step", "images/s", "checkpoint", "attempts", "what")
    for health in runs:
        newest = health.checkpoints[-1].name if health.checkpoints else "none"
        speed = _images_per_s(health)
        cells = (health.root.name, health.condition, str(health.step), speed, newest, str(len(health.attempts)))
        table.add_row(*(_text(cell) for cell in (*cells, activity(health))))
    return table


def table_of_ranks(health: Health) -> Table:
    """What every rank is doing; of many those furthest behind."""
    table = _table("rank", "host", "process", "phase", "for", "step", "at")
    behind = sorted(health.ranks, key=lambda rank: (rank.beat.note.order, rank.beat.rank))
    for rank in behind[:_SHOWN_RANKS]:
        beat, note = rank.beat, rank.beat.note
        process = f"{beat.process.pid} {rank.state}"
        cells = (str(beat.rank), beat.process.host, process, note.phase, duration(beat.stuck_s), str(note.step))
        table.add_row(*(_text(cell) for cell in (*cells, note.detail)))
    if len(behind) > _SHOWN_RANKS:
        table.caption = f"{_SHOWN_RANKS} of {len(behind)} ranks, those furthest behind"
    return table


def table_of_attempts(attempts: Sequence[Record]) -> Table:
    """The latest attempts and how they ended."""
    table = _table("attempt", "began", "where", "from step", "to step", "skipped", "how it ended")
    for record in attempts[-_SHOWN_ATTEMPTS:]:
        where = f"{f'job {record.job}, ' if record.job else ''}{record.pid} on {record.host}"
        code = "" if record.code is None else f" ({describe(record.code)})"
        end = "" if record.end_step is None else str(record.end_step)
        cells = (str(record.number), record.time, where, str(record.step), end, str(record.skipped or ""))
        table.add_row(*(_text(cell) for cell in (*cells, f"{record.outcome or 'no word yet'}{code}")))
    return table


def duration(seconds: float) -> str:
    """A duration for people: 12 s, 3 min, 2.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _text(words: str) -> Text:
    """Words out of a run's files: no markup, and nothing that steers a terminal."""
    return Text("".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in words))


def _facts(health: Health) -> list[tuple[str, str]]:
    lines = [("run", str(health.root)), ("now", activity(health))]
    beat = max((rank.beat for rank in health.ranks), key=lambda beat: -beat.rank, default=None)
    epoch = f", epoch {beat.note.epoch}" if beat is not None else ""
    speed = f", {_images_per_s(health)} images/s, {1e3 * beat.step_s:.0f} ms a batch" if beat and beat.step_s else ""
    lines.append(("step", f"{health.step}{epoch}{speed}"))
    if health.checkpoint_age_s is None:
        lines.append(("checkpoint", "none yet"))
    else:
        age = duration(health.checkpoint_age_s)
        lines.append(("checkpoint", f"{health.checkpoints[-1].name}, {age} old; {len(health.checkpoints)} kept"))
    if health.condition in ("running", "lost") and health.ranks:
        lines.append(("heard", f"{duration(min(rank.age_s for rank in health.ranks))} ago"))
    return lines


def _images_per_s(health: Health) -> str:
    speed = max((rank.beat.images_per_s for rank in health.ranks), default=0.0)
    return f"{speed:.0f}" if speed else ""


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
