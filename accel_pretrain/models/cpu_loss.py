"""The loss of the output matrix on a CPU, without logits and their gradient for all tokens at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from accel_pretrain.loss import IGNORE

LOGIT_BYTES = 1 << 27  # of logits at a time, in the dtype of the products
SMALLEST_CHUNK = 1 << 24
CACHE_BYTES = 1 << 22  # of logits, and of the weight's gradient, at a time in float32
PAYS_FROM = 1 << 18  # logits in all: below, the calls cost more than the memory
PRODUCT_ROWS = 512  # of a chunk at a time: oneDNN leaves one of two threads idle in bf16 products of 640 to 1300 rows


class HandedOn:
    """A matrix that is embedding and output matrix, as the embedding hands it on to the loss.

    So the gradient of the loss comes to the embedding first, which adds those of the few rows that it has seen in place. Two
    separate gradients the engine would add up, in a third V x D.
    """

    matrix_VD: torch.Tensor

    def embed(self, tokens_BT: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """``F.embedding``; the loss is to take ``matrix_VD`` from here."""
        x_BTD, self.matrix_VD = _Embedding.apply(weight_VD, tokens_BT)  # type: ignore[misc]
        return x_BTD


class _Embedding(torch.autograd.Function):
    """Vectors of the tokens, and the matrix again; it must go to one reader alone, which gives its gradient away."""

    @staticmethod
    def forward(ctx: Any, weight_VD: torch.Tensor, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tokens_BT)
        ctx.vocab_size = len(weight_VD)
        return F.embedding(tokens_BT, weight_VD), weight_VD.view_as(weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (x_grad_BTD, weight_grad_VD), (tokens_BT,) = grads, ctx.saved_tensors
        if x_grad_BTD is None:
            return weight_grad_VD, None
        if weight_grad_VD is None:
            return torch.ops.aten.embedding_dense_backward(x_grad_BTD, tokens_BT, ctx.vocab_size, -1, False), None
        weight_grad_VD.index_add_(0, tokens_BT.flatten(), x_grad_BTD.flatten(0, 1).to(weight_grad_VD.dtype))
        return weight_grad_VD, None


def fits(tokens_BT: torch.Tensor, weight_VD: torch.Tensor) -> bool:
    """Whether :func:`head_loss` pays for so many tokens: on a CPU, in float32 or, under autocast, bfloat16."""
    known = tokens_BT.device.type == "cpu" and _dtype_of_products(weight_VD) in (torch.float32, torch.bfloat16)
    return known and tokens_BT.numel() * len(weight_VD) >= PAYS_FROM


def head_loss(
    x_BTD: torch.Tensor, weight_VD: torch.Tensor, targets_BT: torch.Tensor, softcap: float | None, *, compiled: bool = False
) -> torch.Tensor:
    """:func:`~accel_pretrain.loss.next_token_loss` of ``x @ weight.T``, after a soft cap if there is one: ``nats_B``."""
    settings = softcap, _dtype_of_products(x_BTD), compiled
    if not torch.is_grad_enabled():
        return _chunked(x_BTD, weight_VD, targets_BT, settings, None, False)[0]
    return _HeadLoss.apply(x_BTD, weight_VD, targets_BT, settings)  # type: ignore[return-value]


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
        ctx: Any, x_BTD: torch.Tensor, weight_VD: torch.Tensor, targets_BT: torch.Tensor,
        settings: tuple[float | None, torch.dtype, bool],
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x_BTD, weight_VD, targets_BT)
        ctx.settings, wanted = settings, any(ctx.needs_input_grad[:2])
        nats_B, ctx.gradients = _chunked(x_BTD, weight_VD, targets_BT, ctx.settings, None, wanted)
        return nats_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (counts_B,) = grads
        x_BTD, weight_VD, targets_BT = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # given away: the optimizer may write into them
        if gradients is not None and (counts_B == counts_B[0]).all():
            x_grad_BTD, weight_grad_VD = (gradient.to(torch.float32).mul_(counts_B[0]) for gradient in gradients)
        else:
            _, gradients = _chunked(x_BTD, weight_VD, targets_BT, ctx.settings, counts_B, True)
            assert gradients is not None
            x_grad_BTD, weight_grad_VD = gradients
        return x_grad_BTD.to(x_BTD.dtype), weight_grad_VD.to(weight_VD.dtype), None, None


def _chunked(
    x_BTD: torch.Tensor, weight_VD: torch.Tensor, targets_BT: torch.Tensor, settings: tuple[float | None, torch.dtype, bool],
    counts_B: torch.Tensor | None, with_gradients: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:  # fmt: skip
    """Nats of each sequence; and the gradients of their sum weighted by ``counts_B``: of x in ``dtype``, of weight in float32.

    N are tokens. Chunks of logits are no smaller than the weight: after each, a gradient of the weight is added up in float32,
    by parts that fit into the cache.
    """
    (B, T), (V, D), (softcap, dtype, compiled) = targets_BT.shape, weight_VD.shape, settings
    x_ND, targets_N, lowered_VD = x_BTD.reshape(B * T, D).to(dtype), targets_BT.flatten(), weight_VD.to(dtype)
    ignored_N = targets_N == IGNORE
    counts_N = torch.ones(B * T) if counts_B is None else counts_B.float().repeat_interleave(T)
    counts_N = None if counts_B is None and not ignored_N.any() else counts_N.masked_fill_(ignored_N, 0)
    targets_N = targets_N.masked_fill(ignored_N, 0)
    rows = chunk_rows(B * T, V, D, dtype.itemsize)
    nats_N, logits = torch.empty(B * T), torch.empty(rows, V, dtype=dtype)
    gradients = (torch.empty_like(x_ND), torch.empty(V, D)) if with_gradients else None
    columns = _pieces(V, max(1, CACHE_BYTES // (4 * D)))
    product_VD = torch.empty(columns[0].stop, D, dtype=dtype)
    for part in _pieces(B * T, rows):
        logits_NV = torch.mm(x_ND[part], lowered_VD.t(), out=logits[: part.stop - part.start])
        counts = None if counts_N is None else counts_N[part]
        nats_N[part] = _loss(logits_NV, targets_N[part], softcap, with_gradients, counts, compiled)
        if gradients is None:
            continue
        for some in _pieces(len(logits_NV), _even(len(logits_NV), PRODUCT_ROWS)):
            torch.mm(logits_NV[some], lowered_VD, out=gradients[0][part][some])
        for column in columns:
            product = torch.mm(logits_NV[:, column].t(), x_ND[part], out=product_VD[: column.stop - column.start])
            gradients[1][column].add_(product) if part.start else gradients[1][column].copy_(product)
    nats_B = nats_N.masked_fill_(ignored_N, 0).view(B, T).sum(dim=1)
    return nats_B, None if gradients is None else (gradients[0].view(B, T, D), gradients[1])


def chunk_rows(tokens: int, vocab_size: int, width: int, itemsize: int) -> int:
    """For how many tokens at a time logits are computed: chunks as equal as can be."""
    most = min(LOGIT_BYTES, max(SMALLEST_CHUNK, 4 * vocab_size * width))
    return _even(tokens, most / (vocab_size * itemsize))


def _even(count: int, most: float) -> int:
    """The size of pieces as equal as can be, of ``most`` at most."""
    return math.ceil(count / math.ceil(count / most))


def _pieces(count: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]


def _loss(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, softcap: float | None, in_place: bool, counts_N: torch.Tensor | None,
    compiled: bool,
) -> torch.Tensor:  # fmt: skip
    """Nats of each token, in float32. ``in_place`` writes their gradient, times the counts if given, over the logits.

    By pieces that fit into the cache: a compiled one takes three passes over its logits, one step by step a dozen.
    """
    (N, V), nats = logits_NV.shape, []
    rows = max(1, CACHE_BYTES // (4 * V))
    fused = _compiled() if compiled and in_place and rows <= N else None
    space = torch.empty(min(rows, N % rows if fused else N), V)
    slopes = torch.empty_like(space) if softcap is not None else space[:0]
    for part in _pieces(N, rows):
        given_NV, targets_N1 = logits_NV[part], targets_N[part, None]
        counts_N1 = None if counts_N is None else counts_N[part, None]
        if fused is not None and part.stop - part.start == rows:  # one shape, compiled once
            nats.append(fused(given_NV, targets_N1, softcap, counts_N1))
            continue
        p_NV = space[: part.stop - part.start].copy_(given_NV)
        slope_NV = None if softcap is None else _cap_(p_NV, softcap, slopes)
        torch.softmax(p_NV, -1, out=p_NV)
        p_N1 = p_NV.gather(1, targets_N1)
        nats.append(-p_N1.squeeze(1).log())
        if (p_N1 < 1e-30).any():  # almost, or altogether, beyond float32
            exact_NV = given_NV.float()
            _ = softcap and _cap_(exact_NV, softcap, torch.empty_like(exact_NV))  # slopes are still needed
            nats[-1] = F.cross_entropy(exact_NV, targets_N[part], reduction="none")
        if in_place:
            p_NV.scatter_add_(1, targets_N1, torch.full_like(p_N1, -1))
            for factor in (slope_NV, counts_N1):
                _ = factor is None or p_NV.mul_(factor)
            given_NV.copy_(p_NV)
    return torch.cat(nats)


def _fused(
    logits_NV: torch.Tensor, targets_N1: torch.Tensor, softcap: float | None, counts_N1: torch.Tensor | None
) -> torch.Tensor:
    """A piece of :func:`_loss`, written for the compiler."""
    capped_NV = logits_NV.float()
    slope_NV = None
    if softcap is not None:
        turned_NV = torch.tanh(capped_NV / softcap)
        capped_NV, slope_NV = softcap * turned_NV, 1 - turned_NV.square()
    most_N1 = capped_NV.amax(1, keepdim=True)
    powers_NV = torch.exp(capped_NV - most_N1)
    total_N1 = powers_NV.sum(1, keepdim=True)
    target_N1 = logits_NV.gather(1, targets_N1).float()
    if softcap is not None:
        target_N1 = softcap * torch.tanh(target_N1 / softcap)
    nats_N = (total_N1.log() + most_N1 - target_N1).squeeze(1)
    grad_NV = powers_NV / total_N1 - (torch.arange(logits_NV.shape[1]) == targets_N1).float()
    for factor in (slope_NV, counts_N1):
        grad_NV = grad_NV if factor is None else grad_NV * factor
    logits_NV.copy_(grad_NV)
    return nats_N


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(_fused, dynamic=False)


def _cap_(logits: torch.Tensor, softcap: float, space: torch.Tensor) -> torch.Tensor:
    """Apply c tanh(x / c) in place; its derivative, written into ``space``."""
    logits.div_(softcap).tanh_()
    slope = torch.square(logits, out=space[: len(logits)]).neg_().add_(1)
    logits.mul_(softcap)
    return slope
