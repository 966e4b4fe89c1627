"""The out folder: what may be written where, and how a finished dataset appears there.

A dataset is built in a hidden folder beside its place and moved there by renaming, complete. A run that fails, is
interrupted or is killed leaves whatever was there before as it was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from accel_pretrain.errors import DataError
from accel_pretrain.shards import DTYPES, MANIFEST, Manifest, read_manifest, sync_folder


def existing_dataset(out: Path, overwrite: bool) -> Manifest | None:
    """The complete dataset at ``out``, None where there is nothing; raises :class:`DataError` on anything else."""
    _recover(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"-o {out}: exists and is not a folder; give another name")
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / MANIFEST).is_file():
        found = _some(os.listdir(out))
        raise DataError(f"-o {out}: holds other files ({found}) and no dataset; use -o {out / 'tokens'}")
    manifest, ours = None, {MANIFEST, "tokenizer", "train.bin", "val.bin"}
    try:
        manifest = read_manifest(out)
        ours |= {info.path for info in manifest.files}
    except DataError:
        if not overwrite:
            raise
    if others := sorted(set(os.listdir(out)) - ours):
        raise DataError(f"-o {out}: holds more than its dataset ({_some(others)}); move that away, or use another -o")
    return manifest


def is_whole(out: Path, manifest: Manifest) -> bool:
    """Whether the files that ``manifest`` names are there with their sizes."""
    sizes = {out / info.path: info.tokens * DTYPES[manifest.dtype].itemsize for info in manifest.files}
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


@contextlib.contextmanager
def build_folder(out: Path) -> Iterator[Path]:
    """A new folder beside ``out``, deleted at the end unless :func:`publish` moved it; raises :class:`DataError`."""
    out = Path(os.path.abspath(out))
    _delete_abandoned(out)
    folder = out.parent / f".{out.name}.building-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        reason = f"{out.parent}: {error.strerror}"
        raise DataError(f"-o {out}: cannot be written ({reason}); choose another place") from None
    try:
        yield folder
    except OSError as error:
        if error.filename and not str(error.filename).startswith(str(folder)):
            raise
        raise DataError(f"-o {out}: cannot be written ({error.strerror}); nothing was published") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, out: Path) -> None:
    """Give the complete dataset in ``folder`` its name, in place of the one that may be there."""
    out = Path(os.path.abspath(out))
    old = _old(out)
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.old"


def _recover(out: Path) -> None:
    """Finish what a run left that was killed between the two renames of :func:`publish`."""
    old = _old(Path(os.path.abspath(out)))
    if old.is_dir() and not out.exists():
        old.rename(out)
    elif old.is_dir():
        shutil.rmtree(old, ignore_errors=True)


def _delete_abandoned(out: Path) -> None:
    """Delete the build folders of runs on this machine that were killed."""
    prefix = f".{out.name}.building-{socket.gethostname()}-"
    for folder in out.parent.glob(f"{prefix}*") if out.parent.is_dir() else ():
        owner = folder.name.removeprefix(prefix)
        if owner.isdigit() and not _is_alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # there, signal 0 is not a question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
