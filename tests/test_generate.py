"""Drawing tokens: filters against hand-made cases and transformers' own; and one sequence.

:mod:`tests.test_generate_batch` has many sequences at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from accel_pretrain.errors import ConfigError, PretrainError
from accel_pretrain.generate import (
    SamplingConfig,
    draw,
    generate,
    penalized,
    probabilities,
)
from accel_pretrain.models import ModelConfig, Transformer

CONTEXT = 16
PROMPT = [3, 1, 4, 1, 5]
GREEDY = SamplingConfig(max_new_tokens=8, temperature=0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost these tiny models more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(position: str = "rope", vocab_size: int = 32, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    config = ModelConfig(
        context_length=CONTEXT, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48,
        position=position, init_std=0.3,  # type: ignore[arg-type]
    )  # fmt: skip
    return Transformer(config, vocab_size).eval()


def logits_after(model: Transformer, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0, -1]


def greedy_by_recomputing(model: Transformer, prompt: list[int], count: int, keep: int) -> list[int]:
    """The same as :func:`generate` without a cache: when the context is full, only the last ``keep`` tokens are read again."""
    tokens, new = prompt[-CONTEXT:], []
    for _ in range(count):
        if len(tokens) > CONTEXT:
            tokens = tokens[-keep:]
        new.append(int(logits_after(model, tokens).argmax()))
        tokens = [*tokens, new[-1]]
    return new


# ------------------------------------------------------------------------------------------------------------ one draw

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0])


def kept(logits: torch.Tensor, **settings: float | int | None) -> list[int]:
    return probabilities(logits, SamplingConfig(**({"temperature": 1.0} | settings))).nonzero().flatten().tolist()  # type: ignore[arg-type]


def test_without_filters_it_is_the_softmax_of_divided_logits():
    chances = probabilities(LOGITS, SamplingConfig(temperature=0.5))
    torch.testing.assert_close(chances, (LOGITS.double() / 0.5).softmax(0))
    assert not torch.allclose(chances, LOGITS.double().softmax(0))


@pytest.mark.parametrize(("k", "expected"), [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (99, [0, 1, 2, 3])])
def test_top_k_keeps_the_k_most_likely(k: int, expected: list[int]):
    assert kept(LOGITS, top_k=k) == expected


def test_what_ties_with_the_kth_stays_too():
    assert kept(torch.tensor([1.0, 2.0, 1.0, 0.0]), top_k=2) == [0, 1, 2]


@pytest.mark.parametrize(("p", "expected"), [(1e-9, [2]), (0.5, [2]), (0.51, [0, 2]), (0.8, [0, 2]), (0.81, [0, 1, 2])])
def test_top_p_keeps_the_fewest_that_reach_p(p: float, expected: list[int]):
    assert kept(torch.tensor([0.30, 0.15, 0.50, 0.05]).log(), top_p=p) == expected


def test_top_p_of_equal_tokens_keeps_the_lowest_ids():
    assert kept(torch.zeros(8), top_p=0.5) == [0, 1, 2, 3]


def test_top_p_one_is_no_filter_even_far_out_in_the_tail():
    logits = torch.tensor([0.0, -30.0, -60.0])
    assert kept(logits, top_p=1.0) == kept(logits) == [0, 1, 2]


def test_top_k_comes_before_top_p():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert kept(logits, top_p=0.65) == [0, 1]
    assert kept(logits, top_p=0.65, top_k=2) == [0, 1]
    assert kept(logits, top_p=0.55, top_k=2) == [0]  # 0.4 is 0.57 of the two that top_k left
    assert kept(logits, top_p=0.55) == [0, 1]


@pytest.mark.parametrize(("p", "expected"), [(0.0, [0, 1, 2, 3]), (0.5, [0, 2]), (0.61, [2]), (0.31, [0, 2]), (1.0, [2])])
def test_min_p_keeps_what_is_likely_beside_the_likeliest(p: float, expected: list[int]):
    assert kept(torch.tensor([0.30, 0.15, 0.50, 0.05]).log(), min_p=p) == expected


def test_the_repetition_penalty_lowers_seen_tokens_on_both_sides_of_zero():
    seen = torch.tensor([True, True, False, False])
    assert penalized(torch.tensor([2.0, -2.0, 2.0, -2.0]), seen, 2.0).tolist() == [1.0, -4.0, 2.0, -2.0]
    assert penalized(torch.tensor([2.0, -2.0, 2.0, -2.0]), seen, 0.5).tolist() == [4.0, -1.0, 2.0, -2.0]


SETTINGS = [
    {"temperature": 0.7}, {"temperature": 1.5, "top_k": 10}, {"top_p": 0.9}, {"top_p": 0.05}, {"min_p": 0.1}, {"min_p": 0.9},
    {"repetition_penalty": 1.3}, {"repetition_penalty": 0.8, "top_k": 3},
    {"repetition_penalty": 1.2, "temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_equal_those_of_transformers(settings: dict[str, Any]):
    """In their order: what their ``generate`` would build for these settings, on the same logits and tokens."""
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    logits_BV = 3 * torch.randn(5, 500, generator=generator, dtype=torch.float64)
    tokens_BT = torch.randint(0, 500, (5, 200), generator=generator)
    options: dict[str, Any] = {"temperature": 1.0, **settings}
    sampling = SamplingConfig(**options)
    theirs_BV = logits_BV
    for name, argument in (
        ("RepetitionPenaltyLogitsProcessor", sampling.repetition_penalty), ("TemperatureLogitsWarper", sampling.temperature),
        ("TopKLogitsWarper", sampling.top_k), ("TopPLogitsWarper", sampling.top_p), ("MinPLogitsWarper", sampling.min_p),
    ):  # fmt: skip
        if argument is not None:
            theirs_BV = getattr(transformers, name)(argument)(tokens_BT, theirs_BV)
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(1, tokens_BT, True)
    ours_BV = probabilities(penalized(logits_BV, seen_BV, sampling.repetition_penalty), sampling)
    torch.testing.assert_close(ours_BV, theirs_BV.softmax(-1))
    assert torch.equal(ours_BV > 0, theirs_BV > -torch.inf)
    for key in settings:  # controls: each filter alone makes a difference
        default = replace(sampling, **{key: SamplingConfig.__dataclass_fields__[key].default})
        other_BV = probabilities(penalized(logits_BV, seen_BV, default.repetition_penalty), default)
        assert not torch.allclose(other_BV, ours_BV)


def test_a_row_has_the_same_chances_beside_other_rows():
    logits_BV = 3 * torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    sampling = SamplingConfig(temperature=1.0, top_k=100, top_p=0.7, min_p=0.01)
    together = probabilities(logits_BV, sampling)
    torch.testing.assert_close(together, torch.stack([probabilities(logits_V, sampling) for logits_V in logits_BV]))
    assert len({int(count) for count in (together > 0).sum(-1)}) > 1


def test_a_draw_never_hits_what_has_no_chance():
    logits = torch.full((20_000, 8), -torch.inf)
    logits[:, 3] = logits[:, 5] = 0.0
    tokens = draw(logits, SamplingConfig(temperature=1.0), [torch.Generator().manual_seed(0)] * 20_000)
    assert set(tokens.tolist()) == {3, 5}


def test_temperature_zero_takes_the_first_of_the_most_likely():
    assert probabilities(torch.tensor([0.0, 3.0, 3.0]), SamplingConfig(temperature=0)).tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-3])
def test_a_tiny_temperature_does_not_overflow(temperature: float):
    assert probabilities(LOGITS * 100, SamplingConfig(temperature=temperature)).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}, {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0},
        {"temperature": -1.0}, {"max_new_tokens": 0}, {"seed": -1},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float]):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SamplingConfig(**settings)  # type: ignore[arg-type]


def test_drawn_tokens_are_as_frequent_as_they_should_be():
    logits, draws = torch.tensor([0.2, 1.0, -0.5, 0.9, 2.0, -3.0, 0.0, 0.4]), 5000
    sampling, generator = SamplingConfig(temperature=1.3, top_k=6), torch.Generator().manual_seed(1)
    counts = draw(logits.expand(draws, -1), sampling, [generator] * draws).bincount(minlength=8).double()

    def chi_square(sampling: SamplingConfig) -> float:
        expected = draws * probabilities(logits, sampling)
        possible = expected > 0
        return float(((counts - expected)[possible] ** 2 / expected[possible]).sum())

    assert int((counts > 0).sum()) == 6
    assert chi_square(sampling) < 20.5  # 5 degrees of freedom: exceeded once in a thousand seeds
    assert chi_square(SamplingConfig(temperature=1.0, top_k=6)) > 50


# ---------------------------------------------------------------------------------------------------------- a sequence


def test_greedy_is_deterministic_and_depends_on_the_prompt():
    model = make_model()
    first, again = (list(generate(model, PROMPT, GREEDY)) for _ in range(2))
    assert first == again
    assert first != list(generate(model, [7, 7, 7], GREEDY))


def test_the_seed_decides_the_text():
    model = make_model()
    texts = [list(generate(model, PROMPT, SamplingConfig(max_new_tokens=20, seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT])
def test_beyond_the_context_it_goes_on_from_the_kept_half(position: str, length: int):
    model, count = make_model(position), 3 * CONTEXT
    prompt = torch.randint(0, 32, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    new = list(generate(model, prompt, SamplingConfig(max_new_tokens=count, temperature=0)))
    assert new == greedy_by_recomputing(model, prompt, count, keep=CONTEXT // 2)
    assert new != greedy_by_recomputing(model, prompt, count, keep=CONTEXT - 1)


def test_a_context_of_one_token_works():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(context_length=1, d_model=8, num_layers=1, num_heads=1, d_ff=8), 16).eval()
    assert len(list(generate(model, [1, 2, 3], SamplingConfig(max_new_tokens=5)))) == 5


def test_it_stops_before_the_stop_id():
    model = make_model()
    free = list(generate(model, PROMPT, GREEDY))
    stop = next(token for token in free if free.index(token) > 0)
    assert list(generate(model, PROMPT, GREEDY, stop_id=stop)) == free[: free.index(stop)]


def test_padding_of_the_vocabulary_is_never_drawn():
    model = make_model(vocab_size=64)
    hot = SamplingConfig(max_new_tokens=200, temperature=50.0)
    assert max(generate(model, PROMPT, hot, vocab_size=40)) < 40
    assert max(generate(model, PROMPT, hot)) >= 40


def test_the_weights_keep_their_state():
    model = make_model()
    state = torch.get_rng_state()
    list(generate(model, PROMPT, SamplingConfig(max_new_tokens=4)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_whose_logits_are_not_finite_is_an_error():
    model = make_model()
    with torch.no_grad():
        model.output_matrix.fill_(math.nan)
    with pytest.raises(PretrainError, match="not finite"):
        next(generate(model, PROMPT, GREEDY))
