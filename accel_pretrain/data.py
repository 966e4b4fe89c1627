"""Which tokens every process reads at every micro-step, as a pure function of the sample's number.

Read :meth:`TokenBatches.micro_batches` first. A run consumes samples 0, 1, 2, ...; sample *i* is the same window of tokens
whatever the number of processes, the micro-batch or the accumulation, and after any restart: the only state of the data is how
many samples were consumed. The next update of G samples splits them as
``first_sample + (micro_step * world_size + rank) * batch_size + row``. After a rollback, some samples are left out: then the
run consumes the others, in the same order (:func:`numbers_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from accel_pretrain.batch_warmup import BatchWarmup
from accel_pretrain.curriculum import MovingTurns
from accel_pretrain.errors import DataError, refuse
from accel_pretrain.mixture import Turns, mixture_problems
from accel_pretrain.packing import packed_begins
from accel_pretrain.permutation import Permutation, key_of, uniform
from accel_pretrain.shards import TokenSplit
from accel_pretrain.typed_yaml import option

_READ_AHEAD_BYTES = 1 << 20
_FEW_FILES = 8
Packing = Literal["windows", "bos"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens are and in which order they are read."""

    train_data_path: Path | tuple[Path, ...] | None = option(
        None, "a dataset folder of prep.tokenize, token files (.bin .ids .ds .npy), or a mixture: [DIR@0.7, DIR@0.3]"
    )
    val_data_path: Path | tuple[Path, ...] | None = option(
        None, "the same, without weights, for validation; null: the val split of train_data_path"
    )
    sampling: Literal["shuffle", "random"] = option(
        "shuffle", "shuffle: every window once per epoch, in a new order; random: windows drawn with replacement"
    )
    mixture_end: tuple[float, ...] | None = option(
        None, "the weights to which those of train_data_path move in a straight line, in its order; null: they stay"
    )
    mixture_end_tokens: int | None = option(None, "over how many tokens they move; then they stay")
    dtype: Literal["uint16", "uint32"] | None = option(None, "of a bare file; null: the dataset's, or uint16")
    packing: Packing = option(
        "windows", "windows: cut anywhere, every token once per epoch; bos: a window begins where a document does"
    )
    intra_document_masking: bool = option(
        False, "tokens see only their own document, in training and evaluation, and positions begin again with each"
    )

    def without_documents(self) -> DataConfig:
        """The same for tokens in which documents cannot be told apart: unknown ones, or made up."""
        return replace(self, packing="windows", intra_document_masking=False)

    def __post_init__(self) -> None:
        for key, given, weighted in (("train", self.train_data_path, True), ("val", self.val_data_path, False)):
            if isinstance(given, tuple):
                refuse(*((True, f"{key}_data_path: {problem}") for problem in mixture_problems(given, weighted=weighted)))
        end, count = self.mixture_end, len(self.train_data_path) if isinstance(self.train_data_path, tuple) else 1
        refuse(
            (
                end is not None and len(end) != count,
                f"mixture_end: {len(end or ())} weights for {count} datasets of train_data_path",
            ),
            (
                end is not None and not (min(end, default=0) >= 0 and sum(end) > 0),
                "mixture_end: weights are at least 0, and one more",
            ),
            ((end is None) != (self.mixture_end_tokens is None), "mixture_end and mixture_end_tokens: give both, or neither"),
            ((self.mixture_end_tokens or 1) < 1, f"mixture_end_tokens: must be at least 1, got {self.mixture_end_tokens}"),
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process: int64 ids of T + 1 positions, on the CPU until :meth:`to` moves them."""

    ids_BS: torch.Tensor

    @property
    def inputs_BT(self) -> torch.Tensor:
        return self.ids_BS[:, :-1]

    @property
    def targets_BT(self) -> torch.Tensor:
        """The inputs one position later: ``targets_BT[:, t]`` follows ``inputs_BT[:, t]``. Do not shift again."""
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
    A *start* is where a window begins, counted through all files over the beginnings that have T ids behind them.
    With the ``packing`` "bos", windows begin where documents do, whatever the phase: see :mod:`accel_pretrain.packing`.
    """

    def __init__(self, split: TokenSplit, context_length: int, packing: Packing = "windows") -> None:
        self.context_length = context_length
        files = [file for file in split.files if file.size > context_length]
        if not files:
            longest = max([2, *(file.size for file in split.files)])
            raise DataError(
                f"{split.source}: {split.tokens:,} tokens are too few for one window of context_length + 1 = "
                f"{context_length + 1}; lower --context_length below {longest} or prepare more text"
            )
        self._views = [np.lib.stride_tricks.sliding_window_view(file, context_length + 1) for file in files]
        self._window_ends = np.cumsum([(file.size - 1) // context_length for file in files])
        self._start_ends = np.cumsum([view.shape[0] for view in self._views])
        self.count = int(self._window_ends[-1])
        self.starts = int(self._start_ends[-1])
        self._begins = self._packed(split) if packing == "bos" else None
        if self._begins is not None:
            self.count = self._begins.size

    def _packed(self, split: TokenSplit) -> np.ndarray:
        """The starts of all windows that begin with a document; DataError where nobody knows where documents end."""
        if split.document_ends is None:
            raise DataError(
                f"{split.source}: it is not known where its documents end, which data.packing bos goes by; "
                "write it with prep.tokenize, or type --packing windows"
            )
        known = [
            (file.size, ends)
            for file, ends in zip(split.files, split.document_ends, strict=True)
            if file.size > self.context_length
        ]
        firsts = [0, *self._start_ends[:-1].tolist()]
        parts = [packed_begins(size, ends, self.context_length) + at for (size, ends), at in zip(known, firsts, strict=True)]
        return np.concatenate(parts)

    def draw(self, key: int, numbers: np.ndarray) -> np.ndarray:
        """The starts of windows drawn with replacement."""
        if self._begins is None:
            return uniform(key, numbers, self.starts)
        return self._begins[uniform(key, numbers, self.count)]

    def starts_of(self, windows: np.ndarray, phases: np.ndarray | int = 0) -> np.ndarray:
        """Where each of N windows begins when cut at its phase."""
        if self._begins is not None:
            return self._begins[windows]
        files = np.searchsorted(self._window_ends, windows, side="right")
        first_window = np.concatenate(([0], self._window_ends))[files]
        first_start = np.concatenate(([0], self._start_ends))[files]
        starts = first_start + (windows - first_window) * self.context_length + phases
        return np.minimum(starts, self._start_ends[files] - 1)

    def read(self, starts: np.ndarray) -> np.ndarray:
        """The ids of the N windows that begin at ``starts``: int64 (N, T + 1)."""
        if len(self._views) == 1:
            return self._views[0][starts].astype(np.int64)
        out = np.empty((starts.size, self.context_length + 1), dtype=np.int64)
        files = np.searchsorted(self._start_ends, starts, side="right")
        if len(self._views) > _FEW_FILES:  # then a gather from each is dearer than a slice for each window
            places = starts - np.concatenate(([0], self._start_ends))[files]
            for row, file, place in zip(out, files.tolist(), places.tolist(), strict=True):
                row[:] = self._views[file][place]
            return out
        for file in np.unique(files):
            chosen = files == file
            out[chosen] = self._views[file][starts[chosen] - (self._start_ends[file - 1] if file else 0)]
        return out


class _Order:
    """Where each sample of one dataset begins: its own shuffle, epoch after epoch, or its own draws."""

    def __init__(self, windows: Windows, seed: int, sampling: Literal["shuffle", "random"]) -> None:
        self.windows, self.seed, self.sampling = windows, seed, sampling

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """The starts of samples in ascending order of their numbers."""
        if self.sampling == "random":
            return self.windows.draw(key_of(self.seed), numbers)
        epochs, ranks = np.divmod(numbers, self.windows.count)
        windows, phases = np.empty_like(numbers), np.empty_like(numbers)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            inside, key = epochs == epoch, key_of(self.seed, epoch)
            windows[inside] = Permutation(self.windows.count, key)(ranks[inside])
            phases[inside] = key % self.windows.context_length
        return self.windows.starts_of(windows, phases)


def numbers_of(positions: np.ndarray, left_out: Sequence[Sequence[int]]) -> np.ndarray:
    """The numbers of the samples that a run consumes at these positions, without the ranges ``[first, end)`` in ``left_out``.

    The ranges are ascending and do not overlap.
    """
    numbers = positions
    for first, end in left_out:
        numbers = np.where(numbers >= first, numbers + (end - first), numbers)
    return numbers


def turns_of(split: TokenSplit, context_length: int) -> Turns | MovingTurns | None:
    """Whose turn each sample of a mixture is; None for one dataset."""
    if not split.end_weights:
        return Turns(split.weights) if split.parts else None
    return MovingTurns(split.weights, split.end_weights, -(-split.end_tokens // context_length))


class TokenBatches:
    """The micro-batches of one process. Holds no position: every call says which samples it wants.

    Of a mixture, each dataset has an order and epochs of its own; ``samples_per_epoch`` are as many as it has windows in all.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        accumulation: int = 1,
        warmup: BatchWarmup | None = None,
        sampling: Literal["shuffle", "random"] = "shuffle",
        packing: Packing = "windows",
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        self.windows = Windows(split, context_length, packing)
        self.sampling = sampling
        self.samples_per_epoch = self.windows.count
        parts = [Windows(part, context_length, packing) for part in split.parts] or [self.windows]
        seeds = [seed, *(key_of(seed, part) for part in range(1, len(parts)))]  # the first is read as it would be alone
        self._parts = [_Order(windows, own, sampling) for windows, own in zip(parts, seeds, strict=True)]
        self._first_starts = np.cumsum([0, *(windows.starts for windows in parts)])
        self._turns = turns_of(split, context_length)
        micro_steps, rows = np.arange(accumulation)[:, None], np.arange(batch_size)
        self._samples_per_step = accumulation * world_size * batch_size
        self._warmup, self._per_micro_step = warmup, world_size * batch_size
        self._share = (micro_steps * world_size + rank) * batch_size + rows
        # Small updates are read several at a time, since a call of NumPy costs more than what it copies for one of them.
        ahead = _READ_AHEAD_BYTES // (8 * self._share.size * (context_length + 1))
        self._updates_ahead = max(1, min(ahead, self.samples_per_epoch // self._samples_per_step))
        self._ahead: list[list[Batch]] = []
        self._ahead_first = 0
        # The order is worked out for a block of samples at a time, which costs less per sample than one update at a time.
        self._block = min(max(self.samples_per_epoch, 256), 16384)
        self._orders: dict[int, np.ndarray] = {}
        self._left_out: tuple[tuple[int, ...], ...] = ()

    def leave_out(self, ranges: Sequence[Sequence[int]]) -> None:
        """From now on read no sample in these ranges ``[first, end)``: see :func:`numbers_of`."""
        self._left_out = tuple(tuple(pair) for pair in ranges)
        self._ahead, self._ahead_first = [], 0

    def numbers(self, first_sample: int) -> np.ndarray:
        """Which samples :meth:`micro_batches` gives: their numbers, int64 (micro-steps, batch size)."""
        share = self._share
        if self._warmup is not None:
            share = share[: self._warmup.size(first_sample) // self._per_micro_step]
        return numbers_of(first_sample + share, self._left_out)

    def micro_batches(self, first_sample: int) -> list[Batch]:
        """This process's micro-batches, in order, of the update that begins when ``first_sample`` samples were consumed."""
        update, odd = divmod(first_sample - self._ahead_first, self._samples_per_step)
        if odd or not 0 <= update < len(self._ahead):
            self._ahead, self._ahead_first, update = self._read_updates(first_sample), first_sample, 0
        return self._ahead[update]

    def _read_updates(self, first_sample: int) -> list[list[Batch]]:
        if self._warmup is not None and first_sample < self._warmup.over:
            return [self._read(self.numbers(first_sample)[None])[0]]
        begins = first_sample + np.arange(self._updates_ahead) * self._samples_per_step
        numbers = numbers_of(begins[:, None, None] + self._share, self._left_out)
        return self._read(numbers)

    def _read(self, numbers: np.ndarray) -> list[list[Batch]]:
        """The samples with these numbers: (updates, micro-steps, batch size)."""
        ids = torch.from_numpy(self.samples(numbers.ravel())).unflatten(0, numbers.shape)
        return [[Batch(ids_BS) for ids_BS in update] for update in ids]

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """The ids of the samples with these numbers: int64 (N, T + 1)."""
        if self.sampling == "random":
            return self.windows.read(self._starts(numbers))
        first, last = int(numbers.min()) // self._block, int(numbers.max()) // self._block
        starts = self._order(first) if first == last else np.concatenate([self._order(b) for b in range(first, last + 1)])
        return self.windows.read(starts[numbers - first * self._block])

    def _order(self, block: int) -> np.ndarray:
        """Where the window of each sample in a block begins; the newest two blocks are kept."""
        if block not in self._orders:
            numbers = np.arange(block * self._block, (block + 1) * self._block)
            while len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[block] = self._starts(numbers)
        return self._orders[block]

    def _starts(self, numbers: np.ndarray) -> np.ndarray:
        """The starts of samples, through the files of all datasets."""
        if self._turns is None:
            return self._parts[0].starts(numbers)
        turns, positions = self._turns(numbers)
        starts = np.empty_like(numbers)
        for part in np.unique(turns):
            own = turns == part
            starts[own] = self._first_starts[part] + self._parts[part].starts(positions[own])
        return starts
