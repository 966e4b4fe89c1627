"""The Transformer, written by hand: one block that is GPT-2, Llama, Qwen 3, Gemma 3 or in between, by its options.

Read it from the bottom: :class:`Transformer` embeds, runs :class:`Block` after :class:`Block`, and predicts.
:mod:`~accel_pretrain.models.config` lists the options; attention, rotary positions and norms have a file each.

Shape suffixes, here and everywhere in the package (after Shazeer's "Shape Suffixes"): B sequences, T positions, S positions
including cached ones, D model width, H query heads, G key/value heads, E head width, F feed-forward width, V vocabulary.
A reshape means a new name. Parameters are named as in Hugging Face's Llama, and rotary embeddings pair dimension i with
i + E/2 as theirs do, so that importing and exporting weights is a table of names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from accel_pretrain.loss import next_token_loss
from accel_pretrain.models import cpu_loss, head_loss, mup
from accel_pretrain.models.attention import Attention, View, visible
from accel_pretrain.models.config import ModelConfig
from accel_pretrain.models.documents import begins_of_documents, blocks_in_documents, visible_in_documents
from accel_pretrain.models.kv_cache import KVCache
from accel_pretrain.models.norm import build_norm
from accel_pretrain.models.precision import for_products
from accel_pretrain.models.recompute import Level, checkpointed
from accel_pretrain.models.rope import rope_table


class TokenEmbedding(nn.Embedding):
    """A vector for each token. One that is tied to the output matrix may be ``handed`` on to the loss."""

    def forward(self, input: torch.Tensor, handed: cpu_loss.HandedOn | None = None) -> torch.Tensor:
        return super().forward(input) if handed is None else handed.embed(input, self.weight)


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
        x_BTD = for_products(x_BTD)
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
    """Residual block: attention, then feed-forward, each behind a norm, and before one too if ``sandwich_norm``."""

    def __init__(self, config: ModelConfig, layer: int, vocab_size: int) -> None:
        super().__init__()
        self.slides = config.slides(layer)
        self.input_layernorm = build_norm(config)
        self.self_attn = Attention(config, layer, vocab_size)
        self.attn_out_norm = build_norm(config) if config.sandwich_norm else nn.Identity()
        self.post_attention_layernorm = build_norm(config)
        self.mlp = FeedForward(config)
        self.mlp_out_norm = build_norm(config) if config.sandwich_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.checkpointing: Level = "none"

    def forward(self, x_BTD: torch.Tensor, tokens_BT: torch.Tensor, view: View, cache: KVCache | None) -> torch.Tensor:
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._forward(x_BTD, tokens_BT, view, cache)
        return checkpointed(self._forward, self.checkpointing, self.dropout.p, x_BTD, tokens_BT, view, cache)

    def _forward(self, x_BTD: torch.Tensor, tokens_BT: torch.Tensor, view: View, cache: KVCache | None) -> torch.Tensor:
        attended_BTD = self.self_attn(self.input_layernorm(x_BTD), tokens_BT, view, cache)
        x_BTD = x_BTD + self.dropout(self.attn_out_norm(attended_BTD))
        return x_BTD + self.dropout(self.mlp_out_norm(self.mlp(self.post_attention_layernorm(x_BTD))))


class Transformer(nn.Module):
    """A decoder-only language model.

    ``model(tokens_BT)`` gives ``logits_BTV``; ``model(tokens_BT, targets_BT)`` gives the loss of each sequence, ``nats_B``
    (see :mod:`accel_pretrain.loss`), computed in here because logits that leave a model prepared by Accelerate under bf16
    are copied to float32. With a ``cache``, ``tokens_BT`` continue what the cache holds; ``last_only`` gives the logits of the
    last position alone, ``logits_B1V``.
    """

    rope: torch.Tensor
    sliding_rope: torch.Tensor | None

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.compiled = config, vocab_size, False
        self.chunked_loss = False  # see head_loss
        self.document_id: int | None = None  # the id with which a document begins, where tokens see only their own
        self.embed_tokens = TokenEmbedding(vocab_size, config.d_model)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.context_length, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, layer, vocab_size) for layer in range(config.num_layers))
        self.norm = build_norm(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)
        self.make_tables()
        self.init_weights()

    def make_tables(self) -> None:
        """(Re)compute what is not a parameter and not saved: the rotary angles. Needed after a start on the meta device."""
        if self.config.position == "rope":
            own = self.config.sliding_window is not None and self.config.sliding_rope_theta is not None
            self.register_buffer("rope", rope_table(self.config), persistent=False)
            self.register_buffer("sliding_rope", rope_table(self.config, sliding=True) if own else None, persistent=False)

    def compile_parts(self) -> None:
        """Compile the blocks, and the loss, in place: parameter names stay, and DDP still overlaps its communication.

        On a GPU the compiled loss makes no float32 copy of the logits. Copies of the model are compiled too, and stay copies.
        """
        self.compiled = True
        for layer in self.layers:
            layer.compile()

    def init_weights(self) -> None:
        """Set every parameter from the global random state, by this table (GPT-2's rules, Radford et al. 2019, section 2.3).

        | parameter | value |
        |---|---|
        | token, position and value embeddings, lm_head | normal, std = init_std |
        | q, k, v, gate, up weights | normal, std = init_std |
        | o and down weights (they write to the residual stream) | normal, std = init_std / sqrt(2 num_layers); 0 if zero_init |
        | norm weights | 1 (0 where 1 is added to them) |
        | the gates of value embeddings, all biases | 0 |

        With ``mup_base_width``, matrices and lm_head times what :mod:`~accel_pretrain.models.mup` says.
        """
        for name, parameter in self.named_parameters():
            self.init_weight(name, parameter)

    def initial_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by name, one after the other, as a model that is built on the CPU has it; this one may be on "meta".

        So a seed gives the same weights however they are spread. PyTorch's layers draw weights too when they are built, which
        :meth:`init_weights` then writes over: those draws have to be repeated. At most one layer is in memory at a time.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="cpu")
            elif isinstance(layer, nn.Embedding):
                nn.Embedding(layer.num_embeddings, layer.embedding_dim, device="cpu")
        for name, parameter in self.named_parameters():
            whole = torch.empty(parameter.shape, device="cpu")
            self.init_weight(name, whole)
            yield name, whole

    @torch.no_grad()
    def init_weight(self, name: str, weight: torch.Tensor) -> None:
        """Write the initial value of the parameter ``name`` into ``weight``; see :meth:`init_weights`."""
        config = self.config
        if name.endswith(("bias", "value_embedding.gate.weight")):
            nn.init.zeros_(weight)
        elif weight.ndim == 1:
            nn.init.constant_(weight, 0.0 if config.norm == "rmsnorm_1p" else 1.0)
        else:
            residual_std = 0.0 if config.zero_init else config.init_std / math.sqrt(2 * config.num_layers)
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=(residual_std if writes_residual else config.init_std) * mup.init_scale(config, name))

    def forward(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
    ) -> torch.Tensor:
        config = self.config
        packed = cache is None and self.document_id is not None
        positions, views = self._look_within(tokens_BT) if packed else self._look(tokens_BT, cache)
        in_chunks = targets_BT is not None and cpu_loss.fits(tokens_BT, self.output_matrix)
        handed = cpu_loss.HandedOn() if in_chunks and config.tie_embeddings else None
        x_BTD = self.embed_tokens(tokens_BT) if handed is None else self.embed_tokens(tokens_BT, handed)
        if config.scale_embeddings:
            x_BTD = x_BTD * math.sqrt(config.d_model)
        if config.position == "learned":
            x_BTD = x_BTD + self.embed_positions.weight[positions]
        x_BTD = self.dropout(x_BTD)
        for layer in self.layers:
            x_BTD = layer(x_BTD, tokens_BT, views[layer.slides], cache)  # type: ignore[index]  # slides is a bool
        if cache is not None:
            cache.advance(tokens_BT.shape[1])
        if last_only:
            x_BTD = x_BTD[:, -1:]
        x_BTD = for_products(self.norm(x_BTD))
        if targets_BT is None:
            return self._logits(x_BTD)
        if in_chunks:
            matrix_VD = self.output_matrix if handed is None else handed.matrix_VD
            return cpu_loss.head_loss(x_BTD, matrix_VD, targets_BT, config.logit_softcap, compiled=self.compiled)
        if self.chunked_loss and torch.is_grad_enabled():
            return head_loss.chunked_loss(x_BTD, self.output_matrix, targets_BT, config.logit_softcap)
        if self.compiled and x_BTD.device.type != "cpu":
            return _compiled_loss()(x_BTD, self.output_matrix, targets_BT, config.logit_softcap)
        return _plain_loss(x_BTD, self.output_matrix, targets_BT, config.logit_softcap)

    def _logits(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return capped(self.unembed(x_BTD), self.config.logit_softcap)

    def unembed(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Logits, before a soft cap, of what the last norm gives."""
        return F.linear(x_BTD, self.output_matrix)

    def _look(self, tokens_BT: torch.Tensor, cache: KVCache | None) -> tuple[slice | torch.Tensor, tuple[View, View]]:
        """Where the new tokens stand, and what full and sliding layers see from there."""
        start = cache.length if cache is not None else 0
        padding_B = cache.padding_B if cache is not None else None
        T, end, device = tokens_BT.shape[1], start + tokens_BT.shape[1], tokens_BT.device
        if padding_B is None:
            longest = self.config.context_length
            assert end <= longest, f"{end} positions exceed context_length {longest}"
            positions: slice | torch.Tensor = slice(start, end)
        else:
            positions = (torch.arange(start, end, device=device) - padding_B.unsqueeze(1)).clamp(min=0)
        full = View(self._angles(positions, sliding=False), *visible(T, end, None, padding_B, device))
        if self.config.sliding_window is None:
            return positions, (full, full)
        window = self.config.sliding_window
        sliding = View(self._angles(positions, sliding=True), *visible(T, end, window, padding_B, device))
        return positions, (full, sliding._replace(window=window if padding_B is None and window < end else None))

    def _look_within(self, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, tuple[View, View]]:
        """The same, of windows in which each document sees itself alone."""
        assert self.document_id is not None
        begins_BT = begins_of_documents(tokens_BT, self.document_id)
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) - begins_BT
        in_blocks = tokens_BT.device.type == "cuda" and not (self.training and self.config.dropout)

        def view(window: int | None, *, sliding: bool) -> View:
            angles = self._angles(positions_BT, sliding=sliding)
            if in_blocks:
                return View(angles, None, is_causal=False, blocks=blocks_in_documents(begins_BT, window))
            return View(angles, visible_in_documents(begins_BT, window), is_causal=False)

        full, window = view(None, sliding=False), self.config.sliding_window
        return positions_BT, (full, full if window is None else view(window, sliding=True))

    def _angles(self, positions: slice | torch.Tensor, *, sliding: bool) -> torch.Tensor | None:
        if self.config.position == "learned":
            return None
        table = self.sliding_rope if sliding and self.sliding_rope is not None else self.rope
        return table[:, positions] if isinstance(positions, slice) else table[:, positions].unsqueeze(2)

    @property
    def output_matrix(self) -> torch.Tensor:
        """The (V, D) matrix that turns the last hidden state into logits."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def new_cache(self, capacity: int | None = None, padding_B: torch.Tensor | None = None) -> KVCache:
        return KVCache(self.config.num_layers, capacity or self.config.context_length, padding_B)

    def recompute(self, level: Level) -> None:
        """From now on compute (parts of) blocks again in the backward pass: :mod:`~accel_pretrain.models.recompute`."""
        for layer in self.layers:
            layer.checkpointing = level  # type: ignore[assignment]

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations of one token, forward and backward (Chowdhery et al. 2022, PaLM, appendix B).

        6 per weight that multiplies, and 12 H E S in every layer for attention scores and averages, where S is the full context
        or the sliding window.
        """
        config = self.config
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.ndim == 2 and "embed" not in name)
        matrices += sum(p.numel() for name, p in self.named_parameters() if name.endswith("value_embedding.gate.weight"))
        head = self.output_matrix.numel() if config.tie_embeddings else 0
        windows = [config.sliding_window if config.slides(layer) else None for layer in range(config.num_layers)]
        seen = sum(min(window or config.context_length, config.context_length) for window in windows)
        return 6 * (matrices + head) + 12 * config.num_heads * config.head_width * seen


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits that end softly at +- ``softcap`` (Gemma 2, section 2)."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _plain_loss(x_BTD: torch.Tensor, weight_VD: torch.Tensor, targets_BT: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return next_token_loss(capped(F.linear(x_BTD, weight_VD), softcap), targets_BT)


@functools.cache
def _compiled_loss() -> Callable[..., torch.Tensor]:
    return torch.compile(_plain_loss)
