"""What would make a process slow now and then, or more and more: garbage collections, and numbers that are almost 0."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def few_collections() -> Iterator[None]:
    """Keep what exists now, some 10^5 objects, out of Python's garbage collections: each would take 0.2 s, now and then."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def tiny_is_zero() -> Iterator[None]:
    """Let float32 numbers below 1.2e-38 count as 0 where a CPU computes, as they do on GPUs.

    Adam's averages for a token that does not come again end among them, and a processor takes ten to twenty times as long for
    such a number. PyTorch's threads inherit this when they are made: so it comes before the first computation of a process.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
