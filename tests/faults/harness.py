"""A fork server: a real process that has imported torch once, and forks a child for every trial.

A trial is a function of a module, called in a child that may be killed, run out of disk, or be traced. What it returned, how
it ended and what it printed come back as an :class:`Outcome`. The tests' own process never forks: it has threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from tests.running import REPO, environment

LIMIT = 120  # seconds for one trial
_WARM = ("accelerate", "accel_pretrain.train", "safetensors.torch", "hypothesis.stateful")


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: ``code`` is the exit status, or minus the number of the signal that killed it."""

    code: int
    value: Any
    output: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    def check(self) -> Any:
        """What the trial returned; for one that nothing was to happen to."""
        assert self.code == 0, self.output
        return self.value


class ForkServer:
    """The tests' end of the server."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "from tests.faults.harness import serve; serve()"]
        environ = environment(OMP_NUM_THREADS="1", PYTHONFAULTHANDLER="")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, cwd=REPO)

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        kill_after: float | None = None,
        strace: Sequence[str] | None = None,
    ) -> Outcome:
        """Call a module's function in a new child, which is killed after so many seconds, or traced with these options."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        name = (function.__module__, function.__qualname__)
        pickle.dump((name, arguments, kill_after, strace), self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def close(self) -> None:
        with self._process:  # closes its pipes, which ends it
            pass


@cache
def strace_works() -> bool:
    """Whether a process may be traced here: strace is there, and ptrace is allowed."""
    with contextlib.suppress(OSError):
        return subprocess.run(["strace", "-o", os.devnull, "true"], stderr=subprocess.DEVNULL).returncode == 0
    return False


# ------------------------------------------------------------------------------------------------------------ the server


def serve() -> None:
    """Answer requests until there are no more: the program that :class:`ForkServer` starts."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not end up among the replies
    for name in _WARM:
        importlib.import_module(name)
    while True:
        try:
            (module, function), arguments, kill_after, strace = pickle.load(requests)
        except EOFError:
            return
        importlib.import_module(module)  # here and not in the child: the next one has it already
        pickle.dump(_trial(module, function, arguments, kill_after, strace), replies)
        replies.flush()


def _trial(module: str, function: str, arguments: Sequence[Any], kill_after: float | None, strace: Any) -> Outcome:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as answer:
        ready, go = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(go)
            _child(getattr(sys.modules[module], function), arguments, ready, output, answer)
        os.close(ready)
        tracer = _trace(pid, strace) if strace is not None else None
        begin = time.monotonic()
        os.close(go)
        status = _wait(pid, kill_after)
        seconds = time.monotonic() - begin
        if tracer is not None:
            tracer.wait()
        value = None
        if os.fstat(answer.fileno()).st_size:
            answer.seek(0)
            with contextlib.suppress(EOFError, pickle.UnpicklingError):  # killed while it wrote its answer
                value, loaded = pickle.load(answer)
                for name in set(loaded) - set(sys.modules):  # what a trial imports late, the next ones find here
                    with contextlib.suppress(Exception):
                        importlib.import_module(name)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), value, text, seconds)


def _child(function: Callable[..., Any], arguments: Sequence[Any], ready: int, output: IO[bytes], answer: IO[bytes]) -> None:
    """Call ``function`` once the server says so, and leave without any of Python's farewells."""
    code = 1
    try:
        if sys.platform == "linux":  # any process of ours may trace this one, also where only parents may
            PR_SET_PTRACER, ANY = 0x59616D61, ctypes.c_ulong(-1)
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY, 0, 0, 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        os.read(ready, 1)
        before, value = set(sys.modules), None
        try:
            value = function(*arguments)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        pickle.dump((value, sorted(set(sys.modules) - before)), answer)
        answer.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _trace(pid: int, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Attach strace to a child that waits, and return once it is attached."""
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-p", str(pid), *options], stderr=subprocess.DEVNULL)
    status = Path(f"/proc/{pid}/status")
    while "TracerPid:\t0" in status.read_text() and tracer.poll() is None:
        time.sleep(0.001)
    return tracer


def _wait(pid: int, kill_after: float | None) -> int:
    """Wait for a child and return its status; kill it when its time is over."""
    end = time.monotonic() + (LIMIT if kill_after is None else kill_after)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL if kill_after is not None else signal.SIGABRT)
            end = time.monotonic() + LIMIT
        time.sleep(0.0005)
