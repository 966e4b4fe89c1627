"""Assembling batches: ours against nanoGPT's ``get_batch``, re-written here from its description, on the same file.

    python -m benchmarks.loader

B = 64 windows of T = 1024 from a uint16 file of 200 million ids that is in the page cache. Theirs maps the file anew for every
batch, slices B windows twice (inputs, targets) and stacks int64 tensors. Ours is the order of a seeded shuffle plus one gather.
The two run in turns of 50 batches; the figures are medians of the time per batch, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from accel_pretrain.data import TokenBatches
from accel_pretrain.shards import open_split

B, T = 64, 1024


def random_windows(path: Path) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        ids = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(ids) - T, (B,))
        inputs = torch.stack([torch.from_numpy(ids[start : start + T].astype(np.int64)) for start in starts])
        targets = torch.stack([torch.from_numpy(ids[start + 1 : start + 1 + T].astype(np.int64)) for start in starts])
        return inputs, targets

    return get_batch


def ours(path: Path) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    batches = TokenBatches(open_split(path, "train"), context_length=T, batch_size=B, seed=0)
    position = 0

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal position
        batch = batches.micro_batches(position)[0]
        position += B
        return batch.inputs_BT, batch.targets_BT

    return next_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        np.random.default_rng(0).integers(0, 50257, arguments.tokens, dtype=np.uint16).tofile(path)
        loaders = {"nanoGPT's get_batch": random_windows(path), "ours": ours(path)}
        times: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(arguments.rounds):
            for name, load in loaders.items():
                inputs, targets = load()
                assert inputs.shape == targets.shape == (B, T)
                assert torch.equal(inputs[:, 1:], targets[:, :-1])
                for _ in range(50):
                    begin = time.perf_counter()
                    inputs, targets = load()
                    times[name].append((time.perf_counter() - begin) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:<20} {value:7.3f} ms per batch, {B * T / value / 1000:8.0f} Mtok/s")
    theirs, own = medians.values()
    print(f"ratio                {theirs / own:7.1f}x")


if __name__ == "__main__":
    main()
