"""SIGKILL at random instants of real training, again and again; what comes out is what an undisturbed run makes (F3)."""

from __future__ import annotations

import random
import shutil
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults import training
from tests.faults.harness import ForkServer
from tests.faults.tally import TALLY

KILLS = 3  # at most, in one run
WORDS = [[*training.SAVING, "--asynchronous", how] for how in ("false", "true")]
LEFTOVERS = (".tmp_*", ".trash_*")  # what a save holds while it lasts


@dataclass
class Report:
    runs: int = 0
    killed: int = 0
    inside_a_save: int = 0
    different: int = 0
    tracebacks: int = 0


def kill_and_resume(server: ForkServer, data: Path, scratch: Path, runs: int, seed: int) -> Report:
    """Run ``runs`` trainings, each killed up to three times at any instant of its life, and compare each with a whole one.

    Each start saves at once or in the background, as chance has it.
    """
    draw, report = random.Random(seed), Report()
    whole = scratch / "whole"
    assert server.call(training.run, data, whole, training.SAVING).code == 0, "the first one imports what is missing"
    undisturbed = [server.call(training.run, data, scratch / f"whole{words[-1]}", words) for words in WORDS]
    assert [outcome.code for outcome in undisturbed] == [0, 0], undisturbed
    expected = training.result_of(whole)
    assert all(training.result_of(scratch / f"whole{words[-1]}") == expected for words in WORDS), "undisturbed runs differ"
    seconds = deque((outcome.seconds for outcome in undisturbed), maxlen=9)  # of those that nobody killed: machines vary
    for number in range(runs):
        run_dir = scratch / str(number)
        for _ in range(draw.randint(1, KILLS)):
            window = 1.2 * statistics.median(seconds)
            outcome = server.call(training.run, data, run_dir, draw.choice(WORDS), kill_after=draw.uniform(0, window))
            seconds += [] if outcome.killed else [outcome.seconds]
            report.tracebacks += "Traceback" in outcome.output
            report.killed += outcome.killed
            report.inside_a_save += outcome.killed and any(any(run_dir.glob(pattern)) for pattern in LEFTOVERS)
        last = server.call(training.run, data, run_dir, draw.choice(WORDS))
        assert last.code == 0, f"seed {seed}, run {number}: {last.output}"
        report.runs += 1
        report.tracebacks += "Traceback" in last.output
        found = training.result_of(run_dir)
        if not same(found, expected):
            report.different += 1
            print(f"seed {seed}, run {number} differs in", *(key for key in expected if found[key] != expected[key]))
        shutil.rmtree(run_dir)
    print(f"seed {seed}: {report}, {statistics.median(seconds):.2f} s per undisturbed run")
    return report


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found == expected


def judge(report: Report, runs: int) -> None:
    """Nothing lost, and enough injected for that to mean something."""
    assert (report.runs, report.different, report.tracebacks) == (runs, 0, 0)
    assert report.killed >= runs / 2, "too few kills landed"
    assert report.inside_a_save >= runs / 10, "too few kills landed in a save"


SIZES = [10, pytest.param(200, marks=[pytest.mark.faults, pytest.mark.timeout(1500)])]


@pytest.mark.parametrize("runs", SIZES)
def test_killed_anywhere_it_ends_in_the_same_bits(server: ForkServer, dataset: Path, scratch: Path, runs: int) -> None:
    seed = random.randrange(1 << 30)
    report = kill_and_resume(server, dataset, scratch, runs, seed)
    TALLY.add("kills while training", report.killed)
    TALLY.lost += report.different
    TALLY.tracebacks += report.tracebacks
    judge(report, runs)


@pytest.mark.parametrize("report", [Report(runs=20), Report(runs=20, killed=30), Report(20, 30, 9, different=1)])
def test_control_nothing_killed_or_something_lost_fails(report: Report) -> None:
    with pytest.raises(AssertionError):
        judge(report, 20)
    assert TALLY.mutant(True)


def test_control_another_curve_is_noticed(server: ForkServer, dataset: Path, scratch: Path) -> None:
    for name, seed in (("one", "1"), ("two", "2")):
        assert server.call(training.run, dataset, scratch / name, [*training.SAVING, "--seed", seed]).code == 0
    one, two = (training.result_of(scratch / name) for name in ("one", "two"))
    assert TALLY.mutant(not same(one, two))
    assert TALLY.mutant(not same(one, {**one, "counters": {**one["counters"], "step": 13}}))
