"""The learning rate as a pure function of the step: ``schedule.lr(step, peak, total)``.

``step`` counts completed updates, from 1: it is the number that the update will have when it is done. Warm-up is linear and
reaches the peak at ``step == warmup``; the last update, ``step == total``, runs at ``min_lr``. Nothing here has state, so
nothing needs saving, and the number of processes cannot change the curve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from accel_pretrain.errors import refuse
from accel_pretrain.typed_yaml import option

_WARMUP_DOC = "updates of linear warm-up; null: 2 % of max_iters, and what it was where a run goes on"
_MIN_LR_DOC = "learning rate of the last update; null: lr / 10"
_WARMUP_ALIASES = ("warmup_steps",)


@dataclass(frozen=True, kw_only=True)
class _Warmup:
    """What all schedules share: the linear rise, then :meth:`after`, which each schedule defines."""

    warmup_iters: int | None = option(None, _WARMUP_DOC, aliases=_WARMUP_ALIASES)

    def __post_init__(self) -> None:
        refuse(((self.warmup_iters or 0) < 0, f"warmup_iters: must not be negative, got {self.warmup_iters}"))

    def warmup(self, total: int) -> int:
        return total // 50 if self.warmup_iters is None else self.warmup_iters

    def lr(self, step: int, peak: float, total: int) -> float:
        """Learning rate of update ``step`` (1 .. ``total``), as a Python float."""
        warmup = self.warmup(total)
        if step < warmup:
            return peak * step / warmup
        return self.after(step, warmup, peak, total)

    def after(self, step: int, warmup: int, peak: float, total: int) -> float:
        raise NotImplementedError

    def last_stable(self, total: int) -> int | None:
        """The update after which a cool-down begins, so that a longer run can branch off there; None where there is none."""
        return None

    def problems(self, peak: float, total: int) -> list[str]:
        """What does not fit together, for the report: the keys are named below the section."""
        found = []
        if self.warmup(total) >= total > 1:
            found.append(
                f"warmup_iters: {self.warmup(total)} updates of warm-up do not fit into max_iters {total}; "
                f"try --warmup_iters {max(1, total // 50)}"
            )
        min_lr = getattr(self, "min_lr", None)
        if min_lr is not None and min_lr > peak:
            found.append(f"min_lr: {min_lr:g} is above the peak optimizer.lr {peak:g}; try --min_lr {peak / 10:g}")
        return found


@dataclass(frozen=True, kw_only=True)
class _Decay(_Warmup):
    """A schedule that comes down to ``min_lr``."""

    min_lr: float | None = option(None, _MIN_LR_DOC)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(((self.min_lr or 0.0) < 0, f"min_lr: must not be negative, got {self.min_lr}"))

    def floor(self, peak: float) -> float:
        return peak / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True, kw_only=True)
class Cosine(_Decay):
    """Half a cosine from the peak to ``min_lr`` (Loshchilov & Hutter 2017, eq. 5, one cycle)."""

    name: Literal["cosine"] = option("cosine", "cosine | linear | wsd | inverse_sqrt | constant")

    def after(self, step: int, warmup: int, peak: float, total: int) -> float:
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return self.floor(peak) + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - self.floor(peak))


@dataclass(frozen=True, kw_only=True)
class Linear(_Decay):
    """A straight line from the peak to ``min_lr``."""

    name: Literal["linear"] = option("linear", "")

    def after(self, step: int, warmup: int, peak: float, total: int) -> float:
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return peak + progress * (self.floor(peak) - peak)


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(_Decay):
    """The peak, then a cool-down over the last ``decay_iters`` (Hu et al. 2024, MiniCPM; 1-sqrt: Hägele et al. 2024)."""

    name: Literal["wsd"] = option("wsd", "")
    decay_iters: int | None = option(None, "updates of cool-down at the end; null: 20 % of max_iters")
    decay_shape: Literal["sqrt", "linear"] = option("sqrt", "cool-down shape: 1 - sqrt(progress), or a straight line")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(((self.decay_iters or 0) < 0, f"decay_iters: must not be negative, got {self.decay_iters}"))

    def _decay(self, total: int) -> int:
        return total // 5 if self.decay_iters is None else self.decay_iters

    def last_stable(self, total: int) -> int | None:
        return total - self._decay(total) if 0 < self._decay(total) < total else None

    def after(self, step: int, warmup: int, peak: float, total: int) -> float:
        decay = self._decay(total)
        progress = min(1.0, max(0, step - (total - decay)) / max(1, decay))
        share = math.sqrt(progress) if self.decay_shape == "sqrt" else progress
        return peak + share * (self.floor(peak) - peak)

    def problems(self, peak: float, total: int) -> list[str]:
        found = super().problems(peak, total)
        if not found and self.warmup(total) + self._decay(total) > total:
            found.append(f"decay_iters: warm-up {self.warmup(total)} + cool-down {self._decay(total)} exceed max_iters {total}")
        return found


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(_Warmup):
    """``peak * sqrt(warmup / step)`` (Vaswani et al. 2017, eq. 3, rescaled so that the peak is ``lr``)."""

    name: Literal["inverse_sqrt"] = option("inverse_sqrt", "")

    def after(self, step: int, warmup: int, peak: float, total: int) -> float:
        return peak * math.sqrt(max(1, warmup) / max(1, warmup, step))


@dataclass(frozen=True, kw_only=True)
class Constant(_Warmup):
    """The peak, always, after the warm-up."""

    name: Literal["constant"] = option("constant", "")

    def after(self, step: int, warmup: int, peak: float, total: int) -> float:
        return peak


Schedule = Cosine | Linear | WarmupStableDecay | InverseSqrt | Constant
