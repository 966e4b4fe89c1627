"""How many documents of the val split are in the train split too, where the val split was given as files of its own.

Found in the ids, when all of them are there: equal texts have equal ids. Of the train split only documents are read that have
the length and the first and last ids of one in the val split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from accel_pretrain.shards import DTYPES, ShardInfo

_AT_ONCE = 1_000_000  # documents


def shared_documents(folder: Path, train: Sequence[ShardInfo], val: Sequence[ShardInfo], dtype: str) -> int:
    """The number of documents in the files ``val`` of ``folder`` that are also in its files ``train``."""
    known = np.unique(np.concatenate([marks for info in val for *_, marks in _documents(folder, info, dtype)]))
    found = {digest for info in train for digest in _digests(folder, info, dtype, known)}
    return sum(digest in found for info in val for digest in _digests(folder, info, dtype, known))


def _digests(folder: Path, info: ShardInfo, dtype: str, known: np.ndarray) -> Iterator[bytes]:
    """A hash of every document whose mark is ``known``."""
    for ids, starts, stops, marks in _documents(folder, info, dtype):
        for row in np.flatnonzero(np.isin(marks, known)):
            yield hashlib.blake2b(ids[starts[row] : stops[row]].tobytes(), digest_size=16).digest()


def _documents(folder: Path, info: ShardInfo, dtype: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """All ids, and of many documents at a time: starts, stops, and a number that equal documents share."""
    ids = np.memmap(folder / info.path, dtype=DTYPES[dtype], mode="r")
    ends = np.load(folder / info.index, mmap_mode="r")
    for at in range(0, len(ends), _AT_ONCE):
        stops = np.asarray(ends[at : at + _AT_ONCE], dtype=np.int64)
        starts = np.concatenate([[ends[at - 1] if at else 0], stops[:-1]]).astype(np.int64)
        last = np.maximum(starts, stops - 2)  # before the end of the text
        mixed = (stops - starts).astype(np.uint64) << np.uint64(32)
        yield ids, starts, stops, mixed ^ (ids[starts].astype(np.uint64) << np.uint64(16)) ^ ids[last].astype(np.uint64)
