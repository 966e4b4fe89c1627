"""Causal attention in bfloat16 on a CPU, with gradients at twice the speed of PyTorch's kernel.

Forward is that kernel, which is good. Its gradient is not: it computes in small tiles, which leave a processor's matrix units
idle. :func:`_gradients` goes by blocks of queries instead, each a few large products over only the keys that it can see;
the scores of a block stay in the cache, and the probabilities are computed again, so that nothing of size T x T is kept.
One operator for torch.compile, which would otherwise unroll the blocks.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.nn import functional as F

_CACHE_BYTES = 1 << 22  # of scores at a time


def fits(q_BHTE: torch.Tensor, k_BGSE: torch.Tensor, v_BGSE: torch.Tensor) -> bool:
    """Whether :func:`causal_attention` pays: gradients are wanted, on a CPU, in bfloat16 (in float32 both are equally fast)."""
    same = q_BHTE.device.type == "cpu" and q_BHTE.dtype == k_BGSE.dtype == v_BGSE.dtype == torch.bfloat16
    return same and torch.is_grad_enabled() and q_BHTE.shape[2] == k_BGSE.shape[2] > 1


@torch.library.custom_op("accel_pretrain::causal_attention", mutates_args=())
def causal_attention(
    q_BHTE: torch.Tensor, k_BGTE: torch.Tensor, v_BGTE: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Averages of the values that each query sees: itself and what comes before, ``window`` positions at most. (B, H, T, E)."""
    T = q_BHTE.shape[2]
    mask = None if window is None else torch.ones(T, T, dtype=torch.bool).tril().triu(1 - window)
    out_BHTE = F.scaled_dot_product_attention(
        q_BHTE, k_BGTE, v_BGTE, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return _heads_inside(out_BHTE)


@causal_attention.register_fake
def _(q_BHTE: torch.Tensor, k_BGTE: torch.Tensor, v_BGTE: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    return _heads_inside(torch.empty_like(q_BHTE))


def _heads_inside(x_BHTE: torch.Tensor) -> torch.Tensor:
    """The same in memory order (B, T, H, E), which is how the linear layers around want it."""
    return x_BHTE.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.custom_op("accel_pretrain::causal_attention_gradients", mutates_args=())
def _gradients(
    out_grad_BHTE: torch.Tensor, q_BHTE: torch.Tensor, k_BGTE: torch.Tensor, v_BGTE: torch.Tensor, scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    B, H, T, _ = q_BHTE.shape
    rows = 128 if T <= 512 else 256
    some = max(1, _CACHE_BYTES // (H * min(rows, T) * T * q_BHTE.element_size()))
    q_grad_BHTE, k_grad_BGTE, v_grad_BGTE = (_heads_inside(torch.empty_like(x)) for x in (q_BHTE, k_BGTE, v_BGTE))
    for begin in range(0, B, some):
        part = slice(begin, begin + some)
        k_grad_BGTE[part], v_grad_BGTE[part] = _some_gradients(
            out_grad_BHTE[part], q_BHTE[part], k_BGTE[part].contiguous(), v_BGTE[part].contiguous(), q_grad_BHTE[part],
            scale, window, rows,
        )  # fmt: skip
    return q_grad_BHTE, k_grad_BGTE, v_grad_BGTE


@_gradients.register_fake
def _(
    out_grad_BHTE: torch.Tensor, q_BHTE: torch.Tensor, k_BGTE: torch.Tensor, v_BGTE: torch.Tensor, scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    q_grad, k_grad, v_grad = (_heads_inside(torch.empty_like(x)) for x in (q_BHTE, k_BGTE, v_BGTE))
    return q_grad, k_grad, v_grad


def _some_gradients(
    out_grad_BHTE: torch.Tensor, q_BHTE: torch.Tensor, k_BGTE: torch.Tensor, v_BGTE: torch.Tensor, q_grad_BHTE: torch.Tensor,
    scale: float, window: int | None, rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The same for so few sequences that a block's scores fit into the cache; the gradient of q is written to its place.

    X is B x G: key heads, each with R = H / G x N query rows. The last block comes first, as it sees all keys.
    """
    B, H, T, E = q_BHTE.shape
    k_XTE, v_XTE = k_BGTE.flatten(0, 1), v_BGTE.flatten(0, 1)
    k_grad_XTE = v_grad_XTE = None
    nothing = k_XTE.new_empty(1, 1, 1)  # what baddbmm adds to, times zero
    for start in reversed(range(0, T, rows)):
        end = min(start + rows, T)
        first = 0 if window is None else max(0, start + 1 - window)
        q_XRE, out_grad_XRE = (x[:, :, start:end].reshape(len(k_XTE), -1, E) for x in (q_BHTE, out_grad_BHTE))
        k_XSE, v_XSE = k_XTE[:, first:end], v_XTE[:, first:end]
        weights_XRS = torch.baddbmm(nothing, q_XRE, k_XSE.transpose(1, 2), beta=0, alpha=scale)
        _hide(weights_XRS.view(B * H, end - start, -1), start - first, window)
        torch.softmax(weights_XRS, -1, out=weights_XRS)
        v_grad_XSE = torch.bmm(weights_XRS.transpose(1, 2), out_grad_XRE)
        score_grad_XRS = torch.bmm(out_grad_XRE, v_XSE.transpose(1, 2))
        torch.ops.aten._softmax_backward_data(score_grad_XRS, weights_XRS, -1, q_BHTE.dtype, grad_input=score_grad_XRS)
        k_grad_XSE = torch.baddbmm(nothing, score_grad_XRS.transpose(1, 2), q_XRE, beta=0, alpha=scale)
        q_grad_XRE = torch.baddbmm(nothing, score_grad_XRS, k_XSE, beta=0, alpha=scale)
        q_grad_BHTE[:, :, start:end] = q_grad_XRE.view(B, H, -1, E)
        if k_grad_XTE is None or v_grad_XTE is None:
            k_grad_XTE, v_grad_XTE = (F.pad(grad.float(), (0, 0, first, 0)) for grad in (k_grad_XSE, v_grad_XSE))
        else:
            k_grad_XTE[:, first:end] += k_grad_XSE
            v_grad_XTE[:, first:end] += v_grad_XSE
    assert k_grad_XTE is not None
    assert v_grad_XTE is not None
    return k_grad_XTE.view_as(k_BGTE), v_grad_XTE.view_as(v_BGTE)


def _hide(scores_YNS: torch.Tensor, before: int, window: int | None) -> None:
    """Set to -inf the scores that a query must not see: query n stands at key ``before`` + n."""
    N, S = scores_YNS.shape[1:]
    if window is None:  # the keys before the block are all seen
        scores_YNS[:, :, before:] += _barrier(N, scores_YNS.dtype)
    else:
        distance = torch.arange(before, before + N).unsqueeze(1) - torch.arange(S)
        scores_YNS.masked_fill_((distance < 0) | (distance >= window), -math.inf)


@functools.cache
def _barrier(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((size, size), -math.inf, dtype=dtype).triu_(1)


def _save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, out_grad_BHTE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_gradients(out_grad_BHTE, *ctx.saved_tensors, ctx.scale, ctx.window), None, None


causal_attention.register_autograd(_backward, setup_context=_save)
