"""Where windows begin that respect documents. Torch-free; one number per window is all that is kept.

``data.packing bos``: a window begins with the end-of-text id before a document (with the first id of the file, for the first
document), so that the model never has to guess what the middle of a text is about. A document that is longer than a window goes
on in the next ones; one that is cut by the end of a window in which it began is read again from its beginning, by the next
window. So every token is read at least once, but for less than a window at the end of each file, and some are read twice.
nanochat crops instead, and loses what was cut; its gain is the same: every window begins where a text does.
"""

from __future__ import annotations

import numpy as np


def packed_begins(size: int, document_ends: np.ndarray, context_length: int) -> np.ndarray:
    """Where the windows of T + 1 ids begin in a file of ``size`` ids whose documents end before ``document_ends``: int64."""
    T = context_length
    inner = document_ends.astype(np.int64) - 1  # the end-of-text id belongs to both: it ends one document and begins the next
    starts = np.concatenate(([0], inner[(inner > 0) & (inner < size - 1)], [size]))
    more = (np.diff(starts) - 1) // T  # windows that a document fills from its beginning on, besides the one that it leaves
    following = np.searchsorted(starts, starts[:-1] + (more + 1) * T, side="right") - 1
    chain, hop, document = [], memoryview(following), 0  # pyright: ignore[reportArgumentType]
    while document < len(more):
        chain.append(document)
        document = hop[document]
    visited = np.array(chain, dtype=np.int64)
    counts = more[visited] + 1
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.repeat(starts[visited], counts) + within * T
    return begins[begins + T < size]
