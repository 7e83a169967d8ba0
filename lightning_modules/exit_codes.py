"""The one table of exit codes, and the exception that ends a run with one of them. Standard library only.

A code tells a batch script whether the same command should be started again: `requeue` says so.
"""

import signal
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended; a run stopped by a signal ends with 128 + the signal's number."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    IN_USE = 73
    NO_SPACE = 74
    ROLLED_BACK = 75
    HUNG = 76
    CRASH_LOOP = 77
    NOT_FINITE = 78
    LEASE_LOST = 79
    UNFIT_NODE = 80  # cluster/launch.py ends with it before this package can be imported
    INTERRUPTED = 128 + signal.SIGINT
    PREEMPTED = 128 + signal.SIGUSR1
    TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Meaning:
    """What a code says.

    Attributes:
        text: in a few words.
        requeue: whether starting the same command again goes on with the run.
    """

    text: str
    requeue: bool


MEANINGS: dict[ExitCode, Meaning] = {
    ExitCode.DONE: Meaning("done", False),
    ExitCode.FAILED: Meaning("failed while running", False),
    ExitCode.REFUSED: Meaning("refused before running", False),
    ExitCode.IN_USE: Meaning("another job holds the run directory", False),
    ExitCode.NO_SPACE: Meaning("checkpoints could not be written several times in a row", False),
    ExitCode.ROLLED_BACK: Meaning("the loss was not finite; the last good checkpoint is next", True),
    ExitCode.HUNG: Meaning("a rank hung and was named", True),
    ExitCode.CRASH_LOOP: Meaning("restarts made no progress", False),
    ExitCode.NOT_FINITE: Meaning("the loss stays not finite; see bundles/", False),
    ExitCode.LEASE_LOST: Meaning("another job took the run directory over", False),
    ExitCode.UNFIT_NODE: Meaning("a node failed its check", True),
    ExitCode.INTERRUPTED: Meaning("stopped by SIGINT, checkpoint committed", False),
    ExitCode.PREEMPTED: Meaning("stopped by SIGUSR1, checkpoint committed", True),
    ExitCode.TERMINATED: Meaning("stopped by SIGTERM, checkpoint committed", True),
}


class GuardStop(Exception):  # noqa: N818 - it reports a decision; the message is the user's one line
    """A guard ends the run: the message says what happened and what to do, the code what a batch script should do.

    Args:
        message: one line.
        code: the process's exit code.
    """

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.code = code


def describe(code: int) -> str:
    """A code in words; an unknown one as it is."""
    if code in MEANINGS:
        return MEANINGS[ExitCode(code)].text
    return f"stopped by signal {code - 128}" if 128 < code < 160 else f"exit code {code}"


def table() -> str:
    """The codes and their meanings, one per line, for the help of the command line."""
    return "\n".join(
        f"  {code:<5}{meaning.text}{'; again' if meaning.requeue else ''}" for code, meaning in MEANINGS.items()
    )
