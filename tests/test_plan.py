"""The command: what it prints for people and for programs, without data and for machines that are not here."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from accel_pretrain import foresight, plan
from accel_pretrain.config import RunConfig, make_plan, open_splits
from accel_pretrain.foresight import foresee
from accel_pretrain.hindsight import Forecast, Hindsight, planned_pace
from accel_pretrain.metrics import Stopwatch
from accel_pretrain.train import main as train_main
from accel_pretrain.typed_yaml import load, parse_command_line
from tests.running import REPO, TINY, Train, refused

QUICK = ["--probe_seconds", "0.05", "--device", "cpu", "--cpu_threads", "1"]
CONFIG = str(REPO / "configs" / "gpt2_124m.yaml")
SMALL = [*TINY[: TINY.index("--device")], "--log_interval", "10", "--max_iters", "200", *QUICK]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert plan.main(list(words)) == 0
    return capsys.readouterr().out


def as_object(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    return json.loads(printed(capsys, *words, "--json"))


def test_a_plan_for_people(capsys: pytest.CaptureFixture[str], dataset: Path):
    out = printed(capsys, "--train_data_path", str(dataset), *SMALL)
    rows = {line[:20].strip(): line[20:] for line in out.splitlines()}
    assert rows["Parameters"].split()[0] == "37,088"
    assert rows["Data"].startswith("50,001 tokens, read 0.512 times; vocabulary of 257")
    assert rows["Updates"] == "200 of 128 tokens (4 sequences x 1 micro-steps x 1 processes), 4 of them warm-up"
    assert rows["First loss"].startswith("about 5.5")
    assert ": fits" in rows["needed"]
    assert "from a probe of" in rows["Update"]
    assert rows["Disk"].startswith("1.3 MB for 3 checkpoints of 445.8 kB") or rows["Disk"].startswith(
        "1.3 MB for 3 checkpoints"
    )
    assert out.splitlines()[-1] == "Nothing in this config looks wrong."


def test_the_object_says_the_same(capsys: pytest.CaptureFixture[str], dataset: Path):
    found = as_object(capsys, "--train_data_path", str(dataset), *SMALL)
    assert set(found) == {"parameters", "flops_per_token", "run", "memory", "disk", "time", "findings"}
    assert found["parameters"]["total"] == sum(size for name, size in found["parameters"].items() if name != "total") == 37_088
    assert sum(found["memory"]["parts"].values()) == found["memory"]["peak"] < found["memory"]["needed"]
    assert found["time"]["tokens_per_sec"] == pytest.approx(128 / found["time"]["seconds_per_update"])
    assert found["time"]["cost"] is None
    assert found["findings"] == []


def test_without_data_for_512_machines_that_are_not_here(capsys: pytest.CaptureFixture[str]):
    words = ["--config", CONFIG, "--world_size", "512", "--global_batch_size", "8192", "--hardware", "h100"]
    found = as_object(capsys, *words, "--price_per_hour", "2")
    assert found["run"]["passes"] is None
    assert (found["run"]["accumulation"], found["run"]["precision"]) == (1, "bf16")
    assert found["time"]["sent"] == {"gradients (all-reduce)": round(2 * 511 / 512 * 4 * 124_439_808)}
    assert found["time"]["machine"] == "H100 SXM"
    assert 0 < found["time"]["exposed"] < found["time"]["communication"]
    hours = found["time"]["hours"] * (1 + found["run"]["eval_share"])
    assert found["time"]["cost"] == pytest.approx(2 * 512 * hours)
    sharded = as_object(capsys, *words, "--strategy", "fsdp2")
    assert sharded["memory"]["parts"]["optimizer"] < found["memory"]["parts"]["optimizer"] / 500
    assert sharded["memory"]["to_save"] == 12 * 124_439_808
    assert found["memory"]["to_save"] == 0
    assert "1.49 GB of main memory on the machine of rank 0" in printed(capsys, *words, "--strategy", "fsdp2")
    assert set(sharded["time"]["sent"]) == {"weights (all-gather)", "gradients (reduce-scatter)"}
    assert "of what single devices do" in printed(capsys, *words)


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["--hardware", "4090"], "no published figure for RTX 4090 of a training run on it; type --tokens_per_sec N"),
        (
            ["--hardware", "h100", "--mixed_precision", "no"],
            "no published figure for H100 SXM in float32; type --tokens_per_sec N",
        ),
        (["--probe", "false"], "type --probe, --tokens_per_sec N, or --hardware h100"),
        (
            ["--world_size", "2", *QUICK, "--d_model", "64", "--num_layers", "1", "--num_heads", "2", "--batch_size", "1"],
            "how fast devices talk here is not known; type --link BYTES_PER_SECOND",
        ),
    ],
)
def test_what_is_not_known_is_said(capsys: pytest.CaptureFixture[str], words: list[str], missing: str):
    found = as_object(capsys, "--config", CONFIG, "--device", "cpu", *words)
    assert (found["time"]["missing"], found["time"]["hours"]) == (missing, None)
    assert f"Time                not known: {missing}" in printed(capsys, "--config", CONFIG, "--device", "cpu", *words)


def test_the_loss_in_chunks_is_planned_with(capsys: pytest.CaptureFixture[str]):
    words = ["--config", CONFIG, "--hardware", "h100", "--batch_size", "64", "--global_batch_size", "512"]
    plain, chunked = (as_object(capsys, *words, *more)["memory"]["parts"] for more in ([], ["--chunked_loss", "true"]))
    assert chunked["logits"] < plain["logits"] / 2


def test_a_known_throughput_needs_no_probe(capsys: pytest.CaptureFixture[str]):
    found = as_object(capsys, "--config", CONFIG, "--tokens_per_sec", "1e6", "--world_size", "8", "--price_per_hour", "1")
    assert found["time"]["seconds_per_update"] == pytest.approx(524_288 / 1e6)
    assert found["time"]["cost"] == pytest.approx(8 * 600_000 * 0.524288 / 3600, rel=0.01)


def test_mistakes_are_listed_with_what_to_type(capsys: pytest.CaptureFixture[str]):
    out = printed(capsys, "--config", CONFIG, "--hardware", "h100", "--beta1", "0.99", "--weight_decay", "0")
    assert (
        "Probably wrong:\n  optimizer.beta1 0.99 is above beta2 0.95: they look swapped; type --beta1 0.95 --beta2 0.99" in out
    )
    assert "Worth a look:\n  optimizer.weight_decay 0: " in out


def test_the_mistakes_of_the_seeds_are_refused_or_found(capsys: pytest.CaptureFixture[str]):
    """Seed 002 has min_lr 5e-4 above lr 1e-4; others warn of warm-up beyond the end and of intervals upside down."""
    first = refused(plan.main, capsys, "--config", CONFIG, "--lr", "1e-4", "--min_lr", "5e-4")
    assert first == "error: schedule.min_lr: 0.0005 is above the peak optimizer.lr 0.0001; try --min_lr 1e-05\n"
    second = refused(plan.main, capsys, "--config", CONFIG, "--max_iters", "1000", "--warmup_iters", "2000")
    assert "2000 updates of warm-up do not fit into max_iters 1000" in second
    found = as_object(capsys, "--config", CONFIG, "--hardware", "h100", "--log_interval", "500", "--eval_interval", "100")
    assert found["findings"][0]["kind"] == "interval_order"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "abacus"], "plan.hardware: expected "),
        (["--vocab_siz", "3"], "vocab_siz: there is no such key; did you mean model.vocab_size?"),
        (["--world_size", "0"], "plan.world_size: must be positive, got 0"),
        ([], "model.vocab_size: the data is not here to say; type --vocab_size N, or --train_data_path DIR"),
        (["--train_data_path", "/nowhere"], "does not exist"),
        (["--vocab_size", "99", "--epochs", "1"], "training.epochs: the data is not here"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml does not exist"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    err = refused(plan.main, capsys, *words)
    assert message in err
    assert err.count("\n") == 1


def test_train_prints_the_notices_that_plan_has(capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path):
    words = ["--train_data_path", str(dataset), *SMALL, "--beta1", "0.99", "--checkpoint_dir", str(tmp_path)]
    notice = "optimizer.beta1 0.99 is above beta2 0.95: they look swapped; type --beta1 0.95 --beta2 0.99"
    assert f"  {notice}" in printed(capsys, *words)
    own = [word for word in words if word not in ("--probe_seconds", "0.05")]
    assert train_main([*own, "--print_config"]) == 0
    assert f"notice: {notice}" in capsys.readouterr().out


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]):
    out = printed(capsys, "--help")
    assert "usage: python -m accel_pretrain.plan" in out
    assert all(key in out for key in ("world_size: 1", "price_per_hour: null", "batch_size: 64"))


def test_a_saved_plan_is_compared_with_the_run(capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path):
    words = ["--train_data_path", str(dataset), *SMALL, "--checkpoint_dir", str(tmp_path / "run"), "--log_interval", "20"]
    printed(capsys, *words, "--save")
    saved = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert saved["parameters"]["total"] == 37_088
    own = [word for word in words if word not in ("--probe_seconds", "0.05")]
    assert train_main([*own, "--max_iters", "60"]) == 0
    shown = capsys.readouterr().out.splitlines()
    speed = f"{saved['time']['tokens_per_sec']:,.0f} tokens/s"
    memory = f"{saved['memory']['peak'] / 1e6:,.1f} MB of tensors and libraries"
    before, after = [line for line in shown if line.startswith("Plan: ")], [line for line in shown if "Plan and run: " in line]
    assert before[0].startswith(f"Plan: {memory}, up to ")
    assert re.search(rf"per update, {speed}, .* in all, from plan --save$", before[1])
    assert len(before) == 2
    assert len(after) == 1
    assert re.match(
        rf"Plan and run: {speed} planned, [\d,]+ so far \([+-]\d+%\), .* to go; {memory} planned, .* at most", after[0]
    )
    order = [line[:12] for line in shown if line.startswith(("Plan", "Iter     40", "Iter     60"))]
    assert order == [before[0][:12], before[1][:12], "Iter     40 ", "Plan and run", "Iter     60 "]


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"time": {"tokens_per_sec": "x"}, "memory": {"peak": 1}}'])
def test_a_plan_that_cannot_be_read_is_no_plan(content: str | None, tmp_path: Path):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    assert planned_pace(tmp_path) is None


def test_a_run_says_how_long_it_takes_as_soon_as_it_knows(run_train: Train, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Without a saved plan: at once by a probe, where the run is so long that a probe costs nothing; else after 50 updates."""
    assert run_train(tmp_path / "a", "--max_iters", "60", "--log_interval", "60") == 0
    shown = capsys.readouterr().out
    assert "Plan: how long it takes is said after 50 updates" in shown
    assert re.search(r"^Plan and run: [\d,]+ tokens/s, [\d.]+ (ms|s) of updates to go; ", shown, re.MULTILINE)
    looking = ("--inspect_interval", "40", "--log_interval", "60")  # what it takes is not the run's
    assert run_train(tmp_path / "c", "--max_iters", "60", *looking) == 0
    shown = capsys.readouterr().out
    assert "Plan: how long it takes is not said" in shown
    assert "Plan and run" not in shown
    assert run_train(tmp_path / "b", "--max_iters", "50") == 0
    shown = capsys.readouterr().out
    assert "how long it takes" not in shown
    assert shown.count("first loss about 5.5") == 1


