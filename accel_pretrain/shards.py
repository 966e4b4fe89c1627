"""The on-disk format of token datasets: the one file that writes it and the one that reads it. Torch-free.

A dataset is a folder:

- ``train.bin``, ``val.bin``: token ids, little-endian uint16 (uint32 where the vocabulary needs it), no header, every document
  followed by the end-of-text id. One ``np.memmap`` reads them, nanoGPT's reader among others.
- ``tokenizer/``: the tokenizer, see :mod:`accel_pretrain.tokenizer`.
- ``manifest.json``: sizes, hashes, largest id, documents and UTF-8 bytes per file. **Written last**: a folder without it is
  incomplete, and is not opened.

Write with :class:`ShardWriter` and :func:`write_manifest`; read with :func:`open_split`, which also takes a bare ``.bin`` or
``.ids`` file of ids, and files that begin with the header of llm.c.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from accel_pretrain.errors import DataError

MANIFEST = "manifest.json"
FORMAT = "accel_pretrain.tokens"
VERSION = 1
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_HASHED_AT_OPEN = 256 << 20
_LLMC_HEADER_BYTES = 1024
_LLMC_MAGIC = {20240520: "uint16", 20240801: "uint32"}  # llm.c, dev/data/data_common.py


def dtype_for(largest_id: int) -> str:
    """The smallest of the two dtypes that holds ``largest_id``."""
    return "uint16" if largest_id <= 0xFFFF else "uint32"


def as_ids(ids: np.ndarray, dtype: str, vocab_size: int) -> np.ndarray:
    """``ids`` cast to ``dtype`` after checking that every id is below ``vocab_size``: a plain cast would wrap silently."""
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= min(vocab_size, np.iinfo(DTYPES[dtype]).max + 1)):
        raise DataError(
            f"token ids reach from {ids.min()} to {ids.max()}; the vocabulary has {vocab_size} ids, stored as {dtype}"
        )
    return ids.astype(DTYPES[dtype], copy=False)


# ---------------------------------------------------------------------------------------------------------- the manifest


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One file of token ids: its place, its size in three units, its largest id, and the SHA-256 of its bytes."""

    path: str
    split: str
    tokens: int
    documents: int
    utf8_bytes: int
    max_id: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``manifest.json`` says. ``tokenizer`` has name, vocab_size, eot_id, fingerprint; ``prep`` is the writer's own."""

    dtype: str
    tokenizer: dict[str, Any]
    files: tuple[ShardInfo, ...]
    prep: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens and the tokenizer, whatever the folder is called."""
        parts = [self.dtype, self.tokenizer["fingerprint"], *(f"{info.split} {info.sha256}" for info in self.files)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Complete a dataset: the manifest appears under its name only when all of it, and all before it, is on disk."""
    document = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}
    temporary = folder / f".{MANIFEST}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a dataset folder, or :class:`DataError`."""
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise DataError(f"{path}: format {document['format']} version {document['version']}; this reads {FORMAT} {VERSION}")
        files = tuple(ShardInfo(**info) for info in document["files"])
        for info in files:
            if Path(info.path).name != info.path:
                raise ValueError(f"bad file name {info.path!r}")
        if document["dtype"] not in DTYPES or document["tokenizer"]["vocab_size"] < 1:
            raise ValueError("bad dtype or tokenizer")
        return Manifest(dtype=document["dtype"], tokenizer=document["tokenizer"], files=files, prep=document.get("prep", {}))
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist: {folder} is not a token dataset, or prep did not finish there. "
            f"Run: python -m prep.tokenize SRC... -o {folder}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); write the dataset again with prep.tokenize") from None


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable (POSIX; elsewhere a folder cannot be opened, and there is nothing to do)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Appends documents to one file of ids. Written under a temporary name, and renamed on :meth:`close` once on disk."""

    def __init__(self, path: Path, split: str, dtype: str, vocab_size: int) -> None:
        self.path, self.split, self.dtype, self.vocab_size = path, split, dtype, vocab_size
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file = self._temporary.open("wb")
        self._digest = hashlib.sha256()
        self.tokens = self.documents = self.utf8_bytes = 0
        self.max_id = -1

    def append(self, ids: np.ndarray, documents: int = 1, utf8_bytes: int = 0) -> None:
        """Add ``ids``, which hold ``documents`` whole documents that were ``utf8_bytes`` long as text."""
        stored = as_ids(ids, self.dtype, self.vocab_size)
        self._file.write(stored.data)
        self._digest.update(stored.data)
        self.tokens += stored.size
        self.documents += documents
        self.utf8_bytes += utf8_bytes
        self.max_id = max(self.max_id, int(stored.max())) if stored.size else self.max_id

    def discard(self) -> None:
        """Give up: close the file and delete it, unless :meth:`close` has given it its name."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def close(self) -> ShardInfo:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)
        return ShardInfo(
            path=self.path.name, split=self.split, tokens=self.tokens, documents=self.documents,
            utf8_bytes=self.utf8_bytes, max_id=self.max_id, sha256=self._digest.hexdigest(),
        )  # fmt: skip


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """The ids of one split, memory-mapped: ``files`` are read-only arrays, one per shard; no document crosses two of them.

    ``utf8_bytes`` and ``tokenizer`` are None where a bare file came without a manifest.
    """

    source: str
    files: tuple[np.ndarray, ...]
    max_id: int
    fingerprint: str
    utf8_bytes: int | None = None
    documents: int | None = None
    tokenizer: dict[str, Any] | None = None
    tokenizer_path: Path | None = None

    @property
    def tokens(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def bytes_per_token(self) -> float | None:
        return self.utf8_bytes / self.tokens if self.utf8_bytes else None


def open_split(path: Path, split: str, dtype: str | None = None) -> TokenSplit:
    """Open ``split`` of a dataset folder, or a bare file of ids (``dtype`` uint16 unless told otherwise).

    Sizes are checked against the manifest; a bare file is read once for its largest id. Raises :class:`DataError`.
    """
    if path.is_dir():
        return _open_dataset(path, split, dtype)
    if not path.exists():
        raise DataError(
            f"{os.path.abspath(path)} does not exist; make a dataset with: python -m prep.tokenize SRC... -o {path}"
        )
    if (path.parent / MANIFEST).is_file():
        manifest = read_manifest(path.parent)
        if named := [info.split for info in manifest.files if info.path == path.name]:
            return _open_dataset(path.parent, named[0], dtype)
    return _open_bare(path, dtype)


def _open_dataset(folder: Path, split: str, dtype: str | None) -> TokenSplit:
    manifest = read_manifest(folder)
    if dtype is not None and dtype != manifest.dtype:
        raise DataError(f"data.dtype {dtype}: {folder} holds {manifest.dtype}; leave data.dtype null for a dataset folder")
    infos = [info for info in manifest.files if info.split == split]
    if not infos:
        splits = sorted({info.split for info in manifest.files})
        raise DataError(f"{folder} has no {split} split, only {', '.join(splits)}; write it again with --val 1%")
    return TokenSplit(
        source=str(folder),
        files=tuple(_map_shard(folder / info.path, manifest.dtype, info) for info in infos),
        max_id=max(info.max_id for info in infos),
        fingerprint=manifest.fingerprint,
        utf8_bytes=sum(info.utf8_bytes for info in infos),
        documents=sum(info.documents for info in infos),
        tokenizer=manifest.tokenizer,
        tokenizer_path=folder / "tokenizer",
    )


def _map_shard(path: Path, dtype: str, info: ShardInfo) -> np.ndarray:
    """Map one shard after checking its size, and its hash where that takes a fraction of a second."""
    expected = info.tokens * DTYPES[dtype].itemsize
    found = path.stat().st_size if path.exists() else None
    if found != expected:
        state = "is missing" if found is None else f"is {found} bytes long instead of {expected}"
        raise DataError(f"{path} {state}: the dataset is damaged; write it again with prep.tokenize")
    if expected <= _HASHED_AT_OPEN and sha256_of(path) != info.sha256:
        raise DataError(f"{path} was changed after it was written: the dataset is damaged; write it again with prep.tokenize")
    return _map(path, DTYPES[dtype])


def _open_bare(path: Path, dtype: str | None) -> TokenSplit:
    header, dtype = _sniff(path, dtype)
    if _looks_like_text(path):
        raise DataError(f"{path} is text, not token ids; run: python -m prep.tokenize {path} -o DIR")
    itemsize = DTYPES[dtype].itemsize
    size = path.stat().st_size - header
    if size < itemsize or size % itemsize:
        raise DataError(f"{path}: {size} bytes are not a whole number of {dtype} ids (is it text? use prep.tokenize)")
    ids = _map(path, DTYPES[dtype], header)
    max_id = max(int(ids[start : start + (1 << 24)].max()) for start in range(0, ids.size, 1 << 24))
    fingerprint = hashlib.sha256(f"{size} {max_id}".encode() + ids[:4096].tobytes() + ids[-4096:].tobytes()).hexdigest()
    return TokenSplit(source=str(path), files=(ids,), max_id=max_id, fingerprint=fingerprint)


def _sniff(path: Path, dtype: str | None) -> tuple[int, str]:
    """The header's length and the dtype of a bare file."""
    with path.open("rb") as file:
        start = file.read(8)
    if start[:6] == b"\x93NUMPY":
        raise DataError(f"{path} is a NumPy .npy file; write its ids with ndarray.tofile(), which has no header")
    if magic := _LLMC_MAGIC.get(int.from_bytes(start[:4], "little")):
        return _LLMC_HEADER_BYTES, magic
    return 0, dtype or "uint16"


def _looks_like_text(path: Path) -> bool:
    """Whether a file begins as ASCII text does: ids stored in two bytes almost never have only printable ones."""
    with path.open("rb") as file:
        start = file.read(4096)
    return len(start) >= 64 and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in start)


def _map(path: Path, dtype: np.dtype[Any], offset: int = 0) -> np.ndarray:
    # A plain ndarray view: slicing np.memmap objects costs ten times as much.
    return np.memmap(path, dtype=dtype, mode="r", offset=offset).view(np.ndarray)
