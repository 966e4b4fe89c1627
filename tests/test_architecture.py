"""Imports go downhill, torch stays out of where it is not needed, and functions and files stay readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each level may import the levels above it in this list, and its own.
LEVELS = (
    ("redaction", "errors", "files", "commit", "lock", "status", "look"),
    (
        *("yaml_files", "typed_values", "typed_keys", "typed_yaml", "manifest", "token_formats", "shards"),
        *("mixture", "split_patterns", "token_text", "tokenizer", "permutation", "schedule", "errorbars", "space"),
        *("batch_warmup", "packing", "curriculum"),
    ),
    (
        "models",
        "loss",
        "optim",
        "rules",
        "muon",
        "frugal",
        "schedule_free",
        "data",
        "estimates",
        "peaks",
        "hardware",
        "cluster",
        "probe",
        "update_costs",
        "pace",
    ),
    (
        "slurm",
        "launchers",
        "compiling",
        "launch_checks",
        "runtime",
        "stopping",
        "watchdog",
        "hindsight",
        "session",
        "metrics",
        "history",
        "curves",
        "system",
        "outbox",
        "trackers",
        "parallel",
        "peers",
        "machines",
        "checkpoint",
        "publish",
        "saver",
        "guard",
        "histograms",
        "aids",
    ),
    ("generate", "validation"),
    ("config", "agent", "preset", "outlook", "lint_settings", "lint_run", "lint"),
    (
        "foresight",
        "smoke",
        *("origin", "run", "branching", "recovery", "loop", "harness", "proofs", "trial", "ladder", "heldout"),
        *("one_batch", "inspection", "anomaly", "profiling", "debugging", "lr_find", "layer_maps"),
        "sweep_trials",
        *("report_facts", "report_figures", "report_page"),
    ),
    ("train", "evaluate", "sample", "plan", "tune", "sweep", "doctor", "hf", "plot", "report", "compare"),
)
TORCH_FREE = {*LEVELS[0], *LEVELS[1]}
ACCELERATE_FREE = TORCH_FREE | set(LEVELS[2])
ENTRY_POINTS = set(LEVELS[-1])
FOR_PREP = {"errors", "files", "lock", "look", "typed_yaml", "shards", "split_patterns", "tokenizer"}
LIBRARIES = {"torch", "accelerate"}

MAX_FUNCTION, MAX_FILE = 60, 350
# Where a limit is exceeded today, and by how much at most. Make these smaller; a new entry needs a reason.
LONGER_FILES: dict[str, int] = {}
LONGER_FUNCTIONS: dict[str, int] = {}
MAY_PRINT = {"accel_pretrain/errors.py", "accel_pretrain/hf/__main__.py"} | {
    f"accel_pretrain/{name}.py" for name in ENTRY_POINTS
}
# A new entry needs a reason; Slurm tells a task of an array its number in no other way.
MAY_READ_ENVIRONMENT = {
    "accel_pretrain/errors.py",
    "accel_pretrain/redaction.py",
    "accel_pretrain/launchers.py",
    "accel_pretrain/launch_checks.py",
    "accel_pretrain/runtime.py",
    "prep/runners.py",
}


def sources() -> dict[str, ast.Module]:
    """Every module of the product by its path, parsed."""
    paths = sorted(path for package in ("accel_pretrain", "prep") for path in (ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


SOURCES = sources()


def room(path: str) -> str:
    """The name under which a file stands in LEVELS: ``models`` for everything in that folder, ``hf`` likewise."""
    parts = Path(path).with_suffix("").parts
    return parts[1]


def imports_of(tree: ast.Module) -> Iterator[str]:
    """The dotted names of everything that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.Module, package: str) -> set[str]:
    found = {name.split(".")[1] for name in imports_of(tree) if name.startswith(f"{package}.")}
    return found - {"__version__"}


def level_of(name: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if name in names)


def uphill(path: str, tree: ast.Module) -> list[str]:
    """The imports of one module that break the rule."""
    if path.startswith("prep/"):
        return [name for name in own_imports(tree, "accel_pretrain") if name not in FOR_PREP]
    found = [name for name in own_imports(tree, "accel_pretrain") if level_of(name) > level_of(room(path))]
    found += [name for name in own_imports(tree, "accel_pretrain") if name in ENTRY_POINTS - {room(path)}]
    return found + [f"prep.{name}" for name in own_imports(tree, "prep")]


def modules(package: str) -> list[str]:
    return [path for path in SOURCES if path.startswith(f"{package}/") and not path.endswith("__init__.py")]


def test_every_module_has_a_level():
    assert {room(path) for path in modules("accel_pretrain")} <= {name for level in LEVELS for name in level}