def test_what_a_probe_says_is_close(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    """The probe of a start: it leaves the random state alone, and its figure is the one of the plan's own probe."""
    given = ["--train_data_path", str(dataset), *TINY, "--max_iters", "60"]
    config = load(RunConfig, None, parse_command_line(RunConfig, given).overrides)
    splits = open_splits(config.data)
    plan_, accelerator = make_plan(config, splits, 1), Accelerator(cpu=True)
    assert foresee(config, plan_, splits, accelerator).tokens_per_sec is None
    monkeypatch.setitem(foresight.PROBE_FROM_FLOPS, "cpu", 0.0)
    state = torch.random.get_rng_state()
    found = foresee(config, plan_, splits, accelerator)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found.tokens_per_sec is not None
    assert found.tokens_per_sec > 0
    assert re.search(r"in all, from a probe of \d+ updates here \(4 of 4 sequences\)$", found.lines[1])


def test_the_comparison_counts_updates_and_not_pauses(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    forecast = Forecast(lines=(), max_iters=150, tokens_per_step=100, tokens_per_sec=500.0, peak=10**6)
    watch, hindsight, said = Stopwatch(), Hindsight(forecast), []
    for step in range(1, 120):
        now[0] += 100.0 if step == 1 else 0.25
        said.append(hindsight.after(step, watch, torch.device("cpu")))
        with watch.paused():
            now[0] += 7.0
    assert [at for at, line in enumerate(said, 1) if line] == [50]
    line = said[49]
    assert line is not None
    assert line.startswith(
        "Plan and run: 500 tokens/s planned, 400 so far (-20%), 25.0 s of updates to go; "
        "1.0 MB of tensors and libraries planned"
    )
    assert Hindsight().after(50, watch, torch.device("cpu")) is None
