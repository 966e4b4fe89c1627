"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from accel_pretrain import train
from tests.faults.tally import TALLY, Tally
from tests.running import TINY, Train, stdlib_text, write_dataset


def pytest_configure() -> None:
    """A shell lets what it starts in the background ignore Ctrl+C, and children inherit that: they must not, here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # threads of one worker would wait for those of the other


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several workers hands its figures on to the process that prints them."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["tally"] = asdict(TALLY)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    TALLY.merge(Tally(**getattr(node, "workeroutput", {}).get("tally", {})))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY.injected:
        terminalreporter.section("faults")
        for line in TALLY.lines():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = stdlib_text(60_000)
    return write_dataset(tmp_path_factory.mktemp("data") / "stdlib", text[:50_000], text[50_000:])


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    """Accelerate keeps its state for the life of a process, and srun's tasks get variables; a test must not see another's."""
    threads, variables = torch.get_num_threads(), dict(os.environ)
    yield
    if os.environ != variables:
        os.environ.clear()
        os.environ.update(variables)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.set_num_threads(threads)


@pytest.fixture
def run_train(dataset: Path) -> Train:
    """Train in this process: ``run_train(run_dir, *overrides)`` gives the exit code."""

    def run(run_dir: Path, *overrides: str, data: Path = dataset) -> int:
        try:
            return train.main(["--train_data_path", str(data), "--checkpoint_dir", str(run_dir), *TINY, *overrides])
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()

    return run
