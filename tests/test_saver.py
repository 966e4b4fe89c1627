"""Saving while training goes on, failing and trying again, by the clock; and what is checked before and after."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from accel_pretrain import saver
from accel_pretrain.checkpoint import TrainState, restore
from accel_pretrain.commit import checkpoints, problem_with
from accel_pretrain.errors import CheckpointError, DivergedError, StorageError
from accel_pretrain.publish import publish
from tests.running import (
    REPO,
    TINY,
    Train,
    assert_same_bits,
    environment,
    launch,
    losses,
    newest,
    reseal,
    run_processes,
    weights_and_moments,
)

SAVING = ("--checkpoint_interval", "2", "--max_iters", "7", "--keep_last", "null", "--dropout", "0.1")
BACKGROUND = ("--asynchronous", "true")


def steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in checkpoints(run_dir))


def contents(run_dir: Path) -> dict[str, bytes]:
    """The bytes of every file of every checkpoint that does not name the run directory or the option itself."""
    own = [path for checkpoint in checkpoints(run_dir) for path in checkpoint.rglob("*") if path.is_file()]
    own = [path for path in own if path.name not in ("config.yaml", "manifest.json", "trainer_state.json")]
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in own}


@pytest.mark.parametrize("options", [(), ("--tie_embeddings", "true"), ("--optimizer.name", "sgd")])
def test_in_the_background_the_same_bytes_are_written(run_train: Train, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert run_train(tmp_path / "now", *SAVING, *options) == 0
    assert run_train(tmp_path / "soon", *SAVING, *options, *BACKGROUND) == 0
    assert steps(tmp_path / "soon") == [2, 4, 6, 7]
    assert all(problem_with(path) is None for path in checkpoints(tmp_path / "soon"))
    now, soon = contents(tmp_path / "now"), contents(tmp_path / "soon")
    assert now.keys() == soon.keys()
    assert [name for name in now if now[name] != soon[name]] == []
    assert losses(tmp_path / "now") == losses(tmp_path / "soon")
    states = [json.loads((newest(tmp_path / run) / "trainer_state.json").read_text()) for run in ("now", "soon")]
    assert {**states[0], "config_sha256": 0} == {**states[1], "config_sha256": 0}


@pytest.mark.slow
def test_control_an_update_that_does_not_wait_for_the_copy_is_seen(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying = saver.Frozen.copy
    monkeypatch.setattr(saver.Frozen, "copy", lambda frozen: (time.sleep(0.3), copying(frozen)))
    assert run_train(tmp_path / "waits", *SAVING, *BACKGROUND) == 0
    monkeypatch.setattr(saver.Saver, "wait_until_copied", lambda _: None)
    assert run_train(tmp_path / "soon", *SAVING, *BACKGROUND) == 0
    monkeypatch.undo()
    assert run_train(tmp_path / "now", *SAVING) == 0
    assert contents(tmp_path / "now") == contents(tmp_path / "waits")
    assert contents(tmp_path / "now") != contents(tmp_path / "soon")


@pytest.mark.slow
def test_two_processes_save_in_the_background_and_by_the_clock(run_train: Train, dataset: Path, tmp_path: Path) -> None:
    """The clock of one process decides for both, and the thread's messages do not meet those of the training."""
    common = ("--checkpoint_interval", "1000", "--max_iters", "60", "--keep_last", "null", "--global_batch_size", "8")
    for run, options in (("now", ()), ("soon", (*BACKGROUND, "--every_minutes", "0.002"))):
        words = [*TINY, *common, *options, "--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path / run)]
        done = run_processes(words, processes=2)
        assert done.returncode == 0, done.stderr
        assert "Processes: 2" in done.stdout
    assert steps(tmp_path / "now") == [60]
    assert len(steps(tmp_path / "soon")) > 2
    assert all(problem_with(path) is None for path in checkpoints(tmp_path / "soon"))
    assert_same_bits(newest(tmp_path / "now"), newest(tmp_path / "soon"))


def test_every_minutes_saves_besides_the_interval(run_train: Train, tmp_path: Path) -> None:
    common = ("--max_iters", "40", "--checkpoint_interval", "25", "--keep_last", "null")
    assert run_train(tmp_path / "steps", *common) == 0
    assert run_train(tmp_path / "clock", *common, "--every_minutes", "0.0005") == 0
    assert steps(tmp_path / "steps") == [25, 40]
    assert {25, 40} < set(steps(tmp_path / "clock"))


def test_milestones_are_kept(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path, "--max_iters", "9", "--checkpoint_interval", "1", "--keep_last", "1", "--pin_interval", "4") == 0
    assert steps(tmp_path) == [4, 8, 9]


# ------------------------------------------------------------------------------------------------------------- failures


class Disk:
    """Lets ``torch.save`` fail a number of times, with the error that it raises on a full disk."""

    def __init__(self, failures: int, after: int = 0) -> None:
        self.failures, self.after, self.save = failures, after, torch.save

    def __call__(self, *arguments: Any, **named: Any) -> None:
        if self.after > 0:
            self.after -= 1
        elif self.failures > 0:
            self.failures -= 1
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1472 vs 1364")
        self.save(*arguments, **named)


@pytest.mark.parametrize("background", [(), BACKGROUND])
def test_a_save_that_fails_is_tried_again(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    background: tuple[str, ...],
) -> None:  # fmt: skip
    assert run_train(tmp_path / "whole", *SAVING) == 0
    monkeypatch.setattr(torch, "save", Disk(failures=2, after=2))  # a save calls it for the optimizer and for random states
    assert run_train(tmp_path / "cut", *SAVING, *background) == 0
    assert steps(tmp_path / "cut") == [2, 7]
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "cut"))
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2
    assert re.fullmatch(
        r".*checkpoint_00000004 could not be saved: .*unexpected pos.*; training goes on, and .* tried again", warned[0]
    )
    assert not list((tmp_path / "cut").glob(".tmp_*"))


