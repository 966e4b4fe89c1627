"""Whatever somebody writes, or a disk makes of it: an answer or one clear refusal, within a second, and never a traceback.

3,200 inputs in ``make test``, 100,000 in ``make test-faults``. Half of them are real files with small damage: pure noise rarely
gets past the first check.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from accel_pretrain.checkpoint import read_model_config, read_state
from accel_pretrain.commit import problem_with
from accel_pretrain.config import RunConfig
from accel_pretrain.errors import CheckpointError, ConfigError, DataError, PretrainError
from accel_pretrain.metrics import cut_back, read_metrics
from accel_pretrain.pace import few_collections
from accel_pretrain.shards import open_split
from accel_pretrain.typed_yaml import leaves, load, parse_command_line
from tests.running import REPO, Train, newest

SECONDS = 1.0
CONFIGS = [path.read_bytes() for path in sorted((REPO / "configs").glob("*.yaml"))]
KEYS = sorted({*leaves(RunConfig), *(key.rpartition(".")[2] for key in leaves(RunConfig)), "model", "training", "nonsense"})
# What YAML 1.1 makes of these is not what a person means.
VALUES = [
    "6e-4", "off", "on", "no", "1:30", "017", "0o17", "0x1f", "1_000", ".5", "+1", "-0", ".inf", "-.inf", ".nan", "nan",
    "1e999", "~", "null", "", "''", '""', "2024-01-01", "=", "<<", "!!python/object/apply:os.system [id]",
    "!!binary aGk=", "!x y", "&a 1", "*a", "*missing", "[1, [2, [3]]]", "{a: {b: c}}", "[", "}", "- x", "|\n  text",
    ">\n  text", '"\\u0000"', '"\\ud800"', "\t", "9" * 400, "1" * 5000, "a" * 5000, "é", "\u2028", "true", "True",
    "adamw", "[data/a@0.7, data/b@0.3]", "@", "%", "`", "? :",
]  # fmt: skip

Check = Callable[[Any], bool]


def damaged(originals: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of some files, with a few bytes changed, cut out, or repeated."""
    edit = st.tuples(st.integers(0, 1 << 16), st.integers(0, 40), st.binary(max_size=6) | st.sampled_from(VALUES).map(encoded))

    def apply(original: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
        content = bytearray(original)
        for place, length, new in edits:
            place %= len(content) + 1
            content[place : place + length] = new
        return bytes(content)

    return st.builds(apply, st.sampled_from(originals), st.lists(edit, min_size=1, max_size=3))


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


lines = st.builds(
    "{}{}{}{}".format, st.sampled_from(["", "  ", "    ", "- ", "\t"]), st.sampled_from([*KEYS, *VALUES]),
    st.sampled_from([": ", ":", " ", ": &a ", ": *a "]), st.sampled_from(VALUES),
)  # fmt: skip
lines |= st.sampled_from(["model:", "training:", "---", "...", "# x"])
documents = st.lists(lines, max_size=8).map("\n".join).map(encoded)
words = st.builds(
    "{}{}{}{}".format, st.sampled_from(["--", "", "-", "---"]), st.sampled_from(KEYS), st.sampled_from(["=", " ", ""]),
    st.sampled_from(VALUES) | st.text(max_size=6),
)  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def changed_json(original: bytes) -> st.SearchStrategy[bytes]:
    """A JSON object with some of its values, at any depth, replaced by others or removed; or damaged as bytes."""
    document = json.loads(original)

    def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
        return [*([prefix] if prefix else []), *(path for key, own in inner for path in paths(own, (*prefix, key)))]

    def apply(edits: list[tuple[tuple[Any, ...], Any]]) -> bytes:
        new = json.loads(original)
        for path, value in edits:
            place = new
            try:
                for key in path[:-1]:
                    place = place[key]
                if value == "remove":
                    del place[path[-1]]
                else:
                    place[path[-1]] = value
            except (KeyError, IndexError, TypeError):
                pass  # an earlier edit has taken it away
        return json.dumps(new).encode()

    edits = st.lists(st.tuples(st.sampled_from(paths(document)), json_values | st.just("remove")), min_size=1, max_size=3)
    deep = st.sampled_from([b"[" * 20_000, b'{"a":' * 5_000, b"", b"null", b"1" * 10_000, b"\xff\xfe"])
    return edits.map(apply) | damaged([original]) | deep | st.just(original)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> dict[str, Path]:
    """A place of one's own to damage: a config, a dataset, a checkpoint and metrics, all of them real."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(dataset, folder / "data")
    return {"folder": folder, "data": folder / "data", "run": folder / "run"}


def accepts(call: Callable[[], Any], *errors: type[PretrainError]) -> bool:
    """Whether a call has an answer; a refusal is of one of these kinds, and says something."""
    refusal: PretrainError | None = None
    try:
        call()
    except errors as error:
        refusal = error
    if refusal is not None:
        assert refusal.problems
        assert all(problem.strip() for problem in refusal.problems)
        assert len(refusal.message) < 20_000
    return refusal is None


def checks(places: dict[str, Path]) -> dict[str, tuple[st.SearchStrategy[Any], Check]]:
    """For every kind of input how it is made, and what reads it."""
    file, data = places["folder"] / "c.yaml", places["data"]
    manifest = data / "manifest.json"
    checkpoint = newest(places["run"])
    sealed, state, model = (checkpoint / name for name in ("manifest.json", "trainer_state.json", "model.json"))
    metrics = places["folder"] / "metrics.jsonl"

    def reading(path: Path, call: Callable[[], Any], *errors: type[PretrainError]) -> Check:
        def check(content: bytes) -> bool:
            path.write_bytes(content)
            return accepts(call, *errors)

        return check

    def read_config() -> None:
        assert isinstance(load(RunConfig, file), RunConfig)

    def read_command(argv: list[str]) -> bool:
        return accepts(lambda: load(RunConfig, None, parse_command_line(RunConfig, argv).overrides), ConfigError)

    def verify(content: bytes) -> bool:
        """A manifest that is not the original's equal must not pass for a good one, and nothing may be raised."""
        sealed.write_bytes(content)
        return problem_with(checkpoint) is None

    def read_rows() -> None:
        rows = read_metrics(metrics)
        cut_back(metrics, 3)
        assert all(row["step"] <= 3 for row in read_metrics(metrics))
        assert len(read_metrics(metrics)) <= len(rows)

    originals = {path: path.read_bytes() for path in (manifest, sealed, state, model)}
    some_rows = b"".join(b'{"step": %d, "time": 1.5, "tokens": 9, "train/loss": 2.5}\n' % step for step in range(1, 6))
    return {
        "yaml": (documents, reading(file, read_config, ConfigError)),
        "configs": (damaged(CONFIGS) | st.binary(max_size=80), reading(file, read_config, ConfigError)),
        "overrides": (st.lists(words, max_size=5), read_command),
        "dataset": (changed_json(originals[manifest]), reading(manifest, lambda: open_split(data, "train"), DataError)),
        "checkpoint": (changed_json(originals[sealed]), verify),
        "state": (changed_json(originals[state]), reading(state, lambda: read_state(checkpoint), CheckpointError)),
        "model": (changed_json(originals[model]), reading(model, lambda: read_model_config(checkpoint), PretrainError)),
        "metrics": (damaged([some_rows]) | st.binary(max_size=80), reading(metrics, read_rows)),
    }  # fmt: skip


KINDS = ("yaml", "configs", "overrides", "dataset", "checkpoint", "state", "model", "metrics")


@pytest.mark.parametrize("examples", [400, pytest.param(12_500, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
@pytest.mark.parametrize("kind", KINDS)
def test_fuzz(kind: str, examples: int, places: dict[str, Path], run_train: Train) -> None:
    if not places["run"].exists():
        assert run_train(places["run"], "--max_iters", "2") == 0
    strategy, check = checks(places)[kind]
    outcomes: Counter[bool] = Counter()

    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )  # fmt: skip
    @given(strategy)
    def run(content: Any) -> None:
        begin = time.process_time()
        outcomes[check(content)] += 1
        assert time.process_time() - begin < SECONDS

    kept = {path: path.read_bytes() for path in places["folder"].rglob("*.json")}
    try:
        run()
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert outcomes.total() >= examples // 2
    assert outcomes[True] > 0, "nothing was accepted: what was tested?"
    assert outcomes[False] > 0 or kind == "metrics", "nothing was refused: what was tested?"


@pytest.mark.parametrize("kind", ["unbounded", "keys", "flat list", "section keys", "lines", "anchors"])
def test_the_largest_files_that_are_read_take_no_second(kind: str, tmp_path: Path) -> None:
    size = 64 << 10
    text = {
        "unbounded": "a" * 10 * size, "keys": "".join(f"k{n}: {n}\n" for n in range(size)), "flat list": "[" + "a," * size,
        "section keys": "model:\n" + "".join(f"  k{n}: {n}\n" for n in range(size)), "lines": "\n" * size,
        "anchors": "".join(f"a{n}: &a{n} x\n" for n in range(size)),
    }[kind]  # fmt: skip
    file = tmp_path / "c.yaml"
    file.write_text(text[:size] if kind != "unbounded" else text)
    with few_collections():  # of what the tests before have left
        begin = time.process_time()
        accepts(lambda: load(RunConfig, file), ConfigError)
        assert time.process_time() - begin < 2 * SECONDS


def test_control_a_traceback_or_an_empty_refusal_would_be_noticed() -> None:
    def fail(error: Exception) -> Callable[[], None]:
        def call() -> None:
            raise error

        return call

    assert not accepts(fail(ConfigError("x")), ConfigError)
    for error in (ValueError("x"), DataError("x"), ConfigError([]), ConfigError(" "), ConfigError("x" * 30_000)):
        with pytest.raises((ValueError, DataError, AssertionError)):
            accepts(fail(error), ConfigError)
