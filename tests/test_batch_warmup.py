"""Updates that grow: the sizes follow from the position alone, no sample is read twice, and the loss is that of its tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_pretrain import loop, plan
from accel_pretrain.batch_warmup import BatchWarmup
from accel_pretrain.checkpoint import read_state
from accel_pretrain.data import TokenBatches
from accel_pretrain.shards import open_split
from tests.running import TINY, Train, assert_same_bits, losses, newest, rows, run_processes

T = 32
GROWING = ("--global_batch_size", "16", "--batch_warmup_tokens", str(60 * T), "--dropout", "0", "--checkpoint_interval", "5")
SIZES = [4, 4, 4, 4, 4, 8, 8, 8, 12, 12, 16, 16]  # 4 more after every 20 samples


def positions(warmup: BatchWarmup, updates: int) -> list[int]:
    found = [0]
    for _ in range(updates):
        found.append(found[-1] + warmup.size(found[-1]))
    return found


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    first=st.integers(1, 8),
    levels=st.integers(1, 9),
    over=st.integers(0, 500),
    updates=st.integers(0, 60),
    skip=st.integers(0, 9),
)
def test_counting_ahead_is_the_same_as_going(first: int, levels: int, over: int, updates: int, skip: int):
    warmup = BatchWarmup(first, first * levels, over)
    found = positions(warmup, updates + skip)
    sizes = np.diff(found)
    assert np.all(np.diff(sizes) >= 0)
    assert warmup.consumed_after(updates + skip) == found[-1]
    begin = found[skip]
    assert warmup.consumed_after(updates, begin) == found[-1]
    assert warmup.updates_until(found[-1], begin) == updates
    assert warmup.updates_until(found[-1] + 1, begin) == updates + 1
    if updates:
        assert warmup.updates_until(found[-1] - 0.5, begin) == updates
    assert set(sizes[np.array(found[:-1]) >= over]) <= {first * levels}


def test_sizes_grow_linearly_with_the_samples():
    assert np.diff(positions(BatchWarmup(4, 16, 60), 12)).tolist() == SIZES
    assert BatchWarmup(4, 16, 60).updates_until(60) == 10


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 2), (4, 1), (1, 2)])
def test_every_sample_is_read_once_whatever_the_cluster(dataset: Path, world_size: int, batch_size: int):
    warmup, split = BatchWarmup(4, 16, 60), open_split(dataset, "train")
    shape: dict[str, Any] = {
        "context_length": T,
        "batch_size": batch_size,
        "seed": 1,
        "accumulation": 16 // world_size // batch_size,
    }
    ranks = [TokenBatches(split, **shape, world_size=world_size, rank=rank, warmup=warmup) for rank in range(world_size)]
    begins, read = positions(warmup, 14), []
    for begin in begins[:-1]:
        share = [own.micro_batches(begin) for own in ranks]
        assert len({len(own) for own in share}) == 1
        read += [row for step in zip(*share, strict=True) for batch in step for row in batch.ids_BS]
    alone = TokenBatches(split, context_length=T, batch_size=1, seed=1).samples(np.arange(begins[-1]))
    assert np.array_equal(np.stack(read), alone)
    assert [ranks[0].numbers(begin).size for begin in begins[:-1]] == [size // world_size for size in (*SIZES, 16, 16)]


def sizes_of(run_dir: Path) -> list[int]:
    tokens = [0, *(row["tokens"] for row in rows(run_dir) if "train/loss" in row)]
    return (np.diff(tokens) // T).astype(int).tolist()


def test_a_run_reads_as_many_tokens_as_it_was_told(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(tmp_path, *GROWING, "--max_tokens", str(100 * T)) == 0
    state = read_state(newest(tmp_path))
    assert (state.step, state.samples, state.tokens) == (12, 100, 100 * T)
    assert sizes_of(tmp_path) == SIZES
    assert "Batch warm-up: from 4 sequences, over 60 of them" in capsys.readouterr().out


def test_a_restart_gives_the_same_bits(run_train: Train, tmp_path: Path) -> None:
    """In the middle of the growth; and without it, as a control, other losses."""
    assert run_train(tmp_path / "whole", *GROWING, "--max_iters", "10") == 0
    assert run_train(tmp_path / "parts", *GROWING, "--max_iters", "10") == 0
    (tmp_path / "parts" / "latest").write_text("checkpoint_00000005\n")
    again = ("--resume_from", str(tmp_path / "parts" / "checkpoint_00000005"))
    assert run_train(tmp_path / "parts", *GROWING, "--max_iters", "10", *again) == 0
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert run_train(tmp_path / "control", *GROWING, "--max_iters", "10", "--batch_warmup_tokens", "null") == 0
    assert losses(tmp_path / "control")[1:] != losses(tmp_path / "whole")[1:]


@pytest.mark.slow
def test_two_processes_go_on_with_the_curve_of_one(
    run_train: Train, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the first size was nobody's choice; micro-batches that cannot give it are refused."""
    assert run_train(tmp_path / "two", *GROWING, "--max_iters", "5") == 0
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert run_train(tmp_path / "one", *GROWING, "--max_iters", "12") == 0
    arguments = [
        *TINY,
        *GROWING,
        "--max_iters",
        "12",
        "--train_data_path",
        str(dataset),
        "--checkpoint_dir",
        str(tmp_path / "two"),
    ]
    capsys.readouterr()
    assert run_train(tmp_path / "two", *GROWING, "--max_iters", "12", "--batch_size", "8") == 2
    said = capsys.readouterr().err
    assert "training.batch_warmup_from: 4 sequences must be a multiple of batch_size 8 x 1 processes = 8" in said
    assert "--batch_size 4" in said
    done = run_processes([*arguments, "--batch_size", "2"], processes=2)
    assert done.returncode == 0, done.stderr
    assert "Processes: 2" in done.stdout
    assert sizes_of(tmp_path / "two") == sizes_of(tmp_path / "one") == SIZES
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5, rtol=0)


