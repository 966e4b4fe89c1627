"""Our Transformer against the models of transformers, with the same random weights, in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from accel_pretrain.generate import SamplingConfig, generate_batch
from accel_pretrain.hf.convert import links_by_ours, read_ours
from accel_pretrain.hf.families import FAMILIES
from accel_pretrain.hf.family import Family, names_of
from accel_pretrain.models import ModelConfig, Transformer

transformers = pytest.importorskip("transformers")

V, T, B = 211, 40, 3
LLAMA = ModelConfig(vocab_size=V, context_length=T, d_model=48, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=96)
GEMMA = replace(
    LLAMA, norm="rmsnorm_1p", norm_eps=1e-6, activation="geglu", scale_embeddings=True, tie_embeddings=True, head_dim=16
)
GPT2 = replace(
    LLAMA,
    norm="layernorm",
    activation="gelu_tanh",
    position="learned",
    bias=True,
    tie_embeddings=True,
    d_ff=None,
    num_kv_heads=None,
)
SHAPES: dict[str, tuple[str, ModelConfig]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied, no bias, exact gelu": ("gpt2", replace(GPT2, tie_embeddings=False, bias=False, activation="gelu", d_ff=100)),
    "llama": ("llama", LLAMA),
    "llama with biases, tied": ("llama", replace(LLAMA, bias=True, tie_embeddings=True, head_dim=8)),
    "llama 3.1": ("llama", replace(LLAMA, rope_scaling="llama3", rope_theta=50.0, rope_original_context=16)),
    "llama, long linear": ("llama", replace(LLAMA, rope_scaling="linear", rope_factor=4.0)),
    "mistral": ("mistral", replace(LLAMA, sliding_window=7, head_dim=16)),
    "qwen2": ("qwen2", replace(LLAMA, qkv_bias=True, norm_eps=1e-6)),
    "qwen2 with windows": ("qwen2", replace(LLAMA, qkv_bias=True, sliding_window=9, window_pattern="FSS")),
    "qwen3": ("qwen3", replace(LLAMA, qk_norm=True, head_dim=16, rope_theta=1e6)),
    "gemma": ("gemma", replace(GEMMA, num_kv_heads=1)),
    "gemma2": (
        "gemma2",
        replace(
            GEMMA, sandwich_norm=True, attention_softcap=5.0, logit_softcap=3.0, query_pre_attn_scalar=24.0, sliding_window=6,
            window_pattern="SF",
        ),
    ),
    "gemma3": (
        "gemma3_text",
        replace(
            GEMMA, sandwich_norm=True, qk_norm=True, num_layers=7, sliding_window=8, window_pattern="SSSSSF", rope_theta=1e6,
            sliding_rope_theta=1e4, rope_scaling="linear", rope_factor=8.0, query_pre_attn_scalar=24.0,
        ),
    ),
}  # fmt: skip
shapes = pytest.mark.parametrize("shape", SHAPES)


class Double(TorchFunctionMode):
    """Whoever asks for float32 gets float64: both sides then compute in float64 throughout, norms and angles too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        if dtype == torch.float64:
            with Double():
                yield
        else:
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def family_of(shape: str) -> Family:
    return next(family for family in FAMILIES if family.model_type == SHAPES[shape][0])


def theirs(shape: str, seed: int = 0) -> Any:
    """Their model for one of ``SHAPES``, every parameter far from its initial value, biases and norms too."""
    keys = family_of(shape).write_config(SHAPES[shape][1])
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**keys)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape)
        if "no bias" in shape:
            for name, parameter in model.named_parameters():
                parameter *= not name.endswith("bias")
    return model


def ours(shape: str, model: Any) -> Transformer:
    """Our model with the weights of theirs, and the config that theirs says it has."""
    family = family_of(shape)
    config = family.read_config(model.config.to_dict())
    if "no bias" in shape:
        config = replace(config, bias=False)
    sizes = names_of(config)
    links = links_by_ours(family.links(config, list(sizes)), sizes)
    state = model.state_dict()
    own = Transformer(config, V)
    own.load_state_dict({name: read_ours(name, links, sizes, state.__getitem__) for name in sizes})
    return own.eval()


