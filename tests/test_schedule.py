"""The learning rate: each curve's shape as numbers, its ends, its bounds, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_pretrain.errors import ConfigError
from accel_pretrain.schedule import Constant, Cosine, InverseSqrt, Linear, Schedule, WarmupStableDecay
from tests.reference import cosine_with_warmup

ENDS: dict[str, Any] = {"warmup_iters": 10, "min_lr": 0.1}
# peak 1, 100 updates, of which 10 are warm-up
CURVES: dict[str, tuple[Schedule, dict[int, float]]] = {
    "cosine": (Cosine(**ENDS), {1: 0.1, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
    "linear": (Linear(**ENDS), {1: 0.1, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
    "wsd": (WarmupStableDecay(**ENDS, decay_iters=20), {1: 0.1, 10: 1.0, 80: 1.0, 85: 0.55, 100: 0.1}),
    "wsd linear": (
        WarmupStableDecay(**ENDS, decay_iters=20, decay_shape="linear"),
        {1: 0.1, 10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1},
    ),
    "inverse sqrt": (InverseSqrt(warmup_iters=10), {1: 0.1, 10: 1.0, 40: 0.5, 90: 1 / 3, 100: 0.1**0.5}),
    "constant": (Constant(warmup_iters=10), {1: 0.1, 5: 0.5, 10: 1.0, 55: 1.0, 100: 1.0}),
}
curves = pytest.mark.parametrize(("schedule", "points"), CURVES.values(), ids=CURVES)


@curves
def test_curve_goes_through_its_points(schedule: Schedule, points: dict[int, float]):
    assert {step: schedule.lr(step, 1.0, 100) for step in points} == pytest.approx(points, abs=1e-12)
    assert {step: schedule.lr(step + 1, 1.0, 100) for step in points} != pytest.approx(points, abs=1e-12)  # control: off by one


@curves
def test_curve_scales_with_the_peak(schedule: Schedule, points: dict[int, float]):
    if getattr(schedule, "min_lr", None) is None:  # a floor given as a number does not scale
        assert [schedule.lr(s, 3e-4, 100) for s in points] == pytest.approx([3e-4 * v for v in points.values()], rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "largest_jump"),
    [
        (Cosine(warmup_iters=1000), 0.00101),
        (Linear(warmup_iters=1000), 0.00101),
        (InverseSqrt(warmup_iters=1000), 0.00101),
        (Constant(warmup_iters=1000), 0.00101),
        (WarmupStableDecay(warmup_iters=1000, decay_shape="linear"), 0.00101),
        (WarmupStableDecay(warmup_iters=1000), 0.9 * (1 / 2000) ** 0.5 + 1e-9),  # 1 - sqrt falls steeply at first
    ],
    ids=lambda value: type(value).__name__,
)
def test_curve_has_no_jumps(schedule: Schedule, largest_jump: float):
    curve = [schedule.lr(step, 1.0, 10_000) for step in range(1, 10_001)]
    assert max(abs(a - b) for a, b in itertools.pairwise(curve)) <= largest_jump
    assert curve.index(max(curve)) + 1 == 1000  # the peak is reached with the last update of warm-up


def test_cosine_equals_the_reference_at_every_step():
    def curve(warmup: int) -> list[float]:
        return [Cosine(warmup_iters=warmup, min_lr=3e-5).lr(step, 3e-4, 500) for step in range(1, 501)]

    expected = [cosine_with_warmup(step, 3e-4, 3e-5, 50, 500) for step in range(1, 501)]
    assert curve(50) == pytest.approx(expected, rel=1e-12)
    assert curve(51) != pytest.approx(expected, rel=1e-12)  # control


def test_warm_up_and_floor_default_to_two_percent_and_a_tenth():
    for schedule in (Cosine(), Linear(), WarmupStableDecay()):
        assert schedule.warmup(10_000) == 200
        assert schedule.lr(200, 6e-4, 10_000) == pytest.approx(6e-4, rel=1e-12)
        assert schedule.lr(10_000, 6e-4, 10_000) == pytest.approx(6e-5, rel=1e-12)
    assert WarmupStableDecay().lr(8_000, 6e-4, 10_000) == 6e-4  # the cool-down is the last fifth
    assert WarmupStableDecay().lr(8_001, 6e-4, 10_000) < 6e-4


def test_zero_is_a_value_and_not_the_default():
    assert Cosine(warmup_iters=0).lr(1, 1.0, 1000) > 0.999
    assert Cosine(min_lr=0.0).lr(1000, 1.0, 1000) == 0.0
    assert WarmupStableDecay(decay_iters=0).lr(1000, 1.0, 1000) == 1.0


@pytest.mark.parametrize("schedule", [Cosine(min_lr=0.1), Linear(min_lr=0.1), WarmupStableDecay(min_lr=0.1)])
def test_beyond_the_end_the_rate_stays_at_the_floor(schedule: Schedule):
    assert schedule.lr(101, 1.0, 100) == schedule.lr(10**9, 1.0, 100) == pytest.approx(0.1)


def all_schedules(warmup: int, floor: float, decay: int) -> list[Schedule]:
    return [
        Cosine(warmup_iters=warmup, min_lr=floor),
        Linear(warmup_iters=warmup, min_lr=floor),
        WarmupStableDecay(warmup_iters=warmup, min_lr=floor, decay_iters=decay),
        WarmupStableDecay(warmup_iters=warmup, min_lr=floor, decay_iters=decay, decay_shape="linear"),
        InverseSqrt(warmup_iters=warmup),
        Constant(warmup_iters=warmup),
    ]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    total=st.integers(1, 10**7),
    peak=st.floats(1e-12, 1e3),
    shares=st.tuples(*[st.floats(0, 1)] * 3),
    position=st.floats(0, 1),
)
def test_rate_is_a_float_between_zero_and_the_peak(total: int, peak: float, shares: tuple[float, ...], position: float):
    step = 1 + round(position * (total - 1))
    warmup, decay = (round(share * (total - 1)) for share in shares[:2])
    for schedule in all_schedules(warmup, shares[2] * peak, decay):
        rate = schedule.lr(step, peak, total)
        assert type(rate) is float
        assert 0 <= rate <= peak * (1 + 1e-12), schedule


@pytest.mark.parametrize(
    ("schedule", "total", "problems"),
    [
        (Cosine(warmup_iters=99), 100, []),
        (
            Cosine(warmup_iters=100),
            100,
            ["warmup_iters: 100 updates of warm-up do not fit into max_iters 100; try --warmup_iters 2"],
        ),
        (
            Constant(warmup_iters=2000),
            10,
            ["warmup_iters: 2000 updates of warm-up do not fit into max_iters 10; try --warmup_iters 1"],
        ),
        (Cosine(min_lr=1.0), 100, []),
        (Linear(min_lr=2.5), 100, ["min_lr: 2.5 is above the peak optimizer.lr 1; try --min_lr 0.1"]),
        (
            Cosine(min_lr=2.5, warmup_iters=100),
            100,
            [
                "warmup_iters: 100 updates of warm-up do not fit into max_iters 100; try --warmup_iters 2",
                "min_lr: 2.5 is above the peak optimizer.lr 1; try --min_lr 0.1",
            ],
        ),
        (WarmupStableDecay(warmup_iters=60, decay_iters=40), 100, []),
        (
            WarmupStableDecay(warmup_iters=60, decay_iters=41),
            100,
            ["decay_iters: warm-up 60 + cool-down 41 exceed max_iters 100"],
        ),
        (Cosine(), 1, []),
    ],
)
def test_problems_name_the_key_and_what_to_type(schedule: Schedule, total: int, problems: list[str]):
    assert schedule.problems(1.0, total) == problems


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Cosine, {"warmup_iters": -1}, "warmup_iters: must not be negative, got -1"),
        (Linear, {"min_lr": -0.1}, "min_lr: must not be negative, got -0.1"),
        (WarmupStableDecay, {"decay_iters": -5}, "decay_iters: must not be negative, got -5"),
    ],
)
def test_negative_values_are_refused(kind: type[Schedule], arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        kind(**arguments)
    assert caught.value.message == message
