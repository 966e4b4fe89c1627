"""TensorFlow's checkpoints, read without TensorFlow: the format in which OpenAI published GPT-2.

``model.ckpt.index`` is a sorted table as LevelDB writes it (blocks of keys that share prefixes, an index block that finds them,
a footer that finds the index). Under the empty key it holds a header, under the name of each variable a small protocol buffer:
dtype, shape, and the place of its bytes in ``model.ckpt.data-00000-of-00001``. Blocks and variables carry CRC-32C checksums,
which are compared.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel_pretrain.errors import CheckpointError
from accel_pretrain.hf.tensor_map import (
    Weight,
    checked_shape,
    damaged,
    map_tensor,
    nbytes,
    parsing,
    quoted,
    read_json,
    require_file,
)

SUFFIX = ".index"
MAX_INDEX_BYTES = 256 << 20
_FOOTER, _MAGIC, _TRAILER = 48, 0xDB4775248B80FB57, 5
_NO_COMPRESSION, _SNAPPY = 0, 1
_STRING_TYPES = {7, 20, 21}  # string, resource, variant: the object graph of tf.train.Checkpoint is a string
_DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    5: torch.int16,
    6: torch.int8,
    8: torch.complex64,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    17: torch.uint16,
    18: torch.complex128,
    19: torch.float16,
    22: torch.uint32,
    23: torch.uint64,
    24: torch.float8_e5m2,
    25: torch.float8_e4m3fn,
}


def find_index(folder: Path) -> Path | None:
    """The index that the file ``checkpoint`` of a folder names, or the only one there is; None in a folder without any."""
    pointer = folder / "checkpoint"
    if pointer.is_file():
        with parsing(pointer), pointer.open("rb") as file:
            named = re.search(rb'model_checkpoint_path:\s*"([^"\\]+)"', file.read(1 << 16))
        if named:  # it may be where the model was trained: only the name counts
            index = folder / (re.split(r"[/\\]", named[1].decode("utf-8", "replace"))[-1] + SUFFIX)
            if index.is_file():
                return index
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds {len(found)} TensorFlow checkpoints; name one, such as {found[-1]}")
    return found[0] if found else None


def read_tensorflow(index: Path) -> tuple[dict[str, Weight], dict[str, Any]]:
    """The numeric variables of the checkpoint that ``index`` belongs to, and ``hparams``, if OpenAI's hparams.json is there.

    Raises :class:`CheckpointError` when the table is damaged or compressed, a data file is missing, or a variable is split.
    """
    require_file(index)
    with parsing(index):
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"an index of {index.stat().st_size:,} bytes")
        table = dict(_entries(index.read_bytes(), index))
        if b"" not in table:
            raise ValueError("a table without the header of a checkpoint")
        header = dict(_fields(table.pop(b"")))
    shards = int(header.get(1, 0))
    if header.get(2, 0) != 0:
        raise CheckpointError(f"{index} was written on a big-endian machine, which is not supported")
    weights = {}
    for key, value in table.items():
        name = key.decode("utf-8", "replace")
        with parsing(index):
            fields = list(_fields(value))
            if dict(fields).get(1) not in _STRING_TYPES:
                weights[name] = _weight(index, name, fields, shards)
    hparams = index.parent / "hparams.json"
    return weights, {"hparams": read_json(hparams, 1 << 20)} if hparams.is_file() else {}


def _weight(index: Path, name: str, fields: list[tuple[int, Any]], shards: int) -> Weight:
    """One variable from its entry: dtype (1), shape (2), shard (3), offset (4), size (5), checksum (6), slices (7)."""
    entry = dict(fields)
    if 7 in entry:
        raise CheckpointError(f"{index}: {quoted(name)} is a partitioned variable, which is not supported")
    dtype = _DTYPES.get(entry.get(1, 0))
    if dtype is None:
        raise CheckpointError(f"{index}: {quoted(name)} is of TensorFlow's type {entry.get(1, 0)}, which is not supported")
    dimensions = [dict(_fields(value)).get(1, 0) for number, value in _fields(entry.get(2, b"")) if number == 2]
    shape = checked_shape(dimensions, index, name)
    shard, offset, size = (int(entry.get(number, 0)) for number in (3, 4, 5))
    if size != nbytes(dtype, shape) or not 0 <= shard < shards:
        raise damaged(index, f"{name!r} has {size:,} bytes in data file {shard}")
    path = index.with_name(f"{index.name.removesuffix(SUFFIX)}.data-{shard:05d}-of-{shards:05d}")
    require_file(path)
    if offset + size > path.stat().st_size:
        raise damaged(path, f"it ends before {name!r} does")
    read = partial(_read, path, offset, dtype, shape, name, entry.get(6))
    return Weight(dtype=dtype, shape=shape, path=path, read=read)


def _read(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...], name: str, checksum: int | None) -> torch.Tensor:
    tensor = map_tensor(path, offset, dtype, shape)
    if checksum is not None and masked(crc32c(tensor.reshape(-1).view(torch.uint8).numpy())) != checksum:
        raise damaged(path, f"the checksum of {name!r} differs")
    return tensor


# ----------------------------------------------------------------------------------------------------------- the table


def _entries(table: bytes, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Every key of a table and its value, in order."""
    if len(table) < _FOOTER or int.from_bytes(table[-8:], "little") != _MAGIC:
        raise ValueError("not the index of a TensorFlow checkpoint")
    footer = table[-_FOOTER:]
    _, position = _handle(footer, 0)  # of the meta-index, in which TensorFlow writes nothing
    place, _ = _handle(footer, position)
    last = None
    for _, value in _block(table, *place, path):
        for key, entry in _block(table, *_handle(value, 0)[0], path):
            if last is not None and key <= last:  # also what ends an index that lists one block a million times
                raise ValueError("the keys are not in order")
            last = key
            yield key, entry


