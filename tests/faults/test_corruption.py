"""No byte of a checkpoint changes unnoticed: the damaged one is put aside, the one before it is taken (F8); or none is (F9)."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from accel_pretrain import commit
from accel_pretrain.errors import CheckpointError, NoUsableCheckpointError
from tests.faults import training
from tests.faults.damage import DAMAGES, change_case, delete, flip, truncate
from tests.faults.harness import ForkServer
from tests.faults.tally import TALLY

KEPT = ["--keep_last", "5", "--eval_interval", "1000"]


@pytest.fixture(scope="module")
def trained(server: ForkServer, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 6 to 14."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    outcome = server.call(training.run, dataset, run_dir, [*training.SAVING, *KEPT])
    assert outcome.code == 0, outcome.output
    assert len(commit.checkpoints(run_dir)) == 5
    return run_dir


def digest(folder: Path) -> str:
    """Of the names, kinds and bytes of all that is in a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(f"{path.relative_to(folder)}\0{path.is_symlink()}\0{path.stat().st_mode}\0".encode())
        if path.is_file():  # to read a pipe would block
            found.update(path.stat().st_size.to_bytes(8) + path.read_bytes())
    return found.hexdigest()


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def silent(run_dir: Path, good: dict[str, str]) -> str | None:
    """Accepts ``run_dir`` as a start of training does; what was accepted though it is not what was saved."""
    found = commit.find_newest(run_dir, quarantine=True)
    return None if found is not None and digest(found) == good[found.name] else f"accepted {found}"


def corrupt(trained: Path, run_dir: Path, draw: random.Random, times: int) -> list[str]:
    """Damage files of the newest checkpoint, or of the newest two, in ``times`` places; says what was done."""
    done: list[str] = []
    while len(done) < times:
        newest = commit.checkpoints(run_dir)[draw.randrange(2) if times > 1 else 0]
        damage = draw.choice(DAMAGES)
        path = draw.choice(files_of(trained / newest.name))
        target = newest / path.relative_to(path.parents[len(path.relative_to(trained).parts) - 2])
        other = trained / "checkpoint_00000008" / target.relative_to(newest)
        if target.is_file() and not target.is_symlink() and damage(target, other, draw):
            done.append(f"{damage.__name__} {target.relative_to(run_dir)}")
    return done


@pytest.mark.parametrize("trials", [100, pytest.param(1000, marks=[pytest.mark.faults, pytest.mark.timeout(900)])])
def test_no_corruption_is_silent(trained: Path, scratch: Path, trials: int) -> None:
    good = {path.name: digest(path) for path in commit.checkpoints(trained)}
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    for trial in range(trials):
        run_dir = scratch / str(trial)
        shutil.copytree(trained, run_dir)
        done = corrupt(trained, run_dir, draw, times=draw.choice((1, 1, 1, 2, 3)))
        newest = "checkpoint_00000014"
        damaged = digest(run_dir / newest) != good[newest]  # a second corruption can mend the first
        problem = silent(run_dir, good)
        TALLY.add("corruptions")
        TALLY.silent += problem is not None
        assert problem is None, f"seed {seed}, trial {trial}, {done}: {problem}"
        assert (run_dir / "quarantine" / newest).exists() == damaged, done
        assert commit.read_pointer(run_dir / "latest") in good
        shutil.rmtree(run_dir)
    print(f"seed {seed}")


@pytest.mark.parametrize("missing", ["hashes", "names"])
def test_control_a_check_that_is_left_out_is_noticed(
    trained: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """Without the comparison of hashes, or of names, a corruption gets through; and the test above would say so."""
    good = {path.name: digest(path) for path in commit.checkpoints(trained)}
    shutil.copytree(trained, scratch / "run")
    newest = scratch / "run" / "checkpoint_00000014"
    if missing == "hashes":
        flip(newest / "optimizer.bin", newest, random.Random(0))
        whole = commit.problem_with
        monkeypatch.setattr(commit, "problem_with", lambda path, **_: whole(path, hashes=False))
    else:
        (newest / "extra.bin").write_bytes(b"extra")
        listed = set(commit._manifest_files(newest / commit.MANIFEST)) | {commit.MANIFEST}
        monkeypatch.setattr(commit, "names_in", lambda folder: listed)
    assert TALLY.mutant(silent(scratch / "run", good) is not None)


def test_other_rights_are_no_harm(trained: Path, scratch: Path) -> None:
    """A file's mode is not its content; one that cannot be read is refused in one line."""
    shutil.copytree(trained, scratch / "run")
    newest = scratch / "run" / "checkpoint_00000014"
    for mode in (0o600, 0o444, 0o666):
        (newest / "model.safetensors").chmod(mode)
        assert commit.find_newest(scratch / "run") == newest
    (newest / "model.safetensors").chmod(0)
    problem = commit.problem_with(newest)  # None for one who may read everything
    assert problem is None or problem == "it cannot be read (Permission denied)"


BAD: dict[str, Callable[[Path, Path, random.Random], bool]] = {
    "flipped": flip, "cut short": truncate, "deleted": delete, "renamed": change_case,
}  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_where_all_are_bad_nothing_begins_anew(
    server: ForkServer, dataset: Path, trained: Path, scratch: Path, how: str
) -> None:
    run_dir, draw = scratch / "run", random.Random(0)
    shutil.copytree(trained, run_dir)
    for path in commit.checkpoints(run_dir):
        assert BAD[how](path / "model.safetensors", path, draw)
    before = {path: digest(path) for path in commit.checkpoints(run_dir)}
    with pytest.raises(NoUsableCheckpointError):
        commit.find_newest(run_dir, quarantine=True)
    outcome = server.call(training.run, dataset, run_dir, [*training.SAVING, *KEPT])
    TALLY.add("runs without a good checkpoint")
    assert outcome.code == 4, outcome.output
    assert "error: " in outcome.output
    assert "Traceback" not in outcome.output
    assert {path: digest(path) for path in commit.checkpoints(run_dir)} == before
    with pytest.raises(CheckpointError):
        commit.resolve(run_dir)
