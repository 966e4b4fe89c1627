"""The architectures of transformers that a :class:`Transformer` can be: their config keys and tensor names, both ways.

Whether a family can hold a config is not written down anywhere: it can if translating there and back gives the same config
(:meth:`Family.differences`).
"""

from __future__ import annotations

from typing import Any

from accel_pretrain.errors import CheckpointError
from accel_pretrain.hf.family import ROPE_OPTIONS, Family, Keys, Link, model_config, require
from accel_pretrain.models import ModelConfig

# --------------------------------------------------------------------------------------------------------- their config keys


def _common(keys: Keys) -> dict[str, Any]:
    """What all families but GPT-2 call alike."""
    names = {
        "vocab_size": "vocab_size", "context_length": "max_position_embeddings", "d_model": "hidden_size",
        "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim", "d_ff": "intermediate_size", "norm_eps": "rms_norm_eps", "init_std": "initializer_range",
        "tie_embeddings": "tie_word_embeddings",
    }  # fmt: skip
    missing = [
        theirs for ours, theirs in names.items() if keys.get(theirs) is None and ours not in ("num_kv_heads", "head_dim")
    ]
    if missing:
        raise CheckpointError([f"config.json: {name} is missing" for name in missing])
    return {ours: keys.get(theirs) for ours, theirs in names.items()}


def _to_common(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size, "max_position_embeddings": config.context_length, "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads, "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width, "intermediate_size": config.ff_width, "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std, "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.dropout, "use_cache": True, **_to_rope(config),
    }  # fmt: skip


def _rope(keys: Keys) -> dict[str, Any]:
    """Rotary settings from ``rope_theta`` and ``rope_scaling``, or from what transformers 5 writes, ``rope_parameters``."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(keys.get(name) or {}, dict):
            raise CheckpointError(f"config.json: {name} must be an object, got {keys[name]!r}")
    settings = dict(keys.get("rope_scaling") or {})
    settings |= {name: value for name, value in (keys.get("rope_parameters") or {}).items() if value is not None}
    theta = settings.get("rope_theta") or keys.get("rope_theta") or 10000.0
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in ("default", "linear", "llama3") or settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"config.json: rotary embeddings of the type {kind!r} are not supported, nor partial ones")
    options: dict[str, Any] = {"rope_theta": float(theta), "rope_scaling": "none" if kind == "default" else kind}
    names = {"rope_factor": "factor"} if kind == "linear" else {}
    if kind == "llama3":
        names = {name: name.removeprefix("rope_") for name in ROPE_OPTIONS[:3]}
        names["rope_original_context"] = "original_max_position_embeddings"
    missing = [f"config.json: rope_scaling has no {theirs}" for theirs in names.values() if settings.get(theirs) is None]
    if missing:
        raise CheckpointError(missing)
    return options | {ours: settings[theirs] for ours, theirs in names.items()}


def _to_rope(config: ModelConfig) -> dict[str, Any]:
    """As transformers 4 spells it, which 5 and other readers of these files understand too."""
    scaling: dict[str, Any] | None = None
    if config.rope_scaling == "linear":
        scaling = {"rope_type": "linear", "factor": config.rope_factor}
    elif config.rope_scaling == "llama3":
        scaling = {"rope_type": "llama3", "original_max_position_embeddings": round(config.original_context)}
        scaling |= {name.removeprefix("rope_"): getattr(config, name) for name in ROPE_OPTIONS[:3]}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def _windows(keys: Keys, layer_types: list[str]) -> dict[str, Any]:
    letters = "".join({"sliding_attention": "S", "full_attention": "F"}.get(str(kind), "?") for kind in layer_types)
    if "?" in letters or len(letters) != keys["num_hidden_layers"]:
        raise CheckpointError(
            f"config.json: layer_types must say sliding_attention or full_attention, once per layer: {layer_types}"
        )
    if "S" not in letters or keys.get("sliding_window") is None:
        return {}
    whole = len(letters)
    pattern = next(letters[:n] for n in range(1, whole + 1) if (letters[:n] * whole)[:whole] == letters)
    return {"sliding_window": keys["sliding_window"], "window_pattern": pattern}


def _to_windows(config: ModelConfig) -> dict[str, Any]:
    kinds = {True: "sliding_attention", False: "full_attention"}
    return {"layer_types": [kinds[config.slides(layer)] for layer in range(config.num_layers)]}


# --------------------------------------------------------------------------------------------------------------- their tensors


def _renamed(config: ModelConfig, names: list[str]) -> list[Link]:
    """Llama's names, which ours are too, below ``model.``."""
    return [Link(name if name.startswith("lm_head") else f"model.{name}", (name,)) for name in names]


