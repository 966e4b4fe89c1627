"""The token format: what is written can be read, and what is damaged is refused with what to type."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from accel_pretrain import shards
from accel_pretrain.errors import DataError
from accel_pretrain.shards import (
    Manifest,
    ShardWriter,
    as_ids,
    dtype_for,
    open_split,
    read_manifest,
    sampled_sha256,
    sha256_of,
    splits_in,
    write_manifest,
)

TOKENIZER = {"name": "t", "vocab_size": 300, "eot_id": 299, "fingerprint": "f" * 64}


def write_dataset(folder: Path, splits: dict[str, list[list[int]]], vocab_size: int = 300, eot_id: int | None = None) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "spec.json").write_text("{}")
    dtype = dtype_for(vocab_size - 1)
    infos = []
    for split, documents in splits.items():
        writer = ShardWriter(folder / f"{split}.bin", split, dtype, vocab_size, eot_id)
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
    """Change a manifest as somebody would who also makes its hash fit."""
    path = folder / "manifest.json"
    document = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"} | changes
    document["sha256"] = hashlib.sha256((json.dumps(document, indent=2) + "\n").encode()).hexdigest()
    path.write_text(json.dumps(document, indent=2) + "\n")


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


def test_one_shard_of_several_is_opened_alone(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", {"train": [[1, 299]], "more": [[2, 3, 299]]})
    manifest = read_manifest(folder)
    write_manifest(
        folder, dataclasses.replace(manifest, files=tuple(dataclasses.replace(i, split="train") for i in manifest.files))
    )
    whole, one, other = (open_split(folder / name, "train") for name in ("", "train.bin", "more.bin"))
    assert [[file.tolist() for file in split.files] for split in (whole, one, other)] == [
        [[1, 299], [2, 3, 299]], [[1, 299]], [[2, 3, 299]],
    ]  # fmt: skip
    assert len({split.fingerprint for split in (whole, one, other)}) == 3
    assert (one.tokenizer, other.documents) == (whole.tokenizer, 1)


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


# ----------------------------------------------------------------------------------------------------- where documents end


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "indexed", {"train": [[1, 2, 299], [3, 299], [299]], "val": [[4, 299]]}, eot_id=299)


def test_the_index_says_where_documents_end(indexed: Path) -> None:
    split = open_split(indexed, "train")
    assert split.document_ends is not None
    assert [ends.tolist() for ends in split.document_ends] == [[3, 5, 6]]
    assert not split.document_ends[0].flags.writeable
    saved = np.load(indexed / "train.idx.npy")
    assert (saved.dtype, saved.tolist()) == (np.dtype("<u8"), [3, 5, 6])
    assert (indexed / "train.idx.npy").stat().st_size == 128 + 8 * 3


def test_several_documents_may_come_at_once_and_in_parts(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x.bin", "train", "uint16", 300, eot_id=299)
    for ids, documents in (([1], 0), ([2, 299, 3, 3, 299, 4], 2), ([], 0), ([299], 1)):
        writer.append(np.array(ids, dtype=np.uint32), documents)
    info = writer.close()
    assert np.load(tmp_path / "x.idx.npy").tolist() == [3, 6, 8]
    assert (info.documents, info.index, info.index_sha256) == (3, "x.idx.npy", sha256_of(tmp_path / "x.idx.npy"))


def test_a_document_without_its_end_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x.bin", "train", "uint16", 300, eot_id=299)
    writer.append(np.array([1, 2]))
    with pytest.raises(DataError, match="1 documents, but 0 end-of-text ids"):
        writer.close()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"\0" * 152, b"\0" * 160], ids=["empty", "zeros", "longer"])
def test_a_damaged_index_is_refused(indexed: Path, damage: bytes) -> None:
    (indexed / "train.idx.npy").write_bytes(damage)
    with pytest.raises(DataError, match=r"train\.idx\.npy (is \d+ bytes long instead of 152|was changed)"):
        open_split(indexed, "train")
    assert open_split(indexed, "val").documents == 1


def test_a_dataset_from_before_there_were_indices_and_hashes_of_samples_opens(dataset: Path) -> None:
    path = dataset / "manifest.json"
    document = json.loads(path.read_text())
    for key in ("sha256", "tokenizer_files"):
        del document[key]
    for info in document["files"]:
        for key in ("sampled", "index", "index_sha256"):
            del info[key]
    before = open_split(dataset, "train").fingerprint
    path.write_text(json.dumps(document, indent=2) + "\n")
    split = open_split(dataset, "train")
    assert split.files[0].tolist() == [1, 2, 299, 3, 299]
    assert (split.fingerprint, split.document_ends) == (before, None)
    assert read_manifest(dataset, to_the_byte=True).files[0].index == ""


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


def test_an_incomplete_dataset_is_not_taken_for_token_files(indexed: Path) -> None:
    (indexed / "manifest.json").unlink()
    (indexed / "tokenizer" / "spec.json").unlink()
    (indexed / "tokenizer").rmdir()
    with pytest.raises(DataError, match="not a token dataset, or prep did not finish"):
        open_split(indexed, "train")
    for path in indexed.glob("*.idx.npy"):  # control: without any sign of prep, it is a folder of bare files
        path.unlink()
    assert open_split(indexed, "train").tokens == 6


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_flipped_byte_of_a_file_is_seen_when_it_is_opened(indexed: Path, split: str) -> None:
    for path in (indexed / f"{split}.bin", indexed / f"{split}.idx.npy"):
        content = path.read_bytes()
        for place in range(len(content)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
            with pytest.raises(DataError, match=r"was changed after it was written"):
                open_split(indexed, split)
        path.write_bytes(content)
        open_split(indexed, split)  # control


def test_every_flipped_byte_of_a_manifest_is_seen(indexed: Path) -> None:
    path = indexed / "manifest.json"
    content = path.read_bytes()
    meant_nothing = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x02]) + content[place + 1 :])
        with pytest.raises(DataError):
            read_manifest(indexed, to_the_byte=True)
        try:
            meant_nothing += read_manifest(indexed) is not None  # a space that became another kind of white space, say
        except DataError:
            continue
    assert meant_nothing < len(content) / 20
    path.write_bytes(content)
    read_manifest(indexed, to_the_byte=True)  # control


def test_a_large_file_is_checked_by_its_sample(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_HASHED_AT_OPEN", 0)
    monkeypatch.setattr(shards, "sha256_of", None)  # control: whoever hashed the whole file would fail
    assert open_split(indexed, "val").tokens == 2
    (indexed / "val.bin").write_bytes(b"\1\0\2\0")
    with pytest.raises(DataError, match=r"val\.bin was changed after it was written"):
        open_split(indexed, "val")


def test_the_sample_covers_the_size_both_ends_and_places_between(tmp_path: Path) -> None:
    path, size = tmp_path / "x", 20_000_000
    content = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    content.tofile(path)
    hashes = {sampled_sha256(path)}
    middle = 31 * (size - 65_536) // 63
    for place in (0, 65_535, middle + 5, size - 1):
        changed = content.copy()
        changed[place] ^= 1
        changed.tofile(path)
        hashes.add(sampled_sha256(path))
    content[:-2].tofile(path)
    hashes.add(sampled_sha256(path))
    assert len(hashes) == 6
    small = tmp_path / "y"
    small.write_bytes(b"")
    assert sampled_sha256(small) != sampled_sha256(path)


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


def test_the_splits_in_a_path(dataset: Path, tmp_path: Path) -> None:
    assert splits_in(dataset) == ["train", "val"]
    assert splits_in(dataset / "train.bin") == []
    for names, found in ((("a.bin", "b.bin"), []), (("x_train.bin", "x_val.bin"), ["train", "val"]), (("train.bin",), [])):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            np.arange(4, dtype="<u2").tofile(folder / name)
        assert splits_in(folder) == found
