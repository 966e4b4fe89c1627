"""One run with a cool-down and its branches: each is to the bit the run that was planned so from the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from accel_pretrain import train
from accel_pretrain.stopping import StopSignal
from tests.running import Train, assert_same_bits, losses, newest, rows

WSD = ("--schedule.name", "wsd", "--dropout", "0.1", "--keep_last", "1", "--checkpoint_interval", "1000")


def rates(run_dir: Path) -> list[float]:
    return [row["train/learning_rate"] for row in rows(run_dir) if "train/loss" in row]


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir() if path.is_dir())


def test_a_branch_is_the_run_that_was_planned_so(run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the checkpoint that a trunk keeps, whose warm-up is that of its own length, which nobody wrote down."""
    trunk = tmp_path / "trunk"
    answers = iter([False] * 12 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "agreed", lambda self: next(answers))
        assert run_train(trunk, *WSD, "--max_iters", "100", "--decay_iters", "90") == 0
    assert names(trunk) == ["checkpoint_00000010", "checkpoint_00000012"]
    assert (trunk / "stable").read_text() == "checkpoint_00000010\n"
    branch, planned, control = tmp_path / "branch", tmp_path / "planned", tmp_path / "control"
    words = (*WSD, "--max_iters", "20", "--decay_iters", "null")  # whose own warm-up would be none
    assert run_train(branch, *words, "--resume_from", str(trunk / "stable")) == 0
    assert run_train(planned, *words, "--warmup_iters", "2") == 0
    assert rates(branch) == rates(planned)[10:]
    assert len(set(rates(branch))) == 5  # the peak, and four updates of cool-down
    assert losses(branch) == losses(planned)[10:]
    assert losses(trunk)[:10] == losses(planned)[:10]
    assert_same_bits(newest(branch), newest(planned))
    assert run_train(control, *words) == 0
    assert losses(control)[10:] != losses(branch)


def test_a_branch_from_within_the_warm_up_keeps_it(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([False] * 3 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "agreed", lambda self: next(answers))
        assert run_train(tmp_path / "trunk", *WSD, "--max_iters", "400") == 0
    start = ("--resume_from", str(tmp_path / "trunk"))
    assert run_train(tmp_path / "branch", *WSD, "--max_iters", "15", *start) == 0
    assert rates(tmp_path / "branch")[:6] == pytest.approx([3e-3 * step / 8 for step in (4, 5, 6, 7, 8, 8)])
    capsys.readouterr()
    assert run_train(tmp_path / "branch", *WSD, "--max_iters", "15") == 0
    assert "changed since" not in capsys.readouterr().out
    assert run_train(tmp_path / "own", *WSD, "--max_iters", "15", "--warmup_iters", "5", *start) == 0  # what is said counts
    assert rates(tmp_path / "own")[:2] == pytest.approx([3e-3 * 4 / 5, 3e-3])


def test_going_on_from_a_cool_down_is_refused_and_the_way_told(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_train(run, *WSD, "--max_iters", "10") == 0
    before = names(run)
    assert run_train(run, *WSD, "--max_iters", "20") == 2
    said = capsys.readouterr().err
    assert "checkpoint_00000010 is in the cool-down of a run of 10 updates, and one of 20 would raise the rate again" in said
    words = f"--resume_from {run}/checkpoint_00000008 --checkpoint_dir {run}_longer --max_iters 20"
    assert f"type {words}" in said
    assert names(run) == before
    capsys.readouterr()
    assert run_train(run, *WSD, "--max_iters", "10") == 0
    advice = "to train longer, branch off before the cool-down"
    assert f"Nothing to do: 10 of 10 updates are done; {advice}: --resume_from {run}/stable" in capsys.readouterr().out
    assert train.main(words.split()) == 0  # as it was told, with no config
    assert newest(tmp_path / "run_longer").name == "checkpoint_00000020"
    assert run_train(run, *WSD, "--max_iters", "12", "--schedule.name", "cosine") == 0  # control: nothing to refuse


def test_the_stable_checkpoint_follows_the_run(run_train: Train, tmp_path: Path) -> None:
    """Extended in its own folder, the run keeps the new one; gone back before it, there is none."""
    many = (*WSD, "--checkpoint_interval", "4")
    assert run_train(tmp_path, *many, "--max_iters", "10") == 0
    (tmp_path / "stable").unlink()  # as after a death between the checkpoint and its name
    assert run_train(tmp_path, *many, "--max_iters", "20", "--resume_from", str(tmp_path / "checkpoint_00000008")) == 0
    assert (tmp_path / "stable").read_text() == "checkpoint_00000016\n"
    assert "checkpoint_00000016" in names(tmp_path)
    (tmp_path / "stable").unlink()
    again = ("--resume_from", str(tmp_path / "checkpoint_00000016"), "--max_iters", "20")
    assert run_train(tmp_path, *many, *again) == 0
    assert (tmp_path / "stable").read_text() == "checkpoint_00000016\n"