@pytest.mark.parametrize("background", [(), BACKGROUND])
def test_three_failures_in_a_row_end_the_run(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    background: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch, "save", Disk(failures=100, after=2))
    monkeypatch.setattr(saver, "FAILING_SECONDS", 0.0)
    assert run_train(tmp_path, *SAVING, "--max_iters", "100", *background) == 5
    error = capsys.readouterr().err
    assert "error: 3 saves in a row have failed; the last: " in error
    assert "Traceback" not in error
    assert steps(tmp_path) == [2]
    assert problem_with(newest(tmp_path)) is None


def test_a_short_outage_does_not_end_a_run_that_saves_often(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", Disk(failures=4, after=2))
    assert run_train(tmp_path, *SAVING, "--max_iters", "14") == 0
    assert steps(tmp_path) == [2, 12, 14]


def test_a_failure_in_the_background_is_tried_again_by_the_clock(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the thread before the next save is due, which is far away."""
    monkeypatch.setattr(saver, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(torch, "save", Disk(failures=1, after=0))
    assert run_train(tmp_path, "--checkpoint_interval", "50", "--max_iters", "90", *BACKGROUND) == 0
    assert len(steps(tmp_path)) == 2
    assert 50 < steps(tmp_path)[0] < 90


@pytest.mark.parametrize("background", [(), BACKGROUND])
def test_a_last_save_that_fails_is_an_error(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    background: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch, "save", Disk(failures=1))
    assert run_train(tmp_path, "--max_iters", "3", *background) == 5
    assert "what was trained since update 0 is lost" in capsys.readouterr().err
    assert steps(tmp_path) == []


def test_a_best_model_that_could_not_be_saved_is_not_the_best(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", Disk(failures=1))
    arguments = ("--max_iters", "4", "--eval_interval", "1", "--checkpoint_interval", "1", "--lr", "1e-12", "--min_lr", "0")
    assert run_train(tmp_path, *arguments) == 0
    best = (tmp_path / "best").read_text().strip()
    assert (tmp_path / best).is_dir()
    assert json.loads((newest(tmp_path) / "trainer_state.json").read_text())["best_val_loss"] is not None


def test_files_that_cannot_grow_are_a_full_disk(dataset: Path, tmp_path: Path) -> None:
    """A real limit of the system, in a real process: no file may be larger than 200 kB."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    words = [*TINY, "--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path), "--max_iters", "3", "--d_model", "64"]
    done = subprocess.run(
        launch(words), env=environment(), cwd=REPO, capture_output=True, text=True, timeout=120, preexec_fn=limit
    )
    assert done.returncode == 5, done.stderr
    assert "checkpoint_00000003 could not be saved: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*checkpoint*"))


def test_what_one_was_resumed_from_is_kept_as_long_as_the_process_lives(run_train: Train, tmp_path: Path) -> None:
    common = ("--checkpoint_interval", "1", "--keep_last", "1")
    assert run_train(tmp_path, *common, "--max_iters", "2") == 0
    assert run_train(tmp_path, *common, "--max_iters", "5") == 0
    assert steps(tmp_path) == [2, 5]
    assert run_train(tmp_path, *common, "--max_iters", "6") == 0
    assert steps(tmp_path) == [5, 6]


