"""The shuffle is a bijection, looks random, and is a pure function of (key, index)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from accel_pretrain.permutation import Permutation, key_of, uniform
from tests.reference import chi_square


def shuffled(n: int, key: int) -> np.ndarray:
    return Permutation(n, key)(np.arange(n))


def test_every_small_size_is_a_bijection():
    for n in range(1, 301):
        assert sorted(shuffled(n, key=n)) == list(range(n)), n


@pytest.mark.parametrize("n", [2**k + d for k in (14, 17) for d in (-1, 0, 1)])
def test_large_sizes_around_powers_of_two_are_bijections(n: int):
    assert np.array_equal(np.sort(shuffled(n, key=7)), np.arange(n))


@pytest.mark.parametrize("n", [2**40 + 1, 2**62, 2**63 - 1])
def test_sizes_that_no_array_could_hold_stay_in_range_and_distinct(n: int):
    indices = np.concatenate([np.arange(5000), n - 1 - np.arange(5000)])
    values = Permutation(n, 3)(indices)
    assert values.dtype == np.int64
    assert values.min() >= 0
    assert values.max() < n
    assert len(set(values.tolist())) == indices.size


def test_one_index_at_a_time_equals_all_at_once_in_any_shape():
    permutation, together = Permutation(1000, 5), shuffled(1000, 5)
    assert [int(permutation(np.array([i]))[0]) for i in range(1000)] == together.tolist()
    assert np.array_equal(permutation(np.arange(1000).reshape(10, 100)), together.reshape(10, 100))
    assert int(permutation(np.array(17))) == together[17]
    assert not np.array_equal(permutation(np.arange(1, 1001) % 1000), together)  # control: other indices, other values


def test_input_is_not_modified():
    indices = np.arange(10, dtype=np.uint64)
    Permutation(10, 0)(indices)
    assert indices.tolist() == list(range(10))


def test_keys_give_different_orders_and_equal_keys_equal_ones():
    orders = {tuple(shuffled(50, key)) for key in range(1000)}
    assert len(orders) == 1000
    assert np.array_equal(shuffled(50, 12), shuffled(50, 12))


def test_neighbours_stay_neighbours_only_by_chance():
    n, keys = 4096, 300

    def adjacent(order: np.ndarray) -> int:
        return int((np.abs(np.diff(order)) == 1).sum())

    found, expected = sum(adjacent(shuffled(n, key)) for key in range(keys)), 2 * (n - 1) / n * keys
    assert abs(found - expected) < 5 * expected**0.5
    assert adjacent(np.arange(n)) == n - 1  # control: the count sees an order that is not shuffled


@pytest.mark.parametrize("n", [4, 10, 37])
@pytest.mark.parametrize("position", [0, -1])
def test_what_lands_on_a_position_is_uniform_over_keys(n: int, position: int):
    position %= n
    values = [int(Permutation(n, key_of(42, key))(np.array([position]))[0]) for key in range(100 * n)]
    statistic, bound = chi_square(np.bincount(values, minlength=n))
    assert statistic < bound


@pytest.mark.parametrize(("n", "orders"), [(3, 6), (4, 24), (5, 120)])
def test_every_order_of_a_few_elements_occurs_about_equally_often(n: int, orders: int):
    counts = np.array(list(Counter(tuple(shuffled(n, key_of(1, key))) for key in range(25 * orders)).values()))
    assert counts.size == orders
    assert counts.max() < 25 * 2.5


def test_chi_square_control_sees_a_bias_of_ten_percent():
    counts = np.full(10, 2000)
    counts[0] += 200
    counts[1] -= 200
    statistic, bound = chi_square(counts * 2)
    assert statistic > bound


def test_keys_of_several_parts_depend_on_each_and_on_their_order():
    keys = {key_of(*parts) for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (2**63 - 1, 0), (-1, 0)]}
    assert len(keys) == 9
    assert all(0 <= key < 2**64 for key in keys)
    assert key_of(42, 7) == key_of(42, 7)


def test_uniform_stays_in_range_and_fills_it_evenly():
    values = uniform(key_of(42), np.arange(100_000), 97)
    assert values.dtype == np.int64
    statistic, bound = chi_square(np.bincount(values, minlength=97))
    assert statistic < bound
    assert values.max() == 96
    assert uniform(3, np.arange(1000), 1).max() == 0


def test_uniform_is_a_function_of_key_and_index():
    together = uniform(9, np.arange(500), 10**12)
    assert [int(uniform(9, np.array([i]), 10**12)[0]) for i in range(500)] == together.tolist()
    assert not np.array_equal(uniform(10, np.arange(500), 10**12), together)


def test_successive_uniform_numbers_are_independent():
    values = uniform(key_of(0), np.arange(160_001), 20)
    pairs = values[:-1] * 20 + values[1:]
    statistic, bound = chi_square(np.bincount(pairs, minlength=400))
    assert statistic < bound


def test_order_is_pinned():
    """Whoever changes these numbers changes the data order of every run that is resumed afterwards."""
    assert shuffled(10, 42).tolist() == [2, 6, 8, 0, 4, 5, 1, 9, 7, 3]
    assert Permutation(1_000_003, key_of(42, 3))(np.arange(5)).tolist() == [847525, 910656, 299022, 924892, 760623]
    assert uniform(key_of(42), np.arange(5), 1000).tolist() == [11, 668, 317, 802, 696]
