"""A checkpoint of ours as a folder that transformers and everything built on it loads, with no code of ours."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from accel_pretrain.checkpoint import WEIGHTS, read_model_config, read_tokenizer
from accel_pretrain.commit import resolve
from accel_pretrain.errors import CheckpointError, ConfigError, refuse
from accel_pretrain.files import sync_folder
from accel_pretrain.hf.convert import read_theirs, theirs_shape
from accel_pretrain.hf.families import FAMILIES
from accel_pretrain.hf.family import SOURCE, Family, Link, names_of
from accel_pretrain.hf.tensor_map import read_json
from accel_pretrain.hf.tokenizers import check_with_transformers, write_hf_tokenizer
from accel_pretrain.hf.verify import compare_with_transformers, has_transformers
from accel_pretrain.hf.weight_files import TensorEntry, open_weights, write_sharded
from accel_pretrain.models import ModelConfig
from accel_pretrain.tokenizer import Tokenizer, load_tokenizer
from accel_pretrain.typed_yaml import option

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export, and how."""

    checkpoint: Path | None = option(None, "a run directory (its newest), a checkpoint folder, or a run's latest or best")
    out: Path | None = option(None, "the folder to write; it must not exist, or be empty")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of the weights: float32 | bfloat16 | float16")
    tokenizer: str | None = option(None, "for a run on a bare file of ids; null: the run's own")
    without_tokenizer: bool = option(False, "write only the model")
    trim_vocab: bool = option(False, "leave out the rows beyond the tokenizer's ids, which only pad the vocabulary")
    max_shard_gb: float = option(5.0, "gigabytes per file of weights")

    def __post_init__(self) -> None:
        refuse((not self.max_shard_gb > 0, f"max_shard_gb: must be positive, got {self.max_shard_gb}"))


def export(config: ExportConfig, say: Callable[[str], None]) -> Path:
    """Write ``out``: weights, config.json, generation_config.json and the tokenizer; returns it.

    The folder gets its name only after transformers has loaded it and given our logits. Raises :class:`CheckpointError` when no
    architecture of transformers can hold the model, and says what of it none has.
    """
    if config.checkpoint is None or config.out is None:
        raise ConfigError("type: python -m accel_pretrain.hf export --checkpoint RUN -o DIR")
    out = Path(os.path.abspath(config.out))
    if not has_transformers():
        raise ConfigError(
            "an export is compared with transformers before it is published; type: pip install 'accel_pretrain[hf]'"
        )
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(f"out: {out} exists already; name a new folder")
    checkpoint = resolve(config.checkpoint)
    stored = read_model_config(checkpoint)
    tokenizer = _tokenizer(config, checkpoint)
    model = _trimmed(stored, tokenizer) if config.trim_vocab else stored
    family = choose_family(model)
    temporary = out.with_name(f".tmp_{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_folder(temporary, checkpoint, family, model, tokenizer, _DTYPES[config.dtype], int(config.max_shard_gb * 1e9))
        if tokenizer is not None:
            _check_tokenizer(tokenizer, temporary)
        difference = compare_with_transformers(checkpoint, temporary, _DTYPES[config.dtype])
        if out.exists():
            out.rmdir()
        temporary.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{out}: {family.architecture}, {config.dtype}; logits differ from the checkpoint's by at most {difference:.1e}")
    if tokenizer is None:
        say("It holds no tokenizer" + ("" if config.without_tokenizer else ": name one with --tokenizer gpt2, or a folder"))
    return out


def choose_family(config: ModelConfig) -> Family:
    """The first family that can hold the config exactly; raises :class:`CheckpointError` with what the nearest one lacks."""
    differences: dict[Family, list[str]] = {}
    for family in FAMILIES:
        with contextlib.suppress(CheckpointError):  # what cannot even be written down is not near
            differences[family] = family.differences(config)
    known = ", ".join(family.model_type for family in FAMILIES)
    if not differences:
        raise CheckpointError(f"transformers has no architecture for this model: none of {known} is near")
    nearest = min(differences, key=lambda family: len(differences[family]))
    if differences[nearest]:
        raise CheckpointError(
            f"transformers has no architecture for this model: {nearest.model_type}, the nearest of {known}, "
            f"has no {', '.join(differences[nearest])}"
        )
    return nearest


def write_folder(
    folder: Path, checkpoint: Path, family: Family, model: ModelConfig, tokenizer: Tokenizer | None, dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:  # fmt: skip
    """Everything that the exported folder holds, one tensor in memory at a time."""
    eot_id = None if tokenizer is None else tokenizer.eot_id
    shapes = names_of(model)
    links: dict[str, Link] = {link.theirs: link for link in family.links(model, list(shapes))}
    entries = [TensorEntry(name, dtype, theirs_shape(link, shapes)) for name, link in links.items()]
    with open_weights(checkpoint / WEIGHTS) as weights:

        def read_ours(name: str) -> torch.Tensor:
            return weights.read(name)[: shapes[name][0]]

        write_sharded(folder, entries, lambda name: read_theirs(links[name], shapes, read_ours).to(dtype), max_shard_bytes)
    # transformers 5 calls it dtype, 4 and the servers built on it torch_dtype
    named = {"dtype": str(dtype).removeprefix("torch."), "torch_dtype": str(dtype).removeprefix("torch.")}
    source = read_json(checkpoint / SOURCE) if (checkpoint / SOURCE).is_file() else {}
    bos_id = eot_id if tokenizer is None or tokenizer.bos_id is None else tokenizer.bos_id
    own = {**family.write_config(model, eot_id), "bos_token_id": bos_id}
    _write_json(folder / "config.json", {**own, **source.get("config", {}), **named})
    generation = {"bos_token_id": bos_id, "eos_token_id": eot_id, "do_sample": True}
    _write_json(folder / "generation_config.json", source.get("generation_config") or generation)
    if tokenizer is not None:
        write_hf_tokenizer(tokenizer, folder, context_length=model.context_length)


def _tokenizer(config: ExportConfig, checkpoint: Path) -> Tokenizer | None:
    if config.without_tokenizer:
        return None
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    return read_tokenizer(checkpoint) if (checkpoint / "tokenizer").is_dir() else None


def _check_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    try:
        check_with_transformers(tokenizer, folder)
    except CheckpointError as error:
        raise CheckpointError([*error.problems, "to export without a tokenizer, type --without_tokenizer"]) from None


def _trimmed(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    if tokenizer is None:
        raise ConfigError("trim_vocab: without a tokenizer nobody knows which rows are padding; name one with --tokenizer")
    assert config.vocab_size is not None
    return replace(config, vocab_size=min(config.vocab_size, tokenizer.vocab_size))


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
