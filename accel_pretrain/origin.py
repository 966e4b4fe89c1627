"""``checkpoint.init_from``: the checkpoint whose weights a new run begins with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from accel_pretrain.checkpoint import CheckpointConfig, read_model
from accel_pretrain.commit import find_newest, resolve
from accel_pretrain.config import Splits
from accel_pretrain.errors import CheckpointError, ConfigError
from accel_pretrain.files import expanded
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.tokenizer import load_tokenizer
from accel_pretrain.typed_yaml import to_plain


def find_origin(config: CheckpointConfig) -> Path:
    """The checkpoint that ``init_from`` means; once the run has one of its own, that will do too."""
    assert config.init_from is not None
    try:
        return resolve(expanded(config.init_from))
    except CheckpointError:
        own = find_newest(config.checkpoint_dir)
        if own is None:
            raise
        return own


def refuse_other_shape(origin: str, wanted: ModelConfig, shape: ModelConfig) -> None:
    """Raise :class:`ConfigError` where the config asks for another shape than that of the weights to begin with."""
    free = {"dropout", "init_std", "zero_init", "mup_base_width", "context_length"}
    now, there = to_plain(wanted), to_plain(shape)
    problems = [
        f"model.{key}: {origin} has {there[key]}, this config says {now[key]}"
        for key in there
        if now[key] != there[key] and key not in free
    ]
    if wanted.position == "learned" and wanted.context_length > shape.context_length:
        problems.append(f"model.context_length: {origin} has only {shape.context_length} positions")
    if problems:
        raise ConfigError([*problems, "leave these out: the shape is the one of init_from"])


def weights_of(origin: Path, module: Transformer, splits: Splits) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a checkpoint for a new model; positions that it has no use for are left out."""
    own, trained = origin / "tokenizer", splits.train.tokenizer
    if own.is_dir() and trained and load_tokenizer(own).fingerprint != trained["fingerprint"]:
        raise ConfigError(
            f"data.train_data_path: made with the tokenizer {trained['name']}, but {origin} knows another; "
            f"tokenize the text again: python -m prep.tokenize SRC... --tokenizer {own}"
        )
    for name, weight in read_model(origin).state_dict().items():  # mapped from the file
        yield name, weight[: module.config.context_length] if name == "embed_positions.weight" else weight
