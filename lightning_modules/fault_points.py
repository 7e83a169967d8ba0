"""Named points at which a test makes a run fail, if MIRRORLA_FAULT names them. Standard library only.

    MIRRORLA_FAULT="checkpoint.after_files:kill"        the first time that point is reached
    MIRRORLA_FAULT="checkpoint.after_files:full:3"      the third time
    MIRRORLA_FAULT="checkpoint.after_files@1:stop"      on local rank 1 only

Several are separated by commas. Actions: kill (SIGKILL), stop (SIGSTOP), exit (at once, code 1), raise (RuntimeError),
full (the error of a full disk), pause (for a second).
"""

import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

VARIABLE = "MIRRORLA_FAULT"

_reached: Counter[str] = Counter()


class Fault(NamedTuple):
    """One armed point: its name, the local rank it is meant for (None: all), what happens, and the how manieth time."""

    name: str
    rank: int | None
    action: str
    nth: int


def _fail() -> None:
    raise RuntimeError("fault point")


def _fill() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(1),
    "raise": _fail,
    "full": _fill,
    "pause": lambda: time.sleep(1),
}


def parse_faults(text: str) -> list[Fault]:
    """Read the variable's value.

    Raises:
        ValueError: naming the part that is not understood.
    """
    faults = []
    for part in filter(None, text.split(",")):
        name, _, rest = part.partition(":")
        action, _, nth = rest.partition(":")
        name, _, rank = name.partition("@")
        if not name or action not in ACTIONS or not (rank or "0").isdecimal() or not (nth or "1").isdecimal():
            raise ValueError(f"{VARIABLE} {part!r} is no name[@rank]:action[:nth] with an action of {list(ACTIONS)}")
        faults.append(Fault(name, int(rank) if rank else None, action, int(nth or 1)))
    return faults


def reach(name: str) -> None:
    """Be at a named point; costs one look-up in the environment when nothing is armed."""
    armed = os.environ.get(VARIABLE)
    if not armed:
        return
    _reached[name] += 1
    rank = int(os.environ.get("LOCAL_RANK", 0))
    for fault in parse_faults(armed):
        if fault.name == name and fault.nth == _reached[name] and fault.rank in (None, rank):
            ACTIONS[fault.action]()
