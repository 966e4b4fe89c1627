"""The token format: what is written can be read, and what is damaged is refused with what to type."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from accel_pretrain.errors import DataError
from accel_pretrain.shards import (
    Manifest,
    ShardWriter,
    as_ids,
    dtype_for,
    open_split,
    read_manifest,
    sha256_of,
    write_manifest,
)

TOKENIZER = {"name": "t", "vocab_size": 300, "eot_id": 299, "fingerprint": "f" * 64}


def write_dataset(folder: Path, splits: dict[str, list[list[int]]], vocab_size: int = 300) -> Path:
    folder.mkdir()
    dtype = dtype_for(vocab_size - 1)
    infos = []
    for split, documents in splits.items():
        writer = ShardWriter(folder / f"{split}.bin", split, dtype, vocab_size)
        for document in documents:
            writer.append(np.array(document, dtype=np.uint32), utf8_bytes=2 * len(document))
        infos.append(writer.close())
    tokenizer = TOKENIZER | {"vocab_size": vocab_size}
    write_manifest(folder, Manifest(dtype=dtype, tokenizer=tokenizer, files=tuple(infos), prep={"note": 1}))
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", {"train": [[1, 2, 299], [3, 299]], "val": [[4, 299]]})


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip(dataset: Path) -> None:
    split = open_split(dataset, "train")
    assert [file.tolist() for file in split.files] == [[1, 2, 299, 3, 299]]
    assert (split.tokens, split.documents, split.utf8_bytes, split.max_id) == (5, 2, 10, 299)
    assert split.bytes_per_token == 2.0
    assert split.tokenizer_path == dataset / "tokenizer"
    assert type(split.files[0]) is np.ndarray
    assert not split.files[0].flags.writeable
    info = read_manifest(dataset).files[0]
    assert info.sha256 == sha256_of(dataset / info.path)


def test_a_file_of_a_dataset_is_opened_through_its_manifest(dataset: Path) -> None:
    assert open_split(dataset / "val.bin", "train").files[0].tolist() == [4, 299]
    assert open_split(dataset / "val.bin", "train").tokenizer is not None


def test_fingerprint_follows_the_tokens_not_the_place(dataset: Path, tmp_path: Path) -> None:
    same = write_dataset(tmp_path / "same", {"train": [[1, 2, 299], [3, 299]], "val": [[4, 299]]})
    other = write_dataset(tmp_path / "other", {"train": [[1, 2, 299], [5, 299]], "val": [[4, 299]]})
    assert open_split(dataset, "train").fingerprint == open_split(same, "train").fingerprint
    assert open_split(dataset, "train").fingerprint != open_split(other, "train").fingerprint


def test_uint32_when_the_vocabulary_needs_it(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "wide", {"train": [[70_000, 65_536]]}, vocab_size=70_001)
    assert open_split(folder, "train").files[0].tolist() == [70_000, 65_536]
    assert (folder / "train.bin").stat().st_size == 8


@pytest.mark.parametrize(("largest", "dtype"), [(0, "uint16"), (65_535, "uint16"), (65_536, "uint32")])
def test_dtype_for(largest: int, dtype: str) -> None:
    assert dtype_for(largest) == dtype


def test_as_ids_refuses_what_a_cast_would_wrap() -> None:
    assert np.array([70_000]).astype(np.uint16) == 4464  # what would happen
    with pytest.raises(DataError, match="70000"):
        as_ids(np.array([1, 70_000]), "uint16", 100_000)
    with pytest.raises(DataError, match="vocabulary has 300"):
        as_ids(np.array([300]), "uint16", 300)
    with pytest.raises(DataError, match="-1"):
        as_ids(np.array([-1]), "uint16", 300)
    assert as_ids(np.array([], dtype=np.int64), "uint16", 300).dtype == np.uint16


def test_writer_leaves_nothing_under_the_name_until_it_is_closed(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train.bin", "train", "uint16", 300)
    writer.append(np.array([1, 2]))
    assert not (tmp_path / "train.bin").exists()
    writer.close()
    assert (tmp_path / "train.bin").exists()


# ------------------------------------------------------------------------------------------------------ damaged datasets


@pytest.mark.parametrize("size", [0, 3, 8, 12])
def test_wrong_size(dataset: Path, size: int) -> None:
    (dataset / "train.bin").write_bytes(bytes(size))
    with pytest.raises(DataError, match=rf"train\.bin is {size} bytes long instead of 10: the dataset is damaged"):
        open_split(dataset, "train")
    assert open_split(dataset, "val").tokens == 2


def test_missing_file(dataset: Path) -> None:
    (dataset / "train.bin").unlink()
    with pytest.raises(DataError, match="is missing: the dataset is damaged"):
        open_split(dataset, "train")


def test_missing_manifest(dataset: Path) -> None:
    (dataset / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"not a token dataset, or prep did not finish.*python -m prep\.tokenize"):
        open_split(dataset, "train")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist; make a dataset with: python -m prep\.tokenize"):
        open_split(tmp_path / "nothing", "train")


def test_missing_split(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", {"train": [[1]]})
    with pytest.raises(DataError, match="has no val split, only train"):
        open_split(folder, "val")


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"},
        {"dtype": None},
        {"format": "something.else"},
        {"version": 99},
        {"tokenizer": {}},
        {"tokenizer": None},
        {"files": [{"path": "train.bin"}]},
        {"files": [{"path": "../train.bin", "split": "train", "tokens": 5, "documents": 1,
                    "utf8_bytes": 1, "max_id": 1, "sha256": ""}]},
    ],
)  # fmt: skip
def test_bad_manifest(dataset: Path, changes: dict[str, object]) -> None:
    edit_manifest(dataset, **changes)
    with pytest.raises(DataError, match="manifest"):
        open_split(dataset, "train")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_manifest_that_is_not_json(dataset: Path, text: str) -> None:
    (dataset / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="damaged"):
        open_split(dataset, "train")


def test_dtype_that_contradicts_the_manifest(dataset: Path) -> None:
    with pytest.raises(DataError, match=r"data\.dtype uint32: .* holds uint16"):
        open_split(dataset, "train", "uint32")


# ------------------------------------------------------------------------------------------------------------ bare files


def test_bare_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    np.arange(10, dtype="<u2").tofile(path)
    split = open_split(path, "train")
    assert split.files[0].tolist() == list(range(10))
    assert (split.max_id, split.tokenizer, split.utf8_bytes) == (9, None, None)
    assert open_split(path, "train", "uint32").tokens == 5


def test_bare_file_of_odd_length(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match=r"3 bytes are not a whole number of uint16 ids .*prep\.tokenize"):
        open_split(tmp_path / "x.bin", "train")


def test_empty_bare_file(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes"):
        open_split(tmp_path / "x.bin", "train")


@pytest.mark.parametrize(("magic", "dtype"), [(20240520, "<u2"), (20240801, "<u4")])
def test_llmc_header(tmp_path: Path, magic: int, dtype: str) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, 4
    path = tmp_path / "x.bin"
    path.write_bytes(header.tobytes() + np.array([5, 6, 7, 8], dtype=dtype).tobytes())
    assert open_split(path, "train").files[0].tolist() == [5, 6, 7, 8]


def test_npy_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(4, dtype=np.uint16))
    with pytest.raises(DataError, match=r"NumPy \.npy file; write its ids with ndarray\.tofile"):
        open_split(tmp_path / "x.npy", "train")
