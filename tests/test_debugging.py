"""The flags that look into a run: what they find is there, and what only looks changes no bit."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from accel_pretrain import plot, train
from accel_pretrain.aids import DebugConfig
from accel_pretrain.curves import read_runs
from accel_pretrain.errors import ConfigError
from accel_pretrain.histograms import histogram_of
from accel_pretrain.inspection import part_of
from accel_pretrain.layer_maps import draw_layers, layer_map
from accel_pretrain.models.transformer import FeedForward
from accel_pretrain.one_batch import lowest_loss
from tests.running import REPO, TINY, Train, assert_same_bits, environment, launch, losses, newest, rows, run_processes

LOOKING = ["--inspect_interval", "2", "--inspect_histograms", "all", "--trackers", "[tensorboard]"]


# ------------------------------------------------------------------------------------------------------------ one batch


def test_one_batch_is_learned_by_heart_and_is_no_beginning_of_another_run(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--overfit_one_batch", "--max_iters", "80", "--lr", "2e-2", "--weight_decay", "0")
    assert run_train(tmp_path, *words) == 0
    shown = capsys.readouterr().out
    assert "Every update sees the same 4 sequences" in shown
    assert "One batch: memorised" in shown
    last = rows(tmp_path)[-1]
    assert last["overfit/lowest_loss"] <= last["overfit/loss"] < 0.1 + last["overfit/lowest_loss"]
    assert losses(tmp_path)[-1] < 0.2 < losses(tmp_path)[0]
    assert run_train(tmp_path, "--max_iters", "90", "--resume_from", "auto") == 2
    assert "debug.overfit_one_batch: checkpoint_00000080 has True, this config says False" in capsys.readouterr().err
    assert run_train(tmp_path, *words, "--max_iters", "81", "--resume_from", "auto") == 0


def test_one_batch_that_cannot_be_learned_is_said_to_be_so(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(tmp_path, "--overfit_one_batch", "--max_iters", "10", "--lr", "1e-6") == 0
    assert "One batch: NOT memorised (its loss is 5." in capsys.readouterr().out


def test_the_lowest_loss_counts_what_cannot_be_known() -> None:
    different = np.array([[1, 2, 3], [4, 2, 5]])
    assert lowest_loss(different) == 0
    alike = np.array([[1, 2, 3], [1, 2, 3]])
    assert lowest_loss(alike) == 0
    forked = np.array([[1, 2, 3], [1, 2, 4], [1, 7, 3], [9, 2, 3]])
    first = -(2 * math.log(2 / 3) + math.log(1 / 3))  # of 1: twice 2, once 7
    assert lowest_loss(forked) == pytest.approx((first + 2 * math.log(2)) / 8)


# ---------------------------------------------------------------------------------------------------------- inspection


def test_looking_changes_no_bit_and_parts_add_up(run_train: Train, tmp_path: Path) -> None:
    settings = ("--max_iters", "4", "--dropout", "0.1", "--gradient_accumulation_steps", "2", "--grad_clip", "0.5")
    assert run_train(tmp_path / "plain", *settings) == 0
    assert run_train(tmp_path / "seen", *settings, *LOOKING) == 0
    assert_same_bits(newest(tmp_path / "plain"), newest(tmp_path / "seen"))
    assert losses(tmp_path / "plain") == losses(tmp_path / "seen")
    looked = [row for row in rows(tmp_path / "seen") if "layers/0.mlp/grad_norm" in row]
    assert [row["step"] for row in looked] == [2, 4]
    totals = {row["step"]: row["train/grad_norm"] for row in rows(tmp_path / "seen") if "train/loss" in row}
    for row in looked:
        parts = [value for key, value in row.items() if key.endswith("grad_norm")]
        assert len(parts) == 2 * 3 + 3  # embedding, last norm, output matrix
        assert math.sqrt(sum(part**2 for part in parts)) == pytest.approx(totals[row["step"]], rel=1e-4)  # before clipping
        ratio = row["layers/1.self_attn/update_norm"] / row["layers/1.self_attn/weight_norm"]
        assert row["layers/1.self_attn/update_ratio"] == pytest.approx(ratio, rel=1e-3)
        assert 0 < row["layers/0/act_rms"] <= row["layers/0/act_max"]
        assert 0 <= row["layers/0.mlp/dead_units"] < 1
    assert len(json.dumps(looked[0])) < 3000
    assert looked[0]["tokens"] == 2 * 2 * 4 * 32
    plain = newest(tmp_path / "plain").parent
    assert not any(key.startswith("layers/") for row in rows(plain) for key in row)


def test_histograms_reach_tensorboard(run_train: Train, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_train(tmp_path, "--max_iters", "2", *LOOKING) == 0
    file = next(path for path in tmp_path.rglob("events.out.tfevents.*") if path.stat().st_size > 5000)
    events = EventAccumulator(str(file), size_guidance={"histograms": 0})
    events.Reload()
    drawn = events.Tags()["histograms"]
    assert {"parameters/layers.0.mlp.up_proj.weight", "gradients/lm_head.weight"} <= set(drawn)
    (event,) = events.Histograms("parameters/layers.0.mlp.up_proj.weight")
    assert (event.step, event.histogram_value.num) == (2, 64 * 32)


@pytest.mark.slow
def test_histograms_reach_wandb(run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ("--max_iters", "2", "--inspect_interval", "2", "--trackers", "[wandb]")
    assert run_train(tmp_path / "without", *words) == 0
    assert run_train(tmp_path / "with", *words, "--inspect_histograms", "gradients") == 0
    without, with_them = (next((tmp_path / name).rglob("*.wandb")).read_bytes() for name in ("without", "with"))
    assert b"gradients/layers.0.mlp.up_proj.weight" in with_them
    assert b"layers/0.mlp/grad_norm" in without
    assert b"gradients/" not in without
    assert b"parameters/" not in with_them


def test_layers_are_drawn_beside_the_run(run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train(tmp_path / "seen", "--max_iters", "4", "--inspect_interval", "1") == 0
    capsys.readouterr()
    assert plot.main([str(tmp_path / "seen")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/seen/plot.png and {tmp_path}/seen/plot_layers.png\n"
    assert (tmp_path / "seen" / "plot_layers.png").read_bytes().startswith(b"\x89PNG")
    (run,) = read_runs([tmp_path / "seen"])
    drawn = layer_map(run, "grad_norm")
    assert drawn is not None
    blocks = [f"{block}.{part}" for part in ("self_attn", "mlp", "norms") for block in (0, 1)]
    assert drawn.parts == ["embed_tokens", *blocks, "norm", "lm_head"]
    assert drawn.updates.tolist() == [1, 2, 3, 4]
    third = next(row for row in rows(tmp_path / "seen") if row["step"] == 3 and "layers/0/act_rms" in row)
    assert drawn.values[1, 2] == third["layers/0.self_attn/grad_norm"]
    (tmp_path / "seen" / "metrics.jsonl").write_text('{"step": 1, "time": 1, "tokens": 1, "train/loss": 5.0}\n')
    assert draw_layers(read_runs([tmp_path / "seen"])[0]) is None


def test_a_histogram_counts_every_finite_value() -> None:
    values = torch.tensor([0.0, 1.0, 1.0, 4.0, math.nan, math.inf])
    own = histogram_of(values, scale=2.0)
    expected, edges = np.histogram([0, 0.5, 0.5, 2], bins=64, range=(0, 2))
    assert own.counts.tolist() == expected.tolist()
    assert np.allclose(own.edges, edges)
    assert (own.count, own.total, own.squares) == (4, 3.0, 4.5)
    assert histogram_of(torch.full((3,), 7.0)).count == 3
    assert histogram_of(torch.empty(0)).count == 0


def test_units_that_nothing_moves_are_dead(run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    activate = FeedForward._activate

    def half(self: FeedForward, x: torch.Tensor) -> torch.Tensor:
        return activate(self, x) * (torch.arange(x.shape[-1]) < 16)  # of 64

    monkeypatch.setattr(FeedForward, "_activate", half)
    assert run_train(tmp_path, "--max_iters", "1", "--inspect_interval", "1") == 0
    row = next(row for row in rows(tmp_path) if "layers/0.mlp/dead_units" in row)
    assert (row["layers/0.mlp/dead_units"], row["layers/1.mlp/dead_units"]) == (0.75, 0.75)


def test_parts_of_the_model() -> None:
    names = (
        "layers.3.mlp.up_proj.weight",
        "layers.3.input_layernorm.weight",
        "lm_head.weight",
        "layers.11.self_attn.o.bias",
    )
    assert [part_of(name) for name in names] == ["3.mlp", "3.norms", "lm_head", "11.self_attn"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_norms_are_of_whole_tensors_on_two_processes(run_train: Train, dataset: Path, tmp_path: Path, strategy: str) -> None:
    alone, words = tmp_path / "alone", ["--max_iters", "2", "--inspect_interval", "1", "--global_batch_size", "8"]
    assert run_train(alone, *words) == 0
    paths = ["--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path / "two"), *TINY]
    histograms = ["--inspect_histograms", "all", "--trackers", "[tensorboard]", "--strategy", strategy]
    done = run_processes([*paths, *words, *histograms], 2)
    assert done.returncode == 0, done.stderr
    assert "Processes: 2" in done.stdout
    ours, theirs = ([row for row in rows(run) if "layers/0.mlp/grad_norm" in row] for run in (alone, tmp_path / "two"))
    norms = [key for key in ours[0] if key.endswith("_norm")]
    assert len(norms) == 3 * 9
    for own, other in zip(ours, theirs, strict=True):
        assert [other[key] for key in norms] == pytest.approx([own[key] for key in norms], rel=2e-3)
    assert theirs[0]["layers/0.mlp/grad_norm"] != pytest.approx(ours[1]["layers/0.mlp/grad_norm"], rel=2e-3)  # control


@pytest.mark.slow
def test_looking_at_a_compiled_run_changes_no_bit(run_train: Train, tmp_path: Path) -> None:
    settings = ("--max_iters", "4", "--compile", "true")
    assert run_train(tmp_path / "plain", *settings) == 0
    assert run_train(tmp_path / "seen", *settings, "--inspect_interval", "2") == 0
    assert_same_bits(newest(tmp_path / "plain"), newest(tmp_path / "seen"))
    assert any("layers/0/act_rms" in row for row in rows(tmp_path / "seen"))


# ----------------------------------------------------------------------------------------------------------- anomalies


class _Poison(torch.autograd.Function):
    """Passes values on as they are, and one gradient that is not a number."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
        grad = grads[0].clone()
        grad.view(-1)[0] = math.nan
        return grad


