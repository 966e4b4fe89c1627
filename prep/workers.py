"""Encoding units in supervised processes of this machine.

A worker takes one unit at a time, commits its file, and sends back counts: no text and no ids travel between processes. The
parent waits for results and for deaths alike; a pool from the standard library would wait for ever for a worker that the
system killed.

A unit whose worker died is given to another. When that dies too, a third one says which document it is about to encode, so that
the last one it named is known; and that document is encoded alone, twice, before it is held to be the cause.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from accel_pretrain.errors import DataError, PretrainError
from accel_pretrain.tokenizer import load_tokenizer
from prep.encode import Job, UnitReport, encode_alone, encode_unit
from prep.engines import Engine, make_engine
from prep.units import Unit

Task = tuple[int, Unit, str]  # its number, the unit, its key
_STOPPING = {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "pthread_sigmask") else set()
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PATIENCE = 3  # how often a unit may end its worker where no document is to blame


def engine_of(job: Job) -> Engine:
    """The engine of a job, in the process that will use it."""
    return make_engine(job.engine, load_tokenizer(job.tokenizer), job.tokenizer)


def encode_here(job: Job, engine: Engine, tasks: Sequence[Task]) -> Generator[tuple[int, UnitReport]]:
    """The report of every task, in this process and in order."""
    try:
        for number, unit, key in tasks:
            yield number, encode_unit(job, engine, unit, key)
    except MemoryError:
        raise _out_of_memory() from None


def encode_supervised(job: Job, tasks: Sequence[Task], workers: int) -> Generator[tuple[int, UnitReport]]:
    """The report of every task, as they are done: in any order. Close the iterator, and the workers are gone."""
    todo = [_Errand(*task) for task in reversed(tasks)]
    crew: list[_Worker] = []
    try:
        for _ in range(min(workers, len(tasks))):
            crew.append(_start(job))
            _hand_out(crew[-1], todo)
        while busy := [worker for worker in crew if worker.errand]:
            ready = wait([worker.channel for worker in busy] + [worker.process.sentinel for worker in busy])
            for worker in busy:
                if worker.channel not in ready and worker.process.sentinel not in ready:
                    continue
                errand, report = worker.errand, _receive(worker)
                assert errand
                if worker.errand is None and not worker.process.is_alive():
                    crew[crew.index(worker)] = worker = _start(job)
                if isinstance(report, UnitReport):
                    yield errand.number, report
                elif report is not _NOTHING_YET:
                    todo.append(errand)
                if worker.errand is None:
                    _hand_out(worker, todo)
    finally:
        # Idle, or on the way out of an error: what they hold is lost, and done again by the next run. A signal may have come
        # between the start of one and its place in the crew.
        for process in {*(worker.process for worker in crew), *multiprocessing.active_children()}:
            process.kill()
        for worker in crew:
            worker.process.join()
            worker.channel.close()


@dataclass
class _Errand:
    """A unit on its way, and what is known about it from the workers that it has ended."""

    number: int
    unit: Unit
    key: str
    without: frozenset[int] = frozenset()
    deaths: int = 0
    mercies: int = 0
    careful: bool = False
    named: int | None = None
    suspect: int | None = None

    def survived(self) -> None:
        """The document that was suspected was encoded alone, and nothing happened."""
        self.suspect = None
        self.mercies += 1

    def died(self, ended: str) -> None:
        """Think about what to try next; raises :class:`DataError` when nothing is left."""
        self.deaths += 1
        if self.suspect is not None:
            if self.deaths > 1:  # twice, alone
                self.without |= {self.suspect}
                self.suspect, self.careful, self.deaths = None, False, 1
        elif not self.careful:
            self.careful = self.deaths > 1
        elif self.named is None:
            self.mercies += 1
        else:
            self.suspect, self.deaths = self.named, 0
        self.named = None
        if self.mercies >= _PATIENCE:
            raise DataError(
                f"a worker process {ended} each time it had {self.unit.name}, and no single document is the cause; "
                "if memory ran out, use fewer: --workers 1"
            )


@dataclass
class _Worker:
    process: BaseProcess
    channel: Connection[Any, Any]
    errand: _Errand | None = None


_NOTHING_YET = object()


def _start(job: Job) -> _Worker:
    return _Worker(*spawned(_work, job))


def spawned(work: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection[Any, Any]]:
    """A new process that does ``work(*arguments, channel)`` and is not interrupted by Ctrl-C, and our end of the channel."""
    context = multiprocessing.get_context("spawn")  # fork would copy the threads of a library without their locks
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(*arguments, theirs), daemon=True)
    # A signal that came while a process is half started would leave one behind that nobody knows; it waits until it is known.
    # The child inherits the block: Ctrl-C is for the parent, from the child's first instruction on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING) if _STOPPING else set()
    main = sys.modules["__main__"]
    about = {name: getattr(main, name, None) for name in ("__spec__", "__file__")}
    try:
        for name in about:  # else the child would import the program that was started, of which it needs nothing
            setattr(main, name, None)
        process.start()
    finally:
        for name, value in about.items():
            setattr(main, name, value)
        if _STOPPING:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return process, ours


def _hand_out(worker: _Worker, todo: list[_Errand]) -> None:
    worker.errand = todo.pop() if todo else None
    if errand := worker.errand:
        with contextlib.suppress(BrokenPipeError):  # it is dead, and its sentinel will say so
            worker.channel.send((errand.unit, errand.key, errand.without, errand.careful, errand.suspect))


def _receive(worker: _Worker) -> object:
    """What a worker has to say: a report; None, when its errand must be run again; or nothing yet. Raises its errors."""
    errand = worker.errand
    assert errand
    try:
        outcome = worker.channel.recv() if worker.channel.poll() else None
    except (EOFError, ConnectionResetError):
        outcome = None
    if isinstance(outcome, int):
        errand.named = outcome
        return _NOTHING_YET
    if isinstance(outcome, PretrainError | OSError):
        raise outcome
    if isinstance(outcome, str):
        raise RuntimeError(f"a worker process failed on {errand.unit.name}\n{outcome}")
    worker.errand = None
    if isinstance(outcome, UnitReport):
        return outcome
    if outcome == ():
        errand.survived()
        return None
    worker.process.join()
    worker.channel.close()
    code = worker.process.exitcode or 0
    errand.died(f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}")
    return None


def _out_of_memory() -> DataError:
    return DataError("memory ran out; use fewer processes: --workers 1, or shorter documents: --max_document")


def of_the_machine(error: OSError, job: Job) -> Exception:
    """``error`` itself where the work folder cannot be written, of which the parent says what is kept; else a message."""
    if error.errno in _FULL or (error.filename and Path(os.fsdecode(error.filename)).is_relative_to(job.folder)):
        return OSError(error.errno, error.strerror)
    return DataError(f"{error.filename or job.folder}: {error.strerror}")


def _work(job: Job, channel: Connection[Any, Any]) -> None:
    """The life of a worker process; it ends when the parent's side of the channel does."""
    if _STOPPING:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            engine = engine_of(job)
            while True:
                unit, key, without, careful, suspect = channel.recv()
                if suspect is None:
                    channel.send(encode_unit(job, engine, unit, key, without, channel.send if careful else None))
                else:
                    encode_alone(engine, job.rule, unit, suspect)
                    channel.send(())
        except MemoryError:
            channel.send(_out_of_memory())
        except PretrainError as error:
            channel.send(error)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except OSError as error:
            channel.send(of_the_machine(error, job))
        except BaseException:  # a panic in a Rust extension is not an Exception, and cannot be pickled
            channel.send(traceback.format_exc())
