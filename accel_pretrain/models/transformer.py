"""The Transformer, written by hand: one block that is GPT-2 or Llama or in between, by its options.

Read it from the bottom: :class:`Transformer` embeds, runs :class:`Block` after :class:`Block`, and predicts.

Shape suffixes, here and everywhere in the package (after Shazeer's "Shape Suffixes"): B sequences, T positions, S positions
including cached ones, D model width, H query heads, G key/value heads, E head width, F feed-forward width, V vocabulary.
A reshape means a new name. Parameters are named as in Hugging Face's Llama, and rotary embeddings pair dimension i with
i + E/2 as theirs do, so that importing and exporting weights is a table of names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from accel_pretrain.errors import refuse
from accel_pretrain.loss import next_token_loss
from accel_pretrain.models.kv_cache import KVCache
from accel_pretrain.typed_yaml import option

Rope = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a :class:`Transformer`."""

    vocab_size: int | None = option(None, "number of token ids; null: the dataset's")
    context_length: int = option(256, "positions per training sequence", aliases=("block_size", "seq_len"))
    d_model: int = option(512, "width of the residual stream", aliases=("n_embd",))
    num_layers: int = option(6, "number of blocks", aliases=("n_layer",))
    num_heads: int = option(8, "query heads", aliases=("n_head",))
    num_kv_heads: int | None = option(None, "key/value heads (grouped-query attention); null: num_heads")
    head_dim: int | None = option(None, "width of a head; null: d_model / num_heads")
    d_ff: int | None = option(2048, "feed-forward width; null: 4 d_model, or 8/3 d_model (up to a multiple of 64) when gated")
    norm: Literal["rmsnorm", "layernorm"] = option("rmsnorm", "rmsnorm | layernorm")
    norm_eps: float = option(1e-5, "added to the variance in a norm")
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "silu", "relu2"] = option(
        "swiglu", "swiglu | geglu (gated), gelu | gelu_tanh | silu | relu2"
    )
    position: Literal["rope", "learned"] = option("rope", "rope: rotary; learned: an embedding per position, as GPT-2")
    rope_theta: float = option(10000.0, "base of the rotary frequencies")
    bias: bool = option(False, "biases in linear layers and LayerNorm")
    tie_embeddings: bool = option(False, "use the token embedding as the output matrix too")
    qk_norm: bool = option(False, "RMSNorm on queries and keys, per head")
    dropout: float = option(0.0, "on embeddings, attention weights and both residual branches, while training")
    init_std: float = option(0.02, "standard deviation of the initial weights")

    def __post_init__(self) -> None:
        sizes = ("context_length", "d_model", "num_layers", "num_heads")
        optional = ("vocab_size", "num_kv_heads", "head_dim", "d_ff")
        refuse(
            *((getattr(self, name) < 1, f"{name}: must be at least 1, got {getattr(self, name)}") for name in sizes),
            *(
                ((value := getattr(self, name)) is not None and value < 1, f"{name}: must be at least 1, got {value}")
                for name in optional
            ),
            (not 0 <= self.dropout < 1, f"dropout: must be at least 0 and below 1, got {self.dropout}"),
            (self.rope_theta <= 0, f"rope_theta: must be positive, got {self.rope_theta}"),
            (self.norm_eps < 0, f"norm_eps: must not be negative, got {self.norm_eps}"),
            (self.init_std < 0, f"init_std: must not be negative, got {self.init_std}"),
        )
        self._refuse_misfits()

    def _refuse_misfits(self) -> None:
        heads, kv_heads = self.num_heads, self.kv_heads
        fitting = [h for h in range(1, min(self.d_model, 4096) + 1) if self.d_model % h == 0]
        nearest = min(fitting, key=lambda h: abs(h - heads))
        divides = self.head_dim is not None or self.d_model % heads == 0
        refuse(
            (not divides, f"num_heads: {heads} heads do not divide d_model {self.d_model}; try --num_heads {nearest}"),
            (heads % kv_heads != 0, f"num_kv_heads: {kv_heads} key/value heads do not divide num_heads {heads}"),
            (
                divides and self.position == "rope" and self.head_width % 2 == 1,
                f"head_dim: rotary embeddings need an even head width, got {self.head_width}",
            ),
        )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def is_gated(self) -> bool:
        return self.activation in ("swiglu", "geglu")

    @property
    def ff_width(self) -> int:
        if self.d_ff is not None:
            return self.d_ff
        return 64 * math.ceil(8 * self.d_model / 3 / 64) if self.is_gated else 4 * self.d_model


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang & Sennrich 2019, eq. 4), in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def build_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def rope_table(positions: int, head_width: int, theta: float) -> torch.Tensor:
    """Cosines and sines of the rotary angles, float32, shape (2, positions, E) (Su et al. 2021, eq. 34)."""
    frequencies = theta ** -(torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x_BHTE: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Turn each pair (i, i + E/2) of every head by its position's angle; computed in float32."""
    cos_TE, sin_TE = rope
    low, high = x_BHTE.float().chunk(2, dim=-1)
    turned = x_BHTE * cos_TE + torch.cat((-high, low), dim=-1) * sin_TE
    return turned.to(x_BHTE.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023), through PyTorch's fused kernel."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.head_width, self.grouped = config.head_width, config.kv_heads != config.num_heads
        D, HE, GE = config.d_model, config.num_heads * config.head_width, config.kv_heads * config.head_width
        self.q_proj = nn.Linear(D, HE, bias=config.bias)
        self.k_proj = nn.Linear(D, GE, bias=config.bias)
        self.v_proj = nn.Linear(D, GE, bias=config.bias)
        self.o_proj = nn.Linear(HE, D, bias=config.bias)
        self.q_norm = RMSNorm(config.head_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_width, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD: torch.Tensor, rope: Rope | None, cache: KVCache | None) -> torch.Tensor:
        q_BHTE = self.q_norm(self._heads(self.q_proj(x_BTD)))
        k_BGSE = self.k_norm(self._heads(self.k_proj(x_BTD)))
        v_BGSE = self._heads(self.v_proj(x_BTD))
        if rope is not None:
            q_BHTE, k_BGSE = rotate(q_BHTE, rope), rotate(k_BGSE, rope)
        if cache is not None:
            k_BGSE, v_BGSE = cache.append(self.layer, k_BGSE, v_BGSE)
        T, S = q_BHTE.shape[2], k_BGSE.shape[2]
        out_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BGSE, v_BGSE,
            attn_mask=_mask_after_cache(T, S, q_BHTE.device) if 1 < T < S else None,
            is_causal=T == S,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.grouped,
        )  # fmt: skip
        return self.o_proj(out_BHTE.transpose(1, 2).flatten(2))

    def _heads(self, x_BTX: torch.Tensor) -> torch.Tensor:
        return x_BTX.unflatten(2, (-1, self.head_width)).transpose(1, 2)


