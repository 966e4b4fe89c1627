"""``accel_pretrain.report``: what the page says, that nothing in it can act, and how it looks in a real browser."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from accel_pretrain import plan, report_page
from accel_pretrain.curves import Run, read_runs
from accel_pretrain.report import library, main, render
from accel_pretrain.report_facts import differences, events, hindsight, samples, state, summary
from tests import browser
from tests.browser import Browser
from tests.recorded import eval_row, lines_of, train_row, usual_rows, write_run
from tests.running import TINY, Train

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("bokeh")
needs_browser = pytest.mark.skipif(browser.MISSING is not None, reason=browser.MISSING or "")
EVIL = "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'>\"'&amp;"


class Page(HTMLParser):
    """The tags of a page, the text outside of scripts, and the data in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words, self.scripts = "", []
        self._inside: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = dict(attrs) if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is None:
            self.words += f" {data}"
        else:
            self.scripts.append((self._inside, data))


def page_of(*runs: Path) -> Page:
    return Page(render(read_runs(runs)))


# ------------------------------------------------------------------------------------------------------- what it says


def test_a_real_run_from_plan_to_report(run_train: Train, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, more = tmp_path / "run", ("--eval_interval", "2", "--sample_interval", "2", "--sample_tokens", "4")
    words = ["--train_data_path", str(dataset), "--checkpoint_dir", str(run), *TINY, "--max_iters", "6", *more]
    assert plan.main([*words, "--save", "--tokens_per_sec", "1000"]) == 0
    assert run_train(run, "--max_iters", "4", *more) == 0
    assert run_train(run, "--max_iters", "6", *more) == 0
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {run / 'report.html'}\n")
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    facts = summary(read_runs([run])[0])
    assert facts["State"] == "finished"
    assert facts["Updates"] == "6 of 6"
    assert facts["Tokens"].startswith("768, ")
    assert facts["Starts"] == "2"
    assert "±" in facts["Validation loss"]
    assert "bits per byte" in facts["Validation loss"]
    assert facts["Ran on"].startswith("Device: cpu")
    assert "torch" in facts["Versions"]
    assert [event.kind for event in events(read_runs([run])[0]) if event.kind in ("start", "end")] == ["start", "start", "end"]
    assert {step for step, _, _ in samples(read_runs([run])[0])} == {2, 4, 6}
    compared = {name: (planned, actual) for name, planned, actual, _ in hindsight(read_runs([run])[0])}
    assert compared["Parameters"][0] == compared["Parameters"][1] != "not known"
    assert compared["Tokens per update"] == ("128", "128")
    assert compared["Tokens per second"][0] == "1,000"
    for text in (*facts.values(), "model.d_model", "went on after update 4", "After update 6", "Tokens per update"):
        assert text in page.words


def test_several_runs_are_side_by_side(tmp_path: Path):
    config = "model:\n  d_model: {}\ntraining:\n  seed: 1\n"
    runs = [
        write_run(tmp_path / name, usual_rows(count), config_yaml=config.format(width))
        for name, count, width in (("short", 12, 64), ("long", 20, 128))
    ]
    page = page_of(*runs)
    assert "2 runs" in page.words
    assert " model.d_model 64 128 " in " ".join(page.words.split()).replace("Settings short long", "")
    assert "training.seed" in page.words.split("All settings")[1]
    assert "training.seed" not in page.words.split("All settings")[0]


def test_settings_that_differ_or_are_missing():
    assert differences([{"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}]) == [("b", ["2", "3"]), ("c", ["", "4"])]


def test_what_befell_a_run(tmp_path: Path):
    rows = [
        train_row(1, 3.0), train_row(2, None), train_row(3, math.nan), train_row(4, 3.0, **{"train/skipped_updates": 2}),
        {"step": 4, "time": 4.0, "tokens": 0, "spike/step": 4, "spike/loss": 9.0, "spike/grad_norm": 50.0, "spike/sigmas": 7.5},
        {"step": 4, "time": 5.0, "tokens": 0, "rollback/from_step": 9, "rollback/count": 1},
    ]  # fmt: skip
    starts = [{"step": 0, "time": 0.0, "runtime": "one GPU"}, {"step": 2, "time": 3.0, "runtime": "two GPUs"}]
    status = {"state": "failed", "reason": "diverged", "step": 9, "time": 99.0}
    run = write_run(tmp_path / "run", rows, starts_jsonl=lines_of(starts), status_json=json.dumps(status))
    (run / "diverged_step_9.json").write_text('{"reason": "nine", "step": 9}')
    (run / "hang_rank1.txt").touch()
    found = [(event.kind, event.text) for event in events(read_runs([run])[0])]
    for expected in (
        ("start", "started; one GPU"), ("start", "went on after update 2; two GPUs"),
        ("fault", "the training loss is not finite"), ("skip", "2 updates not applied (not finite, or a spike)"),
        ("skip", "spike at update 4: loss 9.0000, gradient norm 50.00, 7.5 standard deviations"),
        ("skip", "rolled back from update 9 to 4"), ("fault", "diverged_step_9.json: nine"),
        ("fault", "hang_rank1.txt: a process hung"), ("fault", "failed: diverged"),
    ):  # fmt: skip
        assert found.count(expected) == 1, (expected, found)
    assert "failed: diverged" in page_of(run).words


def test_a_run_whose_process_is_gone_is_not_running(tmp_path: Path):
    import socket

    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    status = {"state": "running", "host": socket.gethostname(), "pid": int(done.stdout)}
    run = write_run(tmp_path / "run", usual_rows(), status_json=json.dumps(status))
    assert state(read_runs([run])[0]) == "ended without a word (killed?)"
    (run / "status.json").write_text(json.dumps(status | {"pid": os.getpid()}))
    assert state(read_runs([run])[0]) == "running"


@pytest.mark.parametrize(
    "rows",
    [
        [], [train_row(1, 3.0)], [train_row(1, None)], [train_row(step, None) for step in range(1, 200)],
        [eval_row(1, 3.0)], [train_row(step, 3.0) for step in range(1, 5)], [{"step": 1}], [{"step": 0, "time": 10**400}],
        [{"step": 1, "tokens": "many", "time": "late", "train/loss": "low", "eval/val_loss": [1], "odd/metric": 3}],
    ],
    ids=["empty", "one row", "one not finite", "none finite", "only val", "no val", "a step", "endless time", "wrong types"],
)  # fmt: skip
def test_a_record_with_little_in_it_has_a_page(tmp_path: Path, rows: list[dict[str, Any]]):
    run = write_run(
        tmp_path / "läuft ☃", rows, '{"step": 4, "tra', config_yaml="[", status_json="{", samples_jsonl="{", plan_json="1"
    )
    page = page_of(run)
    assert "läuft ☃" in page.words
    assert page.tags.count("html") == 1


def test_ten_runs_have_a_page(tmp_path: Path):
    runs = [write_run(tmp_path / f"run{number}", usual_rows()) for number in range(10)]
    page = page_of(*runs)
    assert page.tags.count("input") == 11  # one for medians


# -------------------------------------------------------------------------------------------------- nothing in it acts


def evil_run(folder: Path) -> Path:
    """A run whose every text is an attempt."""
    row = {"step": 20, "prompt": EVIL, "text": EVIL}
    starts = {"step": 0, "time": 0.0, "runtime": EVIL, "versions": {EVIL: EVIL}, "git": EVIL, "plan": {"parameters": 5}}
    return write_run(
        folder / "<script>window.hacked=3<", [*usual_rows(), train_row(21, 1.0, **{"<b>$$x$$": 1.0, EVIL: 2.0})],
        samples_jsonl=json.dumps(row) + "\n", starts_jsonl=json.dumps(starts) + "\n",
        status_json=json.dumps({"state": "failed", "reason": EVIL}), config_yaml=json.dumps({"model": {EVIL: EVIL}}),
        plan_json=json.dumps({"run": {"max_iters": EVIL}}),
    )  # fmt: skip


def test_everything_from_files_is_text(tmp_path: Path):
    page = page_of(evil_run(tmp_path))
    assert [attrs.get("type") for attrs, _ in page.scripts] == ["application/json", "application/json", None, None]
    assert "img" not in page.tags
    assert "b" in page.tags  # control: of the prompts, and no other
    assert page.tags.count("b") == 1
    assert page.words.count("window.hacked=1") >= 6
    for _, script in page.scripts[:2]:
        assert "<" not in script
    json.loads(page.scripts[0][1])


def test_escaping_control():
    assert Page(f"<p>{EVIL}</p>").tags == ["p", "script", "img"]


def test_what_cannot_be_done_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run", usual_rows())
    (tmp_path / "file").touch()
    cases = {
        (): "no run given",
        (tmp_path / "nowhere",): "nowhere does not exist",
        (run, "--out", tmp_path / "file" / "report.html"): "cannot write",
        (run, "--smooth", "0"): "smooth: must be at least 1",
    }
    for words, expected in cases.items():
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n")) == (2, 1)
        assert expected in error


def test_with_another_place_to_write_nothing_in_the_run_is_touched(tmp_path: Path):
    run = write_run(tmp_path / "run", usual_rows())
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert main([str(run), "-o", str(tmp_path / "page.html")]) == 0
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert (tmp_path / "page.html").stat().st_size > 1_000_000


def test_without_bokeh_it_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run", usual_rows())
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)
    with pytest.raises(SystemExit) as stop:
        main([str(run)])
    expected = "error: a report needs bokeh: pip install 'accel_pretrain[report]'\n"
    assert (stop.value.code, capsys.readouterr().err) == (2, expected)


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with contextlib.ExitStack() as stack:
        try:
            own = stack.enter_context(browser.browser())
        except browser.Unusable as error:
            pytest.skip(str(error))
        yield own


def noisy_rows(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0).gauss
    more = {"train/peak_memory_gb": 1.5, "train/mfu": 0.4}
    rows = [train_row(step, 3 + 7 / step + draw(0, 0.05), **more) | {"time": 1e9 + 60 * step} for step in range(1, count + 1)]
    return rows + [
        eval_row(step, 3 + 7 / step, **{"eval/val_loss_standard_error": 0.1}) | {"time": 1e9 + 60 * step}
        for step in range(count // 10, count + 1, count // 10)
    ]


def opened(chromium: Browser, folder: Path, *runs: Path, dark: bool = False) -> Browser:
    page = folder / "report.html"
    page.write_text(render(read_runs(runs)), encoding="utf-8")
    chromium.open(page, dark=dark)
    return chromium


def complaints(chromium: Browser) -> list[str]:
    return [line for line in chromium.console() if not line.startswith("INFO")]


PIXELS = """
const [canvas, [r, g, b], test] = [deep("canvas")[arguments[0]], arguments[1], arguments[2] ?? null];
const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
copy.drawImage(canvas, 0, 0);
const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
let found = 0;
for (let i = 0; i < data.length; i += 4) {
  if (data[i + 3] > 200 && Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 40) found++;
}
return test === null ? found : found < test;
"""
BLUE, ORANGE = [72, 120, 168], [209, 96, 61]
PANEL = "return deep('canvas').map((own) => own.getBoundingClientRect().toJSON()).filter((box) => box.height > 200)"
RANGE = "const { x_range } = Bokeh.documents.at(-1).roots()[0].children[arguments[0]]; return [x_range.start, x_range.end]"
ENDS_AT = "return Math.abs(Bokeh.documents.at(-1).roots()[0].children[0].x_range.end / arguments[0] - 1) < 0.05"
BEGINS_AFTER = "return Bokeh.documents.at(-1).roots()[0].children[3].x_range.start > arguments[0] + 1"
CHOOSE = "const own = document.getElementById('axis'); own.value = arguments[0]; own.dispatchEvent(new Event('change'))"


def largest_canvas(chromium: Browser) -> int:
    script = "return deep('canvas').findIndex((own) => own.getBoundingClientRect().height > 200)"
    return chromium.run(script)


@needs_browser
def test_the_curves_are_drawn_and_nothing_complains(tmp_path: Path, chromium: Browser):
    opened(chromium, tmp_path, write_run(tmp_path / "run", noisy_rows(400)))
    assert complaints(chromium) == []
    assert chromium.run("return performance.getEntriesByType('resource').length") == 0
    panels = chromium.run(PANEL)
    assert len(panels) >= 6
    first = largest_canvas(chromium)
    assert chromium.run(PIXELS, first, BLUE) > 300
    assert chromium.run(PIXELS, first, ORANGE) > 100
    assert chromium.run(PIXELS, first, [0, 255, 0]) == 0  # control


@needs_browser
def test_hovering_tells_what_was_recorded(tmp_path: Path, chromium: Browser):
    rows = noisy_rows(400)
    opened(chromium, tmp_path, write_run(tmp_path / "run", rows))
    chromium.run("document.getElementById('curves').scrollIntoView()")
    box = chromium.run(PANEL)[0]
    chromium.point_at(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    chromium.wait("return deep('.bk-tooltip-content').length > 0")
    told = chromium.run("return deep('.bk-tooltip-content')[0].innerText").replace("\t", " ")
    name, update, value = (line.strip() for line in told.splitlines())
    assert name == "run"
    step = int(update.removeprefix("update:"))
    assert float(value.removeprefix("value:")) == pytest.approx(rows[step - 1]["train/loss"], abs=1e-4)
    assert complaints(chromium) == []


@needs_browser
def test_dragging_zooms_all_panels(tmp_path: Path, chromium: Browser):
    opened(chromium, tmp_path, write_run(tmp_path / "run", noisy_rows(400)))
    chromium.run("document.getElementById('curves').scrollIntoView()")
    before, box = chromium.run(RANGE, 3), chromium.run(PANEL)[0]
    left, top = box["x"] + box["width"] / 3, box["y"] + 60
    chromium.drag((left, top), (left + 100, top + 80))
    chromium.wait(BEGINS_AFTER, before[0])
    after = chromium.run(RANGE, 3)
    assert before[0] < after[0] < after[1] < before[1]
    assert after == chromium.run(RANGE, 0)
    assert complaints(chromium) == []


@needs_browser
def test_curves_over_tokens_and_hours(tmp_path: Path, chromium: Browser):
    opened(chromium, tmp_path, write_run(tmp_path / "run", noisy_rows(400)))
    label = "return Bokeh.documents.at(-1).roots()[0].children[0].below[0].axis_label"
    for axis, text, end in (
        ("tokens", "Tokens (thousands)", 25.6),
        ("time", "Hours of training", 6.65),
        ("update", "Updates", 400),
    ):
        chromium.run(CHOOSE, axis)
        chromium.wait(ENDS_AT, end)
        assert chromium.run(label) == text
    assert complaints(chromium) == []


@needs_browser
def test_runs_and_medians_can_be_hidden(tmp_path: Path, chromium: Browser):
    opened(chromium, tmp_path, *(write_run(tmp_path / name, noisy_rows(400)) for name in ("first", "second")))
    first = largest_canvas(chromium)
    both = chromium.run(PIXELS, first, ORANGE)
    assert both > 300
    chromium.run("document.querySelector('[data-run=\"1\"]').click()")
    chromium.wait(PIXELS, first, ORANGE, 1)
    assert chromium.run(PIXELS, first, BLUE) > 300
    blue = chromium.run(PIXELS, first, BLUE)
    chromium.run("document.getElementById('median').click()")
    chromium.wait(PIXELS, first, BLUE, blue)
    assert complaints(chromium) == []


@needs_browser
def test_light_and_dark_follow_the_reader(tmp_path: Path, chromium: Browser):
    opened(chromium, tmp_path, write_run(tmp_path / "run", noisy_rows(100)))
    paper = "return getComputedStyle(document.body).backgroundColor"
    first, ink = largest_canvas(chromium), ([34, 34, 34], [228, 228, 228])
    assert chromium.run(paper) == "rgb(255, 255, 255)"
    light = [chromium.run(PIXELS, first, colour) for colour in ink]
    chromium.cdp("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    chromium.wait("return getComputedStyle(document.body).backgroundColor === 'rgb(23, 25, 28)'")
    chromium.wait(PIXELS, first, ink[0], 1)
    dark = [chromium.run(PIXELS, first, colour) for colour in ink]
    assert light[0] > 50 > dark[0]
    assert dark[1] > 50
    assert complaints(chromium) == []


@needs_browser
def test_nothing_from_files_acts(tmp_path: Path, chromium: Browser):
    opened(chromium, tmp_path, evil_run(tmp_path))
    chromium.run("document.getElementById('curves').scrollIntoView()")
    box = chromium.run(PANEL)[0]
    chromium.point_at(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    chromium.wait("return deep('.bk-tooltip-content').length > 0")
    assert "window.hacked=3" in chromium.run("return deep('.bk-tooltip-content')[0].innerText")
    assert chromium.run("return window.hacked ?? null") is None
    assert complaints(chromium) == []


@needs_browser
def test_even_unescaped_the_policy_lets_nothing_act(tmp_path: Path, chromium: Browser):
    ready = "return document.readyState === 'complete'"
    (tmp_path / "with.html").write_text(report_page.page("title", [EVIL], ""))
    chromium.open(tmp_path / "with.html", ready=ready)
    assert chromium.run("return window.hacked ?? null") is None
    assert any("Content Security Policy" in line for line in complaints(chromium))
    (tmp_path / "without.html").write_text(f"<!doctype html>{EVIL}")  # control
    chromium.open(tmp_path / "without.html", ready=f"{ready} && window.hacked === 2")
    chromium.console()


@needs_browser
def test_a_run_of_100_000_rows_opens_at_once(tmp_path: Path, chromium: Browser):
    page = tmp_path / "report.html"
    page.write_text(render([Run("long", noisy_rows(100_000), tmp_path)]), encoding="utf-8")
    assert page.stat().st_size < 5e6
    chromium.open(page)
    assert chromium.run("return Number(document.body.dataset.ready)") < 5000  # milliseconds; 500 on a machine at rest
    assert complaints(chromium) == []
    assert len(library()) > 1e6  # control: the library is in it
