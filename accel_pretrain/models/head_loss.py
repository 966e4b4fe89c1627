"""The loss of the output matrix on a GPU in chunks of tokens: no tensor of the size of all logits exists.

Presumably slower than the plain loss where that fits (its softmax is done by more, smaller kernels), so it is a choice,
``training.chunked_loss``: on a GPU it was not measured yet (``benchmarks.gpu`` checks it, ``accel_pretrain.tune`` times it).
Plain PyTorch on any device; a CPU has its own, :mod:`~accel_pretrain.models.cpu_loss`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from accel_pretrain.loss import IGNORE

_CHUNK_BYTES = 1 << 29  # of logits at a time, in float32


def chunked_loss(x_BTD: torch.Tensor, weight_VD: torch.Tensor, targets_BT: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """:func:`~accel_pretrain.loss.next_token_loss` of ``x @ weight.T``, after a soft cap if there is one: ``nats_B``.

    In a backward pass all sequences must count the same, as they do in training: where they do not, gradients are NaN, since
    asking here would make the processor wait for the device.
    """
    device = x_BTD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BTD.dtype
    return _ChunkedLoss.apply(x_BTD, weight_VD, targets_BT, softcap, dtype)  # type: ignore[return-value]


def chunk_rows(tokens: int, vocab_size: int) -> int:
    """Tokens of a chunk."""
    return max(1, min(tokens, _CHUNK_BYTES // (4 * vocab_size)))


def chunk_bytes(tokens: int, vocab_size: int, d_model: int, width: int, *, capped: bool) -> int:
    """Bytes of all that one chunk holds at its fullest; ``width``: of a logit. Gradients of the whole are not counted.

    Logits as they come and in float32, log-probabilities, the gradient, also that of the chunk before; with a soft cap two
    more to get its slope. Or else a chunk's gradient, and its part of that of the output matrix.
    """
    rows = chunk_rows(tokens, vocab_size)
    each = width + 4 * 4 if capped else 2 * 4 if width == 4 else 2 * width + 2 * 4
    before = width if rows < tokens else 0
    return vocab_size * max(rows * (each + before), (rows + d_model) * width)


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are computed together with the loss, as if every sequence counted 1; the backward pass multiplies them."""

    @staticmethod
    def forward(
        ctx: Any, x_BTD: torch.Tensor, weight_VD: torch.Tensor, targets_BT: torch.Tensor, softcap: float | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        (B, T), (V, D) = targets_BT.shape, weight_VD.shape
        x_ND, targets_N, lowered_VD = x_BTD.reshape(B * T, D).to(dtype), targets_BT.flatten(), weight_VD.to(dtype)
        with_gradients = any(ctx.needs_input_grad[:2])
        nats_N = x_BTD.new_empty(B * T, dtype=torch.float32)
        x_grad_ND = torch.empty_like(x_ND if with_gradients else x_ND[:0])
        weight_grad_VD = torch.zeros_like(weight_VD if with_gradients else weight_VD[:0], dtype=torch.float32)
        rows = chunk_rows(B * T, V)
        for begin in range(0, B * T, rows):
            part = slice(begin, begin + rows)
            nats_N[part], logit_grad_NV = _nats_and_gradient(x_ND[part] @ lowered_VD.t(), targets_N[part], softcap)
            if with_gradients:
                torch.mm(logit_grad_NV, lowered_VD, out=x_grad_ND[part])
                weight_grad_VD += logit_grad_NV.t() @ x_ND[part]
        ctx.save_for_backward(x_grad_ND.view(B, T, D) if with_gradients else x_grad_ND, weight_grad_VD)
        ctx.dtypes = x_BTD.dtype, weight_VD.dtype
        return nats_N.view(B, T).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (counts_B,) = grads
        x_grad_BTD, weight_grad_VD = ctx.saved_tensors
        count = torch.where((counts_B == counts_B[0]).all(), counts_B[0], torch.nan)  # decided on the device
        x_dtype, weight_dtype = ctx.dtypes
        return (x_grad_BTD.float() * count).to(x_dtype), (weight_grad_VD * count).to(weight_dtype), None, None, None


def _nats_and_gradient(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of each token in float32, and their gradient with respect to the logits, in the dtype of those."""
    ignored_N1, targets_N1 = (targets_N == IGNORE).unsqueeze(1), targets_N.clamp(min=0).unsqueeze(1)
    capped_NV = logits_NV.float()
    if softcap is not None:
        capped_NV = softcap * torch.tanh(capped_NV / softcap)
    log_p_NV = torch.log_softmax(capped_NV, dim=1)
    nats_N1 = -log_p_NV.gather(1, targets_N1).masked_fill(ignored_N1, 0)
    grad_NV = log_p_NV.exp_().scatter_add_(1, targets_N1, torch.full_like(nats_N1, -1)).masked_fill_(ignored_N1, 0)
    if softcap is not None:
        grad_NV *= 1 - (capped_NV / softcap).square()
    return nats_N1.squeeze(1), grad_NV.to(logits_NV.dtype)
