"""Activation checkpointing (Chen et al. 2016): what a block computes is dropped after the forward pass and computed again.

``full`` keeps nothing of a block but its input, at the price of a second forward pass of the block. ``selective`` keeps what
matrix products and fused attention gave, which is most of the time and the smaller part of the memory, and computes norms,
rotations, activations and copies again (Korthikanti et al. 2022, "Reducing Activation Recomputation", section 5); compiled,
that costs no time that we could measure. Dropout draws the same masks the second time. Losses and gradients are the same bits
as without; compiled, within rounding.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from accel_pretrain.models import cpu_attention

Level = Literal["none", "selective", "full"]

# torch.compile says once that in-place operators would not do; there are none in a compiled block
logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn is passed" not in record.getMessage())

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default}  # those of linear layers; batched ones have the size of attention scores
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    cpu_attention.causal_attention._opoverload,
}


def checkpointed(block: Callable[..., torch.Tensor], level: Level, dropout: float, *arguments: Any) -> torch.Tensor:
    """``block(*arguments)``, keeping of it for the backward pass what ``level``, selective or full, says."""
    if level == "full":
        return checkpoint(block, *arguments, use_reentrant=False)  # type: ignore[return-value]
    keep = functools.partial(create_selective_checkpoint_contexts, _with_dropout if dropout else _without_dropout)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=keep)  # type: ignore[return-value]


def _without_dropout(_: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = operator in _PRODUCTS or operator in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _with_dropout(_: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Fused attention with dropout is not kept: what it would draw the second time, later masks would get instead."""
    return CheckpointPolicy.MUST_SAVE if operator in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
