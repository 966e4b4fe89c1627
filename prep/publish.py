"""The out folder: what may be written where, and how a finished dataset appears there.

A dataset is built in the work folder beside its place (:mod:`prep.journal`) and moved there by renaming, complete. A run that
fails, is interrupted or is killed leaves whatever was there before as it was.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from accel_pretrain.errors import DataError
from accel_pretrain.files import sync_folder
from accel_pretrain.shards import DTYPES, MANIFEST, Manifest, read_manifest


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
    manifest, ours = None, {MANIFEST, "tokenizer", "train.bin", "val.bin", "train.idx.npy", "val.idx.npy"}
    try:
        manifest = read_manifest(out)
        ours |= {name for info in manifest.files for name in (info.path, info.index)}
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


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
