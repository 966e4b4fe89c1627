"""benchmarks/quality.py on tiny models: that it runs, and that its figures follow from the curves. Its times mean nothing."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from accel_pretrain.config import RunConfig
from accel_pretrain.typed_yaml import load, parse_command_line
from benchmarks import quality, quality_arms, quality_wsd
from benchmarks.quality_race import Arm, Point, best, planned, ratios, reached, words_of
from tests.running import stdlib_text, write_dataset


def curve(*losses: float, seconds: float = 10.0) -> list[Point]:
    """A point every so many seconds, with 100 tokens and 1000 operations for each."""
    return [Point(n, 100 * n, 1000.0 * n, seconds * n, loss) for n, loss in enumerate(losses, 1)]


def test_time_to_a_loss_lies_between_two_evaluations():
    assert reached(curve(4.0, 3.0, 2.0), 2.5, "seconds") == pytest.approx(25)
    assert reached(curve(4.0, 3.0, 2.0), 2.5, "tokens") == pytest.approx(250)
    assert reached(curve(4.0, 3.0), 5.0, "seconds") == 10, "nothing is known before the first evaluation"
    assert reached(curve(math.nan, 3.0), 3.0, "seconds") == 20
    assert reached(curve(4.0, 3.0, 2.6, 2.7), 2.5, "seconds") is None


def test_a_baseline_that_overfits_is_taken_at_its_best():
    seeds = [{"baseline": curve(4.0, 3.0, 3.5), "ours": curve(3.5, 2.5, seconds=4.0)}]
    assert best(seeds[0]["baseline"]).seconds == 20
    assert ratios(seeds, "ours", "baseline", "seconds") == [pytest.approx((4 + 2) / 20)]
    assert ratios(seeds, "baseline", "baseline", "tokens") == [1.0]


def test_shares_are_of_time():
    arms = [Arm("a", {}), Arm("b", {}, 0.5)]
    assert planned(arms, {"a": 10.0, "b": 30.0}, 60) == {"a": 600, "b": 900}


def test_equal_operations_are_updates_in_inverse_proportion(monkeypatch: pytest.MonkeyPatch, dataset: Path):
    """Of models as large, batches twice as large are half as many; equal updates are equal."""
    base = Arm("a", {"model.d_model": 16, "model.num_layers": 1, "model.num_heads": 1, "training.batch_size": 2})
    arms = [base, base.but("b", {"training.batch_size": 4}), replace(base, name="c", share=0.5)]
    planned_as: list[dict[str, int]] = []
    monkeypatch.setattr(quality, "speeds", lambda arms, *_: {arm.name: 10.0 for arm in arms})
    monkeypatch.setattr(quality, "race", lambda arms, updates, *_: planned_as.append(updates) or {})
    options = argparse.Namespace(minutes=1, threads=1, cpu_time=True, precision="no", seeds=1, rounds=1)
    for equal in ("flops", "updates"):
        quality.run(arms, {"data.train_data_path": dataset}, options, equal=equal)
    assert planned_as == [{"a": 600, "b": 300, "c": 300}, {"a": 600, "b": 600, "c": 300}]


def test_what_an_ingredient_does_is_the_mean_of_pairs(capsys: pytest.CaptureFixture[str]):
    """Two seeds, one of which is harder for all: that is no error of a difference."""
    arms = [Arm(name, {}) for name in ("baseline", "+ x", "recipe", "- x")]
    seeds = [
        {"baseline": curve(4.0), "+ x": curve(3.8, seconds=12), "recipe": curve(3.0), "- x": curve(3.1)},
        {"baseline": curve(5.0), "+ x": curve(4.9, seconds=12), "recipe": curve(4.0), "- x": curve(4.3)},
    ]
    found = quality.changes(seeds, arms)
    assert found["+ x"]["loss"] == (pytest.approx(-0.15), pytest.approx(0.05))
    assert found["- x"]["loss"] == (pytest.approx(0.2), pytest.approx(0.1))
    assert found["+ x"]["time"] == (pytest.approx(1.2), pytest.approx(0))
    quality.show_changes(found)
    assert " ".join(capsys.readouterr().out.split("\n")[1].split()) == "x -0.150 ± 0.050 1.20x +0.200 ± 0.100 1.00x"


@pytest.mark.parametrize("corpus", ["code", "text"])
def test_every_arm_is_a_config(corpus: str):
    configs: dict[str, RunConfig] = {}
    for arms in (quality_arms.ingredient_arms(corpus), quality_arms.tune_arms(corpus)):
        words = {arm.name: parse_command_line(RunConfig, words_of(arm.settings)).overrides for arm in arms}
        own = {name: load(RunConfig, None, overrides) for name, overrides in words.items()}
        assert len(own) == len(arms), "names are unique"
        assert len(set(map(repr, own.values()))) == len(arms), "no two are the same"
        configs |= own
    assert all(quality_arms.CHUNK % config.model.context_length == 0 for config in configs.values())
    assert configs["recipe"] != configs["- RoPE"]
    assert configs["- RoPE"].model.position == configs["baseline"].model.position == "learned"
    assert configs["+ RoPE"].model.position == configs["recipe"].model.position == "rope"
    assert configs["- optimizer"].optimizer.name == "adamw"


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    text = stdlib_text(30_000)
    write_dataset(tmp_path / "text", text[:25_000], text[25_000:])
    (tmp_path / "words.txt").write_text(text, encoding="utf-8")
    tiny = {"model.d_model": 16, "model.num_layers": 1, "model.num_heads": 1, "model.context_length": 32}
    tiny |= {"training.batch_size": 2, "model.d_ff": 32}
    monkeypatch.setitem(quality_arms.BASELINES, "text", quality_arms.BASELINES["text"] | tiny)
    monkeypatch.setitem(quality_arms.RECIPE_CHANGES, "text", {**tiny, "schedule.warmup_iters": 0})
    out, picture = tmp_path / "quality.json", tmp_path / "quality.png"
    words = ["--text", str(tmp_path / "words.txt"), "--data", str(tmp_path), "--corpus", "text", "--figure", "time"]
    words += ["--minutes", "0.01", "--seeds", "1", "--threads", "1", "--cpu_time", "--rounds", "3", "--shares", "1.5"]
    quality.main([*words, "--precision", "no", "--out", str(out), "--plot", str(picture)])
    document = json.loads(out.read_text())
    (figure,) = document["figures"]
    assert document["time_ratio"] == figure["time_ratio"]
    curves = figure["curves"][0]
    assert [len(points) for points in curves.values()] == [3, 3]
    for name in ("baseline", "recipe 1.5"):
        losses = [point["loss"] for point in curves[name]]
        assert losses[-1] < losses[0] < 5.7, "it learns"
    assert figure["rows"]["baseline"]["seconds_ratio"][0] == 1
    assert picture.stat().st_size > 1000
    assert "time to the same loss" in capsys.readouterr().out


@pytest.mark.slow
def test_branches_of_a_wsd_run_are_compared_with_cosine_runs(tmp_path: Path):
    text = stdlib_text(30_000)
    write_dataset(tmp_path / "data", text[:25_000], text[25_000:])
    shape = {"model.d_model": 16, "model.num_layers": 1, "model.num_heads": 1, "model.context_length": 32, "model.d_ff": 32}
    arm = Arm("tiny", {**shape, "training.batch_size": 2, "optimizer.lr": 1e-2})
    options = argparse.Namespace(threads=1, precision="no", minutes=0.01, seeds=1)
    found = quality_wsd.compare(arm, {"data.train_data_path": tmp_path / "data"}, options)
    updates = [horizon["updates"] for horizon in found["horizons"]]
    assert updates == [updates[0], 2 * updates[0], 3 * updates[0]]
    losses = [horizon[way][0] for way in ("cosine", "wsd") for horizon in found["horizons"]]
    assert all(1 < loss < 5.7 for loss in losses)
    assert len(set(losses)) == 6, "no run is another's"
