"""One trial of a sweep: a run in a process and a folder of its own, and what came of it."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_pretrain.errors import LockedError
from accel_pretrain.launchers import environment_of_its_own, following
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
    Raises LockedError where another process works in the trial's folder.
    """
    place, begin = sweep_dir / trial.folder, time.monotonic()
    values = [f"--{key}={value}" for key, value in trial.parameters.items()]
    own = [f"--checkpoint.checkpoint_dir={place}", "--checkpoint.resume_from=auto"]
    command, before = [*start, "-m", "accel_pretrain.train", *words, *values, *own], read_status(place)
    with (sweep_dir / f"{trial.folder}.log").open("ab") as output:
        already = output.tell()
        process = subprocess.Popen(following(command), env=environment_of_its_own(), stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except BaseException:  # we are asked to stop: so is the trial, and it saves
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)
            process.kill()
            raise
    said = Path(output.name).read_bytes()[already:].decode(errors="replace").strip().splitlines()
    in_use = [line.partition(": ")[2] for line in said if line.startswith("error") and " is in use: " in line]
    if code and in_use:  # elastic launchers make 1 of every exit code
        raise LockedError(in_use[0])
    status = read_status(place)
    if status == before:  # written by an earlier start: this one has not come so far
        status = {}
    if stopped := stopped_with(status, code, start):
        return stopped
    trial.seconds = round(time.monotonic() - begin, 1)
    trial.val_loss, trial.standard_error = last_evaluation(place)
    trial.state = "finished" if code == 0 and trial.val_loss is not None else "failed"
    if trial.state == "failed":
        trial.val_loss = trial.standard_error = None
        trial.reason = reason_of(code, status, said)
    return 0


def stopped_with(status: dict[str, Any], code: int, start: Sequence[str]) -> int:
    """The exit code of a run that was asked to stop, by the status that it has written; 0 if it was not.

    The code of its process is the same, but that of a launcher is the launcher's own.
    """
    meant = int(status.get("exit_code") or 1)
    return meant if status.get("state") == "interrupted" and (code == meant or list(start) != [sys.executable]) else 0


def last_evaluation(run_dir: Path) -> tuple[float | None, float | None]:
    """The loss at the end of a run and its standard error; None if there is none, or it is not finite."""
    try:
        ends = [row for row in read_metrics(run_dir / METRICS_FILE) if "final/val_loss" in row]
    except OSError:
        return None, None
    return (ends[-1]["final/val_loss"], ends[-1].get("eval/val_loss_standard_error")) if ends else (None, None)


def reason_of(code: int, status: dict[str, Any], said: Sequence[str]) -> str:
    """One line: what the run has recorded of its end, else the last error among the lines that it wrote, or the last line."""
    if code and status.get("state") == "failed" and status.get("reason"):
        return f"{status['reason']} (exit code {status.get('exit_code', code)})"
    telling = [line for line in said if line.startswith("error")] or said or [""]
    return f"{telling[-1][:300]} (exit code {code})"
