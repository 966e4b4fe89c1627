"""The loss on a fixed set of windows: the same number whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from accel_pretrain.data import Windows
from accel_pretrain.errors import refuse
from accel_pretrain.loss import IGNORE
from accel_pretrain.parallel import forget_gathered, is_sharded
from accel_pretrain.typed_yaml import option


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How often to measure the loss without training on it, and on how much.

    An evaluation reads both splits at a third of an update's operations: the defaults take 1.7 % of the time of updates of 64.
    """

    eval_interval: int = option(500, "updates between evaluations")
    eval_iters: int | None = option(100, "batches of eval_batch_size windows per evaluation; null: the whole val split")
    eval_batch_size: int = option(
        8, "windows that eval_iters counts as one batch: what is measured does not depend on the machine"
    )

    def __post_init__(self) -> None:
        refuse(
            (self.eval_interval < 1, f"eval_interval: must be at least 1, got {self.eval_interval}"),
            (self.eval_batch_size < 1, f"eval_batch_size: must be at least 1, got {self.eval_batch_size}"),
            (
                self.eval_iters is not None and self.eval_iters < 1,
                f"eval_iters: must be at least 1 or null, got {self.eval_iters}",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """``loss`` in nats per token, and ``standard_error`` of that mean over windows; ``bytes_per_token`` if known."""

    loss: float
    standard_error: float
    tokens: int
    bytes_per_token: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits to encode one byte of the text: comparable between tokenizers, and with compressors."""
        return self.loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None


class Abandoned(Exception):
    """An evaluation was not finished, on all processes alike."""


def evenly_spaced(count: int, wanted: int | None) -> np.ndarray:
    """The numbers of ``wanted`` windows (null: all) spread over ``count``: always the same ones, not only the beginning."""
    wanted = count if wanted is None else min(wanted, count)
    return np.arange(wanted) * count // wanted


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: nn.Module,
    windows: Windows,
    *,
    batch_size: int,
    wanted: int | None = None,
    bytes_per_token: float | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> EvalResult:
    """Mean loss over ``wanted`` windows. Collective; process r takes batches r, r + world size, ...

    Before each batch all processes ask ``interrupted``, which must answer them alike; raises :class:`Abandoned` if so.
    ``model`` is the unwrapped module. It comes back in the mode in which it was given, and no random numbers are drawn.
    """
    chosen = evenly_spaced(windows.count, wanted)
    was_training = model.training
    model.eval()
    sums, share = np.zeros(2), accelerator.process_index * batch_size
    try:
        for begin in range(0, chosen.size, accelerator.num_processes * batch_size):
            if interrupted():
                raise Abandoned
            own = chosen[begin + share : begin + share + batch_size]
            if own.size or is_sharded(model):  # which computes on all processes or on none
                nats = _nats_per_window(accelerator.device, model, windows, own, batch_size)
                sums += nats.sum(), np.square(nats).sum()
    finally:
        model.train(was_training)
        forget_gathered(model)
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(torch.from_numpy(sums).to(accelerator.device), reduction="sum").cpu().numpy()  # type: ignore[union-attr]
    T, n = windows.context_length, chosen.size
    mean = sums[0] / n
    variance = max(0.0, sums[1] / n - mean**2) * n / max(1, n - 1)
    return EvalResult(loss=mean / T, standard_error=math.sqrt(variance / n) / T, tokens=n * T, bytes_per_token=bytes_per_token)


@torch.no_grad()
def nats_per_window(
    device: torch.device, model: nn.Module, windows: Windows, *, batch_size: int, wanted: int | None = None
) -> np.ndarray:
    """Summed loss of each of ``wanted`` windows (null: all), float64, in their order: what :func:`validate` takes the mean of.

    For comparing models window by window. Not collective; ``model`` is in evaluation mode.
    """
    chosen = evenly_spaced(windows.count, wanted)
    parts = [chosen[begin : begin + batch_size] for begin in range(0, chosen.size, batch_size)]
    return np.concatenate([_nats_per_window(device, model, windows, part, batch_size) for part in parts])


def _nats_per_window(
    device: torch.device, model: nn.Module, windows: Windows, chosen: np.ndarray, batch_size: int
) -> np.ndarray:
    """Summed loss of each chosen window, float64. The last batch is filled up with windows that do not count: one shape."""
    ids = windows.read(windows.starts_of(np.resize(chosen, batch_size)))
    ids_BS = torch.from_numpy(ids).to(device)
    targets_BT = ids_BS[:, 1:].clone()
    targets_BT[chosen.size :] = IGNORE
    nats_B = model(ids_BS[:, :-1], targets_BT)
    return (
        nats_B[: chosen.size].double().cpu().numpy() if device.type != "mps" else nats_B[: chosen.size].cpu().double().numpy()
    )
