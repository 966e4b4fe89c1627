"""Token files that other programs wrote, read as they lie: nobody has to tokenize again. Torch-free.

=====================  ==================================================================================================
nanoGPT, ``.ids``      ids and nothing else (``data.dtype``, uint16 unless told otherwise)
llm.c                  ``.bin``: 256 int32 (magic, version, count), then the ids; the magic says which dtype
Megatron, GPT-NeoX     ``.bin`` with an ``.idx`` beside it, which says the dtype and where documents end
datatrove              ``.ds``; ``.ds.index`` says where documents end, ``.ds.metadata`` which dtype
OLMo, dolma            ``.npy`` without NumPy's header: ids and nothing else; a real ``.npy`` is read too
=====================  ==================================================================================================

A folder or a glob stands for all shards in it, in the order of their names with numbers compared as numbers.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accel_pretrain.errors import DataError

SUFFIXES = (".bin", ".ids", ".ds", ".npy")
INDEX_SUFFIX = ".idx.npy"  # our own document ends, which are no ids
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation", "dev"},
    "test": {"test", "heldout"},
}
_LLMC_HEADER_BYTES = 1024
_LLMC = {20240520: ("uint16", 1), 20240801: ("uint32", 7)}  # magic: dtype and version (llm.c, dev/data/data_common.py)
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_LARGEST_ID = 1 << 24  # no vocabulary has so many: two uint16 ids were taken for one uint32
_BLOCK = 1 << 24


@dataclass(frozen=True)
class TokenFile:
    """One file of ids: a read-only map in the dtype that is stored, and where documents end in it, if the format says so."""

    path: Path
    ids: np.ndarray
    document_ends: np.ndarray | None = None

    def largest_id(self) -> int:
        """Read all of it for its largest id; raises :class:`DataError` where there is one that cannot be an id."""
        blocks = [self.ids[start : start + _BLOCK] for start in range(0, self.ids.size, _BLOCK)]
        largest = max(int(block.max()) for block in blocks)
        if self.ids.dtype.kind == "i" and (smallest := min(int(block.min()) for block in blocks)) < 0:
            raise DataError(f"{self.path}: holds {smallest}, which is no token id")
        if largest >= _LARGEST_ID:
            raise DataError(f"{self.path}: holds id {largest:,}, which no vocabulary has; if it is uint16, type --dtype uint16")
        return largest

    def fingerprint(self, largest_id: int) -> str:
        """A hash of the size, the largest id, and the first and last ids."""
        facts = f"{self.ids.nbytes} {largest_id}".encode()
        return hashlib.sha256(facts + self.ids[:4096].tobytes() + self.ids[-4096:].tobytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ which files


def split_word(path: Path) -> str | None:
    """The split that a file's name speaks of: ``fineweb_val_000000.bin`` is val; None where it speaks of none."""
    words = set(re.split(r"[^a-z]+", path.name.lower()))
    return next((split for split, known in _SPLIT_WORDS.items() if words & known), None)


def token_files(path: Path) -> list[Path]:
    """The files that ``path`` stands for: itself, or the shards in a folder or behind a glob, in order; maybe none."""
    if path.is_dir():
        found = [file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")]
        found = [file for file in found if not file.name.endswith(INDEX_SUFFIX) and file.is_file()]
        if len(kinds := sorted({file.suffix for file in found})) > 1:
            example = path / f"*{kinds[0]}"
            raise DataError(f"{path}: holds files of several kinds ({' '.join(kinds)}); name one kind by a glob: '{example}'")
    elif path.is_file():
        return [path]
    elif path.with_name(path.name + ".idx").is_file():  # Megatron names a pair by what its two names have in common
        return [path.with_name(path.name + ".bin")]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)]
    return sorted(found, key=_by_numbers)


def files_of_split(path: Path, split: str) -> list[Path]:
    """Of the files that ``path`` stands for those of ``split``: all, unless their names speak of several splits."""
    files = token_files(path)
    named = {file: split_word(file) for file in files}
    if len(set(named.values())) < 2:
        return files
    return [file for file in files if (named[file] or "train") == split]


