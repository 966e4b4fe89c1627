"""How far a run is: a bar on a terminal, a line every ten seconds elsewhere. All of it on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

SECONDS_BETWEEN_LINES = 10.0


class Advance(Protocol):
    """Takes the bytes of text that were just done and the tokens they gave; ``before``: they were done by an earlier run."""

    def __call__(self, size: int, tokens: int, *, before: bool = False) -> None: ...


@contextlib.contextmanager
def progress(total: int) -> Iterator[Advance]:
    """Shows how much of ``total`` bytes of text is done."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", leave=False) as bar:
            yield _Bar(bar)
    else:
        yield _Lines(total)


class _Clock:
    def __init__(self) -> None:
        self.start = time.monotonic()
        self.tokens = 0

    def rate(self) -> str:
        return f"{self.tokens / 1e6 / max(1e-9, time.monotonic() - self.start):.2f} Mtok/s"


class _Bar(_Clock):
    def __init__(self, bar: Any) -> None:
        super().__init__()
        self.bar = bar

    def __call__(self, size: int, tokens: int, *, before: bool = False) -> None:
        if before:
            self.bar.initial += size  # its rate counts from there
            self.bar.n += size
        else:
            self.tokens += tokens
            self.bar.set_postfix_str(self.rate(), refresh=False)
            self.bar.update(size)


class _Lines(_Clock):
    def __init__(self, total: int) -> None:
        super().__init__()
        self.total, self.done, self.new = max(1, total), 0, 0
        self.spoke = self.start

    def __call__(self, size: int, tokens: int, *, before: bool = False) -> None:
        self.done += size
        if before:
            return
        self.new += size
        self.tokens += tokens
        now = time.monotonic()
        if now - self.spoke >= SECONDS_BETWEEN_LINES:
            self.spoke = now
            rate = self.new / (now - self.start)
            left = max(0, self.total - self.done) / max(1, rate)
            share = min(1.0, self.done / self.total)
            print(
                f"tokenize: {share:.0%}, {rate / 1e6:.1f} MB/s, {self.rate()}, {left:.0f} s left", file=sys.stderr, flush=True
            )
