"""One run at a time in a run directory: refused with who has it, and free as soon as that process is dead."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from accel_pretrain import lock, sample
from accel_pretrain.commit import find_newest, step_of
from tests.processes import arguments, command, leave_nothing_running, start_training, status  # noqa: F401
from tests.running import REPO, Train, newest

HOLDER = "import sys, time; from pathlib import Path; from accel_pretrain import lock; "
HOLDER += "file = lock.take(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


@contextlib.contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock in the block, or until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    with held(tmp_path / "lock") as process:
        with pytest.raises(lock.Taken) as taken:
            lock.take(tmp_path / "lock")
        assert taken.value.owner == f"process {process.pid} on {socket.gethostname()}"
        assert not taken.value.seen
        process.send_signal(signal.SIGKILL)
        process.wait()
        lock.take(tmp_path / "lock").close()


def test_control_another_lock_file_is_another_lock(tmp_path: Path) -> None:
    with held(tmp_path / "lock"):
        lock.take(tmp_path / "other").close()


@pytest.mark.parametrize(("age", "free"), [(5, False), (lock.SILENCE + 5, True)])
def test_a_run_on_another_machine_counts_while_it_shows_life(tmp_path: Path, age: float, free: bool) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    os.utime(path, (time.time() - age, time.time() - age))
    if free:
        lock.take(path).close()
    else:
        with pytest.raises(lock.Taken, match="process 1 on elsewhere") as taken:
            lock.take(path)
        assert taken.value.seen


@pytest.mark.parametrize("content", [b"[1]", b'{"host": "x"}', b'{"pid": "a", "host": "x"}', b"7", b"{", b"\xff"])
def test_a_lock_file_with_something_else_in_it_is_nobodys(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    with lock.take(tmp_path / "lock"):
        (tmp_path / "lock").write_bytes(content)
        with pytest.raises(lock.Taken):
            lock.take(tmp_path / "lock")


def test_a_run_waits_until_another_machine_is_taken_for_dead(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: patch.setattr(lock, "SILENCE", 0))  # and the minute is over
        assert run_train(tmp_path, "--max_iters", "2") == 0
    said = capsys.readouterr().out
    assert re.search(f"process 1 on elsewhere worked in {tmp_path} until just now; waiting [0-9]+ s for another sign", said)
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    monkeypatch.setattr(time, "sleep", lambda _: os.utime(path))  # it is alive
    assert run_train(tmp_path, "--max_iters", "2") == 7
    assert "process 1 on elsewhere worked in it less than 60 s ago" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 5), (errno.EDQUOT, 5), (errno.EIO, 5), (errno.EACCES, 2)])
def test_a_directory_in_which_nothing_can_be_written(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, number: int, code: int
) -> None:
    def take(path: Path) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock, "take", take)
    assert run_train(tmp_path / "run", "--max_iters", "2") == code
    assert f"cannot write to {tmp_path / 'run'} ({os.strerror(number)})" in capsys.readouterr().err


def test_without_locks_in_the_file_system_the_process_id_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with held(tmp_path / "lock") as process:
        with pytest.raises(lock.Taken, match=f"process {process.pid}"):
            lock.take(tmp_path / "lock")
        process.kill()
        process.wait()
        lock.take(tmp_path / "lock").close()


def test_a_second_run_ends_with_7_and_touches_nothing(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(tmp_path / "run", "--max_iters", "2") == 0
    assert not (tmp_path / "run" / ".lock").exists()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with held(tmp_path / "run" / ".lock") as process:
        capsys.readouterr()
        assert run_train(tmp_path / "run", "--max_iters", "4") == 7
        error = capsys.readouterr().err
        assert f"is in use: process {process.pid} on {socket.gethostname()} works in it; wait for it" in error
        assert error.count("\n") == 1
        # Readers take no lock, and a copy of the directory is another directory.
        assert sample.main(["--checkpoint", str(tmp_path / "run"), "--prompt", "a", "--max_new_tokens", "2"]) == 0
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        assert run_train(tmp_path / "copy", "--max_iters", "3") == 0
    (tmp_path / "run" / ".lock").unlink()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert newest(tmp_path / "copy").name == "checkpoint_00000003"


def test_the_lock_of_a_killed_run_is_free_at_once(run_train: Train, dataset: Path, tmp_path: Path) -> None:
    process = start_training(command("python", arguments(dataset, tmp_path, "--checkpoint_interval", "2")), tmp_path)
    assert run_train(tmp_path, "--max_iters", "4") == 7
    assert status(tmp_path)["state"] == "running"
    assert status(tmp_path)["pid"] == process.pid
    process.kill()
    process.wait()
    assert run_train(tmp_path, "--max_iters", "100001", "--max_tokens", "1") == 2  # refused for what it says, not for the lock
    checkpoint = find_newest(tmp_path)  # not what ``latest`` names: the process may have been killed before it did
    assert checkpoint is not None
    before = step_of(checkpoint)
    assert run_train(tmp_path, "--max_iters", str(before + 1)) == 0
    assert status(tmp_path) | {"state": "finished", "exit_code": 0, "step": before + 1} == status(tmp_path)


def test_a_refused_run_leaves_no_directory(run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train(tmp_path / "new", "--resume_from", str(tmp_path / "nowhere")) == 2
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    assert run_train(tmp_path / "file", "--max_iters", "2") == 2
    assert "checkpoint.checkpoint_dir: cannot write to" in capsys.readouterr().err
