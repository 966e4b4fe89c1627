"""Write a dataset in the form that other programs read: ``python -m prep.export DIR --to FORMAT -o OUT``.

Where the other format's payload is the same bytes as ours, which it mostly is, the exported file is a hard link to it: nothing
is copied, whatever the size. What comes out is read back by ``data.train_data_path`` too.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from accel_pretrain.errors import ConfigError, DataError
from accel_pretrain.shards import Manifest, ShardInfo
from accel_pretrain.typed_yaml import option
from prep.tools import BLOCK, document_ends, new_folder, open_all_splits, run_tool

USAGE = """\
usage: python -m prep.export DIR --to nanogpt|llmc|megatron|datatrove|olmo -o OUT

  nanogpt     train.bin, val.bin: ids and nothing else (uint16)                                   linked
  llmc        NAME_train_000001.bin, NAME_val_000000.bin: llm.c's header, then the ids            copied
  megatron    train.bin, train.idx: also GPT-NeoX's                                               linked
  datatrove   train.ds, train.ds.index, train.ds.metadata: also nanotron's                        linked
  olmo        train.npy: ids and nothing else: also dolma's                                       linked
"""
FACTS = "export.json"
_LLMC = {"uint16": (20240520, 1), "uint32": (20240801, 7)}
_LLMC_LARGEST = (1 << 31) - 1  # the count in the header is an int32
_MEGATRON_CODES = {"uint16": 8, "uint32": 4}  # Megatron has no uint32; ids below 2**31 are the same bytes as int32


@dataclass(frozen=True)
class ExportConfig:
    """The options of ``prep.export``."""

    datasets: tuple[str, ...] = option((), "the dataset folder; stands bare on the command line")
    to: Literal["nanogpt", "llmc", "megatron", "datatrove", "olmo"] | None = option(None, "the format")
    out: Path | None = option(None, "the folder to make; -o DIR")
    eot: Literal["after", "before"] = option(
        "after", "llmc only: before puts each end-of-text id in front of its document, as llm.c's own files have it [after]"
    )
    copy: bool = option(False, "copy what would be linked: the export is then a dataset of its own")


@dataclass
class Export:
    """One export on its way: where from, where to, and what became of the payload."""

    folder: Path
    out: Path
    name: str
    manifest: Manifest
    ids: dict[str, np.ndarray]
    ends: dict[str, np.ndarray]
    config: ExportConfig
    linked: int = 0
    copied: int = 0
    names: list[str] = field(default_factory=list)

    def payload(self, info: ShardInfo, name: str) -> None:
        """Give the ids of one shard another name: a hard link, or a copy where there can be none."""
        source, target = self.folder / info.path, self.out / name
        self.names.append(name)
        if not self.config.copy:
            try:
                os.link(source, target)
                self.linked += source.stat().st_size
                return
            except OSError:  # another file system, or one without links
                pass
        shutil.copyfile(source, target)
        self.copied += source.stat().st_size

    def write(self, name: str, parts: Iterable[bytes]) -> None:
        """A small file, or a copied one, flushed to disk."""
        with (self.out / name).open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(ExportConfig, USAGE, export, argv)


def export(config: ExportConfig) -> int:
    """Check the dataset as every open does, and write it anew; prints what came out."""
    if len(config.datasets) != 1 or config.to is None or config.out is None:
        raise ConfigError("name one dataset, a format and a place: python -m prep.export DIR --to megatron -o OUT")
    if config.eot == "before" and config.to != "llmc":
        raise ConfigError(f"eot: {config.to} has its end-of-text ids where this dataset has them; leave --eot out")
    folder = Path(config.datasets[0])
    manifest, splits = open_all_splits(folder)
    ids: dict[str, np.ndarray] = {}
    ends: dict[str, np.ndarray] = {}
    for split, opened in splits.items():
        paths = [info.path for info in manifest.files if info.split == split]
        ids |= dict(zip(paths, opened.files, strict=True))
        ends |= dict(zip(paths, document_ends(opened), strict=True))
    with new_folder(config.out) as building:
        work = Export(folder, building, config.out.resolve().name, manifest, ids, ends, config)
        _WRITERS[config.to](work)
        facts = {
            "format": config.to, "dtype": manifest.dtype, "eot": config.eot, "tokenizer": manifest.tokenizer,
            "dataset": str(folder.resolve()), "fingerprint": manifest.fingerprint,
        }  # fmt: skip
        work.write(FACTS, [(json.dumps(facts, indent=2) + "\n").encode()])
    tokens = sum(info.tokens for info in manifest.files)
    print(f"{config.out}: {tokens:,} tokens for {config.to} in {', '.join(work.names)}")
    print(f"  {work.linked / 1e6:,.1f} MB linked, {work.copied / 1e6:,.1f} MB copied")
    if work.linked:
        print(f"  linked files are those of {folder} itself: delete them as you like, but do not write into them")
    return 0


# ---------------------------------------------------------------------------------------------------------- the formats


def _nanogpt(work: Export) -> None:
    if work.manifest.dtype != "uint16":
        raise DataError(f"{work.folder}: holds {work.manifest.dtype}, nanoGPT reads uint16; use --to llmc or megatron")
    for split in dict.fromkeys(info.split for info in work.manifest.files):
        infos = [info for info in work.manifest.files if info.split == split]
        if len(infos) == 1:
            work.payload(infos[0], f"{split}.bin")
            continue
        work.names.append(f"{split}.bin")
        work.write(f"{split}.bin", (block for info in infos for block in _blocks(work.ids[info.path])))
        work.copied += (work.out / f"{split}.bin").stat().st_size


def _olmo(work: Export) -> None:
    for info in work.manifest.files:
        work.payload(info, f"{Path(info.path).stem}.npy")


def _megatron(work: Export) -> None:
    itemsize = np.dtype(work.manifest.dtype).itemsize
    for info in work.manifest.files:
        stem, ends = Path(info.path).stem, work.ends[info.path]
        work.payload(info, f"{stem}.bin")
        starts = np.concatenate(([0], ends[:-1])).astype("<i8") if ends.size else np.empty(0, dtype="<i8")
        head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, _MEGATRON_CODES[work.manifest.dtype], ends.size, ends.size + 1)
        sizes = (ends - starts).astype("<i4")
        boundaries = np.arange(ends.size + 1, dtype="<i8")
        parts = (head, sizes.tobytes(), (starts * itemsize).astype("<i8").tobytes(), boundaries.tobytes())
        work.write(f"{stem}.idx", parts)


def _datatrove(work: Export) -> None:
    itemsize = np.dtype(work.manifest.dtype).itemsize
    for info in work.manifest.files:
        name = f"{Path(info.path).stem}.ds"
        work.payload(info, name)
        work.write(f"{name}.index", [work.ends[info.path].astype("<u8").tobytes()])
        facts = f"{work.manifest.tokenizer['name']}|{itemsize}\n{info.tokens}\n{info.tokens / 1e6:.1f}M tokens"
        work.write(f"{name}.metadata", [facts.encode()])


def _llmc(work: Export) -> None:
    magic, version = _LLMC[work.manifest.dtype]
    numbers = {"val": 0}  # val is 000000 and train begins at 000001, as llm.c has it
    for info in work.manifest.files:
        ids = work.ids[info.path]
        for start, stop in cut(work.ends[info.path], ids.size, _LLMC_LARGEST):
            number = numbers.get(info.split, 1)
            numbers[info.split] = number + 1
            name = f"{work.name}_{info.split}_{number:06d}.bin"
            header = np.zeros(256, dtype="<i4")
            header[:3] = magic, version, stop - start
            work.names.append(name)
            piece = ids[start:stop]
            if (
                work.config.eot == "before"
            ):  # every document ends with one: move the last to the front, and each begins with one
                work.write(name, itertools.chain([header.tobytes(), piece[-1:].tobytes()], _blocks(piece[:-1])))
            else:
                work.write(name, itertools.chain([header.tobytes()], _blocks(piece)))
            work.copied += (work.out / name).stat().st_size


def _blocks(ids: np.ndarray) -> Iterator[bytes]:
    return (ids[start : start + BLOCK].tobytes() for start in range(0, ids.size, BLOCK))


def cut(ends: np.ndarray, size: int, largest: int) -> Iterator[tuple[int, int]]:
    """Pieces of at most ``largest`` ids that begin and end where documents do; one that is longer alone is cut."""
    start = 0
    while start < size:
        fitting = int(np.searchsorted(ends, start + largest, side="right"))
        stop = int(ends[fitting - 1]) if fitting and ends[fitting - 1] > start else min(size, start + largest)
        yield start, stop
        start = stop


_WRITERS: dict[str, Callable[[Export], None]] = {
    "nanogpt": _nanogpt,
    "llmc": _llmc,
    "megatron": _megatron,
    "datatrove": _datatrove,
    "olmo": _olmo,
}


if __name__ == "__main__":
    sys.exit(main())
