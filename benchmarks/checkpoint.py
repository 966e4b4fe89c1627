"""What a checkpoint that survives anything costs: a published one against bare ``save_state``, and what training waits for.

    python -m benchmarks.checkpoint

A Transformer of 44 million parameters with the moments of AdamW, 528 MiB, is saved in turns by ``Accelerator.save_state`` alone
(not flushed: it is gone if the power fails), by ``save_state`` and a flush of its files, and by :func:`accel_pretrain.publish`
(flushed, hashed, sealed, renamed). Everything goes to one folder on one disk; medians of the rounds.

Then a training of it saves in the background: the stall is the time for which the loop waited in ``Saver.save`` and before the
next update's step, as a share of the time that the save took.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from accel_pretrain.checkpoint import CheckpointConfig, TrainState
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.optim import AdamW
from accel_pretrain.publish import publish
from accel_pretrain.saver import Saver

SHAPE = ModelConfig(vocab_size=16384, context_length=256, d_model=512, num_layers=9, num_heads=8, d_ff=1440)


def train(accelerator: Accelerator, model: Transformer, optimizer: torch.optim.Optimizer) -> float:
    """One update on a few tokens, up to its step; the seconds that it took."""
    begin = time.perf_counter()
    ids_BT = torch.randint(0, 16384, (8, 257))
    accelerator.backward(model(ids_BT[:, :-1], ids_BT[:, 1:]).mean())
    return time.perf_counter() - begin


def flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def compare(accelerator: Accelerator, run_dir: Path, rounds: int) -> None:
    bare = run_dir / "bare"

    def save_state() -> None:
        accelerator.save_state(str(bare))

    def save_state_and_flush() -> None:
        accelerator.save_state(str(bare))
        flush(bare)

    def published() -> None:
        state = TrainState(step=1)
        publish(accelerator, run_dir, state, facts={}, write_extras=lambda folder: None, keep_last=1)

    ways: dict[str, Callable[[], None]] = {
        "save_state": save_state,
        "save_state, flushed": save_state_and_flush,
        "published": published,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, save in ways.items():
            shutil.rmtree(bare, ignore_errors=True)
            shutil.rmtree(run_dir / "checkpoint_00000001", ignore_errors=True)
            os.sync()  # nobody pays for the bytes of another
            begin = time.perf_counter()
            save()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    size = sum(path.stat().st_size for path in (run_dir / "checkpoint_00000001").iterdir()) / 2**20
    print(f"\n{size:.0f} MiB, median of {rounds} rounds in turns (fastest, slowest)")
    for name, value in medians.items():
        worst, best = max(seconds[name]), min(seconds[name])
        print(f"{name:<22}{value:7.3f} s ({best:.3f}, {worst:.3f})  {value / medians['save_state']:6.2f} x save_state")


def stall(accelerator: Accelerator, model: Transformer, optimizer: torch.optim.Optimizer, run_dir: Path, rounds: int) -> None:
    state = TrainState()
    saver = Saver(accelerator, run_dir, CheckpointConfig(checkpoint_dir=run_dir, asynchronous=True, keep_last=1), state)
    waited, took, shares, quiet, beside = 0.0, 0.0, [], [], []
    for number in range(rounds + 1):
        quiet.append(train(accelerator, model, optimizer))
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        begin = time.perf_counter()
        saver.save(state, facts={}, write_extras=lambda folder: None)
        waited = time.perf_counter() - begin
        beside.append(train(accelerator, model, optimizer))
        before = time.perf_counter()
        saver.wait_until_copied()
        waited += time.perf_counter() - before
        optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        saver.wait(state)
        took = time.perf_counter() - begin
        if number:
            shares.append(waited / took)
            print(f"in the background: {took:.2f} s, of which training waited {waited * 1000:.1f} ms = {waited / took:.2%}")
    if shares:
        print(
            f"median of the stall {statistics.median(shares):.2%} of the save; an update's gradients take "
            f"{statistics.median(quiet):.2f} s, beside a save {statistics.median(beside):.2f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of every way to save")
    parser.add_argument("--folder", type=Path, default=None, help="where to save; default: the system's temporary folder")
    arguments = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    module = Transformer(SHAPE, 16384)
    model, optimizer = accelerator.prepare(module, AdamW().build(module))
    train(accelerator, model, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    print(f"{module.num_parameters() / 1e6:.1f}M parameters, {torch.get_num_threads()} threads of torch")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        compare(accelerator, Path(folder), arguments.rounds)
        stall(accelerator, model, optimizer, Path(folder) / "run", arguments.rounds)


if __name__ == "__main__":
    main()
