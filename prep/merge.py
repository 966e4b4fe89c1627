"""Make one dataset of several: ``python -m prep.merge A B... -o OUT [--weights 0.7,0.3]``.

The datasets must have one tokenizer. Without weights every document is taken, dataset by dataset. With weights the documents
are interleaved so that each dataset has its share of the tokens, everywhere in the result to within a document; what is left of
the others when the first one runs out is left out, and counted. (To repeat what is small, train on a mixture instead: it copies
nothing.) The val splits are joined whole, and a document that is in one of them is left out of the joined train split.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from accel_pretrain.errors import ConfigError, DataError
from accel_pretrain.shards import Manifest, ShardInfo, ShardWriter, TokenSplit, write_manifest
from accel_pretrain.tokenizer import load_tokenizer
from accel_pretrain.typed_yaml import option
from prep.tools import bytes_per_id, document_ends, new_folder, open_all_splits, run_tool

USAGE = """\
usage: python -m prep.merge A B... -o OUT [--weights 0.7,0.3]

Makes one dataset of several that were made with the same tokenizer; their documents one after the other, or interleaved.
"""
TRAIN = "train"
_TOKENS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class MergeConfig:
    """The options of ``prep.merge``."""

    datasets: tuple[str, ...] = option((), "dataset folders; stand bare on the command line")
    out: Path | None = option(None, "folder of the new dataset; -o DIR")
    weights: tuple[str, ...] = option((), "each dataset's share of the train tokens, 0.7,0.3; none: all documents, in order")

    @property
    def shares(self) -> list[Fraction]:
        """The weights as numbers; raises :class:`ConfigError`."""
        try:
            shares = [Fraction(text) for text in self.weights]
        except (ValueError, ZeroDivisionError):
            raise ConfigError(f"weights: expected numbers such as 0.7,0.3, got {','.join(self.weights)}") from None
        if shares and (len(shares) != len(self.datasets) or min(shares) <= 0):
            raise ConfigError(f"weights: expected {len(self.datasets)} positive numbers, one per dataset, got {len(shares)}")
        return shares


@dataclass(frozen=True)
class Documents:
    """All documents of one split of one dataset, in order: the file of each, and where in it the document begins and ends."""

    files: tuple[np.ndarray, ...]
    file: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        return self.stop - self.start

    def ids(self, number: int) -> np.ndarray:
        return self.files[self.file[number]][self.start[number] : self.stop[number]]


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(MergeConfig, USAGE, merge, argv)


def merge(config: MergeConfig) -> int:
    """Open and check all datasets, write the new one, and print what came out."""
    shares = config.shares
    if config.out is None:
        raise ConfigError("where to? add -o DIR, for example -o data/all")
    folders = [Path(name) for name in config.datasets]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a dataset stands twice; name each once")
    opened = [open_all_splits(folder) for folder in folders]
    refuse_other_tokenizers(folders, [manifest for manifest, _ in opened])
    order = sorted({split for _, splits in opened for split in splits}, key=lambda split: (split == TRAIN, split))
    held_out: set[bytes] = set()
    infos: dict[str, ShardInfo] = {}
    lines = []
    with new_folder(config.out) as building:
        shutil.copytree(folders[0] / "tokenizer", building / "tokenizer")
        for split in order:
            sources = [splits[split] for _, splits in opened if split in splits]
            if split == TRAIN and shares and len(sources) < len(opened):
                raise DataError("weights: one of the datasets has no train split")
            parts = [documents_of(source) for source in sources]
            plan = interleaved(parts, shares) if split == TRAIN and shares else in_order(parts)
            left_out = sum(part.stop.size for part in parts) - len(plan)
            kept = without(parts, plan, held_out) if split == TRAIN else plan
            infos[split] = write_split(building, split, parts, kept, sources)
            if split != TRAIN:
                held_out |= digests(parts, kept)
            lines.append(_line(infos[split], left_out, len(plan) - len(kept)))
        files = tuple(infos[split] for split in sorted(infos, key=lambda split: split != TRAIN))
        write_manifest(building, _manifest(config, opened[0][0], [manifest for manifest, _ in opened], files))
    print(f"{config.out}: from {len(folders)} datasets")
    print("\n".join(reversed(lines)))
    return 0


def refuse_other_tokenizers(folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Raise :class:`DataError` where ids would not mean the same."""
    first = manifests[0]
    problems = [
        f"{folder}: was made with tokenizer {manifest.tokenizer['name']}, {folders[0]} with {first.tokenizer['name']}; make it "
        f"again with the same: python -m prep.tokenize SRC... --tokenizer {folders[0] / 'tokenizer'}"
        for folder, manifest in zip(folders, manifests, strict=True)
        if manifest.tokenizer["fingerprint"] != first.tokenizer["fingerprint"] or manifest.dtype != first.dtype
    ]
    if problems:
        raise DataError(problems)


# ------------------------------------------------------------------------------------------------ which documents, in order