_SANDWICH = {
    "attn_out_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


def _gemma_names(config: ModelConfig, names: list[str]) -> list[Link]:
    """Gemma 2 and 3 have a norm before and one after each half of a block, and Llama's name for another of them."""
    return [
        Link(".".join(_SANDWICH.get(part, part) for part in link.theirs.split(".")), link.ours)
        for link in _renamed(config, names)
    ]


def _gpt2_names(config: ModelConfig, names: list[str]) -> list[Link]:
    """GPT-2 keeps queries, keys and values in one matrix, and all but embeddings transposed, as (in, out)."""
    links = [
        Link("transformer.wte.weight", ("embed_tokens.weight",)),
        Link("transformer.wpe.weight", ("embed_positions.weight",)),
    ]
    kinds = ("weight", "bias")
    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}", f"layers.{i}"
        for kind in kinds:
            qkv = tuple(f"{ours}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            links += [
                Link(f"{theirs}.ln_1.{kind}", (f"{ours}.input_layernorm.{kind}",)),
                Link(f"{theirs}.attn.c_attn.{kind}", qkv, transposed=kind == "weight"),
                Link(f"{theirs}.attn.c_proj.{kind}", (f"{ours}.self_attn.o_proj.{kind}",), transposed=kind == "weight"),
                Link(f"{theirs}.ln_2.{kind}", (f"{ours}.post_attention_layernorm.{kind}",)),
                Link(f"{theirs}.mlp.c_fc.{kind}", (f"{ours}.mlp.up_proj.{kind}",), transposed=kind == "weight"),
                Link(f"{theirs}.mlp.c_proj.{kind}", (f"{ours}.mlp.down_proj.{kind}",), transposed=kind == "weight"),
            ]
    links += [Link(f"transformer.ln_f.{kind}", (f"norm.{kind}",)) for kind in kinds]
    return links + ([] if config.tie_embeddings else [Link("lm_head.weight", ("lm_head.weight",))])


# ----------------------------------------------------------------------------------------------------------------- the families

_GPT2_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "relu2": "relu2",
}


def _from_gpt2(keys: Keys) -> ModelConfig:
    off = (False, None)
    require(
        "gpt2", keys, activation_function=tuple(_GPT2_ACTIVATIONS), scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=off, add_cross_attention=off,
    )  # fmt: skip
    return model_config(
        vocab_size=keys["vocab_size"], context_length=keys["n_positions"], d_model=keys["n_embd"], num_layers=keys["n_layer"],
        num_heads=keys["n_head"], d_ff=keys["n_inner"], norm="layernorm", norm_eps=keys["layer_norm_epsilon"],
        activation=_GPT2_ACTIVATIONS[keys["activation_function"]], position="learned", bias=True,
        tie_embeddings=keys["tie_word_embeddings"],
        init_std=keys["initializer_range"],
    )  # fmt: skip


def _to_gpt2(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(_GPT2_ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size, "n_positions": config.context_length, "n_embd": config.d_model,
        "n_layer": config.num_layers, "n_head": config.num_heads, "n_inner": config.d_ff,
        "activation_function": names.get(config.activation, config.activation), "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings, "initializer_range": config.init_std,
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
    }  # fmt: skip


def _from_llama(keys: Keys) -> ModelConfig:
    bias = bool(keys["attention_bias"])
    require("llama", keys, hidden_act=("silu",), mlp_bias=(bias,))
    return model_config(**_common(keys), **_rope(keys), bias=bias)


def _to_llama(config: ModelConfig) -> dict[str, Any]:
    return {**_to_common(config), "hidden_act": "silu", "attention_bias": config.bias, "mlp_bias": config.bias}


def _from_mistral(keys: Keys) -> ModelConfig:
    require("mistral", keys, hidden_act=("silu",), layer_types=(None,))
    return model_config(**_common(keys), **_rope(keys), sliding_window=keys["sliding_window"])


def _to_mistral(config: ModelConfig) -> dict[str, Any]:
    return {**_to_common(config), "hidden_act": "silu", "sliding_window": config.sliding_window}


def _from_qwen(keys: Keys, **own: Any) -> ModelConfig:
    require(keys["model_type"], keys, hidden_act=("silu",), attention_bias=(False, None))
    first = keys["max_window_layers"]
    kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(keys["num_hidden_layers"])]
    windows = _windows(keys, keys.get("layer_types") or kinds) if keys["use_sliding_window"] else {}
    return model_config(**_common(keys), **_rope(keys), **windows, **own)


