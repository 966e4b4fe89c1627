"""Models for decoding on a CPU: the same logits by other kernels, on shared weights, and only where it pays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from accel_pretrain.generate import SamplingConfig, generate_batch
from accel_pretrain.models import ModelConfig, Transformer, decoding
from accel_pretrain.models.decoding import DecodingLinear, decoder, for_decoding
from tests.test_transformer import TINY, build, variants


@pytest.mark.parametrize("packed_rows", [None, 1, 8])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_map_is_the_same_map(packed_rows: int | None, rows: int, positions: int, bias: bool, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(37, 48, generator=generator), torch.randn(rows, positions, 48, generator=generator)
    b = torch.randn(37, generator=generator) if bias else None
    fast = DecodingLinear(weight.to(dtype), None if b is None else b.to(dtype), packed_rows)
    found = fast(x.to(dtype))
    assert found.dtype == dtype
    bar = 1e-5 if dtype == torch.float32 else 0.2
    assert float((found.float() - F.linear(x, weight, b)).abs().max()) < bar
    assert float((found.float() - F.linear(x, weight.flip(0), b)).abs().max()) > 2 * bar


@pytest.mark.parametrize("packed_rows", [None, 3])
@variants
def test_a_decoder_gives_the_logits_of_its_model(config: ModelConfig, packed_rows: int | None):
    model, rows = build(config), 1 if packed_rows is None else 3
    tokens_BT = torch.randint(0, model.vocab_size, (rows, config.context_length), generator=torch.Generator().manual_seed(0))
    fast = decoder(model, packed_rows)
    with torch.inference_mode():
        whole, cache = model(tokens_BT), fast.new_cache()
        pieces = torch.cat([fast(part, cache=cache) for part in tokens_BT.split([5, 1, 1, 1, 1, 1, 1, 1], dim=1)], dim=1)
        other = build(config, seed=1)(tokens_BT)
    assert float((pieces - whole).abs().max()) <= 1e-5 * float(whole.abs().max().clamp(min=1))
    assert float((pieces - other).abs().max()) > 0.1


def linear_maps(model: Transformer) -> list[DecodingLinear]:
    """All that a decoder holds."""
    blocks: list[Any] = list(model.layers)
    modules: list[Any] = [model, *blocks]
    for block in blocks:
        modules += [block.self_attn.__self__, block.mlp.__self__]
    return [value for module in modules for value in vars(module).values() if isinstance(value, DecodingLinear)]


def test_a_decoder_leaves_its_model_alone_and_shares_its_weights():
    model = build(replace(TINY, tie_embeddings=True))
    state, modules = {name: tensor.clone() for name, tensor in model.state_dict().items()}, [type(m) for m in model.modules()]
    fast = decoder(model, None)
    assert [type(m) for m in model.modules()] == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    matrices = {parameter.data_ptr() for parameter in model.parameters() if parameter.ndim == 2}
    assert {linear.weight.data_ptr() for linear in linear_maps(fast)} == matrices


def test_generation_uses_one_where_it_pays(monkeypatch: pytest.MonkeyPatch):
    """And its tokens are the same as without."""
    model, prompts = build(TINY), [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    sampling = SamplingConfig(max_new_tokens=40, temperature=0)
    expected = generate_batch(model, prompts, sampling)
    made: list[int | None] = []

    def watched(model: Transformer, packed_rows: int | None) -> Transformer:
        made.append(packed_rows)
        return decoder(model, packed_rows)

    monkeypatch.setattr(decoding, "decoder", watched)
    assert generate_batch(model, prompts, sampling) == expected
    assert made == []
    monkeypatch.setattr(decoding, "_PAYS_FROM_WEIGHTS", 0)
    monkeypatch.setattr(decoding, "_free_memory", lambda: 2**40)
    assert generate_batch(model, prompts, sampling) == expected
    assert len(made) == 1


def test_a_copy_is_made_only_where_it_fits_and_pays(monkeypatch: pytest.MonkeyPatch):
    model = build(TINY)
    monkeypatch.setattr(decoding, "_PAYS_FROM_WEIGHTS", 0)
    monkeypatch.setattr(decoding, "_copy_is_faster", lambda dtype, rows: rows > 2)

    def copies(rows: int, new_tokens: int, free: float) -> bool | None:
        monkeypatch.setattr(decoding, "_free_memory", lambda: free)
        fast = for_decoding(model, rows, new_tokens)
        return None if fast is model else linear_maps(fast)[0].packed is not None

    size = 4 * model.num_parameters()
    assert copies(4, 64, 2 * size + 1) is True
    assert copies(4, 64, 2 * size) is False
    assert copies(1, 64, 2**40) is False
    assert copies(4, 8, 2**40) is None
    assert copies(64, 64, 2**40) is None
    assert for_decoding(model.train(), 4, 64) is model
    assert for_decoding(model.eval().double(), 4, 64) is model
