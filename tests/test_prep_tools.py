"""The tools around token datasets: nothing that is damaged passes, what is exported is what others read, merging keeps all."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel_pretrain.errors import DataError
from accel_pretrain.shards import Manifest, ShardWriter, dtype_for, open_split, read_manifest, write_manifest
from accel_pretrain.tokenizer import GPT2_PATTERN, BpeTokenizer, ByteTokenizer, Tokenizer
from prep import describe, export, merge, verify
from prep.export import cut
from prep.tools import document_ends, ends_of
from tests.running import REPO, environment, stdlib_text

MERGES = {token: 256 + rank for rank, token in enumerate([b"  ", b"\n\n", b" t", b"th", b"in", b"re", b" s", b"se"])}
BYTES = ByteTokenizer()


def bpe(eot_id: int = 264) -> BpeTokenizer:
    """A small vocabulary of byte pairs; with a large ``eot_id`` its ids need four bytes."""
    ranks = {bytes([byte]): byte for byte in range(256)} | MERGES
    return BpeTokenizer("small", ranks, GPT2_PATTERN, {"<|endoftext|>": eot_id})


def texts(count: int, seed: int = 0, words: int = 30) -> list[str]:
    source, known = random.Random(seed), stdlib_text(20_000).split()
    return [f"{seed}.{n} é " + " ".join(source.choices(known, k=source.randint(1, words))) for n in range(count)]


def make(
    folder: Path,
    train: Sequence[str],
    val: Sequence[str] = (),
    tokenizer: Tokenizer = BYTES,
    *,
    shards: int = 1,
    index: bool = True,
) -> Path:
    """A dataset as prep writes it, with ``shards`` files of train."""
    folder.mkdir(parents=True)
    dtype = dtype_for(tokenizer.vocab_size - 1)
    names = [("train.bin", "train", train)] if shards == 1 else []
    size = -(-len(train) // shards)
    names += [(f"train_{n + 1:06d}.bin", "train", train[n * size : (n + 1) * size]) for n in range(shards) if shards > 1]
    names += [("val.bin", "val", val)] if val else []
    infos = []
    for name, split, documents in names:
        writer = ShardWriter(folder / name, split, dtype, tokenizer.vocab_size, tokenizer.eot_id if index else None)
        for text in documents:
            writer.append(tokenizer.encode_document(text), 1, len(text.encode()))
        infos.append(writer.close())
    tokenizer.save(folder / "tokenizer")
    about = {key: getattr(tokenizer, key) for key in ("name", "vocab_size", "eot_id", "fingerprint")}
    write_manifest(folder, Manifest(dtype=dtype, tokenizer=about, files=tuple(infos), prep={"note": "x"}))
    return folder


def ids_of(path: Path, split: str = "train") -> np.ndarray:
    return np.concatenate(open_split(path, split).files)


def documents_of(path: Path, split: str, tokenizer: Tokenizer = BYTES) -> list[str]:
    opened = open_split(path, split)
    spans = [np.split(ids, ends[:-1]) for ids, ends in zip(opened.files, document_ends(opened), strict=True)]
    return [tokenizer.decode(ids.tolist()) for own in spans for ids in own]


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a tool's command line in this process: ``run(merge, a, b, "-o", out)``."""

    def call(tool: Any, *words: object) -> Result:
        capsys.readouterr()
        try:
            code = tool.main([str(word) for word in words])
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def tool(name: str, *words: object) -> list[str]:
    return [sys.executable, "-m", f"prep.{name}", *(str(word) for word in words)]


# ---------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("tokenizer", [BYTES, bpe(), bpe(70_000)], ids=["bytes", "pairs", "uint32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_whole_dataset_is_said_to_be_whole(
    run: Callable[..., Result], tmp_path: Path, tokenizer: Tokenizer, shards: int
) -> None:
    folder = make(tmp_path / "data", texts(40), texts(9, seed=1), tokenizer, shards=shards)
    result = run(verify, folder)
    assert (result.code, result.err) == (0, "")
    tokens = sum(info.tokens for info in read_manifest(folder).files)
    assert result.out == f"{folder}: whole; {shards + 1} files, 49 documents, {tokens:,} tokens\n"


