"""What a first adversary of prep broke: parts of long documents, equal documents, damage, what belongs to others, and more."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep import estimate
from prep.leakage import shared_documents
from prep.readers import _LINE_END, _records
from prep.split import TRAIN, VAL
from tests.test_prep import (
    ROOT,
    Result,
    assert_same_files,
    command,
    documents_of,
    manifest_of,
    stories,
    visible,
    write_jsonl,
)
from tests.test_prep import prep as prep
from tests.test_prep_crash import FATAL
from tests.test_prep_engines import needs_gigatoken

Prep = Callable[..., Result]


def lines(count: int, word: str) -> str:
    return "".join(f"{word} number {n} of a text in lines\n" for n in range(count))


# ----------------------------------------------------------------------------------------------- parts of long documents


def run_fatally(tmp_path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """A run in which a part that holds "fatal" ends the process that encodes it."""
    (tmp_path / "faults").mkdir(exist_ok=True)
    (tmp_path / "faults" / "sitecustomize.py").write_text(FATAL.format(condition="b'fatal' in data"))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'faults'}{os.pathsep}{ROOT}"}
    line = [*command(*words), "-o", tmp_path / "out", "--tokenizer", "bytes", "--val", "0", "--workers", "2"]
    return subprocess.run([str(word) for word in line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("dedup", ["none", "exact"])
@pytest.mark.parametrize("at", [500, 999])
def test_a_part_that_is_left_out_ends_its_document(tmp_path: Path, at: int, dedup: str) -> None:
    """Else the documents behind it would be joined to it, or be held to be a repetition of it."""
    (tmp_path / "a.txt").write_text(lines(at, "one") + "the fatal line\n" + lines(999 - at, "two"))
    (tmp_path / "b.txt").write_text("another text\n")
    options = ("--unit_bytes", 8000, "--on_error", "skip", "--dedup", dedup)
    result = run_fatally(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", *options)
    assert result.returncode == 0, result.stderr
    *parts, last = documents_of(tmp_path / "out", TRAIN)
    assert last == "another text\n"
    whole = (tmp_path / "a.txt").read_text()
    assert all(part in whole and "fatal" not in part for part in parts)
    assert manifest_of(tmp_path / "out")["prep"]["counts"]["bad"] == 1
    if dedup == "none":
        assert len("".join(parts)) > len(whole) - 9000


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_a_text_of_which_a_part_is_too_long_is_left_out_as_a_whole(prep: Prep, tmp_path: Path, dedup: str) -> None:
    for name, text in {"a": lines(2000, "one") + "x" * 40_000, "b": "another text", "c": lines(2000, "one")}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    options = ("--unit_bytes", 8000, "--max_document", 20_000, "--val", "0", "--dedup", dedup, "-o", tmp_path / "out")
    result = prep(*sorted(tmp_path.glob("*.txt")), *options)
    assert (result.code, "a document of more than 20,000 bytes" in result.err) == (2, True)
    result = prep(*sorted(tmp_path.glob("*.txt")), *options, "--on_error", "skip")
    assert result.code == 0, result.err
    assert documents_of(tmp_path / "out", TRAIN) == ["another text", lines(2000, "one")]


@settings(deadline=None)
@given(
    text=st.binary(max_size=60).map(lambda data: bytes(b"\nab"[byte % 3] for byte in data)),
    size=st.integers(1, 9),
    largest=st.integers(1, 70),
    separator=st.sampled_from([b"\n", b"ab", b"\n\n", b"aba"]),
)
def test_records_are_the_same_however_they_are_read(text: bytes, size: int, largest: int, separator: bytes) -> None:
    boundary = _LINE_END if separator == b"\n" else re.compile(re.escape(separator))
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    parts = text.split(separator)
    expected, begin = [], 0
    for number, part in enumerate(parts):
        if part or number < len(parts) - 1:
            expected.append((begin, part if len(part) <= largest else None, number < len(parts) - 1))
        begin += len(part) + len(separator)
    assert list(_records(chunks, boundary, largest)) == expected


# ----------------------------------------------------------------------------------------------------------- two splits


@pytest.mark.parametrize("unit_bytes", [1_000, 1_000_000])
def test_repetitions_are_left_out_of_an_only_document_that_is_cut_in_two(prep: Prep, tmp_path: Path, unit_bytes: int) -> None:
    (tmp_path / "a.txt").write_text(lines(500, "one"))
    words = (tmp_path / "a.txt", "-o", tmp_path / "out", "--dedup", "exact", "--val", "10%", "--unit_bytes", unit_bytes)
    assert prep(*words).code == 0
    assert "".join([*documents_of(tmp_path / "out", TRAIN), *documents_of(tmp_path / "out", VAL)]) == lines(500, "one")


@pytest.mark.parametrize("shards", [[], ["--shards", "2K"]])
def test_documents_in_both_given_splits_are_counted(prep: Prep, tmp_path: Path, shards: list[str]) -> None:
    write_jsonl(tmp_path / "train.jsonl", stories(300))
    write_jsonl(tmp_path / "val.jsonl", [*stories(8, seed=1), *stories(300)[100:103], "x", stories(300)[0][:-1]])
    words = (tmp_path / "train.jsonl", "--val_file", tmp_path / "val.jsonl", *shards)
    result = prep(*words, "-o", tmp_path / "out")
    assert "note: 3 of the 13 val documents are in the train split too" in result.out
    assert manifest_of(tmp_path / "out")["prep"]["counts"]["val documents in train"] == 3
    assert "val documents" not in prep(*words, "--dedup", "exact", "-o", tmp_path / "deduplicated").out
    same = prep(tmp_path / "train.jsonl", "--val_file", tmp_path / "train.jsonl", "-o", tmp_path / "same")
    assert "note: 300 of the 300 val documents are in the train split too" in same.out
    none_left = prep(tmp_path / "train.jsonl", "--val_file", tmp_path / "train.jsonl", "-o", tmp_path / "x", "--dedup", "exact")
    assert "no text for the val split; 300 duplicates left out" in none_left.err


def test_control_no_document_is_in_both(prep: Prep, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", stories(30))
    write_jsonl(tmp_path / "val.jsonl", stories(8, seed=1))
    result = prep(tmp_path / "train.jsonl", "--val_file", tmp_path / "val.jsonl", "-o", tmp_path / "out")
    assert result.code == 0
    assert "train split too" not in result.out


# -------------------------------------------------------------------------------------------------------------- damage


def lose_index(out: Path) -> None:
    (out / "val.idx.npy").unlink()


def lose_tokenizer(out: Path) -> None:
    (out / "tokenizer" / "spec.json").unlink()


def zero_head(out: Path) -> None:
    data = (out / "train.bin").read_bytes()
    (out / "train.bin").write_bytes(bytes(100) + data[100:])


def flip_end(out: Path) -> None:
    data = bytearray((out / "train.idx.npy").read_bytes())
    data[-3] ^= 1
    (out / "train.idx.npy").write_bytes(data)


@pytest.mark.parametrize("damage", [lose_index, lose_tokenizer, zero_head, flip_end])
def test_a_damaged_dataset_is_not_taken_for_done(prep: Prep, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_jsonl(tmp_path / "in.jsonl", stories(100))
    words = (tmp_path / "in.jsonl", "-o", tmp_path / "out")
    for out in ("out", "expected"):
        assert prep(tmp_path / "in.jsonl", "-o", tmp_path / out).code == 0
    assert "nothing to do" in prep(*words).out
    damage(tmp_path / "out")
    again = prep(*words)
    assert again.code == 2
    assert "add --overwrite to replace it" in again.err
    assert prep(*words, "--overwrite").code == 0
    assert_same_files(tmp_path / "expected", tmp_path / "out")


@pytest.mark.parametrize("name", ["train_000001.bin", "open", "train_000001.idx.npy", "../keys", "nothing"])
def test_a_bit_that_changed_between_two_runs_is_not_gone_on_with(prep: Prep, tmp_path: Path, name: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [*stories(600), *stories(50)])
    source.write_text(source.read_text() + "no json\n")
    words = (tmp_path / "in.jsonl", "--unit_bytes", 3000, "--shards", "20K", "--dedup", "exact", "--val", "0")
    assert prep(*words, "-o", tmp_path / "expected", "--on_error", "skip").code == 0
    assert prep(*words, "-o", tmp_path / "out").code == 2
    dataset = tmp_path / ".out.work" / "dataset"
    path = max(dataset.glob("train_*.bin")) if name == "open" else dataset / name
    if name != "nothing":
        data = bytearray(path.read_bytes())
        data[140] ^= 1
        path.write_bytes(data)
    result = prep(*words, "-o", tmp_path / "out", "--on_error", "skip")
    assert result.code == 0, result.err
    assert ("changed since it was written; beginning anew" in result.err) == (name != "nothing")
    assert ("going on: " in result.err) == (name == "nothing")
    assert_same_files(tmp_path / "expected", tmp_path / "out")


@pytest.mark.parametrize("name", [".out.work", ".out.old"])
@pytest.mark.parametrize("existing", [False, True])
def test_what_others_keep_under_the_names_of_ours_stays(prep: Prep, tmp_path: Path, name: str, existing: bool) -> None:
    write_jsonl(tmp_path / "in.jsonl", stories(30))
    words = (tmp_path / "in.jsonl", "-o", tmp_path / "out")
    if existing:
        assert prep(*words).code == 0
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    result = prep(*words, "--overwrite")
    assert result.code == 2
    assert result.err.startswith(f"error: {tmp_path / name}: is in the way")
    assert (tmp_path / name / "mine.txt").read_text() == "mine"
    assert visible(tmp_path) == (["in.jsonl", "out"] if existing else ["in.jsonl"])


def test_a_disk_that_is_full_for_a_worker_keeps_what_is_done(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; only the unit with the long document is beyond it."""
    write_jsonl(tmp_path / "in.jsonl", [*stories(150), "long " * 12_000])
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000)); import prep.tokenize as t; t.main()"
    )
    options = ["--tokenizer", "bytes", "--val", "0", "--unit_bytes", "8000", "--workers", "2"]
    words = [sys.executable, "-c", limited, tmp_path / "in.jsonl", "-o", tmp_path / "out", *options]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    pattern = rf"error: -o {tmp_path}/out: cannot be written \(File too large\); \d+ of \d+ units are done and kept: .*\n"
    assert re.fullmatch(pattern, result.stderr), result.stderr


