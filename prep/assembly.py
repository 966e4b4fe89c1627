"""From units to the files of a dataset: in the order of the corpus, whatever the order in which the units were done.

:class:`Assembly` appends one unit after the other and keeps the journal (:mod:`prep.journal`). It commits every now and then:
first the files are flushed to disk, then the journal, and then the units that are now in the files are deleted. So the work
takes little more space than the dataset, and no moment exists at which a killed run has lost a unit that was done.

Each file of ids has an index beside it, ``train.idx.npy``: where each of its documents ends, in ids from the start of the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from accel_pretrain.errors import DataError
from accel_pretrain.files import sha256_of
from accel_pretrain.shards import DTYPES, ShardInfo, index_name, sampled_sha256
from prep.dedup import FirstOnly
from prep.documents import BadDocument, Tally
from prep.encode import SPLITS, Job, UnitReport, read_blocks
from prep.journal import Workshop

INDEX = np.dtype("<u8")
_INDEX_STEP = 250_000  # ids at a time: what fits into the processor's cache
_KEYS = "keys"
_COUNTS = ("number", "tokens", "documents", "utf8_bytes", "max_id")
_COMMIT_BYTES = 64_000_000


@dataclass
class Totals:
    """What all units together came to."""

    units: int = 0
    empty: int = 0
    duplicates: int = 0
    bad: list[BadDocument] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    inputs: Any = field(default_factory=hashlib.sha256)

    def add(self, report: UnitReport, duplicates: int) -> None:
        self.units += 1
        self.empty += report.empty
        self.duplicates += duplicates
        self.bad += report.bad
        self.tally.add(report.tally)
        self.inputs.update(bytes.fromhex(report.content))


class Assembly:
    """The dataset in ``workshop`` as far as it is assembled; goes on where the journal ends. ``keys`` name the units."""

    def __init__(self, workshop: Workshop, job: Job, keys: Sequence[str], shard_tokens: int | None, input_bytes: int) -> None:
        self.workshop, self.job, self.keys = workshop, job, keys
        self.totals = Totals()
        self._window = min(_COMMIT_BYTES, input_bytes // 64)
        self._waiting: list[dict[str, Any]] = []
        self._bytes = 0
        self._files = {split: SplitFiles(workshop.dataset, split, job, shard_tokens) for split in SPLITS}
        self._first = FirstOnly(workshop.folder / _KEYS) if job.dedup else None
        self._resume()

    def _resume(self) -> None:
        """Take over what the journal proves, and cut off the rest."""
        lines = self.workshop.journal()
        count = next((n for n, (line, key) in enumerate(zip(lines, self.keys, strict=False)) if line["key"] != key), len(lines))
        count = min(count, len(self.keys))
        while True:
            state = lines[count - 1] if count else {}
            closed = [info for line in lines[:count] for info in line["closed"]]
            splits = state.get("splits", {})
            unchanged = [files.resume(splits.get(split), closed) for split, files in self._files.items()]
            if self._first:
                unchanged.append(self._first.resume(state))
            if all(unchanged):
                break
            print(f"{self.workshop.dataset}: changed since it was written; beginning anew", file=sys.stderr, flush=True)
            count = 0
        if count < len(lines):
            self.workshop.rewrite_journal(lines[:count])
        for line in lines[:count]:
            self.totals.add(UnitReport.from_plain(line["report"]), line["duplicates"])
        self._refuse_bad(self.totals.bad)

    def _refuse_bad(self, bad: Sequence[BadDocument]) -> None:
        if bad and self.job.on_error == "fail":  # the unit was done by a run that was told to skip
            raise DataError(bad[0].problem)

    @property
    def following(self) -> int:
        """The number of the unit that comes next."""
        return self.totals.units

    @property
    def tokens(self) -> int:
        return sum(files.all_tokens for files in self._files.values())

    def add(self, report: UnitReport) -> None:
        """Append the unit :attr:`following`, whose file is there."""
        self._refuse_bad(report.bad)
        key = self.keys[self.following]
        duplicates, closed = 0, list[ShardInfo]()
        for block in read_blocks(self.job.unit_path(key), report, self.job.dtype):
            if self._first:
                block, dropped = self._first.without_repeats(block)
                duplicates += dropped
            for number, split in enumerate(SPLITS):
                closed += self._files[split].append(block.ids[number], block.table[block.table["split"] == number])
        self.totals.add(report, duplicates)
        self._waiting.append(
            {
                "key": key,
                "report": report.plain() | {"blocks": [], "sha256": ""},
                "duplicates": duplicates,
                "closed": [dataclasses.asdict(info) for info in closed],
                "splits": {split: files.state() for split, files in self._files.items()},
                **(self._first.state() if self._first else {}),
            }
        )
        self._bytes += report.tokens * DTYPES[self.job.dtype].itemsize
        if self._bytes >= self._window:
            self.commit()

    def commit(self) -> None:
        """Make what was added last: on disk, and in the journal. Its units are deleted."""
        if not self._waiting:
            return
        for files in self._files.values():
            files.sync()
        if self._first:
            self._first.sync()
        self.workshop.extend_journal(self._waiting)
        for line in self._waiting:
            self.job.unit_path(line["key"]).unlink(missing_ok=True)
        self._waiting, self._bytes = [], 0
        self.workshop.show_life()

    def finish(self) -> dict[str, list[ShardInfo]]:
        """Complete the files; those of each split that has any."""
        self.commit()
        infos = {split: files.finish() for split, files in self._files.items()}
        return {split: found for split, found in infos.items() if found}

    def close(self) -> None:
        """Let go of the files as they are."""
        for files in self._files.values():
            files.close()
        if self._first:
            self._first.close()


class SplitFiles:
    """The files of one split: one, or with ``shard_tokens`` a new one at the first end of a document behind so many ids."""

    def __init__(self, folder: Path, split: str, job: Job, shard_tokens: int | None) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtype, self.eot_id = DTYPES[job.dtype], job.eot_id
        self.closed: list[ShardInfo] = []
        self._file: IO[bytes] | None = None
        self._begin(1)

    def _begin(self, number: int) -> None:
        self.number = number
        self.tokens = self.documents = self.utf8_bytes = 0
        self.max_id = -1
        self._digest = hashlib.sha256()

    @property
    def all_tokens(self) -> int:
        return self.tokens + sum(info.tokens for info in self.closed)

    @property
    def path(self) -> Path:
        return self.folder / (f"{self.split}_{self.number:06d}.bin" if self.shard_tokens else f"{self.split}.bin")

    def state(self) -> dict[str, int | str]:
        return {name: getattr(self, name) for name in _COUNTS} | {"sha256": self._digest.hexdigest()}

    def resume(self, state: dict[str, Any] | None, closed: Sequence[dict[str, Any]]) -> bool:
        """Go back to ``state``, with the files in ``closed`` before it; False when the files are not what they were then."""
        self.close()
        self.closed = [ShardInfo(**info) for info in closed if info["split"] == self.split]
        self._begin(1)
        for name in _COUNTS:
            setattr(self, name, state[name] if state else getattr(self, name))
        if not all(self._is_unchanged(info) for info in self.closed):
            return False
        kept = {name for info in self.closed for name in (info.path, info.index)}
        for path in self.folder.glob(f"{self.split}*"):
            if path.name not in kept and not (self.tokens and path == self.path):
                path.unlink()
        if self.tokens:
            wanted = self.tokens * self.dtype.itemsize
            if _size(self.path) < wanted:
                return False
            os.truncate(self.path, wanted)
            self._digest = _digest_of(self.path)
        return state is None or self._digest.hexdigest() == state.get("sha256")

    def _is_unchanged(self, info: ShardInfo) -> bool:
        """Whether a file that is complete, and may be large, is there as it was, as far as a sample of it shows."""
        path, index = self.folder / info.path, self.folder / info.index
        if _size(path) != info.tokens * self.dtype.itemsize or not index.is_file():
            return False
        return sampled_sha256(path) == info.sampled and sha256_of(index) == info.index_sha256

    def append(self, ids: np.ndarray, table: np.ndarray) -> list[ShardInfo]:
        """Add ids, with a row per document or part in ``table``; the files that this has completed."""
        stops, sizes = np.cumsum(table["tokens"], dtype=np.int64), np.cumsum(table["utf8_bytes"], dtype=np.int64)
        ends = table["ends"] == 1
        stops, sizes, total = stops[ends], sizes[ends], int(table["utf8_bytes"].sum(dtype=np.int64))
        completed: list[ShardInfo] = []
        start, first, utf8 = 0, 0, 0
        while self.shard_tokens:
            last = int(np.searchsorted(stops, start + self.shard_tokens - self.tokens))
            if last >= stops.size:
                break
            stop, size = int(stops[last]), int(sizes[last])
            self._write(ids[start:stop], last + 1 - first, size - utf8)
            completed.append(self._close_shard())
            start, first, utf8 = stop, last + 1, size
        if start < ids.size:
            self._write(ids[start:], stops.size - first, total - utf8)
        return completed

    def _write(self, ids: np.ndarray, documents: int, utf8_bytes: int) -> None:
        if self._file is None:
            self._file = self.path.open("ab")
        self._file.write(ids.data)
        self._digest.update(ids.data)
        self.tokens += ids.size
        self.documents += documents
        self.utf8_bytes += utf8_bytes
        self.max_id = max(self.max_id, int(ids.max()))

    def sync(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def _close_shard(self) -> ShardInfo:
        self.sync()
        self.close()
        index = self._write_index()
        info = ShardInfo(
            path=self.path.name, split=self.split, tokens=self.tokens, documents=self.documents, utf8_bytes=self.utf8_bytes,
            max_id=self.max_id, sha256=self._digest.hexdigest(), sampled=sampled_sha256(self.path),
            index=index.name, index_sha256=sha256_of(index),
        )  # fmt: skip
        self.closed.append(info)
        self._begin(self.number + 1)
        return info

    def finish(self) -> list[ShardInfo]:
        if self.tokens:
            self._close_shard()
        return self.closed

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _write_index(self) -> Path:
        """The file of document ends, from the ids: the end-of-text id stands at ends and nowhere else, which is checked."""
        path, count = self.path.with_name(index_name(self.path)), 0
        header = io.BytesIO()
        about = {"descr": INDEX.str, "fortran_order": False, "shape": (self.documents,)}
        np.lib.format.write_array_header_1_0(header, about)
        with self.path.open("rb") as ids, path.open("wb") as file:
            file.write(header.getvalue())
            for start in range(0, self.tokens, _INDEX_STEP):
                ends = np.flatnonzero(np.fromfile(ids, self.dtype, min(_INDEX_STEP, self.tokens - start)) == self.eot_id)
                file.write((ends.astype(INDEX) + np.uint64(start + 1)).data)
                count += ends.size
            file.flush()
            os.fsync(file.fileno())
        if count != self.documents:
            raise DataError(f"{self.path}: {self.documents:,} documents, but {count:,} end-of-text ids; please report this")
        return path


def _digest_of(path: Path) -> Any:
    """SHA-256 of a file's bytes, to go on with."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
