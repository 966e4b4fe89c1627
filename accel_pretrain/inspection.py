"""``debug.inspect_interval``: what happens inside the layers, in rows of ``metrics.jsonl`` and in the trackers.

| metric | of |
|---|---|
| ``layers/3.mlp/grad_norm`` | the gradient of the update, before clipping, of all processes and micro-steps |
| ``layers/3.mlp/weight_norm`` | the weights before the update |
| ``layers/3.mlp/update_norm``, ``update_ratio`` | what the update added to them; the same divided by ``weight_norm`` |
| ``layers/3/act_mean``, ``act_rms``, ``act_max`` | what block 3 gives to the next one; max: of absolute values |
| ``layers/3.mlp/dead_units`` | share of hidden units that no token moves: below 1 % of the rms of all of them |

Norms are those of whole tensors, however they are shared out. A part is a block's ``self_attn``, its ``mlp``, or the norms of
a block together (``3.norms``), and what is outside of blocks by its own name. Activations are those of the main process's
first micro-batch, in a forward pass of its own before the update: the one of the update stays as it is, compiled or not, and
so do all bits of the training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from accel_pretrain.aids import Aid
from accel_pretrain.checkpoint import TrainState
from accel_pretrain.histograms import histogram_of
from accel_pretrain.models.transformer import Block, FeedForward
from accel_pretrain.parallel import forget_gathered, is_sharded, local
from accel_pretrain.rules import resting
from accel_pretrain.run import TrainingRun
from accel_pretrain.runtime import seed_dropout

DEAD = 0.01  # of the rms


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: ``layers.3.mlp.up_proj.weight`` is of ``3.mlp``."""
    words = name.split(".")
    if words[0] != "layers":
        return words[0]
    return f"{words[1]}.{words[2] if words[2] in ('self_attn', 'mlp') else 'norms'}"


