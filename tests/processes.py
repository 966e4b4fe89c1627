"""Runs as real processes that tests signal, stop and kill: by plain python, ``accelerate launch`` and torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.running import REPO, TINY, environment, launch, losses, newest

# The flags keep a run busy until it is told to stop.
ENDLESS = ("--max_iters", "100000", "--checkpoint_interval", "100000", "--schedule.name", "constant", "--warmup_iters", "1")
ENDLESS += ("--dropout", "0.1")
LAUNCHERS = ("python", "accelerate", "accelerate 2", "torchrun 2")
_STARTED: list[subprocess.Popen[str]] = []


def command(launcher: str, arguments: Sequence[str], *options: str) -> list[str]:
    """The command that starts the trainer by one of LAUNCHERS, the launcher's own ``options`` included."""
    module = ["-m", "accel_pretrain.train", *arguments]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    if launcher == "accelerate":
        return [*accelerate, "--config_file", str(REPO / "accelerate_config.yaml"), *options, *module]
    if launcher == "accelerate 2":
        return [*accelerate, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", *options, *module]
    if launcher == "torchrun 2":
        words = launch(arguments, processes=2)
        return [*words[:3], *options, *words[3:]]
    return launch(arguments)


def arguments(dataset: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [*TINY, *ENDLESS, "--train_data_path", str(dataset), "--checkpoint_dir", str(run_dir), *overrides]


def start(words: Sequence[str], output: Path | None = None, **extra: str) -> subprocess.Popen[str]:
    """Start a command in a process group of its own; what it prints is read from the process, or is in ``output``."""
    with contextlib.ExitStack() as files:
        out: Any = subprocess.PIPE if output is None else files.enter_context(output.open("w"))
        process = subprocess.Popen(
            words, env=environment(**extra), cwd=REPO, stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    _STARTED.append(process)
    return process


def until(condition: Callable[[], object], process: subprocess.Popen[str] | None = None, seconds: float = 60) -> None:
    """Wait for something; fails when ``process`` ends before, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            output = process.stdout.read() if process.stdout else ""
            raise AssertionError(f"ended too early, with {process.returncode}:\n{output}")
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def updates(run_dir: Path) -> int:
    """How many updates a run with ``--log_interval 1`` has logged."""
    return len(losses(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def start_training(words: Sequence[str], run_dir: Path, output: Path | None = None, **extra: str) -> subprocess.Popen[str]:
    """Start a run, and wait until it has done three updates."""
    process = start(words, output, **extra)
    until(lambda: updates(run_dir) >= 3, process)
    return process


def status(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


def saved_step(run_dir: Path) -> int:
    """The update of the newest checkpoint."""
    return json.loads((newest(run_dir) / "trainer_state.json").read_text())["step"]


def trainers(run_dir: Path) -> list[int]:
    """The ids of the processes that train in ``run_dir``, by their command lines (Linux); zombies do not count."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not folder.name.isdigit():
                continue
            words = (folder / "cmdline").read_bytes().split(b"\0")
            launched = any(b"launch" in word or b"torch.distributed.run" in word for word in words[:4])
            if str(run_dir).encode() in words and not launched and b") Z " not in (folder / "stat").read_bytes():
                found.append(int(folder.name))
    return sorted(found)


def rank_of(pid: int) -> int:
    """The rank of a process that a launcher has started (Linux)."""
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next((word[5:] for word in words if word.startswith(b"RANK=")), b"0"))


@pytest.fixture(autouse=True)
def leave_nothing_running() -> Iterator[None]:
    """Kill what a test has started, launchers and ranks; import it into a test module to use it."""
    yield
    while _STARTED:
        process = _STARTED.pop()
        words = [str(word) for word in process.args] if isinstance(process.args, list) else []
        run_dir = words[words.index("--checkpoint_dir") + 1] if "--checkpoint_dir" in words else ""
        for pid in trainers(Path(run_dir)) if run_dir and sys.platform == "linux" else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()
