"""The wish to stop, from the signal to the saved update: what counts as one, where it is heard, and what is left behind.

``test_stop.py`` sends the usual signals to runs under each launcher; here are the rarer ones and the inconvenient moments.
"""

from __future__ import annotations

import os
import random
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from accel_pretrain import loop, stopping
from accel_pretrain.stopping import StopSignal, follow_the_launcher, requeue
from tests.processes import (  # noqa: F401
    LAUNCHERS,
    arguments,
    command,
    leave_nothing_running,
    saved_step,
    start,
    start_training,
    status,
    trainers,
    until,
    updates,
)
from tests.running import Train, assert_same_bits, newest, rows

INT, TERM, HUP, USR1, USR2 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
Patch = pytest.MonkeyPatch


class Left(Exception):
    pass


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: Patch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


# ------------------------------------------------------------------------------------------------------- in one process


@pytest.mark.parametrize(("number", "code"), [(INT, 130), (TERM, 143), (HUP, 129), (USR1, 138), (USR2, 143)])
def test_a_signal_is_remembered_and_the_handlers_are_put_back(number: signal.Signals, code: int) -> None:
    first = signal.getsignal(number)
    if first == signal.SIG_IGN:  # these tests run under nohup
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.agreed()
        assert stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop.agreed()
        assert stop.exit_code == stop.own_code == code
        assert stop.reason == ("the launcher has died" if number == USR2 else number.name)
    assert signal.getsignal(number) == before
    signal.signal(number, first)


def test_nohup_is_respected() -> None:
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), HUP)
            assert not stop.agreed()
    finally:
        signal.signal(HUP, before)


@pytest.mark.parametrize(
    ("first", "second", "seconds_later", "code"),
    [
        (INT, INT, 0.0, None),  # both from the terminal and from the launcher
        (INT, INT, 2.0, 130),
        (INT, TERM, 2.0, 143),
        (TERM, TERM, 2.0, 143),
        (TERM, INT, 2.0, 130),
        (INT, USR2, 2.0, None),  # the launcher has died of the same Ctrl+C
        (INT, HUP, 2.0, None),
        (USR1, TERM, 2.0, None),  # Slurm's warning, and its time limit: what is being saved is not thrown away
        (USR1, USR1, 2.0, None),
    ],
)
def test_what_leaves_at_once(monkeypatch: Patch, first: int, second: int, seconds_later: float, code: int | None) -> None:
    def leave(number: int) -> None:
        raise Left(number)

    monkeypatch.setattr(os, "_exit", leave)
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    told: list[int] = []
    stop = StopSignal()
    stop.leaving = told.append
    stop._handle(first, None)
    now += seconds_later
    left = None
    try:
        stop._handle(second, None)
    except Left as caught:
        left = caught.args[0]
    assert left == code
    assert told == ([] if code is None else [code])
    assert stop.signal == first


def test_the_first_update_is_not_taken_for_a_quick_one() -> None:
    stop = StopSignal()
    time.sleep(0.01)
    assert not stop.agreed()
    assert not stop.drops_update(0, 100)
    assert not stop._quick
    assert not stop.agreed()
    assert not stop.drops_update(0, 100)
    assert stop._quick


