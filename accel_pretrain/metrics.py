"""What a run measures about itself: time, throughput, and ``metrics.jsonl``, the record that everything else is drawn from."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accel_pretrain.files import write_whole

METRICS_FILE = "metrics.jsonl"
_log = logging.getLogger(__name__)


class Stopwatch:
    """Time spent on updates: what happens inside :meth:`paused` (validation, saving) does not count."""

    def __init__(self) -> None:
        self.paused_for = 0.0  # seconds, in all
        self.restart(0)

    def restart(self, step: int, tokens: int = 0) -> None:
        """Begin a new interval after ``step`` updates, of so many tokens in all."""
        self._step, self._tokens, self._begin = step, tokens, time.perf_counter()

    def tokens_per_second(self, tokens: int) -> float:
        """Since the interval began, when there have been so many in all."""
        return (tokens - self._tokens) / max(time.perf_counter() - self._begin, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        stopped = time.perf_counter()
        yield
        pause = time.perf_counter() - stopped
        self._begin, self.paused_for = self._begin + pause, self.paused_for + pause

    def seconds_per_step(self, step: int) -> float:
        """Mean over the updates since the interval began."""
        return max(time.perf_counter() - self._begin, 1e-9) / max(1, step - self._step)


def cut_back(path: Path, step: int) -> None:
    """Drop rows of updates that the checkpoint does not know, and a torn last line: they are about to happen again."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


class RowsFile:
    """A file of JSON rows, cut back to those of a checkpoint. What the disk does not take costs one warning, never the run."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path, self._warned, self._torn = path, False, False
        with self._tolerated():
            cut_back(path, resumed_step)

    def write(self, row: Mapping[str, Any]) -> None:
        line = ("\n" * self._torn + json.dumps(row) + "\n").encode()
        self._torn = True
        with self._tolerated(), self.path.open("ab", buffering=0) as file:  # no buffer, which would try its bytes again later
            self._torn = file.write(line) != len(line)

    def close(self) -> None:
        """Make the rows durable."""
        with self._tolerated(), self.path.open("ab") as file:
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                _log.warning("%s could not be written, and will lack rows: %s", self.path, error.strerror or error)
            self._warned = True


class MetricsFile(RowsFile):
    """Appends rows to ``metrics.jsonl``: ``step`` (completed updates), ``time`` (Unix seconds), ``tokens``, metrics by name."""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        super().__init__(run_dir / METRICS_FILE, resumed_step)

    def append(self, step: int, tokens: int, metrics: Mapping[str, Any]) -> None:
        numbers = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self.write({"step": step, "time": round(time.time(), 3), "tokens": tokens, **numbers})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` or ``samples.jsonl``, without torn lines. A metric that was not finite is None."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows
