"""The safetensors format: read by mapping, written one tensor at a time.

A file is eight bytes that hold the header's length, the header (JSON: dtype, shape and place of every tensor, and a map from
text to text), and the data without gaps. The order of the tensors is the one of the ``safetensors`` library, so that the same
tensors give the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from accel_pretrain.errors import CheckpointError
from accel_pretrain.files import sync_folder
from accel_pretrain.hf.tensor_map import (
    Weight,
    checked_shape,
    damaged,
    map_tensor,
    nbytes,
    parse_json,
    parsing,
    quoted,
    require_file,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the library's limit
_METADATA = "__metadata__"

# In the order of the library's own list, which is the order on disk, from the last to the first.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


# ------------------------------------------------------------------------------------------------------------- reading


def read_safetensors(path: Path) -> tuple[dict[str, Weight], dict[str, str]]:
    """The tensors and the metadata of one file. Raises :class:`CheckpointError` when its header does not fit the file."""
    require_file(path)
    with parsing(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise damaged(path, f"a header of {length:,} bytes in a file of {size:,}")
        text = file.read(length)
    if not text.startswith(b"{"):
        raise damaged(path, "the header is not JSON")
    document = parse_json(text, path)
    metadata = document.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "its metadata is not a map of texts")
    placed = sorted((_placed(name, entry, path) for name, entry in document.items()), key=lambda place: place[:2])
    weights, position = {}, 0
    for begin, end, name, dtype, shape in placed:
        if begin != position:
            raise damaged(path, f"{name!r} begins at {begin:,} and not at {position:,}, where the tensor before it ends")
        position = end
        read = partial(map_tensor, path, 8 + length + begin, dtype, shape)
        weights[name] = Weight(dtype=dtype, shape=shape, path=path, read=read)
    if 8 + length + position != size:
        raise damaged(path, f"{8 + length + position:,} bytes according to its header, {size:,} in fact")
    return {name: weights[name] for name in document}, metadata


def _placed(name: str, entry: Any, path: Path) -> tuple[int, int, str, torch.dtype, tuple[int, ...]]:
    """Where a tensor begins and ends behind the header, its name, dtype and shape."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{name!r} is not described by dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{path}: {quoted(name)} is of the type {quoted(entry['dtype'], 20)}, which is not supported")
    shape = checked_shape(entry["shape"], path, name)
    offsets = entry["data_offsets"]
    begin, end = offsets if isinstance(offsets, list) and [type(offset) for offset in offsets] == [int, int] else (-1, -1)
    if begin < 0 or end - begin != nbytes(dtype, shape):
        raise damaged(path, f"{name!r}: {quoted(offsets, 60)} is not the place of {nbytes(dtype, shape):,} bytes")
    return begin, end, name, dtype, shape


# ------------------------------------------------------------------------------------------------------------- writing


def write_safetensors(
    path: Path,
    entries: Sequence[TensorEntry],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write what ``read`` gives for the name of each entry: one tensor in memory at a time, all on disk before it returns.

    The file appears under its name only when it is whole. ``metadata`` is ``{"format": "pt"}`` unless told otherwise, which is
    what transformers asks for. Raises :class:`CheckpointError` when a tensor has another shape or dtype than its entry says.
    """
    ordered = sorted(entries, key=lambda entry: (-_RANKS[entry.dtype] if entry.dtype in _RANKS else 0, entry.name))
    header = _header(path, ordered, {"format": "pt"} if metadata is None else metadata)
    with _appearing(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for entry in ordered:
            file.write(_bytes_of(read(entry.name), entry, path))


def write_sharded(
    folder: Path,
    entries: Sequence[TensorEntry],
    read: Callable[[str], torch.Tensor],
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write ``model.safetensors``, or several files of at most ``max_shard_bytes`` of data and their index; returns the paths.

    Tensors are put into shards in the order of ``entries`` as Hugging Face does it: one that is larger than a shard gets its
    own. The index comes last. Raises :class:`CheckpointError` in a folder that already holds weights: a reader might take them.
    """
    if present := sorted(path.name for path in folder.glob("model*.safetensors*")):
        raise CheckpointError(f"{folder} already holds {present[0]}; write into a new folder")
    shards = _shards(entries, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, entries, read, metadata)
        return [folder / WEIGHTS]
    paths = [folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        write_safetensors(path, shard, read, metadata)
    elements = sum(entry.nbytes // entry.dtype.itemsize for entry in entries)
    index = {
        "metadata": {"total_parameters": elements, "total_size": sum(entry.nbytes for entry in entries)},
        "weight_map": {entry.name: path.name for path, shard in zip(paths, shards, strict=True) for entry in shard},
    }
    with _appearing(folder / INDEX) as file:
        file.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    return [*paths, folder / INDEX]


def _shards(entries: Sequence[TensorEntry], limit: int) -> list[list[TensorEntry]]:
    """``entries`` in the groups that Hugging Face's own writer makes; at least one."""
    shards: list[list[TensorEntry]] = []
    current: list[TensorEntry] = []
    filled = 0
    for entry in entries:
        if entry.nbytes > limit:
            shards.append([entry])
            continue
        if current and filled + entry.nbytes > limit:
            shards.append(current)
            current, filled = [], 0
        current.append(entry)
        filled += entry.nbytes
    return [*shards, current] if current or not shards else shards


def _header(path: Path, ordered: Sequence[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The JSON of a file whose tensors lie in this order, padded to a multiple of eight bytes."""
    document: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for entry in ordered:
        if entry.dtype not in _NAMES:
            raise CheckpointError(f"{path}: {entry.name} is {entry.dtype}, which safetensors cannot hold")
        if entry.name in document or entry.name == _METADATA:
            raise CheckpointError(f"{path}: the name {entry.name} is taken")
        end = position + entry.nbytes
        document[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    if len(text) > MAX_HEADER_BYTES - 8:
        raise CheckpointError(f"{path}: the names of its {len(ordered):,} tensors do not fit a header")
    return text + b" " * (-len(text) % 8)


def _bytes_of(tensor: torch.Tensor, entry: TensorEntry, path: Path) -> memoryview:
    if tuple(tensor.shape) != tuple(entry.shape) or tensor.dtype != entry.dtype:
        raise CheckpointError(
            f"{path}: {entry.name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {entry.dtype} {tuple(entry.shape)}"
        )
    return tensor.detach().cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that gets its name when all of it is on disk, and that leaves nothing behind if it never is."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
