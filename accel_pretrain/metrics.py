"""What a run measures about itself: time, throughput, and ``metrics.jsonl``, the record that everything else is drawn from."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from accel_pretrain.files import write_whole

METRICS_FILE = "metrics.jsonl"
_log = logging.getLogger(__name__)

# Dense bf16 matrix throughput without sparsity, FLOP/s, from data sheets; the first name that a device's name holds counts.
_PEAK_FLOPS = {
    "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
    "MI300X": 1307e12,
}  # fmt: skip
_OTHER_CHIP = re.compile(r"\b(Laptop|Max-Q|MIG|Ti|D)\b")  # shares its name with a chip above, and not its speed


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in bf16, or None where it is not known: a guess would make the utilisation a lie."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if _OTHER_CHIP.search(name):
        return None
    return next((peak for known, peak in _PEAK_FLOPS.items() if re.search(rf"\b{known}\b", name)), None)


class Stopwatch:
    """Time spent on updates: what happens inside :meth:`paused` (validation, saving) does not count."""

    def __init__(self) -> None:
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
        self._begin += time.perf_counter() - stopped

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
