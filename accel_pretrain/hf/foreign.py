"""Checkpoints of older programs: nanoGPT's ``ckpt.pt``, litgpt's ``lit_model.pth``, OpenAI's TensorFlow variables of GPT-2.

A format is known by what is in it, not by its file's name. What a :class:`~accel_pretrain.models.Transformer` cannot be is
refused with the key that asks for it, and so is a setting that is not known here: it may change what is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from accel_pretrain.errors import CheckpointError, PretrainError
from accel_pretrain.hf.described import Described
from accel_pretrain.hf.families import GPT2
from accel_pretrain.hf.family import Keys, Link, names_of, require
from accel_pretrain.hf.tensor_map import quoted, read_json
from accel_pretrain.hf.weight_files import WeightFiles
from accel_pretrain.models import ModelConfig
from accel_pretrain.typed_yaml import from_mapping

_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"
_QKV, _OLD_QKV = "attn.qkv", "attn.attn"
_MAX_HPARAMS_BYTES = 1 << 20


def describe_foreign(weights: WeightFiles) -> Described | None:
    """What the weights are, if they are of one of these formats, else None.

    Raises :class:`CheckpointError` for a model of these formats that is not one of ours, with what is different.
    """
    arguments = weights.extras.get("model_args")
    if isinstance(arguments, Mapping) and "n_embd" in arguments and _EMBEDDING in weights:
        return _nanogpt(weights, arguments)
    is_litgpt = "model_config" in weights.extras or any(f"transformer.h.0.{qkv}.weight" in weights for qkv in (_QKV, _OLD_QKV))
    if is_litgpt and _EMBEDDING in weights and _HEAD in weights:
        return _litgpt(weights)
    prefix = next((prefix for prefix in ("model/", "") if f"{prefix}h0/attn/c_attn/w" in weights), None)
    return None if prefix is None else _tensorflow(weights, prefix)


# ------------------------------------------------------------------------------------------------------------- nanoGPT

_NANOGPT_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


def _nanogpt(weights: WeightFiles, arguments: Keys) -> Described:
    """GPT-2's names, but nothing is transposed, and biases are an option."""
    _refuse_unknown("nanoGPT: model_args", arguments, _NANOGPT_KEYS)
    is_tied = _HEAD not in weights or _are_equal(weights, _HEAD, _EMBEDDING)
    activation = "gelu_tanh" if _is_early_nanogpt(weights, arguments) else "gelu"
    config = _model(
        "nanoGPT: model_args",
        vocab_size=arguments.get("vocab_size") or weights.shape(_EMBEDDING)[0], context_length=arguments.get("block_size"),
        d_model=arguments["n_embd"], num_layers=arguments.get("n_layer"), num_heads=arguments.get("n_head"), d_ff=None,
        norm="layernorm", norm_eps=1e-5, activation=activation, position="learned", bias=arguments.get("bias", True),
        tie_embeddings=is_tied, dropout=arguments.get("dropout", 0.0),
    )  # fmt: skip

    def ignored(name: str) -> bool:  # the tied matrix once more, and the masks of attention that is not fused
        return name.endswith(".attn.bias") or (is_tied and name == _HEAD)

    return Described("nanoGPT", config, [link._replace(transposed=False) for link in _gpt2_links(config)], ignored)


def _is_early_nanogpt(weights: WeightFiles, arguments: Keys) -> bool:
    """Whether the activation is the tanh approximation of GELU, which nanoGPT left for the exact one in June 2023.

    No file says so. But before February 2023 ``bias`` was no option, and until May the optimizer's decayed group was the four
    matrices of each block alone, without the embeddings. The five weeks from there to June cannot be told from later ones.
    """
    optimizer = weights.extras.get("optimizer")
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    first = groups[0] if isinstance(groups, list) and groups else None
    decayed = first.get("params") if isinstance(first, Mapping) else None
    layers = arguments.get("n_layer")
    without_embeddings = isinstance(decayed, list) and isinstance(layers, int) and len(decayed) <= 4 * layers
    return "bias" not in arguments or without_embeddings


# -------------------------------------------------------------------------------------------------------------- litgpt

