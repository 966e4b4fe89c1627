"""Documents in a window: each begins with the end-of-text id, and none sees another.

So a window of several documents gives every token the loss that it has when its document stands alone, and positions begin
again at 0. The end-of-text id counts to the document that it begins: what comes first in a text is predicted from it alone.
"""

from __future__ import annotations

import torch


def begins_of_documents(tokens_BT: torch.Tensor, begin_id: int) -> torch.Tensor:
    """Where in the window the document of each token begins: int64 (B, T). What comes before the first begin_id begins at 0."""
    places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    return torch.where(tokens_BT == begin_id, places_T, 0).cummax(dim=1).values


def visible_in_documents(begins_BT: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which keys a query sees, bool (B, 1, T, T): those of its own document up to itself, at most ``window`` of them."""
    T = begins_BT.shape[1]
    keys_T = torch.arange(T, device=begins_BT.device)
    queries_T1 = keys_T.unsqueeze(1)
    first_BT1 = begins_BT.unsqueeze(2)
    if window is not None:
        first_BT1 = torch.maximum(first_BT1, queries_T1 - window + 1)
    return ((keys_T <= queries_T1) & (keys_T >= first_BT1)).unsqueeze(1)
