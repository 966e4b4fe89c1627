"""Plain re-implementations of what the package computes, in float64 NumPy, each with its source. Slow, readable, independent.

Nothing here imports the package: a mistake made there cannot be made here too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray

# ------------------------------------------------------------------------------------------------------------------ loss


def cross_entropy(logits_NV: Array, targets_N: Array, ignore: int = -100) -> Array:
    """``log(sum_v exp(logit_v)) - logit_target`` in nats, by the log-sum-exp identity; 0 where the target is ignored."""
    nats = []
    for logits_V, target in zip(logits_NV.astype(np.float64), targets_N, strict=True):
        peak = logits_V.max()
        nats.append(0.0 if target == ignore else peak + math.log(np.exp(logits_V - peak).sum()) - logits_V[target])
    return np.array(nats)


def cross_entropy_gradient(logits_NV: Array, targets_N: Array) -> Array:
    """``softmax(logits) - onehot(target)``: the derivative of the sum of :func:`cross_entropy` (Bishop 2006, eq. 4.109)."""
    shifted = np.exp(logits_NV.astype(np.float64) - logits_NV.max(axis=1, keepdims=True))
    gradient = shifted / shifted.sum(axis=1, keepdims=True)
    gradient[np.arange(len(targets_N)), targets_N] -= 1.0
    return gradient


# ------------------------------------------------------------------------------------------------------------ optimizers


class AdamW:
    """Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2, as torch scales it: decay times lr."""

    def __init__(self, *, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self.t, self.m, self.v = 0, 0.0, 0.0

    def step(self, weight: Array, gradient: Array, lr: float) -> Array:
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        m_hat = self.m / (1 - self.beta1**self.t)
        v_hat = self.v / (1 - self.beta2**self.t)
        return weight - lr * (m_hat / (np.sqrt(v_hat) + self.eps) + self.weight_decay * weight)


class SGD:
    """Sutskever et al. 2013 in torch's form: ``v = momentum * v + g``, and Nesterov's ``g + momentum * v``; decay is in g."""

    def __init__(self, *, momentum: float, nesterov: bool, weight_decay: float) -> None:
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.velocity = 0.0

    def step(self, weight: Array, gradient: Array, lr: float) -> Array:
        gradient = gradient + self.weight_decay * weight
        self.velocity = self.momentum * self.velocity + gradient
        return weight - lr * (gradient + self.momentum * self.velocity if self.nesterov else self.velocity)


def clip_by_global_norm(gradients: Sequence[Array], largest: float) -> tuple[float, list[Array]]:
    """Pascanu et al. 2013, algorithm 1, over all parameters together. Returns the norm before clipping."""
    norm = math.sqrt(sum(float((gradient.astype(np.float64) ** 2).sum()) for gradient in gradients))
    factor = min(1.0, largest / norm)
    return norm, [gradient * factor for gradient in gradients]


def cosine_with_warmup(step: int, peak: float, floor: float, warmup: int, total: int) -> float:
    """Linear to ``peak`` at ``step == warmup``, then half a cosine to ``floor`` at ``step == total`` (nanoGPT's get_lr)."""
    if step <= warmup:
        return peak * step / warmup
    return floor + 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup))) * (peak - floor)


# ------------------------------------------------------------------------------------------------------------ the model


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Zhang & Sennrich 2019, eq. 4."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def layer_norm(x: Array, weight: Array, bias: Array | float, eps: float) -> Array:
    """Ba et al. 2016, eq. 4, with the biased variance."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * weight + bias


def rope_frequency(i: int, width: int, theta: float, config: Any = None) -> float:
    """Su et al. 2021: theta^(-2i/E); divided by a factor (Chen et al. 2023), or as in Llama 3.1's own code."""
    frequency = theta ** (-2 * i / width)
    if config is None or config.rope_scaling == "none":
        return frequency
    if config.rope_scaling == "linear":
        return frequency / config.rope_factor
    original = config.rope_original_context or config.context_length / config.rope_factor
    wavelength = 2 * math.pi / frequency
    if wavelength < original / config.rope_high_freq_factor:
        return frequency
    if wavelength > original / config.rope_low_freq_factor:
        return frequency / config.rope_factor
    smooth = (original / wavelength - config.rope_low_freq_factor) / (
        config.rope_high_freq_factor - config.rope_low_freq_factor
    )
    return (1 - smooth) * frequency / config.rope_factor + smooth * frequency