_LITGPT = "litgpt: model_config.yaml"
# What litgpt takes for absent keys, those of its older versions included.
_LITGPT_DEFAULTS: Keys = {
    "name": "", "hf_config": {}, "block_size": 4096, "n_layer": 16, "n_embd": 4096, "vocab_size": 50254,
    "padding_multiple": 512, "padded_vocab_size": None, "norm_class_name": "LayerNorm", "norm_eps": 1e-5, "norm_qk": False,
    "norm_qk_type": "default", "post_attention_norm": False, "post_mlp_norm": False, "parallel_residual": True,
    "shared_attention_norm": False, "n_head": 32, "head_size": None, "n_query_groups": None, "attn_bias": False,
    "attention_scores_scalar": None, "sliding_window_size": None, "sliding_window_indices": None,
    "sliding_window_layer_placing": None, "sliding_window_layer_stride": None, "sliding_window_offset": 0,
    "attention_logit_softcapping": None, "rope_base": 10000, "rotary_percentage": 0.25, "rope_condense_ratio": 1,
    "rope_adjustments": None, "rope_interleave": False, "rope_local_base_freq": None, "rope_indices": None,
    "intermediate_size": None, "bias": True, "lm_head_bias": False, "mlp_class_name": "GptNeoxMLP",
    "gelu_approximate": "none", "scale_embeddings": False, "final_logit_softcapping": None, "norm_1": True, "norm_2": True,
    "latent_attention": None,
}  # fmt: skip
_OF_EXPERTS = (
    "moe_intermediate_size", "n_expert", "n_shared_expert", "n_expert_groups", "n_topk_groups", "n_topk_scores_per_group",
    "n_expert_per_token", "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob",
)  # fmt: skip
_ACTIVATIONS = {
    "LLaMAMLP": {"none": "swiglu", "tanh": "swiglu"},
    "GemmaMLP": {"tanh": "geglu"},
    "GptNeoxMLP": {"none": "gelu", "tanh": "gelu_tanh"},
}
_LLAMA3 = {
    "factor": "rope_factor", "low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor",
    "original_max_seq_len": "rope_original_context",
}  # fmt: skip


def _litgpt(weights: WeightFiles) -> Described:
    """litgpt unties what it converts: an output matrix that equals the embedding is taken for tied again."""
    document = weights.extras.get("model_config")
    if not isinstance(document, Mapping):
        raise CheckpointError(
            f"{weights.where(_EMBEDDING)}: these are litgpt's weights, but not its model_config.yaml; put it beside "
            "them, and call them lit_model.pth"
        )
    _refuse_unknown(_LITGPT, document, (*_LITGPT_DEFAULTS, *_OF_EXPERTS))
    keys = {**_LITGPT_DEFAULTS, **document}
    _refuse_unlike_ours(keys)
    is_tied = _are_equal(weights, _HEAD, _EMBEDDING)
    is_rms, d_ff = keys["norm_class_name"] == "RMSNorm", keys["intermediate_size"]
    config = _model(
        _LITGPT,
        vocab_size=_padded_vocab_size(keys), context_length=keys["block_size"], d_model=keys["n_embd"],
        num_layers=keys["n_layer"], num_heads=keys["n_head"], num_kv_heads=keys["n_query_groups"], head_dim=keys["head_size"],
        d_ff=4 * _integer(keys, "n_embd") if d_ff is None else d_ff,
        norm=("rmsnorm_1p" if _is_gemma(keys) else "rmsnorm") if is_rms else "layernorm", norm_eps=keys["norm_eps"],
        sandwich_norm=keys["post_mlp_norm"], activation=_ACTIVATIONS[keys["mlp_class_name"]][keys["gelu_approximate"]],
        bias=keys["bias"], qkv_bias=bool(keys["bias"] or keys["attn_bias"]), qk_norm=keys["norm_qk"],
        # litgpt takes 0 for none
        query_pre_attn_scalar=keys["attention_scores_scalar"] or None, attention_softcap=keys["attention_logit_softcapping"],
        logit_softcap=keys["final_logit_softcapping"], scale_embeddings=keys["scale_embeddings"], tie_embeddings=is_tied,
        **_rope(keys), **_windows(keys, _integer(keys, "n_layer")),
    )  # fmt: skip
    return Described("litgpt", config, _litgpt_links(weights, config), lambda name: is_tied and name == _HEAD)


