"""What runs have recorded, as curves: values of a metric over updates, tokens, operations or hours. No drawing here."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from accel_pretrain.errors import DataError
from accel_pretrain.history import read_starts
from accel_pretrain.metrics import METRICS_FILE, read_metrics

AXES = {"update": "Updates", "tokens": "Tokens", "flops": "Operations (FLOP)", "time": "Hours of training"}
_MEDIANS = 2000  # of so many windows at most; between them a line


@dataclass(frozen=True)
class Series:
    """One metric of one run: ``values`` at ``x``, NaN where it was not finite; ``rows`` are their numbers in the run."""

    x: np.ndarray
    values: np.ndarray
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=int))

    def over(self, unit: float) -> Series:
        """The same with ``x`` in another unit."""
        return Series(self.x / unit, self.values, self.rows)

    @property
    def last(self) -> float | None:
        """The last finite value, if there is any."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if finite.size else None

    @property
    def lowest(self) -> int | None:
        """The index of the lowest finite value, if there is any."""
        return int(np.nanargmin(self.values)) if self.last is not None else None


@dataclass(frozen=True)
class Run:
    """The recorded rows of one run, what to call it, and how often it was started.

    ``abandoned`` rows were of updates that were done again, and are not among ``rows``.
    """

    name: str
    rows: list[dict[str, Any]]
    folder: Path = Path()
    starts: list[dict[str, Any]] = field(default_factory=list)
    abandoned: int = 0
    _axes: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def has(self, metric: str) -> bool:
        return any(metric in row for row in self.rows)

    def series(self, metric: str, axis: str = "update") -> Series:
        """Every row that has ``metric``, in the file's order, over one of :data:`AXES`."""
        found = np.array([number for number, row in enumerate(self.rows) if metric in row], dtype=int)
        values = np.array([as_number(self.rows[number][metric]) for number in found], dtype=float)
        return Series(self.axis(axis)[found], values, found)

    def values_at(self, metric: str, rows: np.ndarray) -> np.ndarray:
        """A metric of the rows with these numbers; NaN in those without it."""
        return np.array([as_number(self.rows[number].get(metric)) for number in rows], dtype=float)

    def last(self, key: str) -> float:
        """The largest ``step`` or ``tokens``; 0 if nothing is recorded."""
        return max((value for row in self.rows if math.isfinite(value := as_number(row.get(key)))), default=0.0)

    def axis(self, name: str) -> np.ndarray:
        """Where every row stands on an axis; DataError for operations where nobody knows how many a token costs."""
        if name not in self._axes:
            self._axes[name] = self._computed(name)
        return self._axes[name]

    def _computed(self, name: str) -> np.ndarray:
        if name == "time":
            return self._hours()
        if name == "flops":
            if self.flops_per_token is None:
                raise DataError(
                    f"{self.name}: how many operations a token costs is not recorded (runs of version 0.1.0 have it in "
                    "plan.json, from accel_pretrain.plan --save); type --x tokens"
                )
            return self.axis("tokens") * self.flops_per_token
        return np.array([as_number(row.get("step" if name == "update" else name)) for row in self.rows], dtype=float)

    def _hours(self) -> np.ndarray:
        """Hours of training up to each row: what lies between the last row before a start and that start does not count."""
        times = np.array([as_number(row.get("time")) for row in self.rows], dtype=float)
        if not times.size:
            return times
        lead = as_number(self.rows[0].get("train/iter_time_ms", 0)) / 1000 * self.rows[0]["step"]  # where no start is recorded
        before = np.concatenate([[times[0] - np.nan_to_num(lead)], times[:-1]])
        starts = np.sort([as_number(start["time"]) for start in self.starts])
        if starts.size and starts[0] <= times[0]:
            before[0] = starts[0]
        last_start = np.concatenate([[-math.inf], starts])[np.searchsorted(starts, times, side="right")]
        spent = np.maximum(times - np.fmax(before, last_start), 0)
        return np.cumsum(np.where(np.isfinite(spent), spent, 0)) / 3600

    @cached_property
    def flops_per_token(self) -> float | None:
        """Operations of one token, forward and backward, as the run or its plan says."""
        for start in reversed(self.starts):
            if isinstance(plan := start.get("plan"), dict) and (known := as_number(plan.get("flops_per_token"))) > 0:
                return known
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = as_number(json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))["flops_per_token"]["total"])
            return known if known > 0 else None
        return None


