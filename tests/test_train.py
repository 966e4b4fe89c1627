"""The command as a person meets it: what it prints, what it leaves behind, and how it refuses."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from accel_pretrain import train
from accel_pretrain.config import RunConfig
from accel_pretrain.typed_yaml import leaves, load
from tests.running import REPO, TINY, Train, environment, launch, newest, rows

TRAINING = {
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/tokens_per_sec",
    "train/iter_time_ms",
    "train/peak_memory_gb",
    "train/mfu",
}
EVALUATION = {"eval/train_loss", "eval/val_loss", "eval/val_loss_standard_error", "eval/perplexity", "eval/bits_per_byte"}
FINAL = {"final/train_loss", "final/val_loss"}
CONSOLE = [
    r"Loading data with memory mapping\.\.\.",
    r"Train data size: 50,001 tokens",
    r"Validation data size: 10,001 tokens",
    r"Total parameters: [\d,]+",
    r"Trainable parameters: [\d,]+",
    r"Starting training from iteration 0\.\.\.",
    r"Device: cpu \(1 threads\) \| Processes: 1 \| Precision: fp32 .*",
    r"Batch: 4 sequences x 1 micro-steps x 1 processes = 128 tokens per update",
    r"Max iterations: 3 \(.* passes over the data\)",
    r"-{80}",
    r"Iter      1 \| Loss: 5\.\d{4} \| LR: \d\.\d\de-03 \| .*Time: [\d.]+ms \| Tokens/sec: \d+ \| MFU: [\d.]+%",
    r"Iter      2 \| Loss: .*",
    r"-{80}",
    r"Evaluating at iteration 2\.\.\.",
    r"Train loss: \d\.\d{4} \| Val loss: \d\.\d{4} ± .*",
    r"-{80}",
    r"Saved checkpoint to .*checkpoint_00000002",
    r"Iter      3 \| Loss: .*",
    r"Evaluating at iteration 3\.\.\.",
    r"Saved checkpoint to .*checkpoint_00000003",
]

Capture = pytest.CaptureFixture[str]


def everything_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_what_the_console_shows(run_train: Train, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert run_train(tmp_path, "--max_iters", "3", "--eval_interval", "2") == 0
    shown, position = capsys.readouterr().out, 0
    for line in CONSOLE:
        found = re.compile(f"^{line}$", re.MULTILINE).search(shown, position)
        assert found, f"{line} is not in, or not in this order:\n{shown[position:]}"
        position = found.end()


def test_what_a_run_records(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path, "--max_iters", "3", "--eval_interval", "2", "--log_interval", "2") == 0
    found = [(row["step"], row["tokens"], {key for key in row if "/" in key}) for row in rows(tmp_path)]
    found = [(step, tokens, {key for key in keys if not key.startswith("system/")}) for step, tokens, keys in found]
    assert found == [(2, 256, TRAINING), (2, 256, EVALUATION), (3, 384, EVALUATION | FINAL)]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "starts.jsonl",
        "latest",
        "best",
        "status.json",
        "checkpoint_00000002",
        "checkpoint_00000003",
    }
    recorded = load(RunConfig, tmp_path / "config.yaml")
    assert (recorded.training.max_iters, recorded.model.d_model, recorded.optimizer.lr) == (3, 32, 3e-3)
    assert load(RunConfig, newest(tmp_path) / "config.yaml") == recorded


def test_the_recorded_config_trains_the_same(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path / "one", "--max_iters", "2", "--dropout", "0.1") == 0
    again = ["--config", str(tmp_path / "one" / "config.yaml"), "--checkpoint_dir", str(tmp_path / "two")]
    assert train.main(again) == 0
    ours, theirs = (row["train/loss"] for row in (rows(tmp_path / "one")[1], rows(tmp_path / "two")[1]))
    assert ours == theirs


def test_print_config_shows_config_and_plan_and_does_nothing(run_train: Train, tmp_path: Path, capsys: Capture) -> None:
    assert run_train(tmp_path / "run", "--max_iters", "3", "--print_config") == 0
    shown = capsys.readouterr().out
    for line in ("  d_model: 32\n", "\n# plan\n", "max_iters            3\n", "tokens_per_step      128\n"):
        assert line in shown
    assert "\n# parameters\nembedding, matrix, head: 16 tensors, " in shown
    assert "Iter" not in shown
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_lists_every_key(word: str, capsys: Capture) -> None:
    assert train.main([word]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: accelerate launch -m accel_pretrain.train")
    last_parts = {path.rpartition(".")[2] for path in leaves(RunConfig)}
    assert [name for name in sorted(last_parts) if not re.search(rf"^[ #]+{name}:", shown, re.MULTILINE)] == []


# -------------------------------------------------------------------------------------------------------------- refusals


def add_bad_files(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("text, not ids " * 20)
    (folder / "odd.txt").write_text("text, not ids " * 20 + ".")
    (folder / "some.yaml").write_text("")
    (folder / "torn.bin").write_bytes(bytes(2001))
    np.zeros(20, dtype=np.uint16).tofile(folder / "short.bin")


BAD_INPUT = {
    "no such config": ("--config HERE/no.yaml", "no.yaml does not exist"),
    "a folder as config": ("--config HERE/empty", "empty is a directory, not a config file"),
    "a typo in a key": ("--batch_sze 4", "batch_sze: there is no such key; did you mean training.batch_size?"),
    "a word as number": ("--batch_size many", "training.batch_size: expected a whole number, got 'many'"),
    "no such data": ("--train_data_path HERE/no", "no does not exist; make a dataset with: python -m prep.tokenize SRC..."),
    "a folder without manifest": ("--train_data_path HERE/empty", "empty is not a token dataset, or prep did not finish"),
    "text as data": ("--train_data_path HERE/odd.txt", "odd.txt is text, not token ids; run: python -m prep.tokenize"),
    "text as data, by chance even": ("--val_data_path HERE/text.txt", "text.txt is text, not token ids"),
    "a torn file": ("--train_data_path HERE/torn.bin", "torn.bin: 2001 bytes are not a whole number of uint16 ids"),
    "too little to validate on": ("--val_data_path HERE/short.bin", "short.bin: 20 tokens are too few for one window"),
    "a vocabulary too small": ("--vocab_size 99", "model.vocab_size: 99 is too small, the data holds token id 256"),
    "no GPU": ("--device cuda", "training.device: cuda is not available on this machine; type --device auto"),
    "fp16 on a CPU": ("--mixed_precision fp16", "training.mixed_precision: fp16 needs a GPU; try --mixed_precision bf16"),
    "a run inside a file": ("--checkpoint_dir HERE/text.txt/run", "checkpoint.checkpoint_dir: cannot write to "),
    "a run that is a file": ("--checkpoint_dir HERE/text.txt", "checkpoint.checkpoint_dir: cannot write to "),
    "no such schedule": ("--schedule.name cosin", "schedule.name: expected cosine | linear | wsd | inverse_sqrt | constant"),
    "no such checkpoint": (
        "--config HERE/some.yaml --resume_from HERE/gone",
        "gone does not exist or is not a checkpoint folder",
    ),
    "no such tracker": ("--trackers wanbd", "logging.trackers: wanbd: not among all, aim,"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, case: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    add_bad_files(tmp_path)
    before = everything_in(tmp_path)
    words, message = BAD_INPUT[case]
    assert run_train(tmp_path / "run", *words.replace("HERE", str(tmp_path)).split()) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert message in complaint
    assert everything_in(tmp_path) == before


def test_a_refusal_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        launch([*TINY, "--train_data_path", str(tmp_path / "no")]), env=environment(), cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == "Loading data with memory mapping...\n"
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_resuming_from_a_home_folder(run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell does not expand the tilde in ``--resume_from=~/run``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_train(tmp_path / "run", "--max_iters", "1") == 0
    assert train.main(["--resume_from=~/run", "--max_iters", "2"]) == 0
    assert newest(tmp_path / "run").name == "checkpoint_00000002"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "latest").unlink(), "Resuming from"),  # the pointer is a convenience, not the truth
        (lambda run: (run / "metrics.jsonl").unlink(), "Resuming from"),
        (lambda run: (run / "config.yaml").write_text("{"), "Resuming from"),
    ],
    ids=["latest", "metrics.jsonl", "config.yaml"],
)
def test_resuming_needs_only_the_checkpoint(
    run_train: Train, tmp_path: Path, capsys: Capture, damage: Callable[[Path], object], message: str
) -> None:
    assert run_train(tmp_path, "--max_iters", "1") == 0
    damage(tmp_path)
    assert run_train(tmp_path, "--max_iters", "2") == 0
    assert message in capsys.readouterr().out
    assert newest(tmp_path).name == "checkpoint_00000002"
