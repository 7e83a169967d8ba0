"""What stands around one training, from its set-up to its last line: lease, attempt, heartbeat and watchdog."""

import contextlib
import hashlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_modules.attempts import Attempt, begin_attempt, end_attempt, read_attempts
from lightning_modules.crash_loop import refuse_crash_loop
from lightning_modules.errors import is_users_mistake, one_line
from lightning_modules.exit_codes import ExitCode, GuardStop
from lightning_modules.heartbeat import INTERVAL_S, Pulse, file_of, folder_of, forget, read_beat
from lightning_modules.lease import Lease, acquire
from lightning_modules.retention import tidy
from lightning_modules.run_directory import RunDirectory
from lightning_modules.stop_signals import StopRequested
from lightning_modules.watchdog import Verdict, Watchdog

_RENEW_S = 5.0
_LINGER_S = 10.0
_log = logging.getLogger("mirrorla")


@dataclass(frozen=True)
class GuardConfig:
    """What is watched while a training runs, and when it is ended.

    Attributes:
        hang_timeout_s: a rank that makes no progress within a step for this long, and for 20 median steps, hangs; the
            run then names it and ends, to be started again. 0 = never.
        slow_timeout_s: the same for what may rightly take long: set-up, the first steps, a checkpoint, and between two
            batches of an evaluation. Waiting for data has data.timeout_s.
        silence_s: a rank whose heartbeat stays away for this long, while the others wait for it, has stopped.
        max_skips: steps in a row that may be skipped because the loss or a gradient is not finite; with one more the
            run ends, to be started again from the last good checkpoint.
        max_rollbacks: times that a run may go back to the same checkpoint before it ends for good.
        takeover_s: how long the heartbeat of another machine's job must stand still before its run directory is taken.
        allow_crash_loop: start although three attempts in a row made no progress.
    """

    hang_timeout_s: float = 60.0
    slow_timeout_s: float = 1800.0
    silence_s: float = 20.0
    max_skips: int = 10
    max_rollbacks: int = 2
    takeover_s: float = 60.0
    allow_crash_loop: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: naming the field and its value.
        """
        for name in ("hang_timeout_s", "slow_timeout_s", "max_skips", "max_rollbacks", "takeover_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"guard.{name} {getattr(self, name)} must be 0 or above")
        if self.silence_s < 1:
            raise ValueError(f"guard.silence_s {self.silence_s} must be 1 or above: a heartbeat comes every second")

    @property
    def interval_s(self) -> float:
        """Between two heartbeats: a second, less only where silence is told sooner."""
        return min(INTERVAL_S, self.silence_s / 4)


class RolledBack(GuardStop):
    """The attempt ends so that the next one goes on from an earlier checkpoint.

    Args:
        message: one line.
        step: of that checkpoint; 0 for the beginning.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message, ExitCode.ROLLED_BACK)
        self.step = step


