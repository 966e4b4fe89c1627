"""What a person can choose about preparing a dataset: every option of ``python -m prep.tokenize``, documented."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accel_pretrain.errors import ConfigError, refuse
from accel_pretrain.typed_yaml import option, to_plain

DEMO_TOKENIZER = "train:4096"
DEMO_OUT = Path("data/demo")
DEMO_VAL = "5%"  # the demo has few and uneven documents: one in a hundred would be a noisy handful
DEFAULT_VAL = "1%"
# Options that decide how or where, but not which bytes come out: they are not part of a dataset's identity.
_HOW = frozenset(
    {"sources", "val_file", "out", "workers", "overwrite", "demo", "engine", "runner", "fresh", "plan", "check_disk", "stream"}
)


@dataclass(frozen=True)
class PrepConfig:
    """The options of ``prep.tokenize``; the names and the texts here are its command line."""

    sources: tuple[str, ...] = option((), "files, folders, quoted globs; may also stand bare on the command line")
    out: Path | None = option(None, "folder of the new dataset; -o DIR (--demo: data/demo)")
    tokenizer: str | None = option(
        None,
        "gpt2 | bytes | a tiktoken name | FILE.tiktoken | a saved folder | train:N, which learns N ids from the train "
        "split (null: gpt2; --demo: train:4096)",
    )
    val: str | None = option(
        None,
        "share held out for validation, 1% or 0.01, by a hash of each document's content; at least one document, "
        "or the tail of an only document; 0: no val split (null: 1%; --demo: 5%)",
    )
    val_file: tuple[str, ...] = option(
        (), "files, folders, globs that are the val split; the sources are then all train; several: A,B, or given repeatedly"
    )
    format: Literal["auto", "text", "jsonl", "csv", "tsv", "parquet", "arrow"] = option(
        "auto", "how to read the files; auto: by suffix, also inside .gz, .bz2, .xz and .zst"
    )
    text_column: str = option("text", "the key or column that holds the text in .jsonl, .parquet, .csv, .tsv and hf: datasets")
    stream: bool = option(False, "hf: sources are fetched as a stream, without the copy that datasets keeps of all columns")
    limit: str | None = option(None, "stop after about so many bytes of text, from the front: 500M, 20G")
    clean: Literal["none", "web", "code", "gutenberg"] = option(
        "none",
        "gutenberg: the books without license, credits and notes; web, code, gutenberg: white space and Unicode in one form",
    )
    unwrap: bool = option(False, "with --clean gutenberg: join the lines of paragraphs that were wrapped at a fixed width")
    dedup: Literal["none", "exact"] = option("none", "exact: of documents with the same words, only the first stays")
    min_chars: int | None = option(None, "leave out documents with fewer characters")
    max_chars: int | None = option(None, "leave out documents with more characters")
    min_letters: float | None = option(
        None, "leave out documents with a smaller share of letters, such as 0.5, in what is no space"
    )
    max_line: int | None = option(None, "leave out documents with a line of more characters")
    max_repeated: float | None = option(None, "leave out documents with a larger share of repeated lines, such as 0.3")
    max_document: int = option(64_000_000, "bytes; a longer document is an error, since it must fit into memory")
    max_expansion: float = option(200.0, "a packed file that expands to more times its size is an error")
    doc_sep: str | None = option(
        None,
        r"what separates the documents in a text file: '<|endoftext|>', '\n\n', ...; null: one file is one document",
    )
    on_error: Literal["fail", "skip"] = option("fail", "when a document is not valid text; skip leaves it out and counts it")
    shards: str | None = option(
        None, "ids per file, such as 100M: a new file begins at the first end of a document behind so many (null: one file)"
    )
    workers: int | None = option(
        None, "processes (null: one per core, fewer for a small corpus); the output does not depend on it"
    )
    engine: Literal["auto", "tiktoken", "gigatoken"] = option(
        "auto", "what encodes: gigatoken where it is installed and proven to give the ids of tiktoken, which it does sooner"
    )
    runner: Literal["local", "ray", "slurm"] = option(
        "local", "who works: processes here; a Ray cluster; this task of a Slurm array, to be followed by the same with local"
    )
    unit_bytes: int | None = option(None, "size of one unit of work (null: 8 MB, less for a small corpus)")
    overwrite: bool = option(False, "replace the dataset in the out folder, once the new one is complete")
    fresh: bool = option(False, "begin anew instead of going on with an unfinished run")
    plan: bool = option(False, "only say what there is to do: files, units, tokens, disk, and the time from a one-second probe")
    check_disk: bool = option(True, "refuse to begin where the disk is too full for the dataset, as far as can be estimated")
    demo: bool = option(False, "no download: use the Python standard library's own sources as the corpus")

    def __post_init__(self) -> None:
        refuse(
            (self.workers is not None and self.workers < 1, f"workers: at least 1, got {self.workers}"),
            (self.unit_bytes is not None and self.unit_bytes < 1, f"unit_bytes: at least 1, got {self.unit_bytes}"),
            (self.max_document < 1, f"max_document: at least 1, got {self.max_document}"),
            (self.max_expansion < 1, f"max_expansion: at least 1, got {self.max_expansion:g}"),
            *(
                (value is not None and not 0 <= value <= 1, f"{key}: a share from 0 to 1, got {value}")
                for key, value in (("min_letters", self.min_letters), ("max_repeated", self.max_repeated))
            ),
            (self.unwrap and self.clean != "gutenberg", "unwrap: goes with --clean gutenberg only"),
        )
        _ = parse_count("limit", self.limit)
        _ = self.val_share, self.shard_tokens

    @property
    def val_share(self) -> float:
        return parse_share(self.val or DEFAULT_VAL)

    @property
    def shard_tokens(self) -> int | None:
        return parse_count("shards", self.shards)

    @property
    def separator(self) -> str | None:
        """``doc_sep`` with ``\\n`` and ``\\t`` as a shell passes them turned into the characters."""
        return self.doc_sep.replace("\\n", "\n").replace("\\t", "\t") if self.doc_sep else None


def parse_share(text: str) -> float:
    """``1%`` or ``0.01`` as a number in [0, 1); raises :class:`ConfigError`."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ConfigError(f"val: expected a share below 1, such as 1% or 0.01, got {text!r}")
    return share


