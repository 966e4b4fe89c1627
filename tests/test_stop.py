"""Ctrl+C and SIGTERM, as real signals to real processes: the update in progress is finished, saved, and nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from accel_pretrain.commit import problem_with
from tests.processes import (  # noqa: F401
    ENDLESS,
    arguments,
    command,
    leave_nothing_running,
    saved_step,
    start_training,
    status,
    until,
    updates,
)
from tests.running import Train, assert_same_bits, newest


@pytest.mark.parametrize(
    ("number", "launcher", "code"),
    [
        (signal.SIGINT, "python", 130),
        (signal.SIGINT, "accelerate", 130),
        (signal.SIGTERM, "torchrun 2", 143),
    ],
)
def test_a_signal_saves_the_last_update(dataset: Path, tmp_path: Path, number: int, launcher: str, code: int) -> None:
    """To the whole process group, as a terminal and a scheduler send it. Launchers have exit codes of their own."""
    process = start_training(command(launcher, arguments(dataset, tmp_path)), tmp_path)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    until(lambda: status(tmp_path)["state"] != "running", seconds=30)  # the launcher may be gone before the trainer has saved
    assert launcher != "python" or process.returncode == code, output
    assert problem_with(newest(tmp_path)) is None
    assert saved_step(tmp_path) == updates(tmp_path), output
    said = status(tmp_path)
    assert (said["state"], said["exit_code"], said["reason"]) == ("interrupted", code, signal.Signals(number).name)
    assert (said["step"], said["checkpoint"]) == (saved_step(tmp_path), newest(tmp_path).name)
    assert launcher != "torchrun 2" or "Processes: 2" in output


def test_interrupted_and_continued_is_the_uninterrupted_run(run_train: Train, dataset: Path, tmp_path: Path) -> None:
    process = start_training(command("python", arguments(dataset, tmp_path / "cut")), tmp_path / "cut")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Stopped after update" in output
    step = saved_step(tmp_path / "cut")
    for run, ends in (("whole", [step + 5]), ("cut", [step + 5])):
        for end in ends:
            assert run_train(tmp_path / run, *ENDLESS, "--max_iters", str(end)) == 0
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "cut"))


def test_a_second_signal_leaves_at_once_and_loses_nothing_published(dataset: Path, tmp_path: Path) -> None:
    """In an update that never ends, two after the last checkpoint."""
    words = arguments(dataset, tmp_path, "--checkpoint_interval", "3")
    process = start_training([sys.executable, "-m", "tests.sabotage", "hang", "0", "8", *words], tmp_path)
    until(lambda: updates(tmp_path) == 7, process)
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 2
    assert process.returncode == 143
    assert "Traceback" not in output
    assert status(tmp_path)["reason"] == "left at once, without saving"
    assert problem_with(newest(tmp_path)) is None
    assert saved_step(tmp_path) == 6
