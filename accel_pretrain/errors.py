"""The errors that a user can cause, and how a program ends on one of them.

Everything that a person can fix by typing something else is a :class:`PretrainError`: its message says what is wrong
(with the key or the path and the value) and what to type. Programs run their ``main`` inside :func:`reported`, which prints
the message without a traceback and exits with code 2. A programmer's mistake stays an ``assert`` and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence


class PretrainError(Exception):
    """Base class. Built from one message or from a list of problems that are reported together."""

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


def refuse(*checks: tuple[bool, str]) -> None:
    """Raise one :class:`ConfigError` with the message of every check whose condition is true."""
    if problems := [message for wrong, message in checks if wrong]:
        raise ConfigError(problems)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Print a :class:`PretrainError` as ``error: ...`` on stderr and exit with code 2; let everything else through."""
    try:
        yield
    except PretrainError as error:
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error (rank {rank})"
        print(f"{prefix}: {error.message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:  # no permission, a folder in the place of a file, a full disk: the machine's, not a programmer's
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
