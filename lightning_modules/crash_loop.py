"""Stop a run that is started again and again and gets nowhere. Standard library only."""

from collections.abc import Sequence
from pathlib import Path

from lightning_modules.attempts import Record
from lightning_modules.exit_codes import ExitCode, GuardStop

MAX_RESTARTS = 3

_NO_CRASH = {ExitCode.DONE, ExitCode.REFUSED, ExitCode.INTERRUPTED, ExitCode.PREEMPTED, ExitCode.TERMINATED}


def fruitless(attempts: Sequence[Record], step: int, config: str) -> list[Record]:
    """The latest attempts that ended by a failure without a checkpoint beyond the one they started from.

    An end that was asked for, by a signal or by being done, breaks the row, and so does another configuration: somebody
    has mended something. A start that was refused as a user's mistake is passed over.

    Args:
        attempts: all before, in order.
        step: optimizer step of the checkpoint that the next one starts from.
        config: digest of its configuration.
    """
    row: list[Record] = []
    for attempt in reversed(attempts):
        if attempt.code == ExitCode.REFUSED:
            continue
        if attempt.code in _NO_CRASH or (attempt.step, attempt.config) != (step, config):
            break
        row.insert(0, attempt)
    return row


def refuse_crash_loop(root: Path, attempts: Sequence[Record], step: int, config: str) -> None:
    """Refuse the next start after MAX_RESTARTS fruitless ones.

    Raises:
        GuardStop: with the reasons and the mend.
    """
    row = fruitless(attempts, step, config)[-MAX_RESTARTS:]
    if len(row) < MAX_RESTARTS:
        return
    reasons = "; ".join(f"attempt {attempt.number}: {attempt.reason}" for attempt in row)
    raise GuardStop(
        f"run_dir {root}: {MAX_RESTARTS} restarts got no further than step {step} ({reasons}); mend the cause and "
        "start once with --guard.allow_crash_loop true",
        ExitCode.CRASH_LOOP,
    )