def _by_numbers(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


# --------------------------------------------------------------------------------------------------------------- one file


def open_token_file(path: Path, dtype: str | None = None) -> TokenFile:
    """Map one file of any of these formats; ``dtype`` is for those that do not say theirs. Raises :class:`DataError`."""
    if path.suffix == ".idx":
        path = path.with_suffix(".bin")
    index = path.with_suffix(".idx")
    if path.suffix == ".bin" and index.is_file() and _begins_with(index, _MEGATRON_MAGIC):
        return _open_megatron(path, index, dtype)
    if path.suffix == ".ds":
        return _open_datatrove(path, dtype)
    if _begins_with(path, b"\x93NUMPY"):
        return TokenFile(path, _map_npy(path, dtype))
    if magic := _LLMC.get(int.from_bytes(_beginning(path, 4), "little")):
        return TokenFile(path, _map_llmc(path, *magic, dtype))
    if _looks_like_text(path):
        raise DataError(f"{path} is text, not token ids; run: python -m prep.tokenize {path} -o DIR")
    ids = map_ids(path, dtype or "uint16")
    if dtype is None and _looks_like_uint32(ids):
        raise DataError(f"{path}: every second uint16 is next to nothing, so these are uint32 ids; type --dtype uint32")
    return TokenFile(path, ids)


def map_ids(path: Path, dtype: str, offset: int = 0) -> np.ndarray:
    """A read-only array over the little-endian ids in a file from byte ``offset`` on."""
    kind = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size - offset
    if size < kind.itemsize or size % kind.itemsize:
        raise DataError(f"{path}: {size} bytes are not a whole number of {dtype} ids (is it text? use prep.tokenize)")
    # A plain ndarray view: slicing np.memmap objects costs ten times as much.
    return np.memmap(path, dtype=kind, mode="r", offset=offset).view(np.ndarray)


def _map_llmc(path: Path, stored: str, version: int, wanted: str | None) -> np.ndarray:
    _refuse_other_dtype(path, stored, wanted)
    start = _beginning(path, _LLMC_HEADER_BYTES)
    if len(start) < _LLMC_HEADER_BYTES:
        raise DataError(f"{path}: begins as a file of llm.c and ends within its header: the file is damaged; get it again")
    header = np.frombuffer(start, dtype="<i4")
    if header[1] != version:
        raise DataError(f"{path}: begins as a file of llm.c; its version is {header[1]}, this reads {version} for {stored}")
    ids = map_ids(path, stored, _LLMC_HEADER_BYTES)
    if ids.size != header[2]:
        raise DataError(f"{path}: its header says {header[2]:,} ids, it holds {ids.size:,}: the file is damaged; get it again")
    return ids


def _map_npy(path: Path, wanted: str | None) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: a damaged .npy file ({error})") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.size == 0:
        raise DataError(f"{path}: a .npy file of shape {ids.shape} and dtype {ids.dtype}; ids are one row of whole numbers")
    _refuse_other_dtype(path, str(ids.dtype), wanted)
    return ids.view(np.ndarray)


def _open_megatron(path: Path, index: Path, wanted: str | None) -> TokenFile:
    header = _beginning(index, 34)
    code = header[17] if len(header) == 34 else 0
    if int.from_bytes(header[9:17], "little") != 1 or code not in _MEGATRON_DTYPES:
        raise DataError(f"{index}: version or dtype code {code} is not one of an index of token ids")
    stored = _MEGATRON_DTYPES[code]
    _refuse_other_dtype(path, stored, wanted)
    sequences, boundaries = int.from_bytes(header[18:26], "little"), int.from_bytes(header[26:34], "little")
    if index.stat().st_size < 34 + 12 * sequences + 8 * boundaries:
        raise DataError(f"{index}: ends before its {sequences:,} sequences do: the file is damaged; get it again")
    if not path.is_file():
        raise DataError(f"{path}: is missing beside {index}")
    ids = map_ids(path, stored)
    body = np.memmap(index, mode="r", offset=34).view(np.ndarray)
    lengths = body[: 4 * sequences].view("<i4")
    pointers = body[4 * sequences : 12 * sequences].view("<i8")
    documents = body[12 * sequences : 12 * sequences + 8 * boundaries].view("<i8")
    ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    if lengths.min(initial=0) < 0 or ends[-1] != ids.size or not np.array_equal(pointers, ends[:-1] * ids.itemsize):
        raise DataError(f"{index}: does not describe {path.name} ({ends[-1]:,} ids in order, the file holds {ids.size:,})")
    ordered = documents.size and documents[0] == 0 and documents[-1] == sequences and (np.diff(documents) >= 0).all()
    return TokenFile(path, ids, ends[documents[1:]].astype(np.uint64) if ordered else None)


def _open_datatrove(path: Path, wanted: str | None) -> TokenFile:
    index, facts = path.with_name(path.name + ".index"), path.with_name(path.name + ".metadata")
    ends = map_ids(index, "uint64") if index.is_file() and index.stat().st_size else None
    first = facts.read_text(encoding="utf-8", errors="replace").partition("\n")[0] if facts.is_file() else ""
    itemsize = {"2": 2, "4": 4}.get(first.rpartition("|")[2].strip() if "|" in first else "")
    if itemsize is None and ends is not None:  # the index counts in ids, the file in bytes
        itemsize = next((size for size in (2, 4) if int(ends[-1]) * size == path.stat().st_size), None)
    stored = {2: "uint16", 4: "uint32", None: wanted or "uint16"}[itemsize]
    _refuse_other_dtype(path, stored, wanted)
    ids = map_ids(path, stored)
    if ends is not None and (int(ends[-1]) != ids.size or (ends[1:] < ends[:-1]).any()):
        raise DataError(f"{index}: does not describe {path.name} ({int(ends[-1]):,} ids, the file holds {ids.size:,})")
    return TokenFile(path, ids, ends)


def _refuse_other_dtype(path: Path, stored: str, wanted: str | None) -> None:
    if wanted not in (None, stored):
        raise DataError(f"data.dtype {wanted}: {path} says that it holds {stored}; leave data.dtype null")


def _beginning(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _begins_with(path: Path, magic: bytes) -> bool:
    return _beginning(path, len(magic)) == magic


def _looks_like_text(path: Path) -> bool:
    """Whether a file begins as ASCII text does: ids stored in two bytes almost never have only printable ones."""
    start = _beginning(path, 4096)
    return len(start) >= 64 and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in start)


def _looks_like_uint32(ids: np.ndarray) -> bool:
    """Whether uint16 ids are the halves of uint32 ones: the upper halves of ids below a million are below 16."""
    start = ids[:4096]
    return start.size >= 64 and int(start[1::2].max()) < 16 and int(start[::2].max()) > 1000
