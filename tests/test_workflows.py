"""What shows a feature (:mod:`tests.features`) is there; and the workflows that have no test elsewhere are run here as told."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import numpy as np
import pytest

from accel_pretrain import plot, sample, train
from accel_pretrain.data import TokenBatches
from accel_pretrain.shards import open_split
from prep import tokenize
from tests.features import DOCUMENTS, NOT_SHOWN
from tests.running import REPO, TINY, rows, stdlib_text

README = " ".join((REPO / "README.md").read_text(encoding="utf-8").split())


def proofs_of(text: str) -> list[str]:
    """The tests, and the text behind ``README``, of one line of a table."""
    tests, readme, line = text.partition("README: ")
    return [*tests.split(), *([f"README: {line}"] if readme else [])]


@functools.cache
def names_in(room: str) -> frozenset[str]:
    """The names of the tests in ``tests/test_room.py``, without ``test_``."""
    path = REPO / "tests" / f"test_{room}.py"
    if not path.is_file():
        return frozenset()
    functions = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    return frozenset(node.name.removeprefix("test_") for node in functions if node.name.startswith("test_"))


def holds(proof: str) -> bool:
    """Whether there is such a test, or such a line."""
    if proof.startswith("README: "):
        return proof.removeprefix("README: ") in README
    room, _, name = proof.partition("::")
    return name in names_in(room)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_feature_is_shown(document: str):
    table = DOCUMENTS[document]
    assert all(proofs_of(text) for text in table.values())
    assert {line: proof for line, text in table.items() for proof in proofs_of(text) if not holds(proof)} == {}


def test_what_nothing_shows_is_in_no_table():
    assert not any(line in table for line in NOT_SHOWN for table in DOCUMENTS.values())
    assert len(NOT_SHOWN) <= 4  # may only become fewer


def test_control_what_is_not_there_is_seen():
    assert not holds("seed_000::11_does_not_exist")
    assert not holds("no_such_room::01_config_system")
    assert not holds("README: pretrains by itself")
    assert sum(map(len, DOCUMENTS.values())) > 200


# ----------------------------------------------------------------------------------------------- workflows as they are told

FRAME = """The Project Gutenberg eBook of A Library

This eBook is for the use of anyone anywhere in the United States and most other parts of the world.

*** START OF THE PROJECT GUTENBERG EBOOK A LIBRARY ***

{}

*** END OF THE PROJECT GUTENBERG EBOOK A LIBRARY ***

Updated editions will replace the previous one. Project Gutenberg trademark, donations, license.
"""


def test_a_book_becomes_a_model_that_speaks_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The simple script of document 003: books, a split, a small model, samples on the way, a picture of the losses."""
    prose = "\n\n".join(part for part in stdlib_text(200_000).split("\n\n") if part.strip() and "*" not in part)[:60_000]
    for number in range(2):
        book = prose[number * 30_000 : (number + 1) * 30_000]
        (tmp_path / f"{number}.txt").write_text(FRAME.format(book), encoding="utf-8")
    data, run = tmp_path / "data", tmp_path / "run"
    books = [str(tmp_path / f"{number}.txt") for number in range(2)]
    tokenize.main([*books, "-o", str(data), "--clean", "gutenberg", "--tokenizer", "bytes", "--val", "40%"])
    text = bytes(id for part in ("train", "val") for id in open_split(data, part).files[0].tolist() if id < 256).decode()
    assert "Gutenberg" not in text
    assert "import" in text
    amounts = ["--max_iters", "60", "--log_interval", "20", "--eval_interval", "30", "--sample_interval", "30"]
    paths = ["--train_data_path", str(data), "--checkpoint_dir", str(run)]
    assert train.main([*paths, *TINY, *amounts, "--sample_prompts", "import"]) == 0
    losses = [row["eval/val_loss"] for row in rows(run) if "eval/val_loss" in row]
    assert len(losses) == 2
    assert losses[-1] < losses[0] < 5.0
    assert len((run / "samples.jsonl").read_text().splitlines()) == 2
    assert plot.main([str(run)]) == 0
    assert (run / "plot.png").stat().st_size > 10_000
    capsys.readouterr()
    assert sample.main(["--checkpoint", str(run), "--prompt", "import", "--max_new_tokens", "20"]) == 0
    assert capsys.readouterr().out.startswith("import")


def test_reading_keeps_no_copy_of_the_data(tmp_path: Path):
    """Of 200 MB of ids, read all over, no process keeps its own: the pages are the operating system's."""

    def own_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    path = tmp_path / "train.bin"
    with path.open("wb") as file:
        file.truncate(200_000_000)
    reader = TokenBatches(open_split(path, "train"), context_length=256, batch_size=16, seed=0, sampling="random")
    reader.micro_batches(0)
    before = own_bytes()
    for update in range(2000):
        reader.micro_batches(16 * update)
    assert own_bytes() - before < 20_000_000
    kept = [np.fromfile(path, dtype=np.uint16)]  # control: what a copy of it all would look like
    kept[0] += 1
    assert own_bytes() - before > 150_000_000
