"""When a run saves: at once or in the background, again after a failure, by the clock.

A save that fails does not end the run: its temporary folder is dropped, and it is tried again half a minute later, or when the
next one is due. Three failures in a row over at least a minute do end it, and so does a failure of the last save of a run.

With ``checkpoint.asynchronous``, a thread copies the state to host memory while the next update computes its gradients
(:meth:`Saver.wait_until_copied` stands before that update's step, as in CheckFreq), and then writes and publishes the copy as
if it were the model. At most one save is under way.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.checkpointing import save_accelerator_state

from accel_pretrain.checkpoint import CheckpointConfig, TrainState, optimizer_updates
from accel_pretrain.errors import CheckpointError, StorageError
from accel_pretrain.parallel import forget_gathered, whole
from accel_pretrain.peers import Peers
from accel_pretrain.publish import publish

MAX_FAILURES, FAILING_SECONDS = 3, 60.0  # in a row, and over how long: a short outage must not end a run that saves often
RETRY_SECONDS = 30.0
_log = logging.getLogger(__name__)

Buffers = dict[str, torch.Tensor]


class Saver:
    """Saves checkpoints of one run, on every process alike. All methods but the copying and the clock are collective.

    ``announce`` is called with a state and its checkpoint once it is published, on the main process. ``saved`` is the state
    that was saved last, or resumed from.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        config: CheckpointConfig,
        state: TrainState,
        announce: Callable[[TrainState, Path], object] = lambda state, path: None,
    ) -> None:
        self.saved = copy.deepcopy(state)
        self._accelerator, self._run_dir, self._config, self._announce = accelerator, run_dir, config, announce
        self._peers = Peers(accelerator, own_group=True)
        self._copied, self._thread, self._buffers = threading.Event(), None, {}
        self._copied.set()
        self._outcome: tuple[TrainState, Exception | None] | None = None
        self._failures: list[Exception] = []
        self._began = self._first_failed = time.monotonic()
        self._resumed = f"checkpoint_{state.step:08d}"  # known to load, which nobody can say yet of what this process saves

    def due_by_clock(self) -> bool:
        """Whether ``every_minutes`` are over, or a failed save is to be tried again. The main process's answer is the run's."""
        minutes = self._config.every_minutes
        wait = float("inf") if minutes is None else minutes * 60
        outcome, failures = self._outcome, len(self._failures)
        if self._thread is not None:  # wait() has not seen yet what has become of this one
            failures = failures + 1 if outcome is not None and outcome[1] is not None else 0
        if failures:
            wait = min(wait, RETRY_SECONDS * 2 ** min(failures - 1, MAX_FAILURES))
        return self._peers.is_main and time.monotonic() - self._began >= wait

    def save(
        self, state: TrainState, *, facts: Mapping[str, Any], write_extras: Callable[[Path], None], is_best: bool = False,
        is_stable: bool = False,
    ) -> None:  # fmt: skip
        """Publish model, optimizer and ``state``: now, or soon. Raises :class:`StorageError` after three failures in a row.

        Amid updates that are not finite, nothing old is removed for it.
        """
        self.wait(state)
        self._began = time.monotonic()
        kept = copy.deepcopy(state)
        job = partial(
            publish, self._accelerator, self._run_dir, kept, facts=facts, write_extras=write_extras,
            is_best=is_best, is_stable=is_stable,
            keep_last=None if state.health.in_a_row else self._config.keep_last, pin_interval=self._config.pin_interval,
            protected=[self._resumed], peers=self._peers,
        )  # fmt: skip
        sharded = self._accelerator.is_fsdp2
        if not self._config.asynchronous:
            self._attempt(partial(job, source=Gathered(self._accelerator)) if sharded else job, kept)
            self.wait(state)
            return
        frozen = Gathered(self._accelerator) if sharded else Frozen(self._accelerator, self._buffers)
        self._copied.clear()
        self._thread = threading.Thread(target=self._in_background, args=(job, kept, frozen), name="checkpoint")
        self._thread.start()

    def _in_background(self, job: Callable[..., Path], state: TrainState, frozen: Frozen) -> None:
        try:
            frozen.copy()
        except Exception as error:
            frozen.failure = error  # publish meets it where the other processes can hear of it
        finally:
            self._copied.set()
        self._attempt(partial(job, source=frozen), state)

    def _attempt(self, job: Callable[[], Path], state: TrainState) -> None:
        try:
            path = job()
        except Exception as error:  # of a thread; wait() raises what is not to be tried again
            if isinstance(error, CheckpointError) and self._peers.is_main:
                _log.warning("%s; training goes on, and it will be tried again", error.message)
            self._outcome = state, error
        else:
            self._outcome = state, None
            if self._peers.is_main:
                self._announce(state, path)

    def wait_until_copied(self) -> None:
        """Before anything changes weights or moments."""
        self._copied.wait()

    def wait(self, state: TrainState) -> None:
        """Wait for a save under way. If it failed, ``state`` forgets a best loss that is in no checkpoint."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._outcome is None:
            return
        (saved, error), self._outcome = self._outcome, None
        if error is None:
            self.saved, self._failures = saved, []
            return
        if not isinstance(error, CheckpointError):
            raise error
        self._first_failed = self._first_failed if self._failures else self._began
        self._failures.append(error)
        if state.best_val_loss == saved.best_val_loss:
            state.best_val_loss = self.saved.best_val_loss
        seconds = max(self._peers.gather(time.monotonic() - self._first_failed))  # everybody decides alike
        if len(self._failures) >= MAX_FAILURES and seconds >= FAILING_SECONDS:
            raise StorageError(f"{len(self._failures)} saves in a row have failed; the last: {error.message}") from None

    def finish(self, state: TrainState) -> None:
        """The end: wait for a save under way, and raise :class:`StorageError` if the last one failed."""
        self.wait(state)
        if self._failures:
            raise StorageError(f"{self._failures[-1]}; what was trained since update {self.saved.step} is lost")

    def close(self) -> None:
        """Wait for a save under way, whatever has become of it: the end of a run that failed."""
        if self._thread is not None:
            self._thread.join()


class Frozen:
    """Model and optimizer as they were when this was made; a source for :func:`~accel_pretrain.publish.publish`.

    Until :meth:`copy` has returned, they must not change. ``buffers`` are reused by the next copy. Where every process holds
    the whole model, only the main one copies it.
    """

    def __init__(self, accelerator: Accelerator, buffers: Buffers) -> None:
        self._accelerator, self._buffers = accelerator, buffers
        main = accelerator.is_main_process
        self._models = [accelerator.get_state_dict(model, unwrap=False) for model in accelerator._models] if main else []
        self._optimizers = [_State(optimizer.state_dict()) for optimizer in accelerator._optimizers] if main else []
        self._scaler = None if accelerator.scaler is None else _State(copy.deepcopy(accelerator.scaler.state_dict()))
        self.updates = optimizer_updates(accelerator._optimizers[0]) if main and accelerator._optimizers else None
        self.failure: Exception | None = None
        self._ready = torch.cuda.current_stream().record_event() if accelerator.device.type == "cuda" else None

    def copy(self) -> None:
        """Copy everything to host memory; in a thread of its own, beside the computation of gradients."""
        known: dict[tuple[Any, ...], torch.Tensor] = {}
        if self._ready is None:
            self._copy_all(known)
            return
        with torch.cuda.device(self._accelerator.device), torch.cuda.stream(torch.cuda.Stream()) as _:
            torch.cuda.current_stream().wait_event(self._ready)
            self._copy_all(known)
            torch.cuda.current_stream().synchronize()

    def _copy_all(self, known: dict[tuple[Any, ...], torch.Tensor]) -> None:
        self._models = [self._copy_of(state, f"model{number}", known) for number, state in enumerate(self._models)]
        self._optimizers = [
            _State(self._copy_of(own.state_dict(), f"optimizer{number}", known)) for number, own in enumerate(self._optimizers)
        ]

    def _copy_of(self, value: Any, name: str, known: dict[tuple[Any, ...], torch.Tensor]) -> Any:
        """The same structure with copied tensors; tensors that share their memory share that of the copy."""
        if isinstance(value, torch.Tensor):
            place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            if place not in known or not value.numel():
                if name not in self._buffers or self._buffers[name].shape != value.shape:
                    self._buffers[name] = torch.empty_like(value, device="cpu", pin_memory=value.device.type == "cuda")
                known[place] = self._buffers[name].copy_(value.detach(), non_blocking=True)
            return known[place]
        if isinstance(value, dict):
            items = [(key, self._copy_of(own, f"{name}.{key}", known)) for key, own in value.items()]
            return type(value)(items)
        if isinstance(value, list):
            return [self._copy_of(own, f"{name}.{number}", known) for number, own in enumerate(value)]
        return value

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        if self.failure is not None:
            raise self.failure
        weights: dict[str, Any] = {}
        for state in self._models:
            weights.update(state)
        return weights

    def write(self, folder: Path) -> None:
        """As ``save_state`` does, with the copies."""
        save_accelerator_state(
            str(folder), self._models, self._optimizers, [], [], self._accelerator.process_index, self._accelerator.step,
            self._scaler,  # pyright: ignore[reportArgumentType]  # whose state_dict is all that is used
        )  # fmt: skip


class Gathered(Frozen):
    """The same of a sharded model: brought together in the main process's memory, tensor by tensor, by making this. Collective.

    Nothing fails before all have done their part: ``failure`` is raised where the others can hear of it.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator, self._scaler, self.failure = accelerator, None, None
        module, optimizer = accelerator._models[0], accelerator._optimizers[0]
        forget_gathered(module)
        weights = {name: self._gather(own) for name, own in module.named_parameters()}
        state = optimizer.state_dict()
        state["state"] = {
            number: {name: self._gather(value) for name, value in own.items()} for number, own in state["state"].items()
        }
        main = accelerator.is_main_process
        self._models, self._optimizers = ([weights], [_State(state)]) if main else ([], [])
        self.updates = optimizer_updates(optimizer) if main else None

    def _gather(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        gathered = whole(value.detach())
        try:
            return gathered.to("cpu", copy=True) if self._accelerator.is_main_process and self.failure is None else None
        except RuntimeError as error:  # no memory
            self.failure = error
            return None

    def copy(self) -> None:
        """It is a copy already."""


class _State:
    """Something whose ``state_dict`` is already known."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def state_dict(self) -> Any:
        return self._state
