"""``status.json``: how a run is, for people and for programs that start it again. Standard library only.

Elastic launchers turn every exit code into 1; the truth is here. The file is replaced as a whole, never half written.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from accel_pretrain.errors import PeerError, exit_code_of
from accel_pretrain.files import write_whole
from accel_pretrain.redaction import redact

STATUS = "status.json"


class RunStatus:
    """Writes the status of the run in ``run_dir``; None writes nothing (all processes but the main one).

    ``state`` is ``running``, then ``finished`` or ``interrupted``, as :meth:`end` says, or ``failed``, with the error's
    exit code and message, when an error leaves the context.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        self.run_dir, self._ended = run_dir, False
        self._facts: dict[str, Any] = {"step": None, "tokens": None, "checkpoint": None}
        self._started = round(time.time(), 3)

    def __enter__(self) -> RunStatus:
        self._write("running", None, None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not self._ended and self.run_dir is not None:
            if isinstance(error, PeerError) and read_status(self.run_dir).get("state") == "failed":
                return  # by another process, whose end was the cause of this error
            first = (str(error).strip() or type(error).__name__).splitlines()
            self._write("failed", exit_code_of(error), " ".join(first[:3])[:1000])

    def progress(self, *, step: int, tokens: int, checkpoint: Path | None) -> None:
        """How far the run is: updates, tokens, and the name of the newest checkpoint; written at once."""
        self._facts |= {"step": step, "tokens": tokens, "checkpoint": checkpoint.name if checkpoint is not None else None}
        self._write("running", None, None)

    def end(self, state: str, exit_code: int, reason: str | None = None) -> None:
        """The last word; the exit code is the run's own, whatever a launcher makes of it."""
        self._ended = True
        self._write(state, exit_code, reason)

    def _write(self, state: str, exit_code: int | None, reason: str | None) -> None:
        if self.run_dir is None:
            return
        document = {
            "state": state, "exit_code": exit_code, "reason": reason, **self._facts,
            "pid": os.getpid(), "host": socket.gethostname(), "started": self._started, "time": round(time.time(), 3),
        }  # fmt: skip
        with contextlib.suppress(OSError):  # a full disk must not end a run here
            write_whole(self.run_dir / STATUS, redact(json.dumps(document, indent=2) + "\n").encode())


def read_status(run_dir: Path) -> dict[str, Any]:
    """The last status; empty where there is none."""
    try:
        document = json.loads((run_dir / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def record_failure(run_dir: Path, exit_code: int, reason: str) -> None:
    """Let the status say that the run has failed; any process may, since the main one may be what hangs."""
    document = read_status(run_dir) | {"state": "failed", "exit_code": exit_code, "reason": reason}
    with contextlib.suppress(OSError):
        write_whole(run_dir / STATUS, redact(json.dumps(document, indent=2) + "\n").encode())