@pytest.mark.parametrize("backward", [False, True])
def test_the_first_number_that_is_not_finite_is_named(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backward: bool
) -> None:
    activate, calls = FeedForward._activate, [0]

    def poisoned(self: FeedForward, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] != 2 * 2 * 2 + 2 + 2:  # of two layers and two micro-steps: update 3, micro-step 1, layer 1
            return activate(self, x)
        return _Poison.apply(activate(self, x)) if backward else activate(self, x) * torch.inf  # type: ignore[return-value]

    monkeypatch.setattr(FeedForward, "_activate", poisoned)
    words = ("--max_iters", "5", "--gradient_accumulation_steps", "2", "--detect_anomaly")
    assert run_train(tmp_path, *words) == 6
    err = capsys.readouterr().err
    found = (
        "update 3, forward of micro-step 1: the output of layers.1.mlp.down_proj (Linear) is not finite; "
        "its input was not either, which comes from within layers.1.mlp (FeedForward)"
    )
    if backward:
        found = (
            "update 3, backward of micro-step 1: the gradient that reaches layers.1.mlp.gate_proj (Linear) is not finite; "
            "it comes from what is computed with its output"
        )
    assert err == f"error: {found}; ended by debug.detect_anomaly\n"


def test_a_run_without_anomalies_keeps_its_bits(run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--max_iters", "3", "--tie_embeddings", "true", "--dropout", "0.1", "--activation_checkpointing", "selective")
    assert run_train(tmp_path / "plain", *words) == 0
    assert run_train(tmp_path / "seen", *words, "--detect_anomaly", "--compile", "true") == 0
    assert "and not compiled" in capsys.readouterr().out
    assert_same_bits(newest(tmp_path / "plain"), newest(tmp_path / "seen"))


POISONED = """
import sys, torch
from accel_pretrain import train
from accel_pretrain.models.transformer import FeedForward
import torch.distributed as dist
activate, calls = FeedForward._activate, [0]
def poisoned(self, x):
    calls[0] += 1
    return activate(self, x) * (torch.inf if calls[0] == 4 and dist.get_rank() == 1 else 1)
FeedForward._activate = poisoned
sys.exit(train.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_an_anomaly_of_one_process_ends_all(dataset: Path, tmp_path: Path, strategy: str) -> None:
    (tmp_path / "poisoned.py").write_text(POISONED)
    launcher = [*launch([], 2)[:-2], tmp_path / "poisoned.py"]
    words = ["--train_data_path", dataset, "--checkpoint_dir", tmp_path / "run", *TINY, "--max_iters", "9", "--detect_anomaly"]
    done = subprocess.run(
        [*map(str, [*launcher, *words]), "--strategy", strategy],
        env=environment(), cwd=REPO, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert "update 2, forward of micro-step 0: the output of layers.1.mlp.down_proj (Linear) is not finite" in done.stderr
    assert "(process 1); ended by debug.detect_anomaly" in done.stderr
    assert done.stderr.count("error: ") + done.stderr.count("error (") == 1
    assert "Traceback" not in done.stderr.split("failed (exitcode")[0]  # the launcher's own
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 6


# ------------------------------------------------------------------------------------------------------------- profile


def test_a_profile_says_where_the_time_goes_and_changes_no_bit(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--max_iters", "10", "--gradient_accumulation_steps", "2")
    assert run_train(tmp_path / "plain", *words) == 0
    capsys.readouterr()
    assert run_train(tmp_path / "seen", *words, "--profile", "3") == 0
    shown = capsys.readouterr().out
    assert_same_bits(newest(tmp_path / "plain"), newest(tmp_path / "seen"))
    table = (tmp_path / "seen" / "profile" / "table.txt").read_text()
    assert table in shown
    parts = {words[0]: float(words[1]) for line in table.splitlines()[1:7] if (words := line.split())}
    assert list(parts) == ["data", "forward", "backward", "clipping", "optimizer", "other"]
    whole = float(table.split("takes ")[1].split(" ms")[0])
    assert sum(parts.values()) == pytest.approx(whole, abs=0.02)
    assert parts["backward"] > parts["data"] > 0
    assert "aten::mm" in table
    trace = json.loads((tmp_path / "seen" / "profile" / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert [names.count(part) for part in ("update 7", "update 9", "update 10", "forward", "backward")] == [1, 1, 0, 6, 6]


# ----------------------------------------------------------------------------------------------------- wrong combinations


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"profile": 0}, "profile: must be at least 1 or null, got 0"),
        ({"inspect_interval": 0}, "inspect_interval: must be at least 1 or null, got 0"),
        ({"inspect_histograms": "all"}, "inspect_histograms: all, but how often? Type --inspect_interval N too"),
        ({"profile": 2, "detect_anomaly": True}, "ask for one at a time"),
        ({"profile": 2, "inspect_interval": 5}, "ask for one at a time"),
    ],
)
def test_what_does_not_fit_together_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        DebugConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--profile 5 --max_iters 9", "debug.profile: 5 needs 3 + 2 x 5 updates, and the run has 9; type --profile 3"),
        ("--overfit_one_batch --on_spike rollback", "debug.overfit_one_batch: a rollback would leave the batch out"),
        ("--lr_find --overfit_one_batch", "--lr_find is a run of its own; leave out --overfit_one_batch"),
    ],
)
def test_flags_that_ask_for_too_much_are_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, line: str
) -> None:
    run_dir = tmp_path / "run"
    common = ("--train_data_path", dataset, "--checkpoint_dir", run_dir, *TINY)
    with pytest.raises(SystemExit) as stop:
        train.main([str(word) for word in (*common, *words.split())])
    assert stop.value.code == 2
    assert line in capsys.readouterr().err
    assert not run_dir.exists()