def _refuse_unlike_ours(keys: Keys) -> None:
    """Raise one error with every key whose value we have nothing for."""
    mlp, off = keys["mlp_class_name"], (False, None)
    is_known = isinstance(mlp, str) and mlp in _ACTIVATIONS
    require(
        "litgpt", keys, norm_class_name=("RMSNorm", "LayerNorm"), mlp_class_name=tuple(_ACTIVATIONS),
        parallel_residual=(False,), shared_attention_norm=off, rotary_percentage=(1.0,), rope_interleave=off, lm_head_bias=off,
        norm_1=(True,), norm_2=(True,), latent_attention=off, sliding_window_layer_placing=(None, "all", "interleaved", 1, 2),
        gelu_approximate=tuple(_ACTIVATIONS[mlp]) if is_known else (keys["gelu_approximate"],),
    )  # fmt: skip
    problems = []
    if bool(keys["post_attention_norm"]) != bool(keys["post_mlp_norm"]):
        problems.append("post_attention_norm without post_mlp_norm, or the other way round, is not supported")
    if keys["norm_qk"] and (keys["norm_qk_type"] != "default" or keys["norm_class_name"] != "RMSNorm"):
        problems.append("norm_qk is only supported with norm_qk_type default and norm_class_name RMSNorm")
    if keys["norm_class_name"] == "LayerNorm" and not keys["bias"]:
        problems.append("norm_class_name LayerNorm, which has biases, is not supported with bias False")
    if keys["norm_class_name"] == "LayerNorm" and "OLMo" in str(keys["name"]):
        problems.append(f"name {quoted(keys['name'], 60)}: OLMo's norms, which have no weights, are not supported")
    if keys["mlp_class_name"] == "LLaMAMLP" and keys["intermediate_size"] is None:
        problems.append("intermediate_size is missing")
    if problems:
        raise CheckpointError([f"litgpt: {problem}" for problem in problems])


def _is_gemma(keys: Keys) -> bool:
    """Whether norms multiply by 1 + weight: litgpt looks at the model's name."""
    origin = keys["hf_config"]
    return "Gemma" in str(keys["name"] or (origin.get("name", "") if isinstance(origin, Mapping) else ""))


