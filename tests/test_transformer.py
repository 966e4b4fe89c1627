"""The Transformer against a NumPy one, its parameter counts, its initial weights, causality, cache, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from accel_pretrain.errors import ConfigError
from accel_pretrain.models import ModelConfig, Transformer, hollow
from accel_pretrain.models.norm import LayerNorm, RMSNorm
from accel_pretrain.models.rope import rope_table, rotate
from accel_pretrain.models.transformer import FeedForward
from tests import reference

V, T = 61, 12
TINY = ModelConfig(context_length=T, d_model=32, num_layers=2, num_heads=4, d_ff=64)
VARIANTS: dict[str, ModelConfig] = {
    "llama": TINY,
    "gpt2": replace(
        TINY, norm="layernorm", activation="gelu_tanh", position="learned", bias=True, tie_embeddings=True, d_ff=None
    ),
    "grouped": replace(TINY, num_kv_heads=2, tie_embeddings=True),
    "multi-query": replace(TINY, num_kv_heads=1, activation="relu2"),
    "qk_norm": replace(TINY, qk_norm=True, num_kv_heads=2, head_dim=16, rope_theta=500.0),
    "geglu": replace(TINY, activation="geglu", bias=True, norm="layernorm"),
    "gelu": replace(TINY, activation="gelu", position="learned", norm_eps=1e-2),
    "silu": replace(TINY, activation="silu", head_dim=6, norm="layernorm", norm_eps=1e-2),
    "llama3": replace(TINY, rope_scaling="llama3", rope_theta=50.0, rope_original_context=16, num_kv_heads=2),
    "mistral": replace(TINY, sliding_window=5, num_kv_heads=2),
    "qwen2": replace(TINY, qkv_bias=True, num_kv_heads=2, sliding_window=3, window_pattern="FS"),
    "gemma2": replace(
        TINY, norm="rmsnorm_1p", activation="geglu", sandwich_norm=True, scale_embeddings=True, tie_embeddings=True,
        num_kv_heads=1, sliding_window=4, window_pattern="SF", attention_softcap=5.0, logit_softcap=4.0,
        query_pre_attn_scalar=20.0,
    ),
    "gemma3": replace(
        TINY, norm="rmsnorm_1p", activation="geglu", sandwich_norm=True, scale_embeddings=True, tie_embeddings=True,
        qk_norm=True, num_layers=3, head_dim=16, sliding_window=4, window_pattern="SSF", sliding_rope_theta=30.0,
        rope_theta=200.0, rope_scaling="linear", rope_factor=4.0,
    ),
    "modern": replace(
        TINY, norm="rmsnorm_plain", activation="relu2", qk_norm=True, value_embeddings=True, logit_softcap=15.0, num_layers=3,
        num_kv_heads=2, zero_init=True,
    ),
}  # fmt: skip
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def build(config: ModelConfig, *, seed: int = 0, std: float = 0.2) -> Transformer:
    """A model in evaluation mode whose every parameter is far from its initial value: biases and norms count too."""
    torch.manual_seed(seed)
    model = Transformer(config, V).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape)
    return model


def tokens(B: int = 2, length: int = T, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(seed))


def weights_of(model: Transformer) -> dict[str, np.ndarray]:
    return {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}


# --------------------------------------------------------------------------------------------------- against the reference


@variants
def test_logits_equal_the_reference(config: ModelConfig):
    model, tokens_BT = build(config), tokens()
    with torch.no_grad():
        logits_BTV = model(tokens_BT)
    expected = np.stack([reference.transformer_logits(weights_of(model), config, row.numpy()) for row in tokens_BT])
    scale = np.abs(expected).max()
    assert np.abs(logits_BTV.numpy() - expected).max() / scale < 1e-5
    other = np.stack(
        [reference.transformer_logits(weights_of(build(config, seed=1)), config, row.numpy()) for row in tokens_BT]
    )
    assert np.abs(logits_BTV.numpy() - other).max() / scale > 0.1  # control: other weights


@pytest.mark.parametrize(
    ("variant", "wrong"),
    [
        ("llama", {"rope_theta": 9000.0}),
        ("llama", {"norm_eps": 1e-2}),
        ("qk_norm", {"qk_norm": False}),
        ("geglu", {"activation": "swiglu"}),
        ("gpt2", {"activation": "gelu"}),
        ("gpt2", {"norm_eps": 1e-3}),
        ("llama3", {"rope_scaling": "linear"}),
        ("llama3", {"rope_factor": 7.0}),
        ("llama3", {"rope_low_freq_factor": 1.5}),
        ("llama3", {"rope_high_freq_factor": 3.0}),
        ("llama3", {"rope_original_context": 14}),
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {"window_pattern": "SF"}),
        ("gemma2", {"norm": "rmsnorm"}),
        ("gemma2", {"sandwich_norm": False}),
        ("gemma2", {"scale_embeddings": False}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": 5.0}),
        ("gemma2", {"query_pre_attn_scalar": None}),
        ("gemma3", {"sliding_rope_theta": None}),
        ("gemma3", {"rope_scaling": "none"}),
        ("gemma3", {"window_pattern": "SFS"}),
    ],
)
def test_reference_control_sees_every_option(variant: str, wrong: dict[str, Any]):
    model, row_T = build(VARIANTS[variant]), tokens()[0]
    with torch.no_grad():
        ours = model(row_T[None])[0].numpy()
    expected = reference.transformer_logits(weights_of(model), replace(VARIANTS[variant], **wrong), row_T.numpy())
    assert np.abs(ours - expected).max() / np.abs(expected).max() > 1e-4


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "gelu_tanh", "silu", "relu2"])
def test_each_activation_is_its_formula(activation: Any):
    x = torch.linspace(-6, 6, 101)
    layer = FeedForward(replace(TINY, activation=activation))
    np.testing.assert_allclose(layer._activate(x).numpy(), reference.ACTIVATIONS[activation](x.double().numpy()), atol=2e-6)
    others = [kind for kind, function in reference.ACTIVATIONS.items() if function is not reference.ACTIVATIONS[activation]]
    assert all(
        np.abs(layer._activate(x).numpy() - reference.ACTIVATIONS[kind](x.double().numpy())).max() > 1e-4 for kind in others
    )


def test_rotary_table_is_float32_throughout_as_in_transformers():
    cos_TE, sin_TE = rope_table(replace(TINY, context_length=100_000, head_dim=64))
    frequencies = 10_000.0 ** (-2 * np.arange(32) / 64)
    assert cos_TE.dtype == torch.float32
    np.testing.assert_allclose(cos_TE[200].numpy(), np.tile(np.cos(200 * frequencies), 2), atol=5e-5)
    np.testing.assert_allclose(sin_TE[200].numpy(), np.tile(np.sin(200 * frequencies), 2), atol=5e-5)
    in_float32 = torch.tensor(99_999.0) * (1.0 / (10_000.0 ** (torch.arange(0, 64, 2).float() / 64)))
    assert torch.equal(cos_TE[-1], in_float32.cos().repeat(2))
    assert not np.allclose(cos_TE[-1, :32].numpy(), np.cos(99_999 * frequencies), atol=3e-4)  # control: exact angles are others


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    cos_TE, sin_TE = rope_table(replace(TINY, context_length=200, head_dim=16, rope_theta=100.0))

    def score(query_at: int, key_at: int) -> float:
        turned = [rotate(x, torch.stack((cos_TE[t : t + 1], sin_TE[t : t + 1]))) for x, t in ((q, query_at), (k, key_at))]
        return (turned[0] * turned[1]).sum().item()

    assert score(10, 3) == pytest.approx(score(110, 103), abs=1e-4)
    assert score(10, 3) != pytest.approx(score(10, 4), abs=1e-2)
    assert rotate(q, torch.stack((cos_TE[9:10], sin_TE[9:10]))).norm().item() == pytest.approx(q.norm().item(), rel=1e-6)


def test_rms_norm_is_computed_in_float32():
    norm = RMSNorm(8, 1e-5)
    x = torch.full((1, 8), 300.0, dtype=torch.float16)  # its square overflows in half precision
    assert torch.equal(norm(x), torch.ones(1, 8, dtype=torch.float16))
    assert not torch.equal(x / x.square().mean().sqrt(), norm(x))  # control


def test_layer_norm_takes_the_rounded_weights_of_a_sharded_block():
    x = torch.randn(2, 8)
    norm = LayerNorm(8).bfloat16()
    assert torch.equal(norm(x), torch.nn.functional.layer_norm(x, (8,)))
    with pytest.raises(RuntimeError, match="mixed dtype"):  # control: PyTorch's does not
        torch.nn.LayerNorm(8).bfloat16()(x)


# ------------------------------------------------------------------------------------------------------------------ shape


@pytest.mark.parametrize(
    ("layers", "width", "heads", "parameters"),
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
)
def test_parameter_counts_of_gpt2(layers: int, width: int, heads: int, parameters: int):
    config = replace(VARIANTS["gpt2"], context_length=1024, d_model=width, num_layers=layers, num_heads=heads, dropout=0.1)
    with torch.device("meta"):
        model = Transformer(config, 50257)
    assert model.num_parameters() == parameters


def test_training_flops_per_token_of_gpt2_by_hand():
    config = replace(VARIANTS["gpt2"], context_length=1024, d_model=768, num_layers=12, num_heads=12)
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 50257 * 768
    with torch.device("meta"):
        assert Transformer(config, 50257).flops_per_token() == 6 * matrices + 12 * 12 * 768 * 1024 == 854_438_400
        untied = Transformer(replace(config, tie_embeddings=False), 50257)
        assert untied.flops_per_token() == 854_438_400  # the head multiplies whether or not it is the embedding
        assert untied.num_parameters() == 124_439_808 + 50257 * 768
        assert Transformer(replace(config, num_layers=6), 50257).flops_per_token() < 854_438_400  # control


def test_default_feed_forward_widths():
    assert replace(TINY, d_ff=None, d_model=768, activation="gelu").ff_width == 3072
    assert replace(TINY, d_ff=None, d_model=768).ff_width == 2048
    assert replace(TINY, d_ff=None, d_model=512).ff_width == 1408  # 1365.3 up to a multiple of 64
    assert replace(TINY, d_ff=100).ff_width == 100


@variants
def test_biases_are_everywhere_or_nowhere(config: ModelConfig):
    model = build(config)
    able = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.LayerNorm)}
    able.pop("lm_head", None)
    qkv = {name: able.pop(name) for name in list(able) if name.endswith(("q_proj", "k_proj", "v_proj"))}
    assert {module.bias is not None for module in able.values()} == {config.bias}
    assert {module.bias is not None for module in qkv.values()} == {config.bias if config.qkv_bias is None else config.qkv_bias}


def test_output_has_one_row_of_logits_per_position():
    assert build(TINY)(tokens(3, 5)).shape == (3, 5, V)


def test_more_positions_than_the_context_are_refused():
    with pytest.raises(AssertionError, match="13 positions exceed context_length 12"):
        build(TINY)(tokens(1, 13))


# --------------------------------------------------------------------------------------------------------------- causality


@variants
def test_no_output_depends_on_a_later_input(config: ModelConfig):
    """By gradient: exactly zero for every later position, and not zero for the same and every earlier one."""
    model, inputs_TD = build(config), None

    def keep(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal inputs_TD
        inputs_TD = output.detach().requires_grad_()
        return inputs_TD

    model.embed_tokens.register_forward_hook(keep)
    logits_TV = model(tokens(1))[0]
    for t in range(T):
        assert inputs_TD is not None
        (gradient,) = torch.autograd.grad(logits_TV[t].square().sum(), inputs_TD, retain_graph=True)
        moved_T = gradient[0].abs().amax(dim=1)
        farthest = max(
            0, t - sum((config.sliding_window or T) - 1 if config.slides(layer) else T for layer in range(config.num_layers))
        )
        assert moved_T[t + 1 :].eq(0).all()
        assert moved_T[:farthest].eq(0).all()  # windows reach as far as all layers together
        assert moved_T[farthest : t + 1].gt(0).all()


def test_sequences_of_a_batch_do_not_see_each_other():
    model, tokens_BT = build(TINY), tokens(4)
    changed_BT = tokens_BT.clone()
    changed_BT[2] = (changed_BT[2] + 1) % V
    with torch.no_grad():
        before, after = model(tokens_BT), model(changed_BT)
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert not torch.equal(before[2], after[2])


# ------------------------------------------------------------------------------------------------------------ grouped heads


def with_repeated_heads(model: Transformer, config: ModelConfig) -> Transformer:
    """The multi-head model that a grouped one stands for: each key/value head is copied for every query head of its group."""
    full = Transformer(replace(config, num_kv_heads=None), V).eval()
    times = config.num_heads // config.kv_heads
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            by_head = tensor.unflatten(0, (config.kv_heads, config.head_width))
            state[name] = by_head.repeat_interleave(times, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    return full


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_heads_equal_repeated_keys_and_values(kv_heads: int, bias: bool):
    config = replace(TINY, num_kv_heads=kv_heads, bias=bias)
    model = build(config)
    full = with_repeated_heads(model, config)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), full(tokens()), atol=2e-5, rtol=1e-5)
        full.layers[0].self_attn.k_proj.weight[: config.head_width] *= 1.1  # type: ignore[union-attr, index]
        assert not torch.allclose(model(tokens()), full(tokens()), atol=1e-3)  # control


def test_as_many_groups_as_heads_is_multi_head_attention():
    grouped, plain = build(replace(TINY, num_kv_heads=4)), build(TINY)
    assert torch.equal(grouped(tokens()), plain(tokens()))


# ------------------------------------------------------------------------------------------------------------------- cache


@variants
@pytest.mark.parametrize("chunks", [[T], [1] * T, [5, 1, 4, 1, 1], [1, 11], [7, 5]], ids=str)
def test_cached_equals_uncached(config: ModelConfig, chunks: list[int]):
    model, tokens_BT = build(config), tokens()
    cache = model.new_cache()
    with torch.no_grad():
        expected = model(tokens_BT)
        pieces = [model(piece, cache=cache) for piece in tokens_BT.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=5e-5, rtol=1e-5)
    assert cache.length == T


@variants
def test_cached_control_without_the_cache_differs(config: ModelConfig):
    model, tokens_BT = build(config), tokens()
    with torch.no_grad():
        assert not torch.allclose(model(tokens_BT[:, 5:]), model(tokens_BT)[:, 5:], atol=1e-2)


def test_reset_cache_has_forgotten_everything():
    model, cache = build(TINY), None
    with torch.no_grad():
        cache = model.new_cache()
        model(tokens(seed=5), cache=cache)
        cache.reset()
        torch.testing.assert_close(model(tokens()[:, :4], cache=cache), model(tokens()[:, :4]), atol=5e-5, rtol=1e-5)


def test_full_cache_is_refused():
    model = build(TINY)
    cache = model.new_cache(capacity=4)
    with torch.no_grad(), pytest.raises(AssertionError, match="the cache is full"):
        model(tokens(1, 5), cache=cache)


# ---------------------------------------------------------------------------------------------------------- initial weights


@pytest.mark.parametrize("variant", ["llama", "gpt2", "qk_norm", "geglu", "gemma2", "modern"])
@pytest.mark.parametrize("layers", [2, 8])
def test_initial_weights_follow_the_table(variant: str, layers: int):
    torch.manual_seed(0)
    model = Transformer(replace(VARIANTS[variant], d_model=128, num_layers=layers, head_dim=32, init_std=0.03), 500)
    for name, parameter in model.named_parameters():
        writes_zero = variant == "modern" and name.endswith(("o_proj.weight", "down_proj.weight", "gate.weight"))
        if name.endswith("bias") or writes_zero:
            assert parameter.eq(0).all(), name
        elif parameter.ndim == 1:
            assert parameter.eq(0 if variant == "gemma2" else 1).all(), name
        else:
            expected = 0.03 / math.sqrt(2 * layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.03
            sigma = expected / math.sqrt(2 * parameter.numel())  # of a measured standard deviation
            assert parameter.std().item() == pytest.approx(expected, abs=5 * sigma), name
            assert parameter.mean().item() == pytest.approx(0, abs=5 * expected / math.sqrt(parameter.numel())), name


def test_initial_weights_are_a_function_of_the_seed():
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return Transformer(TINY, V).embed_tokens.weight

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


@variants
def test_initial_loss_is_that_of_guessing(config: ModelConfig):
    torch.manual_seed(0)
    model = Transformer(config, V)
    loss = model(tokens(8), tokens(8, seed=2)).sum().item() / (8 * T)
    assert loss == pytest.approx(math.log(V), rel=0.02)


# ---------------------------------------------------------------------------------------------------------- tied embeddings


def test_tied_matrix_is_one_parameter_that_learns_from_both_ends():
    model = build(replace(TINY, tie_embeddings=True))
    assert model.output_matrix is model.embed_tokens.weight
    assert not any("lm_head" in name for name in model.state_dict())
    assert build(TINY).num_parameters() - model.num_parameters() == V * TINY.d_model
    tokens_BT = torch.zeros(1, T, dtype=torch.long)

    model(tokens_BT, tokens_BT).sum().backward()
    both = model.embed_tokens.weight.grad
    model.zero_grad()
    model.embed_tokens.register_forward_hook(lambda module, arguments, output: output.detach())
    model(tokens_BT, tokens_BT).sum().backward()
    output_only = model.embed_tokens.weight.grad
    assert both is not None
    assert output_only is not None
    assert not torch.allclose(both[0], output_only[0])  # the only token that was read
    torch.testing.assert_close(both[1:], output_only[1:])
    assert output_only[1:].abs().min() > 0


@variants
def test_state_dict_holds_each_parameter_once_and_nothing_else(config: ModelConfig):
    model = build(config)
    state = model.state_dict()
    assert set(state) == {name for name, _ in model.named_parameters()}  # no rotary table, no alias
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    again = Transformer(config, V).eval()
    assert not torch.equal(again(tokens()), model(tokens()))  # control
    again.load_state_dict(state)
    assert torch.equal(again(tokens()), model(tokens()))


# ------------------------------------------------------------------------------------------------------- training behaviour


@variants
def test_loss_inside_equals_loss_of_the_logits(config: ModelConfig):
    model, tokens_BT, targets_BT = build(config), tokens(), tokens(seed=2)
    with torch.no_grad():
        nats_B, logits_BTV = model(tokens_BT, targets_BT), model(tokens_BT)
    expected = [reference.cross_entropy(logits_BTV[b].numpy(), targets_BT[b].numpy()).sum() for b in range(2)]
    assert nats_B.tolist() == pytest.approx(expected, rel=1e-6)
    assert nats_B.flip(0).tolist() != pytest.approx(expected, rel=1e-6)  # control


@variants
def test_every_parameter_gets_a_gradient(config: ModelConfig):
    model = build(config)
    model(tokens(), tokens(seed=2)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name  # softmax does not see a shift of all keys


def test_dropout_acts_in_training_only():
    model = build(replace(TINY, dropout=0.5))
    assert torch.equal(model(tokens()), model(tokens()))
    assert torch.equal(model(tokens()), build(TINY)(tokens()))
    model.train()
    torch.manual_seed(0)
    first = model(tokens())
    assert not torch.equal(first, model(tokens()))
    torch.manual_seed(0)
    assert torch.equal(first, model(tokens()))  # drawn from the global random state


@pytest.mark.parametrize("place", ["embeddings", "attention weights", "attention branch", "feed-forward branch"])
def test_dropout_acts_in_each_of_its_places(place: str):
    torch.manual_seed(0)
    model = build(replace(TINY, dropout=0.5)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.layers:
        layer.self_attn.dropout = 0.5 if place == "attention weights" else 0.0  # type: ignore[union-attr]
    if place == "embeddings":
        model.dropout.p = 0.5
    for layer in model.layers if "branch" in place else ():
        layer.dropout.p = 0.5  # type: ignore[union-attr]
        silent = layer.mlp.down_proj if place.startswith("attention") else layer.self_attn.o_proj  # type: ignore[union-attr]
        torch.nn.init.zeros_(silent.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(model(tokens()), model(tokens()))


@variants
def test_bf16_autocast_is_close_to_float32(config: ModelConfig):
    model = build(config, std=0.05)
    with torch.no_grad():
        exact = model(tokens(8), tokens(8, seed=2)).mean().item() / T
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nats_B = model(tokens(8), tokens(8, seed=2))
            logits_BTV = model(tokens(8))
    assert nats_B.dtype == torch.float32
    assert logits_BTV.dtype == torch.bfloat16  # control: it did run in bf16
    assert nats_B.mean().item() / T == pytest.approx(exact, rel=5e-3)
    assert nats_B.mean().item() / T != exact


# ------------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 64, "num_heads": 7}, "num_heads: 7 heads do not divide d_model 64; try --num_heads 8"),
        ({"d_model": 100, "num_heads": 12}, "num_heads: 12 heads do not divide d_model 100; try --num_heads 10"),
        ({"d_model": 7, "num_heads": 5}, "num_heads: 5 heads do not divide d_model 7; try --num_heads 7"),
        ({"num_heads": 8, "num_kv_heads": 3}, "num_kv_heads: 3 key/value heads do not divide num_heads 8"),
        ({"num_heads": 8, "num_kv_heads": 16}, "num_kv_heads: 16 key/value heads do not divide num_heads 8"),
        ({"d_model": 24, "num_heads": 8}, "head_dim: rotary embeddings need an even head width, got 3"),
        ({"head_dim": 5}, "head_dim: rotary embeddings need an even head width, got 5"),
        ({"dropout": 1.0}, "dropout: must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout: must be at least 0 and below 1, got -0.1"),
        ({"rope_theta": 0.0}, "rope_theta: must be positive, got 0.0"),
        ({"norm_eps": -1.0}, "norm_eps: must not be negative, got -1.0"),
        ({"init_std": -0.02}, "init_std: must not be negative, got -0.02"),
        ({"window_pattern": "SSL"}, "window_pattern: must be letters S (sliding) and F (full), got 'SSL'"),
        ({"window_pattern": ""}, "window_pattern: must be letters S (sliding) and F (full), got ''"),
        ({"logit_softcap": 0.0}, "logit_softcap: must be positive, got 0.0"),
        ({"attention_softcap": math.nan}, "attention_softcap: must be positive, got nan"),
        (
            {"rope_scaling": "llama3", "rope_low_freq_factor": 4.0},
            "rope_low_freq_factor: must be below rope_high_freq_factor 4.0, got 4.0",
        ),
        *(
            ({name: value}, f"{name}: must be at least 1, got {value}")
            for name in (
                "context_length",
                "d_model",
                "num_layers",
                "num_heads",
                "vocab_size",
                "num_kv_heads",
                "head_dim",
                "d_ff",
                "sliding_window",
                "rope_original_context",
            )
            for value in (0, -1)
        ),
    ],
    ids=str,
)
def test_misfit_is_refused_with_what_to_type(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**arguments)
    assert caught.value.message == message


def test_all_misfits_come_at_once():
    with pytest.raises(ConfigError) as caught:
        ModelConfig(d_model=30, num_heads=8, num_kv_heads=3)
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError) as caught:
        ModelConfig(d_model=0, num_layers=0, dropout=2.0)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        {"d_model": 24, "num_heads": 8, "position": "learned"},
        {"d_model": 30, "num_heads": 8, "head_dim": 16},
        {"num_heads": 1, "num_kv_heads": 1},
        {"dropout": 0.0},
    ],
    ids=str,
)
def test_refusals_control_these_fit(arguments: dict[str, Any]):
    ModelConfig(**arguments)


def test_a_hollow_model_has_every_shape_and_no_values_and_draws_nothing():
    config = replace(VARIANTS["gpt2"], dropout=0.1)
    state = torch.random.get_rng_state()
    found = hollow(config, 50)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in found.parameters())
    whole = Transformer(config, 50)
    assert not torch.equal(torch.random.get_rng_state(), state)  # control
    assert {name: own.shape for name, own in found.named_parameters()} == {n: own.shape for n, own in whole.named_parameters()}
