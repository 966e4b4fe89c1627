"""Widths that share one best learning rate: muP (Yang & Hu 2022, "Tensor Programs V", table 8), as ``mup_base_width``.

With m = d_model / mup_base_width, compared with the model of the base width:

| parameter | standard deviation at init | learning rate of Adam, Lion | of Muon |
|---|---|---|---|
| matrices of attention and feed-forward | / sqrt(m) | / m | / sqrt(m) |
| lm_head | / m | / m | / m: AdamW's |
| embeddings, norms, biases | as it is | as it is | as it is: AdamW's |

Muon's updates have singular values of 0.2 sqrt(max(R, C)) lr, which grow as sqrt(m) where 1 is wanted (Yang, Simon & Bernstein
2023, "A spectral condition for feature learning"). Heads are to stay as wide, and d_ff to grow as d_model. Weight decay is
multiplied by the learning rate of its group, so in an update matrices decay as much less as they learn: / m, or / sqrt(m) under
Muon, lm_head / m, and embeddings as they did.
"""

from __future__ import annotations

from accel_pretrain.models.config import ModelConfig


def _times(config: ModelConfig) -> float:
    return 1.0 if config.mup_base_width is None else config.d_model / config.mup_base_width


def init_scale(config: ModelConfig, name: str) -> float:
    """What the standard deviation of a new parameter of two dimensions is multiplied by."""
    if "embed" in name:
        return 1.0
    return 1 / _times(config) if name.startswith("lm_head") else _times(config) ** -0.5


def lr_scale(config: ModelConfig, kind: str, rule: str | None) -> float:
    """What the learning rate of parameters of a kind (of :func:`accel_pretrain.optim.kind_of`) is multiplied by."""
    if kind not in ("matrix", "head"):
        return 1.0
    return _times(config) ** -0.5 if rule == "muon" else 1 / _times(config)
