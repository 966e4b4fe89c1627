"""The out folder: what may be written where, and how a finished dataset appears there.

A dataset is built in the work folder beside its place (:mod:`prep.journal`) and moved there by renaming, complete. A run that
fails, is interrupted or is killed leaves whatever was there before as it was.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from accel_pretrain.errors import DataError
from accel_pretrain.files import sha256_of, sync_folder
from accel_pretrain.shards import DTYPES, MANIFEST, Manifest, read_manifest, sampled_sha256
from accel_pretrain.tokenizer import load_tokenizer


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
    except DataError as error:
        if not overwrite:
            raise DataError(f"{error.message}; add --overwrite to replace it") from None
    if others := sorted(set(os.listdir(out)) - ours):
        raise DataError(f"-o {out}: holds more than its dataset ({_some(others)}); move that away, or use another -o")
    return manifest


def is_whole(out: Path, manifest: Manifest) -> bool:
    """Whether what ``manifest`` names is there as it was written: sizes, samples of the ids, document ends, the tokenizer."""
    for info in manifest.files:
        path, index = out / info.path, out / info.index
        if not path.is_file() or path.stat().st_size != info.tokens * DTYPES[manifest.dtype].itemsize:
            return False
        if info.sampled and sampled_sha256(path) != info.sampled:
            return False
        if info.index and not (index.is_file() and sha256_of(index) == info.index_sha256):
            return False
    try:
        return load_tokenizer(out).fingerprint == manifest.tokenizer["fingerprint"]
    except DataError:
        return False


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
    _delete(old)


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.old"


def _recover(out: Path) -> None:
    """Finish what a run left that was killed between the two renames of :func:`publish`."""
    old = _old(Path(os.path.abspath(out)))
    if not os.path.lexists(old):
        return
    if not (old / MANIFEST).is_file():
        raise DataError(f"{old}: is in the way, and no dataset; move it, or give another -o than {out}")
    if out.exists():
        _delete(old)
    else:
        old.rename(out)


def _delete(old: Path) -> None:
    """Delete a dataset, its manifest last: it is known as one until it is gone."""
    for name in os.listdir(old) if old.is_dir() else ():
        if (path := old / name).is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif name != MANIFEST:
            path.unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
