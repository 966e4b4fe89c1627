"""``--stream``: what is fetched once, what is never fetched, and what must be fetched again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prep import hub
from prep.split import TRAIN
from tests.test_prep import Result, documents_of, prep, stories, write_jsonl  # noqa: F401 (a fixture)
from tests.test_prep_hub import datasets  # noqa: F401 (a fixture)
from tests.test_prep_sources import write_parquet

Prep = Callable[..., Result]
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def streamed(prep: Prep, source: Path, out: Path, *more: object) -> Result:  # noqa: F811
    return prep(f"hf:{source}", "--stream", "-o", out, "--val", "0", *more)


@pytest.fixture
def fetches(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """The text of every row that is fetched."""
    real, given = datasets.IterableDataset.__iter__, list[str]()

    def counting(self: Any) -> Any:
        for row in real(self):
            given.append(row["text"])
            yield row

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", counting)
    return given


def test_a_stream_of_binary_text(prep: Prep, tmp_path: Path, datasets: Any) -> None:  # noqa: F811
    """Bytes are text, as they are without --stream, and what is none is skipped by its line; --limit counts them."""
    values = ["zwölf".encode(), b"\xef\xbb\xbfmarked", *(text.encode() for text in stories(60)), b"no \xff text", None]
    pq.write_table(pa.table({"text": pa.array(values, pa.binary())}), tmp_path / "in.parquet")
    assert prep(f"hf:{tmp_path}/in.parquet", "-o", tmp_path / "whole", "--val", "0", "--on_error", "skip").code == 0
    result = streamed(prep, tmp_path / "in.parquet", tmp_path / "out", "--on_error", "skip")
    assert result.code == 0, result.err
    assert documents_of(tmp_path / "out", TRAIN) == documents_of(tmp_path / "whole", TRAIN) == ["zwölf", "marked", *stories(60)]
    assert "2 invalid documents skipped" in result.out
    assert ":63: byte " in result.out
    assert not (tmp_path / ".out.stream").exists()
    assert streamed(prep, tmp_path / "in.parquet", tmp_path / "some", "--limit", "500").code == 0
    assert 500 <= sum(map(len, documents_of(tmp_path / "some", TRAIN))) < 1000


def test_what_a_stream_holds_besides_text_is_no_text(prep: Prep, tmp_path: Path, datasets: Any) -> None:  # noqa: F811
    lines = [hub._line("text", value) for value in ("a", b"b", 3, 2.5, None, [1], {"x": b"y"})]
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines))
    result = prep(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--val", "0", "--on_error", "skip")
    assert documents_of(tmp_path / "out", TRAIN) == ["a", "b"]
    assert "5 invalid documents skipped" in result.out


@pytest.mark.parametrize("fresh", [True, False])
def test_stale_text_is_not_taken(prep: Prep, tmp_path: Path, fetches: list[str], fresh: bool) -> None:  # noqa: F811
    """A stream that was fetched, and of which the work was lost, is taken again only if its file is the same."""
    source, folder = write_parquet(tmp_path / "in.parquet", stories(40)), hub.stream_folder(tmp_path / "out")
    name = hub.HubName(str(source))
    paths = hub.fetch(name, "text", folder, None)
    assert (len(fetches), hub.fetch(name, "text", folder, None)) == (40, paths)
    assert len(fetches) == 40, "unchanged, it is not fetched again"
    if fresh:
        result = streamed(prep, source, tmp_path / "out", "--fresh")
        assert (result.code, len(fetches)) == (0, 80), result.err
        return
    write_parquet(source, stories(40, seed=1))
    result = streamed(prep, source, tmp_path / "out")
    assert result.code == 0, result.err
    assert "has changed since its text was fetched; fetching it anew" in result.err
    assert documents_of(tmp_path / "out", TRAIN) == stories(40, seed=1)


def test_nothing_is_fetched_in_vain(prep: Prep, tmp_path: Path, fetches: list[str]) -> None:  # noqa: F811
    source = write_parquet(tmp_path / "in.parquet", stories(40))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    assert "holds other files" in streamed(prep, source, tmp_path / "taken").err
    assert "--tokenizer nope: " in streamed(prep, source, tmp_path / "out", "--tokenizer", "nope").err
    assert not fetches
    assert streamed(prep, source, tmp_path / "out").code == 0
    assert len(fetches) == 40
    again = streamed(prep, source, tmp_path / "out")
    assert (again.code, len(fetches)) == (0, 40)
    assert "nothing to do" in again.out
    assert "(other clean)" in streamed(prep, source, tmp_path / "out", "--clean", "web").err
    assert len(fetches) == 40
    write_parquet(source, stories(40, seed=1))
    assert "(other text)" in streamed(prep, source, tmp_path / "out").err, "what changed is seen"


def test_a_plan_of_a_stream_keeps_nothing(prep: Prep, tmp_path: Path, fetches: list[str], monkeypatch: Any) -> None:  # noqa: F811
    monkeypatch.setattr(hub, "STREAM_FILE_BYTES", 2000)
    source = write_parquet(tmp_path / "in.parquet", stories(400))
    result = streamed(prep, source, tmp_path / "out", "--plan")
    assert result.code == 0, result.err
    assert "of an hf: stream, this is about the first" in result.out
    assert 5 < len(fetches) < 100
    assert set(os.listdir(tmp_path)) <= {"in.parquet", "cache"}  # of `datasets` itself
    assert streamed(prep, source, tmp_path / "out", "--limit", "1K").code == 0


def test_streams_of_like_names_do_not_meet(prep: Prep, tmp_path: Path, datasets: Any) -> None:  # noqa: F811
    (tmp_path / "a").mkdir()
    names = [write_jsonl(tmp_path / "a" / "b.jsonl", stories(9)), write_jsonl(tmp_path / "a_b.jsonl", stories(9, seed=1))]
    result = prep(*(f"hf:{name}" for name in names), "--stream", "-o", tmp_path / "out", "--val", "0")
    assert result.code == 0, result.err
    assert documents_of(tmp_path / "out", TRAIN) == stories(9) + stories(9, seed=1)
