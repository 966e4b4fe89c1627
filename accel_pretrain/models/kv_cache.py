"""Keys and values of the positions seen so far, so that generating one more token costs one position."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class KVCache:
    """Room for ``capacity`` positions in every layer. ``length`` positions are filled.

    The model appends each layer's new keys and values with :meth:`append`, then moves ``length`` once with :meth:`advance`.
    Sequences of different lengths share a cache by beginning later: ``padding_B`` says how many of the first positions of each
    are nobody's; what stands there is never seen, and positions are counted from after it.
    """

    def __init__(self, num_layers: int, capacity: int, padding_B: torch.Tensor | None = None) -> None:
        self.capacity = capacity
        self.padding_B = padding_B
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
            # Zeros, because what is masked still takes part in a sum with weight 0, and memory may hold a NaN.
            keys = self._keys[layer] = k_BGTE.new_zeros(B, G, self.capacity, E)
            values = self._values[layer] = v_BGTE.new_zeros(B, G, self.capacity, E)
        keys.narrow(2, self.length, T).copy_(k_BGTE)
        values.narrow(2, self.length, T).copy_(v_BGTE)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def advance(self, positions: int) -> None:
        self.length += positions

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self.length = 0

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Forget the other sequences. The last of those that stay fill the gaps, so that little is copied.

        Returns, for each place in the smaller batch, the row that stands there now.
        """
        staying, count = set(rows), len(rows)
        order = list(range(count))
        gaps = [row for row in range(count) if row not in staying]
        for gap, row in zip(gaps, sorted(row for row in staying if row >= count), strict=True):
            order[gap] = row
            for tensor in self._tensors():
                tensor[gap, :, : self.length] = tensor[row, :, : self.length]
        self._keys = [None if tensor is None else tensor[:count] for tensor in self._keys]
        self._values = [None if tensor is None else tensor[:count] for tensor in self._values]
        if self.padding_B is not None:
            self.padding_B = self.padding_B[order]
        return order

    def replace(self, rows: Sequence[int], other: KVCache) -> None:
        """Give ``rows`` the sequences of ``other``, which has no padding, as their whole past; the present stays the same."""
        assert self.padding_B is not None, "sequences of different lengths need padding"
        begin = self.length - other.length
        for own, new in zip(self._tensors(), other._tensors(), strict=False):  # an empty one has nothing to give
            own[list(rows), :, begin : self.length] = new[:, :, : other.length]
        self.padding_B = self.padding_B.clone()
        self.padding_B[list(rows)] = begin

    def forget_padding(self) -> None:
        """Move everything to the front, over the positions that are padding in all sequences."""
        assert self.padding_B is not None
        unused = int(self.padding_B.min())
        for tensor in self._tensors():
            tensor[:, :, : self.length - unused] = tensor[:, :, unused : self.length].clone()
        self.padding_B = self.padding_B - unused
        self.length -= unused

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (*self._keys, *self._values) if tensor is not None]
