"""Arrays that NumPy wrote: ``.npz``. Read without pickle, stored members mapped, compressed ones unpacked one at a time."""

from __future__ import annotations

import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch

from accel_pretrain.errors import CheckpointError
from accel_pretrain.hf.tensor_map import Weight, checked_shape, damaged, map_bytes, parsing, quoted, require_file, zip_members

MAX_EXPANSION, ALWAYS_ALLOWED = 100, 64 << 20  # weights hardly compress: what grows more, and beyond 64 MiB, is a zip bomb
_MAX_HEADER = 10_000
_LOCAL_HEADER = 30
_KINDS = "biufc"


def read_npz(path: Path) -> dict[str, Weight]:
    """The arrays of an ``.npz`` file. Raises :class:`CheckpointError` for objects, which only pickle could read."""
    require_file(path)
    with parsing(path), zipfile.ZipFile(path) as archive:
        infos = zip_members(archive)
        declared = sum(info.file_size for info in infos)
        if declared > ALWAYS_ALLOWED + MAX_EXPANSION * path.stat().st_size:
            raise damaged(path, f"{path.stat().st_size:,} bytes that unpack to {declared:,}: a zip bomb")
        weights: dict[str, Weight] = {}
        for info in infos:
            name = info.filename.removesuffix(".npy")
            weights[name] = _weight(path, archive, info, name)
    return weights


def _weight(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Weight:
    """What the header of one member says, compared with the member's size."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise damaged(path, f"{name!r} is compressed in another way than NumPy's")
    with archive.open(info) as member:
        shape, fortran, array_dtype = _array_header(member)
        header = member.tell()
    shape = checked_shape(shape, path, name)
    if array_dtype.hasobject:
        raise CheckpointError(f"{path}: {quoted(name)} holds Python objects, which are never unpickled; save plain arrays")
    if array_dtype.kind not in _KINDS or not hasattr(torch, array_dtype.newbyteorder("=").name):
        raise CheckpointError(f"{path}: {quoted(name)} is of the type {quoted(array_dtype, 40)}, which is not supported")
    size = int(np.prod(shape, dtype=object)) * array_dtype.itemsize
    if info.file_size != header + size:
        raise damaged(path, f"{name!r} has {info.file_size - header:,} bytes instead of {size:,}")
    dtype = getattr(torch, array_dtype.newbyteorder("=").name)
    read = partial(_read, path, info, header, array_dtype, shape, fortran)
    return Weight(dtype=dtype, shape=shape, path=path, read=read)


def _array_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and dtype."""
    version = np.lib.format.read_magic(member)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format")
    return readers[version](member, max_header_size=_MAX_HEADER)


def _read(
    path: Path, info: zipfile.ZipInfo, header: int, array_dtype: np.dtype, shape: tuple[int, ...], fortran: bool
) -> torch.Tensor:
    with parsing(path):
        data = _stored(path, info) if info.compress_type == zipfile.ZIP_STORED else _unpacked(path, info)
        array = data[header:].view(array_dtype)
        array = array.astype(array_dtype.newbyteorder("="), copy=False)
        array = np.require(array, requirements=["A"])  # a member of a zip begins anywhere
        return torch.from_numpy(array.reshape(shape[::-1]).T if fortran else array.reshape(shape))


def _unpacked(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """All bytes of a compressed member. The archive's reader checks their sum and gives no more than the size declared."""
    data = np.empty(info.file_size, dtype=np.uint8)
    with zipfile.ZipFile(path) as archive, archive.open(info) as member:
        position = 0
        while count := member.readinto(data.data[position : position + (1 << 24)]):  # pyright: ignore[reportAttributeAccessIssue]
            position += count
    if position != info.file_size:
        raise ValueError(f"{info.filename!r} ends early")
    return data


def _stored(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """All bytes of a member that is not compressed, mapped, after comparing their sum."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        local = file.read(_LOCAL_HEADER)
    if local[:4] != b"PK\x03\x04":
        raise ValueError("a member is not where the directory says")
    lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    data = map_bytes(path, info.header_offset + _LOCAL_HEADER + lengths, info.file_size)
    assert data is not None  # it begins with the header of the array
    array = data.numpy()
    if zlib.crc32(array.data) != info.CRC:
        raise ValueError(f"the checksum of {info.filename!r} differs")
    return array