@pytest.fixture
def two_processes(monkeypatch: Patch) -> Patch:
    """As seen from one of them; ``dist.all_reduce`` is left to the test."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    return monkeypatch


def test_a_signal_that_arrives_while_the_processes_agree_is_not_lost(two_processes: Patch) -> None:
    stop = StopSignal()
    two_processes.setattr(dist, "all_reduce", lambda told, **_: stop._handle(TERM, None))
    assert not stop.agreed()  # the others do not know of it yet: this process must not stop alone
    two_processes.setattr(dist, "all_reduce", lambda told, **_: None)
    assert stop.agreed()
    assert stop.exit_code == 143


def test_a_signal_to_another_process_stops_this_one(two_processes: Patch) -> None:
    stop = StopSignal()
    two_processes.setattr(dist, "all_reduce", lambda told, **_: told.fill_(TERM))
    assert stop.agreed()
    assert stop.exit_code == 143


def test_the_wish_to_be_requeued_counts_more_than_the_launchers_death(two_processes: Patch) -> None:
    """``accelerate launch`` dies of a SIGUSR1 to the whole group; its processes hear of both, in either order."""
    elsewhere = [0]
    two_processes.setattr(dist, "all_reduce", lambda told, **_: told[0].clamp_(min=elsewhere[0]))
    for signals in ((USR2, USR1), (USR1, USR2)):
        stop = StopSignal()
        for number in signals:
            stop._handle(number, None)
        assert stop.agreed()
        assert stop.signal == USR1
    stop, elsewhere[0] = StopSignal(), USR1
    stop._handle(USR2, None)
    assert stop.agreed()
    assert stop.signal == USR1
    stop, elsewhere[0] = StopSignal(), -1
    assert not stop.agreed()
    stop._handle(USR2, None)
    assert stop.agreed()
    assert (stop.signal, stop.own_code) == (USR2, 143)


def test_in_quick_updates_nobody_is_asked_and_in_slow_ones_all_are(two_processes: Patch) -> None:
    asked: list[float] = []
    elapsed = [0.1]

    def reduce(told: Any, **_: Any) -> None:
        asked.append(elapsed[0])
        told[1] = int(elapsed[0] * 1e6)

    two_processes.setattr(dist, "all_reduce", reduce)
    stop = StopSignal()
    for seconds, questions in ((0.1, 1), (20.0, 4), (0.1, 1)):
        elapsed[0], asked[:] = seconds, []
        stop.agreed()
        assert not any(stop.drops_update(micro_step, 4) for micro_step in range(4))
        assert len(asked) == questions
    # After 20 s with 1 of 4 micro-steps done, 60 s would be left; after 3 of 4, less than 7; at 0.4 s per micro-step, 0.4 s.
    elapsed[0], stop.signal = 20.0, TERM
    stop.agreed()
    assert [stop.drops_update(done, 4) for done in (0, 1, 3)] == [False, True, True]
    elapsed[0] = 1.2
    assert not stop.drops_update(3, 4)


def test_an_elastic_launcher_is_not_told_of_a_failure(monkeypatch: Patch) -> None:
    stop = StopSignal()
    stop._handle(TERM, None)
    assert stop.exit_code == 143
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert (stop.exit_code, stop.own_code) == (0, 143)


def test_an_orphan_knows_it(monkeypatch: Patch) -> None:
    assert follow_the_launcher()  # nobody launched this process
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(stopping.sys, "platform", "linux")
    monkeypatch.setattr(stopping.ctypes, "CDLL", lambda _: type("C", (), {"prctl": lambda *_: 0})())
    for words, alive in ((["/sbin/init"], False), (["python", "/bin/accelerate", "launch"], True), (["torchrun"], True)):
        monkeypatch.setattr(stopping, "parent_command", lambda words=words: words)
        assert follow_the_launcher() == alive


# ----------------------------------------------------------------------------------------------------------------- Slurm


def fake_scontrol(folder: Path, code: int = 0) -> Path:
    """A ``scontrol`` that writes down with which words it was called."""
    folder.mkdir()
    script = folder / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/called"\necho "slurm says no" >&2\nexit {code}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return folder


def test_only_sigusr1_under_slurm_puts_the_job_back(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("PATH", f"{fake_scontrol(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}")
    stop = StopSignal()
    stop.signal = USR1
    assert requeue(stop, None) is None  # not under Slurm
    assert requeue(stop, True) == "Not requeued: SLURM_JOB_ID is not set, so this is no job of Slurm's"
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert requeue(stop, False) is None
    stop.signal = TERM
    assert requeue(stop, None) is None
    assert not (tmp_path / "bin" / "called").exists()
    stop.signal = USR1
    assert requeue(stop, None) == "Slurm job 4711 is in the queue again"
    assert (tmp_path / "bin" / "called").read_text() == "requeue 4711\n"


def test_a_requeue_that_fails_is_a_line(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    stop = StopSignal()
    stop.signal = USR1
    monkeypatch.setenv("PATH", str(fake_scontrol(tmp_path / "bin", code=1)) + os.pathsep + os.environ["PATH"])
    assert requeue(stop, None) == "Not requeued: scontrol requeue 4711: slurm says no"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "No such file" in (requeue(stop, None) or "")


def test_a_run_under_slurm_saves_and_is_requeued(dataset: Path, tmp_path: Path) -> None:
    path = f"{fake_scontrol(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}"
    run_dir = tmp_path / "run"
    process = start_training(command("python", arguments(dataset, run_dir)), run_dir, SLURM_JOB_ID="12", PATH=path)
    process.send_signal(USR1)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 138
    assert "Slurm job 12 is in the queue again" in output
    assert (tmp_path / "bin" / "called").read_text() == "requeue 12\n"
    assert saved_step(run_dir) == updates(run_dir) == status(run_dir)["step"]
    said = status(run_dir)
    assert (said["state"], said["exit_code"], said["reason"]) == ("interrupted", 138, "SIGUSR1")


def test_a_tracker_that_hangs_does_not_keep_the_job_from_the_queue(dataset: Path, tmp_path: Path) -> None:
    path = f"{fake_scontrol(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}"
    run_dir = tmp_path / "run"
    words = [sys.executable, "-m", "tests.sabotage", "tracker", "0", "0", *arguments(dataset, run_dir)]
    process = start_training(words, run_dir, SLURM_JOB_ID="12", PATH=path)
    process.send_signal(USR1)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 138
    assert "left without waiting longer" in output
    assert (tmp_path / "bin" / "called").read_text() == "requeue 12\n"
    assert (status(run_dir)["state"], status(run_dir)["exit_code"]) == ("interrupted", 138)


# ---------------------------------------------------------------------------------------------------- inconvenient moments


def test_an_evaluation_is_abandoned(run_train: Train, tmp_path: Path, monkeypatch: Patch, capsys: Any) -> None:
    """The signal comes in the fifth batch of a hundred; what was trained is saved, and measured when the run goes on."""
    agreed, count = StopSignal.agreed, [0]

    def signalled(self: StopSignal) -> bool:
        count[0] += 1
        if count[0] == 10:  # five updates, four batches
            os.kill(os.getpid(), TERM)
        return agreed(self)

    monkeypatch.setattr(StopSignal, "agreed", signalled)
    settings = ("--eval_interval", "5", "--eval_iters", "100", "--eval_batch_size", "4", "--max_iters", "50")
    assert run_train(tmp_path, *settings) == 143
    assert count[0] < 15
    assert "Evaluation abandoned to save and leave" in capsys.readouterr().out
    assert saved_step(tmp_path) == 5
    assert not any("eval/val_loss" in row for row in rows(tmp_path))
    monkeypatch.setattr(StopSignal, "agreed", agreed)
    assert run_train(tmp_path, *settings, "--max_iters", "6") == 0
    assert [row["step"] for row in rows(tmp_path) if "eval/val_loss" in row] == [5, 6]
    assert run_train(tmp_path, *settings, "--max_iters", "6") == 0
    assert [row["step"] for row in rows(tmp_path) if "eval/val_loss" in row] == [5, 6]  # and only once


@pytest.mark.parametrize(("stopped", "code"), [(True, 143), (False, 6)])
def test_updates_that_were_all_skipped_end_a_run_only_at_its_end(
    run_train: Train, tmp_path: Path, monkeypatch: Patch, stopped: bool, code: int
) -> None:
    finish = loop.finish

    def finish_skipped(run: Any, state: Any) -> None:
        state.health.skipped = state.step
        finish(run, state)

    def signalled(self: StopSignal, done: int, total: int) -> bool:
        os.kill(os.getpid(), TERM)
        return False

    monkeypatch.setattr(loop, "finish", finish_skipped)
    if stopped:
        monkeypatch.setattr(StopSignal, "drops_update", signalled)
    assert run_train(tmp_path, "--max_iters", "3") == code


def test_an_update_that_takes_too_long_is_dropped_without_a_trace(
    run_train: Train, tmp_path: Path, monkeypatch: Patch, capsys: Any
) -> None:
    """In the third update, with 20 of 40 micro-steps done; afterwards the run goes on to the bits of the uninterrupted one."""
    settings = ("--gradient_accumulation_steps", "40", "--batch_size", "1", "--dropout", "0.1")
    settings += ("--schedule.name", "constant", "--warmup_iters", "1")
    assert run_train(tmp_path / "whole", *settings, "--max_iters", "5") == 0
    drops = StopSignal.drops_update
    dropped: list[tuple[int, int]] = []
    begun = [0]

    def signalled(self: StopSignal, done: int, total: int) -> bool:
        begun[0] += done == 0
        if (begun[0], done) == (3, 20):
            os.kill(os.getpid(), TERM)
        answer = drops(self, done, total)
        if answer:
            dropped.append((begun[0], done))
        return answer

    monkeypatch.setattr(stopping, "PATIENCE", 0.0)  # every update is slow
    monkeypatch.setattr(StopSignal, "drops_update", signalled)
    assert run_train(tmp_path / "cut", *settings, "--max_iters", "5") == 143
    assert dropped == [(3, 20)]
    assert "Stopped after update 2 of 5" in capsys.readouterr().out
    assert saved_step(tmp_path / "cut") == 2
    monkeypatch.setattr(StopSignal, "drops_update", drops)
    assert run_train(tmp_path / "cut", *settings, "--max_iters", "5") == 0
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "cut"))


def test_a_quick_update_is_finished(run_train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    """The same signal as above, with the patience that people get: nothing is dropped."""
    begun = [0]
    drops = StopSignal.drops_update

    def signalled(self: StopSignal, done: int, total: int) -> bool:
        begun[0] += done == 0
        if (begun[0], done) == (3, 20):
            os.kill(os.getpid(), TERM)
        return drops(self, done, total)

    monkeypatch.setattr(StopSignal, "drops_update", signalled)
    assert run_train(tmp_path, "--gradient_accumulation_steps", "40", "--batch_size", "1", "--max_iters", "5") == 143
    assert saved_step(tmp_path) == 3


@pytest.mark.slow
def test_two_processes_drop_the_same_slow_update(dataset: Path, tmp_path: Path) -> None:
    """An update of minutes, and a signal to one process only: both leave within seconds, side by side."""
    slow = ("--batch_size", "300", "--gradient_accumulation_steps", "400")
    process = start(command("torchrun 2", arguments(dataset, tmp_path, *slow)), tmp_path / "log")
    until(lambda: "Max iterations" in (tmp_path / "log").read_text(), process)
    time.sleep(1.5)
    os.kill(trainers(tmp_path)[-1], TERM)
    began = time.monotonic()
    process.wait(timeout=60)
    assert time.monotonic() - began < 10
    assert "Stopped after update 0" in (tmp_path / "log").read_text()
    said = status(tmp_path)
    assert (said["state"], said["exit_code"], said["reason"]) == ("interrupted", 143, "SIGTERM")
    assert process.returncode == 0


# --------------------------------------------------------------------------------------------------------------- repeats


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("number", [INT, TERM, USR1])
def test_no_update_is_lost_at_any_moment(dataset: Path, tmp_path: Path, launcher: str, number: signal.Signals) -> None:
    """Five runs each, signalled after a random time, with evaluations and saves in between."""
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    often = ("--eval_interval", "7", "--checkpoint_interval", "11", "--gradient_accumulation_steps", "2")
    for trial in range(5):
        run_dir = tmp_path / f"run{trial}"
        handled = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}
        words = command(launcher, arguments(dataset, run_dir, *often))
        process = start_training(words, run_dir, tmp_path / "log", **handled)
        time.sleep(draw.uniform(0, 1.5))
        os.killpg(process.pid, number) if number == INT else process.send_signal(number)
        process.wait(timeout=30)
        until(lambda run_dir=run_dir: sys.platform != "linux" or not trainers(run_dir), seconds=20)
        where = f"trial {trial} of seed {seed}:\n{(tmp_path / 'log').read_text()[-2000:]}"
        assert saved_step(run_dir) == updates(run_dir), where
        assert status(run_dir)["state"] == "interrupted", where
        assert "Traceback" not in (tmp_path / "log").read_text() or launcher != "python", where
