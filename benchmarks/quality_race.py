"""Recipes that train in turns: each arm in a process of its own, every arm with a clock that counts only its own training.

An arm is a run as :mod:`accel_pretrain.train` puts it together, driven by its ``train_step``. All are resident. A race goes by
rounds: in each, every arm does the same part of its updates and is then validated, so that a slow minute of the machine is slow
for all, in proportion. Learning rates need to know the end of a run, so the speed of each arm is measured first.
"""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel_pretrain.config import RunConfig

Settings = Mapping[str, Any]  # of the trainer, by dotted key; the values as they stand in YAML
PROBES = 3  # turns in which the speed is measured; the first warms up


@dataclass(frozen=True)
class Arm:
    """A recipe, and for how long it trains: ``share`` of the race's time, or of its updates."""

    name: str
    settings: Settings
    share: float = 1.0

    def but(self, name: str, settings: Settings) -> Arm:
        """The same with other settings. A name of an optimizer or a schedule comes with all keys of its section."""
        replaced = [key.partition(".")[0] for key in settings if key.endswith(".name")]
        kept = {key: value for key, value in self.settings.items() if key.partition(".")[0] not in replaced}
        return replace(self, name=name, settings=kept | dict(settings))


@dataclass(frozen=True)
class Point:
    """Where an arm stands: updates, tokens and operations so far, seconds of training, nats per token of held-out text."""

    step: int
    tokens: int
    flops: float
    seconds: float
    loss: float


@dataclass(frozen=True)
class Machine:
    """How the arms run: threads of each; ``cpu_time`` counts the processor's time, for one thread on a machine that is busy."""

    threads: int = 2
    cpu_time: bool = False
    precision: str = "bf16"

    def __post_init__(self) -> None:
        assert self.threads == 1 or not self.cpu_time, "threads that wait for each other use processor time"


def words_of(settings: Settings) -> list[str]:
    """The settings as words of the trainer's command line."""
    as_yaml = {None: "null", True: "true", False: "false"}
    return [
        f"--{key}={as_yaml[value] if value is None or isinstance(value, bool) else value}" for key, value in settings.items()
    ]


def config_of(settings: Settings) -> RunConfig:
    """The settings as the trainer resolves them."""
    from accel_pretrain.config import RunConfig
    from accel_pretrain.typed_yaml import load, parse_command_line

    return load(RunConfig, None, parse_command_line(RunConfig, words_of(settings)).overrides)


def member(pipe: Connection, settings: Settings, machine: Machine) -> None:
    """One arm: answers updates to reach with its :class:`Point`, and seconds with how many updates fit in; None ends it."""
    os.environ |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": str(machine.threads)}
    from accel_pretrain.loop import _validate, train_step
    from benchmarks.runs import assembled

    clock = time.process_time if machine.cpu_time else time.perf_counter
    config = config_of(settings)
    with contextlib.redirect_stdout(io.StringIO()):
        run, state = assembled(config)
    plan, seconds = run.plan, 0.0
    flops = plan.flops_per_token * plan.tokens_per_step
    pipe.send("ready")
    while (wanted := pipe.recv()) is not None:
        begin, first = clock(), state.step
        end = wanted if isinstance(wanted, int) else math.inf
        while state.step < end and (isinstance(wanted, int) or clock() - begin < wanted):
            train_step(run, state)
            state.step += 1
            state.samples += plan.samples_per_step
        run.guard.settle(state.health)
        spent = clock() - begin
        if not isinstance(wanted, int):
            pipe.send((state.step - first, spent))
            continue
        seconds += spent
        loss = _validate(run, "val").loss
        pipe.send(Point(state.step, state.step * plan.tokens_per_step, state.step * float(flops), seconds, loss))
    run.log.close()


def operations(arm: Arm, data: Settings) -> float:
    """FLOPs of one update, forward and backward. Those of the optimizer are not counted."""
    from accel_pretrain.config import make_plan, open_splits

    config = config_of({**arm.settings, **data})
    plan = make_plan(config, open_splits(config.data), 1)
    return float(plan.flops_per_token * plan.tokens_per_step)


