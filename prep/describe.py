"""Look at a token dataset: ``python -m prep.describe DIR``.

Sizes, bytes per token, how long documents are (as a picture with ``--png FILE``), whether every document ends as it must, the
most frequent tokens, and decoded samples. Takes the token files of other programs too; ``--tokenizer NAME`` then says what ids
mean.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accel_pretrain.errors import ConfigError, DataError, PretrainError, refuse
from accel_pretrain.look import INK, STYLE, TRAIN, VAL
from accel_pretrain.shards import MANIFEST, TokenSplit, open_split, splits_in
from accel_pretrain.tokenizer import Tokenizer, load_tokenizer
from accel_pretrain.typed_yaml import option
from prep.export import FACTS
from prep.tools import BLOCK, bytes_per_id, document_ends, run_tool, spread

USAGE = """\
usage: python -m prep.describe DIR [--png FILE] [--json]

DIR is a dataset of prep.tokenize, or token files of other programs: a file, a folder or a quoted glob.
"""
BAR = 40
COLOURS = {"train": TRAIN, "val": VAL}


@dataclass(frozen=True)
class DescribeConfig:
    """The options of ``prep.describe``."""

    datasets: tuple[str, ...] = option((), "the dataset; stands bare on the command line")
    samples: int = option(3, "documents of each split to show the beginning of [3]")
    top: int = option(20, "most frequent tokens to show [20]")
    tokenizer: str | None = option(
        None, "what ids mean, where the data does not say: gpt2, bytes, FILE.tiktoken, a saved folder"
    )
    dtype: str | None = option(None, "uint16 or uint32, of a bare file of ids")
    png: Path | None = option(None, "also draw how long documents are; needs matplotlib (the extra plot)")
    json: bool = option(False, "one JSON object instead of text")

    def __post_init__(self) -> None:
        refuse(
            (self.samples < 0 or self.top < 0, "samples and top: 0 or more"),
            (self.dtype not in (None, "uint16", "uint32"), f"dtype: uint16 or uint32, got {self.dtype}"),
        )


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(DescribeConfig, USAGE, describe, argv)


def describe(config: DescribeConfig) -> int:
    if len(config.datasets) != 1:
        raise ConfigError("name one dataset; a glob of token files stands in quotes")
    path = Path(config.datasets[0])
    if config.png is not None and (config.png.absolute().parent / MANIFEST).exists():
        raise ConfigError(
            f"png: {config.png} would lie in a dataset, in which prep.tokenize wants nothing else; put it elsewhere"
        )
    splits = {name: open_split(path, name, config.dtype) for name in splits_in(path) or ["all"]}
    facts = facts_of_export(path)
    spec = config.tokenizer or next(iter(splits.values())).tokenizer_path or facts.get("tokenizer")
    tokenizer = load_tokenizer(spec) if spec else None
    eot_id = tokenizer.eot_id if tokenizer else facts.get("eot_id")
    described = {name: describe_split(split, tokenizer, eot_id, config) for name, split in splits.items()}
    lengths = {name: document_lengths(split, eot_id) for name, split in splits.items()}
    if config.png is not None:
        draw({name: own for name, own in lengths.items() if own.size}, path.name, config.png)
    if config.json:
        about = {"dataset": str(path), "tokenizer": tokenizer.name if tokenizer else None}
        print(json.dumps(about | {"splits": described}, indent=2))
    else:
        print("\n".join(as_lines(path, tokenizer, described)))
        if config.png is not None:
            print(f"\ndrawn: {config.png}")
    return 0


# ------------------------------------------------------------------------------------------------------------ what is there


def facts_of_export(path: Path) -> dict[str, Any]:
    """What :mod:`prep.export` says about ``path``, if it wrote it: its end-of-text id, and where its tokenizer was."""
    try:
        facts = json.loads(((path if path.is_dir() else path.parent) / FACTS).read_bytes())
        return {"eot_id": int(facts["tokenizer"]["eot_id"]), "tokenizer": _same_tokenizer(facts)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _same_tokenizer(facts: dict[str, Any]) -> Path | None:
    """The tokenizer of the dataset that was exported, if it is there still and the same."""
    folder = Path(facts["dataset"], "tokenizer")
    try:
        return folder if load_tokenizer(folder).fingerprint == facts["tokenizer"]["fingerprint"] else None
    except DataError:
        return None


def document_lengths(split: TokenSplit, eot_id: int | None) -> np.ndarray:
    """How many tokens each document has, its end-of-text id included: int64; empty where it is not known."""
    ends = document_ends(split, eot_id)
    return np.concatenate([np.empty(0, dtype=np.int64), *(np.diff(own, prepend=0) for own in ends)])


def describe_split(
    split: TokenSplit, tokenizer: Tokenizer | None, eot_id: int | None, config: DescribeConfig
) -> dict[str, Any]:
    """Everything about one split, as plain numbers and text."""
    counts = np.zeros(max(split.max_id + 1, tokenizer.vocab_size if tokenizer else 0), dtype=np.int64)
    for file in split.files:
        for start in range(0, file.size, BLOCK):
            counts += np.bincount(file[start : start + BLOCK], minlength=counts.size)
    lengths = document_lengths(split, eot_id)
    found: dict[str, Any] = {
        "files": len(split.files),
        "bytes": sum(file.nbytes for file in split.files),
        "dtype": str(split.files[0].dtype),
        "tokens": split.tokens,
        "documents": int(lengths.size) if lengths.size else split.documents,
        "largest_id": split.max_id,
        "ids_never_used": int((counts == 0).sum()),
        "utf8_bytes": split.utf8_bytes,
        "bytes_per_token": split.bytes_per_token,
    }
    if lengths.size:
        quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1], method="lower").tolist()
        names = ("shortest", "10%", "median", "90%", "longest", "mean")
        found["lengths"] = dict(zip(names, [*quantiles, float(lengths.mean())], strict=True))
        found["histogram"] = [{"from": low, "below": high, "documents": count} for low, high, count in histogram(lengths)]
    top = np.argsort(-counts, kind="stable")[: config.top].tolist()
    found["top"] = [_token(id, int(counts[id]), split, tokenizer) for id in top if counts[id]]
    if eot_id is not None:
        found["eot"] = eot_check(split, eot_id, int(counts[eot_id]) if eot_id < counts.size else 0)
    if tokenizer:
        text_bytes = int((counts[: tokenizer.vocab_size] * bytes_per_id(tokenizer)).sum())
        found["decoded_bytes"] = text_bytes
        found["bytes_per_token"] = found["bytes_per_token"] or text_bytes / split.tokens
        found["samples"] = [
            {"document": number, "text": tokenizer.decode(ids[:200].tolist())}
            for number, ids in spread(split, document_ends(split, tokenizer.eot_id), config.samples)
        ]
    return found


def _token(id: int, count: int, split: TokenSplit, tokenizer: Tokenizer | None) -> dict[str, Any]:
    text = None
    if tokenizer and id < tokenizer.vocab_size:
        text = "end of text" if id == tokenizer.eot_id else repr(tokenizer.decode([id]))
    return {"id": id, "count": count, "share": count / split.tokens, "text": text}


def eot_check(split: TokenSplit, eot_id: int, count: int) -> str:
    """Whether documents end as they must, in a sentence."""
    if split.documents is not None and count != split.documents:
        return f"WRONG: {count:,} end-of-text ids, but {split.documents:,} documents"
    if count == 0:
        return "WRONG: no end-of-text id: a model will not learn where a text ends"
    last = [int(file[-1]) == eot_id for file in split.files]
    if not all(last):
        first = [int(file[0]) == eot_id for file in split.files]
        return "documents begin with the end-of-text id" if all(first) else "WRONG: the last document has no end-of-text id"
    return f"every document ends with id {eot_id}"


def histogram(lengths: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Documents by length: from 1, 2, 4, 8, ... tokens to below the next, with how many; without what is empty at the ends."""
    powers = np.bincount(np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1)
    first = int(np.flatnonzero(powers)[0])
    for power in range(first, powers.size):
        yield 1 << power, 1 << power + 1, int(powers[power])


