"""Random lives of a run directory, beside a small model of what must be in it (F30). Runs in a server's child, and forks."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from accel_pretrain import commit, publish
from accel_pretrain.errors import NoUsableCheckpointError
from tests.faults import scenes
from tests.faults.shim import kill_at, watching

KEEP, PINS = 2, 5  # keep_last, and pin_interval
_counts: dict[str, int] = {}
_folder: list[Path] = []


class RunDirectory(RuleBasedStateMachine):
    """Saves, the best, pins, damage, deaths and restarts, in any order that a run can have them in."""

    def __init__(self) -> None:
        super().__init__()
        self.run_dir = Path(tempfile.mkdtemp(dir=_folder[0]))
        self.step = 0  # of the run, or of what it would go on from
        self.saved: set[int] = set()  # what a save has returned, and nothing has damaged since
        self.damaged: set[int] = set()
        self.best: int | None = None
        self.pinned: set[int] = set()
        self.milestones: set[int] = set()
        self.dead = self.over = False
        self.unsure = 0  # checkpoints that may be there too: of a save that was killed

    def teardown(self) -> None:
        shutil.rmtree(self.run_dir)

    @initialize()
    def begin(self) -> None:
        self.save(best=False)

    @precondition(lambda self: not self.dead)
    @rule(best=st.booleans())
    def save(self, best: bool) -> None:
        self.step += 1
        scenes.save(self.run_dir, self.step, is_best=best, keep_last=KEEP, pin_interval=PINS)
        self.unsure = 0
        self.has_saved(self.step, best)
        _count("saves")

    def has_saved(self, step: int, best: bool) -> None:
        """A save was done, so old ones may be gone; but it must be there itself."""
        assert step in self.there()
        self.damaged.discard(step)
        self.damaged &= self.there()
        self.saved = (self.saved | {step}) & self.there()
        self.best = step if best else self.best
        self.milestones |= {step} if step % PINS == 0 else set()

    @precondition(lambda self: not self.dead)
    @rule(best=st.booleans(), at=st.integers(0, 70))
    def die_while_saving(self, best: bool, at: int) -> None:
        if (pid := os.fork()) == 0:
            with watching(self.run_dir, kill_at(at)):
                scenes.save(self.run_dir, self.step + 1, is_best=best, keep_last=KEEP, pin_interval=PINS)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        _count("kills" if killed else "saves")
        self.dead = True
        self.unsure += killed
        if commit.problem_with(self.run_dir / f"checkpoint_{self.step + 1:08d}") is None:
            self.has_saved(self.step + 1, best and not killed)
        else:
            assert killed
        if killed and best:
            self.best = None  # the old or the new: the pointer names it

    @rule()
    def die(self) -> None:
        self.dead = True

    @precondition(lambda self: self.dead and not self.over)
    @rule()
    def go_on(self) -> None:
        """A new start: what is found is at least as new as what was saved last and is undamaged."""
        try:
            found = scenes.recover(self.run_dir)
        except NoUsableCheckpointError:
            assert not self.saved & self.there(), "a good checkpoint was not found"
            self.over = True
            return
        assert found is not None
        self.step = scenes.value_of(found)
        assert self.step not in self.damaged
        assert self.step == max(self.saved)
        self.damaged = {step for step in self.damaged if step < self.step}
        self.dead, self.unsure = False, min(self.unsure, 1)
        _count("restarts")

    @precondition(lambda self: self.saved)
    @rule(how=st.sampled_from(["cut", "flip", "delete"]), which=st.integers(0, 3))
    def damage(self, how: str, which: int) -> None:
        there = sorted(self.there(), reverse=True)
        step = there[min(which, len(there) - 1)]
        path = self.run_dir / f"checkpoint_{step:08d}" / "optimizer.bin"
        if step in self.damaged or not path.exists():
            return
        content = path.read_bytes()
        if how == "delete":
            path.unlink()
        else:
            path.write_bytes(content[:-1] if how == "cut" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        self.saved.discard(step)
        self.damaged.add(step)
        self.best = None if step == self.best else self.best
        _count("damages")

    @precondition(lambda self: self.saved & self.there())
    @rule()
    def pin(self) -> None:
        step = max(self.saved & self.there())
        with (self.run_dir / commit.PINNED).open("a") as file:
            file.write(f"checkpoint_{step:08d}\n")
        self.pinned.add(step)

    def there(self) -> set[int]:
        return {commit.step_of(path) for path in commit.checkpoints(self.run_dir)}

    @invariant()
    def the_last_good_one_is_there(self) -> None:
        newest = [path for path in commit.checkpoints(self.run_dir) if commit.problem_with(path) is None]
        if self.saved:
            assert newest, "no good checkpoint is left"
            assert scenes.value_of(newest[0]) == max(self.saved)

    @invariant()
    def what_is_protected_is_there(self) -> None:
        protected = self.pinned | self.milestones | ({self.best} if self.best else set())
        for step in protected - self.damaged:
            aside = list(self.run_dir.glob(f"{commit.QUARANTINE}/checkpoint_{step:08d}*"))
            assert step in self.there() or aside, f"{step} is gone"

    @invariant()
    def no_more_is_kept_than_was_asked_for(self) -> None:
        milestones = {step for step in self.there() if step % PINS == 0}
        named = {commit.read_pointer(self.run_dir / "best")}
        protected = milestones | self.pinned | {int(name[-8:]) for name in named if name}
        rest = self.there() - protected - self.damaged
        assert len(rest) <= KEEP + self.unsure + (1 if self.dead else 0), sorted(rest)


def _count(what: str) -> None:
    _counts[what] = _counts.get(what, 0) + 1


def _forget_the_best(run_dir: Path, keep_last: int | None, protected: Any = ()) -> None:
    (run_dir / "best").unlink(missing_ok=True)
    commit.prune(run_dir, keep_last, protected)


def _forget_the_newest(run_dir: Path, keep_last: int | None, protected: Any = ()) -> None:
    for path in commit.checkpoints(run_dir)[:-1]:
        shutil.rmtree(path)


def _forget_milestones(run_dir: Path, keep_last: int | None, protected: Any = ()) -> None:
    commit.prune(run_dir, keep_last)


def _forget_to_prune(run_dir: Path, keep_last: int | None, protected: Any = ()) -> None:
    pass


MUTANTS: dict[str, Callable[..., None]] = {
    "the best": _forget_the_best, "the newest": _forget_the_newest, "milestones": _forget_milestones,
    "to prune": _forget_to_prune,
}  # fmt: skip


def explore(folder: Path, examples: int, number: int, mutant: str | None = None) -> dict[str, int]:
    """Live ``examples`` lives of 20 steps; what happened in them. ``mutant``: what its pruning is to forget."""
    _folder[:] = [folder]
    _counts.clear()
    if mutant is not None:
        publish.prune = MUTANTS[mutant]  # type: ignore[assignment]
    machine = seed(number)(RunDirectory)
    phases = [Phase.generate] if mutant else [Phase.generate, Phase.shrink]
    own = settings(
        max_examples=examples, stateful_step_count=20, deadline=None, database=None, phases=phases, print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )  # fmt: skip
    sys.stdout.flush()
    run_state_machine_as_test(machine, settings=own)
    return dict(_counts)