def rope(x_THE: Array, theta: float, first_position: int = 0, config: Any = None) -> Array:
    """Su et al. 2021, eq. 34, in the rotate-half layout: dimensions i and i + E/2 turn together by position * frequency."""
    turned = np.empty_like(x_THE)
    half = x_THE.shape[-1] // 2
    for t in range(x_THE.shape[0]):
        for i in range(half):
            angle = (first_position + t) * rope_frequency(i, x_THE.shape[-1], theta, config)
            low, high = x_THE[t, :, i], x_THE[t, :, i + half]
            turned[t, :, i] = low * math.cos(angle) - high * math.sin(angle)
            turned[t, :, i + half] = low * math.sin(angle) + high * math.cos(angle)
    return turned


def attention(
    q_THE: Array,
    k_TGE: Array,
    v_TGE: Array,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Array:
    """Vaswani et al. 2017, eq. 1, causal, with the mask written out; query head h reads key/value head ``h // (H / G)``."""
    T, H, E = q_THE.shape
    out_THE = np.empty_like(q_THE)
    for h in range(H):
        g = h // (H // k_TGE.shape[1])
        scores_TT = q_THE[:, h] @ k_TGE[:, g].T * (1 / math.sqrt(E) if scale is None else scale)
        if softcap is not None:
            scores_TT = softcap * np.tanh(scores_TT / softcap)
        for t in range(T):
            for s in range(T):
                if s > t or (window is not None and t - s >= window):
                    scores_TT[t, s] = -np.inf
        weights_TT = np.exp(scores_TT - scores_TT.max(axis=1, keepdims=True))
        out_THE[:, h] = weights_TT / weights_TT.sum(axis=1, keepdims=True) @ v_TGE[:, g]
    return out_THE


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    """Hendrycks & Gimpel 2016, section 2: the approximation that GPT-2 uses."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x: Array) -> Array:
    """Hendrycks & Gimpel 2016: ``x`` times the normal distribution function."""
    return np.vectorize(lambda value: 0.5 * value * (1 + math.erf(value / math.sqrt(2))))(x)


ACTIVATIONS = {
    "swiglu": silu, "silu": silu, "geglu": gelu_tanh, "gelu_tanh": gelu_tanh, "gelu": gelu,
    "relu2": lambda x: np.maximum(x, 0.0) ** 2,
}  # fmt: skip


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


class ReferenceTransformer:
    """A whole decoder on one sequence: GPT-2, Llama, Gemma 3 and others, by ``config``."""

    def __init__(self, weights: Mapping[str, Array], config: Any) -> None:
        self.weights, self.config = weights, config

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: Array, kind: str | None = None) -> Array:
        kind, eps = kind or self.config.norm, self.config.norm_eps
        if kind == "layernorm":
            return layer_norm(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias", 0.0), eps)
        weight = 1.0 if kind == "rmsnorm_plain" else self.weights[f"{name}.weight"]
        return rms_norm(x, np.asarray(weight) + (kind == "rmsnorm_1p"), eps)

    def attend(self, layer: int, x_TD: Array, tokens_T: Array) -> Array:
        config, name = self.config, f"layers.{layer}.self_attn"
        slides = config.sliding_window is not None and config.window_pattern[layer % len(config.window_pattern)] == "S"
        q, k, v = (self.linear(f"{name}.{kind}_proj", x_TD).reshape(len(tokens_T), -1, config.head_width) for kind in "qkv")
        if config.qk_norm:
            kind = "rmsnorm" if config.norm == "layernorm" else config.norm
            q, k = self.norm(f"{name}.q_norm", q, kind), self.norm(f"{name}.k_norm", k, kind)
        if f"{name}.value_embedding.embed.weight" in self.weights:
            gate_TG = 2 * sigmoid(self.linear(f"{name}.value_embedding.gate", x_TD[:, :32]))
            v = v + gate_TG[:, :, None] * self.weights[f"{name}.value_embedding.embed.weight"][tokens_T].reshape(v.shape)
        if config.position == "rope":
            theta, scaling = config.rope_theta, config
            if slides and config.sliding_rope_theta is not None:
                theta, scaling = config.sliding_rope_theta, None
            q, k = rope(q, theta, config=scaling), rope(k, theta, config=scaling)
        scale = (config.query_pre_attn_scalar or config.head_width) ** -0.5
        out_THE = attention(q, k, v, scale, config.sliding_window if slides else None, config.attention_softcap)
        return self.linear(f"{name}.o_proj", out_THE.reshape(len(tokens_T), -1))

    def feed_forward(self, name: str, x: Array) -> Array:
        activate, up = ACTIVATIONS[self.config.activation], self.linear(f"{name}.up_proj", x)
        gated = activate(self.linear(f"{name}.gate_proj", x)) * up if self.config.is_gated else activate(up)
        return self.linear(f"{name}.down_proj", gated)

    def logits(self, tokens_T: Array) -> Array:
        config, weights = self.config, self.weights
        x_TD = weights["embed_tokens.weight"][tokens_T] * (math.sqrt(config.d_model) if config.scale_embeddings else 1.0)
        if config.position == "learned":
            x_TD = x_TD + weights["embed_positions.weight"][: len(tokens_T)]
        for layer in range(config.num_layers):
            name = f"layers.{layer}"
            out_TD = self.attend(layer, self.norm(f"{name}.input_layernorm", x_TD), tokens_T)
            x_TD = x_TD + (self.norm(f"{name}.attn_out_norm", out_TD) if config.sandwich_norm else out_TD)
            out_TD = self.feed_forward(f"{name}.mlp", self.norm(f"{name}.post_attention_layernorm", x_TD))
            x_TD = x_TD + (self.norm(f"{name}.mlp_out_norm", out_TD) if config.sandwich_norm else out_TD)
        output_VD = weights["embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
        logits_TV = self.norm("norm", x_TD) @ output_VD.T
        cap = config.logit_softcap
        return logits_TV if cap is None else cap * np.tanh(logits_TV / cap)


def transformer_logits(weights: Mapping[str, Array], config: Any, tokens_T: Array) -> Array:
    """Logits (T, V) of :class:`ReferenceTransformer`."""
    return ReferenceTransformer(weights, config).logits(tokens_T)


# -------------------------------------------------------------------------------------------------------------- the data


def get_batch(ids: Array, context_length: int, starts: Sequence[int]) -> tuple[Array, Array]:
    """nanoGPT's get_batch without its dice: inputs and targets at given starts."""
    inputs = np.stack([ids[start : start + context_length].astype(np.int64) for start in starts])
    targets = np.stack([ids[start + 1 : start + 1 + context_length].astype(np.int64) for start in starts])
    return inputs, targets


# ---------------------------------------------------------------------------------------------------------- statistics


def chi_square(counts: Array) -> tuple[float, float]:
    """Pearson's statistic against equal expectation, and a bound that chance exceeds about once in a million times."""
    expected, degrees = counts.sum() / counts.size, counts.size - 1
    return float(((counts - expected) ** 2 / expected).sum()), degrees * wilson_hilferty(degrees, sigmas=4.75)


def wilson_hilferty(degrees: int, sigmas: float) -> float:
    """The upper quantile of chi-square / degrees, ``sigmas`` out (Wilson & Hilferty 1931)."""
    return (1 - 2 / (9 * degrees) + sigmas * math.sqrt(2 / (9 * degrees))) ** 3
