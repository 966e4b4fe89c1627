"""The on-disk format of token datasets: the one file that writes it and the one that reads it. Torch-free.

A dataset is a folder:

- ``train.bin``, ``val.bin``: token ids, little-endian uint16 (uint32 where the vocabulary needs it), no header, every document
  followed by the end-of-text id. One ``np.memmap`` reads them, nanoGPT's reader among others.
- ``train.idx.npy``, ``val.idx.npy``: where each document ends, in tokens from the beginning of its file: uint64, as NumPy saves
  it. Datasets that were written before there was such an index do without.
- ``tokenizer/``: the tokenizer, see :mod:`accel_pretrain.tokenizer`.
- ``manifest.json``: sizes, hashes, largest id, documents and UTF-8 bytes per file, and a hash of itself. **Written last**: a
  folder without it is incomplete, and is not opened.

Write with :class:`ShardWriter` and :func:`write_manifest`; read with :func:`open_split`, which also takes the token files of
other programs (:mod:`accel_pretrain.token_formats`).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from accel_pretrain.errors import DataError
from accel_pretrain.files import sha256_of
from accel_pretrain.manifest import (
    DTYPES,
    MANIFEST,
    Manifest,
    ShardInfo,
    read_manifest,
    sampled_sha256,
    write_manifest,
)
from accel_pretrain.token_formats import INDEX_SUFFIX, files_of_split, map_ids, open_token_file, split_word, token_files

__all__ = [
    "DTYPES",
    "MANIFEST",
    "Manifest",
    "ShardInfo",
    "ShardWriter",
    "TokenSplit",
    "as_ids",
    "dtype_for",
    "index_name",
    "is_dataset",
    "open_split",
    "read_manifest",
    "sampled_sha256",
    "splits_in",
    "write_manifest",
]
_HASHED_AT_OPEN = 256 << 20
_INDEX_HEADER_BYTES = 128


def dtype_for(largest_id: int) -> str:
    """The smallest of the two dtypes that holds ``largest_id``."""
    return "uint16" if largest_id <= 0xFFFF else "uint32"


def as_ids(ids: np.ndarray, dtype: str, vocab_size: int) -> np.ndarray:
    """``ids`` cast to ``dtype`` after checking that every id is below ``vocab_size``: a plain cast would wrap silently."""
    largest = min(vocab_size - 1, int(np.iinfo(DTYPES[dtype]).max))
    if ids.size and ((ids.dtype.kind != "u" and int(ids.min()) < 0) or int(ids.max()) > largest):
        raise DataError(
            f"token ids reach from {ids.min()} to {ids.max()}; the vocabulary has {vocab_size} ids, stored as {dtype}"
        )
    return ids.astype(DTYPES[dtype], copy=False)


# ------------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Appends documents to one file of ids. Written under a temporary name, and renamed on :meth:`close` once on disk.

    With ``eot_id``, the id after which a document ends, the file of document ends is written beside it.
    """

    def __init__(self, path: Path, split: str, dtype: str, vocab_size: int, eot_id: int | None = None) -> None:
        self.path, self.split, self.dtype, self.vocab_size, self.eot_id = path, split, dtype, vocab_size, eot_id
        self.tokens = self.documents = self.utf8_bytes = self.ends = 0
        self.max_id = -1
        self._digest = hashlib.sha256()
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file = self._temporary.open("wb")
        self._index_temporary = path.with_name(f".{index_name(path)}.tmp")
        self._index = self._open_index() if eot_id is not None else None

    def _open_index(self) -> BinaryIO:
        index = self._index_temporary.open("wb")
        index.write(bytes(_INDEX_HEADER_BYTES))  # it says how many there are, which is known at the end
        return index

    def append(self, ids: np.ndarray, documents: int = 1, utf8_bytes: int = 0) -> None:
        """Add ``ids``, in which ``documents`` documents end that were ``utf8_bytes`` long as text."""
        stored = as_ids(ids, self.dtype, self.vocab_size)
        self._file.write(stored.data)
        self._digest.update(stored.data)
        if self._index is not None:
            ends = np.flatnonzero(stored == self.eot_id).astype("<u8") + np.uint64(self.tokens + 1)
            self._index.write(ends.data)
            self.ends += ends.size
        self.tokens += stored.size
        self.documents += documents
        self.utf8_bytes += utf8_bytes
        self.max_id = max(self.max_id, int(stored.max())) if stored.size else self.max_id

    def discard(self) -> None:
        """Give up: close the files and delete them, unless :meth:`close` has given them their names."""
        for file, temporary in ((self._file, self._temporary), (self._index, self._index_temporary)):
            if file is not None:
                file.close()
                temporary.unlink(missing_ok=True)

    def close(self) -> ShardInfo:
        """Make the file durable under its name; raises :class:`DataError` if the ends are not as many as the documents."""
        if self._index is not None and self.ends != self.documents:
            raise DataError(f"{self.path}: {self.documents:,} documents, but {self.ends:,} end-of-text ids in them")
        _finish(self._file, self._temporary, self.path)
        index = ""
        if self._index is not None:
            index = index_name(self.path)
            self._index.seek(0)
            self._index.write(_index_header(self.ends))
            _finish(self._index, self._index_temporary, self.path.with_name(index))
        return ShardInfo(
            path=self.path.name, split=self.split, tokens=self.tokens, documents=self.documents,
            utf8_bytes=self.utf8_bytes, max_id=self.max_id, sha256=self._digest.hexdigest(),
            sampled=sampled_sha256(self.path), index=index,
            index_sha256=sha256_of(self.path.with_name(index)) if index else "",
        )  # fmt: skip


