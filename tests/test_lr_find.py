"""The range test suggests a rate at which training does better than at ten times more or less, and touches no run."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from accel_pretrain import lr_find
from accel_pretrain.checkpoint import TrainState
from accel_pretrain.config import RunConfig
from accel_pretrain.errors import ConfigError, PretrainError
from accel_pretrain.loop import Update, train_step
from accel_pretrain.lr_find import HIGHEST, LOWEST, evaluate, is_hopeless, refuse_what_is_another_run, report, smooth
from accel_pretrain.run import TrainingRun
from tests.running import TINY, Train, environment, launch, losses

PNG = b"\x89PNG"


def suggested(shown: str) -> str:
    (lr,) = re.findall(r"^type: --lr (\S+)$", shown, re.MULTILINE)
    return lr


def test_a_range_test_says_what_to_type_and_leaves_the_run_alone(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_train(tmp_path / "run", "--lr_find", "--lr", "5", "--warmup_iters", "3", "--max_iters", "5") == 0
    lr = suggested(capsys.readouterr().out)  # whatever rate and length the config has
    assert 3e-4 < float(lr) < 3e-1
    assert [path.name for path in tmp_path.iterdir()] == ["lr_find.png"]
    assert (tmp_path / "lr_find.png").read_bytes().startswith(PNG)


def test_documents_and_the_batch_are_those_of_the_run(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int | None, int]] = []

    def watched(run: TrainingRun, state: TrainState) -> Update | None:
        seen.append((run.module.document_id, state.samples))
        return train_step(run, state)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lr_find, "train_step", watched)
    words = ["--intra_document_masking", "true", "--batch_warmup_from", "2", "--batch_warmup_tokens", "640"]
    assert run_train(tmp_path / "run", "--lr_find", "--global_batch_size", "8", "--batch_size", "2", *words) == 0
    assert {document for document, _ in seen} == {256}
    assert [samples for _, samples in seen[:3]] == [0, 8, 16]  # that of most of the run, from the first update on


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), ("--d_model", "96", "--num_layers", "3", "--batch_size", "16")])
def test_training_at_the_suggestion_beats_ten_times_more_and_less(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shape: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_train(tmp_path / "run", "--lr_find", *shape) == 0
    lr = float(suggested(capsys.readouterr().out))
    reached = {}
    for factor in (0.1, 1, 10):
        words = ("--max_iters", "400", "--eval_interval", "1000", *shape, "--lr", str(factor * lr))
        assert run_train(tmp_path / str(factor), *words) == 0
        reached[factor] = np.mean(losses(tmp_path / str(factor))[-20:])
    assert reached[1] < min(reached[0.1], reached[10]) - 0.05, reached


@pytest.mark.slow
def test_of_a_larger_model_too_and_alike_for_every_seed(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shape = ("--d_model", "256", "--num_layers", "4", "--d_ff", "512")
    found = []
    for seed in range(3):
        assert run_train(tmp_path / "run", "--lr_find", *shape, "--seed", str(seed)) == 0
        found.append(float(suggested(capsys.readouterr().out)))
    assert max(found) < 3 * min(found), found
    reached = {}
    for factor in (0.1, 1, 10):
        words = ("--max_iters", "200", "--warmup_iters", "20", *shape, "--lr", str(factor * found[0]))
        assert run_train(tmp_path / str(factor), *words) == 0
        reached[factor] = np.mean(losses(tmp_path / str(factor))[-20:])
    assert reached[1] < min(reached[0.1], reached[10]) + 0.03, reached


@pytest.mark.slow
def test_two_processes_find_what_one_finds(
    run_train: Train, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_train(tmp_path / "run", "--lr_find", "--batch_size", "8") == 0
    alone = float(suggested(capsys.readouterr().out))
    command = launch(["--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path / "run"), *TINY, "--lr_find"], 2)
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Processes: 2" in done.stdout
    assert float(suggested(done.stdout)) == pytest.approx(alone, rel=0.2)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------------- the rule

RATES = np.geomspace(LOWEST, HIGHEST, 200)


def curve(falls_at: float, rises_at: float) -> np.ndarray:
    """A loss that falls from 5 to 3 around one rate, and rises again around another."""
    logs = np.log10(RATES)
    fall = 2 / (1 + np.exp(-4 * (logs - np.log10(falls_at))))
    return 5 - fall + 3 / (1 + np.exp(-8 * (logs - np.log10(rises_at))))


def test_the_suggestion_is_below_what_diverges_and_within_the_fall() -> None:
    result = evaluate(RATES, curve(1e-3, 1e-1))
    assert 5e-4 < result.suggestion < 3e-2
    noise = np.random.default_rng(0).normal(0, 0.05, RATES.size)
    noisy = evaluate(RATES, curve(1e-3, 1e-1) + noise)
    assert noisy.suggestion == pytest.approx(result.suggestion, rel=1.5)
    higher = evaluate(RATES, curve(1e-2, 1))
    assert higher.suggestion == pytest.approx(10 * result.suggestion, rel=0.2)


def test_the_first_easy_nats_do_not_decide() -> None:
    """What a larger model shows: the steepest fall is at a rate far too low, where it learns how often tokens occur."""
    for easy in (2e-5, 4e-5, 8e-5):
        logs = np.log10(RATES)
        first = 2 / (1 + np.exp(-12 * (logs - np.log10(easy))))
        result = evaluate(RATES, curve(4e-4, 1e-1) - first)
        steepest = RATES[np.gradient(result.smoothed).argmin()]
        assert steepest == pytest.approx(easy, rel=0.2)  # so this is such a curve
        assert 3e-4 < result.suggestion < 1e-3


def test_where_no_picture_can_be_written_the_answer_is_said_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr_find.png").mkdir()  # root may write into any folder, but not over this
    said: list[str] = []
    report(evaluate(RATES, curve(1e-3, 1e-1)), said.append)
    assert [line.rpartition("\n")[2][:10] for line in said] == ["type: --lr"]
    assert [record.getMessage().partition(" could")[0] for record in caplog.records] == [
        f"no picture: {tmp_path / 'lr_find.png'}"
    ]


def test_a_loss_that_never_falls_gives_no_suggestion() -> None:
    for flat in (np.full(RATES.size, 5.0), 5 + RATES, np.full(RATES.size, np.nan)):
        with pytest.raises(PretrainError, match="the loss did not fall at any learning rate"):
            evaluate(RATES, flat)


def test_the_test_ends_where_it_is_hopeless() -> None:
    assert is_hopeless([5.0, float("nan")])
    assert not is_hopeless([5.0] * 30)
    assert is_hopeless([*np.linspace(5, 3, 30), *[4.5] * 5])
    assert not is_hopeless([*np.linspace(5, 3, 30), 4.5])


def test_smoothing_keeps_a_line() -> None:
    line = np.linspace(5, 3, 100)
    assert np.allclose(smooth(line)[20:-20], line[20:-20])


def test_going_on_from_a_checkpoint_is_no_range_test() -> None:
    config = RunConfig()
    refuse_what_is_another_run(config)
    refuse_what_is_another_run(replace(config, checkpoint=replace(config.checkpoint, resume_from="auto")))
    with pytest.raises(ConfigError, match="--lr_find begins anew"):
        refuse_what_is_another_run(replace(config, checkpoint=replace(config.checkpoint, resume_from="runs/a")))
