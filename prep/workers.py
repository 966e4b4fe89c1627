"""Encoding units in supervised processes.

A worker takes one unit at a time, writes the ids to files of its own in the build folder, and sends back counts: no
text and no ids travel between processes. The parent waits for results and for deaths alike, so a worker that the system
kills ends the run with one clear error; a pool from the standard library would wait for ever.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from accel_pretrain.errors import DataError, PretrainError
from accel_pretrain.shards import DTYPES, as_ids
from accel_pretrain.tokenizer import Tokenizer, load_tokenizer
from prep.readers import BadDocument
from prep.split import SplitRule
from prep.units import Unit


@dataclass(frozen=True)
class Job:
    """What is the same for every unit. The tokenizer is the one saved in ``folder/tokenizer``."""

    folder: Path
    dtype: str
    rule: SplitRule
    on_error: str

    def ids_path(self, index: int, split: str) -> Path:
        return self.folder / f"unit-{index:08d}.{split}"


@dataclass
class Count:
    """What one unit adds to one split."""

    tokens: int = 0
    documents: int = 0
    utf8_bytes: int = 0


@dataclass
class UnitReport:
    """What became of unit ``index``: its ids lie in ``Job.ids_path`` for each split in ``splits``."""

    index: int
    content: bytes
    splits: dict[str, Count] = field(default_factory=dict)
    empty: int = 0
    bad: list[BadDocument] = field(default_factory=list)


def encode_unit(job: Job, tokenizer: Tokenizer, index: int, unit: Unit) -> UnitReport:
    """Read, split and encode one unit, and write its ids; raises :class:`DataError` on a bad document, or skips it."""
    report = UnitReport(index, unit.content())
    ids: dict[str, list[np.ndarray]] = {}
    for document in unit.documents():
        if isinstance(document, BadDocument):
            if job.on_error == "fail":
                raise DataError(document.problem)
            report.bad.append(document)
            continue
        if document.is_empty:
            report.empty += 1
            continue
        for split, part in [(unit.split, document)] if unit.split else job.rule.place(document):
            encoded = tokenizer.encode_document(part.text) if part.ends else tokenizer.encode(part.text)
            ids.setdefault(split, []).append(encoded)
            count = report.splits.setdefault(split, Count())
            count.tokens += encoded.size
            count.documents += part.ends
            count.utf8_bytes += len(part.data)
    for split, parts in ids.items():
        stored = as_ids(np.concatenate(parts), job.dtype, tokenizer.vocab_size)
        job.ids_path(index, split).write_bytes(stored.data)  # ndarray.tofile hides why a write fails
    return report


def read_ids(job: Job, index: int, split: str) -> np.ndarray:
    """The ids that :func:`encode_unit` wrote, which are then deleted."""
    path = job.ids_path(index, split)
    ids = np.fromfile(path, dtype=DTYPES[job.dtype])
    path.unlink()
    return ids


def encode_units(job: Job, tokenizer: Tokenizer, units: Sequence[Unit], workers: int) -> Generator[UnitReport]:
    """A report for every unit, as they are done: in any order. Close the iterator, and the workers are gone."""
    if min(workers, len(units)) == 1:
        return (encode_unit(job, tokenizer, index, unit) for index, unit in enumerate(units))
    return _supervise(job, units, min(workers, len(units)))


# ------------------------------------------------------------------------------------------------------------ processes


_STOPPING = {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "pthread_sigmask") else set()


@dataclass
class _Worker:
    process: BaseProcess
    channel: Connection[Any, Any]
    unit: Unit | None = None


def _supervise(job: Job, units: Sequence[Unit], workers: int) -> Generator[UnitReport]:
    todo = iter(enumerate(units))
    crew: list[_Worker] = []
    try:
        for _ in range(workers):
            crew.append(_start(job))
            _hand_out(crew[-1], todo)
        while busy := [worker for worker in crew if worker.unit]:
            ready = wait([worker.channel for worker in busy] + [worker.process.sentinel for worker in busy])
            for worker in busy:
                if worker.channel in ready or worker.process.sentinel in ready:
                    report = _receive(worker)
                    _hand_out(worker, todo)
                    yield report
    finally:
        # Idle, or on the way out of an error: they hold nothing worth saving. A signal may have come between the start of one
        # and its place in the crew.
        for process in {*(worker.process for worker in crew), *multiprocessing.active_children()}:
            process.kill()
        for worker in crew:
            worker.process.join()
            worker.channel.close()


def _start(job: Job) -> _Worker:
    context = multiprocessing.get_context("spawn")  # fork would copy the threads of a library without their locks
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(job, theirs), daemon=True)
    # A signal that came while a process is half started would leave one behind that nobody knows; it waits until it is known.
    # The child inherits the block: Ctrl-C is for the parent, from the child's first instruction on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING) if _STOPPING else set()
    try:
        process.start()
    finally:
        if _STOPPING:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return _Worker(process, ours)


def _hand_out(worker: _Worker, todo: Iterator[tuple[int, Unit]]) -> None:
    index, worker.unit = next(todo, (0, None))
    if worker.unit:
        with contextlib.suppress(BrokenPipeError):  # it is dead, and its sentinel will say so
            worker.channel.send((index, worker.unit))


def _receive(worker: _Worker) -> UnitReport:
    """The report of a worker that is done; raises what went wrong in it, or that it died."""
    assert worker.unit is not None
    try:
        outcome = worker.channel.recv() if worker.channel.poll() else None
    except (EOFError, ConnectionResetError):
        outcome = None
    if isinstance(outcome, UnitReport):
        return outcome
    if isinstance(outcome, PretrainError):
        raise outcome
    if isinstance(outcome, str):
        raise RuntimeError(f"a worker process failed on {worker.unit.name}\n{outcome}")
    worker.process.join()
    code = worker.process.exitcode or 0
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raise DataError(
        f"a worker process {ended} while it had {worker.unit.name}; nothing was published. "
        "If memory ran out, use fewer: --workers 1"
    )


def _work(job: Job, channel: Connection[Any, Any]) -> None:
    """The life of a worker process; it ends when the parent's side of the channel does."""
    if _STOPPING:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        tokenizer = load_tokenizer(job.folder / "tokenizer")
        while True:
            index, unit = channel.recv()
            channel.send(encode_unit(job, tokenizer, index, unit))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except MemoryError:
        channel.send(DataError("a worker process ran out of memory; use fewer: --workers 1, or shorter documents"))
    except PretrainError as error:
        channel.send(error)
    except OSError as error:
        channel.send(DataError(f"{job.folder.parent}: cannot be written ({error.strerror}); nothing was published"))
    except BaseException:  # a panic in a Rust extension is not an Exception, and cannot be pickled
        channel.send(traceback.format_exc())
