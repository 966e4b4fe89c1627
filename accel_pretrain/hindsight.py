"""What was said of a run before its first update, against what happens: one line after the first 50.

:mod:`accel_pretrain.foresight` makes the :class:`Forecast`; :class:`Hindsight` holds it against the run.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from accel_pretrain.metrics import Stopwatch

PLAN_FILE = "plan.json"
AFTER = 50  # updates: by then memory has reached its peak and the first slow ones do not count much


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is expected of one start of a run. ``tokens_per_sec`` is of all processes, None where nobody can say.

    ``peak``: bytes of tensors on one device, on a CPU with its libraries.
    ``before``: bytes that the process had already, 0 where that is not counted.
    """

    lines: tuple[str, ...]
    max_iters: int
    tokens_per_step: int
    tokens_per_sec: float | None
    peak: int
    before: int = 0


class Hindsight:
    """Told of every update. Without a forecast it has nothing to say."""

    def __init__(self, forecast: Forecast | None = None) -> None:
        self.forecast, self._updates, self._begin, self._tokens = forecast, 0, 0.0, 0

    @property
    def lines(self) -> tuple[str, ...]:
        return self.forecast.lines if self.forecast else ()

    def after(self, step: int, watch: Stopwatch, device: torch.device, tokens: int | None = None) -> str | None:
        """The comparison, after the 50th update of this start. The first update, which may compile, does not count.

        ``tokens``: all of the run so far, where updates are not of one size.
        """
        forecast = self.forecast
        if forecast is None or self._updates >= AFTER:
            return None
        self._updates += 1
        if self._updates in (1, AFTER) and device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter() - watch.paused_for
        if self._updates == 1:
            self._begin, self._tokens = now, tokens or 0
        if self._updates < AFTER:
            return None
        done = (AFTER - 1) * forecast.tokens_per_step if tokens is None else tokens - self._tokens
        return compared(forecast, done / max(now - self._begin, 1e-9), step, device)


def compared(forecast: Forecast, tokens_per_sec: float, step: int, device: torch.device) -> str:
    """One line: pace and memory, planned and real."""
    pace, planned = f"{tokens_per_sec:,.0f} tokens/s", forecast.tokens_per_sec
    if planned:
        pace = f"{planned:,.0f} tokens/s planned, {tokens_per_sec:,.0f} so far ({tokens_per_sec / planned - 1:+.0%})"
    left = (forecast.max_iters - step) * forecast.tokens_per_step / tokens_per_sec
    what = "tensors and libraries" if device.type == "cpu" else "tensors"
    memory = f"{gigabytes(forecast.peak)} of {what} planned"
    most = most_memory(device)
    if most is not None and device.type == "cuda":
        memory += f", {gigabytes(most)} at most so far ({most / forecast.peak - 1:+.0%})"
    elif most is not None:
        memory += f", {gigabytes(most - forecast.before)} at most so far with the heap's holes"
    return f"Plan and run: {pace}, {duration(left)} of updates to go; {memory}"


def planned_pace(run_dir: Path) -> float | None:
    """Tokens per second as ``accel_pretrain.plan --save`` has them; None where nobody has planned, or nobody can read it."""
    try:
        plan = json.loads((run_dir / PLAN_FILE).read_text(encoding="utf-8"))
        return float(plan["time"]["tokens_per_sec"]) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def most_memory(device: torch.device) -> int | None:
    """Most bytes that this process has had so far: of tensors on a CUDA device, of everything on a CPU; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_of_process() if device.type == "cpu" and sys.platform == "linux" else None


def peak_of_process() -> int:
    """Most bytes of main memory that this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:,.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"
