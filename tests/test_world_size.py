"""A run that changes its number of processes on the way: the same samples in the same order, and the same losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from accel_pretrain.data import TokenBatches
from accel_pretrain.shards import open_split
from tests.running import REPO, TINY, environment, losses

GLOBAL, MICRO, PART = 8, 2, 4  # sequences per update, per micro-step and process; updates before the processes change
COMMON = [*TINY, "--global_batch_size", str(GLOBAL), "--batch_size", str(MICRO), "--schedule.name", "constant"]
COMMON += ["--warmup_iters", "2", "--dropout", "0.1", "--vocab_size", "200"]
RECORDING = """
import json, sys
from pathlib import Path
from accel_pretrain import train
from accel_pretrain.data import TokenBatches

read = TokenBatches.micro_batches

def record(self, first_sample):
    batches = read(self, first_sample)
    ids = [batch.ids_BS[:, :5].tolist() for batch in batches]
    with Path(RECORD + "." + str(self._share.min() // self._share.shape[1])).open("a") as file:
        file.write(json.dumps([first_sample, ids]) + "\\n")
    return batches

TokenBatches.micro_batches = record
sys.exit(train.main(sys.argv[1:]))
"""


def train(folder: Path, name: str, data: Path, processes: int, until: int) -> str:
    """Train to update ``until`` with so many processes, each of which writes down what it reads."""
    script = folder / "recording_train.py"
    script.write_text(f"RECORD = {str(folder / f'{name}.read')!r}\n{RECORDING}")
    words = [
        *COMMON,
        "--max_iters",
        str(until),
        "--train_data_path",
        str(data),
        "--val_data_path",
        str(data),
        "--checkpoint_dir",
        str(folder / name),
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *words],
        env=environment(),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Processes: {processes}" in done.stdout
    return done.stdout


def samples_read(folder: Path, name: str, data: Path, updates: int) -> list[int]:
    """The numbers of all samples that were read, in the order in which updates and micro-steps take them."""
    batches = TokenBatches(open_split(data, "train"), context_length=32, batch_size=1, seed=42)
    known = {tuple(row[:5]): number for number, row in enumerate(batches.samples(np.arange(updates * GLOBAL)).tolist())}
    assert len(known) == updates * GLOBAL
    updates_read: dict[int, dict[int, list[list[list[int]]]]] = {}
    for path in sorted(folder.glob(f"{name}.read.*")):
        for line in path.read_text().splitlines():
            first, ids = json.loads(line)
            updates_read.setdefault(first, {})[int(path.suffix[1:])] = ids
    order: list[int] = []
    for first in sorted(updates_read):
        ranks = [updates_read[first][rank] for rank in sorted(updates_read[first])]
        for micro_step in zip(*ranks, strict=True):
            order += [known[tuple(row)] for rank in micro_step for row in rank]
    return order


def change_on_the_way(folder: Path, data: Path, worlds: list[int]) -> None:
    updates = PART * len(worlds)
    train(folder, "whole", data, 1, updates)
    for part, processes in enumerate(worlds, start=1):
        shown = train(folder, "changing", data, processes, PART * part)
        assert part == 1 or f"Resuming from {folder / 'changing'}" in shown
    expected = list(range(updates * GLOBAL))
    assert samples_read(folder, "whole", data, updates) == expected
    assert samples_read(folder, "changing", data, updates) == expected
    assert len(losses(folder / "whole")) == updates
    np.testing.assert_allclose(losses(folder / "changing"), losses(folder / "whole"), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def distinct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows that can be told apart by their first tokens."""
    folder = tmp_path_factory.mktemp("distinct")
    draw = np.random.default_rng(0)
    for split, size in (("train", 20_000), ("val", 2000)):
        words = draw.integers(0, 200, 97)
        (words[draw.integers(0, 97, size)]).astype("<u2").tofile(folder / f"{split}.bin")
    return folder


@pytest.mark.slow
def test_one_two_one(distinct: Path, tmp_path: Path) -> None:
    change_on_the_way(tmp_path, distinct / "train.bin", [1, 2, 1])


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_one_two_four_one(distinct: Path, tmp_path: Path) -> None:
    change_on_the_way(tmp_path, distinct / "train.bin", [1, 2, 4, 1])


def test_control_the_order_of_two_swapped_processes_would_be_noticed(distinct: Path, tmp_path: Path) -> None:
    """And so would a sample that is read twice."""
    data = distinct / "train.bin"
    batches = TokenBatches(open_split(data, "train"), context_length=32, batch_size=1, seed=42)
    rows = batches.samples(np.arange(GLOBAL))[:, :5].tolist()
    for name, first, second in (("right", rows[:4], rows[4:]), ("swapped", rows[4:], rows[:4]), ("twice", rows[:4], rows[:4])):
        for rank, own in enumerate((first, second)):
            (tmp_path / f"{name}.read.{rank}").write_text(json.dumps([0, [own]]) + "\n")
    assert samples_read(tmp_path, "right", data, 1) == list(range(GLOBAL))
    assert samples_read(tmp_path, "swapped", data, 1) != list(range(GLOBAL))
    assert samples_read(tmp_path, "twice", data, 1) != list(range(GLOBAL))
