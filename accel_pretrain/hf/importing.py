"""Weights of others as a checkpoint of ours: one tensor at a time, checked, and published as any checkpoint is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from accel_pretrain.checkpoint import WEIGHTS, CheckpointConfig, write_model_description
from accel_pretrain.config import RunConfig
from accel_pretrain.errors import CheckpointError, ConfigError, refuse
from accel_pretrain.files import expanded
from accel_pretrain.hf.convert import Shapes, links_by_ours, read_ours
from accel_pretrain.hf.described import Described
from accel_pretrain.hf.families import FAMILIES
from accel_pretrain.hf.family import SOURCE, Family, names_of
from accel_pretrain.hf.foreign import describe_foreign
from accel_pretrain.hf.tensor_map import parsing, read_json
from accel_pretrain.hf.tokenizers import read_hf_tokenizer
from accel_pretrain.hf.verify import compare_with_transformers, has_transformers
from accel_pretrain.hf.weight_files import TensorEntry, WeightFiles, open_weights, write_safetensors
from accel_pretrain.models import ModelConfig
from accel_pretrain.publish import publish_weights
from accel_pretrain.tokenizer import Tokenizer, load_tokenizer
from accel_pretrain.typed_yaml import option, to_yaml

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # masks and tables that old versions saved as weights
_OTHER_SENSES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_LONGEST_CONTEXT, _MOST_LAYERS = 1 << 24, 1 << 12
_SMALL_FILES = ["*.json", "*.txt", "tokenizer.model"]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What to import, and where to."""

    source: str | None = option(None, "a folder or file of weights, or a model id of the Hugging Face hub")
    out: Path | None = option(None, "the run directory to write; it must not hold checkpoints")
    tokenizer: str | None = option(
        None, "where the source has none: gpt2, bytes, a .tiktoken file, a folder; null: the source's"
    )
    eos: str | None = option(None, "the token that ends a text, where the source does not say it")
    context_length: int | None = option(None, "positions to keep; null: all that the model was made for")
    pad_vocab_to_multiple_of: int = option(1, "round the vocabulary up by rows that are never drawn (64 or 128 train faster)")
    revision: str | None = option(None, "branch, tag or commit of a hub id; null: its main branch")
    verify: bool = option(True, "compare logits with transformers, if that is installed and has the architecture")

    def __post_init__(self) -> None:
        refuse(
            (
                self.pad_vocab_to_multiple_of < 1,
                f"pad_vocab_to_multiple_of: must be at least 1, got {self.pad_vocab_to_multiple_of}",
            ),
            (self.context_length is not None and self.context_length < 1, "context_length: must be at least 1"),
        )


def import_weights(config: ImportConfig, say: Callable[[str], None]) -> Path:
    """Write ``out/checkpoint_00000000``, which trains on (``--init_from``), evaluates and samples; returns its path.

    Raises :class:`CheckpointError` when the source cannot be read or is not an architecture of ours; ``out`` is then as before.
    """
    if config.source is None or config.out is None:
        raise ConfigError("type: python -m accel_pretrain.hf import SOURCE -o RUN")
    source = find_source(config.source, config.revision)
    with open_weights(source) as weights:
        described = describe(source, weights)
        model = _fitted(described.config, config)
        tokenizer = find_tokenizer(source, config, described.config)
        say(f"{config.source}: {described.format}, {_count(names_of(described.config)):,} parameters")

        def write(folder: Path) -> None:
            write_weights(folder / WEIGHTS, weights, described, model)
            assert model.vocab_size is not None
            write_model_description(folder, model, model.vocab_size)
            assert config.out is not None
            run = RunConfig(model=model, checkpoint=CheckpointConfig(checkpoint_dir=config.out))
            (folder / "config.yaml").write_text(to_yaml(run), encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save(folder / "tokenizer")
            if (source / "config.json").is_file():
                (folder / SOURCE).write_text(json.dumps(_how_it_generates(source), indent=2) + "\n", encoding="utf-8")
            if config.verify and (source / "config.json").is_file() and has_transformers():
                difference = compare_with_transformers(folder, source)
                say(f"Logits equal those of transformers: they differ by at most {difference:.1e}")

        checkpoint = publish_weights(config.out, write)
    if tokenizer is None:
        say("The source has no tokenizer: name one with --tokenizer (gpt2, a folder, ...) here, or when you sample")
    return checkpoint


def _how_it_generates(source: Path) -> dict[str, dict[str, object]]:
    """What a folder says of its special tokens and of sampling, so that an export can say it again."""
    keys = read_json(source / "config.json")
    generation = source / "generation_config.json"
    return {
        "config": {name: keys[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in keys},
        "generation_config": read_json(generation) if generation.is_file() else {},
    }


# ------------------------------------------------------------------------------------------------------------- the source


def find_source(source: str, revision: str | None) -> Path:
    """A local path, or a hub id that is downloaded into the hub's own cache (or found there without a network)."""
    path = expanded(source)
    if path.exists() or path.with_name(path.name + ".index").exists():
        return path
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"{path.absolute()} does not exist")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{path.absolute()} does not exist; if {source} is a model id of the Hugging Face hub, "
            "type: pip install 'accel_pretrain[hf]'"
        ) from None
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*_SMALL_FILES, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*_SMALL_FILES, "pytorch_model*.bin"]))
    except Exception as error:  # the hub's client lets many libraries' errors through
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{source} is not a local folder, and could not be had from the hub: {reason}") from None
    return folder


