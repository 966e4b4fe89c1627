"""``python -m prep.tokenize`` from text to a dataset, and every way in which it can be asked for something impossible."""

from __future__ import annotations

import base64
import builtins
import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_pretrain.shards import open_split
from accel_pretrain.tokenizer import GPT2_PATTERN, load_tokenizer
from prep.config import PrepConfig, parse_share
from prep.readers import _SAFE_CUT, Document, JsonLines, Piece, SeparatedText, WholeText, digest_of
from prep.split import TRAIN, VAL, SplitRule, choose_split
from prep.tokenize import main, usage
from prep.units import plan_units

ROOT = Path(__file__).parents[1]
EOT = "<|endoftext|>"
MERGES = {
    token: 256 + rank for rank, token in enumerate([b"  ", b"\n\n", b" \n", b"\n ", b".\n", b"\na", b" a", b"aa", b"a\n"])
}
# The patterns of gpt2 and of cl100k_base (tiktoken, openai_public.py), with ranks in which white space can merge.
SPLITTERS = [
    tiktoken.Encoding(
        "x", pat_str=pattern, mergeable_ranks={bytes([byte]): byte for byte in range(256)} | MERGES, special_tokens={}
    )
    for pattern in (
        GPT2_PATTERN,
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
        r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    )
]
WORDS = Path(contextlib.__file__).read_text().split()


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def prep(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command line in this process, with one worker and the bytes tokenizer unless told otherwise."""

    def run(*words: object) -> Result:
        arguments = [str(word) for word in words]
        defaults = [("--workers", "1"), ("--tokenizer", "bytes")]
        given = {word.partition("=")[0] for word in arguments}
        arguments += [word for option in defaults if option[0] not in given for word in option]
        capsys.readouterr()
        try:
            main(arguments)
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def documents_of(folder: Path, split: str) -> list[str]:
    """The documents of one split, decoded."""
    tokenizer = load_tokenizer(folder)
    ids = np.concatenate(open_split(folder, split).files)
    ends = np.flatnonzero(ids == tokenizer.eot_id)
    assert ends[-1] == ids.size - 1
    return [tokenizer.decode(part[part != tokenizer.eot_id]) for part in np.split(ids, ends[:-1] + 1)]


def stories(count: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    return [f"Story {seed}.{n}: " + " ".join(source.choices(WORDS, k=source.randint(3, 60))) for n in range(count)]


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(texts)))
    return path


def write_folder(path: Path, texts: list[str]) -> Path:
    path.mkdir()
    for n, text in enumerate(texts):
        (path / f"{n:04d}.txt").write_text(text)
    return path


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def visible(folder: Path) -> list[str]:
    """What is in a folder, without the work that an unfinished run keeps there."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# -------------------------------------------------------------------------------------------------------------- sources


def test_text_files(prep: Callable[..., Result], tmp_path: Path) -> None:
    texts = stories(50)
    folder = write_folder(tmp_path / "in", texts)
    result = prep(folder, "-o", tmp_path / "out", "--val", "10%")
    assert result.code == 0, result.err
    found = {split: documents_of(tmp_path / "out", split) for split in (TRAIN, VAL)}
    assert sorted(found[TRAIN] + found[VAL]) == sorted(texts)
    assert found[TRAIN] == [text for text in texts if text in set(found[TRAIN])], "documents keep their order"
    assert "python -m accel_pretrain.train" in result.out.splitlines()[-1]


def test_separator(prep: Callable[..., Result], tmp_path: Path) -> None:
    texts = stories(40)
    (tmp_path / "in.txt").write_text(f"\n{EOT}\n".join(texts) + f"\n{EOT}\n")
    for spelling in ("--doc_sep", "--doc-sep"):
        result = prep(tmp_path / "in.txt", "-o", tmp_path / spelling, spelling, EOT, "--val", "10%")
        assert result.code == 0, result.err
        assert sorted(documents_of(tmp_path / spelling, TRAIN) + documents_of(tmp_path / spelling, VAL)) == sorted(texts)
        assert manifest_of(tmp_path / spelling)["prep"]["counts"] == {"documents": 40, "empty": 0, "bad": 0}


def test_separator_with_escapes_and_windows_line_ends(prep: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n\r\n\r\nc\r\n\r\nd\n\ne")
    assert prep(tmp_path / "in.txt", "-o", tmp_path / "out", "--doc_sep", r"\n\n", "--val", "0").code == 0
    assert documents_of(tmp_path / "out", TRAIN) == ["a\nb", "c", "d", "e"]


def test_jsonl(prep: Callable[..., Result], tmp_path: Path) -> None:
    texts = [*stories(40), "café ☕ \U0001f600", "a\r\nb"]
    write_jsonl(tmp_path / "in.jsonl", texts, "content")
    result = prep(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--text_column", "content", "--val=0.1")
    assert result.code == 0, result.err
    found = documents_of(tmp_path / "out", TRAIN) + documents_of(tmp_path / "out", VAL)
    assert sorted(found) == sorted([*texts[:-1], "a\nb"])


def test_globs_are_expanded_here_and_nothing_is_read_twice(prep: Callable[..., Result], tmp_path: Path) -> None:
    write_folder(tmp_path / "in", stories(30))
    (tmp_path / "in" / "odd.suffix").write_text("named in full")
    (tmp_path / "in" / ".hidden.txt").write_text("hidden")
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "brackets[1].txt").write_text("not a glob")
    result = prep(
        tmp_path / "in", f"{tmp_path}/in/*.txt", tmp_path / "in" / "odd.suffix", tmp_path / "brackets[1].txt",
        "-o", tmp_path / "out", "--val", "0",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert documents_of(tmp_path / "out", TRAIN) == [*stories(30), "named in full", "not a glob"]


def test_config_file(prep: Callable[..., Result], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", stories(30), "body")
    (tmp_path / "prep.yaml").write_text(f"sources: [{tmp_path}/in.jsonl]\ntext_column: body\nval: 20%\n")
    result = prep("--config", tmp_path / "prep.yaml", f"out={tmp_path}/out")
    assert result.code == 0, result.err
    assert manifest_of(tmp_path / "out")["prep"]["config"]["val"] == "20%"


def test_given_val_files(prep: Callable[..., Result], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", stories(20))
    write_jsonl(tmp_path / "val.jsonl", stories(5, seed=1))
    result = prep(tmp_path / "train.jsonl", "--val_file", tmp_path / "val.jsonl", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert documents_of(tmp_path / "out", TRAIN) == stories(20)
    assert documents_of(tmp_path / "out", VAL) == stories(5, seed=1)


def test_empty_documents_are_left_out_and_counted(prep: Callable[..., Result], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", ["a", "", " \n\t", "b"])
    (tmp_path / "empty.txt").write_text("")
    assert prep(tmp_path / "in.jsonl", tmp_path / "empty.txt", "-o", tmp_path / "out", "--val", "0").code == 0
    assert documents_of(tmp_path / "out", TRAIN) == ["a", "b"]
    assert manifest_of(tmp_path / "out")["prep"]["counts"] == {"documents": 2, "empty": 3, "bad": 0}


# ----------------------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .tiktoken file of bytes and a few merges."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"th", b"the", b" t", b" the", b"in", b"  ", b"    ", b"\n\n", b"ur", b"re", b" s", b"se", b"self"]
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def reference_for(path: Path) -> tiktoken.Encoding:
    pairs = (line.split() for line in path.read_text().splitlines())
    table = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return tiktoken.Encoding("reference", pat_str=GPT2_PATTERN, mergeable_ranks=table, special_tokens={EOT: len(table)})


def test_ids_equal_tiktoken_document_by_document(prep: Callable[..., Result], tmp_path: Path, ranks: Path) -> None:
    texts = [*stories(60), f"a literal {EOT} in a text", "  the\n\n\nthe  "]
    write_jsonl(tmp_path / "in.jsonl", texts)
    assert prep(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--tokenizer", ranks, "--val", "0").code == 0
    reference = reference_for(ranks)
    expected = [id for text in texts for id in [*reference.encode_ordinary(text), reference.eot_token]]
    ids = open_split(tmp_path / "out", TRAIN).files[0]
    assert ids.tolist() == expected
    assert int((ids == reference.eot_token).sum()) == len(texts) == open_split(tmp_path / "out", TRAIN).documents


def test_nanogpt_reads_it(prep: Callable[..., Result], tmp_path: Path, ranks: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", stories(20))
    assert prep(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--tokenizer", ranks, "--val", "0").code == 0
    data = np.memmap(tmp_path / "out" / "train.bin", dtype=np.uint16, mode="r")
    first = data[: int(np.flatnonzero(data == 269)[0])]
    assert load_tokenizer(tmp_path / "out").decode(first) == stories(20)[0]


def test_wide_vocabulary_is_stored_as_uint32(prep: Callable[..., Result], tmp_path: Path) -> None:
    pairs = [bytes([first, second]) for first in range(256) for second in range(256)]
    tokens = [bytes([byte]) for byte in range(256)] + pairs
    (tmp_path / "wide.tiktoken").write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    )
    texts = ["zz" * 50, "ÿÿ", "plain"]
    write_jsonl(tmp_path / "in.jsonl", texts)
    result = prep(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--tokenizer", tmp_path / "wide.tiktoken", "--val", "0")
    assert result.code == 0, result.err
    split = open_split(tmp_path / "out", TRAIN)
    assert (manifest_of(tmp_path / "out")["dtype"], split.max_id) == ("uint32", 65_792)
    assert documents_of(tmp_path / "out", TRAIN) == texts


def test_saved_tokenizer_is_used_again(prep: Callable[..., Result], tmp_path: Path, ranks: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", stories(30))
    assert prep(tmp_path / "in.jsonl", "-o", tmp_path / "a", "--tokenizer", ranks).code == 0
    for number, place in enumerate((tmp_path / "a", tmp_path / "a" / "tokenizer")):
        assert prep(tmp_path / "in.jsonl", "-o", tmp_path / f"b{number}", "--tokenizer", place).code == 0
        assert open_split(tmp_path / f"b{number}", TRAIN).fingerprint == open_split(tmp_path / "a", TRAIN).fingerprint


def test_learned_tokenizer(prep: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("rustbpe")
    texts = stories(300)
    write_jsonl(tmp_path / "in.jsonl", texts)
    for name in ("a", "b"):
        result = prep(tmp_path / "in.jsonl", "-o", tmp_path / name, "--tokenizer", "train:300", "--val", "30%")
        assert result.code == 0, result.err
    assert_same_files(tmp_path / "a", tmp_path / "b")
    tokenizer = load_tokenizer(tmp_path / "a")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (300, 299)
    assert manifest_of(tmp_path / "a")["tokenizer"]["vocab_size"] == 300
    assert sorted(documents_of(tmp_path / "a", TRAIN) + documents_of(tmp_path / "a", VAL)) == sorted(texts)


def test_learning_sees_the_train_split_only(prep: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("rustbpe")
    write_jsonl(tmp_path / "train.jsonl", ["abab cdcd"] * 50)
    write_jsonl(tmp_path / "val.jsonl", ["xyxyxyxy" * 100])
    common = ("--tokenizer", "train:258", "-o", tmp_path / "out", "--overwrite")
    assert prep(tmp_path / "train.jsonl", "--val_file", tmp_path / "val.jsonl", *common).code == 0
    assert b"xy" not in (tmp_path / "out" / "tokenizer" / "ranks.tiktoken").read_bytes()
    learned = load_tokenizer(tmp_path / "out")
    assert learned.encode("ab").size == 1 or learned.encode("cd").size == 1
    assert learned.encode("xy").size == 2


def test_learning_without_a_trainer(prep: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name in ("rustbpe", "gigatoken"):
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    write_jsonl(tmp_path / "in.jsonl", stories(20))
    monkeypatch.setattr(builtins, "__import__", without)
    result = prep(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--tokenizer", "train:300")
    assert (result.code, result.err) == (
        2,
        "error: --tokenizer train:300: learning a vocabulary needs gigatoken or rustbpe: pip install 'accel_pretrain[bpe]'; "
        "or use --tokenizer bytes, which needs nothing\n",
    )
    assert os.listdir(tmp_path) == ["in.jsonl"]


# ---------------------------------------------------------------------------------------------------- units and workers


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "prep.tokenize", *map(str, words)]


def test_output_does_not_depend_on_the_workers(tmp_path: Path, ranks: Path) -> None:
    sources = [write_jsonl(tmp_path / "a.jsonl", stories(200)), write_folder(tmp_path / "many", stories(50, seed=1))]
    (tmp_path / "long.txt").write_text("\n".join(stories(300, seed=2)))
    for workers in (1, 3):
        words = [*sources, tmp_path / "long.txt", "-o", tmp_path / f"out{workers}", "--tokenizer", ranks]
        words += ["--workers", workers, "--unit_bytes", 8000, "--val", "5%"]
        subprocess.run(command(*words), cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert_same_files(tmp_path / "out1", tmp_path / "out3")
    assert documents_of(tmp_path / "out3", VAL)


def test_output_does_not_depend_on_the_units(
    prep: Callable[..., Result], tmp_path: Path, ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long text is cut into parts that are encoded apart: to the ids of the whole."""
    text = "\n\n".join(stories(200)) + "\n  \n\u3000\n/x\n\u00a0y\r\nlast line\n\n"
    (tmp_path / "in.txt").write_bytes(text.encode())
    expected = [*reference_for(ranks).encode_ordinary(text.replace("\r\n", "\n")), 269]

    def ids(size: int) -> list[int]:
        words = (tmp_path / "in.txt", "-o", tmp_path / "out", "--tokenizer", ranks, "--val", "0", "--overwrite")
        assert prep(*words, f"unit_bytes={size}").code == 0
        return open_split(tmp_path / "out", TRAIN).files[0].tolist()

    assert [size for size in (100, 1000, 10**9) if ids(size) != expected] == []
    monkeypatch.setattr("prep.readers._SAFE_CUT", re.compile(rb"[a-z]"))
    assert ids(100) != expected, "a cut anywhere must show, or this test shows nothing"


@settings(deadline=None)
@given(
    text=st.lists(st.sampled_from([*"aZ1.!/'s \n\t\u3000\u00a0\u2028\u0085é中。ー", "\r\n", "  "]), max_size=40).map("".join)
)
def test_cuts_of_a_long_text_are_safe(text: str) -> None:
    data = text.encode()
    cuts = [match.end() for match in _SAFE_CUT.finditer(data)]
    parts = [data[start:stop].decode() for start, stop in itertools.pairwise([0, *cuts, len(data)])]
    for encoding in SPLITTERS:
        assert [id for part in parts for id in encoding.encode_ordinary(part)] == encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    "reader", [JsonLines("text"), SeparatedText("\n--\n"), WholeText()], ids=lambda reader: type(reader).__name__
)
@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 10**6])
def test_pieces_cover_a_file_and_hold_whole_records(tmp_path: Path, reader: object, unit_bytes: int) -> None:
    assert isinstance(reader, JsonLines | SeparatedText | WholeText)
    texts = stories(30)
    path = tmp_path / "in"
    content = {
        "JsonLines": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        "SeparatedText": "\n--\n".join(texts),
        "WholeText": "\n".join(texts),
    }[type(reader).__name__]
    path.write_text(content)
    pieces = list(reader.pieces(str(path), len(content), unit_bytes))
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == len(content)
    documents = [document for piece in pieces for document in piece.documents()]
    assert all(isinstance(document, Document) for document in documents)
    found = [document.text for document in documents if isinstance(document, Document)]
    assert found == texts if not isinstance(reader, WholeText) else "".join(found) == content
    assert [document.ends for document in documents if isinstance(document, Document)][-1]


def test_the_hash_of_a_long_file_is_that_of_its_text(tmp_path: Path) -> None:
    text = "\ufeff" + "a line\r\nanother\r\r\n" * 200_000
    path = tmp_path / "in.txt"
    path.write_bytes(text.encode())
    piece = next(WholeText().pieces(str(path), path.stat().st_size, 1000))
    assert piece.digest == digest_of(text.removeprefix("\ufeff").replace("\r\n", "\n").encode())


def test_an_error_in_a_worker_is_the_error_of_the_run(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", stories(300))
    path.write_text(path.read_text() + "oops\n")
    words = [path, "-o", tmp_path / "out", "--tokenizer", "bytes", "--workers", 2, "--unit_bytes", 5000]
    result = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {path}:301: not valid JSON (")
    assert result.stderr.count("\n") == 1
    assert visible(tmp_path) == ["in.jsonl"]


def test_importing_it_imports_no_torch() -> None:
    code = "import prep.tokenize, sys; assert not {'torch', 'tiktoken', 'tqdm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_run_by_its_path_it_says_how_to_run_it() -> None:
    result = subprocess.run([sys.executable, "prep/tokenize.py"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "error: run it as: python -m prep.tokenize\n")


# ---------------------------------------------------------------------------------------------------------------- split


def test_equal_documents_never_straddle(prep: Callable[..., Result], tmp_path: Path) -> None:
    texts = stories(200)
    write_jsonl(tmp_path / "in.jsonl", [*texts, *texts[::-1], *texts])
    assert prep(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--val", "20%").code == 0
    train, val = (set(documents_of(tmp_path / "out", split)) for split in (TRAIN, VAL))
    assert not train & val
    assert len(train | val) == 200
    assert 20 < len(val) < 60


def test_adding_documents_moves_no_old_one(prep: Callable[..., Result], tmp_path: Path) -> None:
    old, new = stories(200), stories(200, seed=1)
    write_jsonl(tmp_path / "old.jsonl", old)
    write_folder(tmp_path / "new", [*new, *old])
    assert prep(tmp_path / "old.jsonl", "-o", tmp_path / "a", "--val", "10%").code == 0
    assert prep(tmp_path / "new", "-o", tmp_path / "b", "--val", "10%").code == 0
    assert set(documents_of(tmp_path / "b", VAL)) & set(old) == set(documents_of(tmp_path / "a", VAL))


@pytest.mark.parametrize("unit_bytes", [200, 10**9])
def test_an_only_document_is_cut_at_a_paragraph(prep: Callable[..., Result], tmp_path: Path, unit_bytes: int) -> None:
    text = "\n\n".join("\n".join(stories(3, seed)) for seed in range(20))
    (tmp_path / "in.txt").write_text(text)
    result = prep(tmp_path / "in.txt", "-o", tmp_path / "out", "--val", "10%", "--unit_bytes", unit_bytes)
    assert result.code == 0, result.err
    (train,), (val,) = (documents_of(tmp_path / "out", split) for split in (TRAIN, VAL))
    assert train + val == text
    assert train.endswith("\n\n")
    assert 0.05 < len(val) / len(text) < 0.15


@pytest.mark.parametrize("text", ["one line of words " * 30, "x" * 500, "é" * 500, "ab", "\n\na\n\nb\n\n"])
def test_an_only_document_without_paragraphs(prep: Callable[..., Result], tmp_path: Path, text: str) -> None:
    write_jsonl(tmp_path / "in.jsonl", [text])
    assert prep(tmp_path / "in.jsonl", "-o", tmp_path / "out").code == 0
    assert documents_of(tmp_path / "out", TRAIN)[0] + documents_of(tmp_path / "out", VAL)[0] == text


@pytest.mark.parametrize("count", range(2, 12))
def test_few_documents_still_give_both_splits(tmp_path: Path, count: int) -> None:
    folder = write_folder(tmp_path / "in", stories(count))
    for share in (0.001, 0.5, 0.999):
        rule, _ = choose_split(units_of(folder), share)
        splits = [rule.split_of(digest_of(text.encode())) for text in stories(count)]
        assert set(splits) == {TRAIN, VAL}
    assert isinstance(rule, SplitRule)


def units_of(folder: Path) -> list:
    from prep.sources import find_sources

    return plan_units(find_sources([str(folder)], PrepConfig()), 1000)


def test_the_larger_of_two_documents_is_not_held_out(prep: Callable[..., Result], tmp_path: Path) -> None:
    for seed in range(5):
        write_folder(tmp_path / f"in{seed}", [stories(1, seed)[0] * 20, stories(1, seed)[0]])
        assert prep(tmp_path / f"in{seed}", "-o", tmp_path / f"out{seed}").code == 0
        assert documents_of(tmp_path / f"out{seed}", VAL) == [stories(1, seed)[0]]


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.01", 0.01), ("50 %", 0.5), ("0", 0.0), (" .5% ", 0.005)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


# ----------------------------------------------------------------------------------------------- what is already there


def test_the_same_again_is_already_there(prep: Callable[..., Result], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", stories(30))
    words = (tmp_path / "in.jsonl", "-o", tmp_path / "out")
    assert prep(*words).code == 0
    stamp = (tmp_path / "out" / "train.bin").stat().st_mtime_ns
    again = prep(*words, "--workers", "2")
    assert again.code == 0
    assert "already there" in again.out
    assert (tmp_path / "out" / "train.bin").stat().st_mtime_ns == stamp


def test_anything_else_is_refused_until_overwrite(prep: Callable[..., Result], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", stories(30))
    out = tmp_path / "out"
    assert prep(path, "-o", out).code == 0
    advice = "; add --overwrite to replace it, or give another -o\n"
    other = prep(path, "-o", out, "--val", "5%")
    assert (other.code, other.err) == (2, f"error: -o {out}: already holds another dataset (other val){advice}")
    (out / "train.bin").write_bytes((out / "train.bin").read_bytes()[:-1])
    damaged = prep(path, "-o", out)
    other_bytes = "other bytes than were written: it is damaged"
    assert damaged.err == f"error: -o {out}: already holds another dataset ({other_bytes}){advice}"
    path.write_text(path.read_text().replace("Story", "STORY"))  # the same size
    assert prep(path, "-o", out).code == 2
    assert prep(path, "-o", out, "--overwrite").code == 0
    assert all("STORY" in text for text in documents_of(out, TRAIN))
    path.write_text(path.read_text().replace("STORY", "story"))
    assert prep(path, "-o", out).err == f"error: -o {out}: already holds another dataset (other text){advice}"


def test_overwrite_does_not_delete_what_is_not_a_dataset(prep: Callable[..., Result], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", stories(30))
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.doc").write_text("years of work")
    result = prep(path, "-o", out, "--overwrite")
    assert (result.code, result.err) == (
        2, f"error: -o {out}: holds other files (thesis.doc) and no dataset; use -o {out}/tokens\n"
    )  # fmt: skip
    assert prep(path, "-o", out / "tokens").code == 0
    (out / "tokens" / "notes.txt").write_text("mine")
    result = prep(path, "-o", out / "tokens", "--overwrite")
    assert (result.code, result.err) == (
        2, f"error: -o {out}/tokens: holds more than its dataset (notes.txt); move that away, or use another -o\n"
    )  # fmt: skip


def test_a_dataset_with_a_damaged_manifest_can_be_overwritten(prep: Callable[..., Result], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", stories(30))
    assert prep(path, "-o", tmp_path / "out").code == 0
    (tmp_path / "out" / "manifest.json").write_text("{")
    assert "damaged" in prep(path, "-o", tmp_path / "out").err
    assert prep(path, "-o", tmp_path / "out", "--overwrite").code == 0
    assert documents_of(tmp_path / "out", TRAIN)


def test_a_run_killed_while_publishing_is_undone_by_the_next(prep: Callable[..., Result], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", stories(30))
    assert prep(path, "-o", tmp_path / "out").code == 0
    (tmp_path / "out").rename(tmp_path / ".out.old")
    assert "already there" in prep(path, "-o", tmp_path / "out").out
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out"]


def test_a_failed_run_leaves_no_manifest(prep: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = write_jsonl(tmp_path / "in.jsonl", stories(30))
    monkeypatch.setattr("prep.tokenize.write_manifest", full)
    result = prep(path, "-o", tmp_path / "out")
    assert result.code == 2
    kept = "1 of 1 units are done and kept: make room and run the same command again"
    assert result.err == f"error: -o {tmp_path}/out: cannot be written (No space left on device); {kept}\n"
    assert visible(tmp_path) == ["in.jsonl"]
    monkeypatch.undo()
    result = prep(path, "-o", tmp_path / "out")
    assert (result.code, result.err) == (0, "going on: 1 of 1 units were done before\n")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out"]


# ------------------------------------------------------------------------------------------------------------ bad input


SKIP = "; or leave such documents out with --on_error skip"
BAD_CONTENT = [
    ("a.txt", b"abc\nd\xe9f", "a.txt:2: byte 5 (0xe9) is not UTF-8; convert it with iconv"),
    ("a.txt", b"good\nbin\0ary", "a.txt:2: byte 8 is NUL: binary data or UTF-16, not UTF-8 text"),
    ("a.txt", "text".encode("utf-16"), "a.txt:1: UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8"),
    ("a.txt", b"cut \xf0\x9f\x98", "a.txt:1: byte 4 (0xf0) is not UTF-8; convert it with iconv"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2: not valid JSON (Expecting value: line 1 column 10 (char 9))"),
    ("a.jsonl", b'{"text": "a"}\n\n[1]\n', "a.jsonl:3: expected one JSON object per line, found list"),
    ("a.jsonl", b'{"id": 1, "body": ""}', "a.jsonl:1: no column 'text', only id, body; choose with --text_column NAME"),
    ("a.jsonl", b"{}", "a.jsonl:1: no column 'text', only none; choose with --text_column NAME"),
    ("a.jsonl", b'{"text": null}', "a.jsonl:1: column 'text' holds NoneType, not text; choose with --text_column NAME"),
    ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: half a surrogate pair in column 'text': not text"),
    ("a.jsonl", b'{"text": "\\u0000"}', "a.jsonl:1: a NUL character in column 'text': not text"),
    ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1: byte 10 (0xff) is not UTF-8; convert it with iconv"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not valid JSON (maximum recursion depth exceeded"),
]


@pytest.mark.parametrize(("name", "content", "says"), BAD_CONTENT, ids=[says for _, _, says in BAD_CONTENT])
@pytest.mark.parametrize("unit_bytes", [3, 10**6])
def test_bad_documents(
    prep: Callable[..., Result], tmp_path: Path, name: str, content: bytes, says: str, unit_bytes: int
) -> None:
    write_jsonl(tmp_path / "good.jsonl", stories(20))
    (tmp_path / name).write_bytes(content)
    words = (tmp_path / "good.jsonl", tmp_path / name, "-o", tmp_path / "out", "--unit_bytes", unit_bytes)
    result = prep(*words)
    assert result.code == 2
    assert result.err.startswith(f"error: {tmp_path}/{says}")
    assert result.err.endswith(SKIP + "\n")
    assert result.err.count("\n") == 1
    assert visible(tmp_path) == sorted(["good.jsonl", name])

    result = prep(*words, "--on_error", "skip")
    assert result.code == 0, result.err
    assert manifest_of(tmp_path / "out")["prep"]["counts"]["bad"] == 1
    assert f"skipped {tmp_path}/{says}" in result.out
    expected = [*stories(20), *(["a"] if content.startswith(b'{"text": "a"}') else [])]
    assert sorted(documents_of(tmp_path / "out", TRAIN) + documents_of(tmp_path / "out", VAL)) == sorted(expected)


def bad_requests(tmp: Path) -> list[tuple[list[object], str]]:
    """Command lines, and the one line that each ends in."""
    out = ["-o", tmp / "out"]
    good, empty, folder = tmp / "good.jsonl", tmp / "empty.txt", tmp / "folder"
    (tmp / "sub").mkdir()
    folder.mkdir()
    write_jsonl(good, stories(3))
    empty.write_text("")
    (tmp / "blank.txt").write_text(" \n\n")
    (tmp / "same.jsonl").write_text('{"text": "a"}\n' * 3)
    (tmp / "short.txt").write_text("x")
    (tmp / "bad.txt").write_bytes(b"\xff")
    (tmp / "x.json").write_text("")
    write_folder(tmp / "texts", stories(3))
    suffixes = "no file in it has a suffix of text (.c "
    return [
        ([good], "where to? add -o DIR, for example -o data/mine"),
        ([*out], "no input: name files or folders, or use --demo"),
        ([good, "--demo"], "--demo brings its own corpus; leave the sources or --demo out"),
        ([tmp / "no.txt", *out], f"{tmp}/no.txt: {tmp}/no.txt does not exist; name a text file, a folder or a quoted glob"),
        ([tmp / "*.csv", *out], f"{tmp}/*.csv: no file matches this pattern below {tmp}"),
        ([folder, *out], f"{folder}: {suffixes}"),
        ([empty, *out], "no text: 1 files, all empty"),
        ([tmp / "blank.txt", *out], "no text: every file is empty"),
        ([tmp / "bad.txt", *out], f"{tmp}/bad.txt:1: byte 0 (0xff) is not UTF-8; convert it with iconv{SKIP}"),
        ([tmp / "short.txt", *out], "the only document has 1 bytes, too few for two splits; add text, or use --val 0"),
        ([tmp / "same.jsonl", *out], "all documents are the same text, so none can be held out; use --val_file FILE or --v"),
        ([good, "--val_file", empty, *out], "no text for the val split"),
        ([good, *out, "--val", "2"], "val: expected a share below 1, such as 1% or 0.01, got '2'"),
        ([good, *out, "--val", "much"], "val: expected a share below 1, such as 1% or 0.01, got 'much'"),
        ([good, *out, "--workers", "0"], "workers: at least 1, got 0"),
        ([good, *out, "--unit_bytes", "0"], "unit_bytes: at least 1, got 0"),
        ([good, *out, "--on_error", "ignore"], "on_error: expected fail | skip, got 'ignore'"),
        ([good, *out, "--vall", "1%"], "vall: there is no such key; did you mean val?"),
        ([good, *out, "--tokenizer", "train:257"], "--tokenizer train:257: N in train:N is the number of ids, at least 258; "
         "for example train:8192"),
        ([good, *out, "--tokenizer", "train:big"], "--tokenizer train:big: N in train:N is the number of ids, at least 258; "
         "for example train:8192"),
        ([good, *out, "--tokenizer", tmp / "sub"], f"--tokenizer {tmp}/sub: {tmp}/sub does not exist or is not a .tik"),
        ([good, *out, "--shards", "0"], "shards: expected a number, such as 100M or 2_000_000, got '0'"),
        ([good, *out, "--shards", "many"], "shards: expected a number, such as 100M or 2_000_000, got 'many'"),
        ([tmp / "x.json", *out], f"{tmp}/x.json: .json is not read; with one object per line add --format jsonl, "
         "as plain text add --format text"),
        ([good, "-o", good], f"-o {good}: exists and is not a folder; give another name"),
        ([good, "-o", good / "sub"], f"-o {good}/sub: cannot be written ({good}: Not a directory); choose another place"),
        ([tmp / "texts", "-o", tmp / "texts" / "out"], f"-o {tmp}/texts/out: lies inside the input folder {tmp}/texts, so that "
         f"the next run would read its own output; put it elsewhere, for example -o {tmp}/texts-tokens"),
        ([tmp / "texts", "-o", tmp / "texts"], f"-o {tmp}/texts: lies inside the input folder {tmp}/texts, so that "
         f"the next run would read its own output; put it elsewhere, for example -o {tmp}/texts-tokens"),
    ]  # fmt: skip


def test_bad_requests(prep: Callable[..., Result], tmp_path: Path) -> None:
    requests = bad_requests(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for words, says in requests:
        result = prep(*words)
        assert (result.code, result.out) == (2, ""), words
        assert result.err.startswith(f"error: {says}"), words
        assert result.err.count("\n") == 1, words
        assert sorted(tmp_path.rglob("*")) == before, words


def test_too_short_a_text_for_the_vocabulary(prep: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("rustbpe")
    write_jsonl(tmp_path / "in.jsonl", ["abcabc", "abc"])
    result = prep(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--tokenizer", "train:5000", "--val", "0")
    assert (result.code, result.err) == (
        2,
        "error: --tokenizer train:5000: the text is too short for so many ids; use --tokenizer train:260, or more text\n",
    )


def test_problems_are_reported_together(prep: Callable[..., Result], tmp_path: Path) -> None:
    result = prep(tmp_path / "a.txt", tmp_path / "b.txt", "-o", tmp_path / "out")
    assert result.err.splitlines()[0] == "error: 2 problems:"
    assert len(result.err.splitlines()) == 3


def test_a_dataset_is_not_a_source(prep: Callable[..., Result], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", stories(9))
    assert prep(tmp_path / "in.jsonl", "-o", tmp_path / "a").code == 0
    result = prep(tmp_path / "a", "-o", tmp_path / "b")
    assert result.err == f"error: {tmp_path}/a is a token dataset, not text; name the text that it was made from\n"


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("short")
    with pytest.raises(Exception, match="became shorter while it was read"):
        Piece(str(tmp_path / "in.txt"), 0, 100, WholeText()).read()


# ---------------------------------------------------------------------------------------------------- help and the demo


def test_help_names_every_option(prep: Callable[..., Result]) -> None:
    for word in ("--help", "-h"):
        result = prep(word)
        assert (result.code, result.out, result.err) == (0, usage() + "\n", "")
    for item in dataclasses.fields(PrepConfig):
        assert f"--{item.name} " in usage()
    assert len(max(usage().splitlines(), key=len)) <= 128


def test_nothing_asked_prints_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 2
    assert capsys.readouterr().out.startswith("usage: python -m prep.tokenize SRC... -o DIR")


def test_demo(prep: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it, but for the size of the corpus."""
    pytest.importorskip("rustbpe")
    import json as package

    folder = str(Path(package.__file__).parent)
    monkeypatch.setattr("prep.sources.sysconfig.get_path", lambda name: folder)
    monkeypatch.chdir(tmp_path)
    main(["--demo", "--workers", "1", "--tokenizer", "train:500"])
    assert load_tokenizer(tmp_path / "data" / "demo").vocab_size == 500
    assert any("def dumps" in text for text in documents_of(tmp_path / "data" / "demo", TRAIN))
    assert prep("--demo", "--tokenizer", "train:500").out.splitlines()[-1] == (
        "next: python -m accel_pretrain.train --config configs/demo.yaml"
    )
