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
    """Another process has the lock. ``seen`` says that it is on another machine, and was alive less than SILENCE ago."""

    def __init__(self, owner: str, *, seen: bool = False) -> None:
        super().__init__(owner)
        self.owner, self.seen = owner, seen


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
    if owner.get("host", host) != host and time.time() - os.fstat(file.fileno()).st_mtime < SILENCE:
        file.close()
        raise Taken(f"process {owner['pid']} on {owner['host']}", seen=True)
    if not shared:
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": host}))
        file.flush()
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
        return not owner or owner.get("pid") == os.getpid() or not is_alive(int(owner.get("pid", 0)))
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: again the process id
        owner = _owner_of(file)
        return not owner or (owner.get("host") == socket.gethostname() and not is_alive(int(owner.get("pid", 0))))
    return True


def _owner_of(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        return json.loads(file.read() or "{}")
    except ValueError:
        return {}


def _owner(file: IO[str]) -> str:
    owner = _owner_of(file)
    return f"process {owner['pid']} on {owner['host']}" if owner else "an array task"
