"""Folders that are whole or do not exist: how a checkpoint is published, verified, found and removed. Standard library only.

Publishing is a protocol, and a crash between any two of its steps leaves the old checkpoints or the old and the new one:

1. everything is written into ``.tmp_checkpoint_...``, where nobody looks (:mod:`accel_pretrain.checkpoint`);
2. :func:`hash_files` flushes every file to the disk and hashes it;
3. :func:`seal` compares what is there with what was announced, and writes ``manifest.json``, last;
4. :func:`commit` renames the folder. **This is the moment from which the checkpoint exists**;
5. :func:`point` lets ``best``, ``stable`` and ``latest`` name it, and only then :func:`prune` removes old ones.

A folder without a manifest that verifies is not a checkpoint. Whoever holds the run directory clears away what was interrupted
(:func:`sweep`), moves damaged checkpoints to ``quarantine/`` (:func:`find_newest`), and sets the future aside when it goes back
(:func:`go_back`); readers only read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accel_pretrain.errors import CheckpointError, NoUsableCheckpointError, StorageError
from accel_pretrain.files import sha256_of, sync_folder, write_whole

MANIFEST, STATE = "manifest.json", "trainer_state.json"
FORMAT, VERSION = "accel_pretrain.checkpoint", 2
QUARANTINE, PINNED = "quarantine", "pinned"
_NAME = re.compile(r"checkpoint_(\d{8,18})")
_LEGACY_NAME = re.compile(r"checkpoint(?:_iter)?_(\d{1,18})(?:\.pt)?")  # how earlier training programs called theirs
_THREADS = 4  # a checkpoint has two large files, or as many per process
_LARGEST_MANIFEST = 16 * 2**20  # bytes
_log = logging.getLogger(__name__)

Files = dict[str, dict[str, Any]]  # by name, relative to the checkpoint: {"bytes": size, "sha256": hexadecimal}


# ------------------------------------------------------------------------------------------------------------ publishing


def hash_files(folder: Path, names: Iterable[str]) -> Files:
    """Make files of ``folder`` durable, and as readable as the folder itself; their sizes and SHA-256, for :func:`seal`."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666  # as the umask has it; safetensors makes files for their owner only

    def flush(path: Path) -> None:
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    sizes = {name: (folder / name).stat().st_size for name in sorted(names)}
    largest_first = sorted(sizes, key=lambda name: -sizes[name])
    with ThreadPoolExecutor(_THREADS) as pool:  # the disk and the processor at once
        work = {name: (pool.submit(flush, folder / name), pool.submit(sha256_of, folder / name)) for name in largest_first}
        for flushed, _ in work.values():
            flushed.result()
        return {name: {"bytes": size, "sha256": work[name][1].result()} for name, size in sizes.items()}


def names_in(folder: Path) -> set[str]:
    """Every file beneath ``folder``, relative to it. :class:`CheckpointError` for what is neither a file nor a folder."""
    found: set[str] = set()
    unlisted: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=unlisted.append):
        for name in (*folders, *files):
            path = Path(parent, name)
            kind = path.lstat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise CheckpointError(f"{path.relative_to(folder).as_posix()} is not a plain file")
        found |= {Path(parent, name).relative_to(folder).as_posix() for name in files}
    if unlisted:  # must not look as if it were not there
        raise unlisted[0]
    return {name for name in found if "/." not in f"/{name}"}  # .DS_Store, ._x, .nfs0001: the system's, and nothing loads them


def seal(folder: Path, files: Files, facts: Mapping[str, Any] | None = None) -> None:
    """Write the manifest: ``files``, which must be exactly those that are there, and ``facts`` for people. Durable."""
    if odd := sorted(names_in(folder) ^ set(files)):
        raise CheckpointError(f"{folder}: {odd[0]} was {'announced and is missing' if odd[0] in files else 'not announced'}")
    document = {"format": FORMAT, "version": VERSION, **(facts or {}), "files": files}
    with (folder / MANIFEST).open("x", encoding="utf-8") as file:
        file.write(manifest_text(document))
        file.flush()
        os.fsync(file.fileno())
    for parent, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(parent))


def manifest_text(document: dict[str, Any]) -> str:
    """A manifest as it is written: with a hash of its own, so that none of its bits changes unnoticed either."""
    sha256 = hashlib.sha256(json.dumps(document).encode()).hexdigest()
    return json.dumps({**document, "sha256": sha256}, indent=2) + "\n"


def commit(temporary: Path, final: Path) -> None:
    """Give the sealed folder its name, durably. One that has it is moved aside first, where :func:`sweep` finds it."""
    trash = _trash_of(final)
    replaces = final.exists()
    if replaces:  # the same step again
        shutil.rmtree(trash, ignore_errors=True)
        final.rename(trash)
    try:
        temporary.rename(final)
    except OSError:
        if replaces:
            trash.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(trash, ignore_errors=True)


