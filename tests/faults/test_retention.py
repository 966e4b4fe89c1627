"""Whatever a run directory goes through, its last good checkpoint stays, and so does what is protected; the rest goes (F30)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.harness import ForkServer
from tests.faults.retention import MUTANTS, explore
from tests.faults.tally import TALLY


@pytest.mark.parametrize("rounds", [1, pytest.param(12, marks=[pytest.mark.faults, pytest.mark.timeout(900)])])
def test_random_lives_of_a_run_directory(server: ForkServer, scratch: Path, rounds: int) -> None:
    number = random.randrange(1 << 30) if rounds > 1 else 0  # the short one always lives the same lives
    total: dict[str, int] = {}
    for add in range(rounds):
        for what, count in server.call(explore, scratch, 10, number + add).check().items():
            total[what] = total.get(what, 0) + count
    print(f"seeds from {number}: {total}")
    assert all(total.get(what, 0) >= 3 * rounds for what in ("saves", "kills", "restarts", "damages")), total
    TALLY.add("kills in random lives", total["kills"])
    TALLY.add("corruptions", total["damages"])


@pytest.mark.parametrize("mutant", MUTANTS)
def test_control_what_pruning_forgets_is_noticed(server: ForkServer, scratch: Path, mutant: str) -> None:
    outcome = server.call(explore, scratch, 20, 0, mutant)
    assert TALLY.mutant(outcome.code == 1 and "AssertionError" in outcome.output), outcome.output
