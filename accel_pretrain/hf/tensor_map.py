"""What every reader of weight files shares: one tensor's place on disk, mapping it, and refusing what is damaged.

A reader turns a file into ``dict[str, Weight]`` without reading data. Nothing stays mapped but the tensors that the caller
still holds: the pages of a tensor leave this process's memory with the last reference to it.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel_pretrain.errors import CheckpointError, PretrainError

MAX_JSON_BYTES = 100_000_000
MAX_DIMENSIONS = 64
MAX_SIDE = 1 << 40  # elements along one dimension: only an empty tensor could have more, whose strides torch cannot count
_ZIP_END = 22  # bytes of the record at the end of a zip file; its count is 0xFFFF where a larger record before it counts
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One named tensor of a file: what is known without reading it, and how to read it. Values are not to be changed."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    read: Callable[[], torch.Tensor]


def nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """The bytes of a contiguous tensor."""
    return math.prod(shape) * dtype.itemsize


def quoted(text: object, limit: int = 200) -> str:
    """Text from a file as it may stand in a message: on one line, without control characters, not too long."""
    shown = "".join(character if character.isprintable() else "?" for character in str(text).split("\n")[0])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def damaged(path: Path, why: object) -> CheckpointError:
    """The error for a file that is not what its name says."""
    return CheckpointError(f"{path}: damaged or not a file of weights ({quoted(why)}); download or copy it again")


@contextlib.contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Turn whatever a parser raises on a stranger's bytes into one :class:`CheckpointError` that names the file."""
    try:
        yield
    except PretrainError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or quoted(error)})") from None
    except Exception as error:  # struct.error, KeyError, RecursionError, MemoryError, ...: damage has no fixed list of symptoms
        raise damaged(path, str(error) or type(error).__name__) from None


def require_file(path: Path) -> None:
    """Refuse what is not a regular file, and the small text that git leaves in the place of a large file."""
    if not path.is_file():
        raise CheckpointError(f"{path} {'is not a regular file' if path.exists() else 'does not exist'}")
    with parsing(path), path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; in its folder type: git lfs pull")


def checked_shape(shape: object, path: Path, name: str) -> tuple[int, ...]:
    """``shape`` if it is a list of sizes that a tensor can have."""
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMENSIONS:
        raise damaged(path, f"{name!r} has the shape {quoted(shape, 60)}")
    if all(isinstance(side, int) and not isinstance(side, bool) and 0 <= side <= MAX_SIDE for side in shape):
        return tuple(shape)
    raise damaged(path, f"{name!r} has the shape {quoted(shape, 60)}")


def map_tensor(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The contiguous little-endian tensor whose bytes begin at ``offset``: mapped, not copied, unless it is not aligned."""
    data = map_bytes(path, offset, nbytes(dtype, shape))
    if data is None:
        return torch.empty(shape, dtype=dtype)
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(shape)


def map_bytes(path: Path, offset: int, size: int) -> torch.Tensor | None:
    """``size`` bytes of a file as a private mapping; None where there are none, which cannot be mapped."""
    if size == 0:
        return None
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with parsing(path), path.open("rb") as file:
        if offset < 0 or offset + size > os.fstat(file.fileno()).st_size:  # reading past the end would kill the process
            raise damaged(path, "it is shorter than it says")
        # A private, writable mapping: torch knows no read-only tensors. What is written stays in memory.
        mapping = mmap.mmap(file.fileno(), offset - start + size, access=mmap.ACCESS_COPY, offset=start)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=offset - start)


def zip_members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """What is in an archive of torch or NumPy. Raises ValueError where its directory cannot be theirs.

    Neither writes comments or a name twice. In a damaged directory the "comment" of a member can be the members after it.
    """
    infos = archive.infolist()
    file = archive.fp
    assert file is not None
    file.seek(-_ZIP_END, os.SEEK_END)
    count = int.from_bytes(file.read(_ZIP_END)[10:12], "little")
    if archive.comment or any(info.comment for info in infos) or count not in (len(infos), 0xFFFF):
        raise ValueError("the directory of the zip file is damaged")
    if len({info.filename for info in infos}) != len(infos):
        raise ValueError("two members of the zip file have the same name")
    return infos


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in which no key comes twice."""
    with parsing(path):
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
        return document


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes."""
    require_file(path)
    with parsing(path), path.open("rb") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise damaged(path, f"more than {limit:,} bytes of JSON")
    return parse_json(text, path)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {repeated!r} comes twice")
    return document
