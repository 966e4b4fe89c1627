"""A model for reading one position at a time on a CPU: the same weights and the same code, called by faster means.

One new token reads every weight once, so decoding is bound by memory, and what counts is how evenly a product streams through
its matrix. PyTorch's ``F.linear`` is made for many positions: for one row a matrix-vector product is better, and for a few rows
oneDNN's kernel on a matrix in its own, blocked layout, which is what ``torch.compile`` uses too. That layout is a copy. Between
the products Python takes time, in caches that the weights have just emptied: modules are called by their ``forward``, and those
that do nothing, not at all.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from accel_pretrain.models.attention import Attention
from accel_pretrain.models.transformer import Transformer

_PAYS_FROM_WEIGHTS = 10_000_000  # below, the arithmetic is not what takes the time
_PAYS_FROM_TOKENS = 32  # what the copy costs, in tokens, with a margin
_MOST_ROWS = 16  # above, F.linear is as good


def for_decoding(model: Transformer, rows: int, new_tokens: int) -> Transformer:
    """A model that reads ``rows`` sequences token by token faster than ``model``, whose weights it shares; or ``model`` itself.

    The copy of the weights is made only where it pays within ``new_tokens``, and fits into half of the free memory.
    """
    weights = model.output_matrix
    if hasattr(weights, "device_mesh"):  # a share of the weights; the others come in when modules are called as such
        return model
    known = weights.device.type == "cpu" and weights.dtype in (torch.float32, torch.bfloat16) and not model.training
    pays = rows <= _MOST_ROWS and new_tokens >= _PAYS_FROM_TOKENS and model.num_parameters() >= _PAYS_FROM_WEIGHTS
    if not known or not pays:
        return model
    copies = _copy_is_faster(weights.dtype, rows) and model.num_parameters() * weights.element_size() < _free_memory() / 2
    return decoder(model, rows if copies else None)


def decoder(model: Transformer, packed_rows: int | None) -> Transformer:
    """``model`` with :class:`DecodingLinear` for its linear layers; with a copy of the weights if ``packed_rows`` is given."""
    twin = _twin(model, packed_rows)
    twin.__class__ = _Decoder
    assert isinstance(twin, _Decoder)
    twin.head = DecodingLinear(model.output_matrix, None, packed_rows)
    return twin


class _Decoder(Transformer):
    head: DecodingLinear

    def unembed(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.head(x_BTD)


def _twin(module: nn.Module, packed_rows: int | None) -> nn.Module:
    """The same module on the same parameters, whose children are plain functions where they are only called."""
    twin = copy.copy(module)
    twin._modules = {}
    for name, child in module._modules.items():
        if isinstance(module, Attention) and packed_rows is not None and name in ("q_proj", "k_proj", "v_proj"):
            continue
        if isinstance(child, nn.Linear):
            found: object = DecodingLinear(child.weight, child.bias, packed_rows)
        elif isinstance(child, (nn.Identity, nn.Dropout)):
            found = _unchanged
        elif child is None or isinstance(child, nn.Embedding):
            found = child
        elif isinstance(child, nn.ModuleList):
            found = [_twin(block, packed_rows) for block in child]
        else:
            found = _twin(child, packed_rows).forward
        twin.__dict__[name] = found  # found before what nn.Module looks up
    if isinstance(module, Attention) and packed_rows is not None:
        twin.__dict__["project"] = _project_at_once(module, packed_rows)
    return twin


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def _project_at_once(attention: Attention, packed_rows: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """:meth:`Attention.project` by one product."""
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    sizes = [layer.out_features for layer in layers]
    bias = None if attention.q_proj.bias is None else torch.cat([layer.bias for layer in layers]).detach()
    at_once = DecodingLinear(torch.cat([layer.weight for layer in layers]), bias, packed_rows)
    del at_once.weight  # the copy is enough

    def project(x_BTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return attention.project(x_BTD) if x_BTD.shape[1] > 1 else at_once(x_BTD).split(sizes, dim=2)

    return project


class DecodingLinear:
    """A linear map that is fast for one position: for one row as it is, for ``packed_rows`` rows with a copy of the weights."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, packed_rows: int | None) -> None:
        self.weight, self.bias = weight, bias
        self.packed = None if packed_rows is None else torch.ops.mkldnn._reorder_linear_weight(weight.detach(), packed_rows)

    def __call__(self, x_BTX: torch.Tensor) -> torch.Tensor:
        if x_BTX.shape[1] > 1:
            return F.linear(x_BTX, self.weight, self.bias)
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x_BTX, self.packed, self.bias, "none", [], "")
        if len(x_BTX) > 1:
            return F.linear(x_BTX, self.weight, self.bias)
        x_X = x_BTX.view(-1)
        y_Y = torch.mv(self.weight, x_X) if self.bias is None else torch.addmv(self.bias, self.weight, x_X)
        return y_Y.view(1, 1, -1)


def _copy_is_faster(dtype: torch.dtype, rows: int) -> bool:
    """Whether oneDNN's kernel is here, and beats a product without a copy."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return rows > 3


def _free_memory() -> int:
    """Bytes of memory that nobody uses; 0 where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
