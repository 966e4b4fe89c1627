"""Written weights: byte for byte what the safetensors library writes, in the shards of Hugging Face, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from accel_pretrain.errors import CheckpointError
from accel_pretrain.hf.weight_files import TensorEntry, open_weights, write_safetensors, write_sharded
from tests.running import REPO
from tests.weights import Tensors, arrays_of, as_bytes, assert_equal, entries_of, write_hf_bin, write_hf_safetensors

TYPES = [torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.int16, torch.uint16, torch.float16]
TYPES += [torch.bfloat16, torch.int32, torch.uint32, torch.float32, torch.complex64, torch.float64, torch.int64, torch.uint64]


def all_types() -> Tensors:
    """Every type in several shapes, with names that JSON must escape or that are not ASCII, in no order."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for number, dtype in enumerate(TYPES):
        for shape in ((3, 5), (), (0, 4), (7,), (1, 2, 1, 3)):
            elements = int(np.prod(shape))
            raw = torch.randint(0, 2 if dtype == torch.bool else 256, (elements * dtype.itemsize,), generator=generator)
            name = f'{"zebra"[number % 5]}."{len(shape)}"\\é.{dtype}.{elements}'
            tensors[name] = raw.to(torch.uint8).view(dtype).reshape(shape)
    return tensors


def test_written_files_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = all_types()
    for metadata in ({"format": "pt"}, {}):
        save_file(tensors, tmp_path / "library.safetensors", metadata=metadata or None)
        write_safetensors(tmp_path / "ours.safetensors", entries_of(tensors), tensors.__getitem__, metadata)
        assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    assert {as_bytes(value) for value in load_file(tmp_path / "ours.safetensors").values()} == set(
        map(as_bytes, tensors.values())
    )
    assert_equal(open_weights(tmp_path / "ours.safetensors"), tensors)
    changed = tensors | {next(iter(tensors)): torch.zeros(3, 5, dtype=torch.bool)}  # control
    save_file(changed, tmp_path / "library.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() != (tmp_path / "library.safetensors").read_bytes()


def test_writing_asks_for_one_tensor_at_a_time_and_syncs(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(4, 6).T, "a": torch.nn.Parameter(torch.randn(2))}
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    write_safetensors(tmp_path / "x.safetensors", entries_of(tensors), read)
    assert asked == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("b"), tensors["b"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (TensorEntry("a", torch.float32, (3,)), r"a is torch.float32 \(2,\), announced as torch.float32 \(3,\)"),
        (TensorEntry("a", torch.int32, (2,)), r"announced as torch.int32 \(2,\)"),
        (TensorEntry("a", torch.complex128, (2,)), "complex128, which safetensors cannot hold"),
        (TensorEntry("__metadata__", torch.float32, (2,)), "the name __metadata__ is taken"),
    ],
)
def test_what_cannot_be_written_leaves_nothing_behind(entry: TensorEntry, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_safetensors(tmp_path / "x.safetensors", [entry], lambda name: torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [1, 40, 41, 60, 100, 200, 10**9])
def test_shards_are_those_of_hugging_face(limit: int, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="it comes with transformers: pip install 'accel_pretrain[hf]'")
    tensors = {f"w{number}": torch.full((size,), float(number)) for number, size in enumerate((10, 3, 30, 1, 9, 10, 12))}
    paths = write_sharded(tmp_path, entries_of(tensors), tensors.__getitem__, limit, {"format": "pt"})
    split = hub.split_torch_state_dict_into_shards(tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=limit)
    assert [path.name for path in paths] == list(split.filename_to_tensors) + split.is_sharded * [
        "model.safetensors.index.json"
    ]
    for file, names in split.filename_to_tensors.items():
        assert load_file(tmp_path / file).keys() == set(names)
    if split.is_sharded:
        index = json.loads(paths[-1].read_text())
        assert index == {"metadata": {"total_parameters": 75, "total_size": 300}, "weight_map": split.tensor_to_filename}
    assert_equal(open_weights(tmp_path), tensors)
    with pytest.raises(CheckpointError, match="already holds model"):
        write_sharded(tmp_path, entries_of(tensors), tensors.__getitem__, limit)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory was used at most")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "weights.npz"])
def test_copying_needs_the_memory_of_a_few_tensors(name: str, tmp_path: Path) -> None:
    program = """
import re, sys, torch
from pathlib import Path
from accel_pretrain.hf import torch_files
from accel_pretrain.hf.weight_files import TensorEntry, open_weights, write_safetensors
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
torch_files._MAP_AGAIN_AFTER = 16 << 20
before = peak()
with open_weights(Path(sys.argv[1])) as files:
    entries = [TensorEntry(name, files.dtype(name), files.shape(name)) for name in files]
    write_safetensors(Path(sys.argv[2]), entries, files.read)
    grown = peak() - before
    keep = [files.read(name) for name in files]
    for tensor in keep: tensor.sum()
    print(grown, peak() - before)
"""
    size, count = 4 << 20, 32
    tensors = {f"w{number}": torch.full((size // 4,), float(number)) for number in range(count)}
    if name.endswith("npz"):
        np.savez(tmp_path / name, **arrays_of(tensors))
    else:
        (write_hf_safetensors if name.endswith("safetensors") else write_hf_bin)(tmp_path, tensors)
    arguments = [sys.executable, "-c", program, str(tmp_path / name), str(tmp_path / "copy.safetensors")]
    done = subprocess.run(arguments, cwd=REPO, capture_output=True, text=True, check=True, timeout=120)
    grown, with_all_kept = map(int, done.stdout.split())
    assert grown < 48 << 20
    assert with_all_kept > count * size  # control: keeping all is seen
    assert_equal(open_weights(tmp_path / "copy.safetensors"), tensors)
