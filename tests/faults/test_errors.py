"""A disk that is full, failing, over quota, read-only or forbidden, at every change that a save makes (F5, F6, F7)."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from accel_pretrain import commit
from tests.faults import scenes, training
from tests.faults.harness import ForkServer, Outcome, strace_works
from tests.faults.syscalls import calls_of, inject
from tests.faults.tally import TALLY
from tests.faults.test_kill import Trials

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES")
SAVES = ["save and prune", "the same step again"]
REMOVING = ("unlink", "rmdir")  # where these fail, what was to be removed stays


def judge(trials: Trials, where: str, outcome: Outcome, *, removing: bool) -> None:
    """One line, no traceback, nothing left over; then the same as after a kill."""
    TALLY.add("storage errors")
    TALLY.tracebacks += "Traceback" in outcome.output
    assert "Traceback" not in outcome.output, f"{where}: {outcome.output}"
    assert outcome.code in (0, 2, 5), f"{where}: {outcome}"
    lines = [line for line in outcome.output.splitlines() if line]
    assert len(lines) <= 1 or outcome.code == 0, f"{where}: {lines}"
    assert outcome.code == 0 or lines[0].startswith("error: "), f"{where}: {lines}"
    leftovers = [path.name for path in trials.run_dir.iterdir() if path.name.startswith(".tmp_checkpoint")]
    assert removing or not leftovers, f"{where}: {leftovers} left"
    trials.judge(where, outcome)


FEW = [(name, 10) for name in SAVES]
ALL = [pytest.param(name, 1, marks=[pytest.mark.faults, pytest.mark.timeout(1500)]) for name in (*SAVES, "first save")]


@pytest.mark.parametrize(("name", "every"), [*FEW, *ALL])
def test_any_change_may_fail(server: ForkServer, scratch: Path, name: str, every: int) -> None:
    """``every``: how manieth pair of a change and an error is tried."""
    trials = Trials(server, scratch, name)
    tried = 0
    for operation in trials.changes:
        for number, error in enumerate(ERRORS):
            if (operation.index * len(ERRORS) + number + operation.index // 2) % every == 0:
                trials.fresh()
                outcome = server.call(scenes.act, name, trials.run_dir, "fail", operation.index, getattr(errno, error))
                judge(trials, f"{error} at {operation}"[:200], outcome, removing=operation.kind in REMOVING)
                tried += 1
    assert tried >= len(trials.changes) * len(ERRORS) // every - 2


@pytest.mark.parametrize("name", SAVES)
def test_a_disk_that_stays_full_loses_nothing(server: ForkServer, scratch: Path, name: str) -> None:
    trials = Trials(server, scratch, name)
    for operation in trials.changes[::8]:
        trials.fresh()
        outcome = server.call(scenes.act, name, trials.run_dir, "fail", operation.index, errno.ENOSPC, True)
        judge(trials, f"from {operation} on"[:200], outcome, removing=True)


@pytest.mark.skipif(not strace_works(), reason="strace is not installed, or may not trace here")
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=[pytest.mark.faults, pytest.mark.timeout(1500)])])
def test_any_system_call_may_fail(server: ForkServer, scratch: Path, every: int) -> None:
    """Also those that torch and safetensors make by themselves: what they raise is no OSError."""
    name = "save and prune"
    trials = Trials(server, scratch, name)
    trials.fresh()
    calls = calls_of(server, name, trials.run_dir, scratch / "trace")
    tried = 0
    for index, call in enumerate(calls):
        for number, error in enumerate(("ENOSPC", "EIO", "EDQUOT")):
            if (index + number) % every == 0:
                trials.fresh()
                outcome = server.call(scenes.act_in_order, name, trials.run_dir, strace=inject(call, f"error={error}"))
                removing = call.name.startswith(("unlink", "rmdir", "rename"))
                judge(trials, f"{error} at {call}"[:300], outcome, removing=removing)
                tried += 1
    assert tried >= 10


# -------------------------------------------------------------------------------------------------------- a real disk


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A real file system of so many bytes; skips the test where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True)
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("a file system may not be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(server: ForkServer, scratch: Path) -> None:
    """Of a size at which the first checkpoints fit and the next one does not, wherever it happens to end."""
    with small_disk(scratch / "disk", 400_000) as disk:
        run_dir = disk / "run"
        server.call(scenes.prepare, "save and prune", run_dir).check()
        filler, kept = disk / "filler", {path: scenes.value_of(path) for path in commit.checkpoints(run_dir)}
        codes = set()
        for room in range(0, 90_000, 9_000):
            free = shutil.disk_usage(disk).free - room
            filler.write_bytes(bytes(max(0, free)))
            outcome = server.call(scenes.act_plainly, "save and prune", run_dir)
            filler.unlink()
            codes.add(outcome.code)
            TALLY.add("full disks", outcome.code != 0)
            assert "Traceback" not in outcome.output
            if outcome.code == 0:
                break
            assert not list(run_dir.glob(".tmp_checkpoint*"))
            assert outcome.code == 5, outcome.output
            assert kept.items() <= {path: scenes.value_of(path) for path in commit.checkpoints(run_dir)}.items()
        assert 5 in codes


@pytest.mark.parametrize("limit", [600, 1000, 2000])
def test_files_that_may_not_grow(server: ForkServer, scratch: Path, limit: int) -> None:
    trials = Trials(server, scratch, "save and prune")
    trials.fresh()
    outcome = server.call(scenes.act_with_little_room, "save and prune", trials.run_dir, limit)
    assert outcome.code != 0, "control: the largest file is larger"
    judge(trials, f"{limit} bytes", outcome, removing=False)


# ------------------------------------------------------------------------------------------------------- while training


@pytest.mark.parametrize(("kind", "number"), [("fsync", 9), ("rename", 2), ("mkdir", 1), ("open", 2), ("write", 4)])
def test_training_goes_on_where_one_save_fails(
    server: ForkServer, dataset: Path, scratch: Path, kind: str, number: int
) -> None:
    assert server.call(training.run, dataset, scratch / "whole", training.SAVING).code == 0
    outcome = server.call(training.run_on_a_bad_disk, dataset, scratch / "run", training.SAVING, kind, number, errno.EIO, False)
    TALLY.add("storage errors while training")
    assert outcome.code == 0, outcome.output
    assert "Traceback" not in outcome.output
    warnings = [line for line in outcome.output.splitlines() if "WARNING" in line]
    assert len(warnings) == 1, outcome.output
    assert str(scratch / "run") in warnings[0]
    assert training.result_of(scratch / "run") == training.result_of(scratch / "whole")


def test_training_ends_where_no_save_succeeds_and_goes_on_later(server: ForkServer, dataset: Path, scratch: Path) -> None:
    assert server.call(training.run, dataset, scratch / "whole", training.SAVING).code == 0
    outcome = server.call(
        training.run_on_a_bad_disk, dataset, scratch / "run", training.SAVING, "fsync", 30, errno.ENOSPC, True
    )
    TALLY.add("storage errors while training")
    assert outcome.code == 5, outcome.output
    assert "Traceback" not in outcome.output
    kept = commit.checkpoints(scratch / "run")
    assert kept
    assert all(commit.problem_with(path) is None for path in kept)
    assert json.loads((kept[0] / "trainer_state.json").read_text())["step"] < 14
    assert server.call(training.run, dataset, scratch / "run", training.SAVING).code == 0
    assert training.result_of(scratch / "run") == training.result_of(scratch / "whole")
