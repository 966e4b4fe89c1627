"""The loop: it learns, it clips what it should, it survives bad updates, and looking at it changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from accel_pretrain import loop
from accel_pretrain.checkpoint import read_state
from accel_pretrain.commit import problem_with, resolve
from accel_pretrain.data import TokenBatches, Windows
from accel_pretrain.guard import Guard
from accel_pretrain.loop import due
from accel_pretrain.schedule import Cosine
from accel_pretrain.shards import open_split
from accel_pretrain.stopping import StopSignal
from accel_pretrain.validation import EvalResult
from tests.running import TINY, Train, assert_same_bits, losses, newest, rows, run_processes, stdlib_text, write_dataset

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]

# -------------------------------------------------------------------------------------------------------------- learning


def test_one_batch_is_learned_by_heart(run_train: Train, tmp_path: Path) -> None:
    text = stdlib_text(1000)[-32:]
    data = write_dataset(tmp_path / "data", text, text)  # with its end of text 33 tokens: one window
    options = ("--d_model", "64", "--lr", "1e-2", "--max_iters", "300", "--weight_decay", "0")
    assert run_train(tmp_path / "run", *options, data=data) == 0
    assert losses(tmp_path / "run")[0] > 5
    assert losses(tmp_path / "run")[-1] < 0.01
    assert rows(tmp_path / "run")[-1]["final/val_loss"] < 0.01


def test_the_loss_falls_on_real_text(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path, "--max_iters", "60", "--batch_size", "8") == 0
    assert losses(tmp_path)[0] == pytest.approx(math.log(257), abs=0.2)
    assert np.mean(losses(tmp_path)[-10:]) < 3.7
    assert rows(tmp_path)[-1]["final/val_loss"] < 3.7


@pytest.mark.parametrize("accumulation", ["1", "4"])
def test_the_rate_in_the_optimizer_is_the_schedules(
    run_train: Train, tmp_path: Path, monkeypatch: Patch, accumulation: str
) -> None:
    """One step of the schedule per update, not per micro-step."""
    used: list[list[float]] = []
    step = Guard.step

    def record(self: Guard, accelerator: Accelerator, optimizer: Any, *others: Any) -> None:
        used.append([group["lr"] for group in optimizer.param_groups])
        step(self, accelerator, optimizer, *others)

    monkeypatch.setattr(Guard, "step", record)
    options = ("--max_iters", "8", "--warmup_iters", "3", "--gradient_accumulation_steps", accumulation)
    assert run_train(tmp_path, *options) == 0
    expected = [Cosine(warmup_iters=3).lr(step, 3e-3, 8) for step in range(1, 9)]
    assert used == [[lr, lr] for lr in expected]
    assert [row["train/learning_rate"] for row in rows(tmp_path) if "train/loss" in row] == expected
    assert len(set(expected)) == 8


ONE_BY_SIXTEEN = ("--max_iters", "3", "--batch_size", "16")
FOUR_BY_FOUR = ("--max_iters", "3", "--batch_size", "4", "--gradient_accumulation_steps", "4")


def grad_norms(run_dir: Path) -> list[float]:
    return [row["train/grad_norm"] for row in rows(run_dir) if "train/grad_norm" in row]


def test_what_is_clipped_is_the_accumulated_gradient(run_train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    clipped: list[float] = []
    step = Guard.step

    def record(self: Guard, accelerator: Accelerator, optimizer: Any, *others: Any) -> None:
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        clipped.append(torch.nn.utils.get_total_norm(gradients).item())
        step(self, accelerator, optimizer, *others)

    monkeypatch.setattr(Guard, "step", record)
    for name, options in (("one", ONE_BY_SIXTEEN), ("four", FOUR_BY_FOUR)):
        assert run_train(tmp_path / name, *options, "--grad_clip", "0.25") == 0
    np.testing.assert_allclose(grad_norms(tmp_path / "four"), grad_norms(tmp_path / "one"), atol=1e-5, rtol=0)
    assert min(grad_norms(tmp_path / "one")) > 0.3
    assert clipped == pytest.approx([0.25] * 6, rel=1e-4)


def test_control_clipping_every_micro_step_would_be_noticed(run_train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    assert run_train(tmp_path / "right", *FOUR_BY_FOUR, "--grad_clip", "0.25") == 0
    backward = Accelerator.backward

    def backward_and_clip(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        backward(self, *args, **kwargs)
        torch.nn.utils.clip_grad_norm_(self._models[0].parameters(), 0.25)

    monkeypatch.setattr(Accelerator, "backward", backward_and_clip)
    assert run_train(tmp_path / "wrong", *FOUR_BY_FOUR, "--grad_clip", "0.25") == 0
    assert np.abs(np.subtract(grad_norms(tmp_path / "wrong"), grad_norms(tmp_path / "right"))).min() > 1e-2


def test_without_clipping_the_norm_is_still_reported(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path / "none", "--max_iters", "1", "--grad_clip", "null") == 0
    assert run_train(tmp_path / "some", "--max_iters", "1", "--grad_clip", "0.25") == 0
    assert grad_norms(tmp_path / "none") == grad_norms(tmp_path / "some")


# ---------------------------------------------------------------------------------------------------------- bad updates


def poison(monkeypatch: Patch, updates: Sequence[int], what: str) -> None:
    """Make the gradient or the loss of these updates infinite."""
    clip, forward = Accelerator.clip_grad_norm_, TokenBatches.micro_batches
    update = 0

    def count(self: TokenBatches, first_sample: int) -> Any:
        nonlocal update
        update += 1
        return forward(self, first_sample)

    def clip_poisoned(self: Accelerator, parameters: Any, *args: Any) -> Any:
        if what == "gradient" and update in updates:
            parameters[3].grad.view(-1)[5] = math.inf
        return clip(self, parameters, *args)

    def sum_poisoned(run: Any, value: torch.Tensor) -> torch.Tensor:
        return value * math.inf if what == "loss" and update in updates else value

    monkeypatch.setattr(TokenBatches, "micro_batches", count)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip_poisoned)
    monkeypatch.setattr(loop, "_sum_over_processes", sum_poisoned)


EVERY_STEP = ("--checkpoint_interval", "1", "--keep_last", "null")


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_an_update_that_is_not_finite_changes_no_bit(
    run_train: Train, tmp_path: Path, monkeypatch: Patch, capsys: Capture, what: str
) -> None:
    poison(monkeypatch, [3], what)
    for last in ("3", "4"):  # amid bad updates only the end of a run saves
        assert run_train(tmp_path, "--max_iters", last, *EVERY_STEP) == 0
    two, three, four = (tmp_path / f"checkpoint_0000000{step}" for step in (2, 3, 4))
    assert_same_bits(two, three)
    with pytest.raises(AssertionError):
        assert_same_bits(three, four)
    assert [(read_state(path).step, read_state(path).samples) for path in (two, three, four)] == [(2, 8), (3, 12), (4, 16)]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Iter")]
    assert [line.endswith("Skipped: 1") for line in lines] == [False, False, True, True]
    logged = [row for row in rows(tmp_path) if "train/loss" in row]
    assert [row.get("train/skipped_updates") for row in logged] == [None, None, 1, 1]
    assert "inf" not in (tmp_path / "metrics.jsonl").read_text().lower()  # which would not be JSON


def test_ten_bad_updates_in_a_row_end_the_run(run_train: Train, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    poison(monkeypatch, range(4, 100), "gradient")
    assert run_train(tmp_path, "--max_iters", "50", *EVERY_STEP) == 6
    assert capsys.readouterr().err == (
        "error: the loss or its gradient was not finite for 10 updates in a row: the run has diverged; "
        f"{tmp_path / 'diverged_step_13.json'} says at which samples and layers; go on from the last checkpoint with a lower "
        "--lr, or with --on_spike rollback\n"
    )
    assert newest(tmp_path).name == "checkpoint_00000003"  # amid bad updates none is saved
    assert problem_with(newest(tmp_path)) is None


def test_bad_updates_that_are_not_in_a_row_do_not(run_train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    poison(monkeypatch, [step for step in range(1, 23) if step % 10], "gradient")
    assert run_train(tmp_path, "--max_iters", "23") == 0
    assert rows(tmp_path)[-2]["train/skipped_updates"] == 20


# --------------------------------------------------------------------------------------------- looking changes nothing


@pytest.mark.parametrize(
    "looking",
    [
        ("--eval_interval", "1"),
        ("--log_interval", "4"),
        ("--sample_interval", "1", "--sample_tokens", "3", "--sample_prompts", "[def, '']", "--sample_temperature", "1.5"),
        ("--checkpoint_interval", "1"),
    ],
    ids=lambda options: options[0],
)
def test_looking_changes_no_bit(run_train: Train, tmp_path: Path, looking: tuple[str, ...]) -> None:
    """Also with dropout: its masks come from the update's number, not from how much randomness was used before."""
    for name, options in (("plain", ()), ("watched", looking)):
        assert run_train(tmp_path / name, "--max_iters", "5", "--dropout", "0.1", *options) == 0
    assert_same_bits(newest(tmp_path / "plain"), newest(tmp_path / "watched"))


