"""Processes of one run, and their launcher: none goes on without the others, and a restart ends in the same bits."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from accel_pretrain.launchers import request_of
from tests.processes import (  # noqa: F401
    arguments,
    command,
    leave_nothing_running,
    rank_of,
    saved_step,
    start,
    start_training,
    status,
    trainers,
    until,
    updates,
)
from tests.running import TINY, Train, assert_same_bits, first_and_slow, newest, run_processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and Linux alone tells of a parent's death")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def limited(run_dir: Path, dataset: Path, updates: int = 60) -> list[str]:
    """The words of a run of two processes, which one process does with two micro-steps per update."""
    words = ["--max_iters", str(updates), "--checkpoint_interval", "5", "--dropout", "0.1", "--global_batch_size", "8"]
    return [*TINY, *words, "--train_data_path", str(dataset), "--checkpoint_dir", str(run_dir)]


def kill_a_rank(run_dir: Path, rank: int, number: int) -> None:
    """End one of two processes, and wait until both are gone: 5 s on a quiet machine, and in any case soon."""
    before = trainers(run_dir)
    os.kill(next(pid for pid in before if rank_of(pid) == rank), number)
    began = time.monotonic()
    until(lambda: not set(before) & set(trainers(run_dir)), seconds=20)
    assert len(before) == 2
    assert time.monotonic() - began < 15


# ------------------------------------------------------------------------------------------------------- the launcher dies


def launcher_dies(dataset: Path, run_dir: Path, launcher: str) -> None:
    process = start_training(command(launcher, arguments(dataset, run_dir)), run_dir, run_dir.parent / "log")
    assert len(trainers(run_dir)) == (1 if launcher == "accelerate" else 2)
    process.kill()
    process.wait()
    until(lambda: not trainers(run_dir), seconds=20)
    assert saved_step(run_dir) == updates(run_dir) == status(run_dir)["step"]
    assert status(run_dir)["reason"] == "the launcher has died"


@pytest.mark.parametrize("launcher", first_and_slow(["accelerate", "torchrun 2"]))
def test_ranks_save_and_leave_when_their_launcher_is_killed(dataset: Path, tmp_path: Path, launcher: str) -> None:
    launcher_dies(dataset, tmp_path / "run", launcher)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "accelerate 2", "torchrun 2"])
def test_launchers_killed_again_and_again(dataset: Path, tmp_path: Path, launcher: str) -> None:
    for trial in range(3):
        (tmp_path / str(trial)).mkdir()
        launcher_dies(dataset, tmp_path / str(trial) / "run", launcher)


# ----------------------------------------------------------------------------------------------------------- a rank dies


def test_a_killed_rank_is_restarted_to_the_same_bits(run_train: Train, dataset: Path, tmp_path: Path) -> None:
    """``--max_restarts`` of both launchers, SIGKILL and a crash, the main process and the other one."""
    assert run_train(tmp_path / "whole", *limited(tmp_path / "whole", dataset, 30)) == 0
    for launcher, rank, number in (("torchrun 2", 0, signal.SIGKILL), ("accelerate 2", 1, signal.SIGSEGV)):
        run_dir = tmp_path / launcher
        process = start(command(launcher, limited(run_dir, dataset, 30), "--max_restarts", "1"), tmp_path / "log")
        until(lambda run_dir=run_dir: updates(run_dir) >= 7, process)
        kill_a_rank(run_dir, rank, number)
        assert process.wait(timeout=60) == 0, (tmp_path / "log").read_text()
        assert (tmp_path / "log").read_text().count("Resuming from") == 1
        assert_same_bits(newest(tmp_path / "whole"), newest(run_dir))
        assert status(run_dir)["state"] == "finished"


@pytest.mark.slow
def test_a_killed_main_process_is_no_running_run(dataset: Path, tmp_path: Path) -> None:
    start_training(command("torchrun 2", arguments(dataset, tmp_path)), tmp_path, tmp_path / "log")
    kill_a_rank(tmp_path, 0, signal.SIGKILL)
    said = status(tmp_path)
    assert (said["state"], said["exit_code"]) == ("failed", 1)
    assert "was killed" in said["reason"]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # twenty runs of two processes
@pytest.mark.parametrize("launcher", ["accelerate 2", "torchrun 2"])
def test_killed_ranks_are_restarted_to_the_same_bits(dataset: Path, tmp_path: Path, launcher: str) -> None:
    """Ten times each, at random moments."""
    draw = random.Random(seed := random.randrange(10**6))
    assert run_processes(limited(tmp_path / "whole", dataset), processes=2).returncode == 0
    for trial in range(10):
        run_dir = tmp_path / f"run{trial}"
        process = start(command(launcher, limited(run_dir, dataset), "--max_restarts", "2"), tmp_path / "log")
        moment = draw.randrange(1, 50)
        until(lambda run_dir=run_dir, moment=moment: updates(run_dir) >= moment, process)
        kill_a_rank(run_dir, trial % 2, draw.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT]))
        where = f"trial {trial} of seed {seed}"
        assert process.wait(timeout=90) == 0, f"{where}:\n{(tmp_path / 'log').read_text()[-3000:]}"
        assert_same_bits(newest(tmp_path / "whole"), newest(run_dir))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise", "exit", "kill"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_alone_ends_all(dataset: Path, tmp_path: Path, fault: str, rank: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["-m", "tests.sabotage", fault, str(rank), "8", *arguments(dataset, tmp_path, "--checkpoint_interval", "5")]
    process = start([*launcher, *words], tmp_path / "log")
    until(lambda: updates(tmp_path) >= 7, process)
    began = time.monotonic()
    assert process.wait(timeout=30) == 1
    assert time.monotonic() - began < 10
    assert not trainers(tmp_path)
    assert saved_step(tmp_path) == 5
    log = (tmp_path / "log").read_text()
    said = status(tmp_path)
    assert (said["state"], said["exit_code"]) == ("failed", 1)
    # The other one says why it ends, if the launcher does not end it before it can.
    assert "another process of this run has ended or does not answer" in log or "Signal 15 (SIGTERM) received" in log
    assert (f"[rank{rank}]: AssertionError: a fault of this rank alone" in log) == (fault == "raise")


# ---------------------------------------------------------------------------------------------- processes that do not start


def test_one_process_where_two_were_asked_for_is_refused(dataset: Path, tmp_path: Path) -> None:
    """What ``accelerate launch --cpu --num_processes 2`` does without a word; and the command that the message gives works."""
    words = ["-m", "accel_pretrain.train", *limited(tmp_path / "run", dataset, 2)]
    process = start([*ACCELERATE, "--cpu", "--num_processes", "2", *words])
    output, _ = process.communicate(timeout=60)
    message = "error: accelerate launch was asked for 2 processes and started 1; type: ACCELERATE_USE_CPU=1 accelerate launch "
    message += "--multi_gpu --num_processes 2 -m accel_pretrain.train ... (without --cpu)\n"
    assert message in output
    assert process.returncode != 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("python /bin/accelerate launch --cpu --num_processes 2 -m accel_pretrain.train", 2),
        ("/bin/accelerate launch --num-processes=4 -m accel_pretrain.train", 4),
        ("python -m accelerate.commands.launch --config_file two.yaml -m accel_pretrain.train", 2),
        ("accelerate launch --config_file two.yaml --num_processes 1 -m accel_pretrain.train", 1),
        ("accelerate launch --config_file none.yaml -m accel_pretrain.train", 1),
        ("accelerate launch --config_file eight_alone.yaml -m accel_pretrain.train", 1),
        ("accelerate launch --config_file broken.yaml -m accel_pretrain.train", 1),
        ("accelerate launch --cpu -m accel_pretrain.train", 1),
        ("bash run.sh --num_processes 2", 1),
        ("", 1),
    ],
)
def test_what_the_launcher_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, expected: int) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    Path("eight_alone.yaml").write_text("distributed_type: 'NO'\nnum_processes: 8\n")
    Path("broken.yaml").write_text("[: -\n")
    assert request_of(words.split()).processes == expected


# ------------------------------------------------------------------------------------------------------------ surroundings


@pytest.mark.slow
def test_odd_surroundings_change_no_bit(run_train: Train, dataset: Path, tmp_path: Path) -> None:
    """A path with spaces and a parrot, the C locale, another time zone, no home, and files that only their owner may read."""
    words = ["--max_iters", "6", "--checkpoint_interval", "3", "--dropout", "0.1"]
    assert run_train(tmp_path / "plain", *words) == 0
    run_dir = tmp_path / "my runs" / "🦜 ü" / ("long" * 30)
    odd = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Pacific/Kiritimati"}
    odd |= {"HOME": "/proc/no/home", "HF_HOME": "/proc/no/home"}
    own = [*TINY, *words, "--train_data_path", str(dataset), "--checkpoint_dir", str(run_dir)]
    shell = ["sh", "-c", 'umask 077; exec "$@"', "sh", *command("python", own)]
    process = start(shell, None, **odd)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert_same_bits(newest(tmp_path / "plain"), newest(run_dir))
    modes = {path.stat().st_mode & 0o777 for path in run_dir.rglob("*") if path.is_file()}
    assert modes == {0o600}


def test_files_follow_the_umask(run_train: Train, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert run_train(tmp_path / "run", "--max_iters", "2") == 0
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {0o640}


@pytest.mark.parametrize("jump", [-366 * 86400.0, 366 * 86400.0])
def test_a_clock_that_jumps_changes_no_bit(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """By a year, in the middle of a run and between two parts of it."""
    words = ("--max_iters", "6", "--checkpoint_interval", "2", "--dropout", "0.1", "--schedule.name", "constant")
    assert run_train(tmp_path / "plain", *words) == 0
    clock, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return clock() + (jump if calls[0] > 5 else 0.0)

    monkeypatch.setattr(time, "time", jumping)
    assert run_train(tmp_path / "jumping", *words, "--max_iters", "4") == 0
    assert calls[0] > 5
    monkeypatch.setattr(time, "time", clock)
    assert run_train(tmp_path / "jumping", *words) == 0
    assert_same_bits(newest(tmp_path / "plain"), newest(tmp_path / "jumping"))
