"""A seeded shuffle of ``range(n)`` as a function: no state, O(1) memory, any element in any order.

A Feistel network permutes the smallest power of two that holds ``n``; values that fall outside ``range(n)`` are sent through
again until they fall inside (cycle walking), which keeps it a bijection (Black & Rogaway 2002, "Ciphers with Arbitrary Finite
Domains"). Being a function of (seed, index), it needs nothing in a checkpoint and nothing to seek after a resume.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): uint64 in, well-scrambled uint64 out, element by element."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key_of(*parts: int) -> int:
    """One 64-bit key from several integers, such as (seed, epoch). Order matters."""
    key = 0
    for part in parts:
        key = int(mix(np.array([(key ^ part) + _GOLDEN & _MASK64], dtype=np.uint64))[0])
    return key


def uniform(key: int, indices: np.ndarray, n: int) -> np.ndarray:
    """For each index a number in ``range(n)``, independent of the others: sampling with replacement, without state."""
    return (mix(indices.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)) % np.uint64(n)).astype(np.int64)


class Permutation:
    """A bijection of ``range(n)`` chosen by ``key``: ``permutation(indices) -> indices``, int64 arrays of any shape."""

    def __init__(self, n: int, key: int) -> None:
        assert n >= 1
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << bits - bits // 2) - 1)
        self._keys = [np.uint64(key_of(key, round)) for round in range(_ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        values = self._shuffle(indices.reshape(-1).astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._shuffle(values[outside])
        return values.astype(np.int64).reshape(indices.shape)

    def _shuffle(self, values: np.ndarray) -> np.ndarray:
        high, low = values >> self._low_bits, values & self._low_mask
        for round, key in enumerate(self._keys):
            if round % 2:
                low = low ^ (mix(high + key) & self._low_mask)
            else:
                high = high ^ (mix(low + key) & self._high_mask)
        return (high << self._low_bits) | low
