"""The shape of a Transformer as a person writes it: one frozen dataclass that refuses what does not fit together."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from accel_pretrain.errors import refuse
from accel_pretrain.typed_yaml import option


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a :class:`~accel_pretrain.models.Transformer`."""

    vocab_size: int | None = option(None, "number of token ids; null: the dataset's")
    context_length: int = option(256, "positions per training sequence", aliases=("block_size", "seq_len"))
    d_model: int = option(512, "width of the residual stream", aliases=("n_embd",))
    num_layers: int = option(6, "number of blocks", aliases=("n_layer",))
    num_heads: int = option(8, "query heads", aliases=("n_head",))
    num_kv_heads: int | None = option(None, "key/value heads (grouped-query attention); null: num_heads")
    head_dim: int | None = option(None, "width of a head; null: d_model / num_heads")
    d_ff: int | None = option(2048, "feed-forward width; null: 4 d_model, or 8/3 d_model (up to a multiple of 64) when gated")
    norm: Literal["rmsnorm", "rmsnorm_1p", "rmsnorm_plain", "layernorm"] = option(
        "rmsnorm", "rmsnorm | rmsnorm_1p (weight 1 + w, as Gemma) | rmsnorm_plain (no weight) | layernorm"
    )
    norm_eps: float = option(1e-5, "added to the variance in a norm")
    sandwich_norm: bool = option(False, "a norm also after attention and feed-forward, as Gemma 2 and 3")
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "silu", "relu2"] = option(
        "swiglu", "swiglu | geglu (gated), gelu | gelu_tanh | silu | relu2"
    )
    position: Literal["rope", "learned"] = option("rope", "rope: rotary; learned: an embedding per position, as GPT-2")
    rope_theta: float = option(10000.0, "base of the rotary frequencies")
    rope_scaling: Literal["none", "linear", "llama3"] = option(
        "none", "stretch the rotary wavelengths: linear: all by rope_factor; llama3: only the long ones"
    )
    rope_factor: float = option(8.0, "by how much rope_scaling stretches")
    rope_low_freq_factor: float = option(1.0, "llama3: wavelengths above rope_original_context / this are stretched fully")
    rope_high_freq_factor: float = option(4.0, "llama3: wavelengths below rope_original_context / this are left alone")
    rope_original_context: int | None = option(
        None, "llama3: the context before stretching; null: context_length / rope_factor"
    )
    sliding_window: int | None = option(None, "positions that a sliding layer sees, itself included; null: all")
    window_pattern: str = option("S", "which layers slide, repeated over the layers; S: sliding, F: full; Gemma 3: SSSSSF")
    sliding_rope_theta: float | None = option(None, "rotary base of sliding layers, never scaled; null: as the full ones")
    bias: bool = option(False, "biases in linear layers and LayerNorm")
    qkv_bias: bool | None = option(None, "biases of the query, key and value projections, as Qwen2; null: as bias")
    qk_norm: bool = option(False, "RMSNorm on queries and keys, per head")
    query_pre_attn_scalar: float | None = option(None, "scores are divided by the square root of this; null: head_dim")
    attention_softcap: float | None = option(None, "c of c tanh(score / c) on attention scores, as Gemma 2; null: none")
    logit_softcap: float | None = option(None, "c of c tanh(logit / c) on the output; null: none")
    scale_embeddings: bool = option(False, "multiply token embeddings by the square root of d_model, as Gemma")
    value_embeddings: bool = option(False, "every second layer adds an embedding of the token itself to its values")
    tie_embeddings: bool = option(False, "use the token embedding as the output matrix too")
    dropout: float = option(0.0, "on embeddings, attention weights and both residual branches, while training")
    init_std: float = option(0.02, "standard deviation of the initial weights")
    zero_init: bool = option(False, "start with zero in what attention and feed-forward write to the residual stream")
    mup_base_width: int | None = option(
        None, "muP: the d_model for which lr and init_std were chosen; others scale by width (see models.mup); null: no scaling"
    )

    def __post_init__(self) -> None:
        at_least_1 = (
            "context_length", "d_model", "num_layers", "num_heads",
            "vocab_size", "num_kv_heads", "head_dim", "d_ff", "sliding_window", "rope_original_context",
            "mup_base_width",
        )  # fmt: skip
        positive = (
            "rope_theta", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor",
            "sliding_rope_theta", "query_pre_attn_scalar", "attention_softcap", "logit_softcap",
        )  # fmt: skip
        given = {name: value for name in (*at_least_1, *positive) if (value := getattr(self, name)) is not None}
        refuse(
            *((given.get(name, 1) < 1, f"{name}: must be at least 1, got {given.get(name)}") for name in at_least_1),
            *((not given.get(name, 1) > 0, f"{name}: must be positive, got {given.get(name)}") for name in positive),
            (not 0 <= self.dropout < 1, f"dropout: must be at least 0 and below 1, got {self.dropout}"),
            (self.norm_eps < 0, f"norm_eps: must not be negative, got {self.norm_eps}"),
            (
                self.mup_base_width is not None and self.tie_embeddings,
                "mup_base_width: an output matrix scales with width and an embedding does not; type --tie_embeddings false",
            ),
            (self.init_std < 0, f"init_std: must not be negative, got {self.init_std}"),
        )
        self._refuse_misfits()

    def _refuse_misfits(self) -> None:
        heads, kv_heads = self.num_heads, self.kv_heads
        fitting = [h for h in range(1, min(self.d_model, 4096) + 1) if self.d_model % h == 0]
        nearest = min(fitting, key=lambda h: abs(h - heads))
        divides = self.head_dim is not None or self.d_model % heads == 0
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        refuse(
            (not divides, f"num_heads: {heads} heads do not divide d_model {self.d_model}; try --num_heads {nearest}"),
            (heads % kv_heads != 0, f"num_kv_heads: {kv_heads} key/value heads do not divide num_heads {heads}"),
            (
                divides and self.position == "rope" and self.head_width % 2 == 1,
                f"head_dim: rotary embeddings need an even head width, got {self.head_width}",
            ),
            (
                not self.window_pattern or not set(self.window_pattern) <= {"S", "F"},
                f"window_pattern: must be letters S (sliding) and F (full), got {self.window_pattern!r}",
            ),
            (
                self.rope_scaling == "llama3" and low >= high,
                f"rope_low_freq_factor: must be below rope_high_freq_factor {high}, got {low}",
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

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    def resolved(self) -> ModelConfig:
        """The same shape without nulls that stand for another value."""
        scaled = self.rope_scaling == "llama3"
        return replace(
            self, num_kv_heads=self.kv_heads, head_dim=self.head_width, d_ff=self.ff_width, qkv_bias=self.has_qkv_bias,
            query_pre_attn_scalar=self.query_pre_attn_scalar or float(self.head_width),
            rope_original_context=round(self.original_context) if scaled else self.rope_original_context,
        )  # fmt: skip

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        return (self.head_width if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar) ** -0.5

    @property
    def original_context(self) -> float:
        """The positions that the rotary wavelengths were made for, before ``rope_scaling: llama3``."""
        return self.context_length / self.rope_factor if self.rope_original_context is None else self.rope_original_context

    def slides(self, layer: int) -> bool:
        """Whether a layer sees only the last ``sliding_window`` positions."""
        return self.sliding_window is not None and self.window_pattern[layer % len(self.window_pattern)] == "S"

    def embeds_values(self, layer: int) -> bool:
        """Whether a layer has a value embedding: every second one, the last included."""
        return self.value_embeddings and layer % 2 == (self.num_layers - 1) % 2
