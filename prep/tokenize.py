"""Turn text into a token dataset: ``python -m prep.tokenize SRC... -o DIR``.

The way of the data: the sources are found (:mod:`prep.sources`), cut into units (:mod:`prep.units`), the split is chosen
(:mod:`prep.split`), the tokenizer is loaded or learned (:mod:`prep.learn`), workers encode the units (:mod:`prep.encode`, by
:mod:`prep.runners`), their ids are joined in order (:mod:`prep.assembly`), the manifest is written last (:mod:`prep.report`),
and the folder appears under its name (:mod:`prep.publish`). What is done is kept meanwhile (:mod:`prep.journal`).
"""

from __future__ import annotations

if not __package__:  # by its path, this file would stand in for the standard library's `tokenize`, which imports need
    print("error: run it as: python -m prep.tokenize")
    raise SystemExit(2)

import signal

if __name__ == "__main__":  # Ctrl-C during the imports below ends the program without a word; `main` takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import dataclasses
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from accel_pretrain.errors import ConfigError, DataError, reported
from accel_pretrain.shards import Manifest, write_manifest
from accel_pretrain.tokenizer import Tokenizer, load_tokenizer
from accel_pretrain.typed_yaml import leaves, load, parse_command_line
from prep import hub
from prep.config import PrepConfig, resolve
from prep.documents import within
from prep.estimate import print_plan
from prep.journal import Workshop
from prep.learn import wanted_size
from prep.pipeline import Outcome, assemble, begin, encode_share
from prep.publish import existing_dataset, is_whole, publish
from prep.report import Corpus, differences, is_of, make_manifest, print_next, print_summary
from prep.runners import array_task
from prep.sources import Source, demo_source, find_sources, parse_size, refuse_own_output
from prep.split import TRAIN, VAL, SplitRule, choose_split
from prep.tools import printable
from prep.units import pack, plan_pieces, unit_size

USAGE = """\
usage: python -m prep.tokenize SRC... -o DIR [--option VALUE ...]
       python -m prep.tokenize --demo

Turns text into DIR/train.bin and DIR/val.bin (token ids), DIR/tokenizer/ and DIR/manifest.json.
SRC is a file of text, .jsonl, .csv or .parquet (text also as .gz, .bz2, .xz or .zst), a folder, a quoted glob, - for standard
input, or hf:NAME[:CONFIG][:SPLIT]. A run that was stopped goes on where it was when the same command is given again.

  python -m prep.tokenize book.txt -o data/book
  python -m prep.tokenize stories.txt --doc_sep '<|endoftext|>' --tokenizer train:8192 -o data/stories
  python -m prep.tokenize 'crawl/*.jsonl.gz' --text_column content --val 0.5% -o data/crawl
  python -m prep.tokenize train/ --val_file held_out/,more.txt -o data/own_split

options (also as --option=VALUE, or in a file: --config prep.yaml):
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exits with code 2 on anything that a user can mend."""
    with reported(), _signals(), printable():
        words = sys.argv[1:] if argv is None else argv
        short = {"-o": "out", "-h": "help"}
        line = parse_command_line(PrepConfig, words, flags={"help"}, short=short, positionals=True)
        if "help" in line.flags or not (line.positionals or line.overrides or line.config):
            print(usage())
            raise SystemExit(0 if "help" in line.flags else 2)
        _refuse_stray_val_files(words, line.positionals)
        config = load(PrepConfig, line.config, _with_all_val_files(line.overrides))
        if line.positionals:
            config = dataclasses.replace(config, sources=line.positionals)
        prepare(resolve(config), f"python -m prep.tokenize {shlex.join(words)}")


def _refuse_stray_val_files(words: Sequence[str], positionals: Sequence[str]) -> None:
    """``--val_file A B``: B would be train data, which nobody means and an unquoted glob does. Raises :class:`ConfigError`."""
    for option, value, stray in zip(words, words[1:], words[2:], strict=False):
        if option in ("--val_file", "--val-file") and stray in positionals:
            raise ConfigError(
                f"--val_file {value} {stray}: is {stray} for validation too, or a source? Name several val files as "
                f"--val_file {value},{stray} (a glob in quotes), and sources before --val_file"
            )