def parse_count(key: str, text: str | None) -> int | None:
    """``100M`` or ``2_000_000`` as a number; None stays; raises :class:`ConfigError`."""
    if text is None:
        return None
    plain = text.strip().upper()
    unit = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}.get(plain[-1:], 1)
    try:
        count = float(plain[:-1] if unit > 1 else plain) * unit
    except ValueError:
        count = 0
    if not 1 <= count < 1e18:
        raise ConfigError(f"{key}: expected a number, such as 100M or 2_000_000, got {text!r}")
    return int(count)


def resolve(config: PrepConfig) -> PrepConfig:
    """``config`` with what it leaves open filled in; :class:`ConfigError` when it names no corpus or no place."""
    refuse(
        (not config.sources and not config.demo, "no input: name files or folders, or use --demo"),
        (bool(config.sources) and config.demo, "--demo brings its own corpus; leave the sources or --demo out"),
        (config.runner == "slurm" and config.fresh, "--fresh: not in a job array, whose tasks would delete each other's work"),
        (config.out is None and not config.demo and not config.plan, "where to? add -o DIR, for example -o data/mine"),
    )
    tokenizer = config.tokenizer or (DEMO_TOKENIZER if config.demo else "gpt2")
    return dataclasses.replace(
        config,
        out=config.out or (DEMO_OUT if config.demo else None),
        tokenizer=tokenizer,
        val=config.val or (DEMO_VAL if config.demo else DEFAULT_VAL),
        # The bar for a stray file is lower where nobody chose the files.
        on_error="skip" if config.demo else config.on_error,
    )


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def what_decides(config: PrepConfig) -> dict[str, Any]:
    """The options that decide the bytes of the dataset."""
    return {key: value for key, value in to_plain(config).items() if key not in _HOW}
