"""The optimizers as built against the published update rules, who decays, and the learning rate's way into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from accel_pretrain.errors import ConfigError
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.optim import SGD, AdamW, Optimizer, decay_groups, set_lr
from tests import reference

GPT2 = ModelConfig(
    context_length=8, d_model=16, num_layers=1, num_heads=2, d_ff=None, norm="layernorm", activation="gelu_tanh",
    position="learned", bias=True, tie_embeddings=True,
)  # fmt: skip
LLAMA = ModelConfig(context_length=8, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, d_ff=32, qk_norm=True)
DECAYED = {
    "gpt2": {
        "embed_tokens.weight", "embed_positions.weight", "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight",
        "layers.0.self_attn.v_proj.weight", "layers.0.self_attn.o_proj.weight", "layers.0.mlp.up_proj.weight",
        "layers.0.mlp.down_proj.weight",
    },
    "llama": {
        "embed_tokens.weight", "lm_head.weight", "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight",
        "layers.0.self_attn.v_proj.weight", "layers.0.self_attn.o_proj.weight", "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight",
    },
}  # fmt: skip
NOT_DECAYED = {
    "gpt2": {
        "layers.0.input_layernorm.weight", "layers.0.input_layernorm.bias", "layers.0.self_attn.q_proj.bias",
        "layers.0.self_attn.k_proj.bias", "layers.0.self_attn.v_proj.bias", "layers.0.self_attn.o_proj.bias",
        "layers.0.post_attention_layernorm.weight", "layers.0.post_attention_layernorm.bias", "layers.0.mlp.up_proj.bias",
        "layers.0.mlp.down_proj.bias", "norm.weight", "norm.bias",
    },
    "llama": {
        "layers.0.input_layernorm.weight", "layers.0.post_attention_layernorm.weight", "layers.0.self_attn.q_norm.weight",
        "layers.0.self_attn.k_norm.weight", "norm.weight",
    },
}  # fmt: skip
STEPS = 20


class Two(nn.Module):
    """A matrix, which decays, and a vector, which does not."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.linspace(-2, 2, 12).reshape(3, 4))
        self.vector = nn.Parameter(torch.linspace(1, 2, 5))