@pytest.mark.slow
def test_one_of_two_processes_samples_and_no_bit_changes(dataset: Path, tmp_path: Path) -> None:
    """The other one goes on, and waits at the next exchange of gradients: neither asks the other for anything meanwhile."""
    words = ["--train_data_path", str(dataset), *TINY, "--max_iters", "5", "--dropout", "0.1"]
    looking = ("--sample_interval", "2", "--sample_tokens", "40", "--sample_prompts", "[def, class]")
    for name, options in (("plain", ()), ("watched", looking)):
        done = run_processes([*words, "--checkpoint_dir", str(tmp_path / name), *options], processes=2)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Sample at iteration 4: def") == (name == "watched")
    assert_same_bits(newest(tmp_path / "plain"), newest(tmp_path / "watched"))
    assert losses(tmp_path / "plain") == losses(tmp_path / "watched")


def test_control_other_dropout_masks_change_the_bits(run_train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    assert run_train(tmp_path / "plain", "--max_iters", "2", "--dropout", "0.1") == 0
    monkeypatch.setattr(loop, "seed_dropout", lambda *position: None)
    assert run_train(tmp_path / "unseeded", "--max_iters", "2", "--dropout", "0.1") == 0
    with pytest.raises(AssertionError):
        assert_same_bits(newest(tmp_path / "plain"), newest(tmp_path / "unseeded"))


# ---------------------------------------------------------------------------------------------------------- now and then


def test_due() -> None:
    assert [step for step in range(1, 13) if due(step, 4)] == [4, 8, 12]
    assert not any(due(step, None) for step in range(1, 13))


def validation_losses(monkeypatch: Patch, found: Sequence[float]) -> None:
    """Let the evaluations of a run find these validation losses."""
    coming = iter(found)

    def fake(run: Any, which: str) -> EvalResult:
        return EvalResult(loss=next(coming) if which == "val" else 1.0, standard_error=0.0, tokens=1, bytes_per_token=None)

    monkeypatch.setattr(loop, "_validate", fake)


def kept(run_dir: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in run_dir.glob("checkpoint_*"))


@pytest.mark.parametrize(
    ("found", "best", "saved"),
    [
        ([5.0, 3.0, 4.0, 2.0, 6.0], 4, [1, 2, 4, 5]),
        ([5.0, 4.0, 3.0, 2.0, 1.0], 5, [1, 2, 3, 4, 5]),
        ([1.0, 2.0, 1.0, 2.0, 3.0], 1, [1, 5]),  # a tie is no improvement
        ([math.nan, 3.0, 2.0, math.nan, 4.0], 3, [2, 3, 5]),
        ([math.inf, 3.0, 4.0, 2.0, math.nan], 4, [2, 4, 5]),
    ],
)
def test_best_is_the_lowest_validation_loss(
    run_train: Train, tmp_path: Path, monkeypatch: Patch, found: list[float], best: int, saved: list[int]
) -> None:
    validation_losses(monkeypatch, found)
    assert run_train(tmp_path, "--max_iters", "5", "--eval_interval", "1", "--keep_last", "null") == 0
    assert resolve(tmp_path / "best").name == f"checkpoint_0000000{best}"
    assert kept(tmp_path) == saved
    assert read_state(newest(tmp_path)).best_val_loss == min(loss for loss in found if math.isfinite(loss))


def test_best_survives_a_restart(run_train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    validation_losses(monkeypatch, [2.0, 3.0, 2.5])
    assert run_train(tmp_path, "--max_iters", "1") == 0
    assert run_train(tmp_path, "--max_iters", "3", "--eval_interval", "2") == 0
    assert resolve(tmp_path / "best").name == "checkpoint_00000001"


@pytest.mark.parametrize(("keep_last", "expected"), [("1", [2, 6]), ("2", [2, 5, 6]), ("null", [1, 2, 3, 4, 5, 6])])
def test_as_many_as_asked_for_are_kept_and_the_best(
    run_train: Train, tmp_path: Path, monkeypatch: Patch, keep_last: str, expected: list[int]
) -> None:
    validation_losses(monkeypatch, [3.0, 4.0, 5.0])
    options = ("--max_iters", "6", "--checkpoint_interval", "1", "--eval_interval", "2", "--keep_last", keep_last)
    assert run_train(tmp_path, *options) == 0
    assert kept(tmp_path) == expected


def test_without_save_best_only_the_interval_counts(run_train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    validation_losses(monkeypatch, [5.0, 4.0, 3.0, 2.0])
    options = ("--max_iters", "4", "--eval_interval", "1", "--checkpoint_interval", "2", "--save_best", "false")
    assert run_train(tmp_path, *options) == 0
    assert kept(tmp_path) == [2, 4]


def test_samples_are_shown_and_recorded_and_once_more_at_the_end(run_train: Train, tmp_path: Path, capsys: Capture) -> None:
    options = ("--max_iters", "5", "--sample_interval", "2", "--sample_tokens", "3", "--sample_prompt", "def ")
    assert run_train(tmp_path, *options) == 0
    found = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in found] == [(2, "def "), (4, "def "), (5, "def ")]
    assert all(len(row["text"]) <= 3 for row in found)
    assert "Sample at iteration 4: def " in capsys.readouterr().out
    assert run_train(tmp_path / "even", *options, "--max_iters", "4") == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "even" / "samples.jsonl").read_text().splitlines()]
    assert steps == [2, 4]  # the last is not shown twice


