"""Whatever is wrong with the input, a run ends in one line that names the file and the place, or leaves out and counts.

The tables hold, for each file: its name, how it is made, and how the line about it begins behind the folder's name.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from prep.config import PrepConfig
from prep.sources import find_sources
from prep.split import TRAIN
from tests.running import first_and_slow
from tests.test_prep import ROOT, SKIP, Result, documents_of, manifest_of, prep, ranks, stories, write_jsonl  # noqa: F401

Prep = Callable[..., Result]
Make = Callable[[Path], object]
zstandard = pytest.importorskip("zstandard")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def holds(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


RANDOM = random.Random(7)
LONG = lines(*(f"{n} {RANDOM.randbytes(200).hex()}" for n in range(2000)))


def cut(pack: Callable[[bytes], bytes]) -> Make:
    return lambda path: path.write_bytes(pack(LONG)[:-40])


def flipped(pack: Callable[[bytes], bytes]) -> Make:
    def make(path: Path) -> None:
        data = bytearray(pack(LONG))
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)

    return make


def parquet(path: Path) -> bytes:
    texts = random.Random(8)
    table = pa.table({"text": [texts.randbytes(200).hex() for _ in range(500)]})
    pq.write_table(table, path, row_group_size=100, compression="snappy", write_page_checksum=True, use_dictionary=False)
    return path.read_bytes()


def damaged_parquet(path: Path) -> None:
    data = bytearray(parquet(path))
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def arrow(path: Path) -> None:
    with pa.ipc.new_stream(path, pa.schema({"text": pa.string()})) as stream:
        stream.write_table(pa.table({"text": ["a" * 100] * 100}))
    path.write_bytes(path.read_bytes()[:3000])


def nulls(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([None, "good"])}), path)


def not_utf8(path: Path) -> None:
    pq.write_table(pa.table({"text": [b"good", b"b\xffd"]}), path)


# What a run with --on_error fail says, and how many documents one with skip finds in the file (None: not looked at).
CONTENT: list[tuple[str, Make, str, int | None]] = [
    ("latin1.txt", holds("une fenêtre\nétroite".encode("latin-1")), ":1: byte 7 (0xea) is not UTF-8; convert it with iconv", 0),
    ("utf16.txt", holds("text".encode("utf-16")), ":1: UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8", 0),
    ("utf16.jsonl", holds('{"text": "a"}'.encode("utf-16-le")), ":1: byte 1 is NUL: binary data or UTF-16, not UTF-8", 0),
    ("nul.md", holds(b"a\nb\nc\0d"), ":3: byte 5 is NUL: binary data", 0),
    ("latin1.txt.gz", holds(gzip.compress(b"a\nb\n\xe9")), ":3: byte 4 (0xe9) is not UTF-8", 0),
    ("json.jsonl.gz", holds(gzip.compress(lines("a", "b") + b"{\n" + lines("c"))), ":3: not valid JSON (Expecting prop", 3),
    ("surrogate.jsonl", holds(lines("a") + b'{"text": "\\udc00"}\n'), ":2: half a surrogate pair in column 'text': not te", 1),
    ("nan.jsonl", holds(b'{"text": NaN}\n' + lines("a")), ":1: column 'text' holds float, not text; choose with --text_c", 1),
    ("twice.jsonl", holds(b'{"text": "a", "text": "b"}\n'), ":1: not valid JSON (the key 'text' stands twice)", 0),
    ("deep.jsonl", holds(b'{"text": "a", "more": ' + b"[" * 10**5 + b"\n"), ":1: not valid JSON (maximum recursion depth", 0),
    ("line.jsonl", holds(lines("a", "x" * 2_000_000, "b")), ":2: a document of more than 1,000,000 bytes; separate", 2),
    ("line.txt", holds(b"a" * 2_000_000), ":1: a document of more than 1,000,000 bytes; separate", 0),
    ("long.txt.gz", holds(gzip.compress(b"a\n" * 10**6)), ":1: a document of more than 1,000,000 bytes; separate", 0),
    ("cut.jsonl.gz", cut(gzip.compress), ":after 8", None),
    ("cut.jsonl.bz2", cut(bz2.compress), ":after ", None),
    ("cut.jsonl.xz", cut(lzma.compress), ":after ", None),
    ("cut.jsonl.zst", cut(zstandard.compress), ":after ", None),
    ("flip.jsonl.gz", flipped(gzip.compress), ":after ", None),
    ("flip.jsonl.bz2", flipped(bz2.compress), ":after ", None),
    ("flip.jsonl.xz", flipped(lzma.compress), ":after ", None),
    ("empty.txt.gz", holds(b""), ":after 0 unpacked bytes: truncated .gz file: it ends in the middle", 0),
    ("text.txt.zst", holds(b"plain text"), ":after 0 unpacked bytes: damaged .zst file (", 0),
    ("bomb.txt.gz", holds(gzip.compress(bytes(100_000_000))), ":after 65,011,712 unpacked bytes: expands to more than 200 ", 0),
    ("bomb.jsonl.bz2", holds(bz2.compress(bytes(100_000_000))), ":after 65,", None),
    ("cut.parquet", lambda path: path.write_bytes(parquet(path)[:-40]), ": not a whole Parquet file (", 0),
    ("empty.parquet", holds(b""), ": not a whole Parquet file (", 0),
    ("damaged.parquet", damaged_parquet, ":row 201: damaged Parquet file (", 400),
    ("nulls.parquet", nulls, ":row 1: column 'text' holds null, not text", 1),
    ("latin1.parquet", not_utf8, ":row 2: byte 1 (0xff) is not UTF-8", 1),
    ("cut.arrow", arrow, ": not a whole Arrow file (", 0),
    ("quotes.csv", holds(b'n,text\n1,a\n2,"b"c\n3,d\n'), ":3: not valid CSV (", 1),
    ("short.csv", holds(b"n,text\n1,a\n2\n3,d\n"), ":3: 1 values, none for column 'text'", 2),
    ("latin1.tsv", holds(b"n\ttext\n1\ta\n2\t\xe9\n"), ":3: byte 0 (0xe9) is not UTF-8", 1),
    ("loop.txt", lambda path: path.symlink_to(path.name), ": cannot be read (Too many levels of symbolic links)", 0),
    ("gone.txt", lambda path: path.symlink_to("nowhere"), ": cannot be read (No such file or directory)", 0),
    ("pipe.txt", lambda path: os.mkfifo(path), ": a pipe, not a file; send its text to standard input, and name - as the s", 0),
    ("device.txt", lambda path: path.symlink_to("/dev/zero"), ": cannot be read (not a regular file)", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "says", "left"), CONTENT, ids=[name for name, *_ in CONTENT])
def test_bad_content(prep: Prep, tmp_path: Path, name: str, make: Make, says: str, left: int | None) -> None:  # noqa: F811
    good = stories(10)
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a-good.jsonl", good)
    make(folder / name)
    words = (folder / "a-good.jsonl", folder / name, "-o", tmp_path / "out", "--val", "0", "--max_document", 1_000_000)
    result = prep(*words)
    assert (result.code, result.out) == (2, ""), result.out
    assert result.err.startswith(f"error: {folder}/{name}{says}"), result.err
    assert result.err.count("\n") == 1, result.err
    assert not (tmp_path / "out").exists()

    result = prep(*words, "--on_error", "skip")
    assert result.code == 0, result.err
    found = documents_of(tmp_path / "out", TRAIN)
    assert found[:10] == good
    counts = manifest_of(tmp_path / "out")["prep"]["counts"]
    assert (counts["documents"], counts["bad"]) == (len(found), 1)
    assert f"skipped {folder}/{name}{says}" in result.out
    assert left in (None, len(found) - 10)
    if left is None:
        whole = {json.loads(line)["text"] for line in LONG.splitlines()}
        assert whole.issuperset(found[10:]), "no half document"


def test_what_looks_bad_and_is_not(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    """Byte order marks, Windows line ends, a literal end of text, a key that stands in a text, NaN beside the text."""
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    (tmp_path / "eot.txt").write_text("one <|endoftext|> two")
    (tmp_path / "json.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "say \\"text\\": \\"text\\"", "score": NaN, "id": 1, "id": 2}\r\n' + b'{"text": "b"}\r\n\r\n'
    )
    names = ["bom.txt", "eot.txt", "json.jsonl"]
    assert prep(*(tmp_path / name for name in names), "-o", tmp_path / "out", "--val", "0").code == 0
    found = documents_of(tmp_path / "out", TRAIN)
    assert found == ["a\nb\n", "one <|endoftext|> two", 'say "text": "text"', "b"]


def test_a_million_spaces(prep: Prep, tmp_path: Path, ranks: Path) -> None:  # noqa: F811
    """The white space on which tiktoken's own method for text panics."""
    texts = ["before", "x" + " " * 1_000_000 + "y", "\n" * 1_000_001 + "z", "after"]
    write_jsonl(tmp_path / "in.jsonl", texts)
    result = prep(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--tokenizer", ranks, "--val", "0")
    assert result.code == 0, result.err
    assert documents_of(tmp_path / "out", TRAIN) == texts


def test_links_to_folders_are_not_followed(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("only once")
    (folder / "sub" / "again").symlink_to(folder)
    assert prep(folder, "-o", tmp_path / "out", "--val", "0").code == 0
    assert documents_of(tmp_path / "out", TRAIN) == ["only once"]


def test_a_file_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "secret.txt").write_text("secret")
        (folder / "secret.txt").chmod(0)
        (folder / "open.txt").write_text("open")
        (folder / "open.txt").chmod(0o644)
        code = (
            "import os, sys\n"
            "from prep.tokenize import main\n"
            "if os.geteuid() == 0: os.seteuid(65534)\n"
            "from prep.config import PrepConfig\n"
            "from prep.sources import find_sources\n"
            "try: find_sources([sys.argv[1]], PrepConfig())\n"
            "except Exception as error: print(error)\n"
            "(source,) = find_sources([sys.argv[1]], PrepConfig(on_error='skip'))\n"
            "for file in source.files:\n"
            "    for piece in file.reader.pieces(file.path, file.size, 100):\n"
            "        for found in piece.documents(): print(getattr(found, 'problem', None) or found.text)\n"
        )
        result = subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, capture_output=True, text=True, check=True)
    reason = f"{name}/secret.txt: cannot be read (Permission denied)"
    assert result.stdout.splitlines() == [reason, "open", reason + SKIP]


