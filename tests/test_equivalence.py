"""One curve, however it is computed: processes, accumulation and micro-batch do not change it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.running import TINY, Train, first_and_slow, losses, run_processes

COMMON = ("--max_iters", "20", "--global_batch_size", "16", "--checkpoint_interval", "1000")


@pytest.fixture(scope="module")
def reference(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """One process, micro-batches of 4, accumulated 4 times; with dropout."""
    run = tmp_path_factory.mktemp("reference")
    done = run_processes([*TINY, *COMMON, "--train_data_path", str(dataset), "--checkpoint_dir", str(run), "--dropout", "0.1"])
    assert done.returncode == 0, done.stderr
    return losses(run)


def test_two_processes_give_the_same_losses_even_with_dropout(dataset: Path, tmp_path: Path, reference: list[float]) -> None:
    arguments = [*TINY, *COMMON, "--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path), "--dropout", "0.1"]
    done = run_processes(arguments, processes=2)
    assert done.returncode == 0, done.stderr
    assert "Processes: 2" in done.stdout
    assert "4 sequences x 2 micro-steps x 2 processes" in done.stdout
    assert len(reference) == 20
    np.testing.assert_allclose(losses(tmp_path), reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", ["1", *first_and_slow(["8", "2", "16"])])
def test_the_micro_batch_does_not_change_the_losses(run_train: Train, tmp_path: Path, batch_size: str) -> None:
    for run, size in ((tmp_path / "4", "4"), (tmp_path / "other", batch_size)):
        assert run_train(run, *COMMON, "--batch_size", size) == 0
    np.testing.assert_allclose(losses(tmp_path / "other"), losses(tmp_path / "4"), atol=1e-6, rtol=0)


def test_control_another_seed_gives_other_losses(run_train: Train, tmp_path: Path, reference: list[float]) -> None:
    assert run_train(tmp_path, *COMMON, "--dropout", "0.1", "--seed", "43") == 0
    assert np.abs(np.subtract(losses(tmp_path), reference)).max() > 1e-3


def test_control_without_normalising_by_the_whole_update_it_differs(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the accumulation forgotten in the weight of a token: the kind of mistake that the tests above must catch."""
    from accel_pretrain import loop

    assert run_train(tmp_path / "right", *COMMON) == 0
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda run, state: (run.weights_B.fill_(2 / (16 * 32)), step(run, state))[1])
    assert run_train(tmp_path / "wrong", *COMMON, "--grad_clip", "null") == 0
    assert np.abs(np.subtract(losses(tmp_path / "wrong"), losses(tmp_path / "right"))).max() > 1e-6
