"""On one machine, on a Ray cluster or in a Slurm array: the same bytes. Real processes; Ray itself where it is installed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from accel_pretrain.errors import ConfigError
from prep.encode import Job
from prep.journal import Workshop
from prep.runners import ArrayTask, array_task, default_workers
from tests.test_prep import ROOT, assert_same_files, command, stories, visible, write_jsonl

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "in.jsonl", stories(3000))


@pytest.fixture(scope="module")
def expected(corpus: Path) -> Path:
    done = subprocess.run(
        words_for(corpus, corpus.parent / "expected", "--workers", 1), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return corpus.parent / "expected"


def words_for(corpus: Path, out: Path, *more: object) -> list[str]:
    options = ["--tokenizer", "train:300", "--unit_bytes", 15_000, "--shards", "50K", "--val", "3%", "--engine", "tiktoken"]
    return command(corpus, "-o", out, *options, *more)


def run(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)


def slurm(index: int, count: int) -> dict[str, str]:
    """What Slurm tells a task of ``--array=5-N:2``, which numbers them from 5 in steps of 2."""
    numbers = {"ID": 5 + 2 * index, "COUNT": count, "MIN": 5, "STEP": 2}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in numbers.items()}


# ---------------------------------------------------------------------------------------------------------------- Slurm


@pytest.mark.parametrize(
    "numbers",
    [
        {"ID": 7, "COUNT": 3, "MIN": 1, "MAX": 7, "STEP": 1},  # --array=1,4,7
        {"ID": 4, "COUNT": 3, "MIN": 1, "MAX": 7, "STEP": 1},
        {"ID": 0, "COUNT": 0, "MIN": 0, "MAX": 0, "STEP": 0},
        {"ID": 6, "COUNT": 3, "MIN": 5, "MAX": 9, "STEP": 2},
        {"ID": 12, "COUNT": 3},
    ],
)
def test_an_array_with_gaps_is_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="is not in an unbroken array"):
        array_task({f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in numbers.items()})
    whole = {"ID": 7, "COUNT": 3, "MIN": 3, "MAX": 7, "STEP": 2}
    assert array_task({f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in whole.items()}) == ArrayTask(2, 3)


def test_a_task_behind_the_last_step_does_nothing(corpus: Path, expected: Path, tmp_path: Path) -> None:
    words = words_for(corpus, tmp_path / "out", "--workers", 1)
    assert run(words).returncode == 0
    late = run([*words, "--runner", "slurm"], **slurm(1, 3))
    assert late.returncode == 0, late.stderr
    assert "nothing to do" in late.stdout
    assert_same_files(tmp_path / "out", expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_array_of_tasks_and_a_last_step(corpus: Path, expected: Path, tmp_path: Path) -> None:
    words = words_for(corpus, tmp_path / "out", "--runner", "slurm", "--workers", 1)
    tasks = [
        subprocess.Popen(words, cwd=ROOT, env=os.environ | slurm(index, 3), stdout=subprocess.PIPE, text=True)
        for index in range(3)
    ]
    outputs = [task.communicate(timeout=60)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0]
    assert [output.startswith(f"task {index + 1} of 3: ") for index, output in enumerate(outputs)] == [True] * 3
    assert sum(int(output.split()[4]) for output in outputs) == Workshop(tmp_path / "out").kept() > 10
    assert visible(tmp_path) == [], "nothing is published yet"
    last = run(words_for(corpus, tmp_path / "out"))
    assert last.returncode == 0, last.stderr
    found = last.stderr.split()  # going on: N of N units were done before
    assert found[2] == found[4]
    assert_same_files(expected, tmp_path / "out")


def test_the_last_step_does_what_a_task_did_not(corpus: Path, expected: Path, tmp_path: Path) -> None:
    words = words_for(corpus, tmp_path / "out", "--runner", "slurm")
    assert run(words, **slurm(1, 3)).returncode == 0
    assert "0 units done" in run(words, **slurm(1, 3)).stdout, "a task that is run again has nothing to do"
    last = run(words_for(corpus, tmp_path / "out"))
    assert last.returncode == 0, last.stderr
    assert_same_files(expected, tmp_path / "out")


def test_the_last_step_waits_for_the_tasks(corpus: Path, tmp_path: Path) -> None:
    words = words_for(corpus, tmp_path / "out", "--runner", "slurm", "--workers", 1)
    with subprocess.Popen(words, cwd=ROOT, env=os.environ | slurm(0, 1), stdout=subprocess.DEVNULL) as task:
        while task.poll() is None and Workshop(tmp_path / "out").kept() < 3:
            time.sleep(0.002)
        task.send_signal(signal.SIGSTOP)
        assert task.poll() is None
        last = run(words_for(corpus, tmp_path / "out"))
        task.kill()
    assert last.returncode == 2
    assert last.stderr.startswith("error: another run works on this dataset (an array task)")


def test_outside_of_an_array_it_says_what_to_type(corpus: Path, tmp_path: Path) -> None:
    result = run(words_for(corpus, tmp_path / "out", "--runner", "slurm"))
    assert result.returncode == 2
    assert result.stderr.startswith(
        "error: --runner slurm: not in a task of a job array; submit the command with sbatch --array="
    )
    assert os.listdir(tmp_path) == []


def test_shares_of_an_array() -> None:
    tasks = [(number, None, "") for number in range(11)]
    shares = [array_task(slurm(index, 4)).share(tasks) for index in range(4)]  # type: ignore[arg-type]
    assert sorted(task for share in shares for task in share) == tasks
    assert array_task(slurm(2, 4)) == ArrayTask(2, 4)
    with pytest.raises(ConfigError):
        array_task({"SLURM_ARRAY_TASK_ID": "1"})


# ------------------------------------------------------------------------------------------------------------------ Ray


@needs_ray
def test_a_ray_cluster(corpus: Path, expected: Path, tmp_path: Path) -> None:
    result = run(words_for(corpus, tmp_path / "out", "--runner", "ray"), RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    assert result.returncode == 0, result.stderr
    assert_same_files(expected, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out"]


FAULT = """
import os, signal
import prep.engines
encode = prep.engines.TiktokenEngine.encode