@pytest.mark.slow
def test_samples_are_drawn_as_told(run_train: Train, tmp_path: Path) -> None:
    texts = {}
    for name, options in (("greedy", ("--sample_temperature", "0")), ("seed", ()), ("hot", ("--sample_temperature", "100"))):
        prompts = ("--sample_prompts", "[a, a]", "--sample_interval", "20", "--sample_tokens", "30")
        assert run_train(tmp_path / name, "--max_iters", "20", *prompts, *options) == 0
        texts[name] = [json.loads(line)["text"] for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
    assert all(one == other for one, other in texts.values())  # a prompt is a prompt
    assert len({one for one, _ in texts.values()}) == 3
    assert len(set(texts["greedy"][0])) < 5 < len(set(texts["hot"][0]))


def test_a_model_that_cannot_speak_costs_a_line(run_train: Train, tmp_path: Path, capsys: Capture) -> None:
    assert run_train(tmp_path, "--max_iters", "3", "--sample_interval", "1", "--init_std", "3e38") == 6
    assert "No sample at iteration 2: the model's logits are not finite" in capsys.readouterr().out
    assert not (tmp_path / "samples.jsonl").exists() or (tmp_path / "samples.jsonl").read_text() == ""


def test_the_last_evaluation_is_final(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path, "--max_iters", "4", "--eval_interval", "2") == 0
    evaluations = [row for row in rows(tmp_path) if "eval/val_loss" in row]
    assert [(row["step"], "final/val_loss" in row) for row in evaluations] == [(2, False), (4, True)]
    last = evaluations[-1]
    assert (last["final/train_loss"], last["final/val_loss"]) == (last["eval/train_loss"], last["eval/val_loss"])
    assert last["eval/perplexity"] == pytest.approx(math.exp(last["eval/val_loss"]))


def test_a_wish_to_stop_right_after_a_checkpoint(run_train: Train, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """Nothing is left to save, and yet there is something left to do."""
    answers = iter([False, False, True])
    monkeypatch.setattr(StopSignal, "agreed", lambda self: next(answers))
    assert run_train(tmp_path, "--max_iters", "5", "--checkpoint_interval", "2") == 0
    shown = capsys.readouterr().out
    assert "Stopped after update 2 of 5; the same command goes on from here" in shown
    assert "Nothing to do" not in shown
    assert kept(tmp_path) == [2]


# ------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(("sampling", "visits_all"), [("shuffle", True), ("random", False)])
def test_an_epoch_visits_every_window_once(
    run_train: Train, tmp_path: Path, monkeypatch: Patch, sampling: str, visits_all: bool
) -> None:
    for name in ("train.ids", "val.ids"):
        np.arange(24 * 32 + 1, dtype=np.uint16).tofile(tmp_path / name)  # an id says where it stands
    seen: list[int] = []
    read = TokenBatches.micro_batches

    def record(self: TokenBatches, first_sample: int) -> Any:
        batches = read(self, first_sample)
        seen.extend(int(start) for batch in batches for start in batch.inputs_BT[:, 0])
        return batches

    monkeypatch.setattr(TokenBatches, "micro_batches", record)
    options = ("--val_data_path", str(tmp_path / "val.ids"), "--vocab_size", "769", "--epochs", "1", "--sampling", sampling)
    assert run_train(tmp_path / "run", *options, "--gradient_accumulation_steps", "3", data=tmp_path / "train.ids") == 0
    assert read_state(newest(tmp_path / "run")).step == 2
    windows = Windows(open_split(tmp_path / "train.ids", "train"), 32)
    cuts = {frozenset(windows.starts_of(np.arange(24), phase).tolist()) for phase in range(32)}
    assert len(seen) == 24
    assert (frozenset(seen) in cuts) == visits_all
