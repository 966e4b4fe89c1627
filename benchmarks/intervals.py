"""What a run does beside its updates: evaluations, checkpoints and rows of metrics at the default intervals, by the clock.

    python -m benchmarks.intervals
    python -m benchmarks.intervals --batch_size 16 --d_model 256 --vocab_size 8192

A real run of the default shape and batch on random tokens. Updates, a row of metrics, an evaluation and a save are timed in
turns, ``--rounds`` times; the share of each is its median, divided by that of so many updates as its interval has. Every
evaluation is taken to find the best loss so far, which is saved: so it is in the first part of a run, where it costs most.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from accel_pretrain.checkpoint import CheckpointConfig, TrainState
from accel_pretrain.config import RunConfig
from accel_pretrain.data import DataConfig
from accel_pretrain.loop import evaluate, log_update, save, train_step
from accel_pretrain.run import TrainingRun
from accel_pretrain.runtime import TrainingConfig
from benchmarks.runs import assembled

T = TypeVar("T")


def run_of(options: argparse.Namespace, folder: Path) -> TrainingRun:
    """A run with the defaults in all that has to do with intervals."""
    draw = np.random.default_rng(0)
    for name, tokens in (("train", 2_000_000), ("val", 1_000_000)):
        draw.integers(0, options.vocab_size, tokens).astype("<u2").tofile(folder / f"{name}.bin")
    own = RunConfig()
    config = replace(
        own,
        data=DataConfig(train_data_path=folder / "train.bin", val_data_path=folder / "val.bin"),
        model=replace(own.model, d_model=options.d_model, vocab_size=options.vocab_size, d_ff=None),
        training=TrainingConfig(batch_size=options.batch_size, compile=False),
        checkpoint=CheckpointConfig(checkpoint_dir=folder / "run"),
    )
    return assembled(config)[0]


def timed(run: TrainingRun, rounds: int, updates: int) -> dict[str, list[float]]:
    """Seconds of what a run does, piece by piece: in each round some updates, then one of all the rest."""
    seconds: dict[str, list[float]] = {name: [] for name in ("update", "row", "evaluation", "save")}
    state = TrainState()

    def clocked(name: str, call: Callable[..., T], *words: object, **more: object) -> T:
        begin = time.perf_counter()
        found = call(*words, **more)
        seconds[name].append(time.perf_counter() - begin)
        return found

    for _ in range(2):
        train_step(run, TrainState())  # warm
    for _ in range(rounds):
        update = None
        for _ in range(updates):
            update = clocked("update", train_step, run, state)
            assert update is not None
            state.step, state.samples = state.step + 1, state.samples + update.samples
        with (run.config.checkpoint.checkpoint_dir.parent / "log.txt").open("a") as file, contextlib.redirect_stdout(file):
            clocked("row", log_update, run, state, update)
            clocked("evaluation", evaluate, run, state, "eval")
            clocked("save", save, run, state, is_best=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4, help="in each round")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--d_model", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=50257)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run = run_of(options, Path(name))
        median = {part: statistics.median(found) for part, found in timed(run, options.rounds, options.updates).items()}
    config, plan = run.config, run.plan
    evaluations = config.evaluation.eval_interval
    intervals = {"row": config.logging.log_interval, "evaluation": evaluations, "save": evaluations}
    print(f"{plan.parameters:,} parameters, {plan.tokens_per_step:,} tokens per update")
    print(f"{'update':<12}{median['update']:9.3f} s")
    shares = {name: median[name] / (interval * median["update"]) for name, interval in intervals.items()}
    for name, interval in intervals.items():
        print(f"{name:<12}{median[name]:9.3f} s, every {interval:>5,} updates: {shares[name]:.2%} of their time")
    print(f"{'together':<12}{sum(shares.values()):40.2%}")


if __name__ == "__main__":
    main()
