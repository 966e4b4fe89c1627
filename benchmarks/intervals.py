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

import numpy as np

from accel_pretrain.checkpoint import CheckpointConfig, TrainState
from accel_pretrain.config import RunConfig, make_plan, open_splits
from accel_pretrain.data import DataConfig
from accel_pretrain.loop import Update, evaluate, log_update, save, train_step
from accel_pretrain.run import TrainingRun
from accel_pretrain.runtime import TrainingConfig, build_accelerator
from accel_pretrain.session import Session
from accel_pretrain.train import assemble


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
    config.checkpoint.checkpoint_dir.mkdir()
    splits = open_splits(config.data)
    accelerator = build_accelerator(config.training, [], folder / "run")
    return assemble(config, make_plan(config, splits, 1), splits, accelerator, Session())[0]


class Parts:
    """What a run does, piece by piece, timed."""

    def __init__(self, run: TrainingRun) -> None:
        self.run, self.state = run, TrainState()
        self.seconds: dict[str, list[float]] = {name: [] for name in ("update", "row", "evaluation", "save")}

    def turn(self, updates: int, log: Path) -> None:
        """Some updates, then one of all the rest."""
        state, done = self.state, list[Update]()

        def update() -> None:
            done.append(found) if (found := train_step(self.run, state)) else None
            state.step += 1
            state.samples += self.run.plan.samples_per_step

        for _ in range(updates):
            self._timed("update", update)
        with log.open("a") as file, contextlib.redirect_stdout(file):
            self._timed("row", lambda: log_update(self.run, state, done[-1]))
            self._timed("evaluation", lambda: evaluate(self.run, state, "eval"))
            self._timed("save", lambda: save(self.run, state, is_best=True))

    def _timed(self, name: str, call: Callable[[], object]) -> None:
        begin = time.perf_counter()
        call()
        self.seconds[name].append(time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4, help="in each round")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--d_model", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=50257)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = Parts(run_of(options, folder))
        for _ in range(2):
            train_step(parts.run, TrainState())  # warm
        for _ in range(options.rounds):
            parts.turn(options.updates, folder / "log.txt")
        config, plan = parts.run.config, parts.run.plan
    median = {name: statistics.median(values) for name, values in parts.seconds.items()}
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
