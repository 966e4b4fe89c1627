"""The functions by which Python changes files, with a say before each of them: to count, to kill, to fail, or to record.

What torch and safetensors write by themselves does not come by here; strace sees that, where it works.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

WRITING = frozenset("wax+")


@dataclass(frozen=True)
class Operation:
    """One change of the file system that is about to happen. ``path`` and ``target`` are absolute."""

    index: int
    kind: str  # open, write, fsync, rename, unlink, mkdir, rmdir, chmod, truncate
    path: str
    target: str | None = None
    data: bytes = b""


Say = Callable[[Operation], None]


class _Written(io.FileIO):
    """A file each of whose writes is announced."""

    say: Callable[..., None]

    def write(self, data: Any) -> int:
        self.say("write", os.fspath(self.name), data=bytes(data))
        return super().write(data) or 0


@contextlib.contextmanager
def watching(root: Path, say: Say) -> Iterator[None]:
    """Call ``say`` before every change beneath ``root``, one at a time; what it raises, the change raises."""
    beneath, lock, count = os.path.abspath(root), threading.RLock(), [0]

    def announce(kind: str, path: Any, target: Any = None, data: bytes = b"", dir_fd: int | None = None) -> None:
        name = _path_of(path, dir_fd)
        if name == beneath or name.startswith(beneath + os.sep):
            with lock:
                operation = Operation(count[0], kind, name, None if target is None else _path_of(target, dir_fd), data)
                count[0] += 1
                say(operation)

    with contextlib.ExitStack() as patches:
        for module, name, function in _replacements(announce):
            patches.enter_context(mock.patch.object(module, name, function))
        yield


def _path_of(path: Any, dir_fd: int | None) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    return os.path.normpath(os.path.join(folder, os.fsdecode(path)))


def _replacements(announce: Callable[..., None]) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """The functions to replace: module, name, and what takes its place."""

    def one_path(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(path: Any, *arguments: Any, **named: Any) -> Any:
            announce(kind, path, dir_fd=named.get("dir_fd"))
            return original(path, *arguments, **named)

        return function

    def two_paths(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(source: Any, target: Any, **named: Any) -> Any:
            announce("rename", source, target)
            return original(source, target, **named)

        return function

    def os_open(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            announce("open", path, dir_fd=named.get("dir_fd"))
        return originals["open"](path, flags, *arguments, **named)

    def os_write(descriptor: int, data: Any) -> int:
        announce("write", descriptor, data=bytes(data))
        return originals["write"](descriptor, data)

    def open_file(file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **named: Any) -> Any:
        if isinstance(file, int) or not WRITING & set(mode):
            return originals["open_file"](file, mode, buffering, *arguments, **named)
        announce("open", file)
        raw = _Written(file, mode.replace("b", "").replace("t", ""))
        raw.say = announce
        binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, *arguments, **named, line_buffering=buffering == 1)

    originals = {"open": os.open, "write": os.write, "open_file": io.open}
    for kind, name in (
        ("fsync", "fsync"), ("fsync", "fdatasync"), ("unlink", "unlink"), ("unlink", "remove"), ("mkdir", "mkdir"),
        ("rmdir", "rmdir"), ("chmod", "chmod"), ("chmod", "fchmod"), ("truncate", "truncate"), ("truncate", "ftruncate"),
    ):  # fmt: skip
        yield os, name, one_path(kind, getattr(os, name))
    yield from ((os, name, two_paths(getattr(os, name))) for name in ("rename", "replace"))
    yield from ((os, "open", os_open), (os, "write", os_write), (io, "open", open_file), (builtins, "open", open_file))


# ---------------------------------------------------------------------------------------------------------- what to say


def kill_at(index: int) -> Say:
    """Die at the ``index``-th change; at a write, when half of it is done."""

    def say(operation: Operation) -> None:
        if operation.index == index:
            if operation.kind == "write":
                tear(operation)
            os.kill(os.getpid(), signal.SIGKILL)

    return say


def tear(operation: Operation) -> None:
    """Do the first half of a write, behind the back of the file that is about to do all of it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(operation.path, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, operation.data[: len(operation.data) // 2])


def fail_at(index: int, error: int, forever: bool = False) -> Say:
    """Fail the ``index``-th change with this ``errno``, and with ``forever`` all that follow."""

    def say(operation: Operation) -> None:
        if operation.index == index or (forever and operation.index > index):
            raise OSError(error, os.strerror(error), operation.path)

    return say


def listing(operations: list[Operation]) -> Say:
    """Remember what happens, and let it."""
    return operations.append
