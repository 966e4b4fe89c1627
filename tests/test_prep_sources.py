"""Where text comes from: packed files, tables, standard input, folders of ``datasets``, streams. Each as it comes."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_pretrain.errors import DataError
from accel_pretrain.tokenizer import GPT2_PATTERN
from prep.columns import ArrowRows, ParquetRows
from prep.config import PrepConfig
from prep.documents import CHUNK, Document, Piece, Tally, within
from prep.normal import key_of, key_of_chunks
from prep.packed_files import unpacked
from prep.readers import _WORD_CUT, JsonLines, SeparatedText, WholeText
from prep.sources import find_sources
from prep.split import TRAIN
from tests.test_prep import (  # noqa: F401 (a fixture)
    ROOT,
    Result,
    assert_same_files,
    documents_of,
    prep,
    stories,
    write_folder,
    write_jsonl,
)

Prep = Callable[..., Result]
zstandard = pytest.importorskip("zstandard")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def trained_on(prep: Prep, tmp_path: Path, *words: object) -> list[str]:  # noqa: F811
    """The documents of a dataset that was made of these sources and options, all in the train split."""
    result = prep(*words, "-o", tmp_path / "out", "--val", "0", "--overwrite")
    assert result.code == 0, result.err
    return documents_of(tmp_path / "out", TRAIN)


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, texts: Sequence[str | None], rows: int = 10, **columns: list[Any]) -> Path:
    pq.write_table(pa.table({"n": list(range(len(texts))), "text": list(texts), **columns}), path, row_group_size=rows)
    return path


# --------------------------------------------------------------------------------------------------------- packed files


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files(prep: Prep, tmp_path: Path, suffix: str) -> None:  # noqa: F811
    texts = stories(60)
    pack, folder = PACKERS[suffix], tmp_path / "in"
    folder.mkdir()
    (folder / f"a.jsonl{suffix}").write_bytes(pack(jsonl(texts[:20])) + pack(jsonl(texts[20:40])))  # two streams in one
    (folder / f"b.txt{suffix}").write_bytes(pack(b"\xef\xbb\xbf" + texts[40].encode() + b"\r\n"))
    (folder / f"c.md{suffix}").write_bytes(pack("\n--\n".join(texts[41:]).encode()))
    found = trained_on(prep, tmp_path, folder, "--doc_sep", r"\n--\n")
    assert found == [*texts[:41], *texts[41:]]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_unpacking_does_not_depend_on_how_the_bytes_arrive(suffix: str, size: int) -> None:
    text = random.Random(0).randbytes(3000) + bytes(5000)
    packed = PACKERS[suffix](text) * 2
    assert b"".join(unpacked((packed[at : at + size] for at in range(0, len(packed), size)), suffix)) == text * 2


@pytest.mark.parametrize("suffix", PACKERS)
def test_unpacking_holds_little(suffix: str) -> None:
    """However much a few bytes expand to, it comes out in parts."""
    packed = PACKERS[suffix](bytes(200_000_000))
    assert len(packed) < 300_000
    assert max(map(len, unpacked([packed], suffix))) <= 40 * CHUNK


# --------------------------------------------------------------------------------------------------------------- tables


def test_parquet(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    texts = [*stories(95), "café ☕\r\nx"]
    write_parquet(tmp_path / "a.parquet", texts)
    pieces = list(ParquetRows("text").pieces(str(tmp_path / "a.parquet"), 0, 100))
    assert [(piece.start, piece.stop) for piece in pieces] == [(n, n + 1) for n in range(10)]
    assert sum(piece.size for piece in pieces) == pytest.approx(sum(len(str(text)) + 4 for text in texts), rel=0.5)
    assert trained_on(prep, tmp_path, tmp_path / "a.parquet") == [*texts[:-1], "café ☕\nx"]


@pytest.mark.parametrize("kind", ["large_string", "binary", "dictionary", "string_view"])
def test_kinds_of_text_columns(tmp_path: Path, kind: str) -> None:
    texts = [*stories(5), "é"]
    column = pa.array([text.encode() for text in texts]) if kind == "binary" else pa.array(texts)
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind != "binary":
        column = column.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (source,) = find_sources([str(tmp_path / "a.parquet")], PrepConfig())
    found = [item for piece in source.files[0].reader.pieces(str(tmp_path / "a.parquet"), 0, 9) for item in piece.documents()]
    assert [item.text for item in found if isinstance(item, Document)] == texts


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
def test_separated_values(prep: Prep, tmp_path: Path, suffix: str, delimiter: str) -> None:  # noqa: F811
    texts = [*stories(20), 'quoted "words", a comma\nand a line end', "ünï\t,"]
    lines = io.StringIO()
    csv.writer(lines, delimiter=delimiter).writerows([["id", "text"], *([n, text] for n, text in enumerate(texts))])
    data = b"\xef\xbb\xbf" + lines.getvalue().encode()
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    assert trained_on(prep, tmp_path, tmp_path / f"a{suffix}") == texts


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"body": ["x"]}, "no column 'text'; choose with --text_column NAME, one of: n (int64), body (string)"),
        ({"text": [7]}, "column 'text' holds int64, not text; choose with --text_column NAME, one of: n (int64), text (int64)"),
        ({"text": [["a"]]}, "column 'text' holds list<"),
        ({"blob_id": ["x"], "score": [1.0]}, "no column 'text', and no other text: column 'blob_id' names contents that are "
         "kept elsewhere (Software Heritage), which must be fetched first; the columns are n (int64), blob_id ("),
    ],
)  # fmt: skip
def test_a_column_that_is_not_there(prep: Prep, tmp_path: Path, columns: dict[str, list[Any]], says: str) -> None:  # noqa: F811
    """Also with --on_error skip: it is the request that is wrong."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1], **columns}), path)
    result = prep(path, "-o", tmp_path / "out", "--on_error", "skip")
    assert result.code == 2
    assert result.err.startswith(f"error: {path}: {says}")
    assert result.err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------- standard input


