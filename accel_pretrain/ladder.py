"""A search for the fastest way to train: what is tried after what, and what has won. It measures nothing itself.

One ladder after the other, each from the best so far: torch.compile, micro-batch, loss in chunks, activation checkpointing.
The sequences of an update stay the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from accel_pretrain.compiling import resolve_compile
from accel_pretrain.config import Plan, RunConfig
from accel_pretrain.errors import ConfigError, refuse
from accel_pretrain.models.recompute import Level
from accel_pretrain.trial import TOO_LARGE, TOO_SLOW, Trial
from accel_pretrain.typed_yaml import option, section

_BETTER = 1.01  # times as fast, to be preferred to what is simpler: times vary by about that
_COMPILING = 20.0  # seconds that compiling takes at least: shorter runs do without


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What to try, and how long."""

    only: Literal["all", "batch_size", "compile", "chunked_loss", "activation_checkpointing"] = option(
        "all", "all | batch_size | compile | chunked_loss (GPU) | activation_checkpointing: what to vary"
    )
    budget: float = option(180.0, "seconds that measuring may take")
    world_size: int = option(
        1, "processes of the planned run, which share its global batch; one of them is measured, with its share of a CPU"
    )
    memory_gb: float | None = option(None, "what a candidate may have; null: what is free")
    write: Path | None = option(None, "a file for the whole config with the winner in it")

    def __post_init__(self) -> None:
        refuse(
            (self.budget <= 0, f"budget: must be positive, got {self.budget}"),
            (self.world_size < 1, f"world_size: must be at least 1, got {self.world_size}"),
            ((self.memory_gb or 1) <= 0, f"memory_gb: must be positive, got {self.memory_gb}"),
        )


@dataclass(frozen=True, kw_only=True)
class TunedRun(RunConfig):
    """A run, and how to look for its fastest settings."""

    tune: TuneOptions = section(TuneOptions, "What to try (keys of accel_pretrain.tune only)")


@dataclass(frozen=True)
class Candidate:
    """One way to train."""

    batch_size: int
    compiled: bool
    checkpointing: Level
    chunked: bool = False


