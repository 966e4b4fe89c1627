"""What a person wrote, what the machine derives from it, and everything that does not fit together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from accel_pretrain.config import Plan, RunConfig, Splits, make_plan, open_splits
from accel_pretrain.errors import ConfigError, DataError
from accel_pretrain.shards import TokenSplit
from accel_pretrain.typed_yaml import load, parse_command_line, reference, to_plain, to_yaml
from tests.running import REPO

CONFIGS = sorted(set((REPO / "configs").glob("*.yaml")) - {REPO / "configs" / "sweep.yaml"})  # that one is wandb's
PUBLISHED_SIZES = {  # with the vocabulary that they were published with
    "gpt2_124m": (50_257, 124_439_808),
    "gpt2_355m": (50_257, 354_823_168),
    "gpt2_774m": (50_257, 774_030_080),
    "gpt2_1558m": (50_257, 1_557_611_200),
    "llama3_1b": (128_256, 1_235_814_400),
    "mistral_7b": (32_000, 7_241_732_096),
    "qwen2_0.5b": (151_936, 494_032_768),
    "qwen3_0.6b": (151_936, 596_049_920),
    "gemma2_2b": (256_000, 2_614_341_888),
    "gemma3_270m": (262_144, 268_098_176),
}


def split(tokens: int = 100_000, *, largest: int = 256, vocab_size: int | None = 257, tokenizer: str = "bytes") -> TokenSplit:
    """A split in memory, of zeros; without a ``vocab_size`` like a bare file."""
    about = {"name": tokenizer, "vocab_size": vocab_size, "eot_id": largest, "fingerprint": tokenizer}
    files = (np.zeros(tokens, dtype=np.uint16),)
    return TokenSplit(source="data", files=files, max_id=largest, fingerprint="0", tokenizer=about if vocab_size else None)


def config_of(words: str, file: Path | None = None) -> RunConfig:
    return load(RunConfig, file, parse_command_line(RunConfig, words.split()).overrides)


def plan_of(words: str = "", *, train: TokenSplit | None = None, val: TokenSplit | None = None, world_size: int = 1) -> Plan:
    return make_plan(config_of(words), Splits(train or split(), val or split()), world_size)


# ------------------------------------------------------------------------------------------------- the configs we ship


def test_the_reference_is_the_code():
    path = REPO / "configs" / "reference.yaml"
    _, _, below_header = path.read_text(encoding="utf-8").partition("\n\n")
    assert below_header == reference(RunConfig)
    assert load(RunConfig, path) == RunConfig()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_plans(path: Path):
    config = load(RunConfig, path)
    vocab_size = config.model.vocab_size or 50_257
    data = split(1 << 20, largest=vocab_size - 1, vocab_size=vocab_size)
    plan = make_plan(config, Splits(data, data), 1)
    assert plan.parameters > 0
    assert plan.max_iters > plan.warmup_iters


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_shapes_have_the_published_sizes(name: str):
    vocab_size, parameters = PUBLISHED_SIZES[name]
    data = split(largest=vocab_size - 1, vocab_size=vocab_size)
    assert make_plan(load(RunConfig, REPO / "configs" / f"{name}.yaml"), Splits(data, data), 1).parameters == parameters


# ----------------------------------------------------------------------------------------------------- what is derived


@pytest.mark.parametrize(
    ("words", "max_iters", "warmup_iters"),
    [
        ("", 100_000, 2000),
        ("--max_iters 500", 500, 10),
        ("--max_iters 500 --warmup_iters 0", 500, 0),
        ("--batch_size 4 --max_tokens 1e6", 977, 19),  # 976 updates of 4 x 256 tokens fall short of a million
        ("--batch_size 4 --epochs 2", 195, 3),  # 390 windows, twice, by 4
        ("--batch_size 4 --gradient_accumulation_steps 5 --epochs 0.5", 10, 0),
    ],
)
def test_how_long_and_how_much_warm_up(words: str, max_iters: int, warmup_iters: int):
    plan = plan_of(words)
    assert (plan.max_iters, plan.warmup_iters) == (max_iters, warmup_iters)


def test_the_global_batch_does_not_depend_on_the_number_of_processes():
    plans = [plan_of("--batch_size 4 --global_batch_size 16", world_size=size) for size in (1, 2, 4)]
    assert [plan.accumulation for plan in plans] == [4, 2, 1]
    assert {plan.tokens_per_step for plan in plans} == {16 * 256}
    by_process = [plan_of("--batch_size 4", world_size=size) for size in (1, 2, 4)]  # control: without it, it does
    assert [plan.tokens_per_step for plan in by_process] == [1024, 2048, 4096]


def test_the_vocabulary_is_the_tokenizers_unless_a_larger_one_is_asked_for():
    assert plan_of().vocab_size == 257
    assert plan_of("--vocab_size 320").vocab_size == 320
    assert plan_of("--vocab_size 320", train=split(vocab_size=None)).vocab_size == 320


def test_the_plan_can_be_read_by_people():
    shown = plan_of("--max_iters 1000 --eval_interval 50").describe()
    assert "tokens_per_step      16,384" in shown


def test_the_recorded_config_loads_back_equal_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(
        "--train_data_path data/train --val_data_path ../val.ids --schedule.name wsd --optimizer.name sgd --lr 3e-5 "
        "--min_lr 1e-8 --trackers tensorboard,wandb --grad_clip null --max_tokens 3e9"
    )
    odd = dataclasses.replace(config, logging=dataclasses.replace(config.logging, sample_prompt="on: 017 # é\n'x'"))
    (tmp_path / "config.yaml").write_text(to_yaml(odd), encoding="utf-8")
    loaded = load(RunConfig, tmp_path / "config.yaml")
    data = dataclasses.replace(odd.data, train_data_path=tmp_path / "data/train", val_data_path=tmp_path.parent / "val.ids")
    saving = dataclasses.replace(odd.checkpoint, checkpoint_dir=tmp_path / "checkpoints")
    assert loaded == dataclasses.replace(odd, data=data, checkpoint=saving)
    assert to_plain(loaded) == to_plain(odd)


# ------------------------------------------------------------------------------------------- what does not fit together


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr 1e-4 --min_lr 5e-4", "schedule.min_lr: 0.0005 is above the peak optimizer.lr 0.0001; try --min_lr 1e-05"),
        (
            "--max_iters 100 --warmup_iters 100",
            "schedule.warmup_iters: 100 updates of warm-up do not fit into max_iters 100; try --warmup_iters 2",
        ),
        ("--num_heads 7", "model.num_heads: 7 heads do not divide d_model 512; try --num_heads 8"),
        ("--num_kv_heads 3", "model.num_kv_heads: 3 key/value heads do not divide num_heads 8"),
        ("--vocab_size 200", "model.vocab_size: 200 is too small, the data holds token id 256; type --vocab_size 257"),
        (
            "--batch_size 4 --global_batch_size 10",
            "training.global_batch_size: 10 is not a multiple of batch_size 4 x 1 processes = 4; "
            "try --batch_size 5, or in a new run --global_batch_size 8 or 12",
        ),
        (
            "--global_batch_size 32 --batch_size 64",
            "training.global_batch_size: 32 is not a multiple of batch_size 64 x 1 processes = 64; "
            "try --batch_size 32, or in a new run --global_batch_size 64",
        ),
        (
            "--global_batch_size 64 --gradient_accumulation_steps 1",
            "training.global_batch_size: give it or gradient_accumulation_steps, not both: each follows from the other",
        ),
        ("--max_iters 9 --epochs 1", "training.max_iters and epochs: give one of them, each says when to stop"),
        (
            "--max_iters 9 --max_tokens 9 --epochs 1",
            "training.max_iters and max_tokens and epochs: give one of them, each says when to stop",
        ),
    ],
)
def test_settings_that_contradict_each_other(words: str, message: str):
    with pytest.raises(ConfigError) as caught:
        plan_of(words)
    assert caught.value.message == message


def test_what_to_do_when_one_of_four_machines_is_lost():
    """Another batch is refused when a run goes on: other numbers of processes come first."""
    words = "--global_batch_size 32 --batch_size 4"
    with pytest.raises(ConfigError) as caught:
        plan_of(words, world_size=3)

    assert "= 12; try 1 or 2 or 4 processes, or in a new run --global_batch_size 24 or 36" in caught.value.message
    assert {count: plan_of(words, world_size=count).samples_per_step for count in (1, 2, 4)} == dict.fromkeys((1, 2, 4), 32)
    with pytest.raises(ConfigError, match=r"= 15; try --batch_size 1, or in a new run"):
        plan_of("--global_batch_size 33 --batch_size 5", world_size=3)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (
            split(vocab_size=None),
            split(vocab_size=None),
            "model.vocab_size: a bare file of ids does not say; its largest id is 256: type --vocab_size N",
        ),
        (
            split(),
            split(vocab_size=None, largest=999),
            "model.vocab_size: 257 is too small, the data holds token id 999; type --vocab_size 1000",
        ),
        (
            split(),
            split(tokenizer="gpt2"),
            "data.val_data_path: made with tokenizer gpt2, the training data with bytes: make both with one",
        ),
        (
            split(),
            split(100),
            "data: 100 tokens are too few for one window of context_length + 1 = 257; "
            "lower --context_length below 100 or prepare more text",
        ),
    ],
    ids=["no vocabulary", "ids of another vocabulary", "two tokenizers", "less than a window"],
)
def test_data_that_does_not_fit(train: TokenSplit, val: TokenSplit, message: str):
    with pytest.raises((ConfigError, DataError)) as caught:
        plan_of(train=train, val=val)
    assert caught.value.message == message


def test_a_path_is_asked_for(tmp_path: Path):
    np.zeros(1000, dtype=np.uint16).tofile(tmp_path / "train.ids")
    with pytest.raises(ConfigError) as caught:
        open_splits(config_of("").data)
    assert caught.value.message == (
        "data.train_data_path: not given; type --train_data_path DIR (a folder made by prep.tokenize)"
    )
    with pytest.raises(ConfigError) as caught:
        open_splits(config_of(f"--train_data_path {tmp_path}/train.ids").data)
    assert caught.value.message == (
        "data.val_data_path: not given; a bare file of ids has no val split: type --val_data_path FILE"
    )


def test_all_problems_come_in_one_report():
    with pytest.raises(ConfigError) as caught:
        plan_of("--min_lr 1 --vocab_size 2 --batch_size 4 --global_batch_size 10", val=split(tokenizer="gpt2"))
    keys = [problem.partition(":")[0] for problem in caught.value.problems]
    assert keys == ["training.global_batch_size", "model.vocab_size", "schedule.min_lr", "data.val_data_path"]
    assert caught.value.message.startswith("4 problems:\n  - training.global_batch_size: ")
    with pytest.raises(ConfigError) as caught:
        config_of("--num_heads 7 --max_iters 1 --epochs 1 --beta1 2 --log_interval 0")
    keys = [problem.partition(":")[0] for problem in caught.value.problems]
    assert keys == ["model.num_heads", "optimizer.beta1", "training.max_iters and epochs", "logging.log_interval"]
