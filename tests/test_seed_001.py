"""Every command line of the training script that this package grew out of runs here, with only the module's name changed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel_pretrain.config import RunConfig
from accel_pretrain.schedule import Cosine
from accel_pretrain.train import main
from accel_pretrain.typed_yaml import leaves, load, parse_command_line
from tests.running import newest, reseal, rows

BASIC = r"""
python -m cs336_basics.training_together \
    --train_data_path data/TinyStoriesV2-GPT4-train.ids \
    --val_data_path data/TinyStoriesV2-GPT4-valid.ids \
    --vocab_size 10000 \
    --max_iters 10000
"""
FULL = r"""
python -m cs336_basics.training_together \
    --train_data_path data/TinyStoriesV2-GPT4-train.ids \
    --val_data_path data/TinyStoriesV2-GPT4-valid.ids \
    --vocab_size 10000 \
    --context_length 512 \
    --d_model 768 \
    --num_heads 12 \
    --d_ff 3072 \
    --num_layers 12 \
    --lr 3e-4 \
    --min_lr 3e-5 \
    --weight_decay 0.1 \
    --batch_size 32 \
    --max_iters 100000 \
    --checkpoint_dir checkpoints/my_run \
    --use_wandb \
    --wandb_project my-project
"""
RESUME = r"""
python -m cs336_basics.training_together \
    --train_data_path data/TinyStoriesV2-GPT4-train.ids \
    --val_data_path data/TinyStoriesV2-GPT4-valid.ids \
    --resume_from checkpoints/my_run/checkpoint_iter_5000.pt \
    --max_iters 20000
"""
QUICK = r"""
# Small model, short training for testing
python -m cs336_basics.training_together \
    --train_data_path data/TinyStoriesV2-GPT4-train.ids \
    --val_data_path data/TinyStoriesV2-GPT4-valid.ids \
    --vocab_size 10000 \
    --d_model 256 \
    --num_layers 4 \
    --batch_size 32 \
    --max_iters 1000
"""
PRODUCTION = r"""
# Large model with full features
python -m cs336_basics.training_together \
    --train_data_path data/TinyStoriesV2-GPT4-train.ids \
    --val_data_path data/TinyStoriesV2-GPT4-valid.ids \
    --vocab_size 10000 \
    --context_length 1024 \
    --d_model 1024 \
    --num_heads 16 \
    --d_ff 4096 \
    --num_layers 24 \
    --lr 2e-4 \
    --min_lr 2e-5 \
    --batch_size 16 \
    --max_iters 200000 \
    --checkpoint_interval 2500 \
    --eval_interval 250 \
    --checkpoint_dir checkpoints/large_model \
    --use_wandb \
    --wandb_project cs336-final \
    --wandb_run_name large-model-v1
"""
DATA = {
    "data.train_data_path": Path("data/TinyStoriesV2-GPT4-train.ids"),
    "data.val_data_path": Path("data/TinyStoriesV2-GPT4-valid.ids"),
}
MEANT: dict[str, tuple[str, dict[str, Any]]] = {
    "basic": (BASIC, {"model.vocab_size": 10_000, "training.max_iters": 10_000}),
    "full": (
        FULL,
        {
            "model.vocab_size": 10_000,
            "model.context_length": 512,
            "model.d_model": 768,
            "model.num_heads": 12,
            "model.d_ff": 3072,
            "model.num_layers": 12,
            "optimizer.lr": 3e-4,
            "schedule.min_lr": 3e-5,
            "optimizer.weight_decay": 0.1,
            "training.batch_size": 32,
            "training.max_iters": 100_000,
            "checkpoint.checkpoint_dir": Path("checkpoints/my_run"),
            "logging.use_wandb": True,
            "logging.wandb_project": "my-project",
        },
    ),
    "resume": (
        RESUME,
        {"checkpoint.resume_from": "checkpoints/my_run/checkpoint_iter_5000.pt", "training.max_iters": 20_000},
    ),
    "quick": (
        QUICK,
        {
            "model.vocab_size": 10_000,
            "model.d_model": 256,
            "model.num_layers": 4,
            "training.batch_size": 32,
            "training.max_iters": 1000,
        },
    ),
    "production": (
        PRODUCTION,
        {
            "model.vocab_size": 10_000,
            "model.context_length": 1024,
            "model.d_model": 1024,
            "model.num_heads": 16,
            "model.d_ff": 4096,
            "model.num_layers": 24,
            "optimizer.lr": 2e-4,
            "schedule.min_lr": 2e-5,
            "training.batch_size": 16,
            "training.max_iters": 200_000,
            "checkpoint.checkpoint_interval": 2500,
            "evaluation.eval_interval": 250,
            "checkpoint.checkpoint_dir": Path("checkpoints/large_model"),
            "logging.use_wandb": True,
            "logging.wandb_project": "cs336-final",
            "logging.wandb_run_name": "large-model-v1",
        },
    ),
}
DEFAULTS = {
    "vocab_size": 10_000, "context_length": 256, "d_model": 512, "num_heads": 8, "d_ff": 2048, "num_layers": 6,
    "rope_theta": 10_000.0, "lr": 6e-4, "min_lr": 6e-5, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8,
    "batch_size": 64, "max_iters": 100_000, "warmup_iters": 2000, "grad_clip": 1.0, "checkpoint_dir": Path("checkpoints"),
    "checkpoint_interval": 5000, "eval_interval": 500, "log_interval": 100, "eval_iters": 100, "resume_from": None,
    "device": "auto", "seed": 42, "use_wandb": False, "wandb_project": "transformer-lm", "wandb_run_name": None,
}  # fmt: skip
DEVIATIONS = {
    "vocab_size": None,  # the dataset's
    "max_iters": None,  # 100000, unless max_tokens or epochs say how much
    "warmup_iters": None,  # 2 % of max_iters: 2000 at 100000
    "min_lr": None,  # lr / 10: 6e-5 at 6e-4
    "resume_from": "auto",  # a run goes on when its command is typed again
}
SMALL = shlex.split(
    "--d_model 32 --num_layers 1 --num_heads 2 --d_ff 64 --batch_size 2 --context_length 16 --eval_iters 1 --max_iters 3 "
    "--device cpu --cpu_threads 1"
)


def words_of(command: str) -> list[str]:
    """What a shell makes of a command, behind ``python -m`` and the module's name."""
    python, dash_m, module, *words = shlex.split(command.replace("\\\n", " "), comments=True)
    assert (python, dash_m, module) == ("python", "-m", "cs336_basics.training_together")
    return words