@pytest.mark.parametrize("path", SOURCES)
def test_imports_go_downhill(path: str):
    if path != "accel_pretrain/__init__.py":
        assert uphill(path, SOURCES[path]) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("accel_pretrain/optim.py", "from accel_pretrain.config import RunConfig"),
        ("accel_pretrain/loop.py", "def f():\n    import accel_pretrain.train"),
        ("accel_pretrain/plot.py", "from accel_pretrain import train"),
        ("accel_pretrain/data.py", "from prep import tokenize"),
        ("prep/tokenize.py", "from accel_pretrain.data import Windows"),
    ],
)
def test_imports_control_sees_what_goes_uphill(path: str, source: str):
    assert len(uphill(path, ast.parse(source))) >= 1


def test_imports_have_no_cycle():
    graph = {room(path): own_imports(SOURCES[path], "accel_pretrain") - {room(path)} for path in modules("accel_pretrain")}
    graph["models"] = set().union(
        *(own_imports(SOURCES[path], "accel_pretrain") for path in modules("accel_pretrain") if room(path) == "models")
    ) - {"models"}
    while free := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in free:
            del graph[name]
    assert graph == {}


def names_imported(paths: list[str], library: str) -> list[str]:
    return [path for path in paths if any(name.split(".")[0] == library for name in imports_of(SOURCES[path]))]


def test_torch_and_accelerate_are_named_only_where_they_belong():
    own = modules("accel_pretrain")
    assert names_imported([path for path in own if room(path) in TORCH_FREE] + modules("prep"), "torch") == []
    assert names_imported([path for path in own if room(path) in ACCELERATE_FREE] + modules("prep"), "accelerate") == []
    assert names_imported(own, "accelerate")  # control


def loaded_after(names: list[str], libraries: set[str]) -> set[str]:
    """Which of ``libraries`` a fresh interpreter has loaded after importing ``names``, itself or through others."""
    program = f"import sys\nfor name in {names!r}: __import__(name)\nprint(*({libraries!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_torch_is_not_loaded_by_what_must_do_without():
    names = [f"accel_pretrain.{name}" for name in sorted(TORCH_FREE)]
    names += [path.removesuffix(".py").replace("/", ".") for path in modules("prep")]
    assert loaded_after(names, LIBRARIES) == set()


def test_accelerate_is_not_loaded_by_the_model_and_the_data():
    assert loaded_after([f"accel_pretrain.{name}" for name in sorted(ACCELERATE_FREE)], LIBRARIES) == {"torch"}  # a control too


def test_the_package_itself_imports_nothing():
    assert list(imports_of(SOURCES["accel_pretrain/__init__.py"])) == []


def length(node: ast.AST) -> int:
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def long_functions(tree: ast.Module, limit: int) -> dict[str, int]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node.name: length(node) for node in functions if length(node) > limit}


@pytest.mark.parametrize("path", SOURCES)
def test_functions_and_files_are_short(path: str):
    too_long = {f"{path}:{name}": lines for name, lines in long_functions(SOURCES[path], MAX_FUNCTION).items()}
    assert {name: lines for name, lines in too_long.items() if lines > LONGER_FUNCTIONS.get(name, 0)} == {}
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= LONGER_FILES.get(path, MAX_FILE)


def test_allow_lists_hold_only_what_needs_them():
    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in LONGER_FILES}
    assert all(count > MAX_FILE for count in lines.values())
    functions = {f"{path}:{name}" for path, tree in SOURCES.items() for name in long_functions(tree, MAX_FUNCTION)}
    assert set(LONGER_FUNCTIONS) <= functions


def prints(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(tree))


def reads_environment(tree: ast.Module) -> bool:
    names = {"environ", "environb", "getenv", "putenv"}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return bool(names & attributes) or any(name.split(".")[-1] in names for name in imports_of(tree))


def test_nothing_prints_but_programs_and_their_errors():
    allowed = MAY_PRINT | set(modules("prep"))
    assert [path for path, tree in SOURCES.items() if prints(tree) and path not in allowed] == []


def test_environment_variables_are_read_in_one_place():
    assert [path for path, tree in SOURCES.items() if reads_environment(tree) and path not in MAY_READ_ENVIRONMENT] == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (prints, "print('x')"),
        (prints, "def f():\n    g = print"),
        (reads_environment, "import os\nos.environ['A']"),
        (reads_environment, "from os import getenv"),
        (lambda tree: bool(long_functions(tree, 2)), "def f():\n    a = 1\n    return a"),
    ],
)
def test_rules_control(rule: Callable[[ast.Module], bool], source: str):
    assert rule(ast.parse(source))
    assert not rule(ast.parse("import sys\nsys.stdout.write('x')"))


def test_no_module_of_prep_takes_the_name_of_a_standard_one():
    taken = {Path(path).stem for path in modules("prep")} & sys.stdlib_module_names
    assert taken <= {"tokenize"}  # the command's name; it is run with -m
