"""The protocol by itself, without torch: what is sealed, found, pruned, moved away and mended."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accel_pretrain import commit
from accel_pretrain.commit import checkpoints, find_newest, go_back, problem_with, prune, read_pointer, resolve, sweep
from accel_pretrain.errors import CheckpointError, NoUsableCheckpointError, StorageError


def make(run_dir: Path, step: int, *, best: float | None = None, is_best: bool = False, content: str = "") -> Path:
    """Publish a checkpoint of small files as a run does it."""
    final = run_dir / f"checkpoint_{step:08d}"
    temporary = run_dir / f".tmp_{final.name}"
    (temporary / "tokenizer").mkdir(parents=True)
    (temporary / "weights").write_text(content or f"weights of {step}\n" * 100)
    (temporary / "tokenizer" / "words").write_text("a b c\n")
    (temporary / "trainer_state.json").write_text(json.dumps({"step": step, "best_val_loss": best}))
    commit.seal(temporary, commit.hash_files(temporary, commit.names_in(temporary)), {"step": step})
    commit.commit(temporary, final)
    for pointer in ("best", "latest") if is_best else ("latest",):
        commit.point(run_dir / pointer, final.name)
    return final


def damage(checkpoint: Path) -> None:
    (checkpoint / "weights").write_text("W" + (checkpoint / "weights").read_text()[1:])


def steps(run_dir: Path) -> list[int]:
    return [commit.step_of(path) for path in checkpoints(run_dir)]


def test_a_manifest_lists_names_sizes_and_hashes(tmp_path: Path) -> None:
    path = make(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == "accel_pretrain.checkpoint"
    assert manifest["step"] == 7
    assert manifest["files"]["tokenizer/words"] == {
        "bytes": 6,
        "sha256": commit.sha256_of(path / "tokenizer" / "words"),
    }
    assert problem_with(path) is None


@pytest.mark.parametrize("change", ["added", "missing"])
def test_what_was_not_announced_is_not_sealed(tmp_path: Path, change: str) -> None:
    (tmp_path / "weights").write_text("1")
    files = commit.hash_files(tmp_path, ["weights"])
    (tmp_path / "more").write_text("2") if change == "added" else (tmp_path / "weights").unlink()
    with pytest.raises(CheckpointError, match=r"not announced|is missing"):
        commit.seal(tmp_path, files)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    "plant",
    [
        lambda folder: (folder / "more").symlink_to("/etc/passwd"),
        lambda folder: (folder / "more").symlink_to("/etc"),
        lambda folder: os.mkfifo(folder / "more"),
        lambda folder: (folder / "tokenizer" / "more").symlink_to("words"),
    ],
)
def test_links_and_pipes_are_no_part_of_a_checkpoint(tmp_path: Path, plant: Callable[[Path], object]) -> None:
    path = make(tmp_path, 1)
    plant(path)
    assert "is not a plain file" in (problem_with(path) or "")


@pytest.mark.parametrize(
    "manifest",
    [
        "[" * 100_000,
        '{"format": "accel_pretrain.checkpoint", "files": {"weights": {"bytes": 1e999, "sha256": ""}}}',
        '{"format": "accel_pretrain.checkpoint", "files": []}',
        '{"format": "accel_pretrain.checkpoint", "files": {"../../secret": {"bytes": 1, "sha256": ""}}}',
        '{"format": 1}',
        "\udcff",
        " " * (commit._LARGEST_MANIFEST + 1),
    ],
)
def test_a_strange_manifest_is_a_line_and_not_a_traceback(tmp_path: Path, manifest: str) -> None:
    path = make(tmp_path, 1)
    (path / "manifest.json").write_bytes(manifest.encode(errors="surrogateescape"))
    assert problem_with(path) is not None


def test_the_damaged_are_moved_away_only_by_who_holds_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = make(tmp_path, 1, is_best=True), make(tmp_path, 2, is_best=True)
    damage(bad)
    with caplog.at_level(logging.WARNING):
        assert find_newest(tmp_path) == good
        assert bad.exists()
        assert find_newest(tmp_path, quarantine=True) == good
    assert "is damaged (weights was changed after it was written) and was moved to" in caplog.records[-1].getMessage()
    assert not bad.exists()
    assert (tmp_path / "quarantine" / bad.name / "weights").exists()
    assert read_pointer(tmp_path / "latest") == good.name
    damage(make(tmp_path, 2))
    assert find_newest(tmp_path, quarantine=True) == good
    assert len(list((tmp_path / "quarantine").iterdir())) == 2


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_what_the_reader_cannot_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2)

    def sha256_of(path: Path) -> str:
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(commit, "sha256_of", sha256_of)
    with pytest.raises(StorageError, match=rf"cannot be read \({os.strerror(error)}\); nothing was moved") as refusal:
        find_newest(tmp_path, quarantine=True)
    assert len(refusal.value.problems) == 1
    assert steps(tmp_path) == [2, 1]


def test_a_folder_that_cannot_be_listed_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, scandir = make(tmp_path, 1), os.scandir

    def listed(folder: Any) -> Any:
        if str(folder).endswith("tokenizer"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", listed)
    with pytest.raises(StorageError, match="tokenizer cannot be read"):
        problem_with(path)


def test_hidden_files_of_the_system_are_no_damage(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    for name in (".DS_Store", "._weights", "tokenizer/.nfs0001"):
        (path / name).write_text("x")
    assert problem_with(path) is None
    (path / "more").write_text("x")  # control
    assert problem_with(path) == "more is not part of it"


@pytest.mark.parametrize("how", ["renamed", "linked"])
def test_going_back_to_one_of_another_name(tmp_path: Path, how: str) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    other = tmp_path / "my best"
    path = tmp_path / "checkpoint_00000002"
    path.rename(other) if how == "renamed" else other.symlink_to(path.name)
    assert resolve(other) == other
    assert [path.name[-1] for path in go_back(tmp_path, other)] == ["3"]


def test_where_none_is_good_nothing_is_moved_and_the_run_does_not_begin_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        damage(make(tmp_path, step))
    for _ in range(2):  # also the second time
        with pytest.raises(NoUsableCheckpointError, match=r"no checkpoint in .* can be read") as refusal:
            find_newest(tmp_path, quarantine=True)
        assert refusal.value.exit_code == 4
        assert len(refusal.value.problems) == 4
    assert steps(tmp_path) == [2, 1]
    assert find_newest(tmp_path / "nothing", quarantine=True) is None  # control: an empty place is something else


def test_the_newest_the_best_the_pinned_and_the_protected_are_kept(tmp_path: Path) -> None:
    for step in range(1, 9):
        make(tmp_path, step, is_best=step == 2)
    (tmp_path / "pinned").write_text("checkpoint_00000003\n")
    prune(tmp_path, None)
    assert steps(tmp_path) == [8, 7, 6, 5, 4, 3, 2, 1]
    prune(tmp_path, 2, ["checkpoint_00000005"])
    assert steps(tmp_path) == [8, 7, 5, 3, 2]
    assert not list(tmp_path.glob(".*"))
    prune(tmp_path, 1)
    assert steps(tmp_path) == [8, 3, 2]


def test_nothing_is_removed_for_a_newest_one_that_is_not_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "checkpoint_00000003" / "weights").write_text("")
    prune(tmp_path, 1)
    assert steps(tmp_path) == [3, 2, 1]
    (tmp_path / "checkpoint_00000003").rename(tmp_path / "elsewhere")
    (make(tmp_path, 3) / "weights").stat()
    (tmp_path / "checkpoint_00000002" / "weights").write_text("")
    prune(tmp_path, 2)  # the second one does not count, and is left to who looks for the newest
    assert steps(tmp_path) == [3, 2, 1]


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    make(tmp_path, 1, content="old")
    path = make(tmp_path, 1, content="new")
    assert (path / "weights").read_text() == "new"
    assert problem_with(path) is None
    assert not list(tmp_path.glob(".*"))


def test_one_that_was_moved_aside_for_another_comes_back(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    trash = path.rename(tmp_path / ".trash_checkpoint_00000001")
    (tmp_path / ".tmp_checkpoint_00000001").mkdir()
    sweep(tmp_path)
    assert (steps(tmp_path), problem_with(path)) == ([1], None)
    path.rename(trash)
    damage(trash)  # control: what was being removed does not come back
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []  # nor does latest name anything


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    with pytest.raises(FileNotFoundError):
        commit.commit(tmp_path / "not there", path)
    assert find_newest(tmp_path) == path


def test_going_back_mends_the_pointers_even_when_it_is_interrupted(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.0), (4, 1.0)):
        make(tmp_path, step, best=loss, is_best=step != 3)
    assert [path.name[-1] for path in go_back(tmp_path, tmp_path / "checkpoint_00000003")] == ["4"]
    assert read_pointer(tmp_path / "latest") == "checkpoint_00000003"
    assert read_pointer(tmp_path / "best") == "checkpoint_00000002"
    (tmp_path / "checkpoint_00000003").rename(tmp_path / "set_aside_checkpoint_00000003")  # and killed right there
    (tmp_path / "best").write_text("checkpoint_00000003\n")
    sweep(tmp_path)
    assert resolve(tmp_path / "latest") == resolve(tmp_path / "best") == tmp_path / "checkpoint_00000002"