class Inspector(Aid):
    """Looks at one update in ``interval``, and at no other."""

    def __init__(self, run: TrainingRun, interval: int, histograms: str) -> None:
        self._run, self._interval = run, interval
        self._drawn = {"none": (), "all": ("gradients", "parameters")}.get(histograms, (histograms,))
        self._named = dict(run.module.named_parameters())
        self._row: dict[str, torch.Tensor] | None = None  # None: this update is not looked at
        self._before: list[torch.Tensor] = []
        if self._drawn and not run.log.takes_histograms:
            run.log.line("Notice: debug.inspect_histograms has no effect without --trackers wandb or tensorboard")
            self._drawn = ()

    @contextlib.contextmanager
    def around(self, state: TrainState) -> Iterator[None]:
        if (state.step + 1) % self._interval:
            yield
            return
        self._row, self._before = self._activations(state), []
        if "parameters" in self._drawn:
            self._draw("parameters", state.step + 1, self._named)
        self._step = state.step + 1
        try:
            yield
            if self._before:  # else the update was dropped
                self._report(state)
        finally:
            self._row, self._before = None, []

    def gradients(self) -> None:
        if self._row is None:
            return
        scaler = self._run.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else 1.0
        grads = {name: weight.grad for name, weight in self._named.items() if weight.grad is not None}
        self._row |= self._norms({name: local(grad) for name, grad in grads.items()}, "grad_norm", scale)
        self._before = [weight.clone() for weight in resting(self._run.optimizer, list(self._named.values()))]
        self._row |= self._norms(dict(zip(self._named, self._before, strict=True)), "weight_norm")
        if "gradients" in self._drawn:
            self._draw("gradients", self._step, grads, scale)

    def _report(self, state: TrainState) -> None:
        """The row of the update that has just been applied, or not."""
        assert self._row is not None
        now = (local(weight.detach()) for weight in self._named.values())
        added = [own - old for own, old in zip(now, self._before, strict=True)]
        self._row |= self._norms(dict(zip(self._named, added, strict=True)), "update_norm")
        for name in [name for name in self._row if name.endswith("update_norm")]:
            part = name.rpartition("/")[0]
            weight = self._row[f"{part}/weight_norm"]
            self._row[f"{part}/update_ratio"] = self._row[name] / weight.clamp(min=torch.finfo(weight.dtype).tiny)
        values = torch.stack([value.float() for value in self._row.values()]).tolist()
        row = {name: float(f"{value:.5g}") for name, value in zip(self._row, values, strict=True)}
        tokens = self._run.plan.samples_of(state.samples) * self._run.config.model.context_length
        self._run.log.metrics(state.step + 1, state.tokens + tokens, row)

    def _norms(self, tensors: dict[str, torch.Tensor], what: str, scale: float = 1.0) -> dict[str, torch.Tensor]:
        """A norm for each part, of tensors of which this process has a share, or the whole. Collective if sharded."""
        parts = list(dict.fromkeys(part_of(name) for name in tensors))
        device = self._run.accelerator.device
        squares = torch.zeros(len(parts), dtype=torch.float32, device=device)
        for name, tensor in tensors.items():
            if tensor.numel():  # a share may have no rows
                norm = torch.linalg.vector_norm(tensor, dtype=torch.float32).to(device)
                squares[parts.index(part_of(name))] += (norm / scale).square()
        if is_sharded(self._run.module):
            dist.all_reduce(squares)
        return {f"layers/{part}/{what}": norm for part, norm in zip(parts, squares.sqrt(), strict=True)}

    def _draw(self, kind: str, step: int, tensors: dict[str, Any], scale: float = 1.0) -> None:
        """Histograms of all these tensors. Collective if sharded."""
        sharded, device = is_sharded(self._run.module), self._run.accelerator.device
        if not (sharded or self._run.accelerator.is_main_process):
            return
        drawn = {
            f"{kind}/{name}": histogram_of(local(tensor.detach()).to(device), shared=sharded, scale=scale)
            for name, tensor in tensors.items()
        }
        self._run.log.histograms(step, drawn)

    @torch.no_grad()
    def _activations(self, state: TrainState) -> dict[str, torch.Tensor]:
        """What the blocks compute of the first micro-batch of the coming update, as they are now. Collective if sharded."""
        run, found = self._run, dict[str, torch.Tensor]()
        if not (run.accelerator.is_main_process or is_sharded(run.module)):
            return found
        hooks = [hook for number, layer in enumerate(run.module.layers) for hook in _hooked(str(number), layer, found)]
        batch = run.batches.micro_batches(state.samples)[0].to(run.accelerator.device)
        if run.config.model.dropout:  # the masks of the update; which draws them again
            seed_dropout(run.config.training.seed, state.step, run.accelerator.process_index)
        try:
            with torch.compiler.set_stance("force_eager"):  # a compiled block would not call hooks
                run.module(batch.inputs_BT, last_only=True)
        finally:
            for hook in hooks:
                hook.remove()
            forget_gathered(run.module)
        return found


def _hooked(number: str, layer: nn.Module, found: dict[str, torch.Tensor]) -> Iterable[Any]:
    """Hooks on a block that write what they see to ``found``."""
    assert isinstance(layer, Block)
    assert isinstance(layer.mlp, FeedForward)

    def of_block(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        x = output.float()
        found.update(
            {
                f"layers/{number}/act_mean": x.mean(),
                f"layers/{number}/act_rms": x.square().mean().sqrt(),
                f"layers/{number}/act_max": x.abs().max(),
            }
        )

    return layer.register_forward_hook(of_block), layer.mlp.down_proj.register_forward_pre_hook(_units(number, found))


def _units(number: str, found: dict[str, torch.Tensor]) -> Callable[..., None]:
    def of_hidden(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        hidden_NF = inputs[0].float().flatten(0, -2)
        largest_F, rms = hidden_NF.abs().amax(0), hidden_NF.square().mean().sqrt()
        found[f"layers/{number}.mlp/dead_units"] = (largest_F <= DEAD * rms).float().mean()

    return of_hidden
