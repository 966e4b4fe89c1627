"""Causal self-attention: who sees whom, and the layer itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from accel_pretrain.models import cpu_attention
from accel_pretrain.models.config import ModelConfig
from accel_pretrain.models.documents import BlockMask, block_attention
from accel_pretrain.models.kv_cache import KVCache
from accel_pretrain.models.norm import build_head_norm
from accel_pretrain.models.precision import for_products
from accel_pretrain.models.rope import rotate


class View(NamedTuple):
    """What the layers of one kind (full or sliding) share in one forward pass: rotary angles, and which keys are seen.

    ``rope`` is as in :func:`~accel_pretrain.models.rope.rotate`, None with learned positions. ``mask`` is boolean, (T, S) or
    (B, 1, T, S), True where a query sees a key; None means all keys, or those up to its own if ``is_causal``. ``window`` is how
    many keys a query sees where ``mask`` says nothing else. ``blocks`` say all of it for a kernel that goes by blocks.
    """

    rope: torch.Tensor | None
    mask: torch.Tensor | None
    is_causal: bool
    window: int | None = None
    blocks: BlockMask | None = None


def visible(
    T: int, S: int, window: int | None, padding_B: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor | None, bool]:
    """Which of S keys the T last positions see, as ``mask`` and ``is_causal`` of a :class:`View`.

    A position sees itself and what comes before, at most ``window`` positions in all, and nothing of the ``padding_B`` first
    ones of its sequence (but padding sees itself: a softmax over nothing would be NaN).
    """
    if window is not None and window >= S:
        window = None
    if padding_B is None and window is None and T in (1, S):
        return None, T > 1
    queries_T1 = torch.arange(S - T, S, device=device).unsqueeze(1)
    keys_S = torch.arange(S, device=device)
    mask = keys_S <= queries_T1
    if window is not None:
        mask = mask & (keys_S > queries_T1 - window)
    if padding_B is not None:
        mask = (mask & (keys_S >= padding_B[:, None, None]) | (keys_S == queries_T1)).unsqueeze(1)
    return mask, False


def attend(
    q_BHTE: torch.Tensor, k_BGSE: torch.Tensor, v_BGSE: torch.Tensor, view: View,
    *, scale: float, softcap: float | None, dropout: float,
) -> torch.Tensor:  # fmt: skip
    """Averages of the values that each query sees, weighted by softmax(scale q k): (B, H, T, E). H/G queries share a key head.

    Through PyTorch's fused kernels, which know no soft cap: with one, step by step, in O(T S) memory.
    """
    if view.blocks is not None and dropout == 0:
        return block_attention(q_BHTE, k_BGSE, v_BGSE, view.blocks, scale=scale, softcap=softcap)
    causal = view.is_causal or view.window is not None
    if causal and softcap is None and dropout == 0 and cpu_attention.fits(q_BHTE, k_BGSE, v_BGSE):
        return cpu_attention.causal_attention(q_BHTE, k_BGSE, v_BGSE, scale, view.window)
    grouped = k_BGSE.shape[1] != q_BHTE.shape[1]
    # torch.compile's gradients of the grouped kernel with dropout are not finite on a CPU
    if grouped and (softcap is not None or dropout > 0):
        times, grouped = q_BHTE.shape[1] // k_BGSE.shape[1], False
        k_BGSE, v_BGSE = k_BGSE.repeat_interleave(times, dim=1), v_BGSE.repeat_interleave(times, dim=1)
    if softcap is None:
        return F.scaled_dot_product_attention(
            q_BHTE, k_BGSE, v_BGSE,
            attn_mask=view.mask, is_causal=view.is_causal, dropout_p=dropout, scale=scale, enable_gqa=grouped,
        )  # fmt: skip
    scores_BHTS = softcap * torch.tanh(q_BHTE @ k_BGSE.transpose(2, 3) * scale / softcap)
    mask = view.mask
    if view.is_causal:
        mask = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=scores_BHTS.device).tril()
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf)
    weights_BHTS = F.dropout(scores_BHTS.float().softmax(dim=-1), dropout).to(v_BGSE.dtype)
    return weights_BHTS @ v_BGSE


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, layer: int, vocab_size: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.head_width, self.scale, self.softcap = config.head_width, config.score_scale, config.attention_softcap
        D, HE, GE = config.d_model, config.num_heads * config.head_width, config.kv_heads * config.head_width
        self.q_proj = nn.Linear(D, HE, bias=config.has_qkv_bias)
        self.k_proj = nn.Linear(D, GE, bias=config.has_qkv_bias)
        self.v_proj = nn.Linear(D, GE, bias=config.has_qkv_bias)
        self.o_proj = nn.Linear(HE, D, bias=config.bias)
        self.q_norm, self.k_norm = build_head_norm(config), build_head_norm(config)
        self.value_embedding = ValueEmbedding(config, vocab_size) if config.embeds_values(layer) else None

    def forward(self, x_BTD: torch.Tensor, tokens_BT: torch.Tensor, view: View, cache: KVCache | None) -> torch.Tensor:
        x_BTD = for_products(x_BTD)
        q_BTX, k_BTX, v_BTX = self.project(x_BTD)
        q_BHTE, k_BGSE = self.q_norm(self._heads(q_BTX)), self.k_norm(self._heads(k_BTX))
        v_BGSE = self._heads(v_BTX)
        if self.value_embedding is not None:
            v_BGSE = v_BGSE + self._heads(self.value_embedding(x_BTD, tokens_BT)).to(v_BGSE.dtype)
        if view.rope is not None:
            q_BHTE, k_BGSE = rotate(q_BHTE, view.rope), rotate(k_BGSE, view.rope)
        if cache is not None:
            k_BGSE, v_BGSE = cache.append(self.layer, k_BGSE, v_BGSE)
        dropout = self.dropout if self.training else 0.0
        out_BHTE = attend(q_BHTE, k_BGSE, v_BGSE, view, scale=self.scale, softcap=self.softcap, dropout=dropout)
        return self.o_proj(out_BHTE.transpose(1, 2).flatten(2))

    def project(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, all heads side by side."""
        return self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)

    def _heads(self, x_BTX: torch.Tensor) -> torch.Tensor:
        return x_BTX.unflatten(2, (-1, self.head_width)).transpose(1, 2)


class ValueEmbedding(nn.Module):
    """A second embedding of each token, added to the values of a layer (Zhou et al. 2024, "Value Residual Learning").

    Each key/value head has its own gate, 2 sigmoid of a linear map of the first 32 dimensions of x, which starts at 1; after
    nanochat.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.kv_heads, self.gate_inputs = config.kv_heads, min(32, config.d_model)
        self.embed = nn.Embedding(vocab_size, config.kv_heads * config.head_width)
        self.gate = nn.Linear(self.gate_inputs, config.kv_heads, bias=False)

    def forward(self, x_BTD: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        gate_BTG = 2 * self.gate(x_BTD[..., : self.gate_inputs]).sigmoid()
        return (self.embed(tokens_BT).unflatten(2, (self.kv_heads, -1)) * gate_BTG.unsqueeze(3)).flatten(2)