class Guards:
    """The guards of one rank's training.

    Args:
        run: the run directory.
        config: when to end it.
        rank: of this process; rank 0 holds the lease and keeps the ledger of attempts for all.
        step: optimizer step of the checkpoint it starts from.
        config_text: the resolved configuration, by which a mended start is told from a repeated one.

    Attributes:
        attempt: this start of the run; None on other ranks.
        has_begun: whether the set-up is done; what goes wrong before may be a user's mistake.
    """

    def __init__(self, run: RunDirectory, config: GuardConfig, rank: int, step: int, config_text: str) -> None:
        self.run = run
        self.config = config
        self.rank = rank
        self.has_begun = False
        self.attempt: Attempt | None = None
        self._attempt_number: int | None = None
        self._step = step
        self._lease: Lease | None = None
        self._seen_at_s = self._renewed_at_s = time.monotonic()
        folder = folder_of(run.root)
        if rank == 0:
            self._lease = acquire(run.root, config.takeover_s)
            try:
                self.attempt = self._begin(hashlib.sha256(config_text.encode()).hexdigest()[:16])
            except BaseException:
                self._lease.release()
                raise
            forget(folder)
        self.pulse = Pulse(folder, rank, self._on_beat, config.interval_s)
        self.pulse.token = 0 if self._lease is None else self._lease.token
        self.watchdog = Watchdog(self.pulse, run.logs, self._on_hang)
        self.pulse.start()

    def token(self) -> int:
        """The lease's token, if it is still ours; 0 on other ranks, which commit nothing.

        Raises:
            GuardStop: another job has taken the run over.
        """
        return 0 if self._lease is None else self._lease.check()

    @property
    def identity(self) -> tuple[int, int | None]:
        """Token and number of the attempt, for rank 0 to share with the others."""
        return self.pulse.token, None if self.attempt is None else self.attempt.number

    def join(self, identity: tuple[int, int | None], world_size: int) -> None:
        """Become one of a group of ranks: from here on they watch each other.

        Args:
            identity: rank 0's.
            world_size: ranks of the group.
        """
        self.pulse.token, self._attempt_number = identity
        self.pulse.world_size = world_size
        self.pulse.write()
        self.watchdog.start()

    def close(self, error: BaseException | None) -> None:
        """Leave: write down how the attempt ended, set bad checkpoints aside, release the lease.

        Args:
            error: what ended the training; None if it came to its end.
        """
        self.watchdog.stop()
        self.pulse.stop()
        agreed = error is None or isinstance(error, StopRequested | GuardStop)
        back_to = error.step if isinstance(error, RolledBack) else None
        if self.rank == 0 and back_to is not None:
            with contextlib.suppress(OSError):  # a checkpoint that stays is tried, and leads here again
                tidy(self.run.checkpoints, back_to)
        if self.rank == 0 or not agreed:
            self._end(*_outcome(error, self.has_begun), back_to)
        if self._lease is not None:
            self._lease.release()
        if self.rank and agreed and error is not None:
            self._linger()

    def _begin(self, config: str) -> Attempt:
        if not self.config.allow_crash_loop:
            refuse_crash_loop(self.run.root, read_attempts(self.run.root), self._step, config)
        return begin_attempt(self.run.root, self._step, config)

    def _end(self, reason: str, code: int, rolled_back_to: int | None = None) -> None:
        if self.pulse.note.step:
            self._step = self.pulse.note.step
        number = self.attempt.number if self.attempt is not None else self._attempt_number
        with contextlib.suppress(OSError):  # a full disk
            end_attempt(self.run.root, self._step, reason, code, attempt=number, rolled_back_to=rolled_back_to)

    def _on_beat(self) -> None:
        """On the heartbeat's thread: look at the others, renew the lease."""
        now_s = time.monotonic()
        elapsed_s, self._seen_at_s = now_s - self._seen_at_s, now_s
        self.watchdog.look(elapsed_s)
        if self._lease is None or now_s - self._renewed_at_s < _RENEW_S:
            return
        self._renewed_at_s = now_s
        try:
            self._lease.renew()
        except GuardStop as stop:
            _log.error("%s", stop)
            logging.shutdown()
            os._exit(stop.code)
        except OSError as error:
            _log.warning("the lease could not be renewed (%s); trying again", one_line(error))

    def _linger(self) -> None:
        """Let a rank 0 that launched this one leave first: it is killed, and its code lost, when another is faster."""
        first = read_beat(file_of(self.pulse.folder, 0))
        end_s = time.monotonic() + _LINGER_S
        while first is not None and os.getppid() == first.process.pid and time.monotonic() < end_s:
            time.sleep(0.05)

    def _on_hang(self, verdict: Verdict, is_author: bool) -> None:
        if is_author:
            self._end(verdict.message, ExitCode.HUNG)
        if self._lease is not None:
            self._lease.release()


@contextlib.contextmanager
def guarded(run: RunDirectory, config: GuardConfig, rank: int, step: int, config_text: str) -> Iterator[Guards]:
    """Put the guards around a training; see Guards.

    Raises:
        RunInUseError: another job holds the run directory.
        GuardStop: three attempts in a row made no progress.
    """
    guards = Guards(run, config, rank, step, config_text)
    try:
        yield guards
    except BaseException as error:
        guards.close(error)
        raise
    guards.close(None)


def _outcome(error: BaseException | None, has_begun: bool) -> tuple[str, int]:
    """How an attempt ended, and with which exit code."""
    if error is None:
        return "completed", ExitCode.DONE
    if isinstance(error, StopRequested):
        return error.reason, error.exit_code
    if isinstance(error, GuardStop):
        return one_line(error), error.code
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT.name, ExitCode.INTERRUPTED
    if is_users_mistake(error) and not has_begun:
        return one_line(error), ExitCode.REFUSED
    return f"{type(error).__name__}: {one_line(error)[:300]}", getattr(error, "exit_code", ExitCode.FAILED)
