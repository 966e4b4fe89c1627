"""Small things about files that both packages rely on: whole or not there, durable, hashed. Standard library only."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file so that, whatever happens, it is there with all of ``content`` or as it was before; durably."""
    temporary = path.with_name(f".tmp_{path.name}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def expanded(path: Path | str) -> Path:
    """With the home for a ``~`` at its beginning. Unlike Path.expanduser, which raises, leaves it where nobody knows that."""
    return Path(os.path.expanduser(path))


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable (POSIX; elsewhere a folder cannot be opened, and there is nothing to do)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; True where that cannot be asked."""
    if os.name != "posix":  # there, signal 0 is not a question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
