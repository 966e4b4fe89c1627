"""The architectures that can be trained. One hand-written Transformer covers the decoder-only family."""

from accel_pretrain.models.transformer import ModelConfig, Transformer

__all__ = ["ModelConfig", "Transformer"]
