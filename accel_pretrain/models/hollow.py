"""A model without values, which takes no memory: to count its parameters, or to be filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from accel_pretrain.models.config import ModelConfig
from accel_pretrain.models.transformer import Transformer


class _LeaveUnset(TorchFunctionMode):
    """Skips the functions of ``torch.nn.init``, which on "meta" set nothing, in ten milliseconds for each tensor."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def hollow(config: ModelConfig, vocab_size: int) -> Transformer:
    """The Transformer of this shape on the "meta" device."""
    with torch.device("meta"), _LeaveUnset():
        return Transformer(config, vocab_size)
