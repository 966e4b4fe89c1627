"""What the tools around token datasets share: a command line, an out folder that appears complete, documents as spans."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from accel_pretrain.errors import DataError, reported
from accel_pretrain.files import is_alive, sync_folder
from accel_pretrain.shards import Manifest, TokenSplit, open_split, read_manifest, splits_in
from accel_pretrain.tokenizer import Tokenizer
from accel_pretrain.typed_yaml import leaves, load, parse_command_line

T = TypeVar("T")
BLOCK = 1 << 22


def run_tool(cls: type[T], usage: str, act: Callable[[T], int], argv: Sequence[str] | None) -> int:
    """Read the command line of a tool whose config has ``datasets``, and run it; exits with code 2 on what a user can mend."""
    with reported(), printable():
        words = sys.argv[1:] if argv is None else argv
        short = {"-o": "out", "-h": "help"}
        line = parse_command_line(cls, words, flags={"help"}, short=short, positionals=True)
        config: Any = load(cls, line.config, line.overrides)
        if line.positionals:
            config = dataclasses.replace(config, datasets=line.positionals)
        if "help" in line.flags or not config.datasets:
            print(f"{usage}\noptions:\n{options_of(cls)}")
            return 0 if "help" in line.flags else 2
        return act(config)
    return 2


@contextlib.contextmanager
def printable() -> Iterator[None]:
    """What the terminal's encoding lacks, or a file name that is no UTF-8, is printed as an escape, and ends no program."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    try:
        for stream in streams:
            stream.reconfigure(errors="backslashreplace")
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


def options_of(cls: type[Any]) -> str:
    """The lines of ``--help`` about the keys of a config."""
    rows: list[str] = []
    for leaf in leaves(cls).values():
        if leaf.path != "datasets":
            rows += textwrap.wrap(leaf.doc, 100, initial_indent=f"  --{leaf.path:<12} ", subsequent_indent=" " * 17)
    return "\n".join(rows)


# ------------------------------------------------------------------------------------------------------- the out folder


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that gets its name at the end, unless something goes wrong: then it is deleted."""
    out = Path(os.path.abspath(out))
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"-o {out}: is there already; give another name, or delete it first")
    prefix = f".{out.name}.building-{socket.gethostname()}-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f"{prefix}*"):
            if (owner := left.name.removeprefix(prefix)).isdigit() and not is_alive(int(owner)):
                shutil.rmtree(left, ignore_errors=True)
        folder = out.parent / f"{prefix}{os.getpid()}"
        folder.mkdir()
    except OSError as error:
        raise DataError(f"-o {out}: cannot be written ({error.strerror}); choose another place") from None
    try:
        yield folder
        sync_folder(folder)
        folder.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        if error.filename and not str(error.filename).startswith(str(folder)):
            raise
        raise DataError(f"-o {out}: cannot be written ({error.strerror}); nothing was published") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------- what is in one


def open_all_splits(folder: Path) -> tuple[Manifest, dict[str, TokenSplit]]:
    """The manifest of a dataset of ours and its opened splits by name; raises :class:`DataError`."""
    manifest = read_manifest(folder)
    return manifest, {split: open_split(folder, split) for split in splits_in(folder)}


def ends_of(ids: np.ndarray, eot_id: int) -> np.ndarray:
    """Where the documents in ``ids`` end, found by their end-of-text ids: int64."""
    blocks = range(0, ids.size, BLOCK)
    return np.concatenate([np.flatnonzero(ids[start : start + BLOCK] == eot_id) + start + 1 for start in blocks])


def document_ends(split: TokenSplit, eot_id: int | None = None) -> list[np.ndarray]:
    """For each file of a split where its documents end, from the index or else by their end-of-text ids: int64."""
    if split.document_ends is not None:
        return [ends.astype(np.int64) for ends in split.document_ends]
    eot_id = split.tokenizer["eot_id"] if split.tokenizer and eot_id is None else eot_id
    if eot_id is None:
        return []
    return [ends_of(ids, eot_id) for ids in split.files]


def spread(split: TokenSplit, ends: Sequence[np.ndarray], wanted: int) -> Iterator[tuple[int, np.ndarray]]:
    """``wanted`` documents spread evenly over a split, each with its number."""
    counts = np.cumsum([own.size for own in ends])
    total = int(counts[-1]) if counts.size else 0
    for number in dict.fromkeys((np.arange(min(wanted, total)) * total // max(1, min(wanted, total))).tolist()):
        file = int(np.searchsorted(counts, number, side="right"))
        within = number - (int(counts[file - 1]) if file else 0)
        start = int(ends[file][within - 1]) if within else 0
        yield number, split.files[file][start : int(ends[file][within])]


def bytes_per_id(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each id stands for: int64 (vocab_size)."""
    return np.array([len(tokenizer.decode_bytes([id])) for id in range(tokenizer.vocab_size)], dtype=np.int64)
