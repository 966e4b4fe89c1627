"""What the tests of weight files share: files of every kind with the same tensors, each written by the owner of its format."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from accel_pretrain.errors import CheckpointError, PretrainError
from accel_pretrain.hf.weight_files import TensorEntry, WeightFiles, open_weights

MUTATIONS = 60
Tensors = dict[str, torch.Tensor]


def small_tensors() -> Tensors:
    """A few tensors whose types every format knows."""
    generator = torch.Generator().manual_seed(3)
    return {
        "wte.weight": torch.randn(7, 4, generator=generator),
        "h.0.attn.bias": torch.arange(12, dtype=torch.float16),
        "h.0.count": torch.tensor(-5, dtype=torch.int64),
        "h.0.mask": torch.tensor([[True, False, True]]),
        "h.0.empty": torch.zeros(0, 3),
        "h.1.odd": torch.arange(-3, 4, dtype=torch.int8),
    }


def entries_of(tensors: Tensors) -> list[TensorEntry]:
    return [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def assert_equal(files: WeightFiles, expected: Tensors) -> None:
    """The same names, and for each the same dtype, shape and bits, announced and read."""
    assert set(files) == set(files.names()) == set(expected)
    assert len(files) == len(expected)
    for name, tensor in expected.items():
        assert name in files
        assert (files.dtype(name), files.shape(name)) == (tensor.dtype, tuple(tensor.shape))
        found = files.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(found) == as_bytes(tensor), name


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_all(path: Path) -> dict[str, tuple[int, ...]]:
    """Open a file and read everything in it; the shapes that were read."""
    with open_weights(path) as files:
        return {name: tuple(files.read(name).shape) for name in files}


def refusal(path: Path) -> str:
    """The message with which a file is refused: one line."""
    with pytest.raises(CheckpointError) as error:
        read_all(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """``content`` cut off, or with a few bytes of its first or last kilobyte changed: where headers and directories are."""
    if draw.random() < 0.2:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        near = draw.randrange(min(1024, len(content)))
        position = near if draw.random() < 0.5 else len(content) - 1 - near
        changed[position] = draw.choice((changed[position] ^ (1 << draw.randrange(8)), draw.randrange(256), 0, 255))
    return bytes(changed)


def damage_is_refused_or_harmless(path: Path, shapes: list[tuple[int, ...]] | None) -> None:
    """Damage a file in many ways: each is refused in one line, or the ``shapes`` are read that were written."""
    content, draw, messages = path.read_bytes(), random.Random(path.name), []
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(content, draw))
        try:
            found = read_all(path)
        except PretrainError as error:
            messages.append(str(error))
        else:
            assert shapes is None or sorted(found.values()) == sorted(shapes)
    assert len(messages) >= MUTATIONS // 5
    assert not [message for message in messages if "\n" in message]
    path.write_bytes(content)
    assert read_all(path)  # control


# ------------------------------------------------------------------------------------------------ one writer for each kind


def write_hf_safetensors(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def write_hf_bin(folder: Path, tensors: Tensors) -> Path:
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def write_legacy_bin(folder: Path, tensors: Tensors) -> Path:
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder / "pytorch_model.bin"


def arrays_of(tensors: Tensors) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def write_npz(folder: Path, tensors: Tensors) -> Path:
    np.savez(folder / "weights.npz", **arrays_of(tensors))
    return folder / "weights.npz"


def write_compressed_npz(folder: Path, tensors: Tensors) -> Path:
    np.savez_compressed(folder / "weights.npz", **arrays_of(tensors))
    return folder / "weights.npz"


def halves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    names = list(tensors)
    return {name: tensors[name] for name in names[:3]}, {name: tensors[name] for name in names[3:]}


def write_index(folder: Path, name: str, weight_map: dict[str, str]) -> Path:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder / name


def write_sharded_safetensors(folder: Path, tensors: Tensors) -> Path:
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    parts = halves(tensors)
    for file, part in zip(files, parts, strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    return write_index(folder, "model.safetensors.index.json", weight_map)


def write_sharded_bin(folder: Path, tensors: Tensors) -> Path:
    files = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    parts = halves(tensors)
    for file, part in zip(files, parts, strict=True):
        torch.save(part, folder / file)
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    return write_index(folder, "pytorch_model.bin.index.json", weight_map)


KINDS: dict[str, Callable[[Path, Tensors], Path]] = {
    "safetensors": write_hf_safetensors,
    "bin": write_hf_bin,
    "legacy bin": write_legacy_bin,
    "npz": write_npz,
    "compressed npz": write_compressed_npz,
    "sharded safetensors": write_sharded_safetensors,
    "sharded bin": write_sharded_bin,
}