def test_the_gradient_is_that_of_the_mean_over_the_tokens_of_each_update(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five updates of 4 are those of a run whose updates all have 4; not so if a token weighed what it does in one of 16."""
    still = ("--schedule.name", "constant", "--warmup_iters", "0", "--max_iters", "5", "--grad_clip", "null")
    assert run_train(tmp_path / "growing", *GROWING, *still) == 0
    assert run_train(tmp_path / "small", *still, "--dropout", "0") == 0
    norms = [[row["train/grad_norm"] for row in rows(tmp_path / name) if "train/loss" in row] for name in ("growing", "small")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert losses(tmp_path / "growing") == pytest.approx(losses(tmp_path / "small"), rel=1e-5)
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda run, state: (run.weights_B.fill_(1 / (4 * 16 * T)), step(run, state))[1])
    assert run_train(tmp_path / "wrong", *GROWING, *still) == 0
    assert rows(tmp_path / "wrong")[0]["train/grad_norm"] == pytest.approx(norms[0][0] / 4, rel=1e-3)


def test_what_does_not_fit_is_refused(run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train(tmp_path, *GROWING, "--batch_warmup_from", "12") == 2
    assert "and a divisor of the 16 of a whole update; try --batch_warmup_from 4" in capsys.readouterr().err
    assert run_train(tmp_path, "--batch_warmup_from", "4") == 2
    assert "batch_warmup_from: 4 has no meaning without batch_warmup_tokens" in capsys.readouterr().err
    assert not list(tmp_path.glob("checkpoint_*"))


def test_the_plan_counts_the_smaller_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, *GROWING, "--max_iters", "12", "--vocab_size", "300", "--tokens_per_sec", "1600", "--json"]
    assert plan.main([*words, "--checkpoint_dir", str(tmp_path / "run")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"]["tokens"] == 100 * T
    assert found["time"]["hours"] == pytest.approx(100 * T / 1600 / 3600)
