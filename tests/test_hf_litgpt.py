"""Checkpoints of litgpt, in the layouts that it writes and wrote, against transformers.

Each model is one of transformers with random weights, renamed here to what litgpt calls them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from accel_pretrain.errors import CheckpointError
from accel_pretrain.models import ModelConfig
from tests.foreign import LLAMA, State, T, V, assert_same_logits, imported, randomised, refusal, theirs, transformers

GEMMA = replace(LLAMA, norm="rmsnorm_1p", norm_eps=1e-6, activation="geglu", scale_embeddings=True, head_dim=16)
GEMMA2 = replace(
    GEMMA, sandwich_norm=True, attention_softcap=5.0, logit_softcap=3.0, query_pre_attn_scalar=24.0, sliding_window=6,
    window_pattern="SF",
)  # fmt: skip
# As litgpt 0.5.12 saves them.
LIT_LLAMA = {
    "name": "mine", "hf_config": {}, "block_size": T, "n_layer": 3, "n_embd": 48, "vocab_size": 200, "padding_multiple": 512,
    "padded_vocab_size": V, "norm_class_name": "RMSNorm", "norm_eps": 1e-5, "norm_qk": False, "norm_qk_type": "default",
    "post_attention_norm": False, "post_mlp_norm": False, "parallel_residual": False, "shared_attention_norm": False,
    "n_head": 4, "head_size": 12, "n_query_groups": 2, "attn_bias": False, "attention_scores_scalar": None,
    "sliding_window_size": None, "sliding_window_indices": None, "attention_logit_softcapping": None, "rope_base": 10000,
    "rotary_percentage": 1.0, "rope_condense_ratio": 1, "rope_adjustments": None, "rope_interleave": False,
    "intermediate_size": 96, "moe_intermediate_size": None, "bias": False, "mlp_class_name": "LLaMAMLP",
    "gelu_approximate": "none", "n_expert": 0, "n_expert_per_token": 0, "routed_scaling_factor": 1.0, "scale_embeddings": False,
    "lm_head_bias": False, "final_logit_softcapping": None, "norm_1": True, "norm_2": True, "latent_attention": None,
    "rope_local_base_freq": None, "rope_indices": None,
}  # fmt: skip
LIT_GEMMA = LIT_LLAMA | {
    "name": "Gemma-9", "norm_eps": 1e-6, "mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh", "scale_embeddings": True,
    "head_size": 16,
}  # fmt: skip
LIT_GEMMA2 = LIT_GEMMA | {
    "post_attention_norm": True, "post_mlp_norm": True, "attention_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
    "attention_scores_scalar": 24, "sliding_window_size": 6, "sliding_window_indices": [1, 0, 1],
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 16}
LOCAL = {"sliding_window_size": 8, "sliding_window_indices": [1, 1, 0, 1], "rope_indices": [1, 1, 0]}
LITGPT: dict[str, tuple[str, ModelConfig, dict[str, Any]]] = {
    "llama": ("llama", LLAMA, LIT_LLAMA),
    "llama, one group": ("llama", replace(LLAMA, num_kv_heads=1), LIT_LLAMA | {"n_query_groups": 1}),
    "llama, nulls": ("llama", replace(LLAMA, num_kv_heads=4), LIT_LLAMA | {"n_query_groups": None, "head_size": None}),
    "llama with biases": ("llama", replace(LLAMA, bias=True), LIT_LLAMA | {"bias": True}),
    "llama 3.1": (
        "llama",
        replace(LLAMA, rope_scaling="llama3", rope_theta=50.0, rope_original_context=16),
        LIT_LLAMA | {"rope_base": 50, "rope_adjustments": LLAMA3},
    ),
    "llama, linear": (
        "llama", replace(LLAMA, rope_scaling="linear", rope_factor=4.0), LIT_LLAMA | {"rope_adjustments": {"factor": 4.0}},
    ),
    "llama, condensed": (
        "llama", replace(LLAMA, rope_scaling="linear", rope_factor=4.0), LIT_LLAMA | {"rope_condense_ratio": 4},
    ),
    "mistral": (
        "mistral", replace(LLAMA, sliding_window=7, head_dim=16), LIT_LLAMA | {"sliding_window_size": 7, "head_size": 16},
    ),
    "qwen2": ("qwen2", replace(LLAMA, qkv_bias=True), LIT_LLAMA | {"attn_bias": True}),
    "qwen3": (
        "qwen3", replace(LLAMA, qk_norm=True, head_dim=16, rope_theta=1e6),
        LIT_LLAMA | {"norm_qk": True, "head_size": 16, "rope_base": 1000000},
    ),
    "gemma": ("gemma", GEMMA, LIT_GEMMA),
    "gemma by its origin": ("gemma", GEMMA, LIT_GEMMA | {"name": "", "hf_config": {"name": "Gemma-9b"}}),
    "gemma2": ("gemma2", GEMMA2, LIT_GEMMA2),
    "gemma2 of 2024": ("gemma2", GEMMA2, LIT_GEMMA2 | {"sliding_window_indices": None, "sliding_window_layer_placing": 2}),
    "gemma2, every layer": (
        "gemma2", replace(GEMMA2, window_pattern="S"),
        LIT_GEMMA2 | {"sliding_window_indices": None, "sliding_window_layer_placing": "all"},
    ),
    "gemma2 with strides": (
        "gemma2", replace(GEMMA2, window_pattern="FFS"),
        LIT_GEMMA2 | {"sliding_window_indices": None, "sliding_window_layer_stride": 3, "sliding_window_offset": 1},
    ),
    "gemma3": (
        "gemma3_text",
        replace(
            GEMMA, sandwich_norm=True, qk_norm=True, sliding_window=8, window_pattern="SSF", rope_theta=1e6,
            sliding_rope_theta=1e4, rope_scaling="linear", rope_factor=8.0, query_pre_attn_scalar=24.0,
        ),
        LIT_GEMMA2 | LOCAL | {
            "attention_logit_softcapping": None, "final_logit_softcapping": None, "norm_qk": True, "rope_base": 1000000,
            "rope_local_base_freq": 10000, "rope_adjustments": {"factor": 8.0},
        },
    ),
}  # fmt: skip
_NAMES = {
    "self_attn.o_proj": "attn.proj", "self_attn.q_norm": "attn.norm_q", "self_attn.k_norm": "attn.norm_k",
    "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj", "input_layernorm": "norm_1",
}  # fmt: skip
_NORMS = {"post_attention_layernorm": "norm_2"}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "norm_2",
    "post_feedforward_layernorm": "post_mlp_norm",
}  # fmt: skip


def litgpt_state(model: Any, *, interleaved: bool = False) -> State:
    """One matrix for queries, keys and values: all of each, or group by group, as it was before 2025."""
    state, config = dict(model.state_dict()), model.config
    names = _NAMES | (_SANDWICH if any("pre_feedforward" in name for name in state) else _NORMS)
    found = {
        "transformer.wte.weight": state["model.embed_tokens.weight"], "transformer.ln_f.weight": state["model.norm.weight"],
        "lm_head.weight": state["lm_head.weight"],
    }  # fmt: skip
    for i in range(config.num_hidden_layers):
        before, after = f"model.layers.{i}.", f"transformer.h.{i}."
        for kind in ("weight", "bias"):
            for name, other in names.items():
                if f"{before}{name}.{kind}" in state:
                    found[f"{after}{other}.{kind}"] = state[f"{before}{name}.{kind}"]
            if f"{before}self_attn.q_proj.{kind}" in state:
                qkv = [state[f"{before}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                if interleaved:
                    by_group = zip(*(part.chunk(config.num_key_value_heads) for part in qkv), strict=True)
                    qkv = [piece for group in by_group for piece in group]
                found[f"{after}attn.{'attn' if interleaved else 'qkv'}.{kind}"] = torch.cat(qkv)
    return found


def write_litgpt(folder: Path, state: Mapping[str, torch.Tensor], keys: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(dict(state), folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(dict(keys)))
    return folder


@pytest.mark.parametrize("interleaved", [False, True], ids=["today", "2024"])
@pytest.mark.parametrize("shape", LITGPT)
def test_litgpt(tmp_path: Path, shape: str, interleaved: bool):
    model_type, config, keys = LITGPT[shape]
    model = theirs(model_type, config)
    described, own = imported(write_litgpt(tmp_path, litgpt_state(model, interleaved=interleaved), keys))
    assert described.config.window_pattern == config.window_pattern
    assert not described.config.tie_embeddings
    assert_same_logits(own, model)


def test_litgpt_in_the_layout_of_neox(tmp_path: Path):
    """LayerNorm and exact GELU; transformers keeps queries, keys and values by head, as litgpt did in 2024."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 100}
    options = {"vocab_size": V, "max_position_embeddings": T, "use_parallel_residual": False, "hidden_act": "gelu"}
    model = randomised(transformers.GPTNeoXConfig(**sizes, **options, rope_parameters=rope))
    names = {
        "gpt_neox.embed_in": "transformer.wte", "gpt_neox.layers": "transformer.h",
        "gpt_neox.final_layer_norm": "transformer.ln_f", "embed_out": "lm_head",
        "attention.query_key_value": "attn.attn", "attention.dense": "attn.proj", "mlp.dense_h_to_4h": "mlp.fc",
        "mlp.dense_4h_to_h": "mlp.proj", "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2",
    }  # fmt: skip
    state = {
        re.sub("|".join(map(re.escape, names)), lambda match: names[match[0]], name): tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith(("attention.bias", "inv_freq"))
    }
    keys = {"n_layer": 3, "n_embd": 48, "n_head": 4, "block_size": T, "padded_vocab_size": V, "intermediate_size": 100}
    folder = write_litgpt(tmp_path, state, keys | {"parallel_residual": False, "rotary_percentage": 1.0})
    assert_same_logits(imported(folder)[1], model)


