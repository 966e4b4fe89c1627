"""Normalisation over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from accel_pretrain.models.config import ModelConfig

_PAYS_FROM = 1 << 18  # numbers: in fewer the calls cost more than the passes


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang & Sennrich 2019, eq. 4), in float32.

    ``kind`` is that of :attr:`ModelConfig.norm`: ``rmsnorm_1p`` multiplies by 1 + weight, so that weight decay pulls
    towards 1, and ``rmsnorm_plain`` by nothing.
    """

    def __init__(self, width: int, eps: float, kind: str = "rmsnorm") -> None:
        super().__init__()
        self.shape, self.eps, self.kind = (width,), eps, kind
        self.weight = None if kind == "rmsnorm_plain" else nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.float()
        if self.kind == "rmsnorm_1p":
            weight = 1.0 + weight  # type: ignore[operator]  # this kind has one
        pays = torch.is_grad_enabled() or x.numel() >= _PAYS_FROM
        if x.device.type == "cpu" and pays and not torch.compiler.is_compiling():
            return _RMSNormInFewPasses.apply(x.float(), weight, self.eps).to(x.dtype)  # type: ignore[union-attr]
        return F.rms_norm(x.float(), self.shape, weight, self.eps).to(x.dtype)


class _RMSNormInFewPasses(torch.autograd.Function):
    """``F.rms_norm``, which on a CPU is a chain of small operators: twice as fast, and three times in its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        y = x * inverse
        return y if weight is None else y.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        (y_grad,) = grads
        products = (y_grad * x).flatten(0, -2)
        along = products.sum(dim=1) if weight is None else products @ weight
        along = along.view_as(inverse).mul_(inverse.square()).div_(-x.shape[-1])
        x_grad = torch.addcmul(y_grad if weight is None else y_grad * weight, x, along).mul_(inverse)
        return x_grad, None if weight is None else inverse.flatten() @ products, None


class LayerNorm(nn.LayerNorm):
    """PyTorch's, with weights in float32 also where a sharded block has them in bfloat16, which it does not take on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = (None if own is None else own.float() for own in (self.weight, self.bias))
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def build_norm(config: ModelConfig) -> nn.Module:
    """A norm of the residual stream."""
    if config.norm == "layernorm":
        return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(config.d_model, config.norm_eps, config.norm)


def build_head_norm(config: ModelConfig) -> nn.Module:
    """A norm of queries or keys, per head (Dehghani et al. 2023, section 2); nothing unless ``qk_norm``."""
    if not config.qk_norm:
        return nn.Identity()
    return RMSNorm(config.head_width, config.norm_eps, "rmsnorm" if config.norm == "layernorm" else config.norm)