@pytest.mark.parametrize("pack", [None, gzip.compress])
def test_standard_input(tmp_path: Path, pack: Callable[[bytes], bytes] | None) -> None:
    texts = stories(30)
    data = jsonl(texts)
    words = [sys.executable, "-m", "prep.tokenize", "-", "-o", tmp_path / "out", "--format", "jsonl", "--tokenizer", "bytes"]
    words += ["--val", "0", "--workers", "2", "--unit_bytes", "1000"]
    spool = tmp_path / "spool"
    spool.mkdir()
    environment = os.environ | {"TMPDIR": str(spool)}
    data = pack(data) if pack else data
    subprocess.run(words, input=data, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert documents_of(tmp_path / "out", TRAIN) == texts
    assert not os.listdir(spool), "the copy of the input is gone"


# --------------------------------------------------------------------------------------------------- pieces and options


def test_limit_takes_pieces_from_the_front(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    path = write_jsonl(tmp_path / "in.jsonl", stories(200))
    found = trained_on(prep, tmp_path, path, "--limit", "10K", "--unit_bytes", "1000")
    assert found == stories(200)[: len(found)]
    assert 9000 < sum(map(len, found)) < 12_000
    long = tmp_path / "in.txt"
    long.write_text("\n".join(stories(200)))
    (found,) = trained_on(prep, tmp_path, long, "--limit", "10K", "--unit_bytes", "1000")
    assert 9000 < len(found) < 12_000
    assert prep(path, "-o", tmp_path / "x", "--limit", "many").err.startswith("error: limit: expected a number, such as 100M")


def test_a_limit_ends_a_long_document() -> None:
    reader = WholeText()
    pieces = [Piece("a", at, at + 10, reader, digest=1, ends=at == 40) for at in range(0, 50, 10)]
    assert [piece.ends for piece in within(pieces, 25)] == [False, False, True]
    assert [piece.ends for piece in within(pieces, None)] == [False] * 4 + [True]


READERS = [JsonLines("text"), SeparatedText("\n--\n"), WholeText(), ParquetRows("text"), ArrowRows("text")]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: type(reader).__name__)
def test_the_identity_of_a_piece_is_what_reading_it_finds(tmp_path: Path, reader: Any) -> None:
    """And it changes with the content; the documents know where they begin."""
    path = tmp_path / "in"

    def write(texts: list[str]) -> None:
        if isinstance(reader, ParquetRows):
            write_parquet(path, texts)
        elif isinstance(reader, ArrowRows):
            with pa.ipc.new_stream(path, pa.schema({"text": pa.string()})) as stream:
                stream.write_table(pa.table({"text": texts}))
        else:
            path.write_bytes(jsonl(texts) if isinstance(reader, JsonLines) else "\n--\n".join(texts).encode())

    write(stories(40))
    pieces = list(reader.pieces(str(path), path.stat().st_size, 1500))
    tallies = [Tally() for _ in pieces]
    for piece, tally in zip(pieces, tallies, strict=True):
        assert list(piece.documents(tally))
    identities = [piece.identity() for piece in pieces]
    assert [tally.content.digest() for tally in tallies] == identities
    assert len(set(identities)) == len(pieces) > 2
    places = {JsonLines: "3", ParquetRows: "row 3", ArrowRows: "row 3", SeparatedText: "5", WholeText: "1"}
    assert pieces[0].place_of(0 if isinstance(reader, WholeText) else 2) == places[type(reader)]
    os.utime(path, ns=(1, 1))
    write([text.replace("Story", "STORY") for text in stories(40)])
    assert not set(identities) & {piece.identity() for piece in pieces}


def test_identity_changes_with_the_options(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", stories(5))

    def identity(**options: Any) -> bytes:
        (source,) = find_sources([str(path)], PrepConfig(**options))
        (piece,) = source.files[0].reader.pieces(str(path), path.stat().st_size, 10**6)
        return piece.identity()

    assert identity() == identity()
    choices = [{}, {"text_column": "id"}, {"clean": "web"}, {"clean": "code"}, {"min_chars": 5}, {"max_document": 10}]
    assert len({identity(**choice) for choice in choices}) == len(choices)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*"aZ1.!/'s é中。", " ", " ", "  ", "'s"]), max_size=40).map("".join))
