"""SIGKILL at every change that saving, pruning, pointing, sweeping, quarantining and going back make to a directory (F1, F2).

Each trial must leave exactly the old or the new checkpoint; what comes next must find it, and the same action done again must
end where it would have ended undisturbed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from accel_pretrain import commit
from tests.faults import scenes
from tests.faults.harness import ForkServer, Outcome, strace_works
from tests.faults.scenes import SCENES
from tests.faults.syscalls import calls_of, inject
from tests.faults.tally import TALLY


class Trials:
    """One scene, prepared once and undone for every trial."""

    def __init__(self, server: ForkServer, scratch: Path, name: str) -> None:
        self.server, self.name, self.scene = server, name, SCENES[name]
        self.before, self.run_dir = scratch / "before", scratch / "run"
        server.call(scenes.prepare, name, self.before).check()
        self.fresh()
        self.changes = server.call(scenes.act, name, self.run_dir).check()
        self.end = scenes.snapshot(self.run_dir)

    def fresh(self) -> None:
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.copytree(self.before, self.run_dir)

    def judge(self, where: str, outcome: Outcome) -> None:
        """What a fault left must be the old or the new, and only the new if the action had returned."""
        TALLY.tracebacks += outcome.killed and "Traceback" in outcome.output
        found = scenes.recover(self.run_dir)
        value = None if found is None else scenes.value_of(found)
        allowed = [self.scene.done] if outcome.code == 0 else self.scene.values
        TALLY.lost += value not in allowed
        assert value in allowed, f"{self.name}, {where}: {value}\n{outcome.output}"
        pointers = {name: commit.read_pointer(self.run_dir / name) for name in ("latest", "best")}
        best = scenes.best_of(self.run_dir)
        assert pointers["latest"] == (found.name if found else None), f"{self.name}, {where}"
        assert best in (None, pointers["best"]), f"{self.name}, {where}: best is {best}, not {pointers['best']}"
        again = self.server.call(scenes.act, self.name, self.run_dir)
        assert again.code == 0, f"{self.name}, {where}, done again: {again.output}"
        assert scenes.snapshot(self.run_dir) == self.end, f"{self.name}, {where}, done again"


LONG = ("first save", "save and keep one", "the same step again")  # half of their changes, where there is little time
EVERY = [(name, 2 if name in LONG else 1) for name in SCENES]


@pytest.mark.parametrize(("name", "every"), [*EVERY, *(pytest.param(name, 1, marks=pytest.mark.faults) for name in LONG)])
def test_killed_at_every_change(server: ForkServer, scratch: Path, name: str, every: int) -> None:
    trials = Trials(server, scratch, name)
    assert len(trials.changes) >= 2
    for operation in trials.changes[::every]:
        trials.fresh()
        outcome = server.call(scenes.act, name, trials.run_dir, "kill", operation.index)
        assert outcome.killed, f"{operation} was not reached: {outcome.output}"
        TALLY.add("kills at a change")
        trials.judge(str(operation)[:200], outcome)


@pytest.mark.skipif(not strace_works(), reason="strace is not installed, or may not trace here")
@pytest.mark.parametrize("share", [8, pytest.param(1, marks=[pytest.mark.faults, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("name", ["save and prune", "the same step again", "first save"])
def test_killed_at_every_system_call(server: ForkServer, scratch: Path, name: str, share: int) -> None:
    """Also at those that torch and safetensors make by themselves. ``share``: every how manieth of them."""
    trials = Trials(server, scratch, name)
    trials.fresh()
    calls = calls_of(server, name, trials.run_dir, scratch / "trace")
    assert len(calls) > 40
    for call in calls[::share]:
        trials.fresh()
        outcome = server.call(scenes.act_in_order, name, trials.run_dir, strace=inject(call, "signal=SIGKILL"))
        assert outcome.killed, f"{call} was not reached: {outcome.output}"
        TALLY.add("kills at a system call")
        trials.judge(str(call), outcome)


def test_control_a_torn_or_mixed_checkpoint_is_noticed(server: ForkServer, scratch: Path) -> None:
    """What the trials above look for can be found: a save that overwrites in place leaves a mixture that they refuse."""
    server.call(scenes.prepare, "save and prune", scratch / "run").check()
    one, two = (scratch / "run" / f"checkpoint_0000000{step}" for step in (1, 2))
    shutil.copy(one / "optimizer.bin", two / "optimizer.bin")
    assert TALLY.mutant(scenes.commit.problem_with(two) is not None)
    server.call(scenes.reseal, two).check()
    with pytest.raises(AssertionError, match="mixes"):
        scenes.value_of(two)
    assert TALLY.mutant(True)


def test_control_a_kill_that_does_not_happen_is_noticed(server: ForkServer, scratch: Path) -> None:
    trials = Trials(server, scratch, "save and prune")
    trials.fresh()
    outcome = server.call(scenes.act, "save and prune", trials.run_dir, "kill", len(trials.changes))
    assert not outcome.killed
