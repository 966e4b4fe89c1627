"""What is recorded about a dataset and said about a run: the manifest, the comparison with one that is there, the summary."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accel_pretrain import __version__
from accel_pretrain.shards import Manifest
from accel_pretrain.tokenizer import Tokenizer
from prep.clean import report_lines, summary_of
from prep.config import DEMO_OUT, PrepConfig, what_decides
from prep.encode import Job
from prep.sources import Source
from prep.split import VAL, SplitRule
from prep.units import Unit

if TYPE_CHECKING:
    from prep.pipeline import Outcome

# Raised when the same input and options give other bytes than before: what an old recipe made is never "already there".
RECIPE = 3
SHORT_VAL_TOKENS = 2048


@dataclass(frozen=True)
class Corpus:
    """The input as it was found, cut into units, and split."""

    sources: list[Source]
    val_sources: list[Source]
    units: list[Unit]
    rule: SplitRule

    @property
    def size(self) -> int:
        """Bytes of text, about."""
        return sum(unit.size for unit in self.units)


def make_manifest(config: PrepConfig, job: Job, tokenizer: Tokenizer, corpus: Corpus, outcome: Outcome) -> Manifest:
    named = [(source, None) for source in corpus.sources] + [(source, VAL) for source in corpus.val_sources]
    infos, totals = [info for found in outcome.infos.values() for info in found], outcome.totals
    counts = {"documents": sum(info.documents for info in infos), "empty": totals.empty, "bad": len(totals.bad)}
    counts |= {"duplicates": totals.duplicates} if job.dedup else {}
    counts |= {"val documents in train": outcome.shared} if outcome.shared is not None else {}
    return Manifest(
        dtype=job.dtype,
        tokenizer={
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
            "fingerprint": tokenizer.fingerprint,
        },
        files=tuple(infos),
        prep={
            "recipe": RECIPE,
            "config": what_decides(config),
            "sources": [_describe_source(source, split) for source, split in named],
            "split": "given files" if config.val_file else corpus.rule.describe(),
            "counts": counts,
            **({"cleaning": summary_of(totals.tally)} if totals.tally.files else {}),
            **({"left_out": dict(sorted(totals.tally.left_out.items()))} if totals.tally.left_out else {}),
            "inputs_sha256": totals.inputs.hexdigest(),
            "versions": _versions(),
        },
    )


def _describe_source(source: Source, split: str | None) -> dict[str, Any]:
    path = os.path.abspath(source.name) if source.files and os.path.exists(source.name) else source.name
    described: dict[str, Any] = {"path": path, "files": len(source.files), "bytes": source.size}
    return described | ({"origin": source.origin} if source.origin else {}) | ({"split": split} if split else {})


def _versions() -> dict[str, str]:
    versions = {"accel_pretrain": __version__, "python": platform.python_version()}
    for package in ("numpy", "tiktoken"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def differences(config: PrepConfig, existing: Manifest, tokenizer: Tokenizer | None, whole: bool) -> list[str]:
    """In what but its text the dataset that is there differs from the one that was asked for."""
    prep, wanted = existing.prep, json.loads(json.dumps(what_decides(config)))
    made_with = prep.get("config", {})
    differing = [key for key, value in wanted.items() if made_with.get(key) != value]
    if prep.get("recipe") != RECIPE:
        differing.append("version of prep")
    if tokenizer is not None and tokenizer.fingerprint != existing.tokenizer["fingerprint"]:
        differing.append("content of the tokenizer")
    if not differing and not whole:
        differing.append("bytes than were written: it is damaged")
    return differing


def is_of(existing: Manifest, corpus: Corpus) -> bool:
    """Whether the dataset that is there was made of this text."""
    inputs = hashlib.sha256(b"".join(unit.content() for unit in corpus.units)).hexdigest()
    return inputs == existing.prep.get("inputs_sha256")


def print_summary(config: PrepConfig, job: Job, tokenizer: Tokenizer, outcome: Outcome, seconds: float) -> None:
    """What came out of a run, what was left out, and what to type next."""
    totals = outcome.totals
    left_out = [f"{totals.empty} empty documents left out"] if totals.empty else []
    left_out += [f"{totals.duplicates} duplicates left out"] if totals.duplicates else []
    left_out += [f"{len(totals.bad)} invalid documents skipped"] if totals.bad else []
    size = sum(info.utf8_bytes for infos in outcome.infos.values() for info in infos)
    print("; ".join([f"{config.out}: {size / 1e6:.1f} MB of text", *left_out]))
    for bad in totals.bad[:3]:
        print(f"  skipped {bad.problem.removesuffix('; or leave such documents out with --on_error skip')}")
    for line in report_lines(totals.tally):
        print(f"  {line}")
    print(f"  {'':<6}{'files':>7}{'documents':>12}{'tokens':>16}{'bytes/token':>14}")
    for split, infos in outcome.infos.items():
        documents, tokens, utf8 = (sum(getattr(info, name) for info in infos) for name in ("documents", "tokens", "utf8_bytes"))
        print(f"  {split:<6}{len(infos):>7,}{documents:>12,}{tokens:>16,}{utf8 / tokens:>14.2f}")
    rate = f"{seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s"
    print(f"  tokenizer {tokenizer.name}: {tokenizer.vocab_size:,} ids, stored as {job.dtype}; {rate} by {job.engine}")
    if outcome.shared:
        documents = sum(info.documents for info in outcome.infos[VAL])
        print(f"note: {outcome.shared:,} of the {documents:,} val documents are in the train split too, so that the val loss")
        print("      flatters; take them out of the val files, or add --dedup exact, which keeps the first of equal documents")
    if sum(info.tokens for info in outcome.infos.get(VAL, [])) < SHORT_VAL_TOKENS and VAL in outcome.infos:
        print("note: the val split is very short; hold out more with --val 10%")
    print_next(config)


def print_next(config: PrepConfig) -> None:
    out = shlex.quote(str(config.out))
    demo = config.demo and config.out == DEMO_OUT
    val = "" if config.val_file or config.val_share else " --val_data_path DIR"
    arguments = "--config configs/demo.yaml" if demo else f"--train_data_path {out}{val}"
    print(f"next: python -m accel_pretrain.train {arguments}")
