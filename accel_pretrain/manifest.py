"""``manifest.json``: what a token dataset says of itself, and the hashes that keep it honest. Torch-free.

Part of the format that :mod:`accel_pretrain.shards` describes, through which the rest of the program reaches it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from accel_pretrain.errors import DataError
from accel_pretrain.files import sha256_of, write_whole

MANIFEST = "manifest.json"
FORMAT = "accel_pretrain.tokens"
VERSION = 1
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One file of token ids: its place, its size in three units, its largest id, and the SHA-256 of its bytes.

    ``sampled`` is that of a sample of them (:func:`sampled_sha256`); ``index`` names the file of document ends. Both are empty
    in datasets that were written before there were such things.
    """

    path: str
    split: str
    tokens: int
    documents: int
    utf8_bytes: int
    max_id: int
    sha256: str
    sampled: str = ""
    index: str = ""
    index_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``manifest.json`` says. ``tokenizer`` has name, vocab_size, eot_id, fingerprint; ``prep`` is the writer's own.

    ``tokenizer_files`` are the SHA-256 of the files in ``tokenizer/``; :func:`write_manifest` fills them in.
    """

    dtype: str
    tokenizer: dict[str, Any]
    files: tuple[ShardInfo, ...]
    prep: dict[str, Any] = field(default_factory=dict)
    tokenizer_files: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens and the tokenizer, whatever the folder is called."""
        parts = [self.dtype, self.tokenizer["fingerprint"], *(f"{info.split} {info.sha256}" for info in self.files)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Complete a dataset: the manifest appears under its name only when all of it, and all before it, is on disk."""
    saved = sorted(path for path in (folder / "tokenizer").glob("*") if path.is_file())
    manifest = dataclasses.replace(manifest, tokenizer_files={path.name: sha256_of(path) for path in saved})
    document = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}
    document["sha256"] = _hash_of(document)
    write_whole(folder / MANIFEST, _as_text(document).encode())


def read_manifest(folder: Path, *, to_the_byte: bool = False) -> Manifest:
    """The manifest of a dataset folder, or :class:`DataError`; ``to_the_byte`` also refuses what changes nothing in it."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        document = json.loads(content.decode("utf-8"))
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise DataError(f"{path}: format {document['format']} version {document['version']}; this reads {FORMAT} {VERSION}")
        if to_the_byte and content != _as_text(document).encode():
            raise ValueError("not as it was written")
        if document.pop("sha256", None) not in (None, _hash_of(document)):
            raise ValueError("changed after it was written")
        files = tuple(ShardInfo(**info) for info in document.pop("files"))
        for info in files:
            if any(Path(name).name != name for name in (info.path, info.index)):
                raise ValueError(f"bad file name {info.path!r}")
        manifest = Manifest(files=files, **{key: document[key] for key in document if key not in ("format", "version")})
        _check_kinds(manifest)
        return manifest
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist: {folder} is not a token dataset, or prep did not finish there. "
            f"Run: python -m prep.tokenize SRC... -o {folder}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error}); write the dataset again with prep.tokenize") from None


def _check_kinds(manifest: Manifest) -> None:
    """Raise ValueError unless every value is of its kind: what is damaged need not have a hash of its own."""
    kinds = {"str": str, "int": int}
    for info in manifest.files:
        for item in dataclasses.fields(info):
            value = getattr(info, item.name)
            if type(value) is not kinds[str(item.type)] or (type(value) is int and value < 0):
                raise ValueError(f"bad {item.name} {str(value)[:60]!r}")
    known = {key: type(manifest.tokenizer[key]) for key in ("name", "vocab_size", "fingerprint")}
    if manifest.dtype not in DTYPES or known != {"name": str, "vocab_size": int, "fingerprint": str}:
        raise ValueError("bad dtype or tokenizer")
    if manifest.tokenizer["vocab_size"] < 1 or type(manifest.prep) is not dict or type(manifest.tokenizer_files) is not dict:
        raise ValueError("bad tokenizer, prep or tokenizer_files")


def _as_text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


def _hash_of(document: dict[str, Any]) -> str:
    """The SHA-256 of a manifest without its own."""
    return hashlib.sha256(_as_text({key: document[key] for key in document if key != "sha256"}).encode()).hexdigest()


def sampled_sha256(path: Path) -> str:
    """SHA-256 of a file's size and of 64 evenly spaced blocks of 64 KiB: what a look at every open costs for any size."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    last = max(0, size - _SAMPLE_BYTES)
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(number * last // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
