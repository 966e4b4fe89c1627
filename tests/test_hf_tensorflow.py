"""TensorFlow checkpoints are read without TensorFlow. The writer below is the test's own, after the format's definition."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from accel_pretrain.errors import CheckpointError, PretrainError
from accel_pretrain.hf import tensorflow
from accel_pretrain.hf.weight_files import open_weights
from tests.weights import Tensors, as_bytes, assert_equal, damage_is_refused_or_harmless, mutated, read_all, refusal

NUMBERS = {torch.float32: 1, torch.float64: 2, torch.int32: 3, torch.uint8: 4, torch.int16: 5, torch.int8: 6, torch.int64: 9}
NUMBERS |= {torch.bool: 10, torch.bfloat16: 14, torch.float16: 19, torch.complex64: 8, torch.uint32: 22}

Alter = Callable[[bytes], bytes]


def checksum(data: bytes) -> int:
    """CRC-32C bit by bit, masked as LevelDB does it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number: int) -> bytes:
    parts = []
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer: a number, or a nested message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def bundle_entry(tensor: torch.Tensor, shard: int, offset: int, extra: bytes = b"") -> bytes:
    data = as_bytes(tensor)
    shape = b"".join(field(2, field(1, side) if side else b"") for side in tensor.shape)
    message = field(1, NUMBERS[tensor.dtype]) + field(2, shape)
    message += b"".join(field(number, value) for number, value in ((3, shard), (4, offset), (5, len(data))) if value)
    return message + varint(6 << 3 | 5) + struct.pack("<I", checksum(data)) + extra


def block(pairs: Sequence[tuple[bytes, bytes]], restart_interval: int) -> bytes:
    """A block of LevelDB's table: at times a key stands in full, the others share the beginning of the one before."""
    content, restarts, last = b"", [], b""
    for number, (key, value) in enumerate(pairs):
        shared = 0
        if number % restart_interval == 0:
            restarts.append(len(content))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        content += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return (
        content + b"".join(struct.pack("<I", offset) for offset in restarts or [0]) + struct.pack("<I", max(1, len(restarts)))
    )


def table(pairs: Sequence[tuple[bytes, bytes]], per_block: int, kind: int = 0, alter: Alter = bytes) -> bytes:
    """A whole table: blocks, an index of them, and the footer. ``alter`` changes blocks before their checksums are made."""
    content = b""

    def add(data: bytes) -> bytes:
        nonlocal content
        data = alter(data)
        handle = varint(len(content)) + varint(len(data))
        content += data + bytes([kind]) + struct.pack("<I", checksum(data + bytes([kind])))
        return handle

    groups = [pairs[start : start + per_block] for start in range(0, len(pairs), per_block)]
    index = [(group[-1][0] + b"~", add(block(group, 16))) for group in groups]
    footer = add(block([], 1)) + add(block(index, 1))
    return content + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def write_checkpoint(
    folder: Path,
    tensors: Tensors,
    *,
    shards: int = 1,
    per_block: int = 1000,
    name: str = "model.ckpt",
    extra: bytes = b"",
    header: bytes = b"",
    **options: object,
) -> Path:
    """A checkpoint as ``tf.compat.v1.train.Saver`` leaves it; the path of its index."""
    data = [bytearray(b"\7" * number) for number in range(shards)]  # from the second shard on, nothing is aligned
    pairs = [(b"", field(1, shards) + field(3, field(1, 1)) + header)]
    for number, key in enumerate(sorted(tensors)):
        own = data[number % shards]
        pairs.append((key.encode(), bundle_entry(tensors[key], number % shards, len(own), extra)))
        own += as_bytes(tensors[key])
    for number, own in enumerate(data):
        (folder / f"{name}.data-{number:05d}-of-{shards:05d}").write_bytes(own)
    (folder / f"{name}.index").write_bytes(table(pairs, per_block, **options))  # pyright: ignore[reportArgumentType]
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n')
    return folder / f"{name}.index"


def gpt2_like(layers: int) -> Tensors:
    """Names that share beginnings, some types, a scalar and an empty tensor."""
    generator = torch.Generator().manual_seed(layers)
    tensors: Tensors = {"model/wte": torch.randn(11, 4, generator=generator), "global_step": torch.tensor(7)}
    for layer in range(layers):
        tensors[f"model/h{layer}/attn/c_attn/w"] = torch.randn(1, 4, 12, generator=generator)
        tensors[f"model/h{layer}/ln_1/g"] = torch.randn(4, generator=generator)
    for number, dtype in enumerate(NUMBERS):
        tensors[f"of_type/{number}"] = torch.tensor([[0, 1, 1]]).to(dtype)
    return tensors | {"empty": torch.zeros(0, 3)}