def _finish(file: BinaryIO, temporary: Path, path: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
    temporary.replace(path)


def index_name(path: Path) -> str:
    """The name of the file of document ends that belongs to a file of ids: ``train.idx.npy`` to ``train.bin``."""
    return f"{path.stem}{INDEX_SUFFIX}"


def _index_header(count: int) -> bytes:
    """What NumPy's format 1.0 puts before ``count`` uint64, always 128 bytes long."""
    head = b"\x93NUMPY\x01\x00" + (_INDEX_HEADER_BYTES - 10).to_bytes(2, "little")
    text = f"{{'descr': '<u8', 'fortran_order': False, 'shape': ({count},), }}".encode()
    return head + text.ljust(_INDEX_HEADER_BYTES - 11) + b"\n"


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """The ids of one split, memory-mapped: ``files`` are read-only arrays, one per shard; no document crosses two of them.

    ``document_ends`` has for each file where its documents end, in tokens. It, ``utf8_bytes`` and ``tokenizer`` are None where
    that is not known. A mixture has ``parts``, whose files are its files, and a whole number as the weight of each, which
    over the first ``end_tokens`` become ``end_weights`` if there are such.
    """

    source: str
    files: tuple[np.ndarray, ...]
    max_id: int
    fingerprint: str
    utf8_bytes: int | None = None
    documents: int | None = None
    document_ends: tuple[np.ndarray, ...] | None = None
    tokenizer: dict[str, Any] | None = None
    tokenizer_path: Path | None = None
    parts: tuple[TokenSplit, ...] = ()
    weights: tuple[int, ...] = ()
    end_weights: tuple[int, ...] = ()
    end_tokens: int = 0

    @property
    def tokens(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def bytes_per_token(self) -> float | None:
        return self.utf8_bytes / self.tokens if self.utf8_bytes else None


def open_split(path: Path, split: str, dtype: str | None = None) -> TokenSplit:
    """Open ``split`` of a dataset folder, or token files of other programs: one, or a folder or a glob of them.

    Sizes and hashes are checked against the manifest; what comes without one is read once for its largest id. ``dtype`` is that
    of files that do not say theirs (uint16 unless told otherwise). Raises :class:`DataError`.
    """
    if path.is_dir() and is_dataset(path):
        return _open_dataset(path, split, dtype)
    files = files_of_split(path, split)
    if not files and token_files(path):
        raise DataError(f"{path} has no {split} split: the names of its files speak of other ones")
    if not files:
        raise DataError(
            f"{os.path.abspath(path)} does not exist; make a dataset with: python -m prep.tokenize SRC... -o {path}"
        )
    if path.is_file() and (path.parent / MANIFEST).is_file():
        manifest = read_manifest(path.parent)
        if named := [info.split for info in manifest.files if info.path == path.name]:
            return _open_dataset(path.parent, named[0], dtype, path.name)
    return _open_foreign(path, files, dtype)


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a dataset of ours, complete or not, rather than a folder of token files."""
    marks = (folder / MANIFEST).exists() or (folder / "tokenizer").is_dir() or any(folder.glob(f"*{INDEX_SUFFIX}"))
    return marks or not token_files(folder)


def splits_in(path: Path) -> list[str]:
    """The splits that a path says it holds: a dataset by its manifest, token files by their names; empty: it does not say."""
    if path.is_dir() and is_dataset(path):
        return list(dict.fromkeys(info.split for info in read_manifest(path).files))
    words = {split_word(file) for file in token_files(path)}
    return sorted({word or "train" for word in words}) if len(words) > 1 else []


def _open_dataset(folder: Path, split: str, dtype: str | None, only: str | None = None) -> TokenSplit:
    """All files of a split, or ``only`` the one of that name."""
    manifest = read_manifest(folder)
    if dtype is not None and dtype != manifest.dtype:
        raise DataError(f"data.dtype {dtype}: {folder} holds {manifest.dtype}; leave data.dtype null for a dataset folder")
    infos = [info for info in manifest.files if info.split == split]
    if not infos:
        splits = sorted({info.split for info in manifest.files})
        raise DataError(f"{folder} has no {split} split, only {', '.join(splits)}; write it again with --val 1%")
    fingerprint = manifest.fingerprint
    if only and len(infos) > 1:
        infos = [info for info in infos if info.path == only]
        fingerprint = hashlib.sha256(f"{fingerprint} {infos[0].sha256}".encode()).hexdigest()
    files = tuple(_map_shard(folder / info.path, manifest.dtype, info) for info in infos)
    indexed = all(info.index for info in infos)
    return TokenSplit(
        source=str(folder / only if only else folder),
        files=files,
        max_id=max(info.max_id for info in infos),
        fingerprint=fingerprint,
        utf8_bytes=sum(info.utf8_bytes for info in infos),
        documents=sum(info.documents for info in infos),
        document_ends=tuple(_map_index(folder / info.index, info) for info in infos) if indexed else None,
        tokenizer=manifest.tokenizer,
        tokenizer_path=folder / "tokenizer",
    )


def _map_shard(path: Path, dtype: str, info: ShardInfo) -> np.ndarray:
    """Map one shard after checking its size, and its hash where that takes a fraction of a second, else that of a sample."""
    size = info.tokens * DTYPES[dtype].itemsize
    _check(path, size, info.sha256, info.sampled)
    return map_ids(path, dtype)


def _map_index(path: Path, info: ShardInfo) -> np.ndarray:
    _check(path, _INDEX_HEADER_BYTES + 8 * info.documents, info.index_sha256)
    return map_ids(path, "uint64", _INDEX_HEADER_BYTES) if info.documents else np.empty(0, dtype="<u8")


def _check(path: Path, expected: int, sha256: str, sampled: str = "") -> None:
    found = path.stat().st_size if path.exists() else None
    if found != expected:
        state = "is missing" if found is None else f"is {found} bytes long instead of {expected}"
        raise DataError(f"{path} {state}: the dataset is damaged; write it again with prep.tokenize")
    small = expected <= _HASHED_AT_OPEN
    if (small and sha256_of(path) != sha256) or (not small and sampled and sampled_sha256(path) != sampled):
        raise DataError(f"{path} was changed after it was written: the dataset is damaged; write it again with prep.tokenize")


def _open_foreign(path: Path, paths: list[Path], dtype: str | None) -> TokenSplit:
    opened = [open_token_file(file, dtype) for file in paths]
    largest = [file.largest_id() for file in opened]
    prints = [file.fingerprint(id) for file, id in zip(opened, largest, strict=True)]
    ends = tuple(file.document_ends for file in opened if file.document_ends is not None)
    indexed = len(ends) == len(opened)
    return TokenSplit(
        source=str(path),
        files=tuple(file.ids for file in opened),
        max_id=max(largest),
        fingerprint=prints[0] if len(prints) == 1 else hashlib.sha256("\n".join(prints).encode()).hexdigest(),
        documents=sum(own.size for own in ends) if indexed else None,
        document_ends=ends if indexed else None,
    )
