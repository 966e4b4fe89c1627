"""The validation loss: equal to its definition, whatever the batch size, and without a trace in the run that it measures."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from accel_pretrain.data import Windows
from accel_pretrain.errors import ConfigError
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.shards import TokenSplit
from accel_pretrain.validation import EvalResult, EvaluationConfig, evenly_spaced, validate

T, VOCAB = 8, 24


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def make_files() -> tuple[np.ndarray, ...]:
    """Two files of ids, neither a multiple of the window: 24 windows in all."""
    rng = np.random.default_rng(0)
    return tuple(rng.integers(0, VOCAB, size).astype(np.uint16) for size in (100, 101))


def make_windows() -> Windows:
    return Windows(TokenSplit(source="memory", files=make_files(), max_id=VOCAB - 1, fingerprint="none"), T)


def make_model(dropout: float = 0.0) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(context_length=T, d_model=32, num_layers=2, num_heads=2, d_ff=32, init_std=0.3, dropout=dropout)
    return Transformer(config, VOCAB).eval()


def losses_by_definition(model: Transformer) -> np.ndarray:
    """-log p of every target, float64 (windows, T), one window at a time, the files cut by hand."""
    double = make_model().double()
    double.load_state_dict(model.state_dict())
    rows = []
    for file in make_files():
        for begin in range(0, file.size - T, T):
            ids = torch.from_numpy(file[begin : begin + T + 1].astype(np.int64))
            with torch.no_grad():
                chances_TV = double(ids[None, :-1])[0].softmax(dim=-1)
            rows.append(-chances_TV[torch.arange(T), ids[1:]].log().numpy())
    return np.array(rows)


def test_it_is_the_mean_over_all_targets(accelerator: Accelerator):
    model, expected = make_model(), losses_by_definition(make_model())
    result = validate(accelerator, model, make_windows(), batch_size=5)
    assert expected.shape == (24, T)
    assert result.tokens == expected.size
    assert result.loss == pytest.approx(expected.mean(), abs=1e-6)
    assert abs(result.loss - expected[:-1].mean()) > 1e-4  # one window less is another number


def test_its_standard_error_is_that_of_a_mean_over_windows(accelerator: Accelerator):
    means = losses_by_definition(make_model()).mean(axis=1)
    result = validate(accelerator, make_model(), make_windows(), batch_size=7)
    assert result.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(means.size), rel=1e-5)
    assert result.standard_error != pytest.approx(means.std(ddof=0) / math.sqrt(means.size), rel=1e-3)


@pytest.mark.parametrize("wanted", [None, 11])
def test_the_batch_size_does_not_change_it(accelerator: Accelerator, wanted: int | None):
    results = [validate(accelerator, make_model(), make_windows(), batch_size=size, wanted=wanted) for size in (1, 3, 7, 64)]
    assert max(result.loss for result in results) - min(result.loss for result in results) <= 1e-6
    assert len({result.tokens for result in results}) == 1
    other = validate(accelerator, make_model(), make_windows(), batch_size=7, wanted=10)
    assert abs(other.loss - results[0].loss) > 1e-4


def test_wanted_windows_are_spread_and_always_the_same(accelerator: Accelerator):
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 4).tolist() == evenly_spaced(3, None).tolist() == [0, 1, 2]
    expected = losses_by_definition(make_model())[evenly_spaced(24, 5)]
    result = validate(accelerator, make_model(), make_windows(), batch_size=2, wanted=5)
    assert (result.loss, result.tokens) == (pytest.approx(expected.mean(), abs=1e-6), 5 * T)


def test_one_window_has_no_standard_error(accelerator: Accelerator):
    assert validate(accelerator, make_model(), make_windows(), batch_size=4, wanted=1).standard_error == 0


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_no_trace(accelerator: Accelerator, training: bool):
    model = make_model(dropout=0.5).train(training)
    state = torch.get_rng_state()
    first = validate(accelerator, model, make_windows(), batch_size=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert {module.training for module in model.modules()} == {training}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert validate(accelerator, model, make_windows(), batch_size=5) == first  # without dropout
    with torch.no_grad():
        model.train()(torch.zeros(1, T, dtype=torch.long))
    assert not torch.equal(torch.get_rng_state(), state)  # which would have been seen


def test_bits_per_byte_and_perplexity_are_the_loss_in_other_units():
    result = EvalResult(loss=2.0, standard_error=0.1, tokens=800, bytes_per_token=4.0)
    assert result.bits_per_byte == pytest.approx(2.0 * 800 / math.log(2) / (4.0 * 800))
    assert result.perplexity == pytest.approx(math.e**2)
    unknown = EvalResult(loss=2.0, standard_error=0.1, tokens=800, bytes_per_token=None)
    assert unknown.bits_per_byte is None
    assert math.isfinite(EvalResult(loss=1e9, standard_error=0.0, tokens=8, bytes_per_token=None).perplexity)


@pytest.mark.parametrize("key", ["eval_interval", "eval_iters", "eval_batch_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_amounts_below_one_are_refused(key: str, value: int):
    with pytest.raises(ConfigError, match=f"{key}: must be at least 1"):
        EvaluationConfig(**{key: value})
