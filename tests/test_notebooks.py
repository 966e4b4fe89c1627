"""The notebooks: they hold the outputs of a run, name what exists, and run."""

from __future__ import annotations

import ast
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.running import REPO

PATHS = sorted((REPO / "notebooks").glob("*.ipynb"))
PICTURES = {"1_tour_of_the_code": 0, "2_training_dynamics": 3, "3_attention_maps": 1, "4_lr_and_batch_experiments": 2}
OWN = ("accel_pretrain", "prep")

Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8"))


def sources(book: Notebook) -> list[str]:
    """The text of every cell of code."""
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


def problems(book: Notebook) -> Iterator[str]:
    """What a reader would trip over: cells that were not run, errors, code that is none, names of ours that do not exist."""
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        yield "its cells were not run in order"
    for cell in code:
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"a cell ended in {output['ename']}"
            if output.get("name") == "stderr":
                yield f"a cell complained: {''.join(output['text'])[:200]}"
    known: dict[str, object] = {}
    for source in sources(book):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OWN:
                yield from imported(node, known)
    for source in sources(book):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = known.get(node.value.id)
                if isinstance(owner, ModuleType) and not hasattr(owner, node.attr):
                    yield f"{node.value.id}.{node.attr} does not exist"


def imported(node: ast.ImportFrom, known: dict[str, object]) -> Iterator[str]:
    """Import what a line imports, into ``known``; says what is not there."""
    assert node.module
    for alias in node.names:
        try:
            module = importlib.import_module(node.module)
            if not hasattr(module, alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")
            known[alias.asname or alias.name] = getattr(module, alias.name)
        except ImportError:
            yield f"{node.module}.{alias.name} does not exist"


def test_there_are_four():
    assert [path.stem for path in PATHS] == list(PICTURES)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_holds_what_it_says(path: Path):
    book = read(path)
    assert list(problems(book)) == []
    outputs = [output for cell in book["cells"] for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= PICTURES[path.stem]
    assert sum(output["output_type"] == "stream" for output in outputs) >= 5
    assert path.stat().st_size < 300_000
    assert "site-packages" not in path.read_text(encoding="utf-8")


def test_control_what_a_reader_would_trip_over_is_seen():
    book = read(PATHS[0])
    changes: list[tuple[str, Any]] = [
        ("from accel_pretrain.loss import no_such_loss", "accel_pretrain.loss.no_such_loss does not exist"),
        ("from accel_pretrain.no_such_room import x", "accel_pretrain.no_such_room.x does not exist"),
        ("from prep import tokenize\ntokenize.no_such_function()", "tokenize.no_such_function does not exist"),
    ]
    for source, problem in changes:
        changed = json.loads(json.dumps(book))
        next(cell for cell in changed["cells"] if cell["cell_type"] == "code")["source"] = [source]
        assert problem in list(problems(changed))
    failed = json.loads(json.dumps(book))
    cell = next(cell for cell in failed["cells"] if cell["cell_type"] == "code")
    cell["outputs"], cell["execution_count"] = [{"output_type": "error", "ename": "ValueError"}], None
    assert list(problems(failed)) == ["its cells were not run in order", "a cell ended in ValueError"]


def test_the_tour_runs(capsys: pytest.CaptureFixture[str]):
    """The quickest of them, cell by cell in this process; their own assertions check it."""
    names: dict[str, Any] = {}
    for number, source in enumerate(sources(read(PATHS[0])), 1):
        exec(compile(source, f"cell {number}", "exec"), names)
    shown = capsys.readouterr().out
    assert "two processes together read the same: True" in shown
    assert "def train_step(run: TrainingRun, state: TrainState) -> Update | None:" in shown


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a kernel of its own, as a person would; what it prints may be other numbers, and its assertions must hold."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]))
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(REPO)}}).execute()
    assert list(problems(json.loads(nbformat.writes(book)))) == []
