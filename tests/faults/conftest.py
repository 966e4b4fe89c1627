"""What the fault tests share: one fork server, a fast disk, and the line of figures at the end."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import ForkServer


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def _fast_disk() -> Iterator[Path]:
    """In memory, where the system has such a disk: thousands of trials are not to wait for a real one."""
    memory = "/dev/shm"
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=memory if os.access(memory, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def scratch(_fast_disk: Path) -> Iterator[Path]:
    """An empty folder on a fast disk."""
    folder = Path(tempfile.mkdtemp(dir=_fast_disk))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of damaged checkpoints need no warning each. And without Linux's /proc the harness is blind."""
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs Linux")
    caplog.set_level(logging.ERROR, logger="accel_pretrain")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shows that the others can fail belongs to both runs: the short one and the long one."""
    for item in items:
        if "test_control_" in item.name or "left_out" in item.name:
            item.add_marker(pytest.mark.controls)