def gradients(seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Gradients of very different sizes, among them exact zeros, for every step."""
    random = np.random.default_rng(seed)
    return [
        {"matrix": random.normal(size=(3, 4)) * 10.0 ** random.integers(-6, 3), "vector": random.normal(size=5) * (step % 3)}
        for step in range(STEPS)
    ]


def rate(step: int) -> float:
    return 0.01 * (1 + step % 5)


def train_ours(optimizer: Optimizer) -> dict[str, np.ndarray]:
    model = Two()
    built = optimizer.build(model)
    for step, grads in enumerate(gradients()):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(grads[name]).float()
        set_lr(built, rate(step))
        built.step()
    return {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}


def train_reference(make: Callable[[float], Any], weight_decay: float) -> dict[str, np.ndarray]:
    weights = {name: parameter.detach().double().numpy() for name, parameter in Two().named_parameters()}
    rules = {"matrix": make(weight_decay), "vector": make(0.0)}
    for step, grads in enumerate(gradients()):
        weights = {name: rules[name].step(weights[name], grads[name], rate(step)) for name in weights}
    return weights


def differ(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


ADAMW: dict[str, float] = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.3}


def adamw(**changed: float) -> dict[str, np.ndarray]:
    given = ADAMW | changed
    return train_reference(
        lambda decay: reference.AdamW(beta1=given["beta1"], beta2=given["beta2"], eps=given["eps"], weight_decay=decay),
        given["weight_decay"],
    )


def test_adamw_equals_the_reference():
    assert differ(train_ours(AdamW(**ADAMW)), adamw()) < 2e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"beta1": 0.9}, {"beta2": 0.999}, {"eps": 1e-3}, {"weight_decay": 0.0}], ids=str)
def test_adamw_control_any_other_hyperparameter_differs(wrong: dict[str, float]):
    assert differ(train_ours(AdamW(**ADAMW)), adamw(**wrong)) > 1e-4  # type: ignore[arg-type]


def test_adamw_decay_is_decoupled():
    """Decay inside the gradient, as in Adam, ends elsewhere: the moments would rescale it."""
    model = Two()
    coupled = torch.optim.Adam(decay_groups(model, 0.3), betas=(0.8, 0.95), eps=1e-6)
    for step, grads in enumerate(gradients()):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(grads[name]).float()
        set_lr(coupled, rate(step))
        coupled.step()
    ended = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    assert differ(ended, adamw()) > 1e-2


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_sgd_equals_the_reference(nesterov: bool, weight_decay: float):
    def expected(momentum: float, nesterov: bool) -> dict[str, np.ndarray]:
        return train_reference(
            lambda decay: reference.SGD(momentum=momentum, nesterov=nesterov, weight_decay=decay), weight_decay
        )

    ours = train_ours(SGD(momentum=0.7, nesterov=nesterov, weight_decay=weight_decay))
    scale = max(float(np.abs(weight).max()) for weight in ours.values())
    assert differ(ours, expected(0.7, nesterov)) / scale < 2e-6
    assert differ(ours, expected(0.7, not nesterov)) / scale > 1e-3  # controls
    assert differ(ours, expected(0.6, nesterov)) / scale > 1e-3


def test_sgd_without_momentum_is_plain_descent():
    ours = train_ours(SGD(momentum=0.0))
    expected = {name: parameter.detach().double().numpy() for name, parameter in Two().named_parameters()}
    for step, grads in enumerate(gradients()):
        expected = {name: expected[name] - rate(step) * grads[name] for name in expected}
    assert differ(ours, expected) < 1e-4


@pytest.mark.parametrize("largest", [0.5, 1.0, 1e6])
def test_clipping_is_by_the_norm_of_all_parameters_together(largest: float):
    for grads in gradients():
        parameters = list(Two().parameters())
        for parameter, name in zip(parameters, ("matrix", "vector"), strict=True):
            parameter.grad = torch.from_numpy(grads[name]).float()
        norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
        expected_norm, expected = reference.clip_by_global_norm([grads["matrix"], grads["vector"]], largest)
        assert norm.item() == pytest.approx(expected_norm, rel=1e-6)
        for parameter, gradient in zip(parameters, expected, strict=True):
            assert parameter.grad is not None
            np.testing.assert_allclose(parameter.grad.numpy(), gradient, rtol=1e-5, atol=2e-6)


def test_clipping_control_each_parameter_alone_differs():
    grads = [np.full(4, 3.0), np.full(4, 4.0)]
    together = reference.clip_by_global_norm(grads, 1.0)[1]
    alone = [reference.clip_by_global_norm([gradient], 1.0)[1][0] for gradient in grads]
    assert not np.allclose(together[0], alone[0])


# ---------------------------------------------------------------------------------------------------------- decay groups


@pytest.mark.parametrize(("name", "config"), [("gpt2", GPT2), ("llama", LLAMA)])
@pytest.mark.parametrize("optimizer", [AdamW(weight_decay=0.25), SGD(weight_decay=0.25)], ids=lambda o: o.name)
def test_matrices_and_embeddings_decay_and_nothing_else(name: str, config: ModelConfig, optimizer: Optimizer):
    model = Transformer(config, 32)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: [names[id(p)] for p in group["params"]] for group in optimizer.build(model).param_groups}
    assert {decay: set(found) for decay, found in groups.items()} == {0.25: DECAYED[name], 0.0: NOT_DECAYED[name]}
    assert sum(map(len, groups.values())) == len(names)  # nobody is in two groups, or in one twice


def test_frozen_parameters_are_left_out_and_empty_groups_with_them():
    model = Two()
    model.vector.requires_grad_(False)
    assert [len(group["params"]) for group in AdamW().build(model).param_groups] == [1]


# --------------------------------------------------------------------------------------------------------- learning rate


def test_hyperparameters_reach_torch():
    built = AdamW(lr=3e-4, beta1=0.8, beta2=0.99, eps=1e-7, weight_decay=0.2).build(Two())
    assert isinstance(built, torch.optim.AdamW)
    wanted = {"lr": 3e-4, "betas": (0.8, 0.99), "eps": 1e-7, "fused": True, "amsgrad": False}
    for group, decay in zip(built.param_groups, (0.2, 0.0), strict=True):
        assert {key: group[key] for key in wanted} == wanted
        assert group["weight_decay"] == decay
    built = SGD(lr=0.3, momentum=0.5, nesterov=True, weight_decay=0.1).build(Two())
    assert isinstance(built, torch.optim.SGD)
    wanted = {"lr": 0.3, "momentum": 0.5, "nesterov": True, "dampening": 0, "fused": True}
    assert {key: built.param_groups[0][key] for key in wanted} == wanted


@pytest.mark.parametrize("lr", [1e-3, 1, np.float64(1e-3), np.float32(0.5), np.array(1e-3), torch.tensor(1e-3)], ids=repr)
def test_set_lr_writes_python_floats_to_every_group(lr: Any):
    built = AdamW().build(Two())
    set_lr(built, lr)
    assert [type(group["lr"]) for group in built.param_groups] == [float, float]
    assert [group["lr"] for group in built.param_groups] == [float(lr)] * 2


def test_the_rate_that_was_set_is_the_one_that_is_used():
    def moved(lr: float) -> float:
        model = Two()
        built = SGD(momentum=0.0, lr=1.0).build(model)
        model.vector.grad = torch.ones(5)
        set_lr(built, lr)
        built.step()
        return (Two().vector - model.vector).mean().item()

    assert moved(0.25) == pytest.approx(0.25)
    assert moved(0.0) == 0.0


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (AdamW, {"lr": 0.0}, "lr: must be positive, got 0.0"),
        (AdamW, {"weight_decay": -0.1}, "weight_decay: must not be negative, got -0.1"),
        (AdamW, {"beta1": 1.0}, "beta1: must be at least 0 and below 1, got 1.0"),
        (AdamW, {"beta2": -0.1}, "beta2: must be at least 0 and below 1, got -0.1"),
        (AdamW, {"eps": 0.0}, "eps: must be positive, got 0.0"),
        (SGD, {"lr": -1.0}, "lr: must be positive, got -1.0"),
        (SGD, {"momentum": 1.0}, "momentum: must be at least 0 and below 1, got 1.0"),
        (SGD, {"nesterov": True, "momentum": 0.0}, "nesterov: needs momentum above 0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(kind: type[Optimizer], arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        kind(**arguments)
    assert caught.value.message == message


def test_zero_is_a_value_and_not_the_default():
    assert AdamW(weight_decay=0.0, beta1=0.0).build(Two()).param_groups[0]["betas"] == (0.0, 0.95)
    assert {group["weight_decay"] for group in AdamW(weight_decay=0.0).build(Two()).param_groups} == {0.0}