def test_cuts_of_a_text_without_line_ends_are_safe(text: str) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" a": 256, b"aa": 257, b"  ": 258, b"'s": 259, b"a ": 260}
    encoding = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    cuts = [match.end() for match in _WORD_CUT.finditer(text.encode())]
    parts = [text.encode()[start:stop].decode() for start, stop in itertools.pairwise([0, *cuts, len(text.encode())])]
    assert [id for part in parts for id in encoding.encode_ordinary(part)] == encoding.encode_ordinary(text)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*"ab é\u0301\n\t\r中\u1100\u1161", "e", "  "]), max_size=30).map("".join), st.integers(1, 9))
def test_the_key_of_a_long_text_is_that_of_the_whole(text: str, size: int) -> None:
    data = text.encode()
    key = key_of_chunks(data[at : at + size] for at in range(0, len(data), size))
    assert key == key_of(data)
    assert key_of(data + b"x") != key


def test_keys_look_through_white_space_and_unicode_forms() -> None:
    assert key_of("caf\u00e9  au\r\nlait \n".encode()) == key_of("cafe\u0301 au lait".encode())
    assert key_of(b"a b") != key_of(b"ab") != key_of(b"Ab")


def test_unknown_source_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; name a text file"):
        find_sources([str(tmp_path / "none.txt")], PrepConfig())


# ----------------------------------------------------------------------------------------------------------------- dedup


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_of_equal_documents_stays(prep: Prep, tmp_path: Path, workers: int) -> None:  # noqa: F811
    texts = stories(100)
    twice = [texts[7].replace(" ", "  "), texts[8] + "\r\n", *texts[:50]]
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "b.jsonl", twice)
    sources = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    words = ("-o", tmp_path / "out", "--val", "0", "--overwrite", "--unit_bytes", "2000", "--workers", workers)
    assert prep(*sources, *words, "--dedup", "exact").code == 0
    assert documents_of(tmp_path / "out", TRAIN) == texts
    assert prep(*sources[::-1], *words, "--dedup", "exact").code == 0
    assert documents_of(tmp_path / "out", TRAIN)[:2] == [twice[0], texts[8] + "\n"]
    assert prep(*sources, *words).code == 0
    assert len(documents_of(tmp_path / "out", TRAIN)) == 152


def test_long_documents_that_are_cut_are_compared_whole(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    one, other = "\n".join(stories(100)), "\n".join([*stories(99), "another end"])
    folder = write_folder(tmp_path / "in", [one, other, one.replace("\n", "\r\n")])
    words = (folder, "-o", tmp_path / "out", "--val", "0", "--dedup", "exact", "--unit_bytes", "1000")
    result = prep(*words)
    assert result.code == 0, result.err
    assert documents_of(tmp_path / "out", TRAIN) == [one, other]


# ------------------------------------------------------------------------------------------------- what is not installed


@pytest.mark.parametrize(
    ("name", "package", "says"),
    [
        ("a.parquet", "pyarrow", "{}: reading it needs pyarrow: pip install 'accel_pretrain[data]'"),
        ("a.txt.zst", "zstandard", "reading .zst files needs zstandard: pip install 'accel_pretrain[data]'"),
        ("hf:someone/something", "datasets", "hf: sources need datasets: pip install 'accel_pretrain[data]'"),
    ],
)
def test_an_extra_that_is_missing(tmp_path: Path, name: str, package: str, says: str) -> None:
    path = name if name.startswith("hf:") else str(tmp_path / name)
    if not name.startswith("hf:"):
        Path(path).write_bytes(zstandard.compress(b"text"))
    code = "import sys; sys.modules[sys.argv.pop(1)] = None; from prep.tokenize import main; main()"
    words = [package, path, "-o", str(tmp_path / "out"), "--tokenizer", "bytes"]
    result = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (2, f"error: {says.format(path)}\n")


def test_importing_it_imports_no_extra() -> None:
    code = "import prep.tokenize, sys; assert not {'torch', 'datasets', 'pyarrow', 'zstandard', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
