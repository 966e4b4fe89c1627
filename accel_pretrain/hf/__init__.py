"""Weights and tokenizers of the Hugging Face world and older programs: ``python -m accel_pretrain.hf import | export``."""
