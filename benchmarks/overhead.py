"""What the loop costs beside the model: thread-CPU time per update of ``train_step`` against a bare PyTorch loop.

    python -m benchmarks.overhead

Both loops train copies of one tiny model on the CPU in float32, 4 micro-steps per update, on the same tokens. The bare loop
has forward, backward, clipping, a fused AdamW and nothing else, on a batch that is already in memory. Ours is
:func:`accel_pretrain.loop.train_step` as it is used in training, with the assembly of its batches, the learning rate, the check
for finite values and the stop signal. The two run in turns, one update each, on one thread; thread-CPU time does not count
what other processes do, but it does feel their use of the caches, so the figure is the difference of the 5th percentiles
(the quiet updates). A second bare loop in the same turns shows what the measurement itself is worth.

Then what reporting costs: a row of metrics to the terminal (here a file), to ``metrics.jsonl`` and from ``/proc``, as
:func:`accel_pretrain.loop.log_update` makes one every ``log_interval`` updates, against the update of this model; and that of
which it would be one percent.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from accel_pretrain.checkpoint import CheckpointConfig, TrainState
from accel_pretrain.config import RunConfig
from accel_pretrain.data import DataConfig
from accel_pretrain.loop import Update, log_update, train_step
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.optim import AdamW
from accel_pretrain.run import TrainingRun
from accel_pretrain.runtime import TrainingConfig, seed_everything
from benchmarks.runs import assembled

MICRO_STEPS, BATCH, CONTEXT, VOCAB = 4, 4, 32, 256
SHAPE = ModelConfig(vocab_size=VOCAB, context_length=CONTEXT, d_model=64, num_layers=2, num_heads=4, d_ff=128)


def our_run(folder: Path) -> TrainingRun:
    ids = np.random.default_rng(0).integers(0, VOCAB, 200_000).astype("<u2")
    ids.tofile(folder / "train.bin")
    config = RunConfig(
        data=DataConfig(train_data_path=folder / "train.bin", val_data_path=folder / "train.bin"),
        model=SHAPE,
        training=TrainingConfig(batch_size=BATCH, gradient_accumulation_steps=MICRO_STEPS, device="cpu", mixed_precision="no"),
        checkpoint=CheckpointConfig(checkpoint_dir=folder / "run"),
    )
    return assembled(config)[0]


def ours(run: TrainingRun) -> Callable[[], None]:
    state = TrainState()

    def update() -> None:
        if not run.stop.agreed():
            train_step(run, state)
            state.step += 1
            state.samples += run.plan.samples_per_step

    return update


def bare() -> Callable[[], None]:
    """Forward, backward, clip, step: the least that a loop can do."""
    seed_everything(42)
    model = Transformer(SHAPE, VOCAB)
    optimizer = AdamW().build(model)
    parameters = list(model.parameters())
    ids = torch.randint(0, VOCAB, (MICRO_STEPS, BATCH, CONTEXT + 1))

    def update() -> None:
        for micro_step in range(MICRO_STEPS):
            nats = model(ids[micro_step, :, :-1], ids[micro_step, :, 1:]).sum()
            (nats / (MICRO_STEPS * BATCH * CONTEXT)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def reporting(run: TrainingRun, rows: int) -> list[float]:
    """Microseconds of thread-CPU time of each of so many rows of metrics."""
    state, times = TrainState(), list[float]()
    value = torch.tensor(1.0)
    for _ in range(rows):
        state.step += run.config.logging.log_interval
        times.append(
            microseconds(
                lambda: log_update(run, state, Update(loss=value, grad_norm=value, lr=1e-3, samples=run.plan.samples_per_step))
            )
        )
    return times


def microseconds(update: Callable[[], None]) -> float:
    begin = time.thread_time_ns()
    update()
    return (time.thread_time_ns() - begin) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1500, help="updates of each loop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = our_run(Path(folder))
        loops = {"bare loop": bare(), "bare loop again": bare(), "our loop": ours(run)}
        times: dict[str, list[float]] = {name: [] for name in loops}
        for update in loops.values():
            for _ in range(50):
                update()
        for _ in range(arguments.updates):
            for name, update in loops.items():
                times[name].append(microseconds(update))
        with (Path(folder) / "log.txt").open("w") as file, contextlib.redirect_stdout(file):
            row = statistics.median(reporting(run, 500))
        interval = run.config.logging.log_interval
    quiet = {name: statistics.quantiles(values, n=20)[0] for name, values in times.items()}
    print(f"\nthread-CPU time per update, {MICRO_STEPS} micro-steps, {arguments.updates} updates each")
    for name, value in quiet.items():
        print(f"{name:<16} {value:8.0f} µs  {value - quiet['bare loop']:+6.0f} µs")
    share = row / interval / quiet["our loop"]
    print(f"a row of metrics {row:6.0f} µs, every {interval} updates: {row / interval:.2f} µs or {share:.3%} of an update")
    print(f"                 one percent of updates of {row / interval * 100:.0f} µs")


if __name__ == "__main__":
    main()