def _padded_vocab_size(keys: Keys) -> int:
    if keys["padded_vocab_size"] is not None:
        return _integer(keys, "padded_vocab_size")
    multiple = max(1, _integer(keys, "padding_multiple"))
    return -(-_integer(keys, "vocab_size") // multiple) * multiple


def _rope(keys: Keys) -> dict[str, Any]:
    adjustments, ratio = keys["rope_adjustments"] or {}, keys["rope_condense_ratio"]
    options: dict[str, Any] = {"rope_theta": keys["rope_base"]}
    if not isinstance(adjustments, Mapping) or (adjustments and set(adjustments) not in ({"factor"}, set(_LLAMA3))):
        known = f"only factor alone, or with {', '.join(list(_LLAMA3)[1:])}"
        raise CheckpointError(f"litgpt: rope_adjustments {quoted(adjustments, 120)} is not supported, {known}")
    if ratio != 1 and (adjustments or keys["rope_local_base_freq"] is not None):
        raise CheckpointError(
            "litgpt: rope_condense_ratio is not supported together with rope_adjustments or rope_local_base_freq"
        )
    if len(adjustments) > 1:
        return options | {"rope_scaling": "llama3"} | {ours: adjustments[theirs] for theirs, ours in _LLAMA3.items()}
    factor = adjustments.get("factor", ratio)
    return options | ({"rope_scaling": "linear", "rope_factor": factor} if factor != 1 else {})


def _windows(keys: Keys, layers: int) -> dict[str, Any]:
    """Which layers slide, and with which rotary base."""
    window, theta = keys["sliding_window_size"], keys["rope_local_base_freq"]
    slides = [False] * layers if window is None else _sliding_layers(keys, layers)
    if theta is None and keys["rope_indices"] is not None:
        raise CheckpointError("litgpt: rope_indices is not supported without rope_local_base_freq")
    local = [False] * layers if theta is None else _indicators(keys, "rope_indices", layers)
    if any(local) and local != slides:
        raise CheckpointError("litgpt: rope_indices is only supported where it equals sliding_window_indices")
    if not any(slides):
        return {}
    letters = "".join("S" if slide else "F" for slide in slides)
    period = next(n for n in range(1, layers + 1) if (letters[:n] * layers)[:layers] == letters)
    options = {"sliding_window": window, "window_pattern": letters[:period]}
    return options | ({"sliding_rope_theta": theta} if any(local) else {})


def _sliding_layers(keys: Keys, layers: int) -> list[bool]:
    """As ``sliding_window_indices`` says; before April 2025, the layers whose number, after an offset, a stride divides."""
    placing, stride = keys["sliding_window_layer_placing"], keys["sliding_window_layer_stride"]
    if keys["sliding_window_indices"] is not None or (placing is None and stride is None):
        return _indicators(keys, "sliding_window_indices", layers)
    placed = 2 if placing in ("interleaved", 2) else 1
    every = placed if stride is None else max(1, _integer(keys, "sliding_window_layer_stride"))
    return [(layer + _integer(keys, "sliding_window_offset")) % every == 0 for layer in range(layers)]


def _indicators(keys: Keys, name: str, layers: int) -> list[bool]:
    """Zeros and ones, one for each layer, of which there may be more; null: all ones."""
    values = [1] * layers if keys[name] is None else keys[name]
    if not isinstance(values, list) or len(values) < layers or any(value not in (0, 1) for value in values):
        raise CheckpointError(f"{_LITGPT}: {name} must be a list of 0 and 1, one for each of the {layers} layers")
    return [bool(value) for value in values[:layers]]


# litgpt's names in a block, and ours
_LITGPT_NAMES = {
    "norm_1": "input_layernorm", "attn.proj": "self_attn.o_proj", "attn.norm_q": "self_attn.q_norm",
    "attn.norm_k": "self_attn.k_norm", "post_attention_norm": "attn_out_norm", "norm_2": "post_attention_layernorm",
    "mlp.fc": "mlp.up_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    "post_mlp_norm": "mlp_out_norm",
}  # fmt: skip


def _litgpt_links(weights: WeightFiles, config: ModelConfig) -> list[Link]:
    """Queries, keys and values are one matrix: all of each, or, before 2025, those of one group after the other."""
    is_old = f"transformer.h.0.{_OLD_QKV}.weight" in weights
    qkv, groups = (_OLD_QKV, config.kv_heads) if is_old else (_QKV, 1)
    unused = "mlp.fc" if config.is_gated else "mlp.fc_2"
    links = [Link(_EMBEDDING, ("embed_tokens.weight",)), Link(_HEAD, ("lm_head.weight",))]
    for kind in ("weight", "bias"):
        links.append(Link(f"transformer.ln_f.{kind}", (f"norm.{kind}",)))
        for i in range(config.num_layers):
            theirs, ours = f"transformer.h.{i}", f"layers.{i}"
            of_attention = tuple(f"{ours}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            links.append(Link(f"{theirs}.{qkv}.{kind}", of_attention, groups=groups))
            names = ((one, other) for one, other in _LITGPT_NAMES.items() if one != unused)
            links += [Link(f"{theirs}.{one}.{kind}", (f"{ours}.{other}.{kind}",)) for one, other in names]
    return _present(links, config)


# ---------------------------------------------------------------------------------------------------- OpenAI's TensorFlow

_HPARAMS = {
    "n_vocab": "vocab_size", "n_ctx": "context_length", "n_embd": "d_model", "n_layer": "num_layers", "n_head": "num_heads",
}  # fmt: skip
_OF_OPTIMIZER = re.compile(r"(.*/)?(Adam(_\d+)?|beta\d_power|global_step)")
_HEAD_WIDTH = 64


def _tensorflow(weights: WeightFiles, prefix: str) -> Described:
    """GPT-2 by the names of the original program, with sizes from ``hparams.json`` or, where that is missing, from shapes."""
    (vocab_size, width), (positions, _) = (_matrix(weights, prefix + name) for name in ("wte", "wpe"))
    layers = sum(bool(re.fullmatch(rf"{prefix}h\d+/attn/c_attn/w", name)) for name in weights)
    sizes = {"n_vocab": vocab_size, "n_ctx": positions, "n_embd": width, "n_layer": layers, "n_head": width // _HEAD_WIDTH}
    beside = Path(weights.where(f"{prefix}wte")).with_name("hparams.json")
    hparams = weights.extras.get("hparams")
    if not isinstance(hparams, Mapping):
        hparams = read_json(beside, _MAX_HPARAMS_BYTES) if beside.is_file() else {}
    _refuse_unknown("hparams.json", {key: value for key, value in hparams.items() if "drop" not in str(key)}, tuple(_HPARAMS))
    about = ""
    if "n_head" not in hparams:
        if width % _HEAD_WIDTH:
            raise CheckpointError(f'the number of heads is not known: write {{"n_head": ...}} into {beside}')
        about = f" (no n_head in hparams.json: its heads are taken to be {_HEAD_WIDTH} wide, as all of OpenAI's are)"
    sizes |= {key: hparams[key] for key in _HPARAMS if key in hparams}
    config = _model(
        "hparams.json", **{ours: sizes[theirs] for theirs, ours in _HPARAMS.items()}, d_ff=None, norm="layernorm",
        norm_eps=1e-5, activation="gelu_tanh", position="learned", bias=True, tie_embeddings=True,
    )  # fmt: skip
    links = [link._replace(theirs=prefix + _tensorflow_name(link.theirs)) for link in _gpt2_links(config)]
    return Described(f"TensorFlow GPT-2{about}", config, links, lambda name: bool(_OF_OPTIMIZER.fullmatch(name)))


def _matrix(weights: WeightFiles, name: str) -> tuple[int, int]:
    shape = weights.shape(name)
    if len(shape) != 2:
        raise CheckpointError(f"{name} has the shape {shape}, but must be a matrix")
    return shape[0], shape[1]


def _tensorflow_name(name: str) -> str:
    """``transformer.h.0.ln_1.weight`` is ``h0/ln_1/g`` there: g is for gain, w for the weight of anything else."""
    *path, kind = name.removeprefix("transformer.").replace("h.", "h", 1).split(".")
    if path[0] in ("wte", "wpe"):
        return path[0]
    return "/".join((*path, "b" if kind == "bias" else "g" if path[-1].startswith("ln_") else "w"))


# ------------------------------------------------------------------------------------------------------- shared by several


def _gpt2_links(config: ModelConfig) -> list[Link]:
    return _present(GPT2.links(config, []), config)


def _present(links: list[Link], config: ModelConfig) -> list[Link]:
    """Those of parameters that a model has: its biases and norms are options."""
    names = names_of(config)
    return [link for link in links if link.ours[0] in names]


def _are_equal(weights: WeightFiles, one: str, other: str) -> bool:
    alike = weights.shape(one) == weights.shape(other) and weights.dtype(one) == weights.dtype(other)
    return alike and torch.equal(weights.read(one), weights.read(other))


def _refuse_unknown(origin: str, keys: Keys, known: tuple[str, ...]) -> None:
    """Raise one error with every key that is not known and is set to anything."""
    if odd := [f"{origin}: {quoted(key, 60)} is not known here" for key, value in keys.items() if key not in known and value]:
        raise CheckpointError(odd)


def _integer(keys: Keys, name: str) -> int:
    """A value to calculate with, before the rest is checked."""
    value = keys[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"{_LITGPT}: {name} must be a whole number, not {quoted(value, 60)}")
    return value


def _model(origin: str, **options: Any) -> ModelConfig:
    """A :class:`ModelConfig` from values of a file, checked for their types and for fitting together."""
    try:
        return from_mapping(ModelConfig, options, origin)
    except PretrainError as error:
        raise CheckpointError([f"{origin}: {problem.removeprefix(f'{origin}: ')}" for problem in error.problems]) from None
