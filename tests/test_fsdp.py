"""Sharded training: the curve, the bits of checkpoints and the manners of a run do not depend on who holds what."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy

from accel_pretrain.checkpoint import load_model, read_state
from accel_pretrain.errors import ConfigError
from accel_pretrain.parallel import ParallelConfig
from accel_pretrain.runtime import TrainingConfig, _sharding, describe_runtime
from tests.processes import leave_nothing_running, saved_step, start, status, until, updates  # noqa: F401
from tests.running import (
    REPO,
    TINY,
    Train,
    environment,
    launch,
    losses,
    newest,
    refused,
    rows,
    run_processes,
    weights_and_moments,
)
from tests.test_guard import poisoned  # noqa: F401

WAYS = [(processes, strategy) for processes in (1, 2, 4) for strategy in ("ddp", "fsdp2")]


def words(dataset: Path, run_dir: Path, processes: int, strategy: str, *more: str) -> list[str]:
    """A run whose updates are of 8 sequences, however many processes make them."""
    paths = ["--train_data_path", str(dataset), "--checkpoint_dir", str(run_dir), "--strategy", strategy]
    plan = ["--global_batch_size", "8", "--schedule.name", "constant", "--warmup_iters", "2", "--save_best", "false"]
    return [*TINY, *paths, *plan, "--batch_size", str(min(4, 8 // processes)), *more]


def train(dataset: Path, run_dir: Path, processes: int, strategy: str, *more: str) -> str:
    done = run_processes(words(dataset, run_dir, processes, strategy, *more), processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Processes: {processes}" in done.stdout
    assert (f"Sharded: {strategy} (from the config)" in done.stdout) == (processes > 1 and strategy != "ddp")
    return done.stdout


def reference(run_train: Train, dataset: Path, run_dir: Path, *more: str) -> list[float]:
    """The losses of a process alone."""
    assert run_train(run_dir, *words(dataset, run_dir, 1, "ddp", *more)[len(TINY) :]) == 0
    return losses(run_dir)


@pytest.mark.slow
def test_every_process_holds_its_share() -> None:
    """Weights, memory, gradients, norms, the guard, and what is saved: see :mod:`tests.shares`."""
    done = subprocess.run(
        launch(["fsdp2"], 4, "tests.shares"), env=environment(), cwd=REPO, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" of 4: ") == 6


def test_stopped_and_resumed_by_others(run_train: Train, dataset: Path, tmp_path: Path) -> None:
    """fsdp2 of 2 processes as a config file asks for it; stopped; zero2 of 2, saving beside; a process alone: one curve."""
    run_dir = tmp_path / "run"
    often = ("--eval_interval", "4", "--sample_interval", "5", "--sample_tokens", "8")
    asked = ["--config_file", "configs/accelerate/fsdp2.yaml", "--num_processes", "2", "-m", "accel_pretrain.train"]
    run = words(dataset, run_dir, 2, "null", *often, "--max_iters", "100000")
    process = start([sys.executable, "-m", "accelerate.commands.launch", *asked, *run], tmp_path / "log")
    until(lambda: updates(run_dir) >= 6, process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    stopped = saved_step(run_dir)
    assert updates(run_dir) == stopped == status(run_dir)["step"] >= 6
    assert status(run_dir)["state"] == "interrupted"
    assert (
        "Processes: 2 | Precision: fp32 (from the config) | Sharded: fsdp2 (from the launcher)"
        in (tmp_path / "log").read_text()
    )
    assert json.loads((run_dir / "samples.jsonl").read_text().splitlines()[0])["step"] == 5
    background = ("--asynchronous", "true", "--checkpoint_interval", "2", "--batch_size", "2")
    told = train(dataset, run_dir, 2, "zero2", "--max_iters", str(stopped + 5), *background)
    assert f"Resuming from {run_dir / f'checkpoint_{stopped:08d}'}" in told
    last = ("--max_iters", str(stopped + 8))
    assert run_train(run_dir, *words(dataset, run_dir, 1, "ddp", *last)[len(TINY) :]) == 0
    curve = reference(run_train, dataset, tmp_path / "alone", *last, "--eval_interval", "4")
    np.testing.assert_allclose(losses(run_dir), curve, rtol=1e-5)
    ours, theirs = (
        {row["step"]: row["eval/val_loss"] for row in rows(path) if "eval/val_loss" in row and row["step"] <= stopped}
        for path in (run_dir, tmp_path / "alone")
    )
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert 4 in ours
    ours, theirs = weights_and_moments(newest(run_dir)), weights_and_moments(newest(tmp_path / "alone"))
    assert {name: (own.shape, own.dtype) for name, own in ours.items()} == {
        name: (own.shape, own.dtype) for name, own in theirs.items()
    }
    assert load_model(run_dir).num_parameters() > 0


@pytest.mark.slow
def test_compiled_blocks(run_train: Train, dataset: Path, tmp_path: Path) -> None:
    """Blocks that are compiled in place, inside what gathers their weights."""
    curve = reference(run_train, dataset, tmp_path / "alone", "--max_iters", "6")
    for strategy in ("zero2", "fsdp2"):
        told = train(dataset, tmp_path / strategy, 2, strategy, "--max_iters", "6", "--compile", "true", "--batch_size", "2")
        assert "compiles the model's blocks" in told
        np.testing.assert_allclose(losses(tmp_path / strategy), curve, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_36_pairs_of_writers_and_readers(run_train: Train, dataset: Path, tmp_path: Path) -> None:
    """A checkpoint of {1, 2, 4} processes x {ddp, fsdp2} goes on with every other, on the curve; a wrong seed does not."""
    curve = reference(run_train, dataset, tmp_path / "alone", "--max_iters", "12")
    other = reference(run_train, dataset, tmp_path / "other", "--max_iters", "12", "--seed", "43")
    worst = 0.0
    for way in WAYS:
        train(dataset, tmp_path / str(way), *way, "--max_iters", "6")
    for writer, reader in itertools.product(WAYS, WAYS):
        run_dir = tmp_path / "run"
        shutil.copytree(tmp_path / str(writer), run_dir)
        assert "checkpoint_00000006" in train(dataset, run_dir, *reader, "--max_iters", "12")
        far = np.abs(np.array(losses(run_dir)) / np.array(curve) - 1).max()
        assert far < 1e-5, (writer, reader, far)
        worst = max(worst, float(far))
        shutil.rmtree(run_dir)
    print(f"36 pairs: {worst:.1e} from the curve of a process alone")
    assert np.abs(np.array(other) / np.array(curve) - 1).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_curve_does_not_depend_on_who_holds_what(
    run_train: Train, dataset: Path, tmp_path: Path, processes: int, strategy: str, micro_batch: int
) -> None:
    curve = reference(run_train, dataset, tmp_path / "alone", "--max_iters", "50")
    train(dataset, tmp_path / "run", processes, strategy, "--max_iters", "50", "--batch_size", str(micro_batch))
    np.testing.assert_allclose(losses(tmp_path / "run"), curve, rtol=1e-6 if strategy == "ddp" else 1e-5)


@pytest.mark.slow
def test_a_sharded_run_rolls_back(run_train: Train, tmp_path: Path, poisoned: tuple[str, ...]) -> None:  # noqa: F811
    common = [*poisoned, "--on_spike", "rollback", "--rollback_updates", "10", "--global_batch_size", "4", "--batch_size", "2"]
    common += ["--sample_interval", "119", "--eval_interval", "119"]  # which leave weights whole that the rollback changes
    assert run_train(tmp_path / "one", *common) == 0
    done = run_processes([*TINY, *common, "--strategy", "fsdp2", "--checkpoint_dir", str(tmp_path / "two")], processes=2)
    assert done.returncode == 0, done.stderr
    assert "Rolled back to checkpoint_00000119" in done.stdout
    assert read_state(newest(tmp_path / "two")).health.rollbacks == 1
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_is_refused(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from accel_pretrain.train import main

    said = refused(main, capsys, *words(dataset, tmp_path / "run", 1, "ddp", "--cpu_offload", "true"))
    assert said == "error: parallel.cpu_offload: needs --strategy fsdp2 or zero2, and more than one process\n"


def test_what_is_sharded_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")  # put back at the end
    training, halved = TrainingConfig(), TrainingConfig(gradient_compression="bf16")
    for strategy, resharded in (("zero2", False), ("fsdp2", True)):
        plugin = _sharding(ParallelConfig(strategy=strategy), training, "bf16", 2, cpu=True)  # type: ignore[arg-type]
        assert plugin is not None
        assert plugin.reshard_after_forward is resharded
        assert plugin.mixed_precision_policy.reduce_dtype == torch.float32  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match=f"{strategy} knows no fp16; type --mixed_precision bf16"):
            _sharding(ParallelConfig(strategy=strategy), training, "fp16", 2, cpu=False)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"{strategy} exchanges gradients in float32"):
            _sharding(ParallelConfig(strategy=strategy), halved, "bf16", 2, cpu=False)  # type: ignore[arg-type]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    for said, offloads in (("false", False), ("true", True)):
        monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", said)
        asked = _sharding(ParallelConfig(), training, "no", 2, cpu=False)
        assert asked is not None
        assert isinstance(asked.cpu_offload, CPUOffloadPolicy) is offloads
    assert _sharding(ParallelConfig(strategy="ddp"), training, "no", 2, cpu=True) is None  # the config has the last word
    assert "ACCELERATE_USE_FSDP" not in os.environ


def test_a_launcher_that_asks_for_the_old_fsdp_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accel_pretrain.train import main

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    asked = words(dataset, tmp_path / "run", 1, "null")
    assert "version 1 of FSDP; type --fsdp_version 2" in refused(main, capsys, *asked)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert main([*asked, "--max_iters", "1"]) == 0  # a process alone holds everything
    said = capsys.readouterr().out
    assert "Sharded" not in said
    assert " | Not sharded: fsdp2 needs more than one process\n" in said


def test_recomputing_that_the_launcher_asks_for_is_not_left_out_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_ACTIVATION_CHECKPOINTING"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    with pytest.raises(ConfigError, match=r"fsdp_activation_checkpointing, .*; set it to false, or type --activation_check"):
        _sharding(ParallelConfig(), TrainingConfig(), "no", 2, cpu=True)
    assert _sharding(ParallelConfig(), TrainingConfig(activation_checkpointing="selective"), "no", 2, cpu=True) is not None


def test_host_memory_for_shares_that_are_there_already_is_told() -> None:
    sharded: Any = SimpleNamespace(
        is_fsdp2=True, num_processes=2, device=torch.device("cpu"),
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(reshard_after_forward=True)),
    )  # fmt: skip
    told = "\nNotice: parallel.cpu_offload has no effect on a CPU"
    assert told in describe_runtime(sharded, TrainingConfig(), ParallelConfig(strategy="fsdp2", cpu_offload=True))
    assert told not in describe_runtime(sharded, TrainingConfig(), ParallelConfig(strategy="fsdp2"))
