"""The doctor: what it says about a machine, and proofs by real runs, with controls in which each proof must fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from accel_pretrain import doctor, launchers, proofs, smoke
from accel_pretrain.config import RunConfig, make_plan, open_splits
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.proofs import HALF, Failed, Runs, prove, shrunk
from accel_pretrain.typed_yaml import load, parse_command_line
from tests.processes import trainers, until
from tests.running import REPO, TINY, environment

Capture = pytest.CaptureFixture[str]


def config_of(*words: str, data: Path) -> RunConfig:
    line = parse_command_line(RunConfig, ["--train_data_path", str(data), *TINY, *words])
    return load(RunConfig, None, line.overrides)


def test_the_packages_are_those_of_the_project() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = {name: packages for name, packages in project["optional-dependencies"].items() if name != "dev"}
    assert dict(word.split(">=") for word in project["dependencies"]) == doctor.CORE
    assert {name: dict(word.split(">=") for word in packages) for name, packages in extras.items()} == doctor.EXTRAS


def test_the_machine(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_shown")
    monkeypatch.setenv("MASTER_PORT", "12345")
    assert doctor.main(["--no_smoke"]) == 0
    shown = capsys.readouterr().out
    lines = (
        rf"torch +ok +{re.escape(torch.__version__)}",
        r"CPU +ok +\d+ cores",
        rf"run directory +ok +{tmp_path}",
        "all is well",
    )
    for line in (*lines, r"launcher +ok +.*MASTER_PORT=12345", r"secrets +ok +HF_TOKEN in the environment"):
        assert re.search(line, shown), shown
    assert "not_to_be_shown" not in shown
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_with_a_machine_is_a_problem(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "gone"))
    monkeypatch.setitem(doctor.CORE, "tqdm", "999")
    monkeypatch.setitem(doctor.EXTRAS, "hf", {"no-such-package": "1"})
    assert doctor.main(["--no_smoke"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"tqdm +PROBLEM +.*; type: pip install 'tqdm>=999'", shown)
    assert re.search(r"extra hf +- +no-such-package missing; to have it: pip install 'accel_pretrain\[hf\]'", shown)
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD PROBLEM" in shown
    assert re.search(r"tokenizers +PROBLEM .*/gone, which TIKTOKEN_CACHE_DIR names, is not there", shown)


@pytest.mark.slow
def test_a_small_run_from_text_to_text(tmp_path: Path) -> None:
    """As a person would, in some folder."""
    command = [sys.executable, "-m", "accel_pretrain.doctor"]
    done = subprocess.run(
        command, env=environment(OMP_NUM_THREADS="1"), cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"^holds +[\d.]+ s  text to tokens, to a trained model, to text: [\d,]+ tokens/s", done.stdout, re.MULTILINE
    )
    assert done.stdout.endswith("\nall is well\n")
    assert list(tmp_path.iterdir()) == []


def test_a_small_run_that_goes_wrong_says_where(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    result = smoke.smoke(tmp_path / "not" / "there")
    assert not result.passed
    assert "No such file or directory" in result.seen
    monkeypatch.setattr(doctor, "smoke", lambda folder: result)
    assert doctor.show_smoke() is False
    assert "FAILS" in capsys.readouterr().out
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    with pytest.raises(Failed, match=r"^prep.tokenize ended with 2: error: /nowhere: /nowhere does not exist"):
        smoke._run("prep.tokenize", "/nowhere", "-o", str(tmp_path / "data"), "--tokenizer", "bytes")


def test_the_config_that_accelerate_would_take_and_the_vocabularies_that_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor._accelerate_config().ok
    (tmp_path / "default_config.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 4\nmixed_precision: bf16\n")
    monkeypatch.setattr(launchers, "default_config_file", str(tmp_path / "default_config.yaml"))
    found = doctor._accelerate_config()
    assert found.ok is None
    assert found.detail.endswith("typed: distributed_type MULTI_GPU, num_processes 4, mixed_precision bf16")
    assert doctor._tokenizers(str(tmp_path)).detail.startswith(f"none in {tmp_path}; gpt2, p50k_base")
    (tmp_path / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").write_text("")  # tiktoken's name for cl100k_base
    found = doctor._tokenizers(str(tmp_path))
    assert (found.ok, found.detail.partition(";")[0]) == (True, f"cl100k_base in {tmp_path}")


@pytest.mark.slow
def test_all_proofs_hold(dataset: Path, tmp_path: Path) -> None:
    """As a person would: the command, in a process of its own, on a config that needs to be made smaller."""
    words = ["--dropout", "0.1", "--num_layers", "3", "--d_model", "1024", "--num_heads", "16", "--num_kv_heads", "8"]
    words += ["--d_ff", "8192", "--checkpoint_dir", str(tmp_path / "run"), "--schedule.name", "wsd", "--decay_iters", "2000"]
    command = [sys.executable, "-m", "accel_pretrain.doctor", "--train_data_path", str(dataset), *TINY, *words]
    done = subprocess.run(command, env=environment(), cwd=REPO, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nholds") == 6, done.stdout
    assert "FAILS" not in done.stdout
    assert "for the proofs: a model of 2 blocks, 128 wide" in done.stdout
    assert "for the proofs: a constant rate after the warm-up" in done.stdout
    assert "1 process = 2 processes: losses to 1e-05: losses up to " in done.stdout
    assert not (tmp_path / "run").exists()
    assert done.stderr == ""


def sabotage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let every Python process that is started from here run ``program`` first."""
    folder = tmp_path / "sabotage"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(REPO)]))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


