"""``starts.jsonl``: every start of a run, and what it ran on; for people and for :mod:`accel_pretrain.report`.

Unlike ``metrics.jsonl`` it is never cut back: it also tells of what a resumed run has thrown away and done again.
"""

from __future__ import annotations

import functools
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import accel_pretrain
from accel_pretrain.launchers import launch
from accel_pretrain.metrics import RowsFile, read_metrics
from accel_pretrain.peaks import processor
from accel_pretrain.redaction import redact

STARTS_FILE = "starts.jsonl"
_PACKAGES = ("torch", "accelerate", "numpy")


def record_start(run_dir: Path, step: int, runtime: str, plan: Mapping[str, Any]) -> None:
    """Append one row: after which update the run goes on, when, on what, with which code; and its plan. Main process only."""
    row = {
        "step": step,
        "time": round(time.time(), 3),
        "runtime": runtime,
        "launch": launch(),
        **about(),
        "plan": plan,
    }
    RowsFile(run_dir / STARTS_FILE, sys.maxsize).write(row)


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The starts of a run in order; empty for one of before they were recorded."""
    try:
        rows = read_metrics(run_dir / STARTS_FILE)
    except OSError:
        return []
    return [row for row in rows if isinstance(row.get("time"), int | float)]


@functools.cache
def about() -> dict[str, Any]:
    """What this process is and where: versions, the commit of the code, machine, and the command without secrets."""
    return {
        "versions": versions(),
        "git": commit(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "processor": processor(),
        "command": redact(shlex.join(sys.orig_argv)),
    }


def versions() -> dict[str, str]:
    """Of Python, of this package, and of what computes."""
    found = {"accel_pretrain": accel_pretrain.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """The commit of a checkout that this code runs from, with ``-dirty`` after it if files have changed; else None."""
    root = Path(accel_pretrain.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: a repository further up is somebody else's
        return None
    words = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=5, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