def tokens(T: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@shapes
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["float32", "float64"])
def test_logits_equal_those_of_transformers(shape: str, dtype: torch.dtype, bar: float):
    with precision(dtype), torch.no_grad():
        model = theirs(shape)
        own = ours(shape, model)
        expected = torch.empty(0)
        for length in (*range(1, 12), 17, T):
            expected, logits = model(tokens(length)).logits, own(tokens(length))
            assert logits.dtype == dtype
            assert (logits - expected).abs().max() <= bar, length
        other = ours(shape, theirs(shape, seed=1))(tokens(T))
        assert (other - expected).abs().max() > 0.1  # control: other weights, logits of this size


@shapes
def test_gradients_equal_those_of_transformers(shape: str):
    model = theirs(shape)
    own = ours(shape, model)
    tokens_BT = tokens(T)
    own(tokens_BT[:, :-1], tokens_BT[:, 1:]).sum().div(B * (T - 1)).backward()
    model(tokens_BT, labels=tokens_BT).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    sizes = {name: tuple(parameter.shape) for name, parameter in own.named_parameters()}
    links = links_by_ours(family_of(shape).links(own.config, list(sizes)), sizes)
    worst, coarse = 0.0, 0.0
    for name, parameter in own.named_parameters():
        expected = read_ours(name, links, sizes, gradients.__getitem__)
        assert parameter.grad is not None
        if name.endswith("k_proj.bias"):  # a shift of all keys changes no softmax: this gradient is rounding, of nothing
            assert (parameter.grad - expected).norm() <= 1e-6
            continue
        worst = max(worst, ((parameter.grad - expected).norm() / expected.norm()).item())
        coarse = max(coarse, ((parameter.grad * 1.0001 - expected).norm() / expected.norm()).item())
    assert 0 <= worst <= 1e-5 < coarse  # control: the bar sees one part in ten thousand


@shapes
@pytest.mark.parametrize(("step", "new"), [(7, 40), pytest.param(1, 200, marks=pytest.mark.slow)])
def test_greedy_generation_equals_that_of_transformers(shape: str, step: int, new: int, monkeypatch: pytest.MonkeyPatch):
    """3 (slow: 20) prompts of 1 to 20 tokens and 40 (200) new ones each: one by one there, all in one batch here."""
    monkeypatch.setitem(SHAPES, shape, (SHAPES[shape][0], replace(SHAPES[shape][1], context_length=224)))
    model = theirs(shape)
    own = ours(shape, model)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(V, (length,), generator=generator).tolist() for length in range(1, 21, step)]
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]
    sampling = SamplingConfig(max_new_tokens=new, temperature=0.0)
    assert generate_batch(own, prompts, sampling) == expected
    assert len(set(map(tuple, expected))) > len(prompts) / 2  # control: the continuations are not all one loop
    assert all(len(tokens) == new for tokens in expected)


@shapes
def test_cached_logits_equal_uncached_ones_in_padded_batches(shape: str):
    own = ours(shape, theirs(shape))
    lengths, chunks = torch.tensor([T, 9, 23]), [25, 1, 1, 7, 6]
    padding_B = T - lengths
    tokens_BT = tokens(T)
    with torch.no_grad():
        cache = own.new_cache(T, padding_B)
        cached = torch.cat([own(piece, cache=cache) for piece in tokens_BT.split(chunks, dim=1)], dim=1)
        unaware = own.new_cache(T)
        control = own(tokens_BT, cache=unaware)
        for b, padding in enumerate(padding_B.tolist()):
            alone = own(tokens_BT[b : b + 1, padding:])[0]
            assert (cached[b, padding:] - alone).abs().max() <= 1e-5
            if padding:
                assert (control[b, padding:] - alone).abs().max() > 0.01  # control: padding that is not told of is seen
