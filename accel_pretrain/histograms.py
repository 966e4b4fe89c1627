"""Histograms of tensors, whole or shared out among processes, and the trackers that draw them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from accelerate.tracking import GeneralTracker

BINS = 64
DRAWN_BY = ("wandb", "tensorboard")


@dataclass(frozen=True)
class Histogram:
    """How many of ``count`` finite values lie in each bin: ``counts``, int64 (bins,), between ``edges``, (bins + 1,)."""

    counts: np.ndarray
    edges: np.ndarray
    total: float
    squares: float

    @property
    def count(self) -> int:
        return int(self.counts.sum())


@torch.no_grad()
def histogram_of(values: torch.Tensor, *, shared: bool = False, scale: float = 1.0) -> Histogram:
    """The histogram of all finite values, divided by ``scale``; waits for the device.

    ``shared``: each process has some of the values, and calling this is collective.
    """
    values = values.float().flatten() / scale
    values = values[torch.isfinite(values)]
    ends = torch.tensor([-torch.inf, -torch.inf], device=values.device)  # minus the least, and the most
    if values.numel():
        ends = torch.stack([-values.min(), values.max()])
    sums = torch.stack([values.double().sum(), values.double().square().sum()]) if values.device.type != "mps" else None
    sums = torch.stack([values.sum(), values.square().sum()]) if sums is None else sums
    if shared:
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        dist.all_reduce(sums)
    low, high = -float(ends[0]), float(ends[1])
    if not low <= high:  # no value anywhere
        low = high = 0.0
    width = max(high - low, 1e-12 * max(abs(low), abs(high)), 1e-30)
    bins = ((values - low) / width * BINS).long().clamp(0, BINS - 1)
    counts = torch.bincount(bins, minlength=BINS)
    if shared:
        dist.all_reduce(counts)
    total, squares = sums.tolist()
    return Histogram(counts.cpu().numpy(), low + width * np.arange(BINS + 1) / BINS, total, squares)


def track_histograms(tracker: GeneralTracker, step: int, histograms: Mapping[str, Histogram]) -> None:
    """Give histograms to a tracker that draws them; the others get nothing."""
    name, inner = getattr(tracker, "name", ""), getattr(tracker, "tracker", None)
    if name == "wandb":
        import wandb

        drawn = {key: wandb.Histogram(np_histogram=(own.counts, own.edges)) for key, own in histograms.items()}
        tracker.log(drawn, step=step)
    elif name == "tensorboard" and inner is not None:
        for key, own in histograms.items():
            inner.add_histogram_raw(
                key, min=float(own.edges[0]), max=float(own.edges[-1]), num=own.count, sum=own.total,
                sum_squares=own.squares, bucket_limits=own.edges[1:].tolist(), bucket_counts=own.counts.tolist(),
                global_step=step,
            )  # fmt: skip