@pytest.mark.parametrize(("content", "says"), [(b"", "no text: 2 files, all empty"), (b" \n", "no text: every file is empty")])
def test_an_empty_corpus(prep: Prep, tmp_path: Path, content: bytes, says: str) -> None:  # noqa: F811
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_bytes(content)
    result = prep(tmp_path / "a.txt", tmp_path / "b.jsonl", "-o", tmp_path / "out")
    assert (result.code, result.err) == (2, f"error: {says}\n")


def test_all_of_it_is_bad(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "a.txt").write_bytes(b"\xff")
    result = prep(tmp_path / "a.txt", "-o", tmp_path / "out", "--on_error", "skip", "--val", "0")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("error: no text for the train split; 1 documents skipped, the first: ")


# ---------------------------------------------------------------------------------------------------------------- memory

SIZE = 150_000_000
HUGE: dict[str, tuple[bytes, bytes, bytes]] = {  # a beginning, what is repeated, an end
    "letters.txt": (b"", b"x" * 1000, b""),
    "words.txt": (b"", b"ten bytes " * 100, b""),
    "one-bad-byte.txt": (b"", b"ten bytes\n" * 100, b"\xff"),
    "line.jsonl": (b'{"text": "short"}\n{"text": "', b"x" * 1000, b'"}\n{"text": "short too"}\n'),
}