# -------------------------------------------------------------------------------------------- standard input, plan, memory


def test_standard_input_goes_on_where_it_was(tmp_path: Path) -> None:
    text = "".join(json.dumps({"text": story}) + "\n" for story in stories(600)) + "no json\n"
    options = ["--format", "jsonl", "--tokenizer", "bytes", "--val", "0", "--unit_bytes", "5000", "--workers", "2"]

    def run(text: str, *more: str) -> subprocess.CompletedProcess[str]:
        words = [*command("-", "-o", tmp_path / "out"), *options, *more]
        return subprocess.run(list(map(str, words)), cwd=ROOT, input=text, capture_output=True, text=True, timeout=60)

    assert run(text).returncode == 2
    assert (tmp_path / ".out.work").exists()
    result = run(text, "--on_error", "skip")
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("going on: ")
    assert documents_of(tmp_path / "out", TRAIN) == stories(600)
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert "nothing to do" in run(text, "--on_error", "skip").stdout
    assert "other text" in run(text + "{}", "--on_error", "skip").stderr
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_a_plan_reads_no_more_than_its_time_allows(prep: Prep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = stories(60_000)
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), 1))
    clock = itertools.count()  # one second per document, on any machine
    monkeypatch.setattr(estimate.time, "process_time", lambda: float(next(clock)))
    monkeypatch.setattr(estimate, "_PROBE_SECONDS", len(texts) / 4)
    read = list[int]()
    update = estimate._Read.update
    monkeypatch.setattr(estimate._Read, "update", lambda self, data: (read.append(len(data)), update(self, data))[1])
    result = prep(path, "-o", tmp_path / "out", "--plan")
    assert result.code == 0, result.err
    assert sum(read) < path.stat().st_size
    found = re.search(r"about ([\d,.]+) million", result.out)
    assert found
    assert float(found[1].replace(",", "")) * 1e6 == pytest.approx(sum(len(text) + 1 for text in texts), rel=0.4)