def _with_all_val_files(overrides: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The overrides, with one ``val_file`` for all that were given."""
    given = [override for override in overrides if override[0] == "val_file"]
    if len(given) < 2:
        return list(overrides)
    names = [name for override in given for name in load(PrepConfig, None, [override]).val_file]
    joined = (given[0][0], dataclasses.replace(given[0][1], raw=names))
    return [*(override for override in overrides if override[0] != "val_file"), joined]


def usage() -> str:
    """The text of ``--help``."""
    rows = []
    for leaf in leaves(PrepConfig).values():
        default = next(item.default for item in dataclasses.fields(PrepConfig) if item.name == leaf.path)
        shown = "" if default in (None, (), False) else f" [{default}]"
        rows += textwrap.wrap(f"{leaf.doc}{shown}", 100, initial_indent=f"  --{leaf.path:<12} ", subsequent_indent=" " * 17)
    return USAGE + "\n".join(rows)


def prepare(config: PrepConfig, command: str) -> None:
    """Make the dataset that a resolved ``config`` describes, unless it is already there; prints what came out.

    ``command`` is what to type to go on after an interruption.
    """
    assert config.tokenizer
    started = time.monotonic()
    array = array_task() if config.runner == "slurm" else None
    to_learn = wanted_size(config.tokenizer)
    # What can be refused before any text is looked at: standard input and streams take as long as they take to arrive.
    refuse_own_output(config)
    existing = existing_dataset(config.out, config.overwrite) if config.out else None
    tokenizer = None if to_learn else load_tokenizer(config.tokenizer)
    if config.plan:
        _print_plan(config, tokenizer)
        return
    assert config.out
    shop = Workshop(config.out)
    if config.fresh:
        with shop.held():  # nobody else is reading it
            shutil.rmtree(hub.stream_folder(config.out), ignore_errors=True)
    if existing is not None and not config.overwrite:
        _confirm(config, config.out, existing, tokenizer)
        shop.remove_if_free()
        shutil.rmtree(hub.stream_folder(config.out), ignore_errors=True)
        print(f"{config.out}: already there, made from the same text with the same options; nothing to do")
        print_next(config)
        return
    corpus = find_corpus(config)
    with shop.held(shared=array is not None), _explained(shop, corpus, command):
        job, engine, keys = begin(shop, config, corpus, tokenizer)
        if array:
            done = encode_share(shop, config, job, engine, corpus, keys, array)
            print(f"task {array.index + 1} of {array.count}: {done} units done; complete the dataset with --runner local")
            return
        outcome = assemble(shop, config, job, engine, corpus, keys)
        if problem := _missing_split(outcome, config):
            shop.discard(contents_only=True)  # going on would end here again
            raise DataError(problem)
        write_manifest(shop.dataset, make_manifest(config, job, engine.tokenizer, corpus, outcome))
        publish(shop.dataset, config.out)
        shop.discard(contents_only=True)
    if hint := _unused_separator(config, corpus, outcome):
        print(hint)
    print_summary(config, job, engine.tokenizer, outcome, time.monotonic() - started)
    shutil.rmtree(hub.stream_folder(config.out), ignore_errors=True)  # the summary has named lines in it


def _confirm(config: PrepConfig, out: Path, existing: Manifest, tokenizer: Tokenizer | None) -> None:
    """Raises :class:`DataError` unless the dataset that is there is the one that was asked for."""
    found = differences(config, existing, tokenizer, is_whole(out, existing))
    if not found and not _streams_are_unchanged(config, existing) and not is_of(existing, find_corpus(config)):
        found = ["text"]
    if found:
        raise DataError(
            f"-o {out}: already holds another dataset (other {', '.join(found)}); "
            "add --overwrite to replace it, or give another -o"
        )


def _streams_are_unchanged(config: PrepConfig, existing: Manifest) -> bool:
    """Whether all sources are streams behind which there is what there was: then there is no need to fetch them again."""
    names = [*config.sources, *config.val_file]
    if not config.stream or not all(name.startswith(hub.PREFIX) for name in names):
        return False
    sources = existing.prep.get("sources", [])
    was = [(source.get("path"), source.get("origin"), source.get("split")) for source in sources]
    splits = [*(None for _ in config.sources), *(VAL for _ in config.val_file)]
    if [(name, split) for name, _, split in was] != list(zip(names, splits, strict=True)):
        return False
    return all(origin and hub.origin(hub.HubName.parse(name)) == origin for name, origin, _ in was)


def find_corpus(config: PrepConfig) -> Corpus:
    """Find the files, cut them into units and choose the split; raises :class:`DataError`."""
    sources = [demo_source()] if config.demo else find_sources(config.sources, config)
    return plan_corpus(config, sources, find_sources(config.val_file, config))


def _print_plan(config: PrepConfig, tokenizer: Tokenizer | None) -> None:
    print_plan(config, find_corpus(config), tokenizer)
    if config.stream and any(name.startswith(hub.PREFIX) for name in [*config.sources, *config.val_file]):
        size = f"{hub.STREAM_FILE_BYTES / 1e6:.0f} MB"
        print(f"  note       of an hf: stream, this is about the first {size} of text, which were fetched for it and not kept")


def plan_corpus(config: PrepConfig, sources: list[Source], val_sources: list[Source]) -> Corpus:
    """Cut the files into units and choose the split; raises :class:`DataError` when there is no text for one."""
    total = sum(source.size for source in [*sources, *val_sources])
    if total == 0:
        raise DataError(f"no text: {sum(len(source.files) for source in sources)} files, all empty")
    unit_bytes = config.unit_bytes or unit_size(total)
    pieces = within(plan_pieces(sources, unit_bytes), parse_size(config.limit))
    if config.val_file:
        val = pack(plan_pieces(val_sources, unit_bytes), unit_bytes, VAL)
        return Corpus(sources, val_sources, pack(pieces, unit_bytes, TRAIN) + val, SplitRule())
    rule, units = choose_split(pack(pieces, unit_bytes), config.val_share)
    return Corpus(sources, [], units, rule)


def _unused_separator(config: PrepConfig, corpus: Corpus, outcome: Outcome) -> str | None:
    """A hint, where ``--doc_sep`` has parted nothing: a typing mistake makes one document of each file."""
    files = sum(len(source.files) for source in [*corpus.sources, *corpus.val_sources])
    totals = outcome.totals
    documents = sum(info.documents for infos in outcome.infos.values() for info in infos) - (corpus.rule.tail is not None)
    documents += totals.empty + totals.duplicates + len(totals.bad) + sum(totals.tally.left_out.values())
    if not config.separator or documents > files:
        return None
    return f"note: --doc_sep {config.doc_sep!r} seems to stand in none of the {files:,} files: each is one document"


def _missing_split(outcome: Outcome, config: PrepConfig) -> str | None:
    """Why the dataset would not be what was asked for, if a split has no text."""
    wanted = [TRAIN, VAL] if config.val_file or config.val_share else [TRAIN]
    missing = [split for split in wanted if split not in outcome.infos]
    bad = outcome.totals.bad
    skipped = f"; {len(bad)} documents skipped, the first: {bad[0].problem}" if bad else ""
    if outcome.totals.duplicates:
        skipped += f"; {outcome.totals.duplicates:,} duplicates left out: the first, in the order of the files, is kept"
    return f"no text for the {' and the '.join(missing)} split{skipped}" if missing else None


# -------------------------------------------------------------------------------------------------------- interruptions


@contextlib.contextmanager
def _explained(shop: Workshop, corpus: Corpus, command: str) -> Iterator[None]:
    """Whatever ends a run, say what is kept and what to type."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        kept = shop.kept()
        state = (
            f"{kept} of {len(corpus.units)} units are done and kept; to go on: {command}" if kept else "nothing was done yet"
        )
        print(f"interrupted: {state}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None
    except OSError as error:
        kept = shop.kept()
        state = f"{kept} of {len(corpus.units)} units are done and kept: make room and run the same command again"
        reason = f"-o {shop.out}: cannot be written ({error.strerror or error})"
        raise DataError(f"{reason}; {state}" if kept else f"{reason}; nothing was published") from None


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does, after everything on the way out has cleaned up."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    wanted = {signal.SIGTERM: stop, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