@pytest.mark.parametrize("name", [*first_and_slow(["letters.txt", "words.txt"]), "one-bad-byte.txt", "line.jsonl"])
def test_memory_does_not_grow_with_a_line(tmp_path: Path, name: str) -> None:
    begin, repeated, end = HUGE[name]
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(begin)
        for _ in range(SIZE // len(repeated) // 1000):
            file.write(repeated * 1000)
        file.write(end)
    words = [sys.executable, "-m", "prep.tokenize", str(path), "-o", str(tmp_path / "out"), "--tokenizer", "bytes", "--workers"]
    words += ["1", "--val", "0", "--on_error", "skip", "--max_document", "20000000"]
    result, memory = run_measured(words)
    assert memory < SIZE, f"{memory:,} bytes"
    if name == "words.txt":
        assert result.returncode == 0, result.stderr
        assert manifest_of(tmp_path / "out")["files"][0]["tokens"] == SIZE + 1
    elif name == "line.jsonl":
        assert result.returncode == 0, result.stderr
        assert documents_of(tmp_path / "out", TRAIN) == ["short", "short too"]
    else:
        assert result.returncode == 2
        bad = "byte 150000000 (0xff) is not UTF-8" if "byte" in name else "a document of more than 20,000,000 bytes"
        assert bad in result.stderr


def run_measured(words: list[str]) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run to the end; also the largest resident memory of the process, in bytes."""
    code = (
        "import resource, subprocess, sys\n"
        "result = subprocess.run(sys.argv[1:])\n"
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)\n"
        "sys.exit(result.returncode)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    unit = 1 if sys.platform == "darwin" else 1024
    return result, int(result.stderr.rpartition("peak ")[2]) * unit


def test_the_measure_of_memory_measures() -> None:
    assert run_measured([sys.executable, "-c", "x = b'x' * 500_000_000"])[1] > 500_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


def test_problems_of_several_files_come_together(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(Exception, match="2 problems") as caught:
        find_sources([str(tmp_path)], PrepConfig())
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [  # type: ignore[attr-defined]
        f"{tmp_path}/a.parquet",
        f"{tmp_path}/b.parquet",
    ]