# ------------------------------------------------------------------------------------------------------------- how it looks


def as_lines(path: Path, tokenizer: Tokenizer | None, described: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The text of the report."""
    about = f"tokenizer {tokenizer.name}, {tokenizer.vocab_size:,} ids" if tokenizer else "no tokenizer: add --tokenizer NAME"
    yield f"{path}: {about}"
    for name, found in described.items():
        yield ""
        documents = "?" if found["documents"] is None else f"{found['documents']:,}"
        per_token = f", {found['bytes_per_token']:.3f} bytes/token" if found["bytes_per_token"] else ""
        yield f"{name}: {found['tokens']:,} tokens in {documents} documents{per_token}"
        files = "1 file" if found["files"] == 1 else f"{found['files']} files"
        ids = f"largest id {found['largest_id']:,}, {found['ids_never_used']:,} ids never used"
        yield f"  {files}, {found['bytes'] / 1e6:,.1f} MB of {found['dtype']}; {ids}"
        if "eot" in found:
            yield f"  {found['eot']}"
        if "lengths" in found:
            sizes = ", ".join(f"{key} {round(value):,}" for key, value in found["lengths"].items())
            yield f"  tokens per document: {sizes}"
            most = max(row["documents"] for row in found["histogram"])
            for row in found["histogram"]:
                bar = "█" * round(BAR * row["documents"] / most) or ("▏" if row["documents"] else "")
                yield f"  {row['from']:>12,} {bar:<{BAR}} {row['documents']:,}"
        if found["top"]:
            yield "  most frequent"
            for row in found["top"]:
                yield f"  {row['id']:>12} {row['share']:>7.2%}  {row['text'] or ''}".rstrip()
        for sample in found.get("samples", ()):
            yield f"  document {sample['document']}: {json.dumps(sample['text'], ensure_ascii=False)}"


def draw(lengths: dict[str, np.ndarray], title: str, out: Path) -> None:
    """A picture of how long documents are, one panel per split; raises :class:`PretrainError` without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # pyplot is not needed: no window, no state
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        raise PretrainError("--png needs matplotlib: pip install 'accel_pretrain[plot]'") from None
    if not lengths:
        raise ConfigError("png: where documents end is not known; name the --tokenizer")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 1 + 2.6 * len(lengths)), facecolor="white", layout="constrained")
        panels = figure.subplots(len(lengths), 1, sharex=True, squeeze=False).flat
        longest = max(int(own.max()) for own in lengths.values())
        shortest = min(int(own.min()) for own in lengths.values())
        octaves = np.arange(2 * max(0, shortest.bit_length() - 1), 2 * longest.bit_length() + 1) / 2
        edges = np.unique(np.round(2**octaves))  # half octaves, in whole tokens
        for ax, (name, own) in zip(panels, lengths.items(), strict=True):
            ax.margins(y=0.15)  # room for what is written
            ax.hist(own, bins=edges, color=COLOURS.get(name, COLOURS["train"]), edgecolor="white", linewidth=0.4)
            median = float(np.median(own))
            ax.axvline(median, color=INK, linewidth=1, linestyle=":")
            ax.annotate(
                f" median {median:,.0f}", (median, 0.97), xycoords=("data", "axes fraction"), va="top", color=INK, fontsize=9
            )
            label = ax.set_title(f"{name}: {own.size:,} documents, {int(own.sum()):,} tokens", loc="left", fontsize=10)
            label.set_parse_math(False)
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            ax.grid(visible=False, axis="x")
        figure.supxlabel("tokens per document", color=INK, fontsize=10)
        heading = figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        heading.set_parse_math(False)
        figure.savefig(out, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
