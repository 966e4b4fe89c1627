"""The search for the fastest settings: its ladders on made-up machines, and real trials in real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from accel_pretrain import ladder, loop, train, trial, tune
from accel_pretrain.checkpoint import TrainState
from accel_pretrain.config import Plan, RunConfig, make_plan
from accel_pretrain.errors import ConfigError
from accel_pretrain.ladder import Candidate, Search, TunedRun, TuneOptions
from accel_pretrain.loop import train_step
from accel_pretrain.models import ModelConfig
from accel_pretrain.outlook import unknown_splits
from accel_pretrain.runtime import TrainingConfig
from accel_pretrain.trial import TOO_LARGE, Trial
from accel_pretrain.typed_yaml import load, parse_command_line, to_plain
from tests.running import REPO, TINY, environment, launch, losses, refused, stdlib_text, write_dataset

MODEL = ModelConfig(context_length=32, d_model=32, num_layers=2, num_heads=2, d_ff=64, vocab_size=100)
OUTLAW = Trial(problem=TOO_LARGE)


def planned(*, only: str = "all", max_iters: int = 1000, **training: object) -> tuple[TunedRun, Plan]:
    words = {"batch_size": 8, "global_batch_size": 48, "device": "cpu", "cpu_threads": 1, "max_iters": max_iters, **training}
    options = TuneOptions(only=only, budget=60)  # type: ignore[arg-type]
    config = TunedRun(model=MODEL, training=TrainingConfig(**words), tune=options)  # type: ignore[arg-type]
    return config, make_plan(config, unknown_splits(config), 1)


def searched(machine: Callable[[Candidate], Trial], **words: object) -> Search:
    search = Search(*planned(**words), lambda candidate, left: machine(candidate))  # type: ignore[arg-type]
    search.run()
    return search


def seconds(candidate: Candidate, best: int) -> float:
    """A machine on which the micro-batch ``best`` is the fastest."""
    return 1 + abs(np.log2(candidate.batch_size / best))


@pytest.mark.parametrize("best", [1, 2, 4, 8, 16, 48])
def test_the_micro_batch_is_found_from_below_and_from_above(best: int):
    search = searched(lambda candidate: Trial(seconds=seconds(candidate, best)), only="batch_size")
    assert search.best == Candidate(best, False, "none")
    assert all(48 % candidate.batch_size == 0 for candidate in search.rows)
    assert len(search.rows) <= 6


def test_what_does_not_fit_is_a_row_and_not_the_end():
    search = searched(lambda c: OUTLAW if c.batch_size > 2 else Trial(seconds=seconds(c, 48)), only="batch_size")
    assert search.best.batch_size == 2
    assert search.rows[Candidate(8, False, "none")] == OUTLAW


def test_recomputing_lets_a_larger_micro_batch_fit():
    def machine(candidate: Candidate) -> Trial:
        room = {"none": 8, "selective": 16, "full": 48}[candidate.checkpointing]
        return OUTLAW if candidate.batch_size > room else Trial(seconds=seconds(candidate, 48))

    assert searched(machine).best == Candidate(16, False, "selective")
    assert searched(machine, only="batch_size").best == Candidate(8, False, "none")  # control


@pytest.mark.parametrize("on_gpu", [True, False])
def test_on_a_gpu_the_loss_in_chunks_may_let_a_larger_micro_batch_fit(on_gpu: bool):
    def machine(candidate: Candidate) -> Trial:
        fits = candidate.batch_size <= 8 or (candidate.chunked and candidate.batch_size <= 16)
        return Trial(seconds=seconds(candidate, 48)) if fits else OUTLAW

    search = Search(*planned(), lambda candidate, left: machine(candidate), kind="cuda" if on_gpu else "cpu")
    search.run()
    assert search.best == (Candidate(16, False, "none", True) if on_gpu else Candidate(8, False, "none"))
    assert ("--chunked_loss" in tune.words_for(search, search.best)) == on_gpu


def test_what_fits_only_with_recomputing_is_found():
    search = searched(lambda c: Trial(seconds=9.0) if c == Candidate(1, False, "full") else OUTLAW)
    assert search.best == Candidate(1, False, "full")
    with pytest.raises(ConfigError, match="no candidate runs here"):
        searched(lambda candidate: OUTLAW)


@pytest.mark.parametrize(("updates", "compiled"), [(50, False), (1000, True)])
def test_compiling_must_pay_in_the_planned_run(updates: int, compiled: bool):
    def machine(candidate: Candidate) -> Trial:
        return Trial(seconds=0.5, first=100.0) if candidate.compiled else Trial(seconds=1.0)

    search = searched(machine, max_iters=updates)
    assert any(candidate.compiled for candidate in search.rows)
    assert search.best.compiled == compiled


def test_compiling_is_tried_with_the_best_micro_batch_and_with_one_that_only_fits_so():
    def machine(candidate: Candidate) -> Trial:
        if candidate.batch_size > (48 if candidate.compiled else 16):
            return OUTLAW
        return Trial(seconds=seconds(candidate, 48) * (0.9 if candidate.compiled else 1.0), first=10.0 * candidate.compiled)

    search = searched(machine)
    assert Candidate(16, True, "none") in search.rows
    assert search.best == Candidate(48, True, "none")


def test_a_short_run_is_not_compiled_at_all():
    assert not any(c.compiled for c in searched(lambda candidate: Trial(seconds=0.01), max_iters=50).rows)


def test_what_is_compared_with_is_what_the_trainer_would_do():
    """A run so long that the trainer compiles it by itself does not get faster by --compile true."""

    def machine(candidate: Candidate) -> Trial:
        return Trial(seconds=0.5 if candidate.compiled else 1.0, first=20.0 * candidate.compiled)

    search = searched(machine, only="compile", max_iters=10**8)
    assert search.start == search.best == Candidate(8, True, "none")
    assert "as fast as anything" in tune.report(search)[-1]
    short = searched(machine, only="compile")  # control
    assert not short.start.compiled
    assert "times as fast" in tune.report(short)[-1]


def test_no_more_is_begun_when_time_is_up():
    config, plan = planned()
    search = Search(config, plan, lambda candidate, left: Trial(seconds=1.0))
    search.began = time.monotonic() - 59
    with pytest.raises(ConfigError, match="budget"):
        search.run()
    search = Search(config, plan, lambda candidate, left: late(search))

    def late(search: Search) -> Trial:
        search.began -= 30
        return Trial(seconds=float(len(search.rows) + 1))

    assert not search.run()
    assert len(search.rows) == 2
    assert search.left_out
    assert "No time for: --batch_size" in "\n".join(tune.report(search))


@pytest.mark.parametrize("problem", [trial.TOO_SLOW, "failed: of something that may pass", "not compiled: no compiler"])
def test_what_may_be_otherwise_the_next_time_is_not_remembered(problem: str):
    def lasts(problem: str) -> Search:
        slow = Trial(problem=problem)
        search = Search(*planned(), lambda c, left: slow if c.batch_size > 8 else Trial(seconds=seconds(c, 8)))
        assert search.run() == (problem == TOO_LARGE)
        return search

    assert bool(lasts(problem).left_out) == (problem == trial.TOO_SLOW)
    lasts(TOO_LARGE)  # control


def test_when_nothing_was_fast_enough_the_budget_is_to_blame():
    with pytest.raises(ConfigError, match="type --budget 120"):
        searched(lambda candidate: Trial(problem=trial.TOO_SLOW))


def test_a_lucky_measurement_is_not_announced():
    """Micro-batch 4 seems twice as fast as what it is."""
    seen: list[Candidate] = []

    def lucky(candidate: Candidate) -> Trial:
        seen.append(candidate)
        return Trial(seconds=0.5 if candidate.batch_size == 4 and seen.count(candidate) == 1 else 1.0)

    assert searched(lucky, only="batch_size").best == Candidate(8, False, "none")
    assert seen.count(Candidate(4, False, "none")) == 2
    real = searched(lambda candidate: Trial(seconds=0.5 if candidate.batch_size == 4 else 1.0), only="batch_size")  # control
    assert real.best.batch_size == 4


@pytest.mark.parametrize("fixed", [True, False])
def test_the_words_keep_the_sequences_of_an_update(fixed: bool):
    batch = {} if fixed else {"global_batch_size": None, "gradient_accumulation_steps": 6}
    search = searched(lambda candidate: Trial(seconds=seconds(candidate, 16)), **batch)
    words = tune.words_for(search, search.best).split()
    assert ("--gradient_accumulation_steps" in words) != fixed
    plain = ["--global_batch_size", "48"] if fixed else ["--batch_size", "8"]
    config = load(RunConfig, None, parse_command_line(RunConfig, [*plain, "--vocab_size", "100", *words]).overrides)
    assert config.training.batch_size == 16
    assert make_plan(config, unknown_splits(config), 1).samples_per_step == 48


# ------------------------------------------------------------------------------------------------------------ real processes


def small() -> RunConfig:
    config, _ = planned(global_batch_size=None)
    return RunConfig(**{name: getattr(config, name) for name in RunConfig.__dataclass_fields__})


def measured(config: RunConfig, *, limit: int | None = None, timeout: float = 60.0) -> Trial:
    return trial.measure(config, vocab_size=100, samples=24, updates=10, seconds=0.1, timeout=timeout, limit=limit)


def test_a_trial_does_not_get_more_memory_than_it_may():
    """300 layers on 8 x 64 positions keep about 100 MB. That others get what they need: the test of the command, below."""
    deep = dataclasses.replace(small(), model=dataclasses.replace(MODEL, num_layers=300, context_length=64))
    assert measured(deep, limit=60_000_000) == OUTLAW
    assert measured(small(), limit=1) == OUTLAW  # not even for the libraries that are loaded late


def test_without_a_compiler_nothing_is_timed_as_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    config = dataclasses.replace(small(), training=dataclasses.replace(small().training, compile=True))
    asked = {"config": to_plain(config), "vocab_size": 100, "samples": 8, "updates": 10, "seconds": 0.01, "limit": None}
    (tmp_path / "question").write_text(json.dumps(asked))
    trial.main(tmp_path / "question", tmp_path / "answer")
    problem = json.loads((tmp_path / "answer").read_text())["problem"]
    assert problem == "not compiled: torch.compile needs a C++ compiler, such as g++, and found none"


def test_a_trial_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trial, "_GRACE", 0.0)
    begin = time.monotonic()
    assert measured(small(), timeout=0.3).problem == trial.TOO_SLOW
    assert time.monotonic() - begin < 5


def test_a_trial_makes_the_updates_of_a_real_run(tmp_path: Path):
    """The same losses as ``train`` on the same tokens: what is timed is what will run."""
    splits = trial.made_up_tokens(100)
    for split in ("train", "val"):
        splits.train.files[0].astype("<u2").tofile(tmp_path / f"{split}.bin")
    words = [*TINY, "--train_data_path", str(tmp_path / "train.bin"), "--val_data_path", str(tmp_path / "val.bin")]
    words += ["--vocab_size", "100", "--max_iters", "3", "--checkpoint_dir", str(tmp_path / "run")]
    assert train.main(words) == 0
    config = load(RunConfig, tmp_path / "run" / "config.yaml")
    state, found = TrainState(), []
    (tmp_path / "trial").mkdir()
    run = trial.build(config, make_plan(config, splits, 1), splits, Accelerator(cpu=True), tmp_path / "trial")
    for _ in range(3):
        update = train_step(run, state)
        assert update is not None
        found.append(update.loss.item())
        state.step, state.samples = state.step + 1, state.samples + run.plan.samples_per_step
    assert found == losses(tmp_path / "run")


def test_the_command_tries_says_writes_and_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = write_dataset(tmp_path / "data", stdlib_text(20_000), stdlib_text(5_000))  # it says how large its vocabulary is
    words = [*TINY, "--train_data_path", str(data), "--batch_size", "2", "--global_batch_size", "2", "--max_iters", "100"]
    words += ["--only", "batch_size", "--budget", "20", "--write", str(tmp_path / "best.yaml")]
    assert tune.main(words) == 0
    first = capsys.readouterr().out
    rows = [line.split() for line in first.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:4] for row in rows[:2]] == [["2", "1", "no", "none"], ["1", "2", "no", "none"]]
    assert all(float(row[4].replace(",", "")) > 100 for row in rows)
    assert all(float(row[5]) > 0.05 for row in rows)
    best = load(RunConfig, tmp_path / "best.yaml").training
    assert f"Best for 100 updates: --batch_size {best.batch_size} --compile false" in first
    assert best.global_batch_size == 2
    begin = time.monotonic()
    assert tune.main(words) == 0
    again = capsys.readouterr().out
    assert time.monotonic() - begin < 1
    assert "measured before" in again
    last = {row[0]: row for row in rows}  # a winner is measured again
    assert [line.split() for line in again.splitlines() if line.strip()[:1].isdigit()] == [*last.values()]


def others_in(session_of: str) -> list[int]:
    """Processes whose command line names this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if session_of in path.read_bytes().decode(errors="replace") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def waited_for(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGHUP, signal.SIGKILL))]
)
def test_who_is_ended_leaves_no_process_and_no_file(tmp_path: Path, number: signal.Signals):
    words = [*TINY, "--vocab_size", "100", "--d_model", "256", "--max_iters", "100", "--fresh"]
    asker = subprocess.Popen(
        launch(words, module="accel_pretrain.tune"), env=environment(TMPDIR=str(tmp_path), XDG_CACHE_HOME=str(tmp_path)),
        cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert waited_for(lambda: others_in(str(tmp_path)))
        asker.send_signal(number)
        assert asker.wait(timeout=20) == (-number if number == signal.SIGKILL else 128 + number)
        assert waited_for(lambda: not others_in(str(tmp_path)))
        assert waited_for(lambda: not [*tmp_path.glob("trial_*")])
    finally:
        asker.kill()
        asker.wait()


def test_who_is_ended_says_what_was_best_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def machine(candidate: Candidate, left: float) -> Trial:
        if candidate.batch_size == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        return Trial(seconds=seconds(candidate, 48))

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        tune.measure_all(Search(*planned(only="batch_size"), machine), tmp_path / "memory")
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Best for 1,000 updates: --batch_size 8" in capsys.readouterr().out
    assert not (tmp_path / "memory").exists()


def test_a_run_that_does_not_fit_says_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def too_large(*_: object) -> None:  # what a GPU's allocator raises; a CPU's process is killed
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(loop, "train_step", too_large)
    data = write_dataset(tmp_path / "data", stdlib_text(20_000), stdlib_text(5_000))
    words = [
        *TINY,
        "--train_data_path",
        str(data),
        "--gradient_accumulation_steps",
        "3",
        "--checkpoint_dir",
        str(tmp_path / "run"),
    ]
    with pytest.raises(SystemExit) as end:
        train.main(words)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert "--batch_size 2 --global_batch_size 12, or --activation_checkpointing selective" in err
    assert "2 GiB" in err


def remembered_in(**words: object) -> str:
    options = {name: words.pop(name) for name in ("memory_gb", "world_size") if name in words}
    config, plan = planned(**words)  # type: ignore[arg-type]
    config = dataclasses.replace(config, tune=dataclasses.replace(config.tune, **options))  # type: ignore[arg-type]
    memory = tune.memory_file(Search(config, plan, lambda candidate, left: OUTLAW))
    assert memory is not None
    return memory.name


def test_another_question_is_not_answered_from_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    questions = [
        {"memory_gb": 16.0}, {"memory_gb": 4.0}, {"tf32": True, "memory_gb": 4.0}, {"memory_gb": 4.0, "cpu_threads": None},
        {"memory_gb": 4.0, "cpu_threads": None, "world_size": 4},
    ]  # fmt: skip
    assert len({remembered_in(**words) for words in questions}) == len(questions)
    assert remembered_in(memory_gb=4.0) == remembered_in(memory_gb=4.1)  # control


@pytest.mark.parametrize(("world_size", "threads"), [(1, 8), (4, 2), (16, 1)])
def test_processes_of_the_planned_run_share_the_cores(monkeypatch: pytest.MonkeyPatch, world_size: int, threads: int):
    monkeypatch.setattr(tune, "cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    seen: list[RunConfig] = []
    monkeypatch.setattr(tune, "measure", lambda run, **_: seen.append(run) or OUTLAW)
    for asked in (None, 3):
        config, plan = planned(cpu_threads=asked)
        config = dataclasses.replace(config, tune=dataclasses.replace(config.tune, world_size=world_size))
        tune.measuring(config, plan)(Candidate(1, False, "none"), 1.0)
        assert ladder.as_run(config, plan, Candidate(1, False, "none")).training.cpu_threads == asked  # what is written
    assert [run.training.cpu_threads for run in seen] == [threads, 3]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert "tune.budget: must be positive" in refused(tune.main, capsys, "--vocab_size", 100, "--budget", 0)
    assert "type --vocab_size N" in refused(tune.main, capsys)
    assert refused(train.main, capsys, "--find_batch_size", "--lr", 1).endswith("tune --only batch_size --lr 1\n")
    here = tmp_path / "here.yaml"
    here.write_text("model:\n  vocab_size: 100\n")
    for written, words in {tmp_path / "no" / "x.yaml": "mkdir -p", tmp_path: "is a folder", here: "--config reads"}.items():
        assert words in refused(tune.main, capsys, "--config", here, "--write", written)
    assert "fp16 needs a GPU" in refused(tune.main, capsys, "--config", here, "--mixed_precision", "fp16", "--device", "cpu")
    assert here.read_text() == "model:\n  vocab_size: 100\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--world_size N" in refused(tune.main, capsys, "--vocab_size", 100)


def test_options_of_the_search_are_no_options_of_a_run():
    assert "tune" not in ladder.as_run(*planned(), Candidate(8, False, "none")).__dataclass_fields__
