"""A run that hangs says where, and ends; one that is slow, suspended or at its end does not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from accel_pretrain import loop
from accel_pretrain.saver import Saver
from accel_pretrain.watchdog import HANG, Watchdog
from tests.processes import (  # noqa: F401
    arguments,
    command,
    leave_nothing_running,
    rank_of,
    start,
    start_training,
    status,
    trainers,
    until,
    updates,
)
from tests.running import REPO, TINY, Train, losses

# Beats fifty times a second for a while; then it is stuck in `nothing_moves` until the watchdog ends it.
SCRIPT = """
import sys, time
from pathlib import Path
from accel_pretrain.watchdog import Watchdog
def nothing_moves():
    time.sleep(30)
with Watchdog(Path(sys.argv[1]), 3, float(sys.argv[2])) as watchdog:
    watchdog.tell = lambda reason: Path(sys.argv[1], "told").write_text(reason)
    watchdog.enter("update")
    print("beating", flush=True)
    for _ in range(int(sys.argv[3])):
        time.sleep(0.02)
        watchdog.beat()
    if len(sys.argv) > 4:
        nothing_moves()
"""


def beating(folder: Path, *words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), *words], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "beating\n"
    return process


def test_silence_ends_the_process_with_the_stacks_of_its_threads(tmp_path: Path) -> None:
    began = time.monotonic()
    _, errors = beating(tmp_path, "1", "30", "hang").communicate(timeout=20)
    assert 1.0 < time.monotonic() - began < 5.0
    assert re.fullmatch(
        r"error: nothing moved for [1-9] s in the phase 'update' \(rank 3\); .*hang_rank3.txt; --hang_timeout .*\n", errors
    )
    stacks = (tmp_path / "hang_rank3.txt").read_text()
    assert "in nothing_moves" in stacks
    assert "watchdog.py" in stacks
    assert "phase 'update'" in (tmp_path / "told").read_text()


def test_a_process_that_was_suspended_was_not_silent(tmp_path: Path) -> None:
    """Ctrl+Z for longer than the timeout, and on. The process above, which is silent as long while it runs, is the control."""
    process = beating(tmp_path, "1", "100")
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    assert not (tmp_path / "hang_rank3.txt").exists()


def test_budgets() -> None:
    watchdog = Watchdog(timeout=600)
    assert watchdog.budget == 3 * 600  # at the start
    watchdog.enter("update")
    assert watchdog.budget == 600
    watchdog._updates.extend([90.0, 100.0, 5000.0])
    assert watchdog.budget == 1000  # slow updates, of which one hiccup says nothing
    with watchdog.phase("save"):
        assert watchdog.budget == 3 * 600
    watchdog.end_soon(0, 10.0)
    assert watchdog.budget == 10
    off = Watchdog()
    assert off.budget is None
    off.end_soon(0, 10.0)
    assert off.budget == 10


def test_a_beat_costs_nothing() -> None:
    with Watchdog(timeout=600) as watchdog:
        best = min(_seconds(watchdog) for _ in range(5))
    assert best < 2e-6


def _seconds(watchdog: Watchdog) -> float:
    began = time.perf_counter()
    for _ in range(10_000):
        watchdog.enter("update")
    return (time.perf_counter() - began) / 10_000


def sabotaged(*words: str) -> list[str]:
    return [sys.executable, "-m", "tests.sabotage", *words]


def test_a_run_that_hangs_ends_with_75_and_says_where(dataset: Path, tmp_path: Path) -> None:
    process = start(sabotaged("hang", "0", "4", *arguments(dataset, tmp_path, "--hang_timeout", "2")))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == HANG
    assert re.search(r"error: nothing moved for [2-9] s in the phase 'update' \(rank 0\)", output)
    assert "Traceback" not in output
    assert "in wait_for_ever" in (tmp_path / "hang_rank0.txt").read_text()
    said = status(tmp_path)
    assert (said["state"], said["exit_code"]) == ("failed", HANG)
    assert len(losses(tmp_path)) == 3


def test_trackers_that_hang_at_the_end_do_not_keep_a_finished_run(dataset: Path, tmp_path: Path) -> None:
    words = [*TINY, "--max_iters", "2", "--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path)]
    process = start(sabotaged("tracker", "0", "0", *words))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "left without waiting longer: nothing moved for" in output
    assert (tmp_path / "latest").read_text() == "checkpoint_00000002\n"


def test_trackers_that_hang_do_not_hide_why_a_run_failed(dataset: Path, tmp_path: Path) -> None:
    process = start(sabotaged("tracker and raise", "0", "2", *arguments(dataset, tmp_path)))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.count("AssertionError: a fault of this rank alone") == 1
    assert "left without waiting longer: nothing moved for" in output
    said = status(tmp_path)
    assert (said["state"], said["exit_code"], said["reason"]) == ("failed", 1, "a fault of this rank alone")


def test_the_second_update_may_take_as_long_as_the_first() -> None:
    with Watchdog(timeout=600) as watchdog:
        watchdog.enter("first update")
        time.sleep(1.2)
        watchdog.beat()
        time.sleep(0.6)
        watchdog.enter("update")
        time.sleep(0.6)
        assert len(watchdog._updates) == 1
        assert watchdog._updates[0] > 1.0


def test_every_micro_batch_is_a_beat(run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = []
    monkeypatch.setattr(Watchdog, "beat", lambda self: beats.append(self._phase))
    assert run_train(tmp_path, "--gradient_accumulation_steps", "3", "--max_iters", "2", "--eval_iters", "1") == 0
    assert (beats.count("first update"), beats.count("update")) == (3, 3)


def test_the_end_waits_for_saves_in_the_phase_of_saves(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may take longer than an update, and the last one is waited for as long as any."""
    saves: list[str] = []
    finish, wait = loop.finish, Saver.wait

    def watched(run: Any, state: Any) -> None:
        monkeypatch.setattr(Saver, "wait", lambda *words: (saves.append(run.watchdog._phase), wait(*words)))
        finish(run, state)

    monkeypatch.setattr(loop, "finish", watched)
    assert run_train(tmp_path, "--asynchronous", "true", "--max_iters", "3", "--checkpoint_interval", "2") == 0
    assert saves == ["save"] * 3  # for the one under way, before the last, and for the last


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stopped_rank_is_noticed_by_the_other(dataset: Path, tmp_path: Path) -> None:
    words = command("torchrun 2", arguments(dataset, tmp_path, "--hang_timeout", "3"))
    start_training(words, tmp_path, tmp_path / "log")
    stopped = next(pid for pid in trainers(tmp_path) if rank_of(pid) == 1)
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    until(lambda: trainers(tmp_path) == [stopped], seconds=20)
    assert time.monotonic() - began < 3 + 2 + 2  # the budget, a tick, and a loaded machine
    assert "rank 0" in (tmp_path / "hang_rank0.txt").read_text()
    assert status(tmp_path)["exit_code"] == HANG
    assert not (tmp_path / "hang_rank1.txt").exists()


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_the_job(dataset: Path, tmp_path: Path, rank: int) -> None:
    """Not stopped but stuck: both notice, and the launcher ends at once."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    own = ["-m", "tests.sabotage", "hang", str(rank), "4", *arguments(dataset, tmp_path, "--hang_timeout", "3")]
    process = start([*launcher, *own], tmp_path / "log")
    until(lambda: updates(tmp_path) >= 3, process)
    began = time.monotonic()
    assert process.wait(timeout=30) == 1
    assert time.monotonic() - began < 3 + 2 + 5
    assert "in wait_for_ever" in (tmp_path / f"hang_rank{rank}.txt").read_text()
    assert status(tmp_path)["exit_code"] == HANG
