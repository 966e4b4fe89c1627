"""From the documents of one unit to a file of their ids: the work of a worker, wherever it runs.

A unit file is a run of blocks and, at its end, one line of JSON that says where they are. A block holds what was encoded since
the last one, in three parts: a table with a row per document or part of one, in the order of the corpus (split, ids, bytes of
text, whether it ends there); with ``--dedup exact`` their keys; and the ids of the train split, then those of the val split.
No more than a block is in memory, however long the unit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from accel_pretrain.errors import DataError, PretrainError
from accel_pretrain.shards import DTYPES, as_ids
from prep.documents import OR_SKIP, BadDocument, Document, Piece, Tally
from prep.engines import Engine
from prep.normal import KEY_BYTES
from prep.split import TRAIN, VAL, SplitRule
from prep.units import Unit

SPLITS = (TRAIN, VAL)
BLOCK_IDS = 500_000
ROW = np.dtype([("tokens", "<u4"), ("utf8_bytes", "<u4"), ("split", "u1"), ("ends", "u1")])
_TAIL = 16
_MAGIC = b"prepunit"


@dataclass(frozen=True)
class Job:
    """What is the same for every unit. The tokenizer is the one saved in ``folder/dataset/tokenizer``."""

    folder: Path
    dtype: str
    eot_id: int
    rule: SplitRule
    on_error: str
    engine: str = "tiktoken"
    dedup: bool = False

    def unit_path(self, key: str) -> Path:
        return self.folder / "units" / f"{key}.unit"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "dataset" / "tokenizer"


@dataclass
class UnitReport:
    """What became of one unit: the JSON at the end of its file. ``blocks`` are (rows, train ids, val ids)."""

    content: str = ""
    sha256: str = ""
    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    keyed: bool = False
    empty: int = 0
    bad: list[BadDocument] = field(default_factory=list)
    tally: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(train + val for _, train, val in self.blocks)

    def plain(self) -> dict[str, Any]:
        return vars(self) | {"bad": [bad._asdict() for bad in self.bad]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> UnitReport:
        report = cls(**{key: value for key, value in plain.items() if key in cls.__dataclass_fields__})
        report.bad = [BadDocument(**bad) for bad in plain["bad"]]
        return report


def encode_unit(
    job: Job,
    engine: Engine,
    unit: Unit,
    key: str,
    without: frozenset[int] = frozenset(),
    on_document: Callable[[int], None] | None = None,
) -> UnitReport:
    """Read, split and encode a unit, and commit its file; raises :class:`DataError` on a bad document, or skips it.

    ``without`` are the numbers of documents that kill the process that encodes them. ``on_document`` hears each number first.
    """
    report, tally = UnitReport(keyed=job.dedup), Tally()
    path = job.unit_path(key)
    temporary = path.with_name(f"{key}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            block = _Block(job, engine, file)
            for number, (piece, document) in enumerate(unit.located(tally)):
                if on_document is not None:
                    on_document(number)
                if number in without and isinstance(document, Document):
                    found = _unusable(piece, document, "encoding it kills the process")
                else:
                    found = _encode(job, engine, block, unit.split, piece, document)
                if isinstance(found, BadDocument):
                    if job.on_error == "fail":
                        raise DataError(found.problem)
                    report.bad.append(found)
                    if isinstance(document, Document) and not document.whole:
                        _end_early(job, block, unit.split, document)
                elif not found:
                    report.empty += 1
                if block.size >= BLOCK_IDS:
                    report.blocks.append(block.flush())
            if block.rows:
                report.blocks.append(block.flush())
            report.content = unit.content_in(tally).hex()
            report.sha256, report.tally = block.digest.hexdigest(), tally.plain()
            line = json.dumps(report.plain()).encode()
            file.write(line + len(line).to_bytes(8, "little") + _MAGIC)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return report


def _encode(
    job: Job, engine: Engine, block: _Block, split: str | None, piece: Piece, document: Document | BadDocument
) -> bool | BadDocument:
    """Encode one document into ``block``: True, False when it is empty, or why it cannot be."""
    if isinstance(document, BadDocument):
        return document
    if document.is_empty:
        return False
    parts = []
    try:
        for place, part in [(split, document)] if split else job.rule.place(document):
            parts.append((place, engine.encode(part.data), part))
    except (MemoryError, KeyboardInterrupt, SystemExit, PretrainError):
        raise
    except BaseException as error:  # a panic in a Rust extension is not an Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return _unusable(piece, document, f"the tokenizer fails on it ({reason})")
    for place, ids, part in parts:
        block.add(place, ids, part, _key(job, part))
    return True


def _end_early(job: Job, block: _Block, split: str | None, part: Document) -> None:
    """A part of a long document is left out: what stands before it ends there, so that no other document is joined to it."""
    block.add(split or job.rule.split_of(part.digest), block.eot[:0], part._replace(data=b"", ends=True), _key(job, part))


def _key(job: Job, part: Document) -> bytes:
    return part.key if job.dedup else b""


def encode_alone(engine: Engine, rule: SplitRule, unit: Unit, number: int) -> None:
    """Encode one document of a unit and forget the ids: to see whether this ends the process."""
    for index, document in enumerate(unit.documents()):
        if index == number and isinstance(document, Document):
            for _, part in [("", document)] if unit.split else rule.place(document):
                engine.encode(part.data)
            return


def _unusable(piece: Piece, document: Document, reason: str) -> BadDocument:
    return BadDocument(piece.path, document.offset, reason + OR_SKIP, document.place, document.packing)


class _Block:
    """What was encoded since the last flush."""

    def __init__(self, job: Job, engine: Engine, file: IO[bytes]) -> None:
        self.job, self.file, self.vocab_size = job, file, engine.tokenizer.vocab_size
        self.eot = np.array([job.eot_id], dtype=DTYPES[job.dtype])
        self.digest = hashlib.sha256()
        self._clear()

    def _clear(self) -> None:
        self.size = 0
        self.rows: list[tuple[int, int, int, bool]] = []
        self.keys: list[bytes] = []
        self.ids: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def add(self, split: str, ids: np.ndarray, part: Document, key: bytes) -> None:
        number, size = SPLITS.index(split), ids.size + part.ends
        self.ids[number].append(ids)
        if part.ends:
            self.ids[number].append(self.eot)
        self.rows.append((size, len(part.data), number, part.ends))
        if self.job.dedup:
            self.keys.append(key)
        self.size += size

    def flush(self) -> tuple[int, int, int]:
        table = np.array(self.rows, dtype=ROW)
        counts = []
        self._write(table.tobytes())
        self._write(b"".join(self.keys))
        for parts in self.ids:
            ids = as_ids(np.concatenate(parts), self.job.dtype, self.vocab_size) if parts else self.eot[:0]
            self._write(ids.data)
            counts.append(ids.size)
        rows = len(self.rows)
        self._clear()
        return rows, counts[0], counts[1]

    def _write(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.file.write(data)


# ------------------------------------------------------------------------------------------------------ reading it again


@dataclass(frozen=True)
class Block:
    """One block of a unit file: ``table`` of :data:`ROW`, ``keys`` (bytes per row, or empty), ``ids`` of train and val."""

    table: np.ndarray
    keys: list[bytes]
    ids: tuple[np.ndarray, np.ndarray]


def read_report(path: Path) -> UnitReport:
    """The report at the end of a unit file; raises :class:`ValueError` or :class:`OSError` when it is none."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        tail = file.read()
        length = int.from_bytes(tail[:8], "little")
        if tail[8:] != _MAGIC or length > size - _TAIL:
            raise ValueError(f"{path} is not a unit file")
        file.seek(size - _TAIL - length)
        return UnitReport.from_plain(json.loads(file.read(length)))


