"""Ends a process that hangs, after writing down where: a thread that watches whether anything still moves.

The run says what it does (:meth:`Watchdog.enter`, at every update) and that it goes on (:meth:`Watchdog.beat`, one addition).
Silence is counted in the thread's own ticks: a process that was suspended, or a laptop that slept, was not silent meanwhile.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

HANG = 75  # the exit code: a temporary failure, in the words of sysexits.h
_TICK = 0.5
# What may take longer than an update by its nature: reading and hashing all data, compiling, writing to a slow disk.
_PATIENT = {"start": 3, "first update": 3, "save": 3, "rollback": 3}


def patience(hang_timeout: float | None) -> timedelta:
    """How long the processes of a run wait for each other's messages: longer than the watchdog of any waits in any phase.

    So it is the watchdog that says where a run hangs, and a save that takes long ends nothing. Without one: three days.
    """
    return timedelta(seconds=max(_PATIENT.values()) * (hang_timeout or 24 * 3600) + 60)


class Watchdog:
    """Watches one process of a run. Without ``timeout`` (seconds of silence) it only waits for the end to be bounded.

    In updates it allows ten times what the median of the last ones took, if that is more; in phases that take longer by
    their nature, three times ``timeout``. ``tell`` is called with the reason before the process ends, ``alive`` every now and
    then before.
    """

    def __init__(self, run_dir: Path = Path(), rank: int = 0, timeout: float | None = None) -> None:
        self.path = run_dir / f"hang_rank{rank}.txt"
        self.tell: Callable[[str], object] = lambda reason: None
        self.alive: Callable[[], object] = lambda: None
        self._rank, self._timeout = rank, timeout
        self._phase, self._beats, self._entries, self._bound = "start", 0, 0, None
        self._code, self._error = HANG, None
        self._updates: deque[float] = deque(maxlen=9)  # what they took, in seconds, as far as a tick can tell
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self) -> None:
        """Something was finished: a batch of an update or of an evaluation."""
        self._beats += 1

    def enter(self, phase: str) -> None:
        """From here on the run does something else, or the next update."""
        self._phase = phase
        self._entries += 1
        self._beats += 1

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The run does this in the block, and afterwards again what it did before."""
        before = self._phase
        self.enter(name)
        yield
        self.enter(before)

    def end_soon(self, code: int, seconds: float, error: str | None = None) -> None:
        """All that matters is done: the process ends with ``code`` even if the rest hangs for longer than this.

        ``error`` is what has ended the run, and is not printed yet.
        """
        self._code, self._error, self._bound = code, error, seconds
        self.enter("teardown")

    @property
    def budget(self) -> float | None:
        """Seconds of silence that are allowed now."""
        if self._bound is not None or self._timeout is None:
            return self._bound
        if self._phase in _PATIENT:
            return _PATIENT[self._phase] * self._timeout
        return max(self._timeout, 10 * statistics.median(self._updates)) if self._updates else self._timeout

    def _watch(self) -> None:
        heard, entries, phase, silent, spent, ticks = self._beats, self._entries, self._phase, 0.0, 0.0, 0
        last = time.monotonic()
        while not self._over.wait(_TICK):
            now = time.monotonic()
            tick, last = min(now - last, 2 * _TICK), now
            ticks += 1
            if ticks % 40 == 0:
                with contextlib.suppress(OSError):
                    self.alive()
            silent, spent = silent + tick, spent + tick
            if (entered := self._entries) != entries:
                if self._phase == "update" and phase in ("first update", "update"):
                    self._updates.append(spent / (entered - entries))
                entries, phase, spent = entered, self._phase, 0.0
            if (beats := self._beats) != heard:
                heard, silent = beats, 0.0
            elif (budget := self.budget) is not None and silent > budget:
                self._end(silent)

    def _end(self, silent: float) -> None:
        """Write down what every thread was doing, and leave. Nothing here may wait for what hangs, such as the disk."""
        what = f"nothing moved for {silent:.0f} s in the phase '{self._phase}'"
        if self._bound is not None:
            error = f"error (rank {self._rank}): {self._error}\n" if self._error is not None else ""
            sys.stderr.write(f"{error}left without waiting longer: {what}, when nothing was left to save\n")
        else:
            reason = f"{what} (rank {self._rank}); where every thread was is in {self.path}"
            writer = threading.Thread(target=self._record, args=(reason,), daemon=True)
            writer.start()
            writer.join(5)
            sys.stderr.write(f"error: {reason}; --hang_timeout allows more than {self._timeout:g} s\n")
        sys.stderr.flush()
        os._exit(self._code)

    def _record(self, reason: str) -> None:
        with contextlib.suppress(OSError), self.path.open("w", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} process {os.getpid()}: {reason}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        self.tell(reason)
