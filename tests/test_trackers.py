"""Whatever a tracker does, the run goes on and ``metrics.jsonl`` is complete."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from accel_pretrain.errors import ConfigError
from accel_pretrain.trackers import LoggingConfig, RunLog
from tests.running import Train, newest, rows


class Recorder(GeneralTracker):
    """A tracker that remembers what it was told, and fails in the method that is named."""

    name, requires_logging_directory = "recorder", False

    def __init__(self, fails_in: str = "") -> None:
        super().__init__()
        self.fails_in = fails_in
        self.calls: list[tuple[str, Any, Any]] = []

    @property
    def tracker(self) -> Recorder:
        return self

    def _call(self, method: str, values: Any = None, step: int | None = None) -> None:
        self.calls.append((method, values, step))
        if method == self.fails_in:
            raise RuntimeError(f"no network in {method}\nand much more")

    def start(self) -> None:
        self._call("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._call("store_init_configuration", values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._call("log", values, step)

    def finish(self) -> None:
        self._call("finish")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_tracker_gets_the_config_and_the_rows_of_the_file(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(LoggingConfig, "tracker_names", [recorder])
    assert run_train(tmp_path, "--max_iters", "3", "--eval_interval", "2") == 0
    assert [method for method, _, _ in recorder.calls] == ["start", "store_init_configuration", *["log"] * 5, "finish"]
    settings = recorder.calls[1][1]
    assert (settings["training.max_iters"], settings["model.dropout"], settings["optimizer.name"]) == (3, 0.0, "adamw")
    logged = [values | {"step": step} for method, values, step in recorder.calls if method == "log"]
    assert logged == [{key: value for key, value in row.items() if key != "time"} for row in rows(tmp_path)]
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("method", ["start", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_costs_one_warning(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    recorder = Recorder(fails_in=method)
    monkeypatch.setattr(LoggingConfig, "tracker_names", [recorder])
    assert run_train(tmp_path, "--max_iters", "3") == 0
    assert warnings_of(caplog) == [f"tracker recorder failed and gets no more metrics: no network in {method}"]
    assert recorder.calls[-1][0] == method
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 3]
    assert newest(tmp_path).name == "checkpoint_00000003"


def test_a_tracker_that_is_not_installed_costs_one_warning(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    assert run_train(tmp_path, "--max_iters", "2", "--use_wandb", "--trackers", "wandb") == 0
    assert warnings_of(caplog) == ["wandb is not installed, so it gets no metrics (pip install 'accel_pretrain[track]')"]
    assert len(rows(tmp_path)) == 3


@pytest.mark.parametrize("name", ["wanbd", "json", "os.path", "no.such"])
def test_a_tracker_that_nobody_knows_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoggingConfig(trackers=(name,))
    assert caught.value.message.startswith(f"trackers: {name}: not among all, aim, ")


@pytest.mark.parametrize("name", ["log_interval", "sample_interval", "sample_tokens"])
def test_amounts_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: must be at least 1"):
        LoggingConfig(**{name: 0})  # type: ignore[arg-type]


def test_a_line_that_nobody_reads_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        log = RunLog(Accelerator(cpu=True), tmp_path, step=0, total=1)
        log.line("Iter 1")
        log.line("Iter 2")
        log.close()
