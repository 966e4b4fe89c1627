"""The process groups beside Accelerate's own: they wait as long as it does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from accel_pretrain.peers import Peers
from accel_pretrain.runtime import TrainingConfig, build_accelerator
from accel_pretrain.session import session
from accel_pretrain.watchdog import Watchdog, patience


@pytest.fixture
def group() -> Iterator[None]:
    """A real process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    yield
    dist.destroy_process_group()


def waits(group: Any) -> float:
    """Seconds after which gloo gives up waiting for a message."""
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_saving_and_stopping_wait_as_long_as_everything_else(
    group: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = build_accelerator(TrainingConfig(hang_timeout=3600, device="cpu", cpu_threads=1), [], tmp_path)
    told: Any = SimpleNamespace(process_index=0, num_processes=2, is_local_main_process=True, init_handler=built.init_handler)
    assert waits(dist.new_group(backend="gloo")) == 1800  # as torch has it
    assert waits(Peers(told, own_group=True)._group) == 3 * 3600 + 60
    with session(built, tmp_path / "run", Watchdog()) as around:
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        assert not around.stop.agreed()
        assert waits(around.stop._control) == 3 * 3600 + 60


@pytest.mark.parametrize("hang_timeout", [0.5, 600.0, 1e5])
def test_no_watchdog_waits_longer_than_the_processes_for_each_other(hang_timeout: float) -> None:
    watchdog = Watchdog(timeout=hang_timeout)
    for phase in ("start", "first update", "update", "evaluation", "save", "rollback"):
        watchdog.enter(phase)
        assert watchdog.budget is not None
        assert watchdog.budget < patience(hang_timeout).total_seconds()
    assert patience(None).total_seconds() > 2 * 24 * 3600


def test_an_accelerator_that_was_told_nothing_has_torchs_timeout(group: None) -> None:
    alone: Any = SimpleNamespace(
        process_index=0, num_processes=2, is_local_main_process=True, init_handler=Accelerator(cpu=True).init_handler
    )
    assert waits(Peers(alone, own_group=True)._group) == 1800
