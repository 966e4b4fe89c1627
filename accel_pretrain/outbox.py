"""One tracker of a run, called by a thread of its own: it may be slow, raise or hang, and training does not wait for it.

Calls are made in the order in which they were sent. The first that fails, a start or an end that takes too long, or too many
calls that wait end the tracker with one warning; what was sent after that goes nowhere.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Collection

from accelerate.tracking import GeneralTracker

AWAITED, START = 5.0, 40.0  # seconds that a run waits for its trackers to start, and that they have for it
SILENT = 3.0  # seconds of waiting that nobody is told of
_ROWS = 2000  # calls that may wait
_log = logging.getLogger(__name__)


class Outbox:
    """A tracker that is started by ``make``, and what is yet to be told to it."""

    def __init__(self, name: str, make: Callable[[], GeneralTracker]) -> None:
        self.name, self.tracker = name, None
        self.open = True  # takes calls
        self._make, self._gave_up = make, threading.Lock()
        self._started, self._begin = threading.Event(), time.monotonic()
        self._calls: queue.Queue[Callable[[GeneralTracker], object] | None] = queue.Queue(_ROWS)
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    tracker: GeneralTracker | None  # once it has started

    def wait_for_start(self, say: Callable[[str], object]) -> None:
        """For a moment: most trackers fail soon if they do, and people want to know at the beginning."""
        end = self._begin + AWAITED
        if not self._started.wait(max(0.0, min(self._begin + SILENT, end) - time.monotonic())):
            if (left := end - time.monotonic()) > 0.5:
                say(f"waiting for {self.name} to start, {left:.0f} s more; then the run begins without")
            self._started.wait(max(0.0, end - time.monotonic()))

    def send(self, call: Callable[[GeneralTracker], object]) -> None:
        """Let ``call`` be made when those before it are done. Returns at once."""
        if self._is_late:
            self._give_up(f"did not start within {START:.0f} s")
        if self.open:
            try:
                self._calls.put_nowait(call)
            except queue.Full:
                self._give_up(f"does not answer: {_ROWS} calls wait")

    def finish(self) -> None:
        """Let the tracker finish when it has what was sent. Returns at once."""
        with contextlib.suppress(queue.Full):  # then it hangs, and :meth:`join` gives it up
            self._calls.put_nowait(None)

    def join(self, until: float, *, say: Callable[[str], object], leave: Callable[[], bool]) -> None:
        """Wait until it has; later than ``until`` (of :func:`time.monotonic`) it is given up, or when ``leave`` says so.

        Who waits for longer than a moment hears of it once, by ``say``.
        """
        if not self.open:
            return
        told = time.monotonic() + SILENT
        while self._thread.is_alive() and not leave():
            now, started = time.monotonic(), self._started.is_set()
            end = until if started else min(self._begin + START, until)
            if now >= end:
                break
            if now >= told:
                say(f"waiting for {self.name}, up to {end - now:.0f} s more; Ctrl+C leaves")
                told = math.inf
            self._thread.join(min(end - now, 0.1))
        if not self.open:
            return  # it has failed meanwhile, and said so
        started = self._started.is_set()
        if self._thread.is_alive():
            what = "finish" if started else "start"
            self._give_up(f"did not {what} in time; what it has not sent is in metrics.jsonl alone")
        self.open = False

    @property
    def _is_late(self) -> bool:
        return not self._started.is_set() and time.monotonic() > self._begin + START

    def _work(self) -> None:
        try:
            self.tracker = self._make()
            self._started.set()
            while self.open and (call := self._calls.get()) is not None:
                call(self.tracker)
            self.tracker.finish()
        except Exception as error:  # anything that a third party may raise
            self._give_up((str(error).strip() or type(error).__name__).splitlines()[0])
        finally:
            self._started.set()

    def _give_up(self, reason: str) -> None:
        """One warning, whoever comes first: this thread, or one that waits for it."""
        with self._gave_up:
            if self.open:
                self.open = False
                _log.warning("tracker %s failed and gets no more metrics: %s", self.name, reason)
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)  # wakes the thread, if it ever comes back


def quieten_threads(packages: Collection[str]) -> Callable[[threading.ExceptHookArgs], object]:
    """Let an error in a thread of these packages' own print nothing: the next call tells it. Returns the hook before this."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs, /) -> None:
        if type(args.thread).__module__.partition(".")[0] not in packages:
            before(args)

    threading.excepthook = hook
    return before
