"""Turn text into a token dataset: ``python -m prep.tokenize SRC... -o DIR``.

The way of the data: the sources are found (:mod:`prep.sources`), cut into units (:mod:`prep.units`), the split is
chosen (:mod:`prep.split`), the tokenizer is loaded or learned (:mod:`prep.learn`), workers encode the units
(:mod:`prep.workers`), and this file joins their ids in order, writes the manifest last, and publishes the folder
(:mod:`prep.publish`).
"""

from __future__ import annotations

if not __package__:  # by its path, this file would stand in for the standard library's `tokenize`, which imports need
    print("error: run it as: python -m prep.tokenize")
    raise SystemExit(2)

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from accel_pretrain import __version__
from accel_pretrain.errors import DataError, reported
from accel_pretrain.shards import Manifest, ShardInfo, ShardWriter, dtype_for, write_manifest
from accel_pretrain.tokenizer import Tokenizer, load_tokenizer
from accel_pretrain.typed_yaml import leaves, load, parse_command_line
from prep.config import DEMO_OUT, PrepConfig, resolve, what_decides
from prep.learn import learn_tokenizer, wanted_size
from prep.progress import progress
from prep.publish import build_folder, existing_dataset, is_whole, publish
from prep.readers import BadDocument
from prep.sources import Source, demo_source, find_sources
from prep.split import TRAIN, VAL, SplitRule, choose_split
from prep.units import Unit, plan_units, unit_size
from prep.workers import Job, UnitReport, encode_units, read_ids

# Raised when the same input and options give other bytes than before: what an old recipe made is never "already there".
RECIPE = 1
SHORT_VAL_TOKENS = 2048

USAGE = """\
usage: python -m prep.tokenize SRC... -o DIR [--option VALUE ...]
       python -m prep.tokenize --demo

Turns text into DIR/train.bin and DIR/val.bin (token ids), DIR/tokenizer/ and DIR/manifest.json.
SRC is a text file, a .jsonl file, a folder (its text files, recursively) or a quoted glob.

  python -m prep.tokenize book.txt -o data/book
  python -m prep.tokenize stories.txt --doc_sep '<|endoftext|>' --tokenizer train:8192 -o data/stories
  python -m prep.tokenize 'crawl/*.jsonl' --text_column content --val 0.5% -o data/crawl

options (also as --option=VALUE, or in a file: --config prep.yaml):
"""


@dataclass
class Outcome:
    """What a run made: one :class:`ShardInfo` per split, and what was left out."""

    infos: dict[str, ShardInfo] = field(default_factory=dict)
    empty: int = 0
    bad: list[BadDocument] = field(default_factory=list)


