"""Keys and values of the positions seen so far, so that generating one more token costs one position."""

from __future__ import annotations

import torch


class KVCache:
    """Room for ``capacity`` positions in every layer. ``length`` positions are filled.

    The model appends each layer's new keys and values with :meth:`append`, then moves ``length`` once with :meth:`advance`.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers

    def append(self, layer: int, k_BGTE: torch.Tensor, v_BGTE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new positions of one layer, and return all of them so far: ``k_BGSE``, ``v_BGSE`` with S = length + T."""
        B, G, T, E = k_BGTE.shape
        end = self.length + T
        assert end <= self.capacity, "the cache is full: crop and prefill again"
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:  # allocated on first use, with the dtype and device that the model computes in
            keys = self._keys[layer] = k_BGTE.new_empty(B, G, self.capacity, E)
            values = self._values[layer] = v_BGTE.new_empty(B, G, self.capacity, E)
        keys[:, :, self.length : end] = k_BGTE
        values[:, :, self.length : end] = v_BGTE
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, positions: int) -> None:
        self.length += positions

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self.length = 0