def documents_of(split: TokenSplit) -> Documents:
    """The spans of all documents of a split."""
    ends = document_ends(split)
    empty = [np.empty(0, dtype=np.int64)]
    return Documents(
        files=split.files,
        file=np.repeat(np.arange(len(ends)), [own.size for own in ends]),
        start=np.concatenate([*empty, *(np.concatenate(([0], own[:-1])) for own in ends if own.size)]).astype(np.int64),
        stop=np.concatenate([*empty, *ends]),
    )


def in_order(parts: Sequence[Documents]) -> np.ndarray:
    """Every document, part by part: rows of (part, document)."""
    return np.concatenate([_rows(number, np.arange(part.stop.size)) for number, part in enumerate(parts)])


def interleaved(parts: Sequence[Documents], shares: Sequence[Fraction]) -> np.ndarray:
    """Documents in the order in which they are due when each part supplies its share of the tokens, until one runs out."""
    scale = math.lcm(*(share.denominator for share in shares))
    weights = [int(share * scale) for share in shares]
    common = math.lcm(*weights)
    largest = max(int(part.tokens.sum()) * (common // weight) for part, weight in zip(parts, weights, strict=True))
    if largest >= 1 << 62:
        raise ConfigError("weights: too fine to be counted in tokens; use at most four digits")
    due = [np.cumsum(part.tokens) * (common // weight) for part, weight in zip(parts, weights, strict=True)]
    last = min(int(own[-1]) if own.size else 0 for own in due)
    taken = [own[own <= last] for own in due]
    rows = np.concatenate([_rows(number, np.arange(own.size)) for number, own in enumerate(taken)])
    return rows[np.argsort(np.concatenate(taken), kind="stable")]


def _rows(part: int, documents: np.ndarray) -> np.ndarray:
    return np.stack([np.full_like(documents, part), documents], axis=1)


def digests(parts: Sequence[Documents], plan: np.ndarray) -> set[bytes]:
    """What documents with the same ids have in common."""
    return {_digest(parts[part].ids(document)) for part, document in plan.tolist()}


def without(parts: Sequence[Documents], plan: np.ndarray, held_out: set[bytes]) -> np.ndarray:
    """The plan without documents whose digest is among those ``held_out``."""
    if not held_out:
        return plan
    sizes = np.array(sorted({int.from_bytes(digest[:8], "little") for digest in held_out}))
    keep = np.ones(len(plan), dtype=bool)
    for number, part in enumerate(parts):  # only a document of the same length can be the same
        rows = np.flatnonzero(plan[:, 0] == number)
        for row in rows[np.isin(part.tokens[plan[rows, 1]], sizes)].tolist():
            keep[row] = _digest(part.ids(int(plan[row, 1]))) not in held_out
    return plan[keep]


def _digest(ids: np.ndarray) -> bytes:
    return ids.size.to_bytes(8, "little") + hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


# ------------------------------------------------------------------------------------------------------------- the files


def write_split(
    folder: Path, split: str, parts: Sequence[Documents], plan: np.ndarray, sources: Sequence[TokenSplit]
) -> ShardInfo:
    """Write the planned documents of one split; the bytes of text are the sources', or counted where some are left out."""
    about = sources[0].tokenizer
    assert about is not None
    complete = len(plan) == sum(part.stop.size for part in parts)
    sizes = None if complete else bytes_per_id(load_tokenizer(folder))
    dtype = str(sources[0].files[0].dtype)
    writer = ShardWriter(folder / f"{split}.bin", split, dtype, about["vocab_size"], about["eot_id"])
    try:
        for ids, documents in batches(parts, plan):
            writer.append(ids, documents, 0 if sizes is None else int(sizes[ids].sum()))
        if complete:
            writer.utf8_bytes = sum(source.utf8_bytes or 0 for source in sources)
        if not writer.tokens:
            raise DataError(f"no document is left for the {split} split")
        return writer.close()
    finally:
        writer.discard()


def batches(parts: Sequence[Documents], plan: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """The planned ids, about a million at a time, with the number of documents in them."""
    waiting: list[np.ndarray] = []
    tokens = 0
    for part, document in plan.tolist():
        waiting.append(parts[part].ids(document))
        tokens += waiting[-1].size
        if tokens >= _TOKENS_AT_ONCE:
            yield np.concatenate(waiting), len(waiting)
            waiting, tokens = [], 0
    if waiting:
        yield np.concatenate(waiting), len(waiting)


def _manifest(config: MergeConfig, first: Manifest, manifests: Sequence[Manifest], files: tuple[ShardInfo, ...]) -> Manifest:
    merged = [
        {"path": str(Path(name).resolve()), "fingerprint": manifest.fingerprint, "weight": weight}
        for name, manifest, weight in itertools.zip_longest(config.datasets, manifests, config.weights)
    ]
    return Manifest(dtype=first.dtype, tokenizer=first.tokenizer, files=files, prep={"merged": merged})


def _line(info: ShardInfo, left_out: int, repeated: int) -> str:
    notes = [f"{left_out:,} documents do not fit the weights"] if left_out else []
    notes += [f"{repeated:,} documents left out that are held out elsewhere"] if repeated else []
    return "; ".join([f"  {info.split:<6}{info.documents:>12,} documents{info.tokens:>16,} tokens", *notes])


if __name__ == "__main__":
    sys.exit(main())
