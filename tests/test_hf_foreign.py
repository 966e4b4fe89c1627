"""Checkpoints of nanoGPT and of OpenAI's TensorFlow program, in the layouts that these write, against transformers.

Each model is one of transformers with random weights, renamed here to what the other program calls them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel_pretrain.hf.foreign import describe_foreign
from accel_pretrain.hf.weight_files import open_weights
from accel_pretrain.models import ModelConfig
from tests.foreign import LLAMA, State, T, V, assert_same_logits, imported, refusal, theirs

GPT2 = ModelConfig(
    vocab_size=V, context_length=T, d_model=48, num_layers=3, num_heads=4, d_ff=None, norm="layernorm", activation="gelu_tanh",
    position="learned", bias=True, tie_embeddings=True,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- nanoGPT

ARGUMENTS = {"n_layer": 3, "n_head": 4, "n_embd": 48, "block_size": T, "bias": True, "vocab_size": V, "dropout": 0.1}


def nanogpt_state(model: Any, *, bias: bool = True) -> State:
    """The names are those of transformers, but linear layers are (out, in); fused attention or not, with or without biases."""
    turned = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")
    state = {name: tensor.T.clone() if turned.fullmatch(name) else tensor for name, tensor in model.state_dict().items()}
    if not bias:
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".bias")}
    return state | {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, T, T).tril() for i in range(3)}


def write_nanogpt(folder: Path, state: Mapping[str, torch.Tensor], arguments: Mapping[str, Any], decayed: int = 14) -> Path:
    optimizer = {"state": {0: {"step": torch.tensor(9.0)}}, "param_groups": [{"lr": 1e-3, "params": list(range(decayed))}]}
    extras = {"optimizer": optimizer, "model_args": dict(arguments), "iter_num": 9, "best_val_loss": torch.tensor(3.0)}
    folder.mkdir(exist_ok=True)
    torch.save({"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}, **extras}, folder / "ckpt.pt")
    return folder


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
def test_nanogpt(tmp_path: Path, bias: bool):
    model = theirs("gpt2", replace(GPT2, activation="gelu"))
    if not bias:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter *= not name.endswith("bias")
    folder = write_nanogpt(tmp_path, nanogpt_state(model, bias=bias), ARGUMENTS | {"bias": bias})
    described, own = imported(folder)
    assert described.config == replace(GPT2, activation="gelu", bias=bias, dropout=0.1)
    assert_same_logits(own, model)


@pytest.mark.parametrize(("without", "decayed"), [({"bias"}, 12), ({"bias", "vocab_size"}, 12), (set(), 12)])
def test_early_nanogpt_approximated_gelu(tmp_path: Path, without: set[str], decayed: int):
    model = theirs("gpt2", GPT2)
    arguments = {key: value for key, value in ARGUMENTS.items() if key not in without}
    described, own = imported(write_nanogpt(tmp_path, nanogpt_state(model), arguments, decayed))
    assert described.config.activation == "gelu_tanh"
    _, other = imported(write_nanogpt(tmp_path, nanogpt_state(model), ARGUMENTS))
    tokens_BT = torch.arange(T).unsqueeze(0)
    assert (other(tokens_BT) - own(tokens_BT)).abs().max() > 1e-4  # control: the exact one is another model
    assert_same_logits(own, model)


def test_nanogpt_before_it_tied_its_embeddings(tmp_path: Path):
    model = theirs("gpt2", replace(GPT2, tie_embeddings=False, activation="gelu"))
    described, own = imported(write_nanogpt(tmp_path, nanogpt_state(model), ARGUMENTS))
    assert not described.config.tie_embeddings
    assert_same_logits(own, model)


def test_nanogpt_with_arguments_of_somebody_else_is_refused(tmp_path: Path):
    state = nanogpt_state(theirs("gpt2", GPT2))
    assert "n_kv_head is not known" in refusal(write_nanogpt(tmp_path, state, ARGUMENTS | {"n_kv_head": 2}))
    imported(write_nanogpt(tmp_path, state, ARGUMENTS | {"n_kv_head": None}))
    for arguments in ({"n_head": 5}, {"n_layer": "three"}, {"block_size": None}):
        message = refusal(write_nanogpt(tmp_path, state, ARGUMENTS | arguments))
        assert message.count("nanoGPT: model_args: ") == 1


# ---------------------------------------------------------------------------------------------------------- TensorFlow


def tensorflow_variables(model: Any, prefix: str) -> dict[str, np.ndarray]:
    """OpenAI's names; its linear layers are convolutions of width 1, whose weights have a dimension for that."""
    variables = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        *path, kind = name.removeprefix("transformer.").split(".")
        if path[0] == "h":
            path = [f"h{path[1]}", *path[2:]]
        if path[0] not in ("wte", "wpe"):
            is_norm = path[-1].startswith("ln_")
            path.append("b" if kind == "bias" else "g" if is_norm else "w")
            tensor = tensor if is_norm or kind == "bias" else tensor.unsqueeze(0)
        variables[prefix + "/".join(path)] = tensor.numpy()
    return variables


@pytest.mark.parametrize("prefix", ["model/", ""], ids=["model", "bare"])
@pytest.mark.parametrize("squeezed", [False, True], ids=["as stored", "squeezed"])
def test_tensorflow_gpt2(tmp_path: Path, prefix: str, squeezed: bool):
    model = theirs("gpt2", GPT2)
    variables = tensorflow_variables(model, prefix)
    if squeezed:
        variables = {name: array.squeeze() for name, array in variables.items()}
    extra = {f"{prefix}wte/Adam_1": np.zeros((2, 2), np.float32), "beta1_power": np.float32(0.5)}
    np.savez(tmp_path / "gpt2.npz", **variables, **extra)  # type: ignore[arg-type]
    hparams = {"n_vocab": V, "n_ctx": T, "n_embd": 48, "n_head": 4, "n_layer": 3}
    (tmp_path / "hparams.json").write_text(json.dumps(hparams))
    described, own = imported(tmp_path / "gpt2.npz")
    assert described.config == GPT2
    assert_same_logits(own, model)


def test_tensorflow_gpt2_without_hparams(tmp_path: Path):
    """All sizes but the heads follow from shapes, and OpenAI's heads are 64 wide; a width of 48 has no such heads."""
    model = theirs("gpt2", replace(GPT2, d_model=128, num_heads=2))
    np.savez(tmp_path / "gpt2.npz", **tensorflow_variables(model, "model/"))  # type: ignore[arg-type]
    described, own = imported(tmp_path / "gpt2.npz")
    assert "64 wide" in described.format
    assert_same_logits(own, model)
    np.savez(tmp_path / "gpt2.npz", **tensorflow_variables(theirs("gpt2", GPT2), "model/"))  # type: ignore[arg-type]
    assert '{"n_head": ...}' in refusal(tmp_path / "gpt2.npz")
    (tmp_path / "hparams.json").write_text('{"n_head": 4, "n_embd": 48}')
    assert imported(tmp_path / "gpt2.npz")[0].config == GPT2
    (tmp_path / "hparams.json").write_text('{"n_head": 4, "n_experts": 2}')
    assert "n_experts is not known" in refusal(tmp_path / "gpt2.npz")


# ------------------------------------------------------------------------------------------------------- none of the three


def test_other_formats_are_left_to_others(tmp_path: Path):
    for number, model in enumerate((theirs("gpt2", GPT2), theirs("llama", LLAMA))):
        torch.save(model.state_dict(), tmp_path / f"{number}.bin")
        with open_weights(tmp_path / f"{number}.bin") as weights:
            assert describe_foreign(weights) is None
