"""Under autocast: what has many readers is cast once, for all of them."""

from __future__ import annotations

import torch


def for_products(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype in which matrices are multiplied: autocast's where it is on.

    Autocast would do the same for each product by itself, and keep each copy until the backward pass.
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