def describe(source: Path, weights: WeightFiles) -> Described:
    """Which architecture the weights are of, and where each parameter is. Every tensor must be accounted for."""
    found = describe_foreign(weights)
    if found is None:
        folder = source if source.is_dir() else source.parent
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} holds no config.json, and the names in {source} are of no format known here")
        with parsing(folder / "config.json"):
            found = _describe_hf(read_json(folder / "config.json"), weights)
    shapes = names_of(found.config)
    used = {link.theirs for link in links_by_ours(found.links, shapes).values()}
    if missing := sorted(name for name in used if name not in weights):
        raise CheckpointError(
            f"{source}: {missing[0]} is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    if left := sorted(name for name in weights if name not in used and not found.ignored(name)):
        raise CheckpointError(f"{source}: {left[0]} is not part of a {found.format}; there are {len(left)} such tensors")
    if odd := next((name for name in used if weights.dtype(name) not in _FLOATS), None):
        raise CheckpointError(f"{source}: {odd} is stored as {weights.dtype(odd)}; quantised weights are not supported")
    return found


_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _describe_hf(keys: dict[str, object], weights: WeightFiles) -> Described:
    text = keys.get("text_config")
    if keys.get("model_type") == "gemma3" and isinstance(text, dict):  # with eyes; we take what reads
        keys = {**text, "model_type": "gemma3_text"}
    if keys.get("quantization_config"):
        raise CheckpointError("config.json: quantised weights (quantization_config) are not supported; name the original model")
    family = _family(str(keys.get("model_type")))
    config = family.read_config(keys)
    if config.context_length > _LONGEST_CONTEXT or config.num_layers > _MOST_LAYERS:
        raise CheckpointError(
            f"config.json: more than {_LONGEST_CONTEXT:,} positions or {_MOST_LAYERS:,} layers are not supported"
        )
    links = family.links(config, list(names_of(config)))
    renamed = next((change for change in _PREFIXES if change(links[0].theirs) in weights), _PREFIXES[0])
    links = [link._replace(theirs=renamed(link.theirs)) for link in links]
    head = () if not config.tie_embeddings else (renamed("lm_head.weight"), "lm_head.weight")

    def ignored(name: str) -> bool:
        return name.endswith(_BUFFERS) or name.startswith(_OTHER_SENSES) or name in head

    return Described(f"{family.model_type} of transformers", config, links, ignored)


# How saved names differ from those of today's class: not at all, without the class's prefix, or inside a model with eyes.
_PREFIXES: Sequence[Callable[[str], str]] = (
    lambda name: name,
    lambda name: name.removeprefix("transformer.").removeprefix("model."),
    lambda name: f"language_model.{name}",
    lambda name: name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name,
)


def _family(model_type: str) -> Family:
    family = next((family for family in FAMILIES if family.model_type == model_type), None)
    if family is None:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise CheckpointError(f"config.json: model_type {model_type} is not one of {known}")
    return family


def find_tokenizer(source: Path, config: ImportConfig, model: ModelConfig) -> Tokenizer | None:
    """The tokenizer that was named, or the one in the source, if it has any. It must fit the model's vocabulary."""
    folder = source if source.is_dir() else source.parent
    files = ("tokenizer.json", "vocab.json", "encoder.json")
    if config.tokenizer is not None:
        named = expanded(config.tokenizer)
        of_others = named.is_dir() and any((named / name).is_file() for name in files) and not (named / "spec.json").is_file()
        tokenizer = read_hf_tokenizer(named, config.eos) if of_others else load_tokenizer(config.tokenizer)
    elif any((folder / name).is_file() for name in files):
        tokenizer = read_hf_tokenizer(folder, config.eos)
    else:
        return None
    assert model.vocab_size is not None
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} ids, the model only {model.vocab_size:,}; "
            "name the model's own with --tokenizer"
        )
    return tokenizer


# ------------------------------------------------------------------------------------------------------------ the weights


def _fitted(described: ModelConfig, config: ImportConfig) -> ModelConfig:
    """The model as it will be stored: its vocabulary padded, its context cut."""
    assert described.vocab_size is not None
    multiple = config.pad_vocab_to_multiple_of
    model = replace(described, vocab_size=-(-described.vocab_size // multiple) * multiple)
    if config.context_length is None:
        return model
    if config.context_length > model.context_length:
        raise CheckpointError(f"context_length: the model was made for {model.context_length} positions")
    if model.rope_scaling == "llama3" and model.rope_original_context is None:
        model = replace(model, rope_original_context=round(model.original_context))
    return replace(model, context_length=config.context_length)


def write_weights(path: Path, weights: WeightFiles, described: Described, model: ModelConfig) -> None:
    """Write our parameters in float32. Rows that pad the vocabulary are the mean of the others.

    Zeros would not do: real logits are often far below zero, and a row of zeros, whose logit is zero, would take all
    probability. A mean row is as unlikely as an average token. Raises :class:`CheckpointError` for weights that are not finite.
    """
    shapes, stored = names_of(described.config), names_of(model)
    links = links_by_ours(described.links, shapes)

    def read(name: str) -> torch.Tensor:
        tensor = read_ours(name, links, shapes, weights.read).float()
        if not tensor.isfinite().all():
            raise CheckpointError(f"{weights.where(links[name].theirs)}: {links[name].theirs} holds NaN or infinity")
        missing = stored[name][0] - tensor.shape[0]
        if missing > 0:
            tensor = torch.cat((tensor, tensor.mean(dim=0, keepdim=True).expand(missing, -1)))
        return tensor[: stored[name][0]].contiguous()

    write_safetensors(path, [TensorEntry(name, torch.float32, shape) for name, shape in stored.items()], read)


def _count(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())
