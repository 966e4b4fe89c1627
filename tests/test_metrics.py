"""The record of a run: what is kept on a resume, what is left out, and what time counts."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from accel_pretrain.metrics import METRICS_FILE, MetricsFile, Stopwatch, read_metrics


def record(folder: Path, steps: range, resumed_step: int = 0) -> None:
    file = MetricsFile(folder, resumed_step)
    for step in steps:
        file.append(step, step * 10, {"train/loss": 1 / step})
    file.close()


def steps_in(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / METRICS_FILE)]


def test_a_row_has_step_time_tokens_and_metrics(tmp_path: Path):
    before = time.time()
    record(tmp_path, range(4, 5))
    (row,) = read_metrics(tmp_path / METRICS_FILE)
    assert before - 0.01 < row.pop("time") < time.time() + 0.01
    assert row == {"step": 4, "tokens": 40, "train/loss": 0.25}


def test_rows_can_be_read_while_the_run_goes_on(tmp_path: Path):
    file = MetricsFile(tmp_path, 0)
    file.append(1, 10, {"train/loss": 2.0})
    assert steps_in(tmp_path) == [1]
    file.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_costs_rows_and_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = MetricsFile(tmp_path, 0)
    (tmp_path / METRICS_FILE).symlink_to("/dev/full")
    for step in (1, 2):
        file.append(step, 10, {"train/loss": 2.0})
    (tmp_path / METRICS_FILE).unlink()
    (tmp_path / METRICS_FILE).write_text('{"step": 3, "tr')  # what fitted of a row
    file.append(4, 10, {"train/loss": 2.0})
    file.close()
    assert steps_in(tmp_path) == [4]
    assert ["No space left on device" in record.getMessage() for record in caplog.records] == [True]


def test_a_log_that_cannot_be_cut_back_is_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    record(tmp_path, range(1, 4))
    (tmp_path / f".tmp_{METRICS_FILE}").mkdir()
    record(tmp_path, range(3, 5), resumed_step=2)
    assert steps_in(tmp_path) == [1, 2, 3, 3, 4]
    assert len(caplog.records) == 1


def test_a_resume_cuts_back_to_its_checkpoint(tmp_path: Path):
    record(tmp_path, range(1, 10))
    record(tmp_path, range(7, 9), resumed_step=6)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_fresh_start_keeps_nothing(tmp_path: Path):
    record(tmp_path, range(1, 10))
    record(tmp_path, range(1, 3))
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "torn", ['{"step": 4, "train/lo', '{"step": 4', "{", "\x00\x00", '"step"', "[4]", '{"tokens": 4}', '{"step": null}']
)
def test_a_torn_line_is_left_out_and_the_next_row_is_whole(tmp_path: Path, torn: str):
    record(tmp_path, range(1, 4))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(torn)
    assert steps_in(tmp_path) == [1, 2, 3]
    record(tmp_path, range(4, 5), resumed_step=3)
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_bytes_that_are_not_text_do_not_stop_the_reader(tmp_path: Path):
    record(tmp_path, range(1, 3))
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'{"step": \xff\xfe')
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path: Path, value: float):
    file = MetricsFile(tmp_path, 0)
    file.append(1, 10, {"train/loss": value, "train/grad_norm": 2.0})
    file.close()
    text = (tmp_path / METRICS_FILE).read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["train/loss"], row["train/grad_norm"]) == (None, 2.0)


def test_the_stopwatch_counts_updates_and_not_pauses(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    watch.restart(10)
    now[0] += 3
    with watch.paused():
        now[0] += 50
    now[0] += 1
    assert watch.seconds_per_step(12) == pytest.approx(2)
    now[0] += 50
    assert watch.seconds_per_step(12) == pytest.approx(27)
    watch.restart(12)
    assert 0 < watch.seconds_per_step(12) < 1e-6  # nothing has happened, and nothing is divided by zero
