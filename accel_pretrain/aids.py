"""Ways to look into a run: what can be asked for (:class:`DebugConfig`), and where in an update it gets to look (:class:`Aid`).

Nobody asks by default, and then nothing is installed and nothing computed. The aids themselves are in
:mod:`~accel_pretrain.inspection`, :mod:`~accel_pretrain.anomaly`, :mod:`~accel_pretrain.profiling` and
:mod:`~accel_pretrain.one_batch`; :mod:`~accel_pretrain.debugging` puts them into a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from accel_pretrain.checkpoint import TrainState
from accel_pretrain.errors import refuse
from accel_pretrain.typed_yaml import option

WARM_UP = 3  # updates before the ones that are profiled
ONE_BATCH_UPDATES = 300  # where nobody says how many
_NOTHING = contextlib.nullcontext()


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """How to look into a run. Only ``overfit_one_batch`` changes what is learned: such a run cannot become another one."""

    overfit_one_batch: bool = option(
        False, "every update sees the same batch, whose loss must go towards 0; 300 updates if nothing says how many"
    )
    detect_anomaly: bool = option(
        False, "end at the first activation or gradient that is not finite, and name its layer; slow, and not compiled"
    )
    profile: int | None = option(
        None, "updates to time by their parts, and as many more to trace, after 3 to warm up: profile/ in the run directory"
    )
    inspect_interval: int | None = option(
        None, "updates between looks into the layers: norms of gradients, weights and updates; activations; null: none"
    )
    inspect_histograms: Literal["none", "gradients", "parameters", "all"] = option(
        "none", "at that interval, a histogram of each tensor for wandb and tensorboard, as wandb.watch"
    )

    @property
    def takes_time(self) -> bool:
        """Whether updates take longer than those of the same run without, so that their pace is not the run's."""
        return self.detect_anomaly or self.profile is not None or self.inspect_interval is not None

    def __post_init__(self) -> None:
        looked_into = self.detect_anomaly or self.inspect_interval is not None
        refuse(
            (self.profile is not None and self.profile < 1, f"profile: must be at least 1 or null, got {self.profile}"),
            (
                self.inspect_interval is not None and self.inspect_interval < 1,
                f"inspect_interval: must be at least 1 or null, got {self.inspect_interval}",
            ),
            (
                self.inspect_histograms != "none" and self.inspect_interval is None,
                f"inspect_histograms: {self.inspect_histograms}, but how often? Type --inspect_interval N too",
            ),
            (
                self.profile is not None and looked_into,
                "profile: it would time detect_anomaly or inspect_interval rather than the run; ask for one at a time",
            ),
        )


def problems(debug: DebugConfig, left: int, on_spike: str) -> list[str]:
    """What does not fit together with the rest of a run that has ``left`` updates to go."""
    found = []
    if debug.overfit_one_batch and on_spike == "rollback":
        found.append("debug.overfit_one_batch: a rollback would leave the batch out; type --on_spike log")
    if debug.profile is not None and 0 < left < WARM_UP + 2 * debug.profile:
        most = (left - WARM_UP) // 2
        advice = f"type --profile {most}" if most > 0 else f"{WARM_UP + 2} are the least"
        found.append(
            f"debug.profile: {debug.profile} needs {WARM_UP} + 2 x {debug.profile} updates, and the run has {left}; {advice}"
        )
    return found


class Aid:
    """Something that looks at updates. Every process has its own, so what is collective stays so."""

    def around(self, state: TrainState) -> contextlib.AbstractContextManager[object]:
        """Entered before the update that follows ``state``, and left after it."""
        return _NOTHING

    def close(self) -> None:
        """Called when there are no more updates."""

    def gradients(self) -> None:
        """Called when all gradients of the update are there, of all processes, not yet clipped (under fp16: still scaled)."""


@dataclass
class Aids:
    """Those of one run; by default none, at the price of a call."""

    installed: list[Aid] = field(default_factory=list)

    def around(self, state: TrainState) -> contextlib.AbstractContextManager[object]:
        return self._around(state) if self.installed else _NOTHING

    @contextlib.contextmanager
    def _around(self, state: TrainState) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for aid in self.installed:
                stack.enter_context(aid.around(state))
            yield

    def close(self) -> None:
        for aid in self.installed:
            aid.close()

    def gradients(self) -> None:
        for aid in self.installed:
            aid.gradients()