@dataclass
class Search:
    """A greedy search: ``rows`` are what was measured, in order; ``left_out`` what there was no time for.

    ``once``: the winner was not measured again.
    """

    config: TunedRun
    plan: Plan
    measure: Callable[[Candidate, float], Trial]  # with a candidate, and the seconds that are left
    kind: str = "cpu"  # cpu, cuda or mps
    say: Callable[[Candidate], object] = lambda candidate: None  # called when it was measured
    rows: dict[Candidate, Trial] = field(default_factory=dict)
    left_out: list[Candidate] = field(default_factory=list)
    once: bool = False
    began: float = field(default_factory=time.monotonic)

    @property
    def samples(self) -> int:
        """Sequences of an update, in one process."""
        return self.plan.samples_per_step // self.plan.world_size

    @property
    def on_gpu(self) -> bool:
        return self.kind != "cpu"

    @cached_property
    def start(self) -> Candidate:
        """The config as it is: compiled if the trainer would compile it here."""
        training, plan = self.config.training, self.plan
        flops = plan.flops_per_token * plan.tokens / plan.world_size
        compiled, _ = resolve_compile(training, flops, torch.device(self.kind))
        return Candidate(training.batch_size, compiled, training.activation_checkpointing, training.chunked_loss)

    @property
    def best(self) -> Candidate:
        """What finishes the planned run first, compiling included."""
        best = next(iter(self.rows))
        for candidate in self.rows:
            if self.hours(best) > _BETTER * self.hours(candidate):
                best = candidate
        return best

    def hours(self, candidate: Candidate) -> float:
        """Of all updates, and the compiling before them; endless if it does not run."""
        trial = self.rows[candidate]
        return (trial.first + self.plan.max_iters * trial.seconds) / 3600

    def run(self) -> bool:
        """Climb one ladder after the other; whether the same question may be answered by this the next time.

        That is so if there was time for all, and nothing failed but for memory.
        """
        if self._try(self.start) is None:
            raise ConfigError("tune.budget: too short for a single candidate; type --budget 180")
        only = self.config.tune.only
        if only in ("all", "compile"):
            self._try_all(self._compiled(self.start))
        if only in ("all", "batch_size") or self.rows[self.start].problem:
            # without compiling, which takes its time, if what is found is then tried with it
            self._climb_batches(replace(self.start, compiled=self.start.compiled and only != "all"))
        self._require_one()
        if only in ("all", "batch_size"):
            self._try_all(self._compiled_too())
        if only in ("all", "chunked_loss") and self.on_gpu:
            self._try_all(self._chunked(self.best))
        if only in ("all", "activation_checkpointing"):
            self._try_all(self._checkpointed(self.best))
        self.once = not self._confirm()
        lasting = all(trial.problem in (None, TOO_LARGE) for trial in self.rows.values())
        return lasting and not self.once and not self.left_out

    def _try_all(self, candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            self._try(candidate)

    def _try(self, candidate: Candidate) -> Trial | None:
        """Measure a candidate, if that was not done yet and there is time: None if not."""
        if candidate in self.rows:
            return self.rows[candidate]
        if (left := self._left()) is None:
            self.left_out.append(candidate)
            return None
        trial = self.measure(candidate, left)
        if trial.problem == TOO_SLOW:  # for what was left of the budget
            self.left_out.append(candidate)
        self.rows[candidate] = trial
        self.say(candidate)
        return trial

    def _left(self) -> float | None:
        """Seconds of the budget; None where they are too few to begin anything."""
        left = self.config.tune.budget - (time.monotonic() - self.began)
        return None if left < 0.05 * self.config.tune.budget else left

    def _confirm(self) -> bool:
        """Measure the winner again, in turns with the start: a lucky measurement is no news. False if time was up."""
        again = {self.start}
        while not self.rows[self.start].problem and (best := self.best) not in again:
            for candidate in (self.start, best):
                if (left := self._left()) is None or (trial := self.measure(candidate, left)).problem:
                    return False
                self.rows[candidate] = replace(trial, first=self.rows[candidate].first)  # compiled code is kept by now
                self.say(candidate)
            again.add(best)
        return True

    def _climb_batches(self, base: Candidate) -> None:
        """Smaller until it fits, then larger as long as that is faster, or else smaller as long as that is."""
        sizes = [size for size in range(1, self.samples + 1) if self.samples % size == 0]
        first = at = sizes.index(base.batch_size)
        while (trial := self._try(replace(base, batch_size=sizes[at]))) is not None and trial.problem and at > 0:
            at = _half(sizes, at)
        if trial is None or trial.problem or (at == first and self._follow(base, sizes, at, up=True)):
            return
        self._follow(base, sizes, at, up=False)

    def _follow(self, base: Candidate, sizes: list[int], at: int, *, up: bool) -> bool:
        """Go on in one direction while it gets faster; whether it did at all."""
        improved = False
        while (there := _double(sizes, at) if up else _half(sizes, at)) != at:
            here, candidate = replace(base, batch_size=sizes[at]), replace(base, batch_size=sizes[there])
            if self._try(candidate) is None or self.hours(here) <= _BETTER * self.hours(candidate):
                break
            at, improved = there, True
        return improved

    def _compiled(self, start: Candidate) -> Iterator[Candidate]:
        if start.compiled:
            yield replace(start, compiled=False)
        elif 3600 * self.hours(start) > 2 * _COMPILING:
            yield replace(start, compiled=True)

    def _compiled_too(self) -> Iterator[Candidate]:
        """If compiling has paid where it was tried, then with the best micro-batch too, and one that only fits compiled."""
        pairs = [(c, replace(c, compiled=False)) for c in self.rows if c.compiled and replace(c, compiled=False) in self.rows]
        if any(self.hours(plain) > _BETTER * self.hours(compiled) for compiled, plain in pairs):
            yield replace(self.best, compiled=True)
            if (size := self._too_large(self.best)) is not None:
                yield replace(self.best, compiled=True, batch_size=size)

    def _chunked(self, best: Candidate) -> Iterator[Candidate]:
        """A CPU has its own loss. What memory it saves may let a larger micro-batch fit."""
        if self.config.tune.only == "chunked_loss" or best.chunked:
            yield replace(best, chunked=not best.chunked)
        if (size := self._too_large(best)) is not None:
            yield replace(best, batch_size=size, chunked=True)

    def _too_large(self, best: Candidate) -> int | None:
        """The smallest micro-batch above the best that did not fit."""
        sizes = [c.batch_size for c, trial in self.rows.items() if trial.problem == TOO_LARGE]
        return min((size for size in sizes if size > best.batch_size), default=None)

    def _checkpointed(self, best: Candidate) -> Iterator[Candidate]:
        """Recomputing is worth a try where it is said to cost nothing, and where it lets a larger micro-batch fit."""
        if best.compiled or self.config.tune.only == "activation_checkpointing":
            yield replace(best, checkpointing="selective")
        levels: tuple[Level, ...] = ("selective", "full")
        for level in levels if (size := self._too_large(best)) is not None else ():
            yield replace(best, batch_size=size, checkpointing=level)
        if best.checkpointing != "none":
            yield replace(best, checkpointing="none")
        if self.config.tune.only == "activation_checkpointing":
            yield replace(best, checkpointing="full")

    def _require_one(self) -> None:
        """What does not fit with any micro-batch may fit when blocks are computed again."""
        smallest = min(self.rows, key=lambda candidate: candidate.batch_size)
        for level in ("selective", "full"):
            if all(trial.problem for trial in self.rows.values()):
                self._try(replace(smallest, checkpointing=level))
        if all(trial.problem for trial in self.rows.values()):
            problems = sorted({trial.problem or "" for trial in self.rows.values()})
            if TOO_SLOW in problems:
                budget = 2 * self.config.tune.budget
                raise ConfigError(f"tune.budget: too short for a single candidate; type --budget {budget:g}")
            raise ConfigError(
                f"no candidate runs here ({'; '.join(problems)}); python -m accel_pretrain.plan says what it needs"
            )


def _double(sizes: list[int], at: int) -> int:
    """The next size of at least twice, as an index; ``at`` if there is none."""
    return next((i for i in range(at, len(sizes)) if sizes[i] >= 2 * sizes[at]), at)


def _half(sizes: list[int], at: int) -> int:
    return next((i for i in range(at, -1, -1) if 2 * sizes[i] <= sizes[at]), at)


def as_run(config: TunedRun, plan: Plan, candidate: Candidate) -> RunConfig:
    """The config that trains like this: a candidate's settings, and as many sequences per update as planned."""
    parts = {name: getattr(config, name) for name in RunConfig.__dataclass_fields__}
    micro_steps = plan.samples_per_step // plan.world_size // candidate.batch_size
    training = replace(
        config.training, batch_size=candidate.batch_size, compile=candidate.compiled,
        activation_checkpointing=candidate.checkpointing, chunked_loss=candidate.chunked,
        gradient_accumulation_steps=None if config.training.global_batch_size is not None else micro_steps,
    )  # fmt: skip
    return RunConfig(**{**parts, "training": training})
