"""``debug.detect_anomaly``: the first activation or gradient that is not finite, by layer, direction and update.

Every module's outputs are looked at as they are computed, and in the backward pass the gradients that it hands on. The first
one to be found says from where it comes. Nothing is raised before the update's end: until then the other processes wait for
this one's gradients. Then all of them end, and one says why.

Under fp16 gradients overflow now and then, and the scaler answers that; there only the forward pass is looked at.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from accel_pretrain.aids import Aid
from accel_pretrain.checkpoint import TrainState
from accel_pretrain.errors import DivergedError
from accel_pretrain.parallel import local
from accel_pretrain.peers import Peers
from accel_pretrain.run import TrainingRun


class AnomalyDetector(Aid):
    """Looks at every module of one run's model, with hooks that stay."""

    def __init__(self, run: TrainingRun) -> None:
        self._run, self._micro_step = run, -1
        self._found: tuple[float, int, str] | None = None  # micro-step, whether backward, and words; the least is the first
        forward_only = run.accelerator.scaler is not None
        run.module.register_forward_pre_hook(self._counted)
        for name, module in run.module.named_modules():
            module.register_forward_hook(self._forward(name))
            if name and not (forward_only or isinstance(module, nn.Embedding)):  # ids have no gradient
                module.register_full_backward_hook(self._backward(name))
        self._forward_only = forward_only
        run.log.line(
            "Every activation and gradient is looked at (debug.detect_anomaly): slow, and not compiled"
            + ("; under fp16 only activations" if forward_only else "")
        )

    @contextlib.contextmanager
    def around(self, state: TrainState) -> Iterator[None]:
        self._micro_step = -1
        yield
        peers = Peers(self._run.accelerator)
        found = [(own, rank) for rank, own in enumerate(peers.gather(self._found)) if own is not None]
        if found:
            (*_, words), rank = min(found)
            where = f" (process {rank})" if peers.count > 1 else ""
            with peers.once():
                raise DivergedError(f"update {state.step + 1}, {words}{where}; ended by debug.detect_anomaly")

    def gradients(self) -> None:
        """Those of the weights, after they were exchanged: another process's are among them."""
        if self._found or self._forward_only:
            return
        bad = [name for name, weight in self._run.module.named_parameters() if not _finite([weight.grad])]
        if bad:
            more = f", and of {len(bad) - 1} more" if len(bad) > 1 else ""
            # The one nearest the output was computed first, and passes it on to those before it.
            self._found = math.inf, 1, f"backward: the gradient of the weight {bad[-1]} is not finite{more}"

    def _counted(self, module: nn.Module, inputs: object) -> None:
        self._micro_step += torch.is_grad_enabled()  # not in an evaluation

    def _forward(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self._found or not torch.is_grad_enabled() or _finite([output]):
                return
            words = f"forward of micro-step {self._micro_step}: the output of {_called(name, module)} is not finite; "
            inside = f"its input was not either, which comes from within {_called(*self._parent(name))}"
            self._found = self._micro_step, 0, words + (_blame(module, "its input") if _finite(inputs) else inside)

        return look

    def _backward(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, grads_in: tuple[Any, ...], grads_out: tuple[Any, ...]) -> None:
            if self._found or (_finite(grads_in) and _finite(grads_out)):
                return
            words = f"backward of micro-step {self._micro_step}: the gradient that "
            if _finite(grads_out):
                words += f"leaves {_called(name, module)} is not finite; {_blame(module, 'the one that reached it')}"
            else:
                words += f"reaches {_called(name, module)} is not finite; it comes from what is computed with its output"
            self._found = self._micro_step, 1, words

        return look

    def _parent(self, name: str) -> tuple[str, nn.Module]:
        above = name.rpartition(".")[0]
        return above, self._run.module.get_submodule(above)


def _called(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else f"the whole model ({type(module).__name__})"


def _blame(module: nn.Module, what: str) -> str:
    return f"its weights and {what} are" if _finite(module.parameters()) else "neither are its weights"


def _finite(values: Iterable[Any]) -> bool:
    """Whether all floating-point tensors among these are finite; waits for the device."""
    tensors = (local(value.detach()) for value in values if torch.is_tensor(value) and value.is_floating_point())
    return all(bool(torch.isfinite(own).all()) for own in tensors)
