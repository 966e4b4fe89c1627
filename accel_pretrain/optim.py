"""The optimizers: each a frozen dataclass that knows how to build itself for a model. The union is the list of choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from accel_pretrain.errors import refuse
from accel_pretrain.muon import muon_rule
from accel_pretrain.rules import ByRules, adamw_rule
from accel_pretrain.typed_yaml import option

_LR_ALIASES = ("learning_rate",)
_SAME: Mapping[str, float] = {}
_SAME_RULE: Mapping[str, dict[str, Any]] = {}
_EMBEDDING_DOC = "what lr is multiplied by for token, position and value embeddings"
_HEAD_DOC = "what lr is multiplied by for an output matrix that is not tied"


def kind_of(name: str, parameter: torch.Tensor) -> str:
    """What a parameter is, by its name in the model: vector, gate, embedding, head or matrix."""
    if parameter.ndim < 2:
        return "vector"
    if name.endswith("value_embedding.gate.weight"):
        return "gate"  # begins at 0, and has a row per head
    if "embed" in name:
        return "embedding"  # a tied one is the output matrix, too
    return "head" if name.startswith("lm_head") else "matrix"


def decay_groups(
    model: nn.Module,
    weight_decay: float,
    lr: float | None = None,
    scales: Mapping[str, float] = _SAME,
    rules: Mapping[str, dict[str, Any]] = _SAME_RULE,
) -> list[dict[str, Any]]:
    """Groups of parameters: matrices and embeddings (two or more dimensions) decay, biases and norm weights do not.

    ``scales`` and ``rules`` say by :func:`kind_of` what the learning rate is multiplied by, and what else a group gets; those
    for which they say the same, and no others, are in one group. ``lr`` is the rate to begin with, None what the optimizer has.
    """
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in sorted(trainable, key=lambda pair: pair[1].ndim < 2):
        kind, decays = kind_of(name, parameter), parameter.ndim >= 2
        scale, extra = scales.get(kind, 1.0), rules.get(kind) or rules.get("", {})
        fresh = {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale, **extra}
        if lr is not None:
            fresh["lr"] = lr * scale
        groups.setdefault((decays, scale, extra.get("rule")), fresh)["params"].append(parameter)
    return list(groups.values())


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2): torch's fused implementation."""

    name: Literal["adamw"] = option("adamw", "adamw | sgd | muon")
    lr: float = option(6e-4, "peak learning rate", aliases=_LR_ALIASES)
    weight_decay: float = option(0.1, "decoupled, on matrices and embeddings only")
    beta1: float = option(0.9, "decay of the mean of gradients")
    beta2: float = option(0.95, "decay of the mean of squared gradients")
    eps: float = option(1e-8, "added to the root of the mean of squared gradients")
    embedding_lr_scale: float = option(1.0, _EMBEDDING_DOC)
    head_lr_scale: float = option(1.0, _HEAD_DOC)

    def __post_init__(self) -> None:
        refuse(*_common_checks(self), *_adam_checks(self))

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = decay_groups(model, self.weight_decay, self.lr, _scales(self))
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum (torch's fused implementation; decay is added to the gradient)."""

    name: Literal["sgd"] = option("sgd", "")
    lr: float = option(0.1, "peak learning rate", aliases=_LR_ALIASES)
    weight_decay: float = option(0.0, "added to the gradient of matrices and embeddings")
    momentum: float = option(0.9, "decay of the running sum of gradients")
    nesterov: bool = option(False, "look-ahead momentum")

    def __post_init__(self) -> None:
        refuse(
            *_common_checks(self),
            (not 0 <= self.momentum < 1, f"momentum: must be at least 0 and below 1, got {self.momentum}"),
            (self.nesterov and self.momentum == 0, "nesterov: needs momentum above 0"),
        )

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = decay_groups(model, self.weight_decay)
        shares = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())  # torch 2.13 does not fuse those
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=not shares)


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Momentum made orthogonal for matrices of attention and feed-forward, AdamW for all else: :mod:`accel_pretrain.muon`."""

    name: Literal["muon"] = option("muon", "")
    lr: float = option(
        6e-4, "peak learning rate of all groups; entries of an update are as large as AdamW's", aliases=_LR_ALIASES
    )
    weight_decay: float = option(0.1, "decoupled, on matrices and embeddings only")
    momentum: float = option(0.95, "decay of the mean of gradients of matrices")
    beta1: float = option(0.9, "AdamW's, for all else")
    beta2: float = option(0.95, "AdamW's, for all else")
    eps: float = option(1e-8, "AdamW's, for all else")
    embedding_lr_scale: float = option(1.0, _EMBEDDING_DOC)
    head_lr_scale: float = option(1.0, _HEAD_DOC)

    def __post_init__(self) -> None:
        in_range = (not 0 <= self.momentum < 1, f"momentum: must be at least 0 and below 1, got {self.momentum}")
        refuse(*_common_checks(self), *_adam_checks(self), in_range)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        adam = {"rule": "adamw", "fused": True, "betas": (self.beta1, self.beta2), "eps": self.eps}
        own = {"rule": "muon", "fused": True, "momentum": self.momentum, "precision": "no", "processes": 1}
        groups = decay_groups(model, self.weight_decay, self.lr, _scales(self), {"matrix": own, "": adam})
        return ByRules(groups, {"muon": muon_rule, "adamw": adamw_rule})


def _common_checks(config: AdamW | SGD | Muon) -> list[tuple[bool, str]]:
    return [
        (config.lr <= 0, f"lr: must be positive, got {config.lr}"),
        (config.weight_decay < 0, f"weight_decay: must not be negative, got {config.weight_decay}"),
    ]


def _adam_checks(config: AdamW | Muon) -> list[tuple[bool, str]]:
    scales = {"embedding_lr_scale": config.embedding_lr_scale, "head_lr_scale": config.head_lr_scale}
    return [
        (not 0 <= config.beta1 < 1, f"beta1: must be at least 0 and below 1, got {config.beta1}"),
        (not 0 <= config.beta2 < 1, f"beta2: must be at least 0 and below 1, got {config.beta2}"),
        (config.eps <= 0, f"eps: must be positive, got {config.eps}"),
        *((scale <= 0, f"{name}: must be positive, got {scale}") for name, scale in scales.items()),
    ]


def _scales(config: AdamW | Muon) -> dict[str, float]:
    return {"embedding": config.embedding_lr_scale, "head": config.head_lr_scale}


Optimizer = AdamW | SGD | Muon


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Write the learning rate of the coming update, as a Python float: a NumPy scalar would make checkpoints unloadable.

    Groups that have a ``lr_scale`` keep their ratio.
    """
    for group in optimizer.param_groups:
        group["lr"] = float(lr) * group.get("lr_scale", 1.0)
