"""Token files of other programs: written here byte by byte from their published layouts, read as those programs mean them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from accel_pretrain.config import open_splits
from accel_pretrain.data import DataConfig, TokenBatches
from accel_pretrain.errors import ConfigError, DataError
from accel_pretrain.shards import open_split
from accel_pretrain.token_formats import files_of_split, split_word, token_files

DOCUMENTS = [[5, 6, 7, 299], [299], [8, 9, 299], [*range(20, 120), 299]]
IDS = [id for document in DOCUMENTS for id in document]
ENDS = [4, 5, 8, 109]
WIDE = [70_000, 65_536, 3, 128_255] * 20


def nanogpt(path: Path, ids: list[int], dtype: str = "<u2") -> Path:
    np.array(ids, dtype=dtype).tofile(path)
    return path


def llmc(path: Path, ids: list[int], dtype: str = "<u2", *, count: int | None = None, version: int | None = None) -> Path:
    magic, own = {"<u2": (20240520, 1), "<u4": (20240801, 7)}[dtype]
    header = [magic, own if version is None else version, len(ids) if count is None else count] + [0] * 253
    path.write_bytes(struct.pack("<256i", *header) + np.array(ids, dtype=dtype).tobytes())
    return path


def megatron(path: Path, documents: list[list[int]], dtype: str = "<u2") -> Path:
    code = {"|u1": 1, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}[dtype]
    ids = np.array([id for document in documents for id in document], dtype=dtype)
    ids.tofile(path)
    sizes = [len(document) for document in documents]
    pointers = [sum(sizes[:number]) * ids.itemsize for number in range(len(sizes))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers)
    path.with_suffix(".idx").write_bytes(index + struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1)))
    return path


def datatrove(path: Path, documents: list[list[int]], dtype: str = "<u2", *, facts: bool = True, index: bool = True) -> Path:
    ids = np.array([id for document in documents for id in document], dtype=dtype)
    ids.tofile(path)
    ends = np.cumsum([len(document) for document in documents]).tolist()
    if index:
        path.with_name(f"{path.name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if facts:
        path.with_name(f"{path.name}.metadata").write_text(f"gpt2|{ids.itemsize}\n{ids.size}\n0 tokens")
    return path


def ids_of(path: Path, dtype: str | None = None) -> list[list[int]]:
    return [file.tolist() for file in open_split(path, "train", dtype).files]


# -------------------------------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize("name", ["train.bin", "train.ids", "part-0.npy", "00000_x.ds"])
def test_ids_and_nothing_else(tmp_path: Path, name: str) -> None:
    split = open_split(nanogpt(tmp_path / name, IDS), "train")
    assert [file.tolist() for file in split.files] == [IDS]
    assert (split.max_id, split.tokens, split.documents, split.document_ends) == (299, 109, None, None)
    assert not split.files[0].flags.writeable


def test_wide_ids_have_to_be_told_and_are_not_taken_for_narrow_ones(tmp_path: Path) -> None:
    path = nanogpt(tmp_path / "x.bin", WIDE, "<u4")
    assert ids_of(path, "uint32") == [WIDE]
    with pytest.raises(DataError, match=r"x\.bin: every second uint16 is next to nothing.*type --dtype uint32"):
        open_split(path, "train")
    assert open_split(path, "train", "uint16").tokens == 2 * len(WIDE)  # what was said is believed
    narrow = nanogpt(tmp_path / "y.bin", IDS[:108])
    assert ids_of(narrow) == [IDS[:108]]  # control
    with pytest.raises(DataError, match=r"y\.bin: holds id [\d,]+, which no vocabulary has; if it is uint16"):
        open_split(narrow, "train", "uint32")


@pytest.mark.parametrize(("dtype", "ids"), [("<u2", IDS), ("<u4", WIDE)])
def test_llmc(tmp_path: Path, dtype: str, ids: list[int]) -> None:
    path = llmc(tmp_path / "x.bin", ids, dtype)
    assert ids_of(path) == [ids]
    headerless = np.fromfile(path, dtype="<u2")  # control: what a reader would train on that does not know the header
    assert headerless.size == 512 + len(ids) * (2 if dtype == "<u4" else 1)
    assert headerless[0] > 50_257
    with pytest.raises(DataError, match=r"data\.dtype uint\d\d: .*x\.bin says that it holds uint\d\d; leave data\.dtype null"):
        open_split(path, "train", "uint32" if dtype == "<u2" else "uint16")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": len(IDS) + 1}, "its header says 110 ids, it holds 109: the file is damaged"),
        ({"count": len(IDS) - 1}, "its header says 108 ids, it holds 109: the file is damaged"),
        ({"version": 2}, "begins as a file of llm.c; its version is 2, this reads 1 for uint16"),
    ],
)
def test_llmc_damaged(tmp_path: Path, changed: dict[str, int], message: str) -> None:
    path = llmc(tmp_path / "x.bin", IDS, count=changed.get("count"), version=changed.get("version"))
    with pytest.raises(DataError, match=message):
        open_split(path, "train")
    for size in (6, 600, 601, 1023):
        path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))
        with pytest.raises(DataError, match="ends within its header"):
            open_split(path, "train")


@pytest.mark.parametrize("name", ["x.bin", "x.idx", "x"])
@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8", "<i2"])
def test_megatron(tmp_path: Path, name: str, dtype: str) -> None:
    megatron(tmp_path / "x.bin", DOCUMENTS, dtype)
    split = open_split(tmp_path / name, "train")
    assert [file.tolist() for file in split.files] == [IDS]
    assert split.document_ends is not None
    assert [ends.tolist() for ends in split.document_ends] == [ENDS]
    assert (split.documents, split.max_id) == (4, 299)
    windows = TokenBatches(split, context_length=8, batch_size=2, seed=0).samples(np.arange(5))
    assert windows.dtype == np.int64
    assert {tuple(row) for row in windows.tolist()} <= {tuple(IDS[start : start + 9]) for start in range(len(IDS) - 8)}


def test_megatron_documents_of_several_sequences(tmp_path: Path) -> None:
    path = megatron(tmp_path / "x.bin", DOCUMENTS)
    index = path.with_suffix(".idx")
    content = index.read_bytes()
    body = content[: 34 + 12 * 4]
    index.write_bytes(body[:26] + struct.pack("<Q", 3) + body[34:] + struct.pack("<3q", 0, 3, 4))
    ends = open_split(path, "train").document_ends
    assert ends is not None
    assert ends[0].tolist() == [8, 109]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:30], "version or dtype code"),
        (lambda content: content[:9] + b"\2" + content[10:], "version or dtype code 8"),
        (lambda content: content[:17] + b"\7" + content[18:], "version or dtype code 7"),
        (lambda content: content[:17] + b"\4" + content[18:], "are not a whole number of int32 ids"),
        (lambda content: content[:-20], "ends before its 4 sequences do"),
        (
            lambda content: content[:34] + b"\5" + content[35:],
            r"does not describe x\.bin \(110 ids in order, the file holds 109\)",
        ),
        (lambda content: content[:58] + b"\2" + content[59:], r"does not describe x\.bin"),
    ],
)
def test_megatron_damaged(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = megatron(tmp_path / "x.bin", DOCUMENTS)
    index = path.with_suffix(".idx")
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(DataError, match=message):
        open_split(path, "train")


def test_megatron_without_its_ids(tmp_path: Path) -> None:
    megatron(tmp_path / "x.bin", DOCUMENTS).unlink()
    with pytest.raises(DataError, match=r"x\.bin: is missing beside .*x\.idx"):
        open_split(tmp_path / "x.idx", "train")


def test_negative_ids_are_refused(tmp_path: Path) -> None:
    path = megatron(tmp_path / "x.bin", [[1, -100, 2]], "<i4")
    with pytest.raises(DataError, match="holds -100, which is no token id"):
        open_split(path, "train")


@pytest.mark.parametrize("facts", [True, False])
@pytest.mark.parametrize(("dtype", "documents"), [("<u2", DOCUMENTS), ("<u4", [WIDE, WIDE])])
def test_datatrove(tmp_path: Path, dtype: str, documents: list[list[int]], facts: bool) -> None:
    path = datatrove(tmp_path / "00000.ds", documents, dtype, facts=facts)
    split = open_split(path, "train")
    assert split.files[0].tolist() == [id for document in documents for id in document]
    assert split.document_ends is not None
    assert split.document_ends[0].tolist() == np.cumsum([len(document) for document in documents]).tolist()
    assert split.documents == len(documents)
    for suffix in ("index", "metadata"):
        (tmp_path / f"00000.ds.{suffix}").unlink(missing_ok=True)
    known = {"<u2": "uint16", "<u4": "uint32"}[dtype]
    assert open_split(path, "train", known).files[0].tolist() == split.files[0].tolist()


def test_datatrove_damaged(tmp_path: Path) -> None:
    path = datatrove(tmp_path / "x.ds", DOCUMENTS)
    with path.open("ab") as file:
        file.write(b"\1\0")
    with pytest.raises(DataError, match=r"x\.ds\.index: does not describe x\.ds \(109 ids, the file holds 110\)"):
        open_split(path, "train")


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4", "<i8"])
def test_a_npy_file_of_numpys_own(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "x.npy", np.array(IDS, dtype=dtype))
    assert ids_of(tmp_path / "x.npy") == [IDS]


@pytest.mark.parametrize("array", [np.zeros((2, 3), dtype=np.uint16), np.zeros(3), np.zeros(0, dtype=np.uint16)])
def test_a_npy_file_of_something_else(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=r"x\.npy: a \.npy file of shape .*; ids are one row of whole numbers"):
        open_split(tmp_path / "x.npy", "train")


def test_a_npy_file_that_would_run_code_or_is_torn(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "y.npy", np.arange(100, dtype=np.uint16))
    (tmp_path / "y.npy").write_bytes((tmp_path / "y.npy").read_bytes()[:200])
    for name in ("x.npy", "y.npy"):
        with pytest.raises(DataError, match=rf"{name}: a damaged \.npy file"):
            open_split(tmp_path / name, "train")


# --------------------------------------------------------------------------------------------------------- several shards


def test_shards_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 1, 2, 100):
        nanogpt(tmp_path / f"part_{number}.bin", [number] * 3)
    wanted = [[number] * 3 for number in (1, 2, 9, 10, 100)]
    assert ids_of(tmp_path) == wanted
    assert ids_of(tmp_path / "part_*.bin") == wanted
    assert ids_of(tmp_path / "part_1*.bin") == [[1] * 3, [10] * 3, [100] * 3]


def test_a_folder_of_every_format(tmp_path: Path) -> None:
    writers: dict[str, Callable[[Path], Path]] = {
        "bin": lambda path: nanogpt(path, IDS), "ids": lambda path: nanogpt(path, IDS), "npy": lambda path: nanogpt(path, IDS),
        "ds": lambda path: datatrove(path, DOCUMENTS),
    }  # fmt: skip
    for suffix, write in writers.items():
        for number in range(2):
            (tmp_path / suffix).mkdir(exist_ok=True)
            write(tmp_path / suffix / f"{number}.{suffix}")
        assert ids_of(tmp_path / suffix) == [IDS, IDS], suffix
    for maker in (llmc, megatron):
        folder = tmp_path / maker.__name__
        folder.mkdir()
        llmc(folder / "a.bin", IDS) if maker is llmc else megatron(folder / "a.bin", DOCUMENTS)
        llmc(folder / "b.bin", IDS[:50]) if maker is llmc else megatron(folder / "b.bin", DOCUMENTS[:2])
        assert ids_of(folder) == [IDS, IDS[:50] if maker is llmc else IDS[:5]]


def test_a_folder_of_several_formats_is_refused(tmp_path: Path) -> None:
    nanogpt(tmp_path / "a.bin", IDS)
    datatrove(tmp_path / "b.ds", DOCUMENTS)
    with pytest.raises(DataError, match=r"holds files of several kinds \(\.bin \.ds\); name one kind by a glob: '.*\*\.bin'"):
        open_split(tmp_path, "train")
    assert ids_of(tmp_path / "*.ds") == [IDS]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("fineweb_train_000001.bin", "train"),
        ("fineweb_val_000000.bin", "val"),
        ("TinyStoriesV2-GPT4-valid.ids", "val"),
        ("validation-00001.npy", "val"),
        ("trainable_values.bin", None),
        ("00000_tokens.ds", None),
        ("test.bin", "test"),
    ],
)
def test_names_speak_of_splits(name: str, split: str | None) -> None:
    assert split_word(Path(name)) == split


def test_the_splits_of_a_folder_are_told_by_the_names_in_it(tmp_path: Path) -> None:
    for number, name in enumerate(("x_val_000000", "x_train_000001", "x_train_000002", "x_test_000001")):
        llmc(tmp_path / f"{name}.bin", [number] * 40)
    splits = open_splits(DataConfig(train_data_path=tmp_path))
    assert [file[0] for file in splits.train.files] == [1, 2]
    assert [file[0] for file in splits.val.files] == [0]
    assert ids_of(tmp_path / "x_val_*.bin") == [[0] * 40]  # what is named alone is taken at its word
    assert [path.name for path in files_of_split(tmp_path, "test")] == ["x_test_000001.bin"]
    (tmp_path / "x_val_000000.bin").unlink()
    with pytest.raises(DataError, match="has no val split: the names of its files speak of other ones"):
        open_splits(DataConfig(train_data_path=tmp_path))


def test_training_files_are_never_the_validation_files_too(tmp_path: Path) -> None:
    for name in ("a", "b"):
        nanogpt(tmp_path / f"{name}.bin", IDS)
    for path in (tmp_path, tmp_path / "*.bin", tmp_path / "a.bin"):
        with pytest.raises(ConfigError, match=r"data\.val_data_path: not given; .*type --val_data_path FILE"):
            open_splits(DataConfig(train_data_path=path))
    splits = open_splits(DataConfig(train_data_path=tmp_path / "a.bin", val_data_path=tmp_path / "b.bin"))
    assert splits.train.tokens == splits.val.tokens == 109


def test_what_is_not_a_token_file_is_passed_over(tmp_path: Path) -> None:
    nanogpt(tmp_path / "a.bin", IDS)
    for name in (".hidden.bin", "meta.pkl", "readme.md"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.bin").mkdir()
    assert [path.name for path in token_files(tmp_path)] == ["a.bin"]


def test_a_pattern_without_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\*\.bin does not exist; make a dataset with"):
        open_split(tmp_path / "*.bin", "train")


def test_the_fingerprint_follows_the_shards_and_their_order(tmp_path: Path) -> None:
    found = []
    for number, names in enumerate((("a", "b"), ("b", "a"), ("a", "a"), ("a",))):
        folder = tmp_path / str(number)
        folder.mkdir()
        for place, name in enumerate(names):
            nanogpt(folder / f"{place}.bin", IDS if name == "a" else IDS[:50])
        found.append(open_split(folder, "train").fingerprint)
    assert len(set(found)) == 4
    assert found[3] == open_split(nanogpt(tmp_path / "other.ids", IDS), "train").fingerprint


def test_the_fingerprint_of_a_bare_file_is_the_one_that_old_checkpoints_know(tmp_path: Path) -> None:
    split = open_split(nanogpt(tmp_path / "x.bin", IDS), "train")
    assert split.fingerprint == "44be711d8afd80f310b14aadd4793e33e5e33d663c429d93b5b3965387ef2603"
