"""Damaged weight files: refused in one line that names the file, whatever the damage, or read as they were written."""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from accel_pretrain.errors import CheckpointError
from accel_pretrain.hf import numpy_files, tensor_map
from accel_pretrain.hf.weight_files import open_weights
from tests.weights import (
    KINDS,
    as_bytes,
    damage_is_refused_or_harmless,
    mutated,
    read_all,
    refusal,
    small_tensors,
    write_hf_safetensors,
)


def header(document: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def place(begin: int, end: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_SAFETENSORS = {
    "empty file": b"",
    "half a length": b"\x08\0\0",
    "a header of 9,223,372,036,854,775,807 bytes": header(b"{}", length=2**63 - 1),
    "a header longer than the file": header(b"{}", length=3),
    "not JSON": header(b"hello"),
    "a list": header([]),
    "not UTF-8": header(b'{"\xff": 1}'),
    "deep": header(b'{"a":' + b"[" * 100_000),
    "a repeated name": header(b'{"a":%b,"a":%b}' % ((json.dumps(place(0, 4)).encode(),) * 2), bytes(4)),
    "overlap": header({"a": place(0, 4), "b": place(0, 4)}, bytes(4)),
    "part overlap": header({"a": place(0, 4), "b": place(2, 6)}, bytes(6)),
    "a gap": header({"a": place(0, 4), "b": place(8, 12)}, bytes(12)),
    "beyond the end": header({"a": place(0, 400, (100,))}, bytes(4)),
    "bytes behind the end": header({"a": place(0, 4)}, bytes(8)),
    "backwards": header({"a": place(4, 0)}, bytes(4)),
    "negative place": header({"a": place(-4, 0)}, bytes(4)),
    "negative shape": header({"a": place(0, 4, (-1, -1))}, bytes(4)),
    "absurd shape": header({"a": place(0, 4, (2**62, 2**62))}, bytes(4)),
    "absurd empty shape": header({"a": place(0, 0, (2**62, 0))}),
    "a thousand dimensions": header({"a": place(0, 4, (1,) * 1000)}, bytes(4)),
    "shape of floats": header({"a": place(0, 4, (1.0,))}, bytes(4)),
    "shape of booleans": header({"a": place(0, 4, (True,))}, bytes(4)),
    "shape is a text": header({"a": place(0, 4, "1")}, bytes(4)),
    "unknown type": header({"a": place(0, 4, dtype="F33")}, bytes(4)),
    "type is a list": header({"a": place(0, 4, dtype=["F32"])}, bytes(4)),
    "three places": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(4)),
    "place is a number": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": 4}}, bytes(4)),
    "no place": header({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "entry is a number": header({"a": 1}),
    "no tensors": header({}),
    "metadata of numbers": header({"__metadata__": {"a": 1}, "a": place(0, 4)}, bytes(4)),
    "a name with a line break": header({"a\nb": place(0, 4)}, bytes(4)),
    "half a character as a name": header(b'{"\\ud800": %b}' % json.dumps(place(0, 4)).encode(), bytes(4)),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
}


@pytest.mark.parametrize("title", BAD_SAFETENSORS)
def test_bad_headers_of_safetensors(title: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_SAFETENSORS[title])
    message = refusal(path)
    assert str(path) in message
    assert ("git lfs pull" in message) == (title == "Git LFS")


def test_bad_headers_control(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(header({"a": place(0, 4), "b": place(4, 12, (2,))}, bytes(12)))
    assert read_all(tmp_path) == {"a": (1,), "b": (2,)}


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # a hole, which takes no disk
    assert "a header of 100,000,001 bytes" in refusal(path)


def test_bad_archives_of_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"

    def write(member: bytes, compression: int = zipfile.ZIP_DEFLATED, name: str = "a.npy") -> None:
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr(name, member)

    good = io.BytesIO()
    np.save(good, np.arange(6, dtype=np.float32))
    write(good.getvalue())
    assert read_all(path) == {"a": (6,)}  # control
    cases = {
        "has 28 bytes instead of 24": good.getvalue() + bytes(4),
        "has 20 bytes instead of 24": good.getvalue()[:-4],
        "instead of 4,000,000,000,000": good.getvalue().replace(b"(6,), }", b"(1000000000000,), }"),
        "magic string": b"hello, this is not an array",
        "is of the type |V2": good.getvalue().replace(b"'<f4'", b"'|V2'"),
    }
    for message, member in cases.items():
        for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
            write(member, compression)
            assert message in refusal(path)
    write(good.getvalue(), zipfile.ZIP_LZMA)
    assert "compressed in another way" in refusal(path)
    monkeypatch.setattr(numpy_files, "ALWAYS_ALLOWED", 1 << 20)
    np.savez_compressed(path, a=np.zeros(1_000_000))
    assert "a zip bomb" in refusal(path)
    np.savez(path, a=np.zeros(100_000))
    content = bytearray(path.read_bytes())
    content[-2000] ^= 1
    path.write_bytes(content)
    assert "the checksum of 'a.npy' differs" in refusal(path)


def test_an_index_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = KINDS["sharded safetensors"](tmp_path, small_tensors())
    monkeypatch.setattr(tensor_map.read_json, "__defaults__", (100,))
    assert "more than 100 bytes of JSON" in refusal(index)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "is not a regular file" in refusal(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage(kind: str, tmp_path: Path) -> None:
    tensors = small_tensors()
    path = KINDS[kind](tmp_path, tensors)
    # The old format of torch has no checksum: in its pickle a shape can become another, smaller one.
    damage_is_refused_or_harmless(path, None if kind == "legacy bin" else [tuple(tensor.shape) for tensor in tensors.values()])


def test_what_is_read_from_a_damaged_file_is_what_the_library_reads(tmp_path: Path) -> None:
    """Ours refuses all that the library refuses, and where both read, they read the same."""
    path, draw, both = write_hf_safetensors(tmp_path, small_tensors()), random.Random(5), 0
    content = path.read_bytes()
    for _ in range(400):
        path.write_bytes(mutated(content, draw))
        try:
            with open_weights(path) as files:
                ours = {name: as_bytes(files.read(name)) for name in files}
        except CheckpointError:
            continue
        try:
            theirs = {name: as_bytes(tensor) for name, tensor in load_file(path).items()}
        except (SafetensorError, KeyError):
            pytest.fail("the library refuses what was read")
        assert ours == theirs
        both += 1
    assert both > 40


def test_bad_headers_are_bad_for_the_library_too(tmp_path: Path) -> None:
    """Control of the table above. The library takes a few of them, such as a repeated name; ours takes none."""
    path, refused = tmp_path / "model.safetensors", 0
    for content in BAD_SAFETENSORS.values():
        path.write_bytes(content)
        try:
            load_file(path)
        except Exception:
            refused += 1
    assert refused > 20
    save_file({"a": torch.zeros(1)}, path)
    assert load_file(path)
