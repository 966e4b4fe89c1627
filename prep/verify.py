"""Prove that a dataset is what it was when it was written: ``python -m prep.verify DIR...``.

Every byte is hashed again, and what the manifest says of the files is held against what is in them: sizes, the largest id,
as many end-of-text ids as documents, the index of document ends, the tokenizer. A sample of documents is decoded and encoded
again. One line per problem, and exit code 2; or one line that says that there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accel_pretrain.errors import DataError, refuse
from accel_pretrain.files import sha256_of
from accel_pretrain.shards import DTYPES, Manifest, ShardInfo, open_split, read_manifest, sampled_sha256, splits_in
from accel_pretrain.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from accel_pretrain.typed_yaml import option
from prep.tools import document_ends, ends_of, run_tool, spread

LONGEST_SAMPLE = 100_000  # tokens: beyond it, a document may have been encoded in pieces
USAGE = """\
usage: python -m prep.verify DIR... [--sample N]

Hashes a dataset of prep.tokenize again, and compares what is in it with what its manifest says. Exit code 0: it is whole.
"""


@dataclass(frozen=True)
class VerifyConfig:
    """The options of ``prep.verify``."""

    datasets: tuple[str, ...] = option((), "dataset folders; stand bare on the command line")
    sample: int = option(100, "documents of each split to decode and to encode again [100]")

    def __post_init__(self) -> None:
        refuse((self.sample < 0, f"sample: 0 or more, got {self.sample}"))


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(VerifyConfig, USAGE, verify_all, argv)


def verify_all(config: VerifyConfig) -> int:
    found = 0
    for name in config.datasets:
        problems = list(verify(Path(name), config.sample))
        found += len(problems)
        for problem in problems:
            print(problem)
        if not problems:
            infos = read_manifest(Path(name)).files
            tokens, documents = sum(info.tokens for info in infos), sum(info.documents for info in infos)
            print(f"{name}: whole; {len(infos)} files, {documents:,} documents, {tokens:,} tokens")
    return 2 if found else 0


def verify(folder: Path, sample: int = 100) -> Iterator[str]:
    """What is wrong with a dataset, a line each."""
    try:
        manifest = read_manifest(folder, to_the_byte=True)
    except DataError as error:
        yield error.message
        return
    sound = True
    for info in manifest.files:
        for problem in _problems_of_file(folder, manifest, info):
            sound = False
            yield problem
    tokenizer, problems = _open_tokenizer(folder / "tokenizer", manifest)
    yield from problems
    if sound and tokenizer:
        yield from _problems_of_text(folder, tokenizer, sample)


def _problems_of_file(folder: Path, manifest: Manifest, info: ShardInfo) -> Iterator[str]:
    path = folder / info.path
    expected = info.tokens * DTYPES[manifest.dtype].itemsize
    if not path.is_file():
        yield f"{path}: is missing"
        return
    if (size := path.stat().st_size) != expected:
        yield f"{path}: is {size:,} bytes long instead of {expected:,}"
        return
    if sha256_of(path) != info.sha256:
        yield f"{path}: was changed after it was written (its SHA-256 is another one)"
        return
    if info.sampled and sampled_sha256(path) != info.sampled:
        yield f"{path}: the hash of its sample is another one"
    ids = np.memmap(path, dtype=DTYPES[manifest.dtype], mode="r").view(np.ndarray) if size else np.empty(0, dtype=np.uint16)
    largest = max((int(ids[start : start + (1 << 22)].max()) for start in range(0, ids.size, 1 << 22)), default=-1)
    if largest != info.max_id or largest >= manifest.tokenizer["vocab_size"]:
        yield f"{path}: its largest id is {largest}, of {manifest.tokenizer['vocab_size']} ids; the manifest says {info.max_id}"
    ends = ends_of(ids, manifest.tokenizer["eot_id"]) if ids.size else np.empty(0, dtype=np.int64)
    if ends.size != info.documents:
        yield f"{path}: {ends.size:,} end-of-text ids, but {info.documents:,} documents"
    if ids.size and not (ends.size and ends[-1] == ids.size):
        yield f"{path}: does not end with an end-of-text id"
    if info.index:
        yield from _problems_of_index(folder / info.index, info, ends)


def _problems_of_index(path: Path, info: ShardInfo, ends: np.ndarray) -> Iterator[str]:
    if not path.is_file():
        yield f"{path}: is missing"
    elif sha256_of(path) != info.index_sha256:
        yield f"{path}: was changed after it was written (its SHA-256 is another one)"
    elif not np.array_equal(np.load(path), ends):
        yield f"{path}: does not say where the documents of {info.path} end"


def _open_tokenizer(folder: Path, manifest: Manifest) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of a dataset, or what is wrong with it."""
    problems = []
    for name, sha256 in manifest.tokenizer_files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: is missing")
        elif sha256_of(path) != sha256:
            problems.append(f"{path}: was changed after it was written (its SHA-256 is another one)")
    if problems:
        return None, problems
    try:
        tokenizer = load_tokenizer(folder)
    except DataError as error:
        return None, [error.message]
    about = {key: getattr(tokenizer, key) for key in ("name", "vocab_size", "eot_id", "fingerprint")}
    if differing := [key for key, value in about.items() if manifest.tokenizer.get(key) != value]:
        return None, [f"{folder}: is not the tokenizer of the manifest (other {', '.join(differing)})"]
    return tokenizer, []


def _problems_of_text(folder: Path, tokenizer: Tokenizer, sample: int) -> Iterator[str]:
    """Sampled documents that are not text, or whose text has other ids."""
    exact = isinstance(tokenizer, BpeTokenizer | ByteTokenizer)  # others may put a text into a normal form first
    for name in splits_in(folder):
        split = open_split(folder, name)
        for number, ids in spread(split, document_ends(split), sample):
            try:
                text = tokenizer.decode_bytes(ids.tolist()).decode()
            except UnicodeDecodeError:
                yield f"{folder}: document {number} of {name} is not UTF-8 text when it is decoded"
                continue
            if exact and ids.size <= LONGEST_SAMPLE and not np.array_equal(tokenizer.encode_document(text), ids):
                yield f"{folder}: document {number} of {name} is not what its text is encoded to"


if __name__ == "__main__":
    sys.exit(main())