class Resident:
    """An arm in its process, waiting for what to do."""

    def __init__(self, arm: Arm, data: Settings, folder: Path, max_iters: int, seed: int, machine: Machine) -> None:
        context = multiprocessing.get_context("spawn")
        run_dir = Path(tempfile.mkdtemp(dir=folder))
        settings = {
            "training.device": "cpu", "training.compile": False, "training.mixed_precision": machine.precision,
            **arm.settings, **data, "training.cpu_threads": machine.threads, "training.seed": seed,
            "training.max_iters": max_iters, "evaluation.eval_iters": None, "checkpoint.checkpoint_dir": run_dir,
        }  # fmt: skip
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=member, args=(theirs, settings, machine), daemon=True)
        self.process.start()
        theirs.close()
        self.name = arm.name

    def answer(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.name}: its process has ended; see above") from None

    def do(self, what: int | float) -> Any:
        self.pipe.send(what)
        return self.answer()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join(30)


def resident(
    arms: Sequence[Arm], updates: Mapping[str, int], data: Settings, folder: Path, seed: int, machine: Machine
) -> list[Resident]:
    """All arms, each ready in its process."""
    found = [Resident(arm, data, folder, updates[arm.name], seed, machine) for arm in arms]
    for each in found:
        each.answer()
    return found


def speeds(arms: Sequence[Arm], data: Settings, folder: Path, seconds: float, machine: Machine) -> dict[str, float]:
    """Updates per second of each arm, measured in turns."""
    residents = resident(arms, dict.fromkeys((arm.name for arm in arms), 1_000_000), data, folder, 0, machine)
    done: dict[str, list[tuple[int, float]]] = {each.name: [] for each in residents}
    for _ in range(PROBES):
        for each in residents:
            done[each.name].append(each.do(float(seconds / PROBES)))
    for each in residents:
        each.close()
    return {name: sum(n for n, _ in rows[1:]) / sum(spent for _, spent in rows[1:]) for name, rows in done.items()}


def race(
    arms: Sequence[Arm], updates: Mapping[str, int], data: Settings, folder: Path, seed: int, rounds: int, machine: Machine
) -> dict[str, list[Point]]:
    """Train all arms in turns, each for its ``updates``; what held-out text costs, round by round."""
    residents = resident(arms, updates, data, folder, seed, machine)
    curves: dict[str, list[Point]] = {arm.name: [] for arm in arms}
    for turn in range(1, rounds + 1):
        for each in residents if turn % 2 else reversed(residents):
            reach = math.ceil(updates[each.name] * turn / rounds)
            curves[each.name].append(each.do(reach))
        losses = (f"{name} {curve[-1].loss:.3f}" for name, curve in curves.items())
        print(f"    {turn}/{rounds}: " + ", ".join(losses), file=sys.stderr, flush=True)
    for each in residents:
        each.close()
    return curves


def planned(arms: Sequence[Arm], speed: Mapping[str, float], seconds: float) -> dict[str, int]:
    """Updates of each arm in its share of the time, at ``speed`` updates per second."""
    return {arm.name: max(2, round(speed[arm.name] * seconds * arm.share)) for arm in arms}


# -------------------------------------------------------------------------------------------------------- what came of it


def best(curve: Sequence[Point]) -> Point:
    """Where the loss is lowest: a baseline that overfits is not asked for its end. What is not finite does not count."""
    return min(curve, key=lambda point: point.loss if math.isfinite(point.loss) else math.inf)


def reached(curve: Sequence[Point], loss: float, what: str) -> float | None:
    """Seconds, tokens or flops (``what``) at which the curve first comes down to ``loss``: by straight lines."""
    for before, after in zip([None, *curve], curve, strict=False):
        if after.loss <= loss:
            if before is None:
                return getattr(after, what)
            part = (before.loss - loss) / (before.loss - after.loss) if math.isfinite(before.loss) else 1.0
            return getattr(before, what) + part * (getattr(after, what) - getattr(before, what))
    return None


def mean_se(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error (NaN of a single value)."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def ratios(curves: Sequence[Mapping[str, list[Point]]], arm: str, baseline: str, what: str) -> list[float | None]:
    """For every seed: what the arm needs for the best loss of the baseline, as a part of what that needed; None: not reached"""
    found = []
    for seed in curves:
        target = best(seed[baseline])
        own = reached(seed[arm], target.loss, what)
        found.append(None if own is None else own / getattr(target, what))
    return found