def _mask_after_cache(T: int, S: int, device: torch.device) -> torch.Tensor:
    """Which of S keys each of the T last positions may see, as a boolean (T, S)."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


class FeedForward(nn.Module):
    """Two linear maps around an activation, or three when gated (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation, self.is_gated = config.activation, config.is_gated
        D, F = config.d_model, config.ff_width
        if config.is_gated:
            self.gate_proj = nn.Linear(D, F, bias=config.bias)
        self.up_proj = nn.Linear(D, F, bias=config.bias)
        self.down_proj = nn.Linear(F, D, bias=config.bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.is_gated:
            return self.down_proj(self._activate(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return self.down_proj(self._activate(self.up_proj(x_BTD)))

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        match self.activation:
            case "swiglu" | "silu":
                return F.silu(x)
            case "geglu" | "gelu_tanh":
                return F.gelu(x, approximate="tanh")
            case "gelu":
                return F.gelu(x)
            case "relu2":
                return F.relu(x).square()
        raise AssertionError(self.activation)


class Block(nn.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = build_norm(config)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: torch.Tensor, rope: Rope | None, cache: KVCache | None) -> torch.Tensor:
        x_BTD = x_BTD + self.dropout(self.self_attn(self.input_layernorm(x_BTD), rope, cache))
        return x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD)))


class Transformer(nn.Module):
    """A decoder-only language model.

    ``model(tokens_BT)`` gives ``logits_BTV``; ``model(tokens_BT, targets_BT)`` gives the loss of each sequence, ``nats_B``
    (see :mod:`accel_pretrain.loss`), computed in here because logits that leave a model prepared by Accelerate under bf16
    are copied to float32. With a ``cache``, ``tokens_BT`` continue what the cache holds.
    """

    rope: torch.Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.embed_tokens = nn.Embedding(vocab_size, config.d_model)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.context_length, config.d_model)
        else:
            table = rope_table(config.context_length, config.head_width, config.rope_theta)
            self.register_buffer("rope", table, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = build_norm(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter from the global random state, by this table (GPT-2's rules, Radford et al. 2019, section 2.3).

        | parameter | value |
        |---|---|
        | token and position embeddings, lm_head | normal, std = init_std |
        | q, k, v, gate, up weights | normal, std = init_std |
        | o and down weights (they write to the residual stream) | normal, std = init_std / sqrt(2 num_layers) |
        | norm weights | 1 |
        | all biases | 0 |
        """
        std, residual_std = self.config.init_std, self.config.init_std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if writes_residual else std)

    def forward(
        self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        start = cache.length if cache is not None else 0
        end = start + tokens_BT.shape[1]
        assert end <= self.config.context_length, f"{end} positions exceed context_length {self.config.context_length}"
        x_BTD, rope = self.embed_tokens(tokens_BT), None
        if self.config.position == "learned":
            x_BTD = x_BTD + self.embed_positions.weight[start:end]
        else:
            cos_TE, sin_TE = self.rope[:, start:end]
            rope = (cos_TE, sin_TE)
        x_BTD = self.dropout(x_BTD)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rope, cache)
        if cache is not None:
            cache.advance(tokens_BT.shape[1])
        logits_BTV = F.linear(self.norm(x_BTD), self.output_matrix)
        return logits_BTV if targets_BT is None else next_token_loss(logits_BTV, targets_BT)

    @property
    def output_matrix(self) -> torch.Tensor:
        """The (V, D) matrix that turns the last hidden state into logits."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def new_cache(self, capacity: int | None = None) -> KVCache:
        return KVCache(self.config.num_layers, capacity or self.config.context_length)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations of one token, forward and backward (Chowdhery et al. 2022, PaLM, appendix B).

        6 per weight that multiplies, and 12 L H E T for attention scores and averages over the full context.
        """
        config = self.config
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.ndim == 2 and "embed" not in name)
        head = self.output_matrix.numel() if config.tie_embeddings else 0
        attention = config.num_layers * config.num_heads * config.head_width * config.context_length
        return 6 * (matrices + head) + 12 * attention
