"""Datasets of Hugging Face: folders of ``save_to_disk``, datasets by name, streams. Without a network, by the same code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prep import hub
from prep.split import TRAIN
from tests.test_prep import ROOT, Result, assert_same_files, documents_of, prep, stories, write_jsonl  # noqa: F401 (a fixture)
from tests.test_prep_sources import jsonl, trained_on, write_parquet

Prep = Callable[..., Result]
zstandard = pytest.importorskip("zstandard")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The package, without a network and with a cache of its own."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return package


# ---------------------------------------------------------------------------------------------------- datasets on disk


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_of_save_to_disk(prep: Prep, tmp_path: Path, datasets: Any, shards: int) -> None:  # noqa: F811
    texts = stories(2500)
    datasets.Dataset.from_dict({"id": list(range(2500)), "text": texts}).save_to_disk(tmp_path / "saved", num_shards=shards)
    for name in (tmp_path / "saved", f"hf:{tmp_path}/saved"):
        assert trained_on(prep, tmp_path, name, "--unit_bytes", "10000") == texts
    assert not (tmp_path / "cache").exists(), "the rows are read where they are"


def test_splits_of_a_saved_dataset(prep: Prep, tmp_path: Path, datasets: Any) -> None:  # noqa: F811
    splits = {name: datasets.Dataset.from_dict({"text": stories(9, seed)}) for seed, name in enumerate(["train", "test"])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert trained_on(prep, tmp_path, tmp_path / "saved") == stories(9)
    assert trained_on(prep, tmp_path, f"hf:{tmp_path}/saved::test") == stories(9, 1)
    assert trained_on(prep, tmp_path, tmp_path / "saved" / "test") == stories(9, 1)
    result = prep(f"hf:{tmp_path}/saved::dev", "-o", tmp_path / "other")
    assert result.err.startswith(f"error: {tmp_path}/saved: no split 'dev'; name one of train, test")


def test_a_saved_dataset_keeps_its_own_order(prep: Prep, tmp_path: Path, datasets: Any) -> None:  # noqa: F811
    shuffled = datasets.Dataset.from_dict({"text": stories(50)}).shuffle(seed=1)
    shuffled.save_to_disk(tmp_path / "saved")
    found = trained_on(prep, tmp_path, tmp_path / "saved")
    assert found == shuffled["text"][:] != stories(50)


def test_output_does_not_depend_on_the_workers(tmp_path: Path, datasets: Any) -> None:
    """Rows of Arrow and Parquet files and packed text, in spawned processes."""
    texts = stories(900)
    datasets.Dataset.from_dict({"text": texts[:300]}).save_to_disk(tmp_path / "saved")
    write_parquet(tmp_path / "b.parquet", texts[300:600], 40)
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(jsonl(texts[600:])))
    for workers in (1, 3):
        words = [tmp_path / "saved", tmp_path / "b.parquet", tmp_path / "c.jsonl.zst", "-o", tmp_path / f"out{workers}"]
        words += ["--tokenizer", "bytes", "--workers", workers, "--unit_bytes", 8000, "--val", "0", "--clean", "web"]
        command = [sys.executable, "-m", "prep.tokenize", *map(str, words)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert_same_files(tmp_path / "out1", tmp_path / "out3")
    assert documents_of(tmp_path / "out3", TRAIN) == texts


# ------------------------------------------------------------------------------------------------------------------ hf:


def local_hub(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", stories(30))
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", stories(30, seed=1))
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", stories(5, seed=2))
    return folder


@pytest.mark.parametrize("how", [(), ("--stream",)], ids=["map-style", "stream"])
def test_a_dataset_by_its_name(prep: Prep, tmp_path: Path, datasets: Any, how: tuple[str, ...]) -> None:  # noqa: F811
    """A folder in the layout of the hub, by the code that a name on the hub goes through."""
    folder = local_hub(tmp_path / "corpus")
    assert trained_on(prep, tmp_path, f"hf:{folder}", *how) == stories(30) + stories(30, seed=1)
    for name in (f"hf:{folder}::test", f"hf:{folder}:test", f"hf:{folder}:default:test"):
        assert trained_on(prep, tmp_path, name, *how) == stories(5, seed=2)
    for name, says in [
        (f"hf:{folder}:nope", f"hf:{folder}:nope: neither a configuration (default) nor a split (t"),
        (f"hf:{folder}:nope:train", f"hf:{folder}:nope:train: no configuration 'nope'; there are default"),
        (f"hf:{folder}::dev", f"hf:{folder}::dev: no split 'dev'; name one of "),
        ("hf:nobody/nothing", "hf:nobody/nothing: Couldn't reach 'nobody/nothing' on the Hub (Offline"),
        ("hf:a:b:c:d", "hf:a:b:c:d: expected hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT"),
    ]:
        result = prep(name, "-o", tmp_path / "other", *how)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert result.err.startswith(f"error: {says}"), result.err


@pytest.mark.parametrize("how", [(), ("--stream",)], ids=["map-style", "stream"])
def test_a_dataset_without_the_column(prep: Prep, tmp_path: Path, datasets: Any, how: tuple[str, ...]) -> None:  # noqa: F811
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.table({"blob_id": ["a"], "path": ["b"]}), tmp_path / "corpus" / "train.parquet")
    result = prep(f"hf:{tmp_path}/corpus", "-o", tmp_path / "out", *how)
    assert result.code == 2
    assert "no column 'text', and no other text: column 'blob_id' names contents that are kept elsewhere" in result.err
    assert "the columns are blob_id (string), path (string)" in result.err


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_file_that_datasets_loads(prep: Prep, tmp_path: Path, datasets: Any, suffix: str) -> None:  # noqa: F811
    texts = stories(20)
    path = tmp_path / f"a{suffix}"
    _ = write_parquet(path, texts) if suffix == ".parquet" else write_jsonl(path, stories(20))
    assert trained_on(prep, tmp_path, f"hf:{path}") == texts


def test_a_stream_goes_on_where_it_broke(prep: Prep, tmp_path: Path, datasets: Any, monkeypatch: Any) -> None:  # noqa: F811
    """What was fetched is not fetched again, and the text is that of an unbroken stream."""
    folder = local_hub(tmp_path / "corpus")
    texts = stories(30) + stories(30, seed=1)
    monkeypatch.setattr(hub, "STREAM_FILE_BYTES", 2000)
    real, given, budget = datasets.IterableDataset.__iter__, list[str](), [25]

    def breaking(self: Any) -> Any:
        for row in real(self):
            if not budget[0]:
                raise ConnectionError("the line is dead")
            budget[0] -= 1
            given.append(row["text"])
            yield row

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", breaking)
    words = (f"hf:{folder}", "-o", tmp_path / "out", "--stream", "--val", "0")
    broken = prep(*words)
    assert broken.code == 2
    assert "the line is dead" in broken.err
    assert "25 documents are fetched, and the same command goes on behind them" in broken.err
    kept = sorted(path.name for path in (tmp_path / ".out.stream").rglob("*.jsonl"))
    assert kept
    budget[0] = 1000
    assert prep(*words).code == 0
    assert documents_of(tmp_path / "out", TRAIN) == texts
    assert len(given) < 25 + 60, "the second run did not begin at the first document"
    assert not (tmp_path / ".out.stream").exists()


def test_a_stream_without_an_end_is_limited(prep: Prep, tmp_path: Path, datasets: Any) -> None:  # noqa: F811
    folder = local_hub(tmp_path / "corpus")
    found = trained_on(prep, tmp_path, f"hf:{folder}", "--stream", "--limit", "3K")
    assert found == stories(30)[: len(found)]
    assert 3000 <= sum(map(len, found)) < 4000


def test_what_was_fetched_for_another_request_is_not_taken(prep: Prep, tmp_path: Path, datasets: Any) -> None:  # noqa: F811
    folder = local_hub(tmp_path / "corpus")
    spool = hub.stream_folder(tmp_path / "out")
    name = hub.HubName(str(folder))
    paths = hub.fetch(name, "text", spool, 1000)
    assert hub.fetch(name, "text", spool, 1000) == paths
    result = prep(f"hf:{folder}", "-o", tmp_path / "out", "--stream", "--val", "0")
    assert result.code == 2
    assert result.err.startswith(f"error: {spool}/")
    assert "ask for the same again, or add --fresh to lose it" in result.err
    result = prep(f"hf:{folder}", "-o", tmp_path / "out", "--stream", "--val", "0", "--fresh")
    assert result.code == 0, result.err
    assert documents_of(tmp_path / "out", TRAIN) == stories(30) + stories(30, seed=1)
