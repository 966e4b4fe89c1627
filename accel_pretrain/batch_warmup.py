"""Updates that grow: how many sequences each takes while a run is young, as a pure function of the samples consumed.

Early gradients agree with each other, so small updates lose nothing and there are more of them for the same tokens (McCandlish
et al. 2018; Brown et al. 2020, table 2.1, went from 32k tokens to the full batch over the first billions). Torch-free.

The position of a run is its number of samples. From that alone follows the size of the next update, so that a restart, another
number of processes and a rollback give the same sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from accel_pretrain.errors import refuse


@dataclass(frozen=True)
class BatchWarmup:
    """From ``first`` to ``full`` sequences per update, in steps of ``first``, over the first ``over`` samples of a run."""

    first: int
    full: int
    over: int

    def __post_init__(self) -> None:
        refuse(
            (self.first < 1, f"batch_warmup_from: must be at least 1, got {self.first}"),
            (
                self.full % max(1, self.first) != 0,
                f"batch_warmup_from: {self.full} sequences per update are not a multiple of {self.first}",
            ),
        )

    @property
    def _levels(self) -> int:
        return self.full // self.first

    def size(self, consumed: int) -> int:
        """Sequences of the update that begins when so many samples were consumed."""
        if consumed >= self.over:
            return self.full
        return self.first * (1 + (self._levels - 1) * consumed // self.over)

    def consumed_after(self, updates: int, begin: int = 0) -> int:
        """Samples consumed after so many updates more than ``begin`` samples."""
        consumed = begin
        while updates > 0:
            size, some = self._alike(consumed)
            some = updates if some is None else min(some, updates)
            consumed, updates = consumed + some * size, updates - some
        return consumed

    def updates_until(self, samples: float, begin: int = 0) -> int:
        """How many updates from ``begin`` on it takes until at least ``samples`` are consumed."""
        consumed, updates = begin, 0
        while consumed < samples:
            size, some = self._alike(consumed)
            needed = math.ceil(round((samples - consumed) / size, 6))
            some = needed if some is None else min(some, needed)
            if some == 0:  # within a rounding error of the end
                break
            consumed, updates = consumed + some * size, updates + some
        return updates

    def _alike(self, consumed: int) -> tuple[int, int | None]:
        """The size of the next update, and how many from there on have it; None: all."""
        size = self.size(consumed)
        if size == self.full:
            return size, None
        end = -(-(size // self.first) * self.over // (self._levels - 1))  # where the next size begins
        return size, -(-(end - consumed) // size)
