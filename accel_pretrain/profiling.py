"""``debug.profile``: where the time of an update goes.

After a few updates to warm up, the parts of N updates are timed: at their borders the processor waits for the device, so that
they add up, at the price of what would have overlapped. Then N more are traced by torch's profiler, which slows them down: from
these come the operators, and ``profile/trace.json``, for chrome://tracing or https://ui.perfetto.dev. The table is printed, and
in ``profile/table.txt``. Every process takes part in the updates, and the main one keeps the record.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from accel_pretrain.aids import WARM_UP, Aid
from accel_pretrain.checkpoint import TrainState
from accel_pretrain.files import write_whole
from accel_pretrain.run import TrainingRun

FOLDER = "profile"
PARTS = ("data", "forward", "backward", "clipping", "optimizer")
_OPERATORS = 12  # rows of the table

Mark = Callable[[str], contextlib.AbstractContextManager[object]]


class Profiler(Aid):
    """Times and traces ``updates`` updates each, counted from when the run was put together; then it is gone."""

    def __init__(self, run: TrainingRun, updates: int) -> None:
        self._run, self._updates, self._seen = run, updates, 0
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._whole = 0.0
        self._profile: Any = None
        self._first_traced = 0
        run.log.line(
            f"Profile: updates {WARM_UP + 1} to {WARM_UP + updates} of this start are timed, {updates} more are traced"
        )

    @contextlib.contextmanager
    def around(self, state: TrainState) -> Iterator[None]:
        self._seen += 1
        if self._seen <= WARM_UP:
            yield
        elif self._seen <= WARM_UP + self._updates:
            self._wait()
            begin = time.perf_counter()
            with _marked(self._run, self._timed):
                yield
            self._wait()
            self._whole += time.perf_counter() - begin
        elif self._seen <= WARM_UP + 2 * self._updates and self._run.accelerator.is_main_process:
            with self._traced(state.step + 1):
                yield
        else:
            yield

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self._seconds[part] += time.perf_counter() - begin

    @contextlib.contextmanager
    def _traced(self, step: int) -> Iterator[None]:
        if self._profile is None:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._run.accelerator.device.type == "cuda")
            self._profile, self._first_traced = profile(activities=kinds), step
            self._profile.start()
        try:
            with record_function(f"update {step}"), _marked(self._run, record_function):
                yield
        except BaseException:
            self._profile.stop()
            raise
        if self._seen == WARM_UP + 2 * self._updates:
            self._wait()
            self._profile.stop()
            self._write(step)
            self._profile = None

    def close(self) -> None:
        if self._profile is not None:
            self._profile.stop()
        if self._seen < WARM_UP + 2 * self._updates:
            self._run.log.line(f"Profile: not finished, the run ended after {self._seen} updates")

    def _wait(self) -> None:
        if self._run.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self._run.accelerator.device)
        elif self._run.accelerator.device.type == "mps":
            torch.mps.synchronize()

    def _write(self, last: int) -> None:
        """Trace and table, as files; what the disk does not take costs a line, not the run."""
        table, folder = "\n".join([*self._parts_table(), *self._operators_table()]), self._run.run_dir / FOLDER
        self._run.log.line(table)
        try:
            folder.mkdir(exist_ok=True)
            write_whole(folder / "table.txt", (table + "\n").encode())
            self._profile.export_chrome_trace(str(folder / "trace.json"))
        except (OSError, RuntimeError) as error:
            self._run.log.line(f"Profile: {folder} could not be written ({str(error).splitlines()[0]})")
            return
        traced = f"updates {self._first_traced} to {last}"
        self._run.log.line(f"Profile: {folder / 'trace.json'} has {traced}; open it at https://ui.perfetto.dev")

    def _parts_table(self) -> list[str]:
        seconds = self._seconds | {"other": self._whole - sum(self._seconds.values())}
        count, whole = self._updates, self._whole
        lines = [f"Profile: an update takes {whole / count * 1000:.2f} ms, mean of {count}, if one waits between its parts"]
        return lines + [f"  {part:<12}{took / count * 1000:>11.3f} ms{took / whole:>8.1%}" for part, took in seconds.items()]

    def _operators_table(self) -> list[str]:
        """The operators that take longest themselves, without those that they call: on the device if that is a GPU."""
        on_gpu = self._run.accelerator.device.type == "cuda"

        def took(event: Any) -> float:  # microseconds
            return event.self_device_time_total if on_gpu else event.self_cpu_time_total

        marks = (*PARTS, "update ")
        events = [event for event in self._profile.key_averages() if not event.key.startswith(marks)]
        total = sum(map(took, events)) or 1.0
        lines = [
            f"Profile: operators by their own time on {'the GPU' if on_gpu else 'the CPU'}, of {self._updates} traced updates"
        ]
        for event in sorted(events, key=took, reverse=True)[:_OPERATORS]:
            per_update, calls = took(event) / self._updates / 1000, event.count / self._updates
            lines.append(f"  {event.key[:44]:<44}{per_update:>11.3f} ms{took(event) / total:>8.1%}{calls:>9.1f} calls")
        return lines


@contextlib.contextmanager
def _marked(run: TrainingRun, mark: Mark) -> Iterator[None]:
    """In the block, each part of an update runs inside ``mark(part)``."""
    forward: list[Any] = []

    def enter(*_: object) -> None:
        forward.append(mark("forward"))
        forward[-1].__enter__()

    def leave(*_: object) -> None:
        forward.pop().__exit__(None, None, None)

    hooks = [run.model.register_forward_pre_hook(enter, prepend=True), run.model.register_forward_hook(leave)]
    with (
        _method(run.batches, "micro_batches", mark, "data"),
        _method(run.accelerator, "backward", mark, "backward"),
        _method(run.accelerator, "clip_grad_norm_", mark, "clipping"),
        _method(run.guard, "step", mark, "optimizer"),
    ):
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextlib.contextmanager
def _method(owner: Any, name: str, mark: Mark, part: str) -> Iterator[None]:
    """In the block, calls of ``owner``'s method are marked."""
    method = getattr(owner, name)

    def marked(*arguments: Any, **options: Any) -> Any:
        with mark(part):
            return method(*arguments, **options)

    setattr(owner, name, marked)
    try:
        yield
    finally:
        delattr(owner, name)
