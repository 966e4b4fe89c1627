"""The JSON settings of an earlier training program load as they are, and its mistakes are caught."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from accel_pretrain.config import RunConfig
from accel_pretrain.schedule import Cosine
from accel_pretrain.train import main
from accel_pretrain.typed_yaml import load
from tests.running import newest, rows

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "max_iters": 150_000,
    "warmup_steps": 1_000,
    "min_lr": 5e-4,
    "eval_iters": 500,
    "batch_size": 32,
    "block_size": 128,
    "gradient_accumulation_steps": 32,
    "device": "cuda",
    "dtype": "bfloat16",
}
SMALL = shlex.split(
    "--device cpu --cpu_threads 1 --max_iters 6 --warmup_steps 3 --eval_iters 1 --batch_size 2 --block_size 16 "
    "--gradient_accumulation_steps 4 --d_model 32 --num_layers 1 --num_heads 2 --d_ff 64 --log_interval 1"
)


def write(path: Path, **changed: Any) -> Path:
    path.write_text(json.dumps(SETTINGS | changed, indent=2))
    return path


def test_every_key_finds_its_place(tmp_path: Path) -> None:
    config = load(RunConfig, write(tmp_path / "training.json"))
    assert config.optimizer.lr == 1e-4
    assert config.training.max_iters == 150_000
    assert config.schedule.warmup_iters == 1_000
    assert isinstance(config.schedule, Cosine)
    assert config.schedule.min_lr == 5e-4
    assert config.evaluation.eval_iters == 500
    assert config.training.batch_size == 32
    assert config.model.context_length == 128
    assert config.training.gradient_accumulation_steps == 32
    assert config.training.device == "cuda"
    assert config.training.mixed_precision == "bfloat16"
    assert config.data.dtype is None  # of the token files: another thing of the same name


def test_a_smallest_rate_above_the_largest_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The document's own numbers: its learning rate would have risen until the end."""
    paths = ["--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(write(tmp_path / "training.json")), "--device", "cpu", "--cpu_threads", "1", *paths])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: schedule.min_lr: 0.0005 is above the peak optimizer.lr 0.0001; try --min_lr 1e-05\n"
    )
    assert not (tmp_path / "run").exists()


def test_corrected_it_trains(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the schedule takes one step per update, where the document's took one per micro-step."""
    file, paths = write(tmp_path / "training.json", min_lr=5e-5), ["--train_data_path", str(dataset)]
    assert main(["--config", str(file), *paths, "--checkpoint_dir", str(tmp_path / "run"), *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "Precision: bf16 (from the config)" in shown
    assert "Batch: 2 sequences x 4 micro-steps x 1 processes = 128 tokens per update" in shown
    rates = [row["train/learning_rate"] for row in rows(tmp_path / "run") if "train/loss" in row]
    assert rates == [Cosine(warmup_iters=3, min_lr=5e-5).lr(step, 1e-4, 6) for step in range(1, 7)]
    assert rates[2] == 1e-4
    assert rates[-1] == pytest.approx(5e-5)
    assert newest(tmp_path / "run").name == "checkpoint_00000006"