def test_litgpt_unties_what_it_converts(tmp_path: Path):
    model = theirs("gemma", replace(GEMMA, tie_embeddings=True))
    described, own = imported(write_litgpt(tmp_path, litgpt_state(model), LIT_GEMMA))
    assert described.config.tie_embeddings
    assert_same_logits(own, model)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"rotary_percentage": 0.25}, "rotary_percentage 0.25"),
        ({"parallel_residual": True}, "parallel_residual True"),
        ({"mlp_class_name": "LLaMAMoE", "n_expert": 8}, "mlp_class_name 'LLaMAMoE'"),
        ({"mlp_class_name": ["LLaMAMLP"]}, "mlp_class_name"),
        ({"mlp_class_name": "GemmaMLP"}, "gelu_approximate 'none'"),
        ({"norm_class_name": "LayerNorm"}, "norm_class_name LayerNorm, which has biases, is not supported with bias False"),
        ({"norm_class_name": "LayerNorm", "bias": True, "name": "OLMo-1B"}, "OLMo"),
        ({"norm_class_name": "LayerNorm", "bias": True, "norm_qk": True}, "norm_qk"),
        ({"norm_qk": True, "norm_qk_type": "olmo2"}, "norm_qk"),
        ({"norm_1": False}, "norm_1 False"),
        ({"post_mlp_norm": True}, "post_attention_norm without post_mlp_norm"),
        ({"lm_head_bias": True}, "lm_head_bias True"),
        ({"latent_attention": {"q_lora_rank": 4}}, "latent_attention"),
        ({"rope_interleave": True}, "rope_interleave True"),
        ({"rope_adjustments": {"factor": 2.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 8}}, "rope_adjustments"),
        ({"rope_adjustments": {"factor": 2.0, "mscale_all_dim": 1.0}}, "rope_adjustments"),
        ({"rope_adjustments": {"factor": 2.0}, "rope_condense_ratio": 2}, "rope_condense_ratio"),
        ({"rope_local_base_freq": 100}, "rope_indices"),
        ({**LOCAL, "rope_local_base_freq": 100, "rope_indices": [1, 0, 0]}, "rope_indices"),
        ({**LOCAL}, "rope_indices is not supported without"),
        ({"sliding_window_size": 4, "sliding_window_indices": [1, 0]}, "sliding_window_indices"),
        ({"sliding_window_size": 4, "sliding_window_type": "gemma3"}, "sliding_window_type is not known"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"n_layer": "3"}, "n_layer"),
        ({"n_head": 5, "head_size": None}, "num_heads"),
    ],
)
def test_litgpt_models_that_we_cannot_be_are_refused(tmp_path: Path, setting: dict[str, Any], named: str):
    message = refusal(write_litgpt(tmp_path, litgpt_state(theirs("llama", LLAMA)), LIT_LLAMA | setting))
    assert named in message
    assert all("litgpt: " in line for line in message.splitlines() if "problems:" not in line)


def test_litgpt_without_its_config_is_refused(tmp_path: Path):
    folder = write_litgpt(tmp_path, litgpt_state(theirs("llama", LLAMA)), LIT_LLAMA)
    (folder / "model_config.yaml").unlink()
    assert "not its model_config.yaml" in refusal(folder)


def test_sizes_that_are_not_those_of_the_tensors_are_refused(tmp_path: Path):
    folder = write_litgpt(tmp_path, litgpt_state(theirs("llama", LLAMA)), LIT_LLAMA | {"n_query_groups": 4})
    with pytest.raises(CheckpointError, match=r"attn\.qkv\.weight has the shape \(96, 48\), but the config says \(144, 48\)"):
        imported(folder)
