"""Dying with the process that started this one: imported first of all by the fork server, so it must stay small."""

import ctypes
import signal
import sys


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, which a kill -9 gives no time to do; Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