def values_of(config: RunConfig) -> dict[str, Any]:
    return {
        f"{section.name}.{leaf.name}": getattr(getattr(config, section.name), leaf.name)
        for section in dataclasses.fields(config)
        for leaf in dataclasses.fields(getattr(config, section.name))
    }


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the two files of the commands, small, on a machine without wandb."""
    (tmp_path / "data").mkdir()
    random = np.random.default_rng(0)
    for split, tokens in (("train", 2000), ("valid", 200)):
        ids = random.integers(0, 10_000, tokens).astype(np.uint16)
        ids.tofile(tmp_path / "data" / f"TinyStoriesV2-GPT4-{split}.ids")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", MEANT)
def test_a_command_means_what_the_document_says(name: str) -> None:
    command, meant = MEANT[name]
    line = parse_command_line(RunConfig, words_of(command))
    assert values_of(load(RunConfig, line.config, line.overrides)) == values_of(RunConfig()) | DATA | meant


def test_the_defaults_are_the_documents_but_for_these() -> None:
    path_of = {path.rpartition(".")[2]: path for path in leaves(RunConfig)}
    ours = values_of(RunConfig())
    assert {name: ours[path_of[name]] for name in DEFAULTS} == DEFAULTS | DEVIATIONS


def test_what_is_null_comes_out_as_in_the_document() -> None:
    assert Cosine().warmup(100_000) == DEFAULTS["warmup_iters"]
    assert Cosine().lr(100_000, 6e-4, 100_000) == pytest.approx(DEFAULTS["min_lr"])
    assert Cosine().lr(2000, 6e-4, 100_000) == pytest.approx(DEFAULTS["lr"])


@pytest.mark.parametrize("name", ["basic", "full", "quick", "production"])
def test_a_command_trains(at_home: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    command, meant = MEANT[name]
    assert main([*words_of(command), *SMALL]) == 0
    run_dir = meant.get("checkpoint.checkpoint_dir", Path("checkpoints"))
    assert newest(at_home / run_dir).name == "checkpoint_00000003"
    assert rows(at_home / run_dir)[-1]["final/val_loss"] == pytest.approx(np.log(10_000), abs=0.5)
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    expected = "wandb is not installed, so it gets no metrics (pip install 'accel_pretrain[track]')"
    assert warned == ([expected] if "--use_wandb" in command else [])


def test_the_resume_command_goes_on_where_the_checkpoint_ends(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names no model: that is the checkpoint's own, and so is the run directory."""
    assert main([*words_of(FULL), *SMALL, "--max_iters", "1"]) == 0
    run_dir = at_home / "checkpoints" / "my_run"
    as_if_trained_for(5000, run_dir)
    assert main([*words_of(RESUME), "--max_iters", "5002"]) == 0
    assert "Starting training from iteration 5000..." in capsys.readouterr().out
    assert newest(run_dir).name == "checkpoint_00005002"
    assert [row["step"] for row in rows(run_dir)] == [1, 5002]


def as_if_trained_for(steps: int, run_dir: Path) -> None:
    checkpoint = newest(run_dir).rename(run_dir / f"checkpoint_{steps:08d}")
    state = checkpoint / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": steps, "optimizer_updates": steps}))
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    for moments in optimizer["state"].values():
        moments["step"].fill_(steps)
    torch.save(optimizer, checkpoint / "optimizer.bin")
    reseal(checkpoint)


def test_the_resume_command_names_the_checkpoints_that_there_are(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words_of(FULL), *SMALL]) == 0
    with pytest.raises(SystemExit):
        main(words_of(RESUME))
    complaint = capsys.readouterr().err
    assert complaint.endswith(
        "checkpoints/my_run/checkpoint_00005000 does not exist or is not a checkpoint folder; there are checkpoint_00000003\n"
    )
