"""Signals that ask a training to stop: the handler sets a flag and nothing else.

Standard library only, so it can be installed before torch is imported. Who reads the flag: callbacks/preemption.py, at
a step boundary. Exit codes: 130 after SIGINT (Ctrl-C), 143 after SIGTERM, 138 after SIGUSR1: 128 + the signal.
"""

import os
import signal
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_received: list[signal.Signals] = []


class StopRequested(Exception):  # noqa: N818 - it reports a request, not an error
    """The training stopped at a step boundary because a signal or the clock asked for it; its state is committed.

    Args:
        number: the signal; SIGUSR1, the batch system's warning, where the clock stands in for it.
        step: optimizer steps done.
        reason: the signal's name, or "max_minutes".
    """

    def __init__(self, number: signal.Signals, step: int, reason: str | None = None) -> None:
        self.reason = reason or number.name
        super().__init__(f"stopped by {self.reason} after step {step}")
        self.number = number
        self.step = step

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + self.number


def install() -> None:
    """Let the stop signals set the flag; safe to call again (Lightning replaces handlers when a run starts)."""
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number in STOP_SIGNALS:
            signal.signal(number, _remember)


def restore() -> None:
    """Give the signals back to their defaults and forget what arrived."""
    _received.clear()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def received() -> signal.Signals | None:
    """The first stop signal that arrived in this process, if any."""
    return _received[0] if _received else None


def _remember(number: int, frame: FrameType | None) -> None:
    first = not _received
    _received.append(signal.Signals(number))
    if first:
        # os.write: print is not allowed to interrupt another print.
        os.write(2, f"\n{signal.Signals(number).name}: stopping at the next step boundary\n".encode())