def test_a_pointer_that_cannot_be_written_is_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(pointer: Path, name: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("accel_pretrain.publish.point", full)
    assert problem_with(Small(tmp_path).save(1)) is None
    assert "checkpoint_00000001 is saved, but what names it" in caplog.records[-1].getMessage()


def test_no_room_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Small(tmp_path)
    small.save(1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4000))
    with pytest.raises(StorageError, match=r"a checkpoint needs 0.0 MB, and 0.0 MB are free; make room"):
        small.save(2)
    assert steps(tmp_path) == [1]


# --------------------------------------------------------------------------------------------------------------- checks


class Small:
    """A small model that was trained for one update, and its checkpoints in ``run_dir``."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.accelerator, self.module = run_dir, Accelerator(cpu=True), nn.Linear(8, 8)
        _, self.optimizer = self.accelerator.prepare(self.module, torch.optim.AdamW(self.module.parameters()))
        self.module(torch.ones(1, 8)).sum().backward()
        self.optimizer.step()

    def save(self, step: int) -> Path:
        return publish(self.accelerator, self.run_dir, TrainState(step=step), facts={}, write_extras=lambda folder: None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_never_published(tmp_path: Path, value: float) -> None:
    small = Small(tmp_path)
    small.save(1)
    small.module.weight.data[3, 5] = value
    with pytest.raises(DivergedError, match="weight is not finite after update 2: not saved"):
        small.save(2)
    assert steps(tmp_path) == [1]
    assert not list(tmp_path.glob(".tmp_*"))


def test_what_does_not_fit_together_is_not_restored(tmp_path: Path) -> None:
    small = Small(tmp_path)
    path = small.save(1)
    restore(small.accelerator, small.optimizer, path)  # control
    state = json.loads((path / "trainer_state.json").read_text())
    original = (path / "optimizer.bin").read_bytes()

    def refusal(match: str) -> None:
        reseal(path)
        with pytest.raises(CheckpointError, match=match):
            restore(small.accelerator, small.optimizer, path)
        (path / "optimizer.bin").write_bytes(original)
        (path / "trainer_state.json").write_text(json.dumps(state))

    (path / "trainer_state.json").write_text(json.dumps(state | {"step": 2}))
    refusal("its optimizer has made 1 updates, its counters say 2")
    for name, value, which, match in (
        ("step", 5.0, slice(None), "its optimizer has made 5 updates, its counters say 1"),
        ("exp_avg", float("nan"), slice(1), r"a moment \(exp_avg of parameter 0\) holds numbers that are not finite"),
    ):
        optimizer = torch.load(path / "optimizer.bin", weights_only=True)
        for own in list(optimizer["state"].values())[which]:
            own[name].fill_(value)
        torch.save(optimizer, path / "optimizer.bin")
        refusal(match)
    optimizer = torch.load(path / "optimizer.bin", weights_only=True)
    torch.save(optimizer | {"state": {}}, path / "optimizer.bin")
    refusal("its optimizer has made None updates, its counters say 1")
    for text in ("[]", "{", '{"step": 1}', "[" * 100_000, json.dumps(state | {"samples": -1})):
        (path / "trainer_state.json").write_text(text)
        refusal("trainer_state.json")


RESTORE = textwrap.dedent("""
    import sys, torch
    from pathlib import Path
    from accelerate import Accelerator
    from accel_pretrain.checkpoint import restore
    accelerator = Accelerator(cpu=True)
    module = torch.nn.Linear(8, 8)
    _, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters()))
    Path(f"{__file__}.{accelerator.process_index}").write_text(f"{accelerator.num_processes} processes")
    restore(accelerator, optimizer, Path(sys.argv[1 + accelerator.process_index]))
    print("restored")
""")


def test_processes_that_loaded_different_weights_are_found_out(tmp_path: Path) -> None:
    """Those that loaded the same go on: see the tests of resuming in two processes."""
    first = Small(tmp_path / "first")
    second = Small(tmp_path / "second")
    second.module.load_state_dict(first.module.state_dict())
    second.module.bias.data[0] += 1e-6
    (script := tmp_path / "script.py").write_text(RESTORE)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    words += [str(first.save(1)), str(second.save(1))]
    done = subprocess.run(words, env=environment(), cwd=REPO, capture_output=True, text=True, timeout=120)
    assert [Path(f"{script}.{rank}").read_text() for rank in (0, 1)] == ["2 processes"] * 2, done.stderr
    assert "restored" not in done.stdout
    assert done.returncode != 0
    assert "the processes have loaded different weights" in done.stderr


def test_nothing_is_left_running(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path, *SAVING, *BACKGROUND) == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    assert len(weights_and_moments(newest(tmp_path))) > 20
