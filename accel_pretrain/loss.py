"""The loss of next-token prediction."""

from __future__ import annotations

import torch
from torch.nn import functional as F

IGNORE = -100  # a target that does not count


def next_token_loss(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over each sequence: float32 ``nats_B``.

    A sum per sequence, not a mean over the batch: the caller divides by the tokens of the whole update (or of the whole
    validation set), which is right for any split into micro-batches and processes, also when targets equal to ``IGNORE`` make
    their token counts unequal. ``targets_BT`` are already shifted: ``targets_BT[:, t]`` is what follows ``inputs_BT[:, t]``.
    """
    B, T = targets_BT.shape
    nats = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction="none")
    return nats.view(B, T).sum(dim=1)
