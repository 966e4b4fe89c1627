"""The processes of a run as one of their threads sees them: what each has to say, and failures that are everybody's.

:func:`accel_pretrain.runtime.together` does the same on Accelerate's process group. A checkpoint that is written in the
background may not use that one, in which the training's own messages are under way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator

from accel_pretrain.errors import PretrainError


class Peers:
    """This process among the others. Every method is collective, except for one process alone.

    ``own_group``: talk in a process group of the CPU that is made for this object, so that a thread can. Making it is
    collective too. It waits as long as Accelerate's group does: torch's 30 minutes may be less than a save takes.
    ``is_local_main``: the first process of its machine.
    """

    def __init__(self, accelerator: Accelerator, *, own_group: bool = False) -> None:
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.is_main, self.is_local_main = self.rank == 0, accelerator.is_local_main_process
        self._group = None
        if own_group and self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=timeout_of(accelerator))

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank; it must be picklable."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    @contextlib.contextmanager
    def together(self, error: type[PretrainError], what: str) -> Iterator[None]:
        """Run a block on every process; if it fails anywhere, ``error`` is raised everywhere, with the first one's reason.

        A :class:`PretrainError` of the block's own, such as of a run that diverged, is raised as it is where it happened.
        """
        caught: Exception | None = None
        try:
            yield
        except Exception as problem:  # torch and safetensors have no common error for a full disk
            caught = problem
        reasons = self.gather(None if caught is None else reason_of(caught))
        if isinstance(caught, PretrainError):
            raise caught
        if failed := [rank for rank, reason in enumerate(reasons) if reason is not None]:
            who = f" (rank {failed[0]})" if self.count > 1 else ""
            raise error(f"{what}: {reasons[failed[0]]}{who}") from caught

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """Run a block on every process; of those that refuse in the same words, only the first says so. All end."""
        caught: PretrainError | None = None
        try:
            yield
        except PretrainError as problem:
            caught = problem
        said = self.gather(None if caught is None else caught.message)
        if caught is not None and said.index(caught.message) == self.rank:
            raise caught
        if any(message is not None for message in said):
            time.sleep(1)  # a launcher that sees one end ends the others: the first is to have spoken
            raise SystemExit(2 if caught is None else caught.exit_code) from None


def timeout_of(accelerator: Accelerator) -> timedelta | None:
    """How long the processes wait for each other, as :func:`accel_pretrain.runtime.build_accelerator` has it; None: torch's."""
    return None if accelerator.init_handler is None else accelerator.init_handler.timeout


def reason_of(error: Exception) -> str:
    """The first line of what an error has to say."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
