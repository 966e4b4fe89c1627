"""``--preset depth=N``: its formulas by hand, who wins over it, and that its runs are runs."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel_pretrain import doctor, plan, sweep, train, tune
from accel_pretrain.config import RunConfig, Splits
from accel_pretrain.hardware import Machine
from accel_pretrain.lint import findings
from accel_pretrain.metrics import METRICS_FILE, read_metrics
from accel_pretrain.models import hollow
from accel_pretrain.outlook import look_ahead
from accel_pretrain.preset import best_batch, best_rate, depth_of, describe, evaluations, load_with, multiplying
from accel_pretrain.shards import TokenSplit
from accel_pretrain.typed_yaml import load, parse_command_line
from tests.running import REPO
from tests.test_lint import CPU, ROOMY_GPU, split


def dialled(words: str, file: Path | None = None) -> RunConfig:
    line = parse_command_line(RunConfig, words.split(), presets=True)
    return load_with(RunConfig, line.preset, file, line.overrides)


def sequences(config: RunConfig) -> int:
    assert config.training.global_batch_size is not None
    return config.training.global_batch_size


# ------------------------------------------------------------------------------------------------------------ the formulas


def test_depth_12_is_the_modern_shape():
    modern = load(RunConfig, REPO / "configs" / "modern.yaml").model
    assert dialled("--preset depth=12 --vocab_size 50257").model == dataclasses.replace(modern, vocab_size=50257)


@pytest.mark.parametrize(
    ("depth", "width", "heads", "context"),
    [(1, 64, 1, 128), (2, 128, 2, 256), (3, 192, 3, 256), (6, 384, 6, 512), (7, 448, 7, 512), (8, 512, 4, 1024),
     (26, 1664, 13, 1024)],
)  # fmt: skip
def test_shape_of_a_depth(depth: int, width: int, heads: int, context: int):
    model = dialled(f"--preset depth={depth} --vocab_size 257").model
    assert (model.num_layers, model.d_model, model.num_heads, model.context_length) == (depth, width, heads, context)
    assert model.head_width in (64, 128)


def test_tokens_are_twelve_for_each_parameter_that_multiplies():
    config = dialled("--preset depth=2 --vocab_size 257")
    by_hand = 2 * 12 * 128**2 + 257 * 128  # 4 D^2 of attention and 8 D^2 of feed-forward per layer, and the output
    assert multiplying(config.model, 257) == by_hand
    assert config.training.max_tokens == 12 * by_hand
    model = hollow(config.model, 257)
    looked_up = sum(own.numel() for name, own in model.named_parameters() if "embed" in name)
    assert by_hand == model.num_parameters() - looked_up
    tied = dialled("--preset depth=2 --vocab_size 257 --tie_embeddings true")
    assert multiplying(tied.model, 257) == by_hand, "a tied embedding multiplies, too"


def test_batch_and_rate_are_step_laws():
    # Li et al. 2025: for 10^9 parameters and 10^11 tokens, by hand: 0.58 10^6.281 and 1.79 10^(-6.417 + 3.377)
    assert best_batch(1e11) == pytest.approx(1.1077e6, rel=1e-3)
    assert best_rate(10**9, 1024, 1e11, best_batch(1e11)) == pytest.approx(1.6325e-3, rel=1e-3)
    assert best_rate(10**9, 1024, 1e11, 4 * best_batch(1e11)) == pytest.approx(2 * 1.6325e-3, rel=1e-3)
    assert best_rate(10**9, 1024, 1e11, 400 * best_batch(1e11)) == pytest.approx(4 * 1.6325e-3, rel=1e-3)
    assert best_rate(65_600, 64, 787_200, best_batch(787_200)) == pytest.approx(0.07 / 8), "Step Law has 0.043"


def test_the_rate_is_near_nanochats_at_its_own_depth_batch_and_vocabulary():
    config = dialled("--preset depth=12 --vocab_size 32768 --global_batch_size 512")
    assert sequences(config) * config.model.context_length == 2**19
    nanochats = 0.02 / (0.2 * math.sqrt(768))  # matrices move by 0.02 there, by 0.2 sqrt(width) lr here
    assert 1 < config.optimizer.lr / nanochats < 1.5


def test_evaluations_are_ten_and_take_a_sixtieth():
    assert evaluations(10_000, 128, 8, 256) == (1000, 400)
    assert evaluations(769, 8, 64, 256) == (100, 2)
    assert evaluations(769, 1, 8, 8192) == (100, 4)
    assert evaluations(10**6, 512, 64, 1024) == (5000, 100)
    long = ("depth=4 --context_length 8192", "depth=3 --context_length 4096")
    for words in ("depth=2", "depth=4", "depth=8", "depth=12", *long):
        outlook = look_ahead(dialled(f"--preset {words} --vocab_size 257"), None)
        assert outlook.eval_share is not None
        assert outlook.eval_share < 0.06
        assert outlook.plan.eval_windows is not None
        assert outlook.plan.eval_windows >= 30, "the linter asks for so many"


# ------------------------------------------------------------------------------------------------------------- who wins


def test_a_file_wins_over_the_preset_and_a_word_over_the_file(tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_text("model: {num_heads: 4, context_length: 64}\noptimizer: {lr: 3e-3}\n")
    config = dialled("--preset depth=2 --vocab_size 257 --num_heads 1", file)
    assert (config.model.num_heads, config.model.context_length, config.optimizer.lr) == (1, 64, 3e-3)
    plain = dialled("--preset depth=2 --vocab_size 257")
    assert config.training.global_batch_size == 4096 // 64
    assert plain.training.global_batch_size == 4096 // 256, "as many tokens"
    assert (config.model.qk_norm, config.optimizer.name) == (True, "muon"), "the rest is the preset's"


def test_what_follows_from_the_shape_follows_the_shape_in_force():
    wide = dialled("--preset depth=2 --vocab_size 257 --d_model 256 --num_heads 4")
    assert wide.training.max_tokens == 12 * (2 * 12 * 256**2 + 257 * 256)
    assert wide.optimizer.lr < dialled("--preset depth=2 --vocab_size 257").optimizer.lr


@pytest.mark.parametrize("words", ["--max_iters 7", "--epochs 2", "--max_tokens 1e9"])
def test_the_end_that_a_person_says_is_the_only_one(words: str):
    training = dialled(f"--preset depth=2 --vocab_size 257 {words}").training
    assert [training.max_iters, training.epochs, training.max_tokens].count(None) == 2


def test_longer_runs_take_larger_batches_and_larger_batches_higher_rates():
    usual = dialled("--preset depth=8 --vocab_size 257")
    long = dialled("--preset depth=8 --vocab_size 257 --max_tokens 100e9")
    assert sequences(long) > sequences(usual)
    four = dialled(f"--preset depth=8 --vocab_size 257 --global_batch_size {4 * sequences(usual)}")
    assert four.optimizer.lr == pytest.approx(2 * usual.optimizer.lr, rel=5e-3)


def test_micro_batches_fit_the_update_that_a_person_wants():
    own = dialled("--preset depth=2 --vocab_size 257 --batch_size 12").training
    assert (own.batch_size, own.global_batch_size) == (12, 12)
    steps = dialled("--preset depth=2 --vocab_size 257 --gradient_accumulation_steps 4").training
    assert (steps.batch_size, steps.global_batch_size) == (4, None)


@pytest.mark.parametrize(
    ("words", "processes", "micro", "together"),
    [("", 4, 4, 16), ("", 3, 4, 12), ("", 7, 2, 14), ("", 32, 1, 32), ("--batch_size 12", 2, 12, 24),
     ("--batch_size 3", 4, 3, 12), ("--global_batch_size 6", 1, 6, 6),
     ("--global_batch_size 150", 1, 50, 150), ("--global_batch_size 24", 3, 8, 24)],
)  # fmt: skip
def test_processes_share_the_update(words: str, processes: int, micro: int, together: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = dialled(f"--preset depth=2 --vocab_size 257 {words}")
    assert (config.training.batch_size, config.training.global_batch_size) == (micro, together)
    assert together % (micro * processes) == 0
    rate = best_rate(426_112, 128, 12 * 426_112, together * 256)
    assert config.optimizer.lr == float(f"{rate:.3g}")


def test_a_null_says_what_it_says_anywhere(tmp_path: Path):
    """As in a file that began as a copy of configs/reference.yaml."""
    file = tmp_path / "own.yaml"
    file.write_text("training: {max_iters: null, epochs: null, global_batch_size: null}\n")
    config = dialled("--preset depth=8 --vocab_size 257", file)
    usual = dialled("--preset depth=8 --vocab_size 257")
    assert config.training.max_tokens == usual.training.max_tokens
    assert config.training.global_batch_size is None
    share = config.training.batch_size / sequences(usual)
    assert share < 1
    assert config.optimizer.lr == pytest.approx(usual.optimizer.lr * math.sqrt(share), rel=5e-3)


def test_evaluations_follow_the_interval_and_the_end_that_a_person_says():
    often = dialled("--preset depth=12 --vocab_size 257 --eval_interval 100").evaluation
    assert (often.eval_interval, often.eval_iters) == (100, 20), "1/40 of 100 updates of 64 windows"
    short = dialled("--preset depth=12 --vocab_size 257 --max_iters 2000").evaluation
    assert short.eval_interval == 200


def test_weights_are_averaged_at_a_rate_that_stays():
    config = dialled("--preset depth=2 --vocab_size 257 --optimizer.name schedule_free")
    assert (config.schedule.name, dialled("--preset depth=2 --vocab_size 257").schedule.name) == ("constant", "linear")
    assert config.optimizer.lr == dialled("--preset depth=2 --vocab_size 257").optimizer.lr
    own = dialled("--preset depth=2 --vocab_size 257 --optimizer.name schedule_free --schedule.name wsd")
    assert own.schedule.name == "wsd"


def test_a_rate_that_is_not_the_dials_goes_with_mup():
    assert dialled("--preset depth=2 --vocab_size 257 --optimizer.name lion --mup_base_width 64").model.mup_base_width == 64
    assert dialled("--preset depth=2 --vocab_size 257 --mup_base_width 64 --lr 0.01").optimizer.lr == 0.01


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adamw8", "galore", "schedule_free"])
def test_another_optimizer_is_a_word_away(name: str):
    config = dialled(f"--preset depth=2 --vocab_size 257 --optimizer.name {name}")
    own = load(RunConfig, None, parse_command_line(RunConfig, ["--optimizer.name", name]).overrides).optimizer.lr
    assert (config.optimizer.lr == own) == (name in ("sgd", "lion"))


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "inverse_sqrt", "constant"])
def test_another_schedule_is_a_word_away(name: str):
    assert dialled(f"--preset depth=2 --vocab_size 257 --schedule.name {name}").schedule.name == name


# ---------------------------------------------------------------------------------------------------- programs and people


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--preset depth=0", "--preset depth=0: depth must be a whole number from 1 to 64"),
        ("--preset depth=x", "--preset depth=x: depth must be a whole number from 1 to 64"),
        ("--preset depth=65", "type --preset depth=4"),
        ("--preset depth", "--preset depth: depth must be"),
        ("--preset=fast", "--preset fast: no such preset; there is depth=N"),
        ("--preset", "--preset: a value must follow"),
        ("--preset depth=2", "type --train_data_path DIR (made by prep.tokenize), or --vocab_size N"),
        ("--preset depth=2 --vocab_size 257 --mup_base_width 64", "type --lr RATE, the best one at width 64, or"),
        ("--preset depth=2 --vocab_size 257 --lr fast", "optimizer.lr: expected a number"),
    ],
)
@pytest.mark.parametrize("program", [train, plan, tune, sweep, doctor])
def test_what_is_no_preset_is_one_line(program: Any, words: str, said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        program.main(words.split())
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert said in error


def test_a_bare_file_of_ids_needs_a_vocabulary(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]):
    bare = tmp_path / "ids.bin"
    bare.write_bytes((dataset / "train.bin").read_bytes())
    with pytest.raises(SystemExit, match="2"):
        train.main(["--preset", "depth=1", "--train_data_path", str(bare)])
    assert "type --vocab_size N" in capsys.readouterr().err


def test_plan_takes_it_without_data(capsys: pytest.CaptureFixture[str]):
    assert plan.main(["--preset", "depth=4", "--vocab_size", "257", "--hardware", "h100", "--world_size", "8"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("Preset depth=4: 4 layers of width 256, 4 heads, context 512; 3,211,520 parameters that multiply; ")
    assert "38,538,240 tokens, 12 for each; 16,384 tokens per update, muon with lr 0.00" in told
    assert "(4 sequences x 1 micro-steps x 8 processes)" in told


def test_a_small_run_of_the_dial_trains(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    words = ["--preset", "depth=1", "--train_data_path", str(dataset), "--max_iters", "2", "--log_interval", "1"]
    words += ["--device", "cpu", "--cpu_threads", "1", "--mixed_precision", "no"]
    assert train.main([*words, "--checkpoint_dir", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.count("Preset depth=1: 1 layer of width 64, 1 head, context 128; 65,600 parameters") == 1
    assert "2 updates; 1,024 tokens per update" in said
    rows = [row for row in read_metrics(run / METRICS_FILE) if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    recorded = load(RunConfig, run / "config.yaml")
    assert (recorded.model.d_model, recorded.optimizer.name, recorded.training.max_tokens) == (64, "muon", None)
    # A checkpoint knows what it is; with the preset in the command line again, it is the same run.
    words[words.index("2")] = "3"
    assert train.main([*words, "--checkpoint_dir", str(run), "--resume_from", "auto"]) == 0
    again = capsys.readouterr().out
    assert "Starting training from iteration 2" in again
    changed = [line for line in again.splitlines() if line.startswith("changed since")]
    assert changed == ["changed since checkpoint_00000002: training.max_iters 2 -> 3"]


def test_a_run_begins_with_the_shape_of_another_before_that_of_the_preset(tmp_path: Path, dataset: Path):
    origin = tmp_path / "origin"
    base = ["--train_data_path", str(dataset), "--device", "cpu", "--cpu_threads", "1", "--mixed_precision", "no"]
    assert train.main([*base, "--preset", "depth=1", "--max_iters", "1", "--checkpoint_dir", str(origin)]) == 0
    line = parse_command_line(
        RunConfig, ["--train_data_path", str(dataset), "--preset", "depth=3", "--init_from", str(origin)], presets=True
    )
    assert train.load_config(line).model.num_layers == 1
    # The number of token ids is known there, too, where the data does not say it.
    files = [shutil.copy(dataset / f"{name}.bin", tmp_path) for name in ("train", "val")]
    bare = ["--train_data_path", str(files[0]), "--val_data_path", str(files[1])]
    line = parse_command_line(RunConfig, [*bare, "--preset", "depth=3", "--init_from", str(origin)], presets=True)
    config = train.load_config(line)
    assert (config.model.vocab_size, config.training.max_tokens) == (257, 12 * 65_600)


# -------------------------------------------------------------------------------------------------------------- the lint


def data_for(tokens: int, vocab_size: int) -> Splits:
    """A dataset that is large enough, made up and without memory: zeros repeated."""

    def endless(count: int, name: str) -> TokenSplit:
        own = split(1, largest=vocab_size - 1, print_=name)
        return dataclasses.replace(own, files=(np.broadcast_to(np.zeros(1, dtype=np.uint16), (count,)),))

    return Splits(endless(tokens, "train"), endless(10**7, "val"))


@pytest.mark.parametrize(("vocab_size", "machine"), [(256, CPU), (50304, ROOMY_GPU)])
@pytest.mark.parametrize("depth", range(1, 27))
def test_lint_has_nothing_to_say_about_the_dial(depth: int, vocab_size: int, machine: Machine):
    config = dialled(f"--preset depth={depth} --vocab_size {vocab_size}")
    outlook = look_ahead(config, data_for(15 * 10**9, vocab_size), machine=machine)
    assert [str(finding) for finding in findings(dataclasses.replace(outlook, disk_free=10**13))] == []


def test_lint_control_sees_a_dial_that_was_turned_wrong():
    config = dialled("--preset depth=12 --vocab_size 50304 --lr 0.1")
    assert "lr_high" in {finding.kind for finding in findings(look_ahead(config, data_for(10**9, 50304)))}


def test_the_line_says_what_is_in_force(dataset: Path):
    config = dialled(f"--preset depth=2 --train_data_path {dataset} --lr 1e-3 --optimizer.name adamw --max_tokens 4260000")
    assert describe("depth=2", config).endswith(
        "426,112 parameters that multiply; 4,260,000 tokens, 10 for each; 4,096 tokens per update, adamw with lr 0.001, linear"
    )
    assert depth_of("depth=2") == 2
