"""What a sweep may try, and what it tries next: every value of a grid, chance, or where good values were (TPE, by optuna).

What is tried next is a function of the parameters, a seed and the trials so far alone: a sweep that is started again goes on.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from accel_pretrain.errors import ConfigError

Method = Literal["grid", "random", "tpe"]
Told = Sequence[tuple[Mapping[str, str], float | None]]  # the values of each trial so far and its loss; None if it failed
_RANGE = re.compile(r"(?P<low>[^,]+?)\.\.(?P<high>[^,:]+)(?P<log>:log)?")


@dataclass(frozen=True)
class Choice:
    """One of several values, as they are typed."""

    values: tuple[str, ...]

    @property
    def samples(self) -> tuple[str, ...]:
        """What to check beforehand: all of them."""
        return self.values

    def draw(self, random: np.random.Generator) -> str:
        return self.values[int(random.integers(len(self.values)))]


@dataclass(frozen=True)
class Range:
    """A number between two, the ends included. ``whole``: no fraction; ``log``: each power of ten is as likely as the next."""

    low: float
    high: float
    log: bool
    whole: bool

    @property
    def samples(self) -> tuple[str, ...]:
        """What to check beforehand: both ends."""
        return self.text(self.low), self.text(self.high)

    def draw(self, random: np.random.Generator) -> str:
        low, high = (self.low, self.high + 1) if self.whole else (self.low, self.high)
        return self.text(math.exp(random.uniform(math.log(low), math.log(high))) if self.log else random.uniform(low, high))

    def text(self, value: float) -> str:
        """As it is typed: four digits, and inside the range all the same."""
        if self.whole:
            return str(int(min(max(math.floor(value), self.low), self.high)))
        return repr(min(max(float(f"{value:.4g}"), self.low), self.high))


Space = Mapping[str, Choice | Range]


def parse_parameter(word: str) -> tuple[str, Choice | Range]:
    """``lr=1e-4..1e-2:log``, ``layers=2..8`` or ``batch_size=8,16``: the key, and what it may be."""
    name, equals, text = word.partition("=")
    if not equals or not name or not text:
        raise ConfigError(f"--param {word}: is written key=value,value or key=low..high or key=low..high:log")
    found = _RANGE.fullmatch(text)
    if found is None:
        return name, Choice(tuple(dict.fromkeys(value.strip() for value in text.split(","))))
    try:
        low, high = float(found["low"]), float(found["high"])
    except ValueError:
        raise ConfigError(f"--param {word}: the ends of a range are numbers") from None
    log, whole = found["log"] is not None, all(re.fullmatch(r"[+-]?\d+", found[end]) for end in ("low", "high"))
    if not (low < high and math.isfinite(low) and math.isfinite(high) and (low > 0 or not log)):
        raise ConfigError(f"--param {word}: low must be below high{', and above 0 for :log' if log else ''}")
    return name, Range(low, high, log, whole)


def grid_size(space: Space) -> int | None:
    """How many combinations there are; None where a parameter is a range."""
    sizes = [len(own.values) if isinstance(own, Choice) else None for own in space.values()]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def propose(space: Space, method: Method, seed: int, told: Told) -> dict[str, str] | None:
    """The values of the next trial, after those in ``told``; None when a grid has no more."""
    if method == "grid":
        every = itertools.product(*(own.values for own in space.values() if isinstance(own, Choice)))
        values = next(itertools.islice(every, len(told), None), None)
        return None if values is None else dict(zip(space, values, strict=True))
    if method == "random":
        random = np.random.default_rng([seed, len(told)])
        return {name: own.draw(random) for name, own in space.items()}
    return _by_tpe(space, seed, told)


def _by_tpe(space: Space, seed: int, told: Told) -> dict[str, str]:
    """Tree-structured Parzen estimators (Bergstra et al., 2011), as optuna has them."""
    try:
        import optuna
    except ImportError:
        advice = "type: pip install 'accel_pretrain[sweep]', or --method random"
        raise ConfigError(f"sweep.method: tpe needs optuna, which is not installed; {advice}") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds: dict[str, Any] = {name: _distribution(optuna.distributions, own) for name, own in space.items()}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=(seed + len(told)) % 2**32, n_startup_trials=5))
    for values, loss in told:
        params = {name: values[name] if isinstance(own, Choice) else float(values[name]) for name, own in space.items()}
        params |= {name: int(values[name]) for name, own in space.items() if isinstance(own, Range) and own.whole}
        state = optuna.trial.TrialState.COMPLETE if loss is not None else optuna.trial.TrialState.FAIL
        study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, value=loss, state=state))
    found = study.ask(kinds).params
    return {name: found[name] if isinstance(own, Choice) else own.text(found[name]) for name, own in space.items()}


def _distribution(distributions: Any, own: Choice | Range) -> Any:
    if isinstance(own, Choice):
        return distributions.CategoricalDistribution(own.values)
    if own.whole:
        return distributions.IntDistribution(int(own.low), int(own.high), log=own.log)
    return distributions.FloatDistribution(own.low, own.high, log=own.log)
