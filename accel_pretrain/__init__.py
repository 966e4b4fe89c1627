"""Pretrain language models with HuggingFace Accelerate. Import the modules; this file imports nothing."""

__version__ = "0.1.0"
