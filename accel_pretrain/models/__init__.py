"""The architectures that can be trained. One hand-written Transformer covers the decoder-only family."""

from accel_pretrain.models.config import ModelConfig
from accel_pretrain.models.hollow import hollow
from accel_pretrain.models.transformer import Transformer

__all__ = ["ModelConfig", "Transformer", "hollow"]
