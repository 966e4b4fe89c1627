"""Power cut at any instant of publishing, pruning and going back: the old or the new is left; once it is said, the new (F4).

A real action is recorded; a simulated disk then loses what was not flushed, in every way that it may; the real recovery looks
at what is left. Every flush of the record is taken away once, and its absence must be noticed.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from accel_pretrain import commit
from tests.faults import scenes
from tests.faults.harness import ForkServer
from tests.faults.power import Recorder, states
from tests.faults.shim import Operation, watching
from tests.faults.tally import TALLY

# What is recorded, and how often, when there are 20,000 states in all.
SHARES = {
    "save and prune": 5000, "save and keep one": 4000, "first save": 3000, "the same step again": 4000, "prune": 1500,
    "point": 500, "quarantine": 1000, "go back": 1000,
}  # fmt: skip


# Folders that are not whole are no accident there, and a pointer may wait for the recovery to mend it.
MENDED = ("quarantine", "go back", "the same step again")


@dataclass(frozen=True)
class State:
    """What a run directory holds: each good checkpoint by name, with a hash that stands for all its bytes, and the pointers."""

    good: dict[str, str]
    pointers: dict[str, str | None]

    @classmethod
    def of(cls, run_dir: Path) -> State:
        paths = [path for path in commit.checkpoints(run_dir) if commit.problem_with(path) is None]
        good = {path.name: commit.sha256_of(path / commit.MANIFEST) for path in paths}
        return cls(good, {name: commit.read_pointer(run_dir / name) for name in ("latest", "best")})

    @property
    def newest(self) -> tuple[str, str] | None:
        return max(self.good.items(), default=None)


@dataclass(frozen=True)
class Record:
    """A scene's directory before the action, what the action changed, and what was there before and after."""

    name: str
    before: Path
    operations: list[Operation]
    old: State
    new: State


def record(name: str, run_dir: Path) -> list[Operation]:
    """What a scene changes; runs in a server's child."""
    recorder = Recorder(run_dir)
    with watching(run_dir, recorder.say()):
        scenes.SCENES[name].act(run_dir)
    recorder.look()
    return recorder.operations


def recorded(server: ForkServer, scratch: Path, name: str) -> Record:
    before, run_dir = scratch / "before", scratch / "run"
    server.call(scenes.prepare, name, before).check()
    shutil.copytree(before, run_dir)
    operations = server.call(record, name, run_dir).check()
    new = State.of(run_dir)
    shutil.rmtree(run_dir)
    shutil.copytree(before, run_dir)  # the record speaks of paths in run_dir
    return Record(name, run_dir, operations, State.of(before), new)


def lost(record: Record, returned: bool, run_dir: Path) -> str | None:
    """What is wrong with a directory that a power failure left; None if nothing is. ``returned``: the action had ended."""
    allowed = [record.new] if returned else [record.old, record.new]
    state = State.of(run_dir)
    for pointer, name in state.pointers.items():
        if record.name in MENDED:
            continue
        if name not in [one.pointers[pointer] for one in allowed] or (name is None and (run_dir / pointer).exists()):
            return f"{pointer} is {name}"
        if name is not None and name not in state.good:
            return f"{pointer} names {name}, which is not there"
    if record.name != "quarantine" and len(state.good) < len(commit.checkpoints(run_dir)):
        return "a damaged folder has the name of a checkpoint"
    try:
        found = scenes.recover(run_dir)
    except commit.CheckpointError as error:
        return f"nothing to go on from: {error}"
    newest = None if found is None else (found.name, commit.sha256_of(found / commit.MANIFEST))
    if newest not in [one.newest for one in allowed] and not (record.name == "go back" and not returned):
        return f"found {newest}"
    pointer = commit.read_pointer(run_dir / "latest")
    if pointer is not None and not (run_dir / pointer).is_dir():
        return f"latest still names {pointer}"
    return None


def problems(record: Record, operations: Sequence[Operation], count: int, seed: int, scratch: Path) -> Iterator[str]:
    """Try ``count`` states of a record, or of a mutant of it."""
    for done, folder in states(record.before, operations, count, seed, scratch):
        if problem := lost(record, done == len(operations), folder):
            yield f"seed {seed}, after {done} of {len(operations)} operations: {problem}"


@pytest.mark.parametrize("scale", [10, pytest.param(1, marks=[pytest.mark.faults, pytest.mark.timeout(1500)])])
@pytest.mark.parametrize("name", SHARES)
def test_no_state_of_the_disk_loses_a_checkpoint(server: ForkServer, scratch: Path, name: str, scale: int) -> None:
    own = recorded(server, scratch, name)
    assert {"fsync", "rename"} <= {operation.kind for operation in own.operations}
    seed, count = random.randrange(1 << 30), SHARES[name] // scale
    found = list(problems(own, own.operations, count, seed, scratch / "states"))
    TALLY.add("power failures", count)
    TALLY.lost += len(found)
    assert not found, found[:5]


@pytest.mark.parametrize("name", [pytest.param("save and keep one", marks=pytest.mark.faults), "point"])
def test_every_flush_that_is_left_out_is_noticed(server: ForkServer, scratch: Path, name: str) -> None:
    """Of each file, of the manifest, of the folders, of the run directory after each of its changes, of the pointers."""
    own = recorded(server, scratch, name)
    root = str(own.before)
    flushes = {(path, number if path == root else 0) for number, (kind, path) in enumerate(map(_brief, own.operations)) if kind}
    assert len(flushes) >= (12 if name == "save and keep one" else 2)
    missed = []
    for flushed, at in sorted(flushes):
        mutant = [
            operation
            for number, operation in enumerate(own.operations)
            if not (operation.kind == "fsync" and operation.path == flushed and number == (at or number))
        ]
        assert len(mutant) < len(own.operations)
        # Some absences show in one state of 500 only.
        tries = (problems(own, mutant, 200, seed, scratch / f"{at}-{seed}" / flushed[1:]) for seed in range(60))
        caught = any(problem for found in tries for problem in found)
        if not TALLY.mutant(caught):
            missed.append((flushed.removeprefix(root), at))
    assert not missed


def _brief(operation: Operation) -> tuple[bool, str]:
    return operation.kind == "fsync", operation.path


def test_control_the_simulator_loses_what_nobody_flushed(server: ForkServer, scratch: Path) -> None:
    own = recorded(server, scratch, "save and prune")
    unsafe = [operation for operation in own.operations if operation.kind != "fsync"]
    assert TALLY.mutant(len(list(problems(own, unsafe, 300, 0, scratch / "states"))) > 30)
