"""Documents in a window: each begins with the end-of-text id, and none sees another.

So a window of several documents gives every token the loss that it has when its document stands alone, and positions begin
again at 0. The end-of-text id counts to the document that it begins: what comes first in a text is predicted from it alone.

On a CPU the mask is a tensor, which PyTorch's kernel reads besides what it computes. On an NVIDIA GPU it is a list of blocks
(:func:`blocks_in_documents`), of which flex attention leaves out those that nobody sees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


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


def blocks_in_documents(begins_BT: torch.Tensor, window: int | None) -> BlockMask:
    """The same as :func:`visible_in_documents`, for :func:`block_attention`."""

    def sees(b: torch.Tensor, _h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = (key <= query) & (key >= begins_BT[b, query])
        return own if window is None else own & (key > query - window)

    B, T = begins_BT.shape
    return create_block_mask(sees, B, None, T, T, device=begins_BT.device)


def block_attention(
    q_BHTE: torch.Tensor, k_BGTE: torch.Tensor, v_BGTE: torch.Tensor, blocks: BlockMask, *, scale: float, softcap: float | None
) -> torch.Tensor:
    """Averages of the values that each query sees: (B, H, T, E)."""

    def cap(score: torch.Tensor, *_place: torch.Tensor) -> torch.Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    grouped = k_BGTE.shape[1] != q_BHTE.shape[1]
    score_mod = None if softcap is None else cap
    return kernel()(q_BHTE, k_BGTE, v_BGTE, score_mod=score_mod, block_mask=blocks, scale=scale, enable_gqa=grouped)


@functools.cache
def kernel() -> Callable[..., torch.Tensor]:
    """Flex attention as one kernel: without torch.compile it would keep all scores."""
    return torch.compile(flex_attention, dynamic=False)