def _to_qwen(config: ModelConfig) -> dict[str, Any]:
    slides = [config.slides(layer) for layer in range(config.num_layers)]
    return {
        **_to_common(config), "hidden_act": "silu", "use_sliding_window": any(slides), "sliding_window": config.sliding_window,
        "max_window_layers": slides.index(True) if any(slides) else config.num_layers, **_to_windows(config),
    }  # fmt: skip


def _from_gemma(keys: Keys, **own: Any) -> ModelConfig:
    activation = "hidden_activation" if keys.get("hidden_activation") else "hidden_act"
    gelu = ("gelu_pytorch_tanh", "gelu") if activation == "hidden_act" else ("gelu_pytorch_tanh",)  # Gemma 1 calls it gelu
    off: Any = {"attention_bias": (False, None), "use_bidirectional_attention": (False, None)}
    require(keys["model_type"], keys, **{activation: gelu}, **off)
    return model_config(
        **{**_common(keys), **_rope(keys), **own}, norm="rmsnorm_1p", activation="geglu", scale_embeddings=True,
    )  # fmt: skip


def _to_gemma(config: ModelConfig) -> dict[str, Any]:
    return {**_to_common(config), "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _from_gemma2(keys: Keys, **own: Any) -> ModelConfig:
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(keys["num_hidden_layers"])]
    return _from_gemma(
        keys, sandwich_norm=True, query_pre_attn_scalar=float(keys["query_pre_attn_scalar"]),
        attention_softcap=keys["attn_logit_softcapping"], logit_softcap=keys["final_logit_softcapping"],
        **_windows(keys, keys.get("layer_types") or alternating), **own,
    )  # fmt: skip


def _to_gemma2(config: ModelConfig) -> dict[str, Any]:
    scalar = config.head_width if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
    return {
        **_to_gemma(config), "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.logit_softcap,
        "sliding_window": config.sliding_window or 4096, **_to_windows(config),
    }  # fmt: skip


def _from_gemma3(keys: Keys) -> ModelConfig:
    every = keys.get("sliding_window_pattern") or 6
    pattern = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(keys["num_hidden_layers"])]
    by_kind = keys.get("rope_parameters") or {}
    full = {**keys, "rope_parameters": by_kind.get("full_attention")}
    sliding = _rope({"rope_parameters": by_kind.get("sliding_attention") or {"rope_theta": keys["rope_local_base_freq"]}})
    if sliding["rope_scaling"] != "none":
        raise CheckpointError("gemma3: rotary scaling of sliding layers is not supported")
    full["layer_types"] = keys.get("layer_types") or pattern
    return _from_gemma2(full, qk_norm=True, sliding_rope_theta=sliding["rope_theta"])


def _to_gemma3(config: ModelConfig) -> dict[str, Any]:
    return {**_to_gemma2(config), "rope_local_base_freq": config.sliding_rope_theta or config.rope_theta}


_SIZES: Keys = {"initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
_LLAMA: Keys = {**_SIZES, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048}
_QWEN: Keys = {
    **_SIZES, "hidden_act": "silu", "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    "max_position_embeddings": 32768,
}  # fmt: skip
_GEMMA: Keys = {
    **_SIZES, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    "vocab_size": 256000, "query_pre_attn_scalar": 256, "sliding_window": 4096, "num_hidden_layers": 26, "hidden_size": 2304,
    "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip

GPT2 = Family(
    "gpt2", "GPT2LMHeadModel",
    {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    _from_gpt2, _to_gpt2, _gpt2_names, zero_biases=True,
)  # fmt: skip
FAMILIES: tuple[Family, ...] = (
    GPT2,
    Family("llama", "LlamaForCausalLM", _LLAMA, _from_llama, _to_llama, _renamed),
    Family(
        "mistral", "MistralForCausalLM",
        {**_LLAMA, "sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
        _from_mistral, _to_mistral, _renamed,
    ),
    Family("qwen2", "Qwen2ForCausalLM", _QWEN, lambda keys: _from_qwen(keys, qkv_bias=True), _to_qwen, _renamed),
    Family(
        "qwen3", "Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, lambda keys: _from_qwen(keys, qk_norm=True), _to_qwen, _renamed
    ),
    Family(
        "gemma", "GemmaForCausalLM",
        {
            **_GEMMA, "num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 24576, "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
        _from_gemma, _to_gemma, _renamed,
    ),
    Family(
        "gemma2", "Gemma2ForCausalLM", {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _from_gemma2, _to_gemma2, _gemma_names,
    ),
    Family(
        "gemma3_text", "Gemma3ForCausalLM",
        {
            **_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "vocab_size": 262208,
            "max_position_embeddings": 131072, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10000.0,
        },
        _from_gemma3, _to_gemma3, _gemma_names,
    ),
)  # fmt: skip