def point(pointer: Path, name: str) -> None:
    """Let ``latest``, ``best`` or ``stable`` name a checkpoint."""
    write_whole(pointer, f"{name}\n".encode())


def read_pointer(pointer: Path) -> str | None:
    """The name in ``latest``, ``best`` or ``stable``; None where there is none or it is not a checkpoint's."""
    try:
        with pointer.open(encoding="utf-8") as file:
            name = file.read(100).strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if _NAME.fullmatch(name) else None


def pinned(run_dir: Path) -> set[str]:
    """The checkpoints that a person wants to keep: their names are lines of the file ``pinned``, made by hand."""
    try:
        return set((run_dir / PINNED).read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return set()


def prune(run_dir: Path, keep_last: int | None, protected: Collection[str] = ()) -> None:
    """Remove all but the newest ``keep_last`` checkpoints, the best, the stable, the pinned, and those in ``protected``.

    A folder that is visibly no checkpoint (names, sizes) does not count, and is left to :func:`find_newest`. Nothing is removed
    unless the newest one is whole. What cannot be removed costs a warning.
    """
    if keep_last is None:
        return
    existing = checkpoints(run_dir)
    if not existing or problem_with(existing[0], hashes=False) is not None:
        return
    keep = {*protected, *pinned(run_dir), *(read_pointer(run_dir / pointer) for pointer in ("best", "stable"))}
    for path in [path for path in existing if problem_with(path, hashes=False) is None][keep_last:]:
        if path.name not in keep:
            try:
                trash = _trash_of(path)
                shutil.rmtree(trash, ignore_errors=True)
                path.rename(trash)
                sync_folder(run_dir)  # a folder with only some of its files must not come back under its old name
                shutil.rmtree(trash)
            except OSError as error:
                _log.warning("could not remove the old checkpoint %s: %s", path, error)


def _trash_of(final: Path) -> Path:
    return final.with_name(f".trash_{final.name}")


# --------------------------------------------------------------------------------------------------- finding and verifying


def checkpoints(run_dir: Path) -> list[Path]:
    """Folders that are named as checkpoints, newest first."""
    inside = run_dir.iterdir() if run_dir.is_dir() else ()
    named = [path for path in inside if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The update that is in a checkpoint's name."""
    return int(checkpoint.name.rpartition("_")[2])


def problem_with(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """Why a folder is not a good checkpoint, by its manifest: names, sizes and ``hashes``; None if it is one."""
    try:
        listed = _manifest_files(checkpoint / MANIFEST)
        if odd := sorted((names_in(checkpoint) - {MANIFEST}) ^ set(listed)):
            return f"{odd[0]} is {'missing' if odd[0] in listed else 'not part of it'}"
        for name, (size, _) in listed.items():
            if (checkpoint / name).stat().st_size != size:
                return f"{name} has the wrong size"
        if hashes:
            with ThreadPoolExecutor(_THREADS) as pool:
                found = pool.map(sha256_of, [checkpoint / name for name in listed])
                for (name, (_, sha256)), own in zip(listed.items(), found, strict=True):
                    if own != sha256:
                        return f"{name} was changed after it was written"
    except CheckpointError as error:
        return error.message
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        if not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):  # the reader's, or the disk's
            raise StorageError(f"{error.filename or checkpoint} {reason}; nothing was moved") from None
        return f"it {reason}"
    return None


def _manifest_files(path: Path) -> dict[str, tuple[int, str]]:
    """Sizes and hashes by name; :class:`CheckpointError` for anything that is not a manifest as :func:`seal` writes it."""
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > _LARGEST_MANIFEST:
            raise CheckpointError(f"its {path.name} is not a manifest")
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise CheckpointError(f"its {path.name} is of {str(document['format'])[:60]}, not of a checkpoint")
        document.pop("sha256", None)
        if document["version"] != 1 and text != manifest_text(document):  # the first version had no hash of its own
            raise CheckpointError(f"its {path.name} was changed after it was written")
        return {str(name): (int(info["bytes"]), str(info["sha256"])) for name, info in document["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"it has no {path.name}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise CheckpointError(f"its {path.name} is damaged") from None


def find_newest(run_dir: Path, quarantine: bool = False) -> Path | None:
    """The newest checkpoint that verifies, or None in a directory without any. Damaged ones are named in a warning.

    With ``quarantine`` those are moved to ``run_dir/quarantine/``, which only the run that holds the directory may do. Raises
    :class:`NoUsableCheckpointError`, and moves nothing, when there are checkpoints and none is good.
    """
    candidates, bad = checkpoints(run_dir), []
    for path in candidates:
        if (problem := problem_with(path)) is None:
            for damaged, why in bad:
                place = f"moved to {_move_aside(damaged, run_dir / QUARANTINE / damaged.name)}" if quarantine else "passed over"
                _log.warning("the checkpoint %s is damaged (%s) and was %s", damaged, why, place)
            if bad and quarantine:
                _mend_pointers(run_dir)
            return path
        bad.append((path, problem))
    if candidates:
        problems = [f"{path}: {problem}" for path, problem in bad]
        raise NoUsableCheckpointError(
            [f"no checkpoint in {run_dir} can be read", *problems, "to start afresh, type another --checkpoint_dir"]
        )
    return None


def _move_aside(path: Path, target: Path) -> Path:
    target.parent.mkdir(exist_ok=True)
    while os.path.lexists(target):
        target = target.with_name(target.name + "_again")
    path.rename(target)
    sync_folder(target.parent)
    sync_folder(path.parent)
    return target


def resolve(path: Path) -> Path:
    """The good checkpoint that a person means: a checkpoint folder, a run directory, or its ``latest`` or ``best`` pointer.

    ``checkpoint_iter_5000.pt`` and ``checkpoint_5000`` are taken for ``checkpoint_00005000``. Raises
    :class:`CheckpointError` when there is none or it is damaged.
    """
    if path.is_file() and (name := read_pointer(path)):
        path = path.parent / name
    elif not path.exists() and (match := _LEGACY_NAME.fullmatch(path.name)):
        path = path.parent / f"checkpoint_{int(match[1]):08d}"
    if not path.is_dir():
        found = [candidate.name for candidate in checkpoints(path.parent)]
        hint = f"; there are {', '.join(found[:5])}" if found else ""
        raise CheckpointError(f"{os.path.abspath(path)} does not exist or is not a checkpoint folder{hint}")
    if not _NAME.fullmatch(path.name) and not (path / MANIFEST).exists():
        if newest := find_newest(path):
            return newest
        raise CheckpointError(f"{os.path.abspath(path)} holds no checkpoint")
    if problem := problem_with(path):
        raise CheckpointError(f"{path} is damaged: {problem}")
    return path


# ------------------------------------------------------------------------------- for the run that holds the directory only


def go_back(run_dir: Path, checkpoint: Path) -> list[Path]:
    """Set aside the checkpoints that are newer than the one to go on from: they belong to a future that will not happen.

    They are renamed, not removed, and no reader takes them for checkpoints any more. ``best`` goes back to the checkpoint that
    was the best by then. Raises :class:`CheckpointError` when ``run_dir`` holds another run than ``checkpoint``'s.
    """
    existing = checkpoints(run_dir)
    if existing and checkpoint.resolve().parent != run_dir.resolve():
        raise CheckpointError(f"{run_dir} already holds {existing[0].name} of another run; type another --checkpoint_dir")
    step = _recorded(checkpoint, "step") or 0  # its folder may have another name
    newer = [path for path in existing if step_of(path) > step]
    for path in newer:
        _move_aside(path, path.with_name(f"set_aside_{path.name}"))
    if newer:
        _mend_pointers(run_dir)
    return newer


def sweep(run_dir: Path) -> None:
    """Clear away what interrupted saves and removals left behind: names that no reader looks at.

    A whole checkpoint that was moved aside for another of its name, which did not come any more, gets its name back.
    """
    if not run_dir.is_dir():
        return
    for path in sorted(run_dir.iterdir()):
        if path.name.startswith(".trash_"):
            final = path.with_name(path.name.removeprefix(".trash_"))
            if _NAME.fullmatch(final.name) and not os.path.lexists(final) and problem_with(path) is None:
                path.rename(final)
                sync_folder(run_dir)
    for path in run_dir.iterdir():
        if path.name.startswith((".tmp_", ".trash_")):
            real = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path, ignore_errors=True) if real else path.unlink(missing_ok=True)
    _mend_pointers(run_dir)


def _mend_pointers(run_dir: Path) -> None:
    """Let ``latest`` name the newest checkpoint and ``best`` the best, also where a death came before they were written."""
    newest, best = next((path.name for path in checkpoints(run_dir)), None), read_pointer(run_dir / "best")
    wanted = {"latest": newest, "best": _best_name(run_dir, best) or best, "stable": read_pointer(run_dir / "stable")}
    for pointer, name in ((run_dir / key, name) for key, name in wanted.items()):
        if name is None or not (run_dir / name).is_dir():
            pointer.unlink(missing_ok=True)
        elif read_pointer(pointer) != name:
            point(pointer, name)


def _best_name(run_dir: Path, now: str | None) -> str | None:
    """The oldest checkpoint that knows of the lowest loss that the newest one knows of: it was saved for that."""
    known = [(path, _recorded(path, "best_val_loss")) for path in checkpoints(run_dir)]
    lowest = [path for path, loss in reversed(known) if loss is not None and loss == known[0][1]]
    return next((path.name for path in lowest if path.name == now or problem_with(path) is None), None)


def _recorded(checkpoint: Path, key: str) -> float | None:
    try:
        number = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return number if isinstance(number, int | float) else None