GROWTH = """
import random, sys
from pathlib import Path
from accel_pretrain.tokenizer import load_tokenizer
from prep import engines
engines._KEPT = int(sys.argv[2])
engine = engines.GigatokenEngine(load_tokenizer(sys.argv[1]), Path(sys.argv[1]))
source = random.Random(0)
for _ in range(250):
    words = ("%010x" % source.getrandbits(40) for _ in range(9000))
    engine.encode(" ".join(words).translate(str.maketrans("0123456789", "ghijklmnop")).encode())
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@needs_gigatoken
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="a process knows its size from /proc")
def test_gigatoken_gives_back_the_words_that_it_has_seen(prep: Prep, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", stories(2000))
    assert prep(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--tokenizer", "train:300").code == 0
    folder = tmp_path / "out" / "tokenizer"

    def peak(kept: int) -> int:
        words = [sys.executable, "-c", GROWTH, str(folder), str(kept)]
        return int(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=80, check=True).stdout)

    assert peak(32_000_000) + 60 < peak(10**12)  # megabytes


def test_shared_documents_of_one_token_and_of_none(tmp_path: Path) -> None:
    """The marks by which documents are chosen must hold for the shortest: only an end of text, or one id before it."""
    from accel_pretrain.shards import ShardWriter

    def write(split: str, documents: list[list[int]]) -> list:
        writer = ShardWriter(tmp_path / f"{split}.bin", split, "uint16", 300, eot_id=256)
        for ids in documents:
            writer.append(np.array([*ids, 256]))
        return [writer.close()]

    train, val = write(TRAIN, [[], [5], [5, 6, 7], [5, 9, 7]]), write(VAL, [[5], [6], [], [5, 8, 7], [5, 9, 7]])
    assert shared_documents(tmp_path, train, val, "uint16") == 3
