"""The loss of the output matrix on a CPU, without logits and their gradient for all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from accel_pretrain.loss import IGNORE

LOGIT_BYTES = 1 << 27  # of logits at a time, in the dtype of the products
CACHE_BYTES = 1 << 22  # of logits at a time in float32
PAYS_FROM = 1 << 18  # logits in all: below, the calls cost more than the memory


def fits(x_BTD: torch.Tensor, vocab_size: int) -> bool:
    """Whether :func:`head_loss` pays: on a CPU, in float32 or, under autocast, bfloat16."""
    known = x_BTD.device.type == "cpu" and _dtype_of_products(x_BTD) in (torch.float32, torch.bfloat16)
    return known and x_BTD[..., 0].numel() * vocab_size >= PAYS_FROM


def head_loss(x_BTD: torch.Tensor, weight_VD: torch.Tensor, targets_BT: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """:func:`~accel_pretrain.loss.next_token_loss` of ``x @ weight.T``, after a soft cap if there is one: ``nats_B``."""
    return _HeadLoss.apply(x_BTD, weight_VD, targets_BT, softcap, _dtype_of_products(x_BTD))  # type: ignore[return-value]


def _dtype_of_products(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class _HeadLoss(torch.autograd.Function):
    """Gradients are computed together with the loss, as if every sequence's loss counted 1.

    A chunk of tokens at a time, its logits become softmax - onehot in place, and then the gradients of x and weight. What a
    sequence does count is known in the backward pass: if all count the same, as in training, that is one multiplication;
    else the work is done again, as it is for a second pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BTD: torch.Tensor, weight_VD: torch.Tensor, targets_BT: torch.Tensor, softcap: float | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x_BTD, weight_VD, targets_BT)
        ctx.softcap, ctx.dtype = softcap, dtype
        nats_B, ctx.gradients = _chunked(x_BTD, weight_VD, targets_BT, softcap, dtype, None, any(ctx.needs_input_grad[:2]))
        return nats_B

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (counts_B,) = grads
        x_BTD, weight_VD, targets_BT = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # given away: the optimizer may write into them
        if gradients is not None and (counts_B == counts_B[0]).all():
            x_grad_BTD, weight_grad_VD = (gradient.to(torch.float32).mul_(counts_B[0]) for gradient in gradients)
        else:
            _, gradients = _chunked(x_BTD, weight_VD, targets_BT, ctx.softcap, ctx.dtype, counts_B, True)
            assert gradients is not None
            x_grad_BTD, weight_grad_VD = gradients
        return x_grad_BTD.to(x_BTD.dtype), weight_grad_VD.to(weight_VD.dtype), None, None, None


def _chunked(
    x_BTD: torch.Tensor, weight_VD: torch.Tensor, targets_BT: torch.Tensor, softcap: float | None, dtype: torch.dtype,
    counts_B: torch.Tensor | None, with_gradients: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:  # fmt: skip
    """Nats of each sequence; and the gradients of their sum weighted by ``counts_B``: of x in ``dtype``, of weight in float32.

    N are tokens. Chunks are as large as their memory allows: after each, a gradient of the weight is added up in float32.
    """
    (B, T), (V, D) = targets_BT.shape, weight_VD.shape
    x_ND, targets_N, lowered_VD = x_BTD.reshape(B * T, D).to(dtype), targets_BT.flatten(), weight_VD.to(dtype)
    ignored_N = targets_N == IGNORE
    counts_N = torch.ones(B * T) if counts_B is None else counts_B.float().repeat_interleave(T)
    counts_N = None if counts_B is None and not ignored_N.any() else counts_N.masked_fill_(ignored_N, 0)
    targets_N = targets_N.masked_fill(ignored_N, 0)
    chunks = -(-B * T * V * dtype.itemsize // LOGIT_BYTES)
    rows = -(-B * T // chunks)
    nats_N, logits = torch.empty(B * T), torch.empty(rows, V, dtype=dtype)
    gradients = (torch.empty_like(x_ND), torch.empty(V, D)) if with_gradients else None
    product_VD = torch.empty_like(lowered_VD if with_gradients else lowered_VD[:0])
    for part in _pieces(B * T, rows):
        logits_NV = torch.mm(x_ND[part], lowered_VD.t(), out=logits[: part.stop - part.start])
        nats_N[part] = _loss(logits_NV, targets_N[part], softcap, with_gradients, None if counts_N is None else counts_N[part])
        if gradients is not None:
            torch.mm(logits_NV, lowered_VD, out=gradients[0][part])
            torch.mm(logits_NV.t(), x_ND[part], out=product_VD)
            gradients[1].add_(product_VD) if part.start else gradients[1].copy_(product_VD)
    nats_B = nats_N.masked_fill_(ignored_N, 0).view(B, T).sum(dim=1)
    return nats_B, None if gradients is None else (gradients[0].view(B, T, D), gradients[1])


def _pieces(count: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]


def _loss(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, softcap: float | None, in_place: bool, counts_N: torch.Tensor | None
) -> torch.Tensor:
    """Nats of each token, in float32. ``in_place`` writes their gradient, times the counts if given, over the logits."""
    (N, V), nats = logits_NV.shape, []
    rows = max(1, CACHE_BYTES // (4 * V))
    space, slopes = torch.empty(min(rows, N), V), torch.empty(0 if softcap is None else min(rows, N), V)
    for part in _pieces(N, rows):
        given_NV, targets_N1 = logits_NV[part], targets_N[part, None]
        p_NV = space[: part.stop - part.start].copy_(given_NV)
        slope_NV = None if softcap is None else _cap_(p_NV, softcap, slopes)
        torch.softmax(p_NV, -1, out=p_NV)
        p_N1 = p_NV.gather(1, targets_N1)
        nats.append(-p_N1.squeeze(1).log())
        if (p_N1 < 1e-30).any():  # almost, or altogether, beyond float32
            exact_NV = given_NV.float()
            _ = softcap and _cap_(exact_NV, softcap, slopes)
            nats[-1] = F.cross_entropy(exact_NV, targets_N[part], reduction="none")
        if in_place:
            p_NV.scatter_add_(1, targets_N1, torch.full_like(p_N1, -1))
            for factor in (slope_NV, None if counts_N is None else counts_N[part, None]):
                _ = factor is None or p_NV.mul_(factor)
            given_NV.copy_(p_NV)
    return torch.cat(nats)


def _cap_(logits: torch.Tensor, softcap: float, space: torch.Tensor) -> torch.Tensor:
    """Apply c tanh(x / c) in place; its derivative, written into ``space``."""
    logits.div_(softcap).tanh_()
    slope = torch.square(logits, out=space[: len(logits)]).neg_().add_(1)
    logits.mul_(softcap)
    return slope
