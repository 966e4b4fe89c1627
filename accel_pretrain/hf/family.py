"""What a family of models is: a translation of configs and of tensor names, each in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from accel_pretrain.errors import CheckpointError
from accel_pretrain.models import ModelConfig, hollow
from accel_pretrain.typed_yaml import from_mapping

Keys = Mapping[str, Any]
SOURCE = "hf_source.json"  # in an imported checkpoint: what its source said of special tokens and sampling


class Link(NamedTuple):
    """One tensor of theirs: ours, one below the other, transposed where they store (in, out) instead of (out, in).

    With ``groups``, each of ours is cut into as many pieces, and the first pieces of all come before the second ones.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Family:
    """One ``model_type`` of transformers.

    ``defaults`` are what its config class takes for absent keys. A family with ``zero_biases`` always has biases, and holds a
    model without any by zeros.
    """

    model_type: str
    architecture: str
    defaults: Keys
    from_hf: Callable[[Keys], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    links: Callable[[ModelConfig, list[str]], list[Link]]
    zero_biases: bool = False

    def read_config(self, keys: Keys) -> ModelConfig:
        """The config that a ``config.json`` describes; raises :class:`CheckpointError` with all that we do not have."""
        return self.from_hf({**self.defaults, "model_type": self.model_type, **keys})

    def write_config(self, config: ModelConfig, eot_id: int | None = None) -> dict[str, Any]:
        """The content of ``config.json``; ``eot_id`` is the token that ends a text, and begins one. No token is padding."""
        ends = {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": None}
        return {"model_type": self.model_type, "architectures": [self.architecture], **self.to_hf(config), **ends}

    def differences(self, config: ModelConfig) -> list[str]:
        """What of a config this family cannot express, as ``key: value``; empty if it can hold it exactly.

        Raises :class:`CheckpointError` when it cannot even be written down.
        """
        own, again = canonical(config), canonical(self.read_config(self.write_config(config)))
        names = [field.name for field in dataclasses.fields(own) if getattr(own, field.name) != getattr(again, field.name)]
        ignored = _BIASES if self.zero_biases and not (own.bias or own.qkv_bias) else ()
        return [f"{name}: {getattr(own, name)}" for name in names if name not in ignored]


_BIASES = ("bias", "qkv_bias")


def canonical(config: ModelConfig) -> ModelConfig:
    """The same function, spelled in one way: nulls resolved, and what has no effect, or only on training, at its default."""
    slides = [config.slides(layer) for layer in range(config.num_layers)]
    own_theta = any(slides) and config.sliding_rope_theta is not None
    config = replace(
        config,
        num_kv_heads=config.kv_heads, head_dim=config.head_width, d_ff=config.ff_width, qkv_bias=config.has_qkv_bias,
        query_pre_attn_scalar=config.query_pre_attn_scalar or float(config.head_width),
        sliding_window=config.sliding_window if any(slides) else None,
        window_pattern="".join("S" if slide else "F" for slide in slides) if any(slides) else "S",
        sliding_rope_theta=config.sliding_rope_theta if own_theta else None,
        dropout=0.0, init_std=0.0, zero_init=False, mup_base_width=None,
    )  # fmt: skip
    without: dict[str, Any] = {name: getattr(ModelConfig(), name) for name in ROPE_OPTIONS}
    if config.position == "learned":
        return replace(config, rope_theta=ModelConfig().rope_theta, rope_scaling="none", sliding_rope_theta=None, **without)
    if config.sliding_rope_theta == config.rope_theta and config.rope_scaling == "none":
        config = replace(config, sliding_rope_theta=None)
    if config.rope_scaling == "llama3":
        return replace(config, rope_original_context=round(config.original_context))
    return replace(config, **without | ({"rope_factor": config.rope_factor} if config.rope_scaling == "linear" else {}))


ROPE_OPTIONS = ("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context")


def names_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all our parameters. ``vocab_size`` must be known."""
    assert config.vocab_size is not None
    model = hollow(config, config.vocab_size)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def require(family: str, keys: Keys, **allowed: tuple[Any, ...]) -> None:
    """Raise one error with every key whose value we have nothing for."""
    odd = [
        f"{family}: {name} {keys.get(name)!r} is not supported, only {' or '.join(map(repr, values))}"
        for name, values in allowed.items()
        if keys.get(name) not in values
    ]
    if odd:
        raise CheckpointError(odd)


def model_config(**options: Any) -> ModelConfig:
    """A :class:`ModelConfig` from values that come from a file, checked for their types."""
    return from_mapping(ModelConfig, options, "config.json")
