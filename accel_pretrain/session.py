"""What surrounds a run from its first line to its last: a directory of its own, signals, hangs, the status, the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch.distributed as dist
from accelerate import Accelerator

from accel_pretrain import lock
from accel_pretrain.errors import ConfigError, LockedError, PeerError, PretrainError, StorageError, exit_code_of
from accel_pretrain.hindsight import Forecast
from accel_pretrain.peers import timeout_of
from accel_pretrain.redaction import redact
from accel_pretrain.runtime import together
from accel_pretrain.status import STATUS, RunStatus, record_failure, record_loss
from accel_pretrain.stopping import StopSignal, requeue
from accel_pretrain.trackers import RunLog
from accel_pretrain.watchdog import HANG, Watchdog

LOCK = ".lock"
TEARDOWN, PATIENT_TEARDOWN = 10.0, 60.0  # seconds for what is left when all that matters is saved


@dataclass
class Session:
    """One process of one run. Made without arguments it attends to nothing, for benchmarks and tests."""

    stop: StopSignal = field(default_factory=StopSignal)
    watchdog: Watchdog = field(default_factory=Watchdog)
    status: RunStatus = field(default_factory=RunStatus)
    afterwards: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # called when the status has its last word
    exit_code: int = 0  # of a run that no error ended
    forecast: Forecast | None = None

    def end(self, log: RunLog, requeued: bool | None) -> None:
        """Record that the run came to its end, or was asked to stop before; then it may be put back into Slurm's queue."""
        self.exit_code = self.stop.exit_code
        self.watchdog.end_soon(self.exit_code, PATIENT_TEARDOWN)
        if self.stop.signal is None:
            self.status.end("finished", 0)
            return
        self.status.end("interrupted", self.stop.own_code, self.stop.reason)
        if line := requeue(self.stop, requeued):
            log.line(line)

    def close(self, log: RunLog) -> None:
        """Let the trackers finish, but not wait long for them when a launcher is about to kill what it has asked to stop."""
        seconds = TEARDOWN if self.stop.signal is not None else PATIENT_TEARDOWN
        _end_soon(self.watchdog, seconds, self.exit_code)
        before = self.stop.signal
        log.close(seconds - 2, leave=lambda: self.stop.signal != before)


@contextlib.contextmanager
def watched(accelerator: Accelerator, run_dir: Path, hang_timeout: float | None) -> Iterator[Watchdog]:
    """A watchdog for this process. However the block ends, what Accelerate still has to do then cannot hang for long.

    Another process may end at any moment from here on, as one does that finds no data: that is told as :class:`PeerError`.
    """
    with Watchdog(run_dir, accelerator.process_index, hang_timeout) as watchdog:
        try:
            with _others(accelerator, run_dir):
                yield watchdog
        finally:
            if sys.exception() is not None:
                _end_soon(watchdog, TEARDOWN)
            accelerator.end_training()


def _end_soon(watchdog: Watchdog, seconds: float, exit_code: int = 0) -> None:
    """As :meth:`Watchdog.end_soon`, but an error in flight has the say: its code, and its words, which are not printed yet."""
    error = sys.exception()
    if error is None:
        watchdog.end_soon(exit_code, seconds)
    else:
        words = str(error) if isinstance(error, PretrainError | OSError) else "".join(traceback.format_exception(error)).strip()
        watchdog.end_soon(exit_code_of(error), seconds, redact(words))


@contextlib.contextmanager
def session(accelerator: Accelerator, run_dir: Path, watchdog: Watchdog) -> Iterator[Session]:
    """Hold the run directory, keep its ``status.json``, and remember signals. Collective: a refusal is everybody's."""
    main = accelerator.is_main_process
    # Signals last: a launcher that ends what is left of a failed run must not cut off the record of why.
    # Trackers after the status, which must be true even if they hang.
    with (
        StopSignal(timeout_of(accelerator)) as stop,
        _held(accelerator, run_dir, watchdog),
        contextlib.ExitStack() as afterwards,
        RunStatus(run_dir if main else None) as status,
        _others(accelerator, run_dir),  # which the status is to hear of
    ):
        stop.leaving = lambda code: status.end("interrupted", code, "left at once, without saving")
        watchdog.tell = lambda reason: record_failure(run_dir, HANG, reason)
        yield Session(stop, watchdog, status, afterwards)


@contextlib.contextmanager
def _others(accelerator: Accelerator, run_dir: Path) -> Iterator[None]:
    """That another process of the run is gone is one line, whichever message it was that could not be delivered."""
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            first = str(error).strip().splitlines()[0].rpartition("] ")[2].partition(". ")[0]
            if not accelerator.is_main_process:
                record_loss(run_dir)
            raise PeerError(
                f"another process of this run has ended or does not answer ({first}); "
                "its own message comes first; the same command goes on from the last checkpoint"
            ) from None
        raise


@contextlib.contextmanager
def _held(accelerator: Accelerator, run_dir: Path, watchdog: Watchdog) -> Iterator[None]:
    """The main process holds the directory's lock in the block; a directory that got nothing is gone afterwards."""
    file, new = None, False
    with together(accelerator, LockedError):
        if accelerator.is_main_process:
            new = not run_dir.exists()
            file = _lock(run_dir, watchdog, accelerator)
    if file is None:
        yield
        return
    descriptor = file.fileno()
    watchdog.alive = lambda: os.utime(descriptor)  # a sign of life for other machines
    try:
        yield
    finally:
        watchdog.alive = lambda: None
        (run_dir / LOCK).unlink(missing_ok=True)
        if new and sys.exception() is not None and set(os.listdir(run_dir)) <= {STATUS}:
            shutil.rmtree(run_dir)
        file.close()


def _lock(run_dir: Path, watchdog: Watchdog, accelerator: Accelerator) -> IO[str]:
    """The lock; a run of another machine that may just have died gets the time to show that it has not."""
    seen, began = None, time.monotonic()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                return lock.take(run_dir / LOCK)
            except lock.Taken as taken:
                if taken.seen and seen is None:
                    still = f"waiting {taken.left:.0f} s for another sign of life"
                    accelerator.print(f"{taken.owner} worked in {run_dir} until just now; {still}", flush=True)
                elif taken.seen is None or taken.seen != seen or time.monotonic() - began > lock.SILENCE:
                    when = f"worked in it less than {lock.SILENCE} s ago" if taken.seen else "works in it"
                    raise LockedError(
                        f"checkpoint.checkpoint_dir: {run_dir} is in use: {taken.owner} {when}; "
                        "wait for it, end it, or type another --checkpoint_dir"
                    ) from None
                seen = taken.seen
            watchdog.beat()
            time.sleep(1)
    except OSError as error:
        where = f"checkpoint.checkpoint_dir: cannot write to {os.path.abspath(run_dir)} ({error.strerror})"
        if exit_code_of(error) == StorageError.exit_code:
            raise StorageError(f"{where}; make room there, or type another --checkpoint_dir") from None
        raise ConfigError(f"{where}; type --checkpoint_dir DIR") from None
