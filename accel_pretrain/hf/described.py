"""What is known of a folder of weights before any tensor of it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from accel_pretrain.hf.family import Link
from accel_pretrain.models import ModelConfig


def nothing(name: str) -> bool:
    """No tensor is to be ignored."""
    return False


@dataclass(frozen=True)
class Described:
    """The ``format``, for people; the model; where its tensors are; and which tensors mean nothing, as saved masks do."""

    format: str
    config: ModelConfig
    links: list[Link]
    ignored: Callable[[str], bool] = nothing
