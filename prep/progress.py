"""How far a run is: a bar on a terminal, a line every ten seconds elsewhere. All of it on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A function that takes the number of bytes that were just done."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", leave=False) as bar:

            def advance(size: int) -> None:
                bar.update(size)

            yield advance
    else:
        yield _Lines(total).advance


class _Lines:
    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.start = self.spoke = time.monotonic()

    def advance(self, size: int) -> None:
        self.done += size
        now = time.monotonic()
        if now - self.spoke >= SECONDS_BETWEEN_LINES:
            self.spoke = now
            share, rate = self.done / self.total, self.done / 1e6 / (now - self.start)
            left = (now - self.start) * (1 - share) / share
            print(f"tokenize: {share:.0%}, {rate:.1f} MB/s, {left:.0f} s left", file=sys.stderr, flush=True)
