"""One job from its work folder to the files of the dataset: begun or gone on with, encoded, assembled."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from accel_pretrain.errors import DataError
from accel_pretrain.shards import ShardInfo, dtype_for
from accel_pretrain.tokenizer import Tokenizer, load_tokenizer
from accel_pretrain.typed_yaml import to_plain
from prep.assembly import Assembly, Totals
from prep.config import PrepConfig, what_decides
from prep.encode import Job, UnitReport, is_intact, read_report
from prep.engines import Engine, choose_engine
from prep.estimate import check_disk
from prep.journal import Workshop
from prep.leakage import shared_documents
from prep.learn import learn_tokenizer
from prep.progress import progress
from prep.report import RECIPE, Corpus
from prep.runners import ArrayTask, encode_tasks
from prep.split import TRAIN, VAL
from prep.units import keys_of
from prep.workers import Task

_LEARNED = "learned"


@dataclass(frozen=True)
class Outcome:
    """What a run made: the files of each split, and what all units together came to."""

    infos: dict[str, list[ShardInfo]]
    totals: Totals
    shared: int | None = None  # documents of a given val split that are in the train split too


def begin(shop: Workshop, config: PrepConfig, corpus: Corpus, tokenizer: Tokenizer | None) -> tuple[Job, Engine, list[str]]:
    """Open or go on with the job in the work folder; with its engine, whose tokenizer may be learned first, and the keys."""
    assert config.tokenizer
    given = ("sources", "val_file")
    options = {key: value for key, value in what_decides(config).items() if key != "on_error"}
    named = {key: value for key, value in to_plain(config).items() if key in given}
    fingerprint = {"tokenizer content": tokenizer.fingerprint} if tokenizer else {}
    with shop.one_at_a_time():
        shop.start({"recipe": RECIPE} | named | options | fingerprint, config.fresh)
        saved = shop.dataset / "tokenizer"
        if tokenizer is None:
            text = hashlib.sha256("".join(keys_of(corpus.units, corpus.rule.key())).encode()).hexdigest()
            tokenizer = _learned(shop, saved, text) or learn_tokenizer(config.tokenizer, corpus.units, corpus.rule)
            _save(tokenizer, saved)
            shop.note(_LEARNED, {"text": text, "fingerprint": tokenizer.fingerprint})
        else:
            _save(tokenizer, saved)
    engine = choose_engine(config.engine, tokenizer, saved)
    dtype, dedup = dtype_for(tokenizer.vocab_size - 1), config.dedup != "none"
    job = Job(shop.folder, dtype, tokenizer.eot_id, corpus.rule, config.on_error, engine.name, dedup)
    identity = f"{RECIPE} {tokenizer.fingerprint} {dtype} {corpus.rule.key()} {dedup}"
    if config.check_disk and not shop.kept():
        check_disk(shop.folder, corpus.size, tokenizer)
    return job, engine, keys_of(corpus.units, identity)


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    """Save it unless it is there: other tasks of an array may be reading it."""
    with contextlib.suppress(DataError):
        if load_tokenizer(folder).fingerprint == tokenizer.fingerprint:
            return
    tokenizer.save(folder)


def _learned(shop: Workshop, saved: Path, text: str) -> Tokenizer | None:
    """The tokenizer that was learned from this text before the run was stopped."""
    noted = shop.noted(_LEARNED)
    if noted.get("text") != text:
        return None
    with contextlib.suppress(DataError):
        tokenizer = load_tokenizer(saved)
        return tokenizer if tokenizer.fingerprint == noted["fingerprint"] else None
    return None


def assemble(shop: Workshop, config: PrepConfig, job: Job, engine: Engine, corpus: Corpus, keys: Sequence[str]) -> Outcome:
    """Encode every unit that is not done, and join the ids in the order of the units."""
    shop.sweep(set(keys))
    assembly = Assembly(shop, job, keys, config.shard_tokens, corpus.size)
    held: dict[int, UnitReport] = {}
    tasks = _open_tasks(shop, job, corpus, keys, range(assembly.following, len(keys)), False, held)
    with contextlib.closing(assembly), progress(corpus.size) as advance:
        if len(tasks) < len(keys):
            kept = len(keys) - len(tasks)
            print(f"going on: {kept} of {len(keys)} units were done before", file=sys.stderr, flush=True)
            advance(corpus.size - sum(unit.size for _, unit, _ in tasks), assembly.tokens, before=True)
        with contextlib.closing(encode_tasks(config, job, engine, tasks) if tasks else _nothing()) as encoded:
            _join(assembly, held)
            for number, report in encoded:
                held[number] = report
                advance(corpus.units[number].size, report.tokens)
                _join(assembly, held)
        infos = assembly.finish()
    assert assembly.following == len(keys)
    shared = None
    if config.val_file and {TRAIN, VAL} <= infos.keys():
        shared = shared_documents(shop.dataset, infos[TRAIN], infos[VAL], job.dtype)
    return Outcome(infos, assembly.totals, shared)


def _join(assembly: Assembly, held: dict[int, UnitReport]) -> None:
    """Append the units before which none is missing."""
    while assembly.following in held:
        assembly.add(held.pop(assembly.following))


def _nothing() -> Generator[tuple[int, UnitReport]]:
    yield from ()


def _open_tasks(
    shop: Workshop,
    job: Job,
    corpus: Corpus,
    keys: Sequence[str],
    numbers: range,
    shared: bool,
    done: dict[int, UnitReport] | None = None,
) -> list[Task]:
    """The units that are still to be encoded; the reports of those whose files are there and intact go into ``done``."""
    finished, tasks = shop.finished(), list[Task]()
    for number in numbers:
        key = keys[number]
        if key in finished:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                report = read_report(job.unit_path(key))
                if shared or is_intact(job.unit_path(key), report, job.dtype):
                    if done is not None:
                        done[number] = report
                    continue
        tasks.append((number, corpus.units[number], key))
    return tasks


def encode_share(
    shop: Workshop, config: PrepConfig, job: Job, engine: Engine, corpus: Corpus, keys: Sequence[str], array: ArrayTask
) -> int:
    """Encode the units of one task of an array, and leave their files; how many."""
    tasks = array.share(_open_tasks(shop, job, corpus, keys, range(len(keys)), shared=True))
    if not tasks:
        return 0
    local = dataclasses.replace(config, runner="local")
    size = sum(unit.size for _, unit, _ in tasks)
    with contextlib.closing(encode_tasks(local, job, engine, tasks)) as encoded, progress(size) as advance:
        for number, report in encoded:
            advance(corpus.units[number].size, report.tokens)
    return len(tasks)
