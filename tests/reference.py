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


def rope(x_THE: Array, theta: float, first_position: int = 0) -> Array:
    """Su et al. 2021, eq. 34, in the rotate-half layout: dimensions i and i + E/2 turn together by position * theta^(-2i/E)."""
    turned = np.empty_like(x_THE)
    half = x_THE.shape[-1] // 2
    for t in range(x_THE.shape[0]):
        for i in range(half):
            angle = (first_position + t) * theta ** (-2 * i / x_THE.shape[-1])
            low, high = x_THE[t, :, i], x_THE[t, :, i + half]
            turned[t, :, i] = low * math.cos(angle) - high * math.sin(angle)
            turned[t, :, i + half] = low * math.sin(angle) + high * math.cos(angle)
    return turned


def attention(q_THE: Array, k_TGE: Array, v_TGE: Array) -> Array:
    """Vaswani et al. 2017, eq. 1, causal, with the mask written out; query head h reads key/value head ``h // (H / G)``."""
    T, H, E = q_THE.shape
    out_THE = np.empty_like(q_THE)
    for h in range(H):
        g = h // (H // k_TGE.shape[1])
        scores_TT = q_THE[:, h] @ k_TGE[:, g].T / math.sqrt(E)
        scores_TT[np.arange(T)[:, None] < np.arange(T)[None, :]] = -np.inf
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


def transformer_logits(weights: Mapping[str, Array], config: Any, tokens_T: Array) -> Array:
    """A whole pre-norm decoder on one sequence: GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023) by ``config``."""

    def linear(name: str, x: Array) -> Array:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(name: str, x: Array) -> Array:
        if config.norm == "rmsnorm":
            return rms_norm(x, weights[f"{name}.weight"], config.norm_eps)
        return layer_norm(x, weights[f"{name}.weight"], weights.get(f"{name}.bias", 0.0), config.norm_eps)

    def heads(name: str, x_TD: Array, kind: str) -> Array:
        x_THE = linear(f"{name}.{kind}_proj", x_TD).reshape(len(tokens_T), -1, config.head_width)
        if config.qk_norm and kind in "qk":
            x_THE = rms_norm(x_THE, weights[f"{name}.{kind}_norm.weight"], config.norm_eps)
        return rope(x_THE, config.rope_theta) if config.position == "rope" and kind in "qk" else x_THE

    def feed_forward(name: str, x: Array) -> Array:
        activate, up = ACTIVATIONS[config.activation], linear(f"{name}.up_proj", x)
        return linear(f"{name}.down_proj", activate(linear(f"{name}.gate_proj", x)) * up if config.is_gated else activate(up))

    x_TD = weights["embed_tokens.weight"][tokens_T]
    if config.position == "learned":
        x_TD = x_TD + weights["embed_positions.weight"][: len(tokens_T)]
    for layer in range(config.num_layers):
        name = f"layers.{layer}"
        normed_TD = norm(f"{name}.input_layernorm", x_TD)
        out_THE = attention(*(heads(f"{name}.self_attn", normed_TD, kind) for kind in "qkv"))
        x_TD = x_TD + linear(f"{name}.self_attn.o_proj", out_THE.reshape(len(tokens_T), -1))
        x_TD = x_TD + feed_forward(f"{name}.mlp", norm(f"{name}.post_attention_layernorm", x_TD))
    output_VD = weights["embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
    return norm("norm", x_TD) @ output_VD.T


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
