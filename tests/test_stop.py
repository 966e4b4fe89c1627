"""Ctrl+C and SIGTERM, as real signals to real processes: the update in progress is finished, saved, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from accel_pretrain.checkpoint import problem_with
from tests.running import REPO, TINY, Train, assert_same_bits, environment, launch, losses, newest

ENDLESS = (
    "--max_iters",
    "100000",
    "--checkpoint_interval",
    "100000",
    "--schedule.name",
    "constant",
    "--warmup_iters",
    "1",
    "--dropout",
    "0.1",
)
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(REPO / "accelerate_config.yaml"), "-m"]


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _leave_nothing_running() -> Iterator[None]:
    yield
    while STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop().pid, signal.SIGKILL)


def start(command: list[str], run_dir: Path) -> subprocess.Popen[str]:
    """Start a run in its own process group, and wait until it is training."""
    process = subprocess.Popen(
        command,
        env=environment(),
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    STARTED.append(process)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) >= 3:
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"it did not begin to train:\n{process.communicate()[0]}")


@pytest.mark.parametrize(
    ("number", "launcher", "code"),
    [
        (signal.SIGINT, "python", 130),
        (signal.SIGTERM, "python", 143),
        (signal.SIGINT, "accelerate", None),
        (signal.SIGTERM, "torchrun", None),
    ],
)
def test_a_signal_saves_the_last_update(dataset: Path, tmp_path: Path, number: int, launcher: str, code: int | None) -> None:
    arguments = [*TINY, *ENDLESS, "--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path)]
    commands = {
        "python": launch(arguments),
        "accelerate": [*ACCELERATE, "accel_pretrain.train", *arguments],
        "torchrun": launch(arguments, processes=2),
    }
    process = start(commands[launcher], tmp_path)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    wait_for_orphans(tmp_path)
    assert code is None or process.returncode == code, output
    assert problem_with(newest(tmp_path)) is None
    saved = json.loads((newest(tmp_path) / "trainer_state.json").read_text())["step"]
    assert saved == len(losses(tmp_path)), output
    assert launcher != "torchrun" or "Processes: 2" in output


def wait_for_orphans(run_dir: Path) -> None:
    """The launcher may be gone before the trainer has saved."""
    deadline = time.monotonic() + 30
    while not (run_dir / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_interrupted_and_continued_is_the_uninterrupted_run(run_train: Train, dataset: Path, tmp_path: Path) -> None:
    arguments = [*TINY, *ENDLESS, "--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path / "cut")]
    process = start(launch(arguments), tmp_path / "cut")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Stopped after update" in output
    step = json.loads((newest(tmp_path / "cut") / "trainer_state.json").read_text())["step"]
    for run, ends in (("whole", [step + 5]), ("cut", [step + 5])):
        for end in ends:
            assert run_train(tmp_path / run, *ENDLESS, "--max_iters", str(end)) == 0
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "cut"))


def test_a_second_interrupt_leaves_at_once_and_loses_nothing_published(dataset: Path, tmp_path: Path) -> None:
    arguments = [*TINY, *ENDLESS, "--checkpoint_interval", "5", "--train_data_path", str(dataset)]
    arguments += ["--checkpoint_dir", str(tmp_path), "--batch_size", "500", "--gradient_accumulation_steps", "200"]  # slow
    process = subprocess.Popen(launch(arguments), env=environment(), cwd=REPO, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
