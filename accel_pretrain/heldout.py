"""On which tokens a trained model is measured, and whether its numbers on them would mean anything."""

from __future__ import annotations

from pathlib import Path

from accel_pretrain.config import RunConfig
from accel_pretrain.errors import ConfigError
from accel_pretrain.mixture import are_there, paths_of
from accel_pretrain.models import Transformer
from accel_pretrain.shards import TokenSplit, splits_in
from accel_pretrain.tokenizer import load_tokenizer
from accel_pretrain.typed_yaml import load


def recorded_data(checkpoint: Path, split: str) -> tuple[Path | tuple[Path, ...] | None, str | None]:
    """Path, or paths, and dtype of what the run's own config names for a split."""
    recorded = load(RunConfig, checkpoint / "config.yaml").data
    path = recorded.val_data_path if split == "val" and recorded.val_data_path else recorded.train_data_path
    return path, recorded.dtype


def find_data(checkpoint: Path, split: str) -> tuple[Path | tuple[Path, ...], str | None]:
    """The same, if it is here; ConfigError otherwise."""
    path, dtype = recorded_data(checkpoint, split)
    if path is None or not are_there(path) or (split not in ("train", "val") and not any(map(splits_in, paths_of(path)))):
        raise ConfigError(
            f"source.data: the {split} split that {checkpoint} was made with ({path}) is not here; type --data DIR"
        )
    return path, dtype


def misfits(model: Transformer, checkpoint: Path, split: TokenSplit) -> list[str]:
    """Why this model's loss on these tokens would not mean anything."""
    problems, own = [], checkpoint / "tokenizer"
    if split.tokenizer and own.is_dir() and load_tokenizer(own).fingerprint != split.tokenizer["fingerprint"]:
        problems.append(
            f"source.data: {split.source} was made with another tokenizer ({split.tokenizer['name']}) than the model's; "
            f"tokenize the text again: python -m prep.tokenize SRC... --tokenizer {own}"
        )
    if split.max_id >= model.vocab_size:
        problems.append(
            f"source.data: {split.source} holds token id {split.max_id}, the model knows ids below {model.vocab_size}"
        )
    return problems
