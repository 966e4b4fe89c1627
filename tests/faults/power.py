"""A disk that loses its power: what may be left of recorded changes, where the file system promises no more than POSIX.

Bytes that were not flushed may be the old ones, zeros, a part of the new ones, or all of them. Names that were not flushed may
be there or not, each by itself; only changes of the same name keep their order, and a rename happens whole or not at all.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.shim import Operation, Say

ROOT = 0
Name = tuple[int, str]  # of a folder's number, and a name in it


@dataclass
class Change:
    """Names that change together: each to the number of a file or folder, or to None. ``unsynced`` are the folders to flush."""

    names: list[tuple[Name, int | None]]
    unsynced: set[int]


@dataclass
class Disk:
    """Files and folders by number, as programs see them and as they are on the platter. A folder has no content."""

    root: str
    content: dict[int, bytes] = field(default_factory=dict)
    durable: dict[int, bytes] = field(default_factory=dict)
    names: dict[Name, int] = field(default_factory=dict)
    durable_names: dict[Name, int] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)
    _next: int = ROOT + 1

    def find(self, path: str) -> int | None:
        number: int | None = ROOT
        for part in self._parts(path):
            number = None if number is None else self.names.get((number, part))
        return number

    def _parts(self, path: str) -> list[str]:
        relative = os.path.relpath(path, self.root)
        return [] if relative == "." else relative.split(os.sep)

    def _name(self, path: str) -> Name:
        folder = self.find(os.path.dirname(path))
        assert folder is not None, path
        return folder, os.path.basename(path)

    def _change(self, *names: tuple[Name, int | None]) -> None:
        for name, number in names:
            if number is None:
                self.names.pop(name, None)
            else:
                self.names[name] = number
        self.pending.append(Change(list(names), {folder for (folder, _), _ in names}))

    def make(self, path: str, content: bytes | None) -> None:
        """A new file with these bytes, or a new folder (None)."""
        self._change((self._name(path), self._next))
        if content is not None:
            self.content[self._next], self.durable[self._next] = content, b""
        self._next += 1

    def apply(self, operation: Operation) -> None:
        """What a recorded change does. One that failed when it was recorded must not be in the record."""
        number, kind = self.find(operation.path), operation.kind
        if kind == "native":  # written by a library, as a whole
            if number is None:
                self.make(operation.path, operation.data)
            else:
                self.content[number] = operation.data
        elif kind == "open" and number is None:
            self.make(operation.path, b"")
        elif kind == "open":
            assert number is not None
            self.content[number] = b""
        elif kind == "write":
            assert number is not None
            self.content[number] += operation.data
        elif kind == "fsync" and number is not None:
            self._flush(number)
        elif kind == "mkdir" and number is None:
            self.make(operation.path, None)
        elif kind == "rename" and number is not None:
            assert operation.target is not None
            self._change((self._name(operation.path), None), (self._name(operation.target), number))
        elif kind in ("unlink", "rmdir") and number is not None:
            self._change((self._name(operation.path), None))

    def _flush(self, number: int) -> None:
        if number in self.content:
            self.durable[number] = self.content[number]
            return
        for change in self.pending:
            change.unsynced.discard(number)
        # In order, and never past an earlier change of the same name that still waits.
        waiting: set[Name] = set()
        for change in list(self.pending):
            own = {name for name, _ in change.names}
            if change.unsynced or own & waiting:
                waiting |= own
            else:
                _persist(change, self.durable_names)
                self.pending.remove(change)

    def crash(self, draw: random.Random, folder: Path) -> None:
        """Write into ``folder`` one of the states in which the disk may be after the power is gone."""
        names, kept = dict(self.durable_names), draw.choice((0.0, 0.5, 0.9, 1.0))
        lost: set[Name] = set()
        for change in self.pending:
            own = {name for name, _ in change.names}
            if own & lost or draw.random() >= kept:
                lost |= own
            else:
                _persist(change, names)
        self._write(names, ROOT, folder, draw)

    def _write(self, names: dict[Name, int], number: int, folder: Path, draw: random.Random) -> None:
        folder.mkdir()
        for (parent, name), child in names.items():
            if parent != number:
                continue
            if child in self.content:
                (folder / name).write_bytes(_bytes_left(self.durable[child], self.content[child], draw))
            else:
                self._write(names, child, folder / name, draw)


def _persist(change: Change, names: dict[Name, int]) -> None:
    for name, number in change.names:
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number


def _bytes_left(old: bytes, new: bytes, draw: random.Random) -> bytes:
    """What is on the platter of bytes that were written and not flushed."""
    if old == new:
        return new
    cut = draw.randrange(len(new)) if new else 0
    return draw.choice((old, new, bytes(len(new)), new[:cut], new[:cut] + bytes(len(new) - cut)))


# ----------------------------------------------------------------------------------------------------------- recording


class Recorder:
    """Records changes, and finds by itself what libraries have written since the change before."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operations: list[Operation] = []
        self._seen = self._scan()

    def say(self) -> Say:
        def record(operation: Operation) -> None:
            self.look()
            self.operations.append(operation)

        return record

    def look(self) -> None:
        """Add what has changed without having been announced."""
        now = self._scan()
        announced = {operation.path for operation in self.operations if operation.kind in ("open", "write")}
        announced |= {operation.target for operation in self.operations if operation.kind == "rename" and operation.target}
        for path, about in now.items():
            if self._seen.get(path) != about and path not in announced and not _moved(path, announced):
                self.operations.append(Operation(-1, "native", path, data=Path(path).read_bytes()))
        self._seen = now

    def _scan(self) -> dict[str, tuple[int, int]]:
        found = {}
        for folder, _, files in os.walk(self.root):
            for name in files:
                status = os.lstat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = (status.st_size, status.st_mtime_ns)
        return found


def _moved(path: str, targets: Iterable[str]) -> bool:
    """Whether a file only came along with its folder."""
    return any(path.startswith(target + os.sep) for target in targets)


def disk_of(run_dir: Path) -> Disk:
    """A disk that holds what is in ``run_dir`` now, all of it durably."""
    disk = Disk(os.path.abspath(run_dir))
    for folder, folders, files in os.walk(disk.root):
        for name in sorted(folders):
            disk.make(os.path.join(folder, name), None)
        for name in sorted(files):
            disk.make(os.path.join(folder, name), Path(folder, name).read_bytes())
    disk.durable = dict(disk.content)
    disk.durable_names, disk.pending = dict(disk.names), []
    return disk


def states(before: Path, operations: Sequence[Operation], count: int, seed: int, scratch: Path) -> Iterable[tuple[int, Path]]:
    """``count`` directories as a power failure may leave them, each with how many of the ``operations`` had been done.

    They spread evenly over the record, its end included. A directory is gone once the next is asked for.
    """
    draw = random.Random(seed)
    per_point = max(1, count // (len(operations) + 1))
    disk = disk_of(before)
    scratch.mkdir(parents=True)
    for done in range(len(operations) + 1):
        if done:
            disk.apply(operations[done - 1])
        share = per_point if done < len(operations) else max(per_point, count // 5)  # much may be lost after the end
        for number in range(share):
            folder = scratch / f"{done}-{number}"
            disk.crash(draw, folder)
            yield done, folder
            shutil.rmtree(folder)
