"""One run at a time in a directory: a lock that the system lets go of when the process that holds it dies.

The lock file holds the process id and the host of its owner, for people and for file systems that have no locks. A lock that
another machine does not see is no lock: there, a sign of life within the last minute is. Standard library only.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from accel_pretrain.files import is_alive

SILENCE = 60  # seconds without a sign of life after which the run of another machine is taken for dead


class Taken(Exception):
    """Another process has the lock; if on another machine, it was last ``seen`` then, ``left`` seconds short of SILENCE."""

    def __init__(self, owner: str, *, seen: float | None = None, left: float = 0.0) -> None:
        super().__init__(owner)
        self.owner, self.seen, self.left = owner, seen, left


def take(path: Path, shared: bool = False) -> IO[str]:
    """The lock file, open and locked for as long as it stays open; raises :class:`Taken`, or OSError if it cannot be made."""
    while True:
        file = path.open("a+", encoding="utf-8")
        if not _locked(file, shared):
            owner = _owner(file)
            file.close()
            raise Taken(owner)
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()  # the run that had it has deleted it
        path.parent.mkdir(parents=True, exist_ok=True)
    owner, host = _owner_of(file), socket.gethostname()
    left = SILENCE - (time.time() - (seen := os.fstat(file.fileno()).st_mtime))
    if owner.get("host", host) != host and left > 0:
        file.close()
        raise Taken(f"process {owner['pid']} on {owner['host']}", seen=seen, left=left)
    if not shared:
        file.truncate(0)
        os.write(file.fileno(), json.dumps({"pid": os.getpid(), "host": host}).encode())
    return file


def release(file: IO[str]) -> None:
    """Let go of a lock that was taken alone."""
    file.truncate(0)
    file.close()


def _locked(file: IO[str], shared: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # no POSIX: the process id in the file is all there is
        owner = _owner_of(file)
        return not owner or owner["pid"] == os.getpid() or not is_alive(owner["pid"])
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: again the process id
        owner = _owner_of(file)
        return not owner or (owner["host"] == socket.gethostname() and not is_alive(owner["pid"]))
    return True


def _owner_of(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        owner = json.loads(file.read() or "{}")
    except (ValueError, RecursionError):
        return {}
    whole = isinstance(owner, dict) and isinstance(owner.get("pid"), int) and isinstance(owner.get("host"), str)
    return owner if whole else {}


def _owner(file: IO[str]) -> str:
    owner = _owner_of(file)
    return f"process {owner['pid']} on {owner['host']}" if owner else "an array task"