def damage(path: Path, other: Path, source: random.Random) -> str:
    """Change a file as accidents do; gives the name of the accident."""
    content, kind = path.read_bytes(), source.choice(["flip", "byte", "truncate", "extend", "delete", "swap", "zeros", "move"])
    place = source.randrange(len(content))
    if kind == "flip":
        changed = content[:place] + bytes([content[place] ^ 1 << source.randrange(8)]) + content[place + 1 :]
    elif kind == "byte":
        changed = content[:place] + content[place + 1 :]
    elif kind == "truncate":
        changed = content[:place]
    elif kind == "extend":
        changed = content + source.randbytes(source.randint(1, 40))
    elif kind == "zeros":
        changed = content[:place] + bytes(len(content) - place)
    elif kind == "move":
        changed = content[place:] + content[:place]
    elif kind == "delete":
        path.unlink()
        return kind
    else:
        changed = other.read_bytes()
        other.write_bytes(content)
    path.write_bytes(changed)
    return kind


@pytest.mark.parametrize("shards", [1, 2])
def test_no_corruption_passes(tmp_path: Path, shards: int) -> None:
    """500 accidents to any file of two datasets: verify names each of them, and opening sees all that befell the ids."""
    folder = make(tmp_path / "data", texts(60), texts(20, seed=1), bpe(), shards=shards)
    contents = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert len(contents) == 5 + 2 * shards
    source, kinds, harmless = random.Random(shards), set(), 0
    for _ in range(250):
        path = source.choice(list(contents))
        other = source.choice([candidate for candidate in contents if candidate != path])
        kind = damage(path, other, source)
        if all(file.exists() and file.read_bytes() == content for file, content in contents.items()):
            harmless += 1  # zeros over zeros, say
            continue
        kinds.add(kind)
        problems = list(verify.verify(folder, sample=5))
        assert problems, f"{kind} of {path.name}"
        assert all("\n" not in problem and str(folder) in problem for problem in problems)
        for split in ("train", "val"):
            befell = [file for file in contents if file.name.startswith(split) and not _as_it_was(file, contents[file])]
            if befell:
                with pytest.raises(DataError):
                    open_split(folder, split)
        for file, content in contents.items():
            if not _as_it_was(file, content):
                file.write_bytes(content)
    assert len(kinds) == 8
    assert harmless < 25
    assert list(verify.verify(folder, sample=5)) == []  # control