RANDOM_ORDER = """
import sys, time
if "accel_pretrain.train" in sys.orig_argv:
    from accel_pretrain import data
    begin = data.TokenBatches.__init__
    def begin_anywhere(self, split, *, seed, **others):
        begin(self, split, seed=time.time_ns(), **others)
    data.TokenBatches.__init__ = begin_anywhere
"""


@pytest.mark.slow
def test_control_data_in_another_order_after_a_restart_fails(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(tmp_path, monkeypatch, RANDOM_ORDER)
    (tmp_path / "runs").mkdir()
    runs = Runs(shrunk(config_of(data=dataset), 1000)[0], tmp_path / "runs")
    runs.make_reference()
    with pytest.raises(Failed, match=r"weights or optimizer up to .* apart"):
        runs.prove_resume()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_control_two_processes_with_data_of_their_own_fail(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(tmp_path, monkeypatch, RANDOM_ORDER)
    (tmp_path / "runs").mkdir()
    results = list(prove(config_of(data=dataset), tmp_path / "runs", lambda text: None))
    assert [result.passed for result in results] == [True, True, False, False, False]
    assert "apart" in results[-1].seen


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_control_damage_that_nobody_looks_for_fails(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = 'import sys\nif "accel_pretrain.train" in sys.orig_argv:\n'
    program += "    from accel_pretrain import commit\n    commit.problem_with = lambda *_, **__: None\n"
    sabotage(tmp_path, monkeypatch, program)
    (tmp_path / "runs").mkdir()
    runs = Runs(shrunk(config_of(data=dataset), 1000)[0], tmp_path / "runs")
    runs.make_reference()
    runs.train("killed", "--checkpoint_interval", "1")
    with pytest.raises(Failed, match="the damage was not noticed"):
        runs.prove_damage()


def test_a_config_that_does_not_fit_its_data_is_the_first_failure(dataset: Path, tmp_path: Path) -> None:
    results = list(prove(config_of("--vocab_size", "99", data=dataset), tmp_path, lambda text: None))
    assert [result.passed for result in results] == [False]
    assert "model.vocab_size: 99 is too small" in results[0].seen
    results = list(prove(config_of(data=tmp_path / "gone"), tmp_path, lambda text: None))
    assert "gone does not exist; make a dataset with" in results[0].seen


def test_a_trainer_that_refuses_is_quoted(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    runs = Runs(shrunk(config_of(data=dataset), 1000)[0], tmp_path)
    with pytest.raises(Failed, match=r"the trainer ended with 2: error: schedule\.name: expected cosine"):
        runs.train("x", "--schedule.name", "cosin")


@pytest.mark.parametrize("name", ["gpt2_1558m", "gemma2_2b", "gemma3_270m", "qwen3_0.6b", "llama3_1b", "mistral_7b", "modern"])
def test_every_shipped_shape_can_be_made_small(name: str, dataset: Path) -> None:
    line = parse_command_line(RunConfig, ["--train_data_path", str(dataset)])
    config = load(RunConfig, REPO / "configs" / f"{name}.yaml", line.overrides)
    splits = open_splits(config.data)
    plan = make_plan(config, splits, 1)
    small, changes = shrunk(config, plan.parameters)
    assert make_plan(small, splits, 2).max_iters == 2 * HALF
    with torch.device("meta"):
        model = Transformer(small.model, 257)
    assert model.num_parameters() < proofs._LARGEST["cpu"]
    assert isinstance(small.model, ModelConfig)
    assert any("parameters" in change for change in changes) == (plan.parameters > proofs._LARGEST["cpu"])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_what_it_has_started_ends_with_it(tmp_path: Path) -> None:
    """Even if it is killed: else a trainer would go on for minutes, unseen."""
    call = f"run_to_its_end([sys.executable, '-c', 'import time; time.sleep(300)', {str(tmp_path)!r}], 'it')"
    program = f"import sys; from accel_pretrain.proofs import run_to_its_end; {call}"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=REPO, text=True)
    until(lambda: trainers(tmp_path), parent)
    parent.kill()
    parent.wait()
    until(lambda: not trainers(tmp_path), seconds=20)
