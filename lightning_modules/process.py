"""Which process is meant, and what became of it: a number alone is reused, and means nothing on another machine.

Standard library only.
"""

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

State = Literal["alive", "stopped", "gone", "elsewhere"]


@dataclass(frozen=True)
class Process:
    """One process, told apart from any other that had or will have its number.

    Attributes:
        host: for people.
        machine: boot and namespace in which `pid` counts; processes of two machines never share it.
        pid: process number.
        start: kernel ticks between the boot and its start; 0 where the kernel does not tell.
    """

    host: str
    machine: str
    pid: int
    start: int

    @classmethod
    def here(cls) -> "Process":
        """This process."""
        return cls(socket.gethostname(), _machine(), os.getpid(), _start_and_state(os.getpid())[0])

    def state(self) -> State:
        """What became of it, as far as this machine can know.

        Returns:
            "stopped" for one that a signal or a debugger holds; "elsewhere" for one of another machine, container or
            boot, which cannot be asked; a killed one that nobody has waited for counts as gone.
        """
        if self.machine != _machine():
            return "elsewhere"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "gone"
        except PermissionError:
            pass  # another user's: it is there, and /proc tells the rest
        start, letter = _start_and_state(self.pid)
        if start != self.start or letter in "ZX":
            return "gone"
        return "stopped" if letter in "Tt" else "alive"


@cache
def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    if not boot.is_file():
        return socket.gethostname()
    return f"{boot.read_text().strip()}/{namespace.readlink()}"


def _start_and_state(pid: int) -> tuple[int, str]:
    """Start in kernel ticks and the state's letter; 0 and "R" without /proc."""
    if not Path("/proc/self/stat").exists():
        return 0, "R"
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may hold blanks and brackets
    except OSError:
        return 0, "X"
    return int(fields[19]), fields[0]
