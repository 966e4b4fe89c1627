"""Rotary position embeddings (Su et al. 2021): a table of cosines and sines, and the rotation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from accel_pretrain.models.config import ModelConfig


def rope_table(config: ModelConfig, *, sliding: bool = False) -> torch.Tensor:
    """Cosines and sines of the angles position x frequency, shape (2, context_length, E) (Su et al. 2021, eq. 34).

    In float32, angles included: published weights were trained with its roundings, and logits equal those of transformers
    at any position only if they are made alike. Dimension i and i + E/2 share frequency i.
    """
    frequencies = rope_frequencies(config, sliding=sliding)
    angles = torch.outer(torch.arange(config.context_length).float(), frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()))


def rope_frequencies(config: ModelConfig, *, sliding: bool) -> torch.Tensor:
    """Radians per position of each of the E/2 pairs, after ``rope_scaling``."""
    theta = config.sliding_rope_theta if sliding and config.sliding_rope_theta is not None else config.rope_theta
    frequencies = 1.0 / theta ** (torch.arange(0, config.head_width, 2).float() / config.head_width)
    if config.rope_scaling == "none" or (sliding and config.sliding_rope_theta is not None):
        return frequencies
    if config.rope_scaling == "linear":  # Chen et al. 2023, position interpolation
        return frequencies / config.rope_factor
    return _llama3(frequencies, config)


def _llama3(frequencies: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Llama 3.1's rule: stretch wavelengths that did not fit into the original context, and blend in between."""
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    kept = ((config.original_context / wavelengths - low) / (high - low)).clamp(0, 1)  # 1: leave alone, 0: stretch fully
    blended = (1 - kept) * frequencies / config.rope_factor + kept * frequencies
    # at both ends without rounding of the blend
    return torch.where(kept >= 1, frequencies, torch.where(kept <= 0, frequencies / config.rope_factor, blended))


def rotate(x_BHTE: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + E/2) of every head by its position's angle; computed in float32.

    ``rope`` is a (2, T, E) slice of the table, or (2, B, 1, T, E) where the sequences of a batch stand at different positions.
    """
    cos, sin = rope[0], rope[1]
    if x_BHTE.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _RotateInFewPasses.apply(x_BHTE, cos, sin)  # type: ignore[return-value]
    low, high = x_BHTE.float().chunk(2, dim=-1)
    turned = x_BHTE * cos + torch.cat((-high, low), dim=-1) * sin
    return turned.to(x_BHTE.dtype)


class _RotateInFewPasses(torch.autograd.Function):
    """The same for a CPU, at twice the speed; the gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x_BHTE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _halves_turned(x_BHTE, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _halves_turned(grads[0], cos, -sin), None, None


def _halves_turned(x_BHTE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x_BHTE.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]  # the other half is the same
    exact = x_BHTE.float()
    turned = torch.empty_like(exact)
    (low, high), (turned_low, turned_high) = exact.split(half, dim=-1), turned.split(half, dim=-1)
    torch.mul(low, cos, out=turned_low).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=turned_high).addcmul_(low, sin)
    return turned.to(x_BHTE.dtype)
