"""The errors that a user can cause, and how a program ends on one of them.

Everything that a person can fix by typing something else is a :class:`PretrainError`: its message says what is wrong
(with the key or the path and the value) and what to type. Programs run their ``main`` inside :func:`reported`, which prints
the message without a traceback and exits with the error's ``exit_code``: 2 for what was typed, 4 when no checkpoint can be
used, 5 for the storage, 6 for a run that diverged, 7 for a directory in use. A programmer's mistake stays an ``assert`` and
keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Iterator, Sequence

from accel_pretrain.redaction import guard_log, redact


class PretrainError(Exception):
    """Base class. Built from one message or from a list of problems that are reported together."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(self.message)

    @property
    def message(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in self.problems)

    def __reduce__(self) -> tuple[type[PretrainError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)  # survives the trip between processes


class ConfigError(PretrainError):
    """A config file, an override or a combination of settings that cannot be run."""


class DataError(PretrainError):
    """Text or a token dataset that is missing, damaged or does not fit the model."""


class CheckpointError(PretrainError):
    """A checkpoint that is missing, damaged or belongs to another run."""


class NoUsableCheckpointError(CheckpointError):
    """A run has checkpoints, and none of them is good: it must not begin anew in silence."""

    exit_code = 4


class StorageError(CheckpointError):
    """A checkpoint that could not be written: the disk is full or failing."""

    exit_code = 5


class DivergedError(PretrainError):
    """A run whose loss or gradient is not finite any more."""

    exit_code = 6


class LockedError(PretrainError):
    """A directory in which another run works."""

    exit_code = 7


_STORAGE = [getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EIO")]  # full, over quota, failing


class PeerError(PretrainError):
    """Another process of the run has ended, or does not answer."""

    exit_code = 1


def refuse(*checks: tuple[bool, str]) -> None:
    """Raise one :class:`ConfigError` with the message of every check whose condition is true."""
    if problems := [message for wrong, message in checks if wrong]:
        raise ConfigError(problems)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Print a :class:`PretrainError` as ``error: ...`` on stderr and exit with its code; let everything else through.

    Nothing that is printed or logged shows a secret of the environment.
    """
    guard_log()
    try:
        yield
    except PretrainError as error:
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error (rank {rank})"
        print(f"{prefix}: {redact(error.message)}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:  # no permission, a folder in the place of a file, a full disk: the machine's, not a programmer's
        place = f"{error.filename}: " if error.filename else ""
        print(redact(f"error: {place}{error.strerror or error}"), file=sys.stderr, flush=True)
        raise SystemExit(exit_code_of(error)) from None
    except Exception:
        if (shown := redact(text := traceback.format_exc())) == text:
            raise
        print(shown, file=sys.stderr, end="", flush=True)
        raise SystemExit(1) from None


def exit_code_of(error: BaseException) -> int:
    """The code with which :func:`reported` ends a program on ``error``; Python's own for what it lets through."""
    if isinstance(error, PretrainError):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, OSError):
        return StorageError.exit_code if error.errno in _STORAGE else 2
    return 130 if isinstance(error, KeyboardInterrupt) else 1