def as_number(value: object) -> float:
    """A recorded number; NaN for anything else, and for what is not finite."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
    except OverflowError:  # an integer that no float can be
        return math.nan


# -------------------------------------------------------------------------------------------------------------- reading


def metrics_path(path: Path) -> Path:
    return path / METRICS_FILE if path.is_dir() else path


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs, each under the shortest end of its path that tells it apart; DataError for one that is not there."""
    files = [metrics_path(path) for path in paths]
    if missing := [
        f"{path.absolute()} does not exist: not a run, or nothing recorded yet" for path in files if not path.is_file()
    ]:
        raise DataError(missing)
    parts = [path.resolve().parent.parts for path in files]
    length = 1
    while len({part[-length:] for part in parts}) < len(set(parts)):
        length += 1
    runs = []
    for part, file in zip(parts, files, strict=True):
        rows = read_metrics(file)
        kept = without_abandoned(rows)
        name = "/".join(part[-length:]).encode(errors="replace").decode()  # of a path that is no text
        runs.append(Run(name, kept, file.parent, read_starts(file.parent), len(rows) - len(kept)))
    return runs


def without_abandoned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows by step, without those of updates that were done again later: no curve goes back.

    The trainer cuts its file back itself; files that others have joined or copied are not.
    """
    kept: list[dict[str, Any]] = []
    newest: dict[str, int] = {}
    for row in rows:
        step: int = row["step"]
        measured = {key for key in row if key.startswith(("train/", "eval/"))}
        if any(newest.get(key, step - 1) >= step for key in measured):
            kept = [old for old in kept if old["step"] < step]
            newest = {key: min(last, step - 1) for key, last in newest.items()}
        kept.append(row)
        newest |= dict.fromkeys(measured, step)
    return sorted(kept, key=lambda row: row["step"])


def unit_of(runs: Sequence[Run], axis: str) -> tuple[str, float]:
    """What to write below an axis, and what it is divided by: minutes for short runs; millions and more of what is many."""
    end = max((float(np.nanmax(run.axis(axis), initial=0)) for run in runs), default=0.0)
    if axis == "time" and end < 3:
        return "Minutes of training", 1 / 60
    if axis in ("tokens", "flops"):
        sizes = {1e21: "Z", 1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}
        if size := next((size for size in sizes if end >= 10 * size), None):
            words = {1e12: "trillions", 1e9: "billions", 1e6: "millions", 1e3: "thousands"}
            named = words.get(size, f"{size:g}") if axis == "tokens" else f"{sizes[size]}FLOP"
            return f"{AXES[axis].partition(' (')[0]} ({named})", size
    return AXES[axis], 1.0


# -------------------------------------------------------------------------------------------------- smoothing, thinning


def moving_median(values: np.ndarray, window: int | None = None) -> np.ndarray:
    """The median of a centred window, without values that are NaN; narrower at both ends. None: 1/25 of all values.

    A median, because it follows steep ends and leaves out spikes, where a mean would draw neither as it was.
    """
    size = values.size
    half = size // 50 if window is None else window // 2
    centres = np.arange(size) if size <= _MEDIANS else np.unique(np.linspace(0, size - 1, _MEDIANS).astype(int))
    medians = np.full(centres.size, math.nan)
    for number, i in enumerate(centres):
        reach = min(half, i)
        own = values[i - reach : i + reach + 1]
        finite = own[np.isfinite(own)]
        if finite.size:
            medians[number] = np.median(finite)
    return medians if centres.size == size else np.interp(np.arange(size), centres, medians)


def is_noisy(values: np.ndarray, smooth: np.ndarray) -> bool:
    """Whether values stray from their moving median by more than 1 % of the range of the middle nine tenths of them."""
    away = values - smooth
    if np.isfinite(away).sum() < 50:
        return False
    low, high = np.percentile(values[np.isfinite(values)], (5, 95))
    return bool(np.nanstd(away) > 0.01 * (high - low))


def wants_log(values: np.ndarray) -> bool:
    """Whether positive values differ so much that a spike, or the beginning, would flatten everything else."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() > 20 * finite.min())


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """The indices, ascending, of at most about ``most`` values that look the same: of each group the first, lowest and highest,
    and the first that is NaN. A spike of one row stays, and so does a gap."""
    if values.size <= most:
        return np.arange(values.size)
    edges = np.linspace(0, values.size, max(1, most // 3) + 1).astype(int)
    chosen = {0, values.size - 1}
    for begin, end in itertools.pairwise(edges.tolist()):
        group = values[begin:end]
        bad = ~np.isfinite(group)
        chosen.add(begin)
        if bad.any():
            chosen.add(begin + int(bad.argmax()))
        if not bad.all():
            chosen |= {begin + int(np.nanargmin(group)), begin + int(np.nanargmax(group))}
    return np.array(sorted(chosen))


def short(value: float) -> str:
    """A number as a tick label: 0, 2.5, 40k, 1.2M, 3e-4."""
    if value == 0:
        return "0"
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if abs(value) >= 1e15:
        return f"{value:.3g}".replace("e+", "e")
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"