@dataclass(frozen=True)
class Corpus:
    """The input as it was found, cut into units, and split."""

    sources: list[Source]
    val_sources: list[Source]
    units: list[Unit]
    rule: SplitRule

    @property
    def size(self) -> int:
        return sum(source.size for source in [*self.sources, *self.val_sources])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exits with code 2 on anything that a user can mend."""
    with reported(), _interruptible():
        words = sys.argv[1:] if argv is None else argv
        short = {"-o": "out", "-h": "help"}
        line = parse_command_line(PrepConfig, words, flags={"help"}, short=short, positionals=True)
        if "help" in line.flags or not (line.positionals or line.overrides or line.config):
            print(usage())
            raise SystemExit(0 if "help" in line.flags else 2)
        config = load(PrepConfig, line.config, line.overrides)
        if line.positionals:
            config = dataclasses.replace(config, sources=line.positionals)
        prepare(resolve(config))


def usage() -> str:
    """The text of ``--help``."""
    rows = []
    for leaf in leaves(PrepConfig).values():
        default = next(item.default for item in dataclasses.fields(PrepConfig) if item.name == leaf.path)
        shown = "" if default in (None, (), False) else f" [{default}]"
        rows += textwrap.wrap(f"{leaf.doc}{shown}", 100, initial_indent=f"  --{leaf.path:<12} ", subsequent_indent=" " * 17)
    return USAGE + "\n".join(rows)


def prepare(config: PrepConfig) -> None:
    """Make the dataset that a resolved ``config`` describes, unless it is already there; prints what came out."""
    assert config.out
    assert config.tokenizer
    assert config.workers
    started = time.monotonic()
    to_learn = wanted_size(config.tokenizer)
    sources = [demo_source()] if config.demo else find_sources(config.sources, config)
    val_sources = find_sources(config.val_file, config)
    existing = existing_dataset(config.out, config.overwrite)
    tokenizer = None if to_learn else load_tokenizer(config.tokenizer)
    corpus = plan_corpus(config, sources, val_sources)
    if existing is not None and not config.overwrite:
        _already_there(config, existing, corpus, tokenizer)
        return
    with build_folder(config.out) as folder:
        tokenizer = tokenizer or learn_tokenizer(config.tokenizer, corpus.units, corpus.rule)
        tokenizer.save(folder / "tokenizer")
        job = Job(folder, dtype_for(tokenizer.vocab_size - 1), corpus.rule, config.on_error)
        outcome, inputs = encode_corpus(job, tokenizer, corpus, config.workers)
        _check_splits(outcome, config)
        write_manifest(folder, _manifest(config, job, tokenizer, corpus, outcome, inputs))
        publish(folder, config.out)
    _print_summary(config, tokenizer, job.dtype, corpus, outcome, time.monotonic() - started)


def plan_corpus(config: PrepConfig, sources: list[Source], val_sources: list[Source]) -> Corpus:
    """Cut the files into units and choose the split; raises :class:`DataError` when there is no text for one."""
    total = sum(source.size for source in [*sources, *val_sources])
    if total == 0:
        raise DataError(f"no text: {sum(len(source.files) for source in sources)} files, all empty")
    unit_bytes = config.unit_bytes or unit_size(total)
    if config.val_file:
        units = plan_units(sources, unit_bytes, TRAIN) + plan_units(val_sources, unit_bytes, VAL)
        return Corpus(sources, val_sources, units, SplitRule())
    rule, units = choose_split(plan_units(sources, unit_bytes), config.val_share)
    return Corpus(sources, [], units, rule)


def encode_corpus(job: Job, tokenizer: Tokenizer, corpus: Corpus, workers: int) -> tuple[Outcome, str]:
    """Encode every unit, and join the ids in the order of the units; also returns the hash of the inputs."""
    outcome, inputs = Outcome(), hashlib.sha256()
    writers: dict[str, ShardWriter] = {}
    with contextlib.ExitStack() as stack:
        for report in stack.enter_context(contextlib.closing(_in_order(job, tokenizer, corpus, workers))):
            for split, count in report.splits.items():
                if split not in writers:
                    path = job.folder / f"{split}.bin"
                    writers[split] = ShardWriter(path, split, job.dtype, tokenizer.vocab_size)
                    stack.callback(writers[split].discard)
                writers[split].append(read_ids(job, report.index, split), count.documents, count.utf8_bytes)
            outcome.empty += report.empty
            outcome.bad += report.bad
            inputs.update(report.content)
        outcome.infos = {split: writers[split].close() for split in (TRAIN, VAL) if split in writers}
    return outcome, inputs.hexdigest()


def _in_order(job: Job, tokenizer: Tokenizer, corpus: Corpus, workers: int) -> Generator[UnitReport]:
    """The reports of the workers, each held back until those of all units before it are there."""
    held: dict[int, UnitReport] = {}
    following = 0
    encoded = encode_units(job, tokenizer, corpus.units, workers)
    with progress(corpus.size) as advance, contextlib.closing(encoded):
        for report in encoded:
            advance(corpus.units[report.index].size)
            held[report.index] = report
            while following in held:
                yield held.pop(following)
                following += 1


def _check_splits(outcome: Outcome, config: PrepConfig) -> None:
    wanted = [TRAIN, VAL] if config.val_file or config.val_share else [TRAIN]
    if missing := [split for split in wanted if split not in outcome.infos]:
        skipped = f"; {len(outcome.bad)} documents skipped, the first: {outcome.bad[0].problem}" if outcome.bad else ""
        raise DataError(f"no text for the {' and the '.join(missing)} split{skipped}")


# --------------------------------------------------------------------------------------------------------- the manifest


def _manifest(config: PrepConfig, job: Job, tokenizer: Tokenizer, corpus: Corpus, outcome: Outcome, inputs: str) -> Manifest:
    named = [(source, None) for source in corpus.sources] + [(source, VAL) for source in corpus.val_sources]
    return Manifest(
        dtype=job.dtype,
        tokenizer={
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
            "fingerprint": tokenizer.fingerprint,
        },
        files=tuple(outcome.infos.values()),
        prep={
            "recipe": RECIPE,
            "config": what_decides(config),
            "sources": [_describe_source(source, split) for source, split in named],
            "split": "given files" if config.val_file else corpus.rule.describe(),
            "counts": {
                "documents": sum(info.documents for info in outcome.infos.values()),
                "empty": outcome.empty,
                "bad": len(outcome.bad),
            },
            "inputs_sha256": inputs,
            "versions": _versions(),
        },
    )


def _describe_source(source: Source, split: str | None) -> dict[str, Any]:
    path = os.path.abspath(source.name) if source.files and os.path.exists(source.name) else source.name
    described: dict[str, Any] = {"path": path, "files": len(source.files), "bytes": source.size}
    return described | ({"split": split} if split else {})


def _versions() -> dict[str, str]:
    versions = {"accel_pretrain": __version__, "python": platform.python_version()}
    for package in ("numpy", "tiktoken", "rustbpe"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _already_there(config: PrepConfig, existing: Manifest, corpus: Corpus, tokenizer: Tokenizer | None) -> None:
    """Say so when the dataset at ``out`` is the one that was asked for, which its manifest proves; raise otherwise."""
    prep, wanted = existing.prep, json.loads(json.dumps(what_decides(config)))
    made_with = prep.get("config", {})
    differing = [key for key, value in wanted.items() if made_with.get(key) != value]
    if prep.get("recipe") != RECIPE:
        differing.append("version of prep")
    if tokenizer is not None and tokenizer.fingerprint != existing.tokenizer["fingerprint"]:
        differing.append("content of the tokenizer")
    assert config.out
    if not differing and not is_whole(config.out, existing):
        differing.append("sizes of its own files")
    if not differing:
        inputs = hashlib.sha256(b"".join(unit.content() for unit in corpus.units)).hexdigest()
        if inputs == prep.get("inputs_sha256"):
            print(f"{config.out}: already there, made from the same text with the same options; nothing to do")
            _print_next(config)
            return
        differing.append("text")
    raise DataError(
        f"-o {config.out}: already holds another dataset (other {', '.join(differing)}); "
        "add --overwrite to replace it, or give another -o"
    )


# --------------------------------------------------------------------------------------------------------- what is said


def _print_summary(
    config: PrepConfig, tokenizer: Tokenizer, dtype: str, corpus: Corpus, outcome: Outcome, seconds: float
) -> None:
    left_out = [f"{outcome.empty} empty documents left out"] if outcome.empty else []
    left_out += [f"{len(outcome.bad)} invalid documents skipped"] if outcome.bad else []
    print("; ".join([f"{config.out}: {corpus.size / 1e6:.1f} MB of input", *left_out]))
    for bad in outcome.bad[:3]:
        print(f"  skipped {bad.problem.removesuffix('; or leave such documents out with --on_error skip')}")
    print(f"  {'':<6}{'documents':>12}{'tokens':>16}{'bytes/token':>14}")
    for split, info in outcome.infos.items():
        print(f"  {split:<6}{info.documents:>12,}{info.tokens:>16,}{info.utf8_bytes / info.tokens:>14.2f}")
    rate = f"{seconds:.1f} s, {corpus.size / 1e6 / seconds:.1f} MB/s"
    print(f"  tokenizer {tokenizer.name}: {tokenizer.vocab_size:,} ids, stored as {dtype}; {rate}")
    if VAL in outcome.infos and outcome.infos[VAL].tokens < SHORT_VAL_TOKENS:
        print("note: the val split is very short; hold out more with --val 10%")
    _print_next(config)


def _print_next(config: PrepConfig) -> None:
    out = shlex.quote(str(config.out))
    demo = config.demo and config.out == DEMO_OUT
    val = "" if config.val_file or config.val_share else " --val_data_path DIR"
    arguments = "--config configs/demo.yaml" if demo else f"--train_data_path {out}{val}"
    print(f"next: python -m accel_pretrain.train {arguments}")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the program with one line, after everything on the way out has cleaned up."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: nothing was published", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
