"""Which tokens every process reads at every micro-step, as a pure function of the sample's number.

Read :meth:`TokenBatches.micro_batch` first. A run consumes samples 0, 1, 2, ...; sample *i* is the same window of tokens
whatever the number of processes, the micro-batch or the accumulation, and after any restart: the only state of the data is how
many samples were consumed. The next update of G samples splits them as
``first_sample + (micro_step * world_size + rank) * batch_size + row``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from accel_pretrain.errors import DataError
from accel_pretrain.permutation import Permutation, key_of, uniform
from accel_pretrain.shards import TokenSplit
from accel_pretrain.typed_yaml import option


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens are and in which order they are read."""

    train_data_path: Path | None = option(None, "a dataset folder of prep.tokenize, or a .bin / .ids file of token ids")
    val_data_path: Path | None = option(None, "the same, for validation; null: the val split of train_data_path")
    sampling: Literal["shuffle", "random"] = option(
        "shuffle", "shuffle: every window once per epoch, in a new order; random: windows drawn with replacement"
    )
    dtype: Literal["uint16", "uint32"] | None = option(None, "of a bare file; null: the dataset's, or uint16")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process: int64 ids of T + 1 positions, on the CPU until :meth:`to` moves them."""

    ids_BS: torch.Tensor

    @property
    def inputs_BT(self) -> torch.Tensor:
        return self.ids_BS[:, :-1]

    @property
    def targets_BT(self) -> torch.Tensor:
        """The inputs one position later: ``targets_BT[:, t]`` follows ``inputs_BT[:, t]``. Already shifted; do not shift again."""
        return self.ids_BS[:, 1:]

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; the copy to a GPU is from pinned memory and does not wait."""
        if device.type == "cpu":
            return self
        ids_BS = self.ids_BS.pin_memory() if device.type == "cuda" else self.ids_BS
        return Batch(ids_BS.to(device, non_blocking=True))


class Windows:
    """A split cut into windows of T + 1 ids that overlap by one: the last target of one is the first input of the next.

    Windows do not cross files. Within a file of n ids, window w begins at ``min(phase + w * T, n - 1 - T)``: the phase, below
    T, moves all cuts, and the last window is moved back to fit, so that every epoch has the same number of windows.
    """

    def __init__(self, split: TokenSplit, context_length: int) -> None:
        self.context_length = context_length
        files = [file for file in split.files if file.size > context_length]
        if not files:
            raise DataError(
                f"{split.source}: {split.tokens:,} tokens are too few for one window of context_length + 1 = "
                f"{context_length + 1}; lower --context_length below {max(2, split.tokens)} or prepare more text"
            )
        self._views = [np.lib.stride_tricks.sliding_window_view(file, context_length + 1) for file in files]
        self._ends = np.cumsum([(file.size - 1) // context_length for file in files])
        self._start_ends = np.cumsum([view.shape[0] for view in self._views])
        self.count = int(self._ends[-1])
        self.starts = int(self._start_ends[-1])

    def read(self, windows: np.ndarray, phases: np.ndarray) -> np.ndarray:
        """The ids of N windows, each cut at its phase: int64 (N, T + 1)."""
        if len(self._views) == 1:
            return self._read_file(0, windows, phases)
        return self._gather(windows, self._ends, lambda file, own, chosen: self._read_file(file, own, phases[chosen]))

    def read_at(self, starts: np.ndarray) -> np.ndarray:
        """The ids of N windows that begin anywhere: ``starts`` counts all possible beginnings over all files."""
        return self._gather(starts, self._start_ends, lambda file, own, _: self._views[file][own].astype(np.int64))

    def _read_file(self, file: int, windows: np.ndarray, phases: np.ndarray) -> np.ndarray:
        view = self._views[file]
        return view[np.minimum(windows * self.context_length + phases, view.shape[0] - 1)].astype(np.int64)

    def _gather(self, indices: np.ndarray, ends: np.ndarray, read) -> np.ndarray:  # noqa: ANN001
        out = np.empty((indices.size, self.context_length + 1), dtype=np.int64)
        files = np.searchsorted(ends, indices, side="right")
        for file in np.unique(files):
            chosen = files == file
            out[chosen] = read(file, indices[chosen] - (ends[file - 1] if file else 0), chosen)
        return out


class TokenBatches:
    """The micro-batches of one process. Holds no position: every call says which samples it wants."""

    def __init__(
        self,
        split: TokenSplit,
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        sampling: Literal["shuffle", "random"] = "shuffle",
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        self.windows = Windows(split, context_length)
        self.batch_size, self.seed, self.sampling = batch_size, seed, sampling
        self.world_size, self.rank = world_size, rank
        self.samples_per_epoch = self.windows.count
        # The order is worked out for a block of samples at a time, which costs less per sample than one batch at a time.
        self._block = min(max(self.samples_per_epoch, 256), 16384)
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def micro_batch(self, first_sample: int, micro_step: int) -> Batch:
        """This process's share of micro-step ``micro_step`` in the update whose samples begin at ``first_sample``."""
        begin = first_sample + (micro_step * self.world_size + self.rank) * self.batch_size
        return Batch(torch.from_numpy(self.samples(np.arange(begin, begin + self.batch_size))))

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """The ids of the samples with these numbers: int64 (N, T + 1)."""
        if self.sampling == "random":
            return self.windows.read_at(uniform(key_of(self.seed), numbers, self.windows.starts))
        first, last = int(numbers[0]) // self._block, int(numbers[-1]) // self._block
        parts = [self._order(block) for block in range(first, last + 1)]
        windows, phases = parts[0] if len(parts) == 1 else (np.concatenate(column) for column in zip(*parts, strict=True))
        inside = numbers - first * self._block
        return self.windows.read(windows[inside], phases[inside])

    def _order(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Window and phase of each sample in a block; the last two blocks are kept."""
        if block not in self._orders:
            numbers = np.arange(block * self._block, (block + 1) * self._block)
            windows, phases = np.empty_like(numbers), np.empty_like(numbers)
            for epoch in range(int(numbers[0]) // self.samples_per_epoch, int(numbers[-1]) // self.samples_per_epoch + 1):
                inside = numbers // self.samples_per_epoch == epoch
                key = key_of(self.seed, epoch)
                windows[inside] = Permutation(self.samples_per_epoch, key)(numbers[inside] % self.samples_per_epoch)
                phases[inside] = key % self.windows.context_length
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[block] = windows, phases
        return self._orders[block]