def dying(self, data):
    if {condition}:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, data)

prep.engines.TiktokenEngine.encode = dying
"""


@pytest.mark.slow
@needs_ray
def test_a_ray_process_that_dies_is_retried(corpus: Path, expected: Path, tmp_path: Path) -> None:
    """Every process that Python starts loads the fault: the first one to encode a certain document dies, the next one not."""
    (tmp_path / "faults").mkdir()
    once = f"b'Story 0.1500:' in data and not os.path.exists('{tmp_path}/died') and not open('{tmp_path}/died', 'w').close()"
    (tmp_path / "faults" / "sitecustomize.py").write_text(FAULT.format(condition=once))
    variables = {"PYTHONPATH": f"{tmp_path / 'faults'}{os.pathsep}{ROOT}", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    result = run(words_for(corpus, tmp_path / "out", "--runner", "ray"), **variables)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "died").exists()
    assert_same_files(expected, tmp_path / "out")


@pytest.mark.slow
@needs_ray
def test_an_error_in_a_ray_task_is_the_error_of_the_run(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", stories(100))
    path.write_text(path.read_text() + "oops\n")
    words = command(path, "-o", tmp_path / "out", "--tokenizer", "bytes", "--runner", "ray")
    result = run(words, RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {path}:101: not valid JSON (")
    assert result.stderr.count("\n") == 1


def test_without_ray(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('hidden')")
    out = tmp_path / "o" / "out"
    result = run(words_for(corpus, out, "--runner", "ray"), PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (result.returncode, result.stderr) == (2, "error: --runner ray needs ray: pip install 'accel_pretrain[ray]'\n")


# ---------------------------------------------------------------------------------------------------------------- local


def test_no_more_processes_than_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prep.runners.available_cores", lambda: 8)
    assert [default_workers("tiktoken", size) for size in (0, 10**6, 20 * 10**6, 10**9)] == [1, 1, 5, 8]
    assert [default_workers("gigatoken", size) for size in (10**8, 3 * 10**8, 10**10)] == [1, 3, 8]
    assert Job.__dataclass_params__.frozen, "Ray's processes keep an engine by its job"  # type: ignore[attr-defined]