def _block(table: bytes, offset: int, size: int, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of one block: each key is what it shares with the one before, and the rest."""
    end = offset + size
    if end + _TRAILER > len(table):
        raise ValueError("a block is outside the file")
    kind = table[end]
    if kind == _SNAPPY:
        raise CheckpointError(f"{path} is compressed with snappy; save the checkpoint again with a newer TensorFlow")
    if kind != _NO_COMPRESSION:
        raise ValueError(f"compression {kind}")
    if masked(crc32c(np.frombuffer(table[offset : end + 1], np.uint8))) != int.from_bytes(table[end + 1 : end + 5], "little"):
        raise ValueError("the checksum of a block differs")
    block = table[offset:end]
    restarts = int.from_bytes(block[-4:], "little")
    limit, position, key = size - 4 * (restarts + 1), 0, b""
    if limit < 0:
        raise ValueError("a block is too short")
    while position < limit:
        shared, position = _varint(block, position)
        own, position = _varint(block, position)
        length, position = _varint(block, position)
        value = position + own
        if shared > len(key) or value + length > limit:
            raise ValueError("a key is outside its block")
        key = key[:shared] + block[position:value]
        position = value + length
        yield key, block[value:position]


def _handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    """The offset and size of a block, and where what describes them ends."""
    offset, position = _varint(data, position)
    size, position = _varint(data, position)
    return (offset, size), position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFF_FFFF_FFFF_FFFF, position
    raise ValueError("a number is too long")


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: a number, or bytes for texts and nested messages."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(message, position)
        elif kind in (1, 5):
            width = 8 if kind == 1 else 4
            value, position = int.from_bytes(message[position : position + width], "little"), position + width
        elif kind == 2:
            length, position = _varint(message, position)
            value, position = message[position : position + length], position + length
        else:
            raise ValueError(f"wire type {kind}")
        if position > len(message):
            raise ValueError("a field is longer than its message")
        yield tag >> 3, value


# -------------------------------------------------------------------------------------------------------- the checksum

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, its bits reversed
_CHUNK = 1 << 23


def masked(crc: int) -> int:
    """A checksum as TensorFlow stores it."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFF_FFFF


def crc32c(data: np.ndarray) -> int:
    """CRC-32C of an array of bytes, at some hundreds of megabytes per second."""
    crc = 0xFFFF_FFFF
    for start in range(0, data.size, _CHUNK):
        crc = _advance(crc, data[start : start + _CHUNK])
    return crc ^ 0xFFFF_FFFF


def _advance(crc: int, data: np.ndarray) -> int:
    """The register after ``data``. Pieces of equal length run side by side, from zero; then neighbours are joined."""
    if data.size < 256:
        table = _table(8)
        for byte in data.tolist():
            crc = int(table[(crc ^ byte) & 0xFF]) ^ (crc >> 8)
        return crc
    lanes = 1 << min(14, data.size.bit_length() // 2)
    length = -(-data.size // (2 * lanes)) * 2
    padded = np.zeros(lanes * length, np.uint8)  # zeros in front leave a register of zero as it is
    padded[-data.size :] = data
    padded[-data.size :][:4] ^= np.frombuffer(crc.to_bytes(4, "little"), np.uint8)  # as if the register had been zero
    table, registers = _table(16), np.zeros(lanes, np.uint32)
    for pair in np.ascontiguousarray(padded.view("<u2").reshape(lanes, length // 2).T):
        registers = table.take(registers.astype(np.uint16) ^ pair, mode="clip") ^ (registers >> 16)
    shift = _shift_by(length)
    while registers.size > 1:
        registers = _apply(shift, registers[0::2]) ^ registers[1::2]
        shift = _apply(shift, shift)
    return int(registers[0])


@functools.cache
def _table(bits: int) -> np.ndarray:
    """The register after ``bits`` zero bits, for every register of that many bits."""
    table = np.arange(1 << bits, dtype=np.uint32)
    for _ in range(bits):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


def _apply(operator: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """A linear map, given by what it makes of each of the 32 bits, on many registers."""
    result = np.zeros_like(registers)
    for bit in range(32):
        result ^= np.where((registers >> bit) & 1, operator[bit], np.uint32(0))
    return result


@functools.cache
def _shift_by(length: int) -> np.ndarray:
    """The linear map of ``length`` zero bytes, by squaring."""
    power = np.uint32(1) << np.arange(32, dtype=np.uint32)
    power = _table(8)[power & 0xFF] ^ (power >> 8)  # of one zero byte
    result = np.uint32(1) << np.arange(32, dtype=np.uint32)  # of none
    while length:
        if length & 1:
            result = _apply(power, result)
        power, length = _apply(power, power), length >> 1
    return result
