"""How sure a difference of means is: standard errors, Student's t, Welch's test. NumPy only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of confidence intervals; a difference whose interval has 0 in it is none
BLOCKS = 32


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, and the degrees of freedom with which that is known."""

    value: float
    standard_error: float
    freedom: float

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true number is with a probability of :data:`LEVEL`."""
        reach = t_quantile(LEVEL, self.freedom) * self.standard_error if self.standard_error else 0.0
        return self.value - reach, self.value + reach

    @property
    def p(self) -> float:
        """How often chance alone makes a number at least as far from 0."""
        if not self.standard_error:
            return 0.0 if self.value else 1.0
        return t_outside(abs(self.value) / self.standard_error, self.freedom)

    @property
    def is_certain(self) -> bool:
        """Whether 0 is outside the interval; never for what is not finite."""
        low, high = self.interval
        return low > 0 or high < 0


def mean_of(values: np.ndarray) -> Estimate:
    """The mean of values in the order of a text, which need not be independent: neighbours are often of one document.

    The error is the larger of two: that of independent values, and that of the means of 32 blocks of neighbours.
    """
    n = values.size
    errors = [(float(np.std(values, ddof=1)) / math.sqrt(n), n - 1)] if n > 1 else [(math.inf, 1)]
    if n >= 2 * BLOCKS:
        size = n // BLOCKS
        means = values[: n // size * size].reshape(-1, size).mean(axis=1)
        errors.append((float(np.std(means, ddof=1)) / math.sqrt(means.size), means.size - 1))
    return Estimate(float(values.mean()), *max(errors))


def welch(a: np.ndarray, b: np.ndarray) -> Estimate:
    """The difference of the means of two independent groups, of two values each at least, with variances of their own.

    Degrees of freedom by Welch (1947) and Satterthwaite (1946).
    """
    shares = [float(np.var(group, ddof=1)) / group.size for group in (a, b)]
    variance = sum(shares)
    below = sum(share**2 / (group.size - 1) for share, group in zip(shares, (a, b), strict=True))
    freedom = variance**2 / below if below else a.size + b.size - 2
    return Estimate(float(a.mean() - b.mean()), math.sqrt(variance), freedom)


def t_outside(t: float, freedom: float) -> float:
    """The probability that Student's t is further from 0 than ``t``."""
    angles, inside = _t_table(freedom)
    angle = math.atan2(t, math.sqrt(min(freedom, 1e6)))
    return float(np.interp(angle, angles, inside[-1] - inside, right=0.0) / inside[-1])


def t_quantile(level: float, freedom: float) -> float:
    """What Student's t is closer to 0 than with the probability ``level``."""
    angles, inside = _t_table(freedom)
    return math.tan(float(np.interp(level * inside[-1], inside, angles))) * math.sqrt(min(freedom, 1e6))


def _t_table(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Angles, and up to each the integral over cos^(f - 1), which is t's probability at tan(angle) sqrt(f), not normalised."""
    freedom = min(max(freedom, 1.0), 1e6)
    angles = np.linspace(0, min(math.pi / 2, 40 / math.sqrt(freedom)), 40_001)
    density = np.exp((freedom - 1) * np.log(np.cos(angles)))
    return angles, np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(angles))])
