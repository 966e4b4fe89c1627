"""One trial of a sweep: a run in a process and a folder of its own, and what came of it."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_pretrain.launchers import environment_of_its_own
from accel_pretrain.metrics import METRICS_FILE, read_metrics
from accel_pretrain.status import read_status

_PATIENCE = 60.0  # seconds that a trial which was asked to stop has for saving


@dataclass(kw_only=True)
class Trial:
    """One run: ``state`` is running, finished or failed, and what came of it."""

    trial: int
    parameters: dict[str, str]
    state: str = "running"
    val_loss: float | None = None
    standard_error: float | None = None
    seconds: float | None = None
    reason: str | None = None

    @property
    def folder(self) -> str:
        return f"trial_{self.trial:03d}"

    @property
    def words(self) -> str:
        return " ".join(f"--{name} {shlex.quote(value)}" for name, value in self.parameters.items())


def run_trial(trial: Trial, sweep_dir: Path, start: Sequence[str], words: Sequence[str]) -> int:
    """Run it to its end and fill in what came of it. Not 0: it was asked to stop, has saved, and is to go on another time.

    ``start`` starts a module of Python; ``words`` are those that all trials of the sweep in ``sweep_dir`` have in common.
    """
    place, begin = sweep_dir / trial.folder, time.monotonic()
    values = [f"--{key}={value}" for key, value in trial.parameters.items()]
    command = [*start, "-m", "accel_pretrain.train", *words, *values, f"--checkpoint.checkpoint_dir={place}"]
    with (sweep_dir / f"{trial.folder}.log").open("ab") as output:
        process = subprocess.Popen(command, env=environment_of_its_own(), stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except BaseException:  # we are asked to stop: so is the trial, and it saves
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)
            process.kill()
            raise
    status = read_status(place)
    if status.get("state") == "interrupted":
        return int(status.get("exit_code") or 1)
    trial.seconds = round(time.monotonic() - begin, 1)
    trial.val_loss, trial.standard_error = last_evaluation(place)
    trial.state = "finished" if code == 0 and trial.val_loss is not None else "failed"
    if trial.state == "failed":
        trial.val_loss = trial.standard_error = None
        trial.reason = reason_of(code, status, Path(output.name))
    return 0


def last_evaluation(run_dir: Path) -> tuple[float | None, float | None]:
    """The loss at the end of a run and its standard error; None if there is none, or it is not finite."""
    try:
        ends = [row for row in read_metrics(run_dir / METRICS_FILE) if "final/val_loss" in row]
    except OSError:
        return None, None
    return (ends[-1]["final/val_loss"], ends[-1].get("eval/val_loss_standard_error")) if ends else (None, None)


def reason_of(code: int, status: dict[str, Any], log: Path) -> str:
    """One line: what the run has said of its end, else the last that it wrote."""
    if code and status.get("state") == "failed" and status.get("reason"):
        return f"{status['reason']} (exit code {status.get('exit_code', code)})"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = [line for line in lines if line.startswith("error")] or lines or [""]
    return f"{said[-1][:300]} (exit code {code})"
