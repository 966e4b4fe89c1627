"""A mixture whose weights move: from those of ``train_data_path`` to ``data.mixture_end``, in a straight line. Torch-free.

The way is cut into phases of equal length, each with weights of its own, rounded to a thousandth, and a cycle of turns as every
mixture has (:mod:`accel_pretrain.mixture`). How many samples of each dataset all phases before have taken is counted once, so
that which dataset sample *i* comes from, and the how many-th of it, stays a function of *i* alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from accel_pretrain.mixture import Turns, whole

PHASES = 64
_FINE = 1000


class MovingTurns:
    """As :class:`~accel_pretrain.mixture.Turns`, with weights that move over the first ``over`` samples, and then stay.

    A dataset whose weight is 0 at one end is not read there.
    """

    def __init__(self, begin: Sequence[int], end: Sequence[int], over: int) -> None:
        phases = max(1, min(PHASES, over))
        self._begins = np.arange(phases + 1) * over // phases
        start, goal = ([Fraction(weight, sum(weights)) for weight in weights] for weights in (begin, end))
        self._turns: list[tuple[np.ndarray, Turns]] = []
        for phase in range(phases + 1):  # the last is without end
            way = min(Fraction(1), Fraction(2 * phase + 1, 2 * phases))
            weights = [first + (last - first) * way for first, last in zip(start, goal, strict=True)]
            self._turns.append(_turns(weights if phase < phases else goal))
        self._before = np.zeros((phases + 1, len(begin)), dtype=np.int64)
        for phase in range(phases):
            length = int(self._begins[phase + 1] - self._begins[phase])
            self._before[phase + 1] = self._before[phase] + self._count(phase, length)

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each sample number its part, and how many samples of that part come before it: int64, of the same shape."""
        phases = np.searchsorted(self._begins, numbers, side="right") - 1
        parts, positions = np.empty_like(numbers), np.empty_like(numbers)
        for phase in np.unique(phases):
            own = phases == phase
            active, turns = self._turns[phase]
            turn, inside = turns(numbers[own] - self._begins[phase])
            parts[own] = active[turn]
            positions[own] = inside + self._before[phase][parts[own]]
        return parts, positions

    def counts(self, samples: int) -> list[int]:
        """How many of the first ``samples`` each part gives."""
        phase = int(np.searchsorted(self._begins, samples, side="right")) - 1
        return (self._before[phase] + self._count(phase, samples - int(self._begins[phase]))).tolist()

    def _count(self, phase: int, samples: int) -> np.ndarray:
        active, turns = self._turns[phase]
        counts = np.zeros(self._before.shape[1], dtype=np.int64)
        counts[active] = turns.counts(samples)
        return counts


def _turns(weights: Sequence[Fraction]) -> tuple[np.ndarray, Turns]:
    """The parts that have turns, and these."""
    rounded = [round(weight * _FINE) for weight in weights]
    active = [part for part, weight in enumerate(rounded) if weight > 0]
    return np.array(active, dtype=np.int64), Turns(whole([Fraction(rounded[part]) for part in active]))
