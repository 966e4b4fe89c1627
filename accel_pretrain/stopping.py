"""The wish to stop: signals to any process of a run, on which all agree, so that they save the same update and leave.

| signal | what follows |
|---|---|
| SIGINT (Ctrl+C), SIGTERM, SIGHUP (a closed terminal) | save, leave with 130, 143, 129 |
| SIGUSR1 (a scheduler, before the time is up) | save, requeue the job if Slurm runs it, leave with 138 |
| SIGUSR2 (Linux sends it when the launcher has died) | save, leave with 143 |
| SIGINT or SIGTERM again, more than a second later | leave at once: nothing that was published is lost |
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from accel_pretrain.launchers import elastic, launched, parent_command, slurm_job

PATIENCE = 5.0  # seconds: an update that would take longer than this to finish is dropped. Launchers kill after 30
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
_URGENT = (signal.SIGINT, signal.SIGTERM)
_REQUEUE, _ORPHANED = getattr(signal, "SIGUSR1", None), getattr(signal, "SIGUSR2", None)


class StopSignal:
    """Remembers that a signal came, so that the loop can finish its update, save, and leave.

    The handler only sets a flag. Signals that follow within a second count as the same wish (launchers pass them on twice).
    ``leaving`` is called with the exit code when a second one ends the process at once. ``timeout`` is how long processes
    wait for each other when they are asked (None: torch's 30 minutes): one may be saving meanwhile.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._timeout = timeout
        self.signal: int | None = None
        self.leaving: Callable[[int], object] = lambda code: None
        self.clock: Callable[[], bool] = lambda: False  # whether this process's clock says that it is time to save
        self.save_due = False  # whether anybody's did when all were last asked
        self._urgent_since: float | None = None
        self._control: Any = None
        self._previous: dict[int, Any] = {}
        self._began: float | None = None  # when the update in progress did
        self._elapsed = 0.0  # seconds since then when all were last asked, on the slowest process; 0 before the first update
        self._quick = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            return self  # of a notebook or of wandb.agent: signals are the main thread's
        for number in _SIGNALS:
            previous = signal.signal(number, self._handle)
            self._previous[number] = previous
            if previous is signal.SIG_IGN and number == getattr(signal, "SIGHUP", None):
                signal.signal(number, previous)  # nohup: the user has already said what a closed terminal means
        if _ORPHANED is not None and not follow_the_launcher(_ORPHANED):
            self._handle(_ORPHANED, None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal == _ORPHANED and number == _REQUEUE:  # a launcher that does not know SIGUSR1 has died of it
            self.signal = number
        if self.signal is None:
            self.signal = number
            _say(f"\nstopping ({self.reason}): saving what is done (Ctrl+C again to leave at once)\n")
        if number in _URGENT:
            if self._urgent_since is None:
                self._urgent_since = now
            elif now - self._urgent_since > 1.0:
                _say("\nleaving without saving; the last checkpoint is untouched\n")
                self.leaving(128 + number)
                os._exit(128 + number)

    def agreed(self) -> bool:
        """Whether any process was asked to stop: all processes get the same answer at the same place. Collective."""
        self._elapsed = 0.0 if self._began is None else time.monotonic() - self._began
        if not dist.is_initialized() or dist.get_world_size() == 1:
            self.save_due = self.clock()
            return self.signal is not None
        if self._control is None:  # on the CPU, so that asking never waits for a GPU
            self._control = dist.new_group(backend="gloo", timeout=self._timeout)
        # The death of a launcher counts less than any signal: it may have died of that one.
        wish = -1 if self.signal is None else 0 if self.signal == _ORPHANED else self.signal
        told = torch.tensor([wish, int(self._elapsed * 1e6), int(self.clock())])
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._control)
        wish, microseconds, due = told.tolist()
        self.save_due = bool(due)
        self._elapsed = microseconds / 1e6
        if wish >= 0:  # never the other way round: a signal may have come while the processes were talking
            self.signal = wish or _ORPHANED
        return wish >= 0

    def drops_update(self, done: int, total: int) -> bool:
        """Whether to stop before this micro-step, since the update has too many left; asked before each. Collective.

        All processes are asked only in updates that take long, by the time that the last one took: else nothing is
        gained by not finishing. ``done`` and ``total`` count micro-steps.
        """
        if done == 0:
            self._quick = 0.0 < self._elapsed <= PATIENCE
            self._began = time.monotonic()
            return False
        return not self._quick and self.agreed() and self._elapsed / done * (total - done) > PATIENCE

    @property
    def reason(self) -> str:
        """What asked to stop, in words."""
        if self.signal is None:
            return "not asked to stop"
        return "the launcher has died" if self.signal == _ORPHANED else signal.Signals(self.signal).name

    @property
    def own_code(self) -> int:
        """0 when nothing stopped the run, else the exit code that says which signal did."""
        if self.signal is None:
            return 0
        return 128 + (signal.SIGTERM if self.signal == _ORPHANED else self.signal)

    @property
    def exit_code(self) -> int:
        """The same, but 0 under an elastic launcher, which would call anything else a failure.

        Unless a launcher has died: those on other machines would take 0 for the end, and wait for the dead one to agree.
        """
        return 0 if elastic() and self.signal != _ORPHANED else self.own_code


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be a pipe whose reader the same Ctrl+C has ended
        os.write(2, text.encode())


def follow_the_launcher(number: int = signal.SIGTERM) -> bool:
    """Ask Linux to send this process ``number`` when its launcher dies; False if it is dead already.

    Launchers do not always pass their own SIGTERM on, cannot pass on a SIGKILL, and would leave orphans that go on training.
    """
    if not launched() or sys.platform != "linux":
        return True
    parent = os.getppid()
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        return False
    # Adopted by the first process of the machine or container, unless that is the launcher itself.
    return parent != 1 or any("accelerate" in word or "torch" in word for word in parent_command())


def requeue(stop: StopSignal, wanted: bool | None) -> str | None:
    """Put the Slurm job back into its queue if SIGUSR1 stopped it; a line that says how that went, None if not asked for.

    ``wanted`` is the option ``training.requeue``; None means: if Slurm runs this process.
    """
    job = slurm_job()
    if stop.signal is None or stop.signal != _REQUEUE or wanted is False or (wanted is None and job is None):
        return None
    if job is None:
        return "Not requeued: SLURM_JOB_ID is not set, so this is no job of Slurm's"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Not requeued: scontrol requeue {job}: {error}"
    if done.returncode:
        return f"Not requeued: scontrol requeue {job}: {done.stderr.strip() or f'exit code {done.returncode}'}"
    return f"Slurm job {job} is in the queue again"


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the program, as SIGINT does: what it has started is ended, and its files go."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:  # nohup
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
