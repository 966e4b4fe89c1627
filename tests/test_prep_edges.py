"""What a careful user runs into only once: val files, folders with holes, odd terminals, odd tables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prep import learn
from prep.columns import BrokenFile
from prep.config import PrepConfig
from prep.sources import find_sources
from prep.split import TRAIN, VAL, SplitRule
from prep.units import plan_units
from tests.test_prep import ROOT, Result, command, documents_of, manifest_of, prep, stories, write_folder, write_jsonl  # noqa: F401
from tests.test_prep_sources import write_parquet

Prep = Callable[..., Result]
pa = pytest.importorskip("pyarrow")

# ------------------------------------------------------------------------------------------------------------- val files


def test_several_val_files(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    files = [write_jsonl(tmp_path / f"{n}.jsonl", stories(5, seed=n)) for n in range(3)]
    for words in (["--val_file", f"{files[1]},{files[2]}"], ["--val_file", files[1], "--val-file", files[2]]):
        assert prep(files[0], *words, "-o", tmp_path / "out", "--overwrite").code == 0
        assert documents_of(tmp_path / "out", TRAIN) == stories(5)
        assert documents_of(tmp_path / "out", VAL) == stories(5, seed=1) + stories(5, seed=2)


def test_a_val_file_too_many_is_no_train_data(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    files = [write_jsonl(tmp_path / f"{n}.jsonl", stories(5, seed=n)) for n in range(3)]
    result = prep(files[0], "--val_file", files[1], files[2], "-o", tmp_path / "out")
    assert result.code == 2
    assert f"several val files as --val_file {files[1]},{files[2]}" in result.err
    assert prep("--val_file", files[1], "-o", tmp_path / "out", files[0]).code == 0, "between them stood another option"
    assert prep(f"--val_file={files[1]}", files[0], "-o", tmp_path / "out").code == 0


# --------------------------------------------------------------------------------------------------- folders and patterns


def test_what_a_folder_leaves_out_is_said(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    folder = write_folder(tmp_path / "in", stories(3))
    for name in ("a.csv", "b.csv", "c.png", "Makefile", ".hidden.txt"):
        (folder / name).write_text("x")
    (folder / "sub").mkdir()
    (folder / "sub" / "loop").symlink_to("..")
    result = prep(folder, "-o", tmp_path / "out", "--val", "0")
    assert result.err == (
        f"note: {folder}: left out 2 .csv, 1 hidden, 1 linked folders, 1 without a suffix, 1 .png; to read more, name it, "
        f"or use a quoted glob, such as '{folder}/**/*.csv'\n"
    )
    assert documents_of(tmp_path / "out", TRAIN) == stories(3)


def test_a_folder_that_cannot_be_read() -> None:
    """As another user than root, for whom everything can be."""
    script = (
        "import os, sys\nfrom prep.config import PrepConfig\nfrom prep.sources import find_sources\n"
        "from accel_pretrain.errors import reported\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "with reported():\n"
        "    (source,) = find_sources([sys.argv[1]], PrepConfig(on_error=sys.argv[2]))\n"
        "    print([type(file.reader).__name__ for file in source.files])\n"
    )
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        folder = write_folder(Path(name) / "in", stories(3))
        (folder / "closed").mkdir()
        (folder / "closed" / "x.txt").write_text("x")
        (folder / "closed").chmod(0)
        fail, skip = (
            subprocess.run([sys.executable, "-c", script, str(folder), how], cwd=ROOT, capture_output=True, text=True)
            for how in ("fail", "skip")
        )
        (folder / "closed").chmod(0o755)
    assert (fail.returncode, fail.stderr) == (2, f"error: {folder}/closed: cannot be read (Permission denied)\n")
    assert skip.stdout == "['WholeText', 'WholeText', 'WholeText', 'BrokenFile']\n", skip.stderr


def test_a_pattern_follows_no_loop_and_not_its_own_output(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    folder = write_folder(tmp_path / "in", stories(3))
    for name in ("one", "two"):
        (folder / name).symlink_to(".")  # two of them: a walk that follows them never ends
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("hidden")
    for pattern in ("**/*.txt", "**", "**/*"):
        assert prep(folder / pattern, "-o", tmp_path / "out", "--val", "0", "--overwrite").code == 0
        assert documents_of(tmp_path / "out", TRAIN) == stories(3)
    assert "hidden" not in str(prep(folder / "*.txt", "-o", tmp_path / "out", "--plan").err)
    result = prep(folder / "*", "-o", folder / "out")
    assert result.code == 2
    assert "is one of the files that" in result.err


def test_a_plan_needs_no_place(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    result = prep(write_jsonl(tmp_path / "in.jsonl", stories(50)), "--plan")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("plan: 1 files, ")


def test_a_separator_that_is_nowhere_is_mentioned(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "in.txt").write_text("\n--\n".join(stories(5)))
    words = (tmp_path / "in.txt", "-o", tmp_path / "out", "--overwrite", "--val", "0", "--doc_sep")
    assert "note: --doc_sep '==' seems to stand in none of the 1 files" in prep(*words, "==").out
    assert "--doc_sep" not in prep(*words, "--", "--dedup", "exact").out


# -------------------------------------------------------------------------------------------------- terminals and signals


def test_odd_names_and_odd_terminals(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"odd\xfe.txt")).write_bytes(b"\xff")
    (tmp_path / "good.txt").write_text("\n".join(stories(20)))
    words = command(os.fsdecode(b"odd\xfe.txt"), "good.txt", "-o", "out", "--on_error", "skip", "--tokenizer", "bytes")
    for encoding, module in (("utf-8:strict", words), ("ascii", [sys.executable, "-m", "prep.describe", "out"])):
        environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(module, cwd=tmp_path, env=environment, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
        assert (rb"odd\udcfe.txt:1: byte 0" if module is words else rb"\u2588") in done.stdout


def test_closed_standard_input(tmp_path: Path) -> None:
    words = " ".join(command("-", "-o", tmp_path / "out", "--tokenizer", "bytes"))
    done = subprocess.run(["sh", "-c", f"{words} <&-"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr[:36]) == (2, "error: -: standard input is closed; ")


def test_ctrl_c_while_modules_are_imported() -> None:
    script = (
        "import os, runpy, signal, sys\n"
        "class CtrlC:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'prep.pipeline': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, CtrlC())\n"
        "runpy.run_module('prep.tokenize', run_name=sys.argv[1])\n"
    )
    for name, code, said in (("__main__", -signal.SIGINT, False), ("other", -signal.SIGINT, True)):
        done = subprocess.run([sys.executable, "-c", script, name], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code
        assert ("KeyboardInterrupt" in done.stderr) == said


# ------------------------------------------------------------------------------------------------------------ the learner


def test_a_long_word_is_learned_in_parts(tmp_path: Path) -> None:
    text = "x" * 2500 + " _" + "=" * 2500 + " short words stay together " + "y" * 999
    parts = learn._digestible(text)
    assert "".join(parts) == text
    assert max(map(len, parts)) < 2100
    assert [len(part) for part in parts[:2]] == [1000, 1000]
    assert parts[-1].endswith("y" * 999)
    assert learn._digestible("words " * 5000) == ["words " * 5000], "the control"


@pytest.mark.parametrize("trainer", ["gigatoken", "rustbpe"])
def test_one_unbroken_run_can_be_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str) -> None:
    pytest.importorskip(trainer)
    monkeypatch.setattr(learn, "_trainer", lambda spec: getattr(learn, f"_with_{trainer}"))
    (tmp_path / "in.txt").write_text("A" * 2_000_000)
    write_jsonl(tmp_path / "in.jsonl", stories(300))
    sources = find_sources([str(tmp_path / "in.txt"), str(tmp_path / "in.jsonl")], PrepConfig())
    started = time.monotonic()
    tokenizer = learn.learn_tokenizer("train:300", plan_units(sources, 10**7), SplitRule())
    assert tokenizer.vocab_size == 300
    assert time.monotonic() - started < 30


def _forever(texts: Any, size: int) -> dict[bytes, int]:
    time.sleep(600)
    return {}


def _killed(texts: Any, size: int) -> dict[bytes, int]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_learning_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    monkeypatch.setattr(learn, "_trainer", lambda spec: _forever)

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        with pytest.raises(KeyboardInterrupt):
            learn.learn_tokenizer("train:300", [], SplitRule())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not multiprocessing.active_children()


def test_a_learner_that_dies_is_reported(prep: Prep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(learn, "_trainer", lambda spec: _killed)
    result = prep(write_jsonl(tmp_path / "in.jsonl", stories(50)), "-o", tmp_path / "out", "--tokenizer", "train:300")
    assert result.code == 2
    assert "--tokenizer train:300: cannot be learned from this text (its process ended with code -9" in result.err


# ----------------------------------------------------------------------------------------------------------------- tables


def arrow_file(path: Path, texts: list[str]) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": texts}), max_chunksize=100)
    return path


def test_damaged_arrow_files(tmp_path: Path) -> None:
    """Whatever bytes are flipped: documents or bad documents come out, no crash; in a process that could."""
    texts = stories(200)
    clean = arrow_file(tmp_path / "clean.arrow", texts).read_bytes()
    offsets = clean.index(
        len(texts[0].encode()).to_bytes(4, "little") + len((texts[0] + texts[1]).encode()).to_bytes(4, "little")
    )
    for number, at in enumerate([offsets + 4 * row + 2 for row in (0, 50, 98, 99)]):
        damaged = bytearray(clean)
        damaged[at : at + 2] = b"\xfe\x7f"
        (tmp_path / f"{number}.arrow").write_bytes(damaged)
    script = (
        "import sys\nfrom prep.columns import ArrowRows\n"
        "for path in sys.argv[1:]:\n"
        "    found = [document for piece in ArrowRows('text').pieces(path, 10**6, 1000) for document in piece.documents()]\n"
        "    bad = [document.problem for document in found if hasattr(document, 'reason')]\n"
        "    print(len(found), len(bad), bad and bad[0])\n"
    )
    names = ["clean.arrow", "0.arrow", "1.arrow", "2.arrow"]
    (source,) = find_sources([str(tmp_path / "3.arrow")], PrepConfig(on_error="skip"))
    assert isinstance(source.files[0].reader, BrokenFile), "its length is wrong, which is seen when it is opened"
    done = subprocess.run(
        [sys.executable, "-c", script, *names],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "200 0 []"
    for name, row, line in zip(names[1:], (1, 51, 99), lines[1:], strict=True):
        assert line.startswith(f"200 2 {name}:row {row}: damaged file ("), line


def test_a_parquet_file_that_was_only_touched_is_the_same(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    path = write_parquet(tmp_path / "in.parquet", stories(50))
    words = (path, "-o", tmp_path / "out")
    assert prep(*words).code == 0
    os.utime(path, (1, 1))
    assert "nothing to do" in prep(*words).out
    write_parquet(path, [*stories(49), stories(50)[49].replace("a", "b")])
    assert "(other text)" in prep(*words).err


def test_huge_numbers_in_other_columns(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "in.jsonl").write_text(f'{{"n": {"7" * 5000}, "text": "a"}}\n{{"text": {"7" * 5000}}}\n{{"text": "b"}}\n')
    result = prep(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--val", "0", "--on_error", "skip")
    assert documents_of(tmp_path / "out", TRAIN) == ["a", "b"]
    assert "column 'text' holds float, not text" in result.out


def test_utf_32_has_its_name(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    for encoding, name in (("utf-32", "UTF-32"), ("utf-16", "UTF-16")):
        (tmp_path / "in.txt").write_text("some text", encoding=encoding)
        assert f"{name} text; convert it: iconv -f {name}" in prep(tmp_path / "in.txt", "-o", tmp_path / "out").err


def test_the_summary_counts_text_not_files(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    import gzip

    (tmp_path / "in.txt.gz").write_bytes(gzip.compress(b"word " * 1_000_000))
    result = prep(tmp_path / "in.txt.gz", "-o", tmp_path / "out", "--val", "0", "--max_expansion", "5000")
    assert f"{tmp_path / 'out'}: 5.0 MB of text" in result.out
