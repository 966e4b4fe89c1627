"""``accel_pretrain.plot``: the picture is there, and its axes hold what was recorded."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel_pretrain.curves import is_noisy, moving_median, read_runs, short
from accel_pretrain.plot import PANELS, PlotConfig, draw, main
from tests.recorded import eval_row, train_row, usual_rows, write_run

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("matplotlib")


def lines_of(*runs: Path) -> list[list[tuple[list[float], list[float]]]]:
    """(x, y) of every line with values, per panel; drawing them all goes without a warning."""
    figure = draw(read_runs(runs))
    figure.canvas.draw()
    return [
        [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines if len(line.get_xdata())]  # type: ignore[arg-type]
        for ax in figure.axes
    ]


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", header[16:24])


def test_the_axes_hold_the_data(tmp_path: Path):
    run = write_run(tmp_path / "run", usual_rows())
    loss, rate, norm, speed = lines_of(run)
    steps = list(range(1, 21))
    assert loss == [(steps, [4 - step / 10 for step in steps]), ([10, 20], [3.1, 2.1]), ([10, 20], [3.2, 2.2])]
    assert rate == [(steps, [1e-3 / step for step in steps])]
    assert norm == [(steps, [1 + 1 / step for step in steps])]
    assert speed == [(steps, [5e4] * 20)]


def test_every_axis_says_what_it_is(tmp_path: Path):
    figure = draw(read_runs([write_run(tmp_path / "run", usual_rows())]))
    assert [ax.get_ylabel() for ax in figure.axes] == list(PANELS.values())[:4]
    assert [ax.get_xlabel() for ax in figure.axes] == ["", "", "Updates", "Updates"]
    assert figure.axes[0].get_xlim()[1] > 20


def test_one_run_is_drawn_into_its_own_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run", usual_rows())
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'plot.png'}\n"
    assert png_size(run / "plot.png") == (1500, 930)
    assert 20_000 < (run / "plot.png").stat().st_size < 500_000


def test_several_runs_are_drawn_over_one_another_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = [write_run(tmp_path / name / "run", usual_rows(count)) for name, count in (("_a$b$", 20), ("b", 12))]
    monkeypatch.chdir(tmp_path)
    assert main([str(run) for run in runs]) == 0
    assert png_size(tmp_path / "plot.png") == (1500, 930)
    assert [len(x) for x, _ in lines_of(*runs)[1]] == [20, 12]
    figure = draw(read_runs(runs))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["_a$b$/run, validation 2.200", "b/run, validation 2.200"]


@pytest.mark.parametrize("ending", ["svg", "pdf", "PNG"])
def test_the_ending_says_the_format(tmp_path: Path, ending: str):
    run = write_run(tmp_path / "run", usual_rows())
    out = tmp_path / "new" / f"loss.{ending}"
    assert main([str(run / "metrics.jsonl"), "-o", str(out)]) == 0
    assert out.read_bytes()[:4] in (b"<?xm", b"%PDF", b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "tail", "lines"),
    [
        ([], "", [0, 0, 0, 0]),
        ([eval_row(10, 3.0), eval_row(20, 2.0)], "", [2, 0, 0, 0]),
        ([train_row(5, 3.0)], "", [1, 1, 1, 1]),
        ([train_row(5, None)], "", [1, 1, 1, 1]),
        ([train_row(1, 3.0), train_row(2, None), train_row(3, 1.0)], '{"step": 4, "tra', [1, 1, 1, 1]),
    ],
    ids=["empty", "only evaluations", "one row", "one row that is not finite", "a gap and a torn line"],
)
def test_a_record_with_little_in_it_is_drawn(tmp_path: Path, rows: list[dict[str, Any]], tail: str, lines: list[int]):
    run = write_run(tmp_path / "run", rows, tail)
    assert [len(panel) for panel in lines_of(run)] == lines
    assert main([str(run)]) == 0
    assert png_size(run / "plot.png") == (1500, 930)


def test_what_is_not_finite_leaves_a_gap(tmp_path: Path):
    run = write_run(tmp_path / "run", [train_row(1, 3.0), train_row(2, None), train_row(3, 1.0)])
    ((_, values),) = lines_of(run)[0]
    assert (values[0], math.isnan(values[1]), values[2]) == (3.0, True, 1.0)


def test_a_single_point_can_be_seen(tmp_path: Path):
    one, many = (write_run(tmp_path / str(n), [train_row(s, 2.0) for s in range(1, n + 1)]) for n in (1, 9))
    assert draw(read_runs([one])).axes[1].lines[0].get_marker() == "o"
    assert draw(read_runs([many])).axes[1].lines[0].get_marker() == "None"


def test_noise_is_drawn_faint_behind_its_median(tmp_path: Path):
    noise = np.random.default_rng(0).normal(0, 0.3, 200)
    rows = [train_row(step, 4 - step / 100 + noise[step - 1]) for step in range(1, 201)]
    loss, rate, *_ = lines_of(write_run(tmp_path / "run", rows))
    assert loss[0][1] == [row["train/loss"] for row in rows]
    assert np.std(np.diff(loss[1][1])) < 0.3 * np.std(np.diff(loss[0][1]))
    assert len(rate) == 1


def test_the_median_follows_steep_ends_and_ignores_spikes_and_nan():
    values = np.exp(-np.arange(200.0) / 20)
    spiky = values.copy()
    spiky[[70, 120]] = 50, math.nan
    np.testing.assert_allclose(moving_median(values)[:190], values[:190], rtol=1e-12)
    assert np.nanmax(np.abs(moving_median(spiky) - values)) < 0.01
    assert not is_noisy(values, moving_median(values))
    assert moving_median(np.array([])).size == 0


def test_a_spike_makes_the_axis_logarithmic(tmp_path: Path):
    rows = [train_row(step, 2.0) | {"train/grad_norm": 400.0 if step == 9 else 1.0} for step in range(1, 20)]
    figure = draw(read_runs([write_run(tmp_path / "run", rows)]))
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "linear", "log", "linear"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2.5, "2.5"), (40_000, "40k"), (1.25e6, "1.25M"), (3e-4, "3e-4"), (2.5e-5, "2.5e-5"), (1e9, "1G")],
)
def test_tick_labels_are_short(value: float, text: str):
    assert short(value) == text


def test_what_cannot_be_done_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run", usual_rows())
    (tmp_path / "file").touch()
    cases = {
        (): "no run given",
        (tmp_path / "nowhere",): "nowhere does not exist",
        (tmp_path,): "metrics.jsonl does not exist",
        (run, "--out", tmp_path / "plot.txt"): "must end in .png",
        (run, "--out", tmp_path / "file" / "plot.png"): "cannot write",
        (run, "--ouT", "x.png"): "did you mean out?",
    }
    for words, expected in cases.items():
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert expected in error
        assert error.count("\n") == 1


def test_without_matplotlib_it_names_the_extra(tmp_path: Path):
    run = write_run(tmp_path / "run", usual_rows())
    code = f"import sys; sys.modules['matplotlib'] = None\nfrom accel_pretrain.plot import main\nmain([{str(run)!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ, check=False)
    assert (done.returncode, done.stderr) == (2, "error: plotting needs matplotlib: pip install 'accel_pretrain[plot]'\n")


# --------------------------------------------------------------------------------------------------- over what, and how


def timed_rows() -> list[dict[str, Any]]:
    more = {"train/peak_memory_gb": 1.5}
    rows = [train_row(step, 4 - step / 10, **more) | {"time": 1e9 + 60.0 * step} for step in range(1, 21)]
    return [*rows, eval_row(20, 2.2, **{"eval/val_loss_standard_error": 0.25}) | {"time": 1e9 + 1200}]


def drawn(run: Path, *words: str) -> list[Any]:
    """The panels that these options make."""
    options = dict(zip(words[::2], words[1::2], strict=True))
    config = PlotConfig(**{key: int(value) if value.isdigit() else value for key, value in options.items()})  # type: ignore[arg-type]
    figure = draw(read_runs([run]), config)
    figure.canvas.draw()
    return figure.axes


@pytest.mark.parametrize(
    ("x", "label", "ends"),
    [
        ("update", "Updates", (1, 20)),
        ("tokens", "Tokens", (64, 1280)),
        ("flops", "Operations (kFLOP)", (6.4, 128)),
        ("time", "Minutes of training", (1, 20)),
    ],
)
def test_runs_are_compared_by_what_is_asked_for(tmp_path: Path, x: str, label: str, ends: tuple[float, float]):
    starts = '{"step": 0, "time": 1e9, "plan": {"flops_per_token": 100}}\n'
    run = write_run(tmp_path / "run", timed_rows(), starts_jsonl=starts)
    axes = drawn(run, "x", x)
    for ax in axes:
        line = ax.lines[0].get_xdata()
        assert (line[0], line[-1]) == pytest.approx(ends)
    assert [ax.get_xlabel() for ax in axes] == ["", "", label, label, label]
    assert axes[0].get_xlim()[1] == pytest.approx(1.03 * ends[1])


def test_memory_has_a_panel_if_it_was_recorded(tmp_path: Path):
    axes = drawn(write_run(tmp_path / "run", timed_rows()))
    assert [ax.get_ylabel() for ax in axes] == list(PANELS.values())
    assert list(axes[4].lines[0].get_ydata()) == [1.5] * 20


def test_validation_has_its_standard_error(tmp_path: Path):
    with_errors = drawn(write_run(tmp_path / "a", timed_rows()))[0].collections
    (bar,) = (collection.get_segments()[0].tolist() for collection in with_errors)
    assert bar == [[20, pytest.approx(1.95)], [20, pytest.approx(2.45)]]
    without = drawn(write_run(tmp_path / "b", usual_rows()))[0].collections
    assert [len(own.get_segments()) for own in without] == [0]


def test_smoothing_is_what_was_asked_for(tmp_path: Path):
    noise = np.random.default_rng(0).normal(0, 0.3, 200)
    run = write_run(tmp_path / "run", [train_row(step, 4 + noise[step - 1]) for step in range(1, 201)])
    usual, little, much, none = (
        [line.get_ydata() for line in drawn(run, *words)[0].lines if len(line.get_ydata())]
        for words in ((), ("smooth", "3"), ("smooth", "51"), ("smooth", "1"))
    )
    assert [len(usual), len(little), len(much), len(none)] == [2, 2, 2, 1]
    assert np.std(little[1]) > np.std(usual[1]) > np.std(much[1])
    np.testing.assert_array_equal(little[1][10], np.median(4 + noise[9:12]))


def test_logarithmic_axes(tmp_path: Path):
    run = write_run(tmp_path / "run", timed_rows())
    scales = {
        log: [(ax.get_xscale(), ax.get_yscale()) for ax in drawn(run, "log", log)] for log in ("none", "x", "y", "xy", "auto")
    }
    linear, log_y = ("linear", "linear"), ("linear", "log")
    assert scales["none"] == scales["auto"] == [linear] * 5
    assert scales["x"] == [("log", "linear")] * 5
    assert scales["y"] == [log_y, log_y, log_y, linear, linear]
    assert scales["xy"] == [("log", "log")] * 3 + [("log", "linear")] * 2


def test_updates_that_were_done_again_leave_no_zigzag(tmp_path: Path):
    first, again = ([train_row(step, loss) for step in steps] for loss, steps in ((3.0, range(1, 11)), (2.0, range(6, 13))))
    ((steps, values),) = lines_of(write_run(tmp_path / "run", [*first, *again]))[0]
    assert steps == list(range(1, 13))
    assert values == [3.0] * 5 + [2.0] * 7


def test_options_that_mean_nothing_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run", usual_rows())
    cases = {
        ("--x", "epochs"): "x: ",
        ("--smooth", "0"): "smooth: must be at least 1",
        ("--x", "flops"): "how many operations a token costs is not recorded",
    }
    for words, expected in cases.items():
        with pytest.raises(SystemExit) as stop:
            main([str(run), *words])
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n")) == (2, 1)
        assert expected in error
