"""``mup_base_width``: what is scaled, and that what the model computes then moves alike at every width."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accel_pretrain.config import RunConfig
from accel_pretrain.errors import ConfigError
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.models.mup import init_scale, lr_scale
from accel_pretrain.optim import SGD, AdamW, GaLore, Muon, Optimizer, problems
from accel_pretrain.outlook import look_ahead
from benchmarks.mup import best_of, coordinates, verdict
from benchmarks.optimizers import bracketed

WIDE = ModelConfig(
    context_length=8, d_model=256, num_layers=1, num_heads=4, d_ff=None, mup_base_width=64, value_embeddings=True
)


def rates(optimizer: Optimizer, config: ModelConfig) -> dict[str, float]:
    model = Transformer(config, 32)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(own)]: group["lr"] for group in optimizer.groups(model) for own in group["params"]}


@pytest.mark.parametrize(("optimizer", "times"), [(AdamW(lr=1.0), 4), (Muon(lr=1.0), 2)], ids=["adamw", "muon"])
def test_what_learns_slower_in_a_wide_model(optimizer: Optimizer, times: int) -> None:
    for name, rate in rates(optimizer, WIDE).items():
        expected = 1 / times if name.endswith("_proj.weight") else 1 / 4 if name == "lm_head.weight" else 1.0
        assert rate == pytest.approx(expected), name
    assert set(rates(optimizer, replace(WIDE, mup_base_width=256)).values()) == {1.0}
    assert set(rates(optimizer, replace(WIDE, mup_base_width=None)).values()) == {1.0}


def test_what_begins_smaller_in_a_wide_model() -> None:
    torch.manual_seed(0)
    scaled = {name: own.std() for name, own in Transformer(WIDE, 512).named_parameters() if own.ndim == 2}
    torch.manual_seed(0)
    plain = {
        name: own.std()
        for name, own in Transformer(replace(WIDE, mup_base_width=None), 512).named_parameters()
        if own.ndim == 2
    }
    for name in plain:
        if "gate.weight" not in name:
            expected = 1.0 if "embed" in name else 0.25 if name == "lm_head.weight" else 0.5
            assert (scaled[name] / plain[name]).item() == pytest.approx(expected, rel=1e-5), name
    assert init_scale(replace(WIDE, mup_base_width=None), "lm_head.weight") == 1.0
    assert lr_scale(WIDE, "vector", "muon") == lr_scale(WIDE, "gate", None) == 1.0


def test_tied_embeddings_are_refused() -> None:
    with pytest.raises(ConfigError, match="type --tie_embeddings false"):
        ModelConfig(tie_embeddings=True, mup_base_width=64)


@pytest.mark.parametrize(
    ("optimizer", "typed"),
    [(SGD(), "type --optimizer.name adamw"), (GaLore(projection_rank=16), "type --projection_rank null")],
    ids=lambda own: getattr(own, "name", ""),
)
def test_optimizers_that_do_not_scale_are_refused(optimizer: Optimizer, typed: str) -> None:
    (line,) = problems(optimizer, WIDE, 32)
    assert line.endswith(typed)
    assert problems(optimizer, replace(WIDE, mup_base_width=None), 32) == []
    assert problems(GaLore(), WIDE, 32) == problems(AdamW(), WIDE, 32) == []
    with pytest.raises(ConfigError, match=typed):
        look_ahead(RunConfig(model=replace(WIDE, vocab_size=32), optimizer=optimizer), None)


@pytest.mark.parametrize(
    "optimizer", [AdamW(lr=2e-3), pytest.param(Muon(lr=2e-3), marks=pytest.mark.slow)], ids=["adamw", "muon"]
)
def test_outputs_move_alike_at_every_width(optimizer: Optimizer) -> None:
    """The coordinate check; without the scaling they move further the wider the model is."""
    narrow, wide = (coordinates(width, optimizer, scaled=True, updates=2) for width in (64, 256))
    for name in narrow:
        assert 0.5 < wide[name] / narrow[name] < 1.6, (name, narrow, wide)
    unscaled = coordinates(256, optimizer, scaled=False, updates=2)
    assert max(unscaled[name] / narrow[name] for name in narrow) > 2.0


def test_the_best_rate_is_between_those_that_were_tried() -> None:
    losses = {2.0**k: (k + 6.3) ** 2 for k in (-8, -7, -6, -5)}
    assert best_of(losses) == pytest.approx(2.0**-6.3, rel=1e-6)
    assert best_of({1.0: 1.0, 2.0: 2.0}) == 1.0


def test_a_best_rate_at_the_edge_is_said_to_be_one() -> None:
    inner, edge = {1.0: 2.0, 2.0: 1.0, 4.0: 2.0}, {1.0: 3.0, 2.0: 2.0, 4.0: 1.0}
    assert verdict({64: inner, 512: inner}) == "best lr: 2 and 2, 1.00x apart"
    assert verdict({64: inner, 512: edge}) == "best lr: 2 and 4 (at the edge of the grid: not bracketed)"
    assert bracketed(inner)
    assert not bracketed(edge)
    assert not bracketed({1.0: 1.0})
