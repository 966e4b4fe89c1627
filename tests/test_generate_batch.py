"""Many sequences at once: each gets what it would get alone, of any length, whenever it stops or fills its context."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from accel_pretrain.generate import SamplingConfig, generate, generate_batch, generator_for, streams
from accel_pretrain.models import ModelConfig
from accel_pretrain.models.kv_cache import KVCache
from tests.test_generate import CONTEXT, GREEDY, PROMPT, greedy_by_recomputing, make_model
from tests.test_transformer import build, variants

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4], [6, 2, 6, 4, 3, 3, 8, 3, 2, 7, 9, 5, 0, 2, 8, 8]]


@variants
def test_cached_logits_of_a_padded_batch_equal_whole_ones(config: ModelConfig):
    model, lengths, T = build(config), [12, 1, 7], config.context_length
    tokens_BT = torch.randint(0, model.vocab_size, (3, T), generator=torch.Generator().manual_seed(0))
    padding = [T - length for length in lengths]
    with torch.inference_mode():
        whole = [model(tokens_BT[row : row + 1, pad:])[0] for row, pad in enumerate(padding)]

        def pieces(cache: Any) -> torch.Tensor:
            return torch.cat([model(part, cache=cache) for part in tokens_BT.split([5, 1, 1, 3, 1, 1], dim=1)], dim=1)

        cached, forgetful = pieces(model.new_cache(T, torch.tensor(padding))), pieces(model.new_cache(T))
    for row, pad in enumerate(padding):
        assert float((cached[row, pad:] - whole[row]).abs().max()) <= 1e-5 * float(whole[row].abs().max().clamp(min=1))
        if pad:
            assert float((forgetful[row, pad:] - whole[row]).abs().max()) > 0.01


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "repetition_penalty": 1.5}]
)
def test_a_row_gets_what_it_would_get_alone(position: str, options: dict[str, Any]):
    """Also beyond the context, where each row drops its older half at its own time, and is told so by nobody."""
    model, sampling = make_model(position), SamplingConfig(max_new_tokens=5 * CONTEXT, **options)
    prompts = [*PROMPTS, [1] * 40, [9]]
    alone = [list(generate(model, prompt, sampling)) for prompt in prompts]
    assert generate_batch(model, prompts, sampling) == alone
    assert alone[1] == alone[-1]  # the same prompt
    assert len(set(map(tuple, alone))) == len(prompts) - 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_row_stops_by_itself(temperature: float):
    model, sampling = make_model(), SamplingConfig(max_new_tokens=3 * CONTEXT, temperature=temperature)
    free = generate_batch(model, PROMPTS, sampling)
    stop = free[0][6]
    cut = [new[: new.index(stop)] if stop in new else new for new in free]
    assert generate_batch(model, PROMPTS, sampling, stop_id=stop) == cut
    assert len({len(new) for new in cut}) > 2


def test_equally_long_rows_go_on_from_their_halves_too():
    model, sampling = make_model(), SamplingConfig(max_new_tokens=3 * CONTEXT, temperature=0)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    expected = [greedy_by_recomputing(model, prompt, 3 * CONTEXT, keep=CONTEXT // 2) for prompt in prompts]
    assert generate_batch(model, prompts, sampling) == expected
    stop = next(token for token in expected[0] if token not in expected[1])
    cut = [new[: new.index(stop)] if stop in new else new for new in expected]
    assert generate_batch(model, prompts, sampling, stop_id=stop) == cut


def test_draws_depend_on_the_generator_of_the_row_only():
    model, sampling = make_model(), SamplingConfig(max_new_tokens=20)

    def sampled(prompts: list[list[int]], *repeats: int) -> list[list[int]]:
        generators = [generator_for(prompt, 1, repeat) for prompt, repeat in zip(prompts, repeats, strict=True)]
        return generate_batch(model, prompts, sampling, generators=generators)

    first, second, other = sampled([PROMPT, PROMPT, [7]], 0, 1, 0)
    assert first != second
    assert sampled([[7], PROMPT, PROMPT], 0, 1, 0) == [other, second, first]


def test_streams_may_be_read_in_any_order():
    model, sampling = make_model(), SamplingConfig(max_new_tokens=10, temperature=0)
    expected = generate_batch(model, PROMPTS, sampling)
    each = streams(model, PROMPTS, sampling)
    assert next(each[3]) == expected[3][0]
    assert [list(each[row]) for row in (4, 0, 1, 2)] == [expected[row] for row in (4, 0, 1, 2)]
    assert list(each[3]) == expected[3][1:]


def test_a_repetition_penalty_counts_the_prompt_and_what_came():
    model, count = make_model(), 24
    sampling = SamplingConfig(max_new_tokens=count, temperature=0, repetition_penalty=100)
    prompts = [PROMPT, [7, 7, 7]]
    for prompt, new in zip(prompts, generate_batch(model, prompts, sampling), strict=True):
        assert len({*prompt, *new}) == len(set(prompt)) + count  # no token comes twice
    assert len(set(generate(model, PROMPT, replace(sampling, repetition_penalty=1.0)))) < count


def test_of_no_prompts_nothing_comes():
    assert generate_batch(make_model(), [], GREEDY) == []


# ------------------------------------------------------------------------------------------------------------ the cache


def filled(rows: int, length: int, capacity: int, padding: list[int] | None = None, seed: int = 0) -> KVCache:
    """A cache of two layers with random content."""
    cache = KVCache(2, capacity, None if padding is None else torch.tensor(padding))
    generator = torch.Generator().manual_seed(seed)
    for layer in range(2):
        cache.append(layer, *torch.randn(2, rows, 3, length, 4, generator=generator))
    cache.advance(length)
    return cache


def content(cache: KVCache, row: int) -> torch.Tensor:
    """Keys and values of one sequence, without its padding."""
    begin = 0 if cache.padding_B is None else int(cache.padding_B[row])
    return torch.stack([tensor[row, :, begin : cache.length] for tensor in cache._tensors()])


@pytest.mark.parametrize("staying", [[0, 1, 2, 3, 4], [4], [0], [1, 3, 4], [0, 1], [2, 4]])
def test_what_stays_in_a_cache_stays_what_it_was(staying: list[int]):
    cache, before = filled(5, 6, 8, [0, 5, 2, 1, 3]), filled(5, 6, 8, [0, 5, 2, 1, 3])
    order = cache.keep(staying)
    assert sorted(order) == staying
    for place, row in enumerate(order):
        assert torch.equal(content(cache, place), content(before, row))


def test_a_sequence_can_get_another_past():
    cache, before, other = filled(3, 6, 8, [0, 5, 2]), filled(3, 6, 8, [0, 5, 2]), filled(2, 4, 4, seed=1)
    cache.replace([0, 2], other)
    assert torch.equal(content(cache, 0), content(other, 0))
    assert torch.equal(content(cache, 1), content(before, 1))
    assert torch.equal(content(cache, 2), content(other, 1))
    cache.replace([1], KVCache(2, 1))
    assert content(cache, 1).shape[2] == 0


def test_padding_of_all_can_be_forgotten():
    cache, before = filled(3, 7, 8, [3, 5, 2]), filled(3, 7, 8, [3, 5, 2])
    cache.forget_padding()
    assert cache.length == 5
    assert all(torch.equal(content(cache, row), content(before, row)) for row in range(3))