def is_intact(path: Path, report: UnitReport, dtype: str) -> bool:
    """Whether the blocks are what was hashed when they were written."""
    digest = hashlib.sha256()
    left = sum(_block_bytes(block, report.keyed, dtype) for block in report.blocks)
    with path.open("rb") as file:
        while left and (data := file.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
    return left == 0 and digest.hexdigest() == report.sha256


def _block_bytes(block: tuple[int, int, int], keyed: bool, dtype: str) -> int:
    rows, train, val = block
    return rows * (ROW.itemsize + KEY_BYTES * keyed) + (train + val) * DTYPES[dtype].itemsize


def read_blocks(path: Path, report: UnitReport, dtype: str) -> Iterator[Block]:
    """The blocks of a unit file, one at a time."""
    itemsize = DTYPES[dtype].itemsize
    with path.open("rb") as file:
        for rows, *counts in report.blocks:
            table = np.frombuffer(file.read(rows * ROW.itemsize), dtype=ROW)
            packed = file.read(rows * KEY_BYTES) if report.keyed else b""
            keys = [packed[start : start + KEY_BYTES] for start in range(0, len(packed), KEY_BYTES)]
            train, val = (np.frombuffer(file.read(count * itemsize), dtype=DTYPES[dtype]) for count in counts)
            yield Block(table, keys, (train, val))
