"""``status.json``: how a run is, for people and for programs that start it again. Standard library only.

Elastic launchers turn every exit code into 1; the truth is here. The file is replaced as a whole, never half written.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from accel_pretrain.errors import PeerError, exit_code_of
from accel_pretrain.files import is_alive, write_whole
from accel_pretrain.redaction import redact

STATUS = "status.json"


class RunStatus:
    """Writes the status of the run in ``run_dir``; None writes nothing (all processes but the main one).

    ``state`` is ``running``, then ``finished`` or ``interrupted``, as :meth:`end` says, or ``failed``, with the error's
    exit code and message, when an error leaves the context. The first of these is the last word. A command that is refused
    (exit code 2) before the first :meth:`progress` leaves the status of the run before it.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        self.run_dir, self._ended = run_dir, False
        self._facts: dict[str, Any] = {"step": None, "tokens": None, "checkpoint": None}
        self._started, self._before = round(time.time(), 3), None

    def __enter__(self) -> RunStatus:
        if self.run_dir is not None:
            with contextlib.suppress(OSError):
                self._before = (self.run_dir / STATUS).read_bytes()
        self._write("running", None, None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not self._ended and self.run_dir is not None:
            if isinstance(error, PeerError) and read_status(self.run_dir).get("state") == "failed":
                return  # by another process, whose end was the cause of this error
            if exit_code_of(error) == 2 and self._facts["step"] is None and self._before is not None:
                with contextlib.suppress(OSError):
                    write_whole(self.run_dir / STATUS, self._before)
                return
            first = (str(error).strip() or type(error).__name__).splitlines()
            self.end("failed", exit_code_of(error), " ".join(first[:3])[:1000])

    def progress(self, *, step: int, tokens: int, checkpoint: Path | None) -> None:
        """How far the run is: updates, tokens, and the name of the newest checkpoint; written at once."""
        self._facts |= {"step": step, "tokens": tokens, "checkpoint": checkpoint.name if checkpoint is not None else None}
        self._write("running", None, None)

    def end(self, state: str, exit_code: int, reason: str | None = None) -> None:
        """The last word; the exit code is the run's own, whatever a launcher makes of it."""
        if not self._ended:
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


def record_loss(run_dir: Path, patience: float = 2.0) -> None:
    """For a process that has lost another: if that was the main one, killed on this machine, say so in its place."""
    deadline = time.monotonic() + patience  # a process that is being killed closes its connections before it is gone
    while time.monotonic() < deadline:
        said = read_status(run_dir)
        if said.get("state") != "running" or said.get("host") != socket.gethostname():
            return
        if _is_gone(pid := said.get("pid", 0)):
            record_failure(run_dir, PeerError.exit_code, f"the main process ({pid}) was killed, or ended without a word")
            return
        time.sleep(0.05)


def _is_gone(pid: int) -> bool:
    """Whether a process of this machine has ended, even if its parent has not asked for its exit code yet."""
    if not is_alive(pid):
        return True
    try:
        return sys.platform == "linux" and b") Z " in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