@pytest.mark.parametrize(("layers", "shards", "per_block"), [(0, 1, 1000), (12, 1, 7), (12, 3, 1), (40, 2, 33)])
def test_every_variable_reads_back(layers: int, shards: int, per_block: int, tmp_path: Path) -> None:
    tensors = gpt2_like(layers)
    index = write_checkpoint(tmp_path, tensors, shards=shards, per_block=per_block)
    (tmp_path / "hparams.json").write_text(json.dumps({"n_vocab": 11, "n_layer": layers}))
    for path in (tmp_path, index, tmp_path / "model.ckpt"):
        with open_weights(path) as files:
            assert_equal(files, tensors)
            assert files.extras == {"hparams": {"n_vocab": 11, "n_layer": layers}}
            assert files.where("global_step").startswith(str(tmp_path / "model.ckpt.data-"))


def test_checksums_against_a_known_one_and_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tensorflow.crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # of RFC 3720's polynomial
    draw = np.random.default_rng(0)
    for chunk in (1 << 23, 1000):
        monkeypatch.setattr(tensorflow, "_CHUNK", chunk)
        for size in (0, 1, 3, 4, 255, 256, 257, 1000, 1001, 4099, 30_001):
            data = draw.integers(0, 256, size, dtype=np.uint8)
            assert tensorflow.masked(tensorflow.crc32c(data)) == checksum(data.tobytes())
    assert checksum(b"a") != checksum(b"b")


def test_the_checkpoint_file_names_one_of_several(tmp_path: Path) -> None:
    first, second = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    write_checkpoint(tmp_path, second, name="model-200")
    write_checkpoint(tmp_path, first, name="model-100")
    assert_equal(open_weights(tmp_path), first)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/home/somebody/../models/model-200"\n')
    assert_equal(open_weights(tmp_path), second)
    (tmp_path / "checkpoint").unlink()
    assert "holds 2 TensorFlow checkpoints; name one, such as" in refusal(tmp_path)
    assert_equal(open_weights(tmp_path / "model-100"), first)


def test_what_tensorflow_2_adds_is_left_out(tmp_path: Path) -> None:
    tensors = {"model/w/.ATTRIBUTES/VARIABLE_VALUE": torch.randn(2, 2)}
    index = write_checkpoint(tmp_path, tensors)
    graph = field(1, 7) + field(2, b"") + field(5, 9)  # a text, in whose place there may be anything
    variable = bundle_entry(next(iter(tensors.values())), 0, 0)
    pairs = [(b"", field(1, 1)), (b"_CHECKPOINTABLE_OBJECT_GRAPH", graph), (next(iter(tensors)).encode(), variable)]
    index.write_bytes(table(pairs, 10))
    assert_equal(open_weights(tmp_path), tensors)


def test_refusals(tmp_path: Path) -> None:
    tensors = gpt2_like(1)
    for message, options in {
        "is compressed with snappy; save the checkpoint again with a newer TensorFlow": {"kind": 1},
        "compression 2": {"kind": 2},
        "is a partitioned variable": {"extra": field(7, field(1, b""))},
        "was written on a big-endian machine": {"header": field(2, 1)},
        "bytes in data file 0": {"extra": field(5, 3)},
        "bytes in data file 9": {"extra": field(3, 9)},
        "which is not supported": {"extra": field(1, 99)},
        "has the shape": {"extra": field(2, field(2, field(1, 2**64 - 1)))},
    }.items():
        write_checkpoint(tmp_path, tensors, **options)
        assert message in refusal(tmp_path)
    pairs = [(b"", field(1, 1)), *((f"{number:03}".encode(), b"") for number in range(9))]
    for message, wrong in {
        "the keys are not in order": [*pairs, pairs[3]],
        "without the header": pairs[1:],
        "TensorFlow's type 0": pairs,
    }.items():
        (tmp_path / "model.ckpt.index").write_bytes(table(wrong, 4))
        assert message in refusal(tmp_path)


def test_data_that_is_missing_short_or_changed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, gpt2_like(2))
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    assert "it ends before 'of_type/9' does" in refusal(tmp_path)
    data.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with open_weights(tmp_path) as files:
        with pytest.raises(CheckpointError, match="the checksum of 'global_step' differs"):
            files.read("global_step")
        assert files.read("model/wte").shape == (11, 4)
    data.unlink()
    assert "model.ckpt.data-00000-of-00001 does not exist" in refusal(tmp_path)


def test_random_damage(tmp_path: Path) -> None:
    tensors = gpt2_like(6)
    index = write_checkpoint(tmp_path, tensors, per_block=9)
    damage_is_refused_or_harmless(index, [tuple(tensor.shape) for tensor in tensors.values()])


def test_random_damage_whose_checksums_are_right(tmp_path: Path) -> None:
    """What somebody wrote on purpose: the parser itself must stand it."""
    draw, outcomes = random.Random(8), [0, 0]
    for _ in range(150):
        damage = draw.random() < 0.9
        write_checkpoint(tmp_path, gpt2_like(0), alter=(lambda data: mutated(data, draw)) if damage else bytes)
        try:
            read_all(tmp_path)
            outcomes[0] += 1
        except PretrainError as error:
            outcomes[1] += "\n" not in str(error)
    assert sum(outcomes) == 150
    assert outcomes[1] > 50
    assert outcomes[0] > 3
