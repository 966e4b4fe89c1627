"""``accel_pretrain.curves`` and ``history``: what is read of a run, and where its rows stand."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from accel_pretrain.curves import Run, as_number, moving_median, read_runs, thinned, unit_of, without_abandoned
from accel_pretrain.errors import DataError
from accel_pretrain.history import commit, read_starts, record_start, versions
from tests.recorded import eval_row, train_row, write_run


def steps_of(rows: list[dict[str, object]]) -> list[object]:
    return [row["step"] for row in rows]


def test_rows_of_updates_that_were_done_again_are_left_out(tmp_path: Path):
    first = [train_row(2, 3.0), train_row(4, 3.0), eval_row(4, 3.0), train_row(6, 3.0), eval_row(6, 3.0)]
    again = [train_row(4, 2.0), eval_row(4, 2.0), train_row(6, 2.0)]
    kept = without_abandoned([*first, *again])
    assert steps_of(kept) == [2, 4, 4, 6]
    assert [row.get("train/loss", row.get("eval/val_loss")) for row in kept] == [3.0, 2.0, 2.0, 2.0]
    assert without_abandoned(first) == first
    (run,) = read_runs([write_run(tmp_path / "run", [*first, *again])])
    assert run.abandoned == 4


def test_what_is_no_repetition_stays():
    spikes = [{"step": 4, "spike/step": 3}, {"step": 4, "spike/step": 4}]
    rows = [train_row(2, 3.0), train_row(4, 3.0), eval_row(4, 3.0), *spikes, {"step": 2, "rollback/count": 1}]
    assert sorted(map(str, without_abandoned(rows))) == sorted(map(str, rows))


def test_hours_do_not_count_what_lies_between_starts():
    rows = [{"step": step, "time": float(at)} for step, at in ((1, 3600), (2, 7200), (3, 93600), (4, 97200))]
    starts = [{"step": 0, "time": 0.0}, {"step": 2, "time": 90000.0}]
    assert Run("run", rows, starts=starts).axis("time").tolist() == [1, 2, 3, 4]
    assert Run("run", rows).axis("time").tolist() == [0, 1, 25, 26]  # control: nobody knows of the pause


def test_without_starts_the_first_row_begins_before_itself():
    rows = [{"step": 10, "time": 1e9, "train/iter_time_ms": 360_000.0}, {"step": 20, "time": 1e9 + 3600}]
    assert Run("run", rows).axis("time").tolist() == [1, 2]


def test_hours_of_broken_times_do_not_fall():
    rows = [{"step": step, "time": at} for step, at in enumerate((5.0, None, "soon", 4.0, 10**400, 3605.0))]
    hours = Run("run", rows).axis("time")
    assert (np.diff(hours) >= 0).all()


def test_operations_are_tokens_times_what_the_run_or_its_plan_says(tmp_path: Path):
    rows = [train_row(1, 3.0), train_row(2, 3.0)]
    starts = json.dumps({"step": 0, "time": 0, "plan": {"flops_per_token": 7}}) + "\n"
    plan = json.dumps({"flops_per_token": {"total": 5}})
    told = read_runs([write_run(tmp_path / "a", rows, starts_jsonl=starts, plan_json=plan)])[0]
    planned = read_runs([write_run(tmp_path / "b", rows, plan_json=plan)])[0]
    assert told.axis("flops").tolist() == [7 * 64, 7 * 128]
    assert planned.axis("flops").tolist() == [5 * 64, 5 * 128]
    for number, text in enumerate(("", "[]", "{}", '{"flops_per_token": {"total": 0}}')):
        with pytest.raises(DataError, match="how many operations a token costs is not recorded"):
            read_runs([write_run(tmp_path / str(number), rows, plan_json=text)])[0].axis("flops")


def test_units_are_easy_to_read():
    def run(**last: float) -> list[Run]:
        return [Run("run", [{"step": 1, "time": 0.0, "tokens": 0}, {"step": 1, "time": 0.0, "tokens": 0, **last}])]

    assert unit_of(run(time=5.0 * 3600), "time") == ("Hours of training", 1)
    assert unit_of(run(time=2.0 * 3600), "time") == ("Minutes of training", 1 / 60)
    assert unit_of(run(tokens=3e10), "tokens") == ("Tokens (billions)", 1e9)
    assert unit_of(run(tokens=100), "tokens") == ("Tokens", 1)
    assert unit_of([Run("empty", [])], "tokens") == ("Tokens", 1)
    assert unit_of([], "time") == ("Minutes of training", 1 / 60)


def test_thinning_keeps_spikes_and_gaps():
    values = np.random.default_rng(0).normal(3, 0.1, 100_000)
    values[[31_234, 50_001, 77_777]] = 30, math.nan, -5
    kept = thinned(values, 3000)
    assert kept.size < 4100
    assert {0, 31_234, 50_001, 77_777, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    plain = values[:: 100_000 // 3000]
    assert plain[np.isfinite(plain)].max() < 4  # control: what every n-th row would show
    assert thinned(values[:3000], 3000).size == 3000
    assert thinned(np.full(5000, math.nan), 300).size <= 300


def test_the_median_of_a_long_run_is_quick_and_right():
    values = np.cumsum(np.random.default_rng(0).normal(size=60_000))
    values[[7, 30_000]] = math.nan
    begin = time.process_time()
    smooth = moving_median(values)
    assert time.process_time() - begin < 5  # at every row it would be half a minute
    for i in (0, 15_000, 30_000, 59_000):
        own = values[i - min(1200, i) : i + min(1200, i) + 1]
        assert smooth[i] == pytest.approx(np.nanmedian(own), abs=0.5 * float(np.nanstd(own)) + 1e-9)


@pytest.mark.parametrize("value", [None, "3", [1], math.inf, -math.inf, math.nan, 10**400])
def test_what_is_no_number_is_nan(value: object):
    assert math.isnan(as_number(value))


def test_every_start_is_recorded(tmp_path: Path):
    record_start(tmp_path, 0, "Device: cpu", {"flops_per_token": 7})
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"step": 3, "ti')
    record_start(tmp_path, 3, "Device: cpu", {"flops_per_token": 7})
    first, second = read_starts(tmp_path)
    assert (first["step"], second["step"], second["plan"]) == (0, 3, {"flops_per_token": 7})
    assert set(first["versions"]) >= {"accel_pretrain", "python", "torch", "accelerate"}
    assert first["versions"] == versions()
    assert first["git"] == commit()
    assert read_starts(tmp_path / "nowhere") == []
