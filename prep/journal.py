"""The work folder: what a run keeps while it works, so that the next one can go on where it was stopped.

Beside ``DIR`` stands ``.DIR.work`` until the dataset is published:

- ``lock``: held by the run that works here, with its process id and host. The system lets go of it when that process dies.
- ``job.json``: the options that decide the bytes. Other options do not go on with this work; they are refused, with what
  differs.
- ``units/KEY.unit``: what became of one unit. Written under another name, flushed, then renamed: under this name it is whole.
  KEY is a hash of the options, the tokenizer and the unit (file, range, size and time of change), so that no unit of another
  job or of a file that has changed since is ever taken for it.
- ``dataset/``: the files that will be published, as far as they are assembled.
- ``assembled.jsonl``: one line per unit in there, with what it added and where each file then ended. A unit is deleted only
  when its line and the files are on disk; what is in the files behind the last whole line is cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from accel_pretrain import lock
from accel_pretrain.errors import DataError
from accel_pretrain.files import write_whole

JOB = "job"
UNITS, DATASET, ASSEMBLED, LOCK, TURN = "units", "dataset", "assembled.jsonl", "lock", "turn"
TEMPORARY = ".tmp"
_OWN = frozenset({UNITS, DATASET, ASSEMBLED, LOCK, TURN, f"{JOB}.json", "learned.json", "keys"})


def work_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.work"


class Workshop:
    """The work folder of one dataset folder ``out``, held by this process from :meth:`open` to :meth:`close`."""

    def __init__(self, out: Path) -> None:
        self.out = Path(os.path.abspath(out))
        self.folder = work_folder(self.out)
        self.units, self.dataset = self.folder / UNITS, self.folder / DATASET
        self._lock: IO[str] | None = None

    @contextlib.contextmanager
    def held(self, shared: bool = False) -> Iterator[None]:
        """Hold the folder's lock, alone or ``shared`` with tasks of the same array; :class:`DataError` when it is taken.

        A folder in which nothing was finished is gone afterwards.
        """
        self._refuse_foreign()
        try:
            self.units.mkdir(parents=True, exist_ok=True)
            self.dataset.mkdir(exist_ok=True)
            self._lock = _take(self.folder / LOCK, shared)
        except OSError as error:
            reason = f"{self.out.parent}: {error.strerror}"
            raise DataError(f"-o {self.out}: cannot be written ({reason}); choose another place") from None
        try:
            yield
        finally:
            if not shared:
                if not self.kept():
                    self.discard()
                self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    def _refuse_foreign(self) -> None:
        """Raises :class:`DataError` where somebody else's files stand under the name of the work folder."""
        names = os.listdir(self.folder) if self.folder.is_dir() else [self.folder.name] if os.path.lexists(self.folder) else []
        if foreign := sorted(name for name in names if name not in _OWN and not name.startswith(TEMPORARY)):
            raise DataError(
                f"{self.folder}: is in the way (it holds {foreign[0]}); move it, or give another -o than {self.out}"
            )

    def show_life(self) -> None:
        """Tell runs on other machines that this one works."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.utime(self._lock.fileno())

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Tasks of one array, which hold the lock together, wait here for each other."""
        with (self.folder / TURN).open("a") as file:
            with contextlib.suppress(ImportError):
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # ------------------------------------------------------------------------------------------------------------ the job

    def start(self, job: Mapping[str, Any], fresh: bool) -> None:
        """Go on with the job that is here if it is this one, or begin it; raises :class:`DataError` where it is another."""
        before = None if fresh else self.noted(JOB) or None
        wanted = json.loads(json.dumps(job))
        if before is not None and (differing := _differences(before, wanted)):
            if self.kept():
                raise DataError(
                    f"{self.folder} holds an unfinished run with other options ({'; '.join(differing)}); "
                    f"use the same options to go on with it, or add --fresh to begin anew and lose it"
                )
            before = None
        if before is None:
            self.discard(contents_only=True)
        self.note(JOB, wanted)

    def note(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep something small until the work folder is deleted."""
        write_whole(self.folder / f"{name}.json", json.dumps(content).encode())

    def noted(self, name: str) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / f"{name}.json").read_bytes())
        return {}

    def remove_if_free(self) -> None:
        """Delete the folder, unless a run works in it: the dataset is there, so that nothing here is wanted."""
        if self.folder.exists():
            with contextlib.suppress(DataError), self.held():
                self.discard(contents_only=True)

    def kept(self) -> int:
        """How many units are done and kept here."""
        return len(self.finished() | {line["key"] for line in self.journal()})

    def discard(self, contents_only: bool = False) -> None:
        """Delete what is here. The lock file goes last, and stays open: who opens it meanwhile finds it taken."""
        for name in os.listdir(self.folder) if self.folder.is_dir() else ():
            if name not in (LOCK, TURN):
                _delete(self.folder / name)
        if contents_only:
            self.units.mkdir(exist_ok=True)
            self.dataset.mkdir(exist_ok=True)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    # ---------------------------------------------------------------------------------------------------------- the units

    def unit_path(self, key: str) -> Path:
        return self.units / f"{key}.unit"

    def sweep(self, keys: set[str]) -> None:
        """Delete what killed processes left half written, and units of files that have changed since."""
        for path in self.units.iterdir():
            if path.suffix == TEMPORARY or path.name.removesuffix(".unit") not in keys:
                path.unlink(missing_ok=True)

    def finished(self) -> set[str]:
        """The keys of the units whose files are here."""
        names = os.listdir(self.units) if self.units.is_dir() else []
        return {name.removesuffix(".unit") for name in names if name.endswith(".unit")}

    # -------------------------------------------------------------------------------------------------------- the journal

    def journal(self) -> list[dict[str, Any]]:
        """The lines of the journal; one that was torn while it was written, and all behind it, count as not written."""
        lines = []
        with contextlib.suppress(OSError), (self.folder / ASSEMBLED).open("rb") as file:
            for line in file:
                try:
                    lines.append(json.loads(line) if line.endswith(b"\n") else None)
                except ValueError:
                    break
                if lines[-1] is None:
                    lines.pop()
        return lines

    def rewrite_journal(self, lines: list[dict[str, Any]]) -> None:
        write_whole(self.folder / ASSEMBLED, b"".join(line_of(entry) for entry in lines))

    def extend_journal(self, lines: list[dict[str, Any]]) -> None:
        """Add ``lines``; they are on disk when this returns."""
        with (self.folder / ASSEMBLED).open("ab") as file:
            file.write(b"".join(line_of(entry) for entry in lines))
            file.flush()
            os.fsync(file.fileno())


def line_of(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _differences(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    keys = [key for key in {**before, **wanted} if before.get(key) != wanted.get(key)]
    return [f"{key}: {_short(before.get(key))} there, {_short(wanted.get(key))} here" for key in keys]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # a worker of a killed run may still be writing there
    else:
        path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------- the lock


def _take(path: Path, shared: bool) -> IO[str]:
    """:func:`accel_pretrain.lock.take`; raises :class:`DataError` when another run has it."""
    try:
        return lock.take(path, shared)
    except lock.Taken as taken:
        if taken.seen:
            message = f"{taken.owner} worked on this dataset less than {lock.SILENCE} s ago; wait, or end it"
        else:
            message = f"another run works on this dataset ({taken.owner}); wait for it or end it, or use another -o"
        raise DataError(message) from None
