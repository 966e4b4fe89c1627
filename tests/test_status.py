"""``status.json`` and exit codes: how a run ended, also where a launcher hides it."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from accel_pretrain.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    LockedError,
    NoUsableCheckpointError,
    PeerError,
    StorageError,
    reported,
)
from accel_pretrain.status import STATUS, RunStatus, read_status, record_failure, record_loss
from tests.processes import status
from tests.running import Train, newest


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (DataError("x"), 2),
        (CheckpointError("x"), 2),
        (NoUsableCheckpointError("x"), 4),
        (StorageError("x"), 5),
        (OSError(errno.ENOSPC, "No space left on device", "file"), 5),
        (OSError(errno.EIO, "Input/output error", "file"), 5),
        (OSError(errno.EACCES, "Permission denied", "file"), 2),
        (DivergedError("x"), 6),
        (LockedError("x"), 7),
        (PeerError("x"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(9), 9),
        (ValueError("a mistake in the program\nand more"), 1),
    ],
)
def test_an_error_is_one_exit_code_on_the_command_line_and_in_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    kinds = (SystemExit, ValueError)
    with pytest.raises(kinds) as caught, reported(), RunStatus(tmp_path):
        raise error
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == code
        assert capsys.readouterr().err.count("\n") <= 1
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("failed", code)
    assert "\n" not in status(tmp_path)["reason"]


def test_a_run_from_its_start_to_its_end(tmp_path: Path) -> None:
    with RunStatus(tmp_path) as now:
        assert status(tmp_path)["state"] == "running"
        assert status(tmp_path)["exit_code"] is None
        now.progress(step=5, tokens=640, checkpoint=tmp_path / "checkpoint_00000005")
        said = status(tmp_path)
        assert (said["step"], said["tokens"], said["checkpoint"]) == (5, 640, "checkpoint_00000005")
        now.end("finished", 0)
    assert status(tmp_path) | {"state": "finished", "exit_code": 0, "step": 5} == status(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [STATUS]


def test_the_first_failure_is_the_cause(tmp_path: Path) -> None:
    """A process that hangs ends the others by its end: theirs is not what people must know."""
    now = RunStatus(tmp_path)
    now.progress(step=7, tokens=1, checkpoint=None)
    record_failure(tmp_path, 75, "nothing moved")
    now.__exit__(PeerError, PeerError("another process has ended"), None)
    assert (status(tmp_path)["exit_code"], status(tmp_path)["reason"], status(tmp_path)["step"]) == (75, "nothing moved", 7)


def test_what_was_said_last_stays(tmp_path: Path) -> None:
    with RunStatus(tmp_path) as now:
        now.end("finished", 0)
        now.end("interrupted", 130, "left at once, without saving")  # in the trackers' time, which is after the end
    assert status(tmp_path)["state"] == "finished"


def test_who_loses_a_killed_main_process_says_so(tmp_path: Path) -> None:
    main = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with RunStatus(tmp_path):
            pass
        document = status(tmp_path) | {"pid": main.pid}
        (tmp_path / STATUS).write_text(json.dumps(document))
        record_loss(tmp_path, patience=0.2)
        assert status(tmp_path)["state"] == "running"
        main.kill()  # its parent does not ask for its exit code yet
        record_loss(tmp_path)
        assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("failed", 1)
        (tmp_path / STATUS).write_text(json.dumps(document | {"host": "elsewhere"}))
        record_loss(tmp_path)
        assert status(tmp_path)["state"] == "running"
    finally:
        main.communicate()


def test_a_refused_command_leaves_the_status_of_the_run(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path, "--max_iters", "3") == 0
    before = (tmp_path / STATUS).read_bytes()
    assert run_train(tmp_path, "--max_iters", "4", "--seed", "7") == 2
    assert (tmp_path / STATUS).read_bytes() == before


def test_processes_other_than_the_main_one_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunStatus() as now:
        now.progress(step=1, tokens=1, checkpoint=None)
        now.end("finished", 0)
    assert list(tmp_path.iterdir()) == []


def test_a_status_that_cannot_be_written_or_read_ends_nothing(tmp_path: Path) -> None:
    with RunStatus(tmp_path / "missing") as now:
        now.end("finished", 0)
    assert read_status(tmp_path / "missing") == {}
    for torn in (b"", b"{", b"[]", b"\xff\xfe"):
        (tmp_path / STATUS).write_bytes(torn)
        assert read_status(tmp_path) == {}


def test_what_a_run_says_about_itself(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path, "--max_iters", "3") == 0
    said = status(tmp_path)
    assert (said["state"], said["exit_code"], said["step"], said["tokens"]) == ("finished", 0, 3, 3 * 4 * 32)
    assert said["checkpoint"] == newest(tmp_path).name
    assert set(said) == {
        *("state", "exit_code", "reason", "step", "tokens", "checkpoint", "pid", "host", "started", "time"),
    }  # fmt: skip
    for file in newest(tmp_path).glob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert run_train(tmp_path, "--max_iters", "4") == 4
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("failed", 4)
    assert json.dumps(status(tmp_path)["reason"]).count("checkpoint_00000003") >= 1