def _as_it_was(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() == content


def rewrite(folder: Path, **changes: Any) -> None:
    """Give a dataset another manifest, whose own hash fits."""
    write_manifest(folder, dataclasses.replace(read_manifest(folder), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": 41}, r"train\.bin: 40 end-of-text ids, but 41 documents"),
        ({"max_id": 255}, r"train\.bin: its largest id is 256, of 257 ids; the manifest says 255"),
        ({"sampled": "0" * 64}, r"train\.bin: the hash of its sample is another one"),
        ({"sha256": "0" * 64}, r"train\.bin: was changed after it was written"),
        ({"tokens": 5}, r"train\.bin: is [\d,]+ bytes long instead of 10"),
        ({"index_sha256": "0" * 64}, r"train\.idx\.npy: was changed after it was written"),
        ({"index": "none.idx.npy"}, r"none\.idx\.npy: is missing"),
        ({"path": "none.bin"}, r"none\.bin: is missing"),
    ],
)
def test_a_manifest_that_says_something_else(
    run: Callable[..., Result], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = make(tmp_path / "data", texts(40))
    [info] = read_manifest(folder).files
    rewrite(folder, files=(dataclasses.replace(info, **changes),))
    result = run(verify, folder)
    assert result.code == 2
    [line] = result.out.splitlines()
    assert re.search(message, line), line


def test_an_index_that_points_elsewhere(run: Callable[..., Result], tmp_path: Path) -> None:
    folder = make(tmp_path / "data", texts(4))
    [info] = read_manifest(folder).files
    np.save(folder / "train.idx.npy", np.load(folder / "train.idx.npy")[::-1])
    rewrite(folder, files=(dataclasses.replace(info, index_sha256=verify.sha256_of(folder / "train.idx.npy")),))
    assert "train.idx.npy: does not say where the documents of train.bin end" in run(verify, folder).out


def test_another_tokenizer(run: Callable[..., Result], tmp_path: Path) -> None:
    folder = make(tmp_path / "data", texts(4), tokenizer=bpe())
    rewrite(folder, tokenizer=read_manifest(folder).tokenizer | {"name": "gpt2"})
    assert run(verify, folder).out == f"{folder}/tokenizer: is not the tokenizer of the manifest (other name)\n"


def test_text_that_is_no_text_or_was_encoded_by_another_rule(run: Callable[..., Result], tmp_path: Path) -> None:
    for name, ids, message in (
        ("a", [0xFF, 264], "document 0 of train is not UTF-8 text when it is decoded"),
        ("b", [ord("t"), ord("h"), 264], "document 0 of train is not what its text is encoded to"),
        ("c", [259, 264], ""),  # control: the pair
    ):
        folder = make(tmp_path / name, ["x"], tokenizer=bpe())
        writer = ShardWriter(folder / "train.bin", "train", "uint16", 265, 264)
        writer.append(np.array(ids), 1, 2)
        rewrite(folder, files=(writer.close(),))
        result = run(verify, folder)
        assert (message in result.out, result.code) == (True, 2 if message else 0)
        assert run(verify, folder, "--sample", "0").code == 0  # nothing else is wrong


def test_verify_in_a_process_of_its_own(tmp_path: Path) -> None:
    good, bad = make(tmp_path / "good", texts(4)), make(tmp_path / "bad", texts(4))
    (bad / "train.bin").write_bytes(bytes(10))
    for folders, code in (((good,), 0), ((good, bad), 2)):
        done = subprocess.run(tool("verify", *folders), cwd=REPO, env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, "")
        assert len(done.stdout.splitlines()) == len(folders)


def test_verify_what_is_not_there(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run(verify, tmp_path / "none")
    assert (result.code, "is not a token dataset, or prep did not finish there" in result.out) == (2, True)
    result = run(verify, tmp_path, "--sample", "-1")
    assert (result.code, result.err) == (2, "error: sample: 0 or more, got -1\n")


# ---------------------------------------------------------------------------------------------------------------- export


@pytest.fixture(params=[("bytes", 1), ("pairs", 3), ("uint32", 2)], ids=lambda param: f"{param[0]}-{param[1]}")
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A dataset, in one file or in several shards, of two or four bytes per id."""
    name, shards = request.param
    tokenizer = {"bytes": BYTES, "pairs": bpe(), "uint32": bpe(70_000)}[name]
    return make(tmp_path / "data", texts(50), texts(12, seed=1), tokenizer, shards=shards)


FORMATS = ["nanogpt", "llmc", "megatron", "datatrove", "olmo"]


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_exported_reads_back_the_same(run: Callable[..., Result], source: Path, tmp_path: Path, to: str) -> None:
    manifest = read_manifest(source)
    result = run(export, source, "--to", to, "-o", tmp_path / "out")
    if to == "nanogpt" and manifest.dtype == "uint32":
        assert (result.code, "nanoGPT reads uint16; use --to llmc or megatron" in result.err) == (2, True)
        assert not (tmp_path / "out").exists()
        return
    assert (result.code, result.err) == (0, "")
    dtype = "uint32" if manifest.dtype == "uint32" and to == "olmo" else None  # nothing in such a file says it
    for split in ("train", "val"):
        back = open_split(tmp_path / "out", split, dtype)
        assert np.array_equal(np.concatenate(back.files), ids_of(source, split))
        if to in ("megatron", "datatrove"):
            assert back.document_ends is not None
            wanted = document_ends(open_split(source, split))
            assert [ends.tolist() for ends in back.document_ends] == [ends.tolist() for ends in wanted]
    assert not np.array_equal(ids_of(source), ids_of(source, "val"))  # control
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (facts["tokenizer"], facts["dtype"]) == (manifest.tokenizer, manifest.dtype)
    assert list(verify.verify(source)) == []


@pytest.mark.parametrize("to", ["nanogpt", "megatron", "datatrove", "olmo"])
def test_the_payload_is_linked_not_copied(run: Callable[..., Result], tmp_path: Path, to: str) -> None:
    folder = make(tmp_path / "data", texts(9))
    ours = (folder / "train.bin").stat()
    for copy in (False, True):
        out = tmp_path / f"out{copy}"
        result = run(export, folder, "--to", to, "-o", out, *(["--copy"] if copy else []))
        [payload] = [path for path in out.iterdir() if path.stem == "train" and path.suffix in (".bin", ".ds", ".npy")]
        assert (payload.stat().st_ino == ours.st_ino) is not copy
        assert payload.read_bytes() == (folder / "train.bin").read_bytes()
        assert ("0.0 MB copied" in result.out) is not copy or ours.st_size < 50_000
        assert ("do not write into them" in result.out) is not copy


def test_where_nothing_can_be_linked_it_is_copied(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    folder = make(tmp_path / "data", texts(9))
    assert run(export, folder, "--to", "olmo", "-o", tmp_path / "out").code == 0
    assert np.array_equal(ids_of(tmp_path / "out" / "train.npy"), ids_of(folder))


def test_nanogpt_reads_it(run: Callable[..., Result], tmp_path: Path) -> None:
    """Its reader from its description: a uint16 memmap, slices at random places, targets one further."""
    folder = make(tmp_path / "data", texts(60), texts(9, seed=1), shards=3)
    run(export, folder, "--to", "nanogpt", "-o", tmp_path / "out")
    data, ids = np.memmap(tmp_path / "out" / "train.bin", dtype=np.uint16, mode="r"), ids_of(folder)
    assert len(data) == len(ids)
    for start in np.random.default_rng(0).integers(0, len(data) - 33, 50).tolist():
        assert np.array_equal(data[start : start + 32].astype(np.int64), ids[start : start + 32])
        assert np.array_equal(data[start + 1 : start + 33].astype(np.int64), ids[start + 1 : start + 33])
    assert not np.array_equal(data[:32], ids[1:33])  # control


@pytest.mark.parametrize("eot", ["after", "before"])
def test_llmc_reads_it(run: Callable[..., Result], source: Path, tmp_path: Path, eot: str) -> None:
    """Header and ids by struct, as its loaders do: magic, version, count; the count is that of the file."""
    run(export, source, "--to", "llmc", "-o", tmp_path / "tokens", "--eot", eot)
    manifest = read_manifest(source)
    magic, version, kind, size = {"uint16": (20240520, 1, "H", 2), "uint32": (20240801, 7, "I", 4)}[manifest.dtype]
    shards = [info for info in manifest.files if info.split == "train"]
    names = [f"tokens_train_{number + 1:06d}.bin" for number in range(len(shards))]
    assert sorted(path.name for path in (tmp_path / "tokens").glob("*.bin")) == [*names, "tokens_val_000000.bin"]
    for name, info in zip(names, shards, strict=True):
        content = (tmp_path / "tokens" / name).read_bytes()
        header = struct.unpack("<256i", content[:1024])
        assert header == (magic, version, info.tokens, *[0] * 253)
        assert len(content) == 1024 + header[2] * size
        read = list(struct.unpack(f"<{header[2]}{kind}", content[1024:]))
        ours = open_split(source / info.path, "train").files[0].tolist()
        if eot == "before":
            assert read[0] == manifest.tokenizer["eot_id"]
            assert read != ours  # control
            read = [*read[1:], read[0]]
        assert read == ours


def test_llmc_shards_are_cut_between_documents() -> None:
    ends = np.array([4, 5, 9, 20, 21])
    assert list(cut(ends, 21, 100)) == [(0, 21)]
    assert list(cut(ends, 21, 9)) == [(0, 9), (9, 18), (18, 21)]  # a document that is longer alone
    assert list(cut(ends, 21, 12)) == [(0, 9), (9, 21)]
    assert list(cut(ends, 21, 5)) == [(0, 5), (5, 9), (9, 14), (14, 19), (19, 21)]


def test_megatron_reads_it(run: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    """An index as its own reader takes it apart: magic, version, dtype, two counts, lengths, pointers, boundaries."""
    run(export, source, "--to", "megatron", "-o", tmp_path / "out")
    read: list[list[int]] = []
    for index in sorted((tmp_path / "out").glob("train*.idx")):
        content, payload = index.read_bytes(), index.with_suffix(".bin").read_bytes()
        magic, version, code, sequences, boundaries = struct.unpack_from("<9sQBQQ", content)
        assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
        dtype = {8: np.uint16, 4: np.int32}[code]
        lengths = np.frombuffer(content, np.int32, sequences, 34)
        pointers = np.frombuffer(content, np.int64, sequences, 34 + lengths.nbytes)
        documents = np.frombuffer(content, np.int64, boundaries, 34 + lengths.nbytes + pointers.nbytes)
        assert 34 + lengths.nbytes + pointers.nbytes + documents.nbytes == len(content)
        assert documents.tolist() == list(range(sequences + 1))
        read += [
            np.frombuffer(payload, dtype, int(length), int(pointer)).tolist()
            for length, pointer in zip(lengths, pointers, strict=True)
        ]
    split = open_split(source, "train")
    ours = [
        own.tolist() for ids, ends in zip(split.files, document_ends(split), strict=True) for own in np.split(ids, ends[:-1])
    ]
    assert read == ours
    assert read != ours[1:] + ours[:1]  # control


def test_megatrons_own_class_reads_it(run: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses libraries that nobody needs for this
        theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    run(export, source, "--to", "megatron", "-o", tmp_path / "out")
    for info in read_manifest(source).files:
        shard = open_split(source / info.path, info.split)
        read = theirs.IndexedDataset(str(tmp_path / "out" / Path(info.path).stem))
        [ids], [ends] = shard.files, document_ends(shard)
        assert len(read) == info.documents == len(read.document_indices) - 1
        for number, own in enumerate(np.split(ids, ends[:-1])):
            assert np.array_equal(read[number], own)


def test_datatroves_own_class_reads_it(run: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datatrove.utils.dataset")
    run(export, source, "--to", "datatrove", "-o", tmp_path / "out")
    size = np.dtype(read_manifest(source).dtype).itemsize
    for info in (info for info in read_manifest(source).files if info.split == "train"):
        shard = open_split(source / info.path, "train")
        path = tmp_path / "out" / f"{Path(info.path).stem}.ds"
        theirs = datasets.DatatroveFileDataset(str(path), seq_len=15, token_size=size, return_positions=True)
        [ours], [ends] = shard.files, document_ends(shard)
        begins = np.concatenate(([0], ends))
        assert len(theirs) == info.tokens // 16
        for item in range(len(theirs)):
            window = np.arange(16 * item, 16 * item + 16)
            assert np.array_equal(theirs[item]["input_ids"].numpy(), ours[window])
            since = window - begins[np.searchsorted(begins, window, side="right") - 1]
            expected = np.minimum(since, np.arange(16))  # a document that goes on begins anew in a window
            assert np.array_equal(theirs[item]["positions"].numpy(), expected)


def test_datatroves_files_are_as_its_writer_leaves_them(run: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    run(export, source, "--to", "datatrove", "-o", tmp_path / "out")
    manifest = read_manifest(source)
    for info in manifest.files:
        base = tmp_path / "out" / f"{Path(info.path).stem}.ds"
        ends = struct.unpack(f"<{info.documents}Q", base.with_name(base.name + ".index").read_bytes())
        ids = np.fromfile(base, dtype=manifest.dtype)
        assert list(ends) == (np.flatnonzero(ids == manifest.tokenizer["eot_id"]) + 1).tolist()
        first, count, _ = base.with_name(base.name + ".metadata").read_text().splitlines()
        assert (first, count) == (f"{manifest.tokenizer['name']}|{ids.itemsize}", str(info.tokens))


def test_a_dataset_without_an_index_is_exported_by_its_end_of_text_ids(run: Callable[..., Result], tmp_path: Path) -> None:
    folders = [make(tmp_path / f"data{index}", texts(30), index=index) for index in (False, True)]
    assert open_split(folders[0], "train").document_ends is None
    for folder in folders:
        assert run(export, folder, "--to", "megatron", "-o", folder.with_suffix(".out")).code == 0
    one, other = (folder.with_suffix(".out") / "train.idx" for folder in folders)
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["HERE/data"], "name one dataset, a format and a place"),
        (["HERE/data", "--to", "olmo"], "name one dataset, a format and a place"),
        (["HERE/data", "HERE/data", "--to", "olmo", "-o", "HERE/x"], "name one dataset, a format and a place"),
        (["HERE/data", "--to", "parquet", "-o", "HERE/x"], "to: expected nanogpt | llmc | megatron | datatrove | olmo or null"),
        (["HERE/data", "--to", "olmo", "-o", "HERE/data"], "is there already; give another name, or delete it first"),
        (["HERE/data", "--to", "olmo", "-o", "HERE/file"], "is there already; give another name, or delete it first"),
        (["HERE/data", "--to", "olmo", "--eot", "before", "-o", "HERE/x"], "eot: olmo has its end-of-text ids where this"),
        (["HERE/torn", "--to", "olmo", "-o", "HERE/x"], "train.bin was changed after it was written"),
        (["HERE/none", "--to", "olmo", "-o", "HERE/x"], "is not a token dataset"),
    ],
)
def test_exports_that_cannot_be(run: Callable[..., Result], tmp_path: Path, words: list[str], message: str) -> None:
    make(tmp_path / "data", texts(4))
    torn = make(tmp_path / "torn", texts(4)) / "train.bin"
    torn.write_bytes(torn.read_bytes()[::-1])
    (tmp_path / "file").write_text("")
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run(export, *(word.replace("HERE", str(tmp_path)) for word in words))
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert message in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# ----------------------------------------------------------------------------------------------------------------- merge


def test_without_weights_everything_comes_in_order(run: Callable[..., Result], tmp_path: Path) -> None:
    a = make(tmp_path / "a", texts(30), texts(5, seed=1), shards=2)
    b = make(tmp_path / "b", texts(20, seed=2), texts(4, seed=3), index=False)
    result = run(merge, a, b, "-o", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    out = tmp_path / "out"
    assert documents_of(out, "train") == texts(30) + texts(20, seed=2)
    assert documents_of(out, "val") == texts(5, seed=1) + texts(4, seed=3)
    train = open_split(out, "train")
    assert train.utf8_bytes == sum(len(text.encode()) for text in texts(30) + texts(20, seed=2))
    assert train.document_ends is not None
    assert list(verify.verify(out)) == []
    fingerprints = [entry["fingerprint"] for entry in read_manifest(out).prep["merged"]]
    assert fingerprints == [read_manifest(a).fingerprint, read_manifest(b).fingerprint]
    run(merge, b, a, "-o", tmp_path / "other")
    assert documents_of(tmp_path / "other", "train") == texts(20, seed=2) + texts(30)  # control: the order is the one given
    run(merge, a, b, "-o", tmp_path / "again")
    assert (tmp_path / "again" / "train.bin").read_bytes() == (out / "train.bin").read_bytes()


def test_with_weights_every_prefix_has_its_shares(run: Callable[..., Result], tmp_path: Path) -> None:
    shares = {"0": 0.6, "1": 0.3, "2": 0.1}
    folders = [make(tmp_path / name, texts(300, seed=int(name)), tokenizer=bpe()) for name in shares]
    result = run(merge, *folders, "-o", tmp_path / "out", "--weights", "0.6,0.3,0.1")
    assert result.code == 0
    assert "documents do not fit the weights" in result.out
    documents = documents_of(tmp_path / "out", "train", bpe())
    for name in shares:  # each dataset's documents in their order, from the first on
        own = [text for text in documents if text.startswith(f"{name}.")]
        assert own == texts(300, seed=int(name))[: len(own)]
    sizes = np.array([bpe().encode_document(text).size for text in documents])
    longest = max(ids.size for seed in range(3) for ids in map(bpe().encode_document, texts(300, seed=seed)))
    for name, share in shares.items():
        own = np.cumsum(np.where([text.startswith(f"{name}.") for text in documents], sizes, 0))
        assert np.abs(own - share * np.cumsum(sizes)).max() <= 2 * longest
    assert len([text for text in documents if text.startswith("0.")]) == 300  # it ran out first, and whole
    train = open_split(tmp_path / "out", "train")
    assert train.utf8_bytes == sum(len(text.encode()) for text in documents)
    assert list(verify.verify(tmp_path / "out")) == []
    run(merge, *folders, "-o", tmp_path / "again", "--weights", "6,3,1")
    assert (tmp_path / "again" / "train.bin").read_bytes() == (tmp_path / "out" / "train.bin").read_bytes()
    run(merge, *folders, "-o", tmp_path / "other", "--weights", "0.5,0.4,0.1")
    assert (tmp_path / "other" / "train.bin").read_bytes() != (tmp_path / "out" / "train.bin").read_bytes()  # control


def test_no_document_is_in_both_splits(run: Callable[..., Result], tmp_path: Path) -> None:
    shared, other = texts(6, seed=5), texts(30)
    a = make(tmp_path / "a", [*other, *shared[:3]], texts(4, seed=1))
    b = make(tmp_path / "b", [*texts(20, seed=2), texts(4, seed=1)[2]], shared)
    result = run(merge, a, b, "-o", tmp_path / "out")
    assert "4 documents left out that are held out elsewhere" in result.out
    train, val = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    assert not set(train) & set(val)
    assert train == [*other, *texts(20, seed=2)]
    assert val == [*texts(4, seed=1), *shared]
    assert open_split(tmp_path / "out", "train").utf8_bytes == sum(len(text.encode()) for text in train)
    assert set(documents_of(a, "train")) & set(documents_of(b, "val"))  # control: joined blindly, there would be some
    assert list(verify.verify(tmp_path / "out")) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["HERE/a", "HERE/c", "-o", "HERE/x"],
            "HERE/c: was made with tokenizer small, HERE/a with bytes; make it again with the same: "
            "python -m prep.tokenize SRC... --tokenizer HERE/a/tokenizer",
        ),
        (["HERE/a", "HERE/b"], "where to? add -o DIR, for example -o data/all"),
        (["HERE/a", "HERE/b", "-o", "HERE/x", "--weights", "0.5"], "weights: expected 2 positive numbers, one per dataset"),
        (["HERE/a", "HERE/b", "-o", "HERE/x", "--weights", "1,0"], "weights: expected 2 positive numbers"),
        (["HERE/a", "HERE/b", "-o", "HERE/x", "--weights", "much,more"], "weights: expected numbers such as 0.7,0.3, got much"),
        (["HERE/a", "HERE/a", "-o", "HERE/x"], "a dataset stands twice; name each once"),
        (["HERE/a", "HERE/b", "-o", "HERE/b"], "is there already"),
        (["HERE/a", "HERE/none", "-o", "HERE/x"], "is not a token dataset"),
        (["HERE/a", "HERE/d", "-o", "HERE/x"], "no document is left for the train split"),
    ],
)  # fmt: skip
def test_merges_that_cannot_be(run: Callable[..., Result], tmp_path: Path, words: list[str], message: str) -> None:
    make(tmp_path / "a", ["same"])
    make(tmp_path / "b", texts(4, seed=1))
    make(tmp_path / "c", texts(4), tokenizer=bpe())
    make(tmp_path / "d", ["same"], ["same"])
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run(merge, *(word.replace("HERE", str(tmp_path)) for word in words))
    assert (result.code, result.out) == (2, "")
    assert message.replace("HERE", str(tmp_path)) in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_merge_that_is_killed_leaves_nothing_under_the_name(run: Callable[..., Result], tmp_path: Path) -> None:
    a, b = (make(tmp_path / name, texts(1, seed=seed, words=5) * 60_000) for seed, name in enumerate("ab"))
    killed = 0
    for _ in range(4):
        process = subprocess.Popen(tool("merge", a, b, "-o", tmp_path / "out"), cwd=REPO, env=environment())
        while process.poll() is None and not list(tmp_path.glob(".out.building-*/.train.bin.tmp")):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += process.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists() or process.returncode == 0
    assert killed >= 3
    left = list(tmp_path.glob(".out.building-*"))
    assert len(left) == 1  # each run sweeps what the one before it left
    assert run(merge, a, b, "-o", tmp_path / "out").code == 0
    assert list(tmp_path.glob(".out.*")) == []
    assert list(verify.verify(tmp_path / "out")) == []
    assert open_split(tmp_path / "out", "train").documents == 120_000


# -------------------------------------------------------------------------------------------------------------- describe


def test_describe_counts_what_is_there(run: Callable[..., Result], tmp_path: Path) -> None:
    train, val = texts(50), texts(9, seed=1)
    folder = make(tmp_path / "data", train, val, bpe(), shards=2)
    result = run(describe, folder, "--json", "--top", 3, "--samples", 2)
    assert (result.code, result.err) == (0, "")
    splits = json.loads(result.out)["splits"]
    assert list(splits) == ["train", "val"]
    for found, documents in ((splits["train"], train), (splits["val"], val)):
        lengths = [bpe().encode_document(text).size for text in documents]
        ids = np.concatenate([bpe().encode_document(text) for text in documents])
        assert (found["tokens"], found["documents"], found["bytes"]) == (ids.size, len(documents), 2 * ids.size)
        assert found["utf8_bytes"] == found["decoded_bytes"] == sum(len(text.encode()) for text in documents)
        assert found["bytes_per_token"] == found["utf8_bytes"] / ids.size
        assert (found["lengths"]["shortest"], found["lengths"]["longest"]) == (min(lengths), max(lengths))
        assert sum(row["documents"] for row in found["histogram"]) == len(documents)
        for row in found["histogram"]:
            assert row["documents"] == sum(row["from"] <= length < row["below"] for length in lengths)
        counts = np.bincount(ids)
        assert [row["count"] for row in found["top"]] == sorted(counts.tolist(), reverse=True)[:3]
        assert all(counts[row["id"]] == row["count"] for row in found["top"])
        assert found["eot"] == "every document ends with id 264"
        assert found["samples"][0] == {"document": 0, "text": bpe().decode(bpe().encode(documents[0])[:200].tolist())}


def test_describe_for_people(run: Callable[..., Result], tmp_path: Path) -> None:
    folder = make(tmp_path / "data", ["ab", "abcd\n", "x" * 100], ["abc"])
    result = run(describe, folder)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == f"{folder}: tokenizer bytes, 257 ids"
    assert "train: 110 tokens in 3 documents, 0.973 bytes/token" in lines
    assert "  every document ends with id 256" in lines
    assert "  tokens per document: shortest 3, 10% 3, median 6, 90% 6, longest 101, mean 37" in lines
    bars = [line for line in lines if "█" in line][:3]
    assert [line.split() for line in bars] == [["2", "█" * 40, "1"], ["4", "█" * 40, "1"], ["64", "█" * 40, "1"]]
    assert r'  document 1: "abcd\n"' in lines
    assert "           120  90.91%  'x'" in lines


def test_describe_what_others_wrote(run: Callable[..., Result], tmp_path: Path) -> None:
    folder = make(tmp_path / "data", texts(50), texts(9, seed=1))
    for to in FORMATS:
        run(export, folder, "--to", to, "-o", tmp_path / to)
        result = run(describe, tmp_path / to, "--tokenizer", "bytes", "--json")
        splits = json.loads(result.out)["splits"]
        assert [(name, own["documents"], own["eot"]) for name, own in splits.items()] == [
            ("train", 50, "every document ends with id 256"),
            ("val", 9, "every document ends with id 256"),
        ]
    bare = tmp_path / "nanogpt" / "train.bin"
    for gone, tokenizer, documents in [
        (None, "tokenizer bytes, 257 ids", "50"),
        (folder, "no tokenizer: add --tokenizer NAME", "50"),
        (tmp_path / "nanogpt" / "export.json", "no tokenizer: add --tokenizer NAME", "?"),
    ]:
        if gone is not None:
            gone.rename(tmp_path / f"gone-{gone.name}")
        result = run(describe, bare)
        assert result.out.startswith(f"{bare}: {tokenizer}\n")
        assert f"tokens in {documents} documents" in result.out


def test_describe_draws_into_no_dataset(run: Callable[..., Result], tmp_path: Path) -> None:
    folder = make(tmp_path / "data", texts(5))
    result = run(describe, folder, "--png", folder / "x.png")
    assert result.code == 2
    assert "would lie in a dataset, in which prep.tokenize wants nothing else" in result.err
    assert not (folder / "x.png").exists()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 256, 3, 256], "every document ends with id 256"),
        ([1, 2, 256, 3], "WRONG: the last document has no end-of-text id"),
        ([256, 1, 2, 256, 3], "documents begin with the end-of-text id"),
        ([1, 2, 3], "WRONG: no end-of-text id: a model will not learn where a text ends"),
    ],
)
def test_describe_looks_for_the_ends_of_texts(run: Callable[..., Result], tmp_path: Path, ids: list[int], message: str) -> None:
    np.array(ids, dtype="<u2").tofile(tmp_path / "x.bin")
    assert message in run(describe, tmp_path / "x.bin", "--tokenizer", "bytes").out


def test_describe_draws(run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    folder = make(tmp_path / "d$_a$ta", texts(50), texts(9, seed=1))
    sizes = []
    for name, source in (("one.png", folder), ("two.png", make(tmp_path / "only", ["x"]))):
        assert run(describe, source, "--png", tmp_path / name).out.endswith(f"drawn: {tmp_path / name}\n")
        content = (tmp_path / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        sizes.append(struct.unpack(">II", content[16:24]))
    assert sizes == [(1200, 930), (1200, 540)]
    np.arange(9, dtype="<u2").tofile(tmp_path / "x.bin")
    assert "where documents end is not known" in run(describe, tmp_path / "x.bin", "--png", tmp_path / "x.png").err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(describe, folder, "--png", tmp_path / "three.png")
    assert (result.code, result.err) == (2, "error: --png needs matplotlib: pip install 'accel_pretrain[plot]'\n")


def test_describe_what_is_not_there(run: Callable[..., Result], tmp_path: Path) -> None:
    for words, message in (
        ([tmp_path / "none"], "does not exist"),
        ([tmp_path, tmp_path], "name one dataset"),
        ([tmp_path, "--top", "-1"], "samples and top: 0 or more"),
        ([tmp_path, "--dtype", "int8"], "dtype: uint16 or uint32, got int8"),
    ):
        result = run(describe, *words)
        assert (result.code, message in result.err, "Traceback" in result.err) == (2, True, False)


# ---------------------------------------------------------------------------------------------------------------- in all


@pytest.mark.parametrize("name", ["verify", "describe", "export", "merge"])
def test_help(run: Callable[..., Result], name: str) -> None:
    module = {"verify": verify, "describe": describe, "export": export, "merge": merge}[name]
    result = run(module, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"usage: python -m prep.{name} ")
    assert run(module).code == 2
    assert "there is no such key" in run(module, "x", "--colour", "red").err


def test_the_tools_are_happy_with_what_prep_writes(run: Callable[..., Result], tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(texts(30)[number])
    for name, words in (("a", ()), ("b", ("--val", "20%"))):
        command = tool("tokenize", *sorted(tmp_path.glob("*.txt")), "-o", tmp_path / name, "--tokenizer", "bytes", *words)
        done = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert run(verify, tmp_path / "a", tmp_path / "b").code == 0
    assert run(merge, tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c").code == 0
    assert run(verify, tmp_path / "c").code == 0
    assert run(describe, tmp_path / "c").code == 0


def test_ends_are_found_in_any_block() -> None:
    ids = np.zeros((1 << 22) * 2 + 5, dtype=np.uint16)
    places = [0, (1 << 22) - 1, 1 << 22, ids.size - 1]
    ids[places] = 7
    assert ends_of(ids, 7).tolist() == [place + 1 for place in places]
