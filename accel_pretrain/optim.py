"""The optimizers: each a frozen dataclass that knows how to build itself for a model. The union is the list of choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from accel_pretrain import frugal
from accel_pretrain.errors import refuse
from accel_pretrain.models import ModelConfig, Transformer, hollow
from accel_pretrain.models.mup import lr_scale
from accel_pretrain.muon import muon_rule
from accel_pretrain.rules import ByRules, Group, adamw_rule, is_share
from accel_pretrain.schedule_free import ScheduleFree
from accel_pretrain.typed_yaml import option

_LR_ALIASES = ("learning_rate",)
_SAME: Mapping[str, float] = {}
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
    rule: Callable[[str, torch.Tensor], Group] = lambda kind, parameter: {},
) -> list[Group]:
    """Groups of parameters: matrices and embeddings (two or more dimensions) decay, biases and norm weights do not.

    ``scales`` says by :func:`kind_of` what the learning rate is multiplied by, ``rule`` what else a group gets: one of each
    rule and scale. ``lr`` is the rate to begin with, None what the optimizer has.
    """
    groups: dict[tuple[object, ...], Group] = {}
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in sorted(trainable, key=lambda pair: pair[1].ndim < 2):
        kind, decays = kind_of(name, parameter), parameter.ndim >= 2
        own = rule(kind, parameter)
        scale = scales.get(kind, 1.0) * (lr_scale(model.config, kind, own.get("rule")) if isinstance(model, Transformer) else 1)
        fresh = {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale, **own}
        if lr is not None:
            fresh["lr"] = lr * scale
        groups.setdefault((decays, scale, own.get("rule")), fresh)["params"].append(parameter)
    return list(groups.values())


@dataclass(frozen=True, kw_only=True)
class _Adam:
    """What AdamW has, and others that follow it, if only for some of the parameters."""

    lr: float = option(6e-4, "peak learning rate", aliases=_LR_ALIASES)
    weight_decay: float = option(0.1, "decoupled, on matrices and embeddings only")
    beta1: float = option(0.9, "decay of the mean of gradients")
    beta2: float = option(0.95, "decay of the mean of squared gradients")
    eps: float = option(1e-8, "added to the root of the mean of squared gradients")
    embedding_lr_scale: float = option(1.0, _EMBEDDING_DOC)
    head_lr_scale: float = option(1.0, _HEAD_DOC)

    def __post_init__(self) -> None:
        refuse(*self.checks())

    def checks(self) -> list[tuple[bool, str]]:
        """What is wrong with these settings, for :func:`~accel_pretrain.errors.refuse`."""
        eps = (self.eps <= 0, f"eps: must be positive, got {self.eps}")
        return [*_common_checks(self), *_beta_checks(self), eps, *_scale_checks(self)]

    def adamw_group(self) -> Group:
        """What a group of AdamW beside another rule gets."""
        return {"rule": "adamw", "fused": True, "betas": (self.beta1, self.beta2), "eps": self.eps}


@dataclass(frozen=True, kw_only=True)
class AdamW(_Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2): torch's fused implementation."""

    name: Literal["adamw"] = option("adamw", "adamw | sgd | muon | lion | adamw8 | galore | schedule_free")

    def groups(self, model: nn.Module) -> list[Group]:
        return decay_groups(model, self.weight_decay, self.lr, _scales(self))

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.groups(model), lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)

    def moments(self, group: Group, parameter: torch.Tensor) -> float:
        return 2.0


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

    def groups(self, model: nn.Module) -> list[Group]:
        return decay_groups(model, self.weight_decay, self.lr)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = self.groups(model)
        shares = any(map(is_share, model.parameters()))  # torch 2.13 does not fuse those
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=not shares)

    def moments(self, group: Group, parameter: torch.Tensor) -> float:
        return float(self.momentum > 0)


@dataclass(frozen=True, kw_only=True)
class Muon(_Adam):
    """Momentum made orthogonal for matrices of attention and feed-forward, AdamW for all else: :mod:`accel_pretrain.muon`."""

    name: Literal["muon"] = option("muon", "")
    lr: float = option(
        6e-4, "peak learning rate of all groups; entries of an update are as large as AdamW's", aliases=_LR_ALIASES
    )
    momentum: float = option(0.95, "decay of the mean of gradients of matrices")
    beta1: float = option(0.9, "AdamW's, for all else")
    beta2: float = option(0.95, "AdamW's, for all else")
    eps: float = option(1e-8, "AdamW's, for all else")

    def checks(self) -> list[tuple[bool, str]]:
        in_range = (not 0 <= self.momentum < 1, f"momentum: must be at least 0 and below 1, got {self.momentum}")
        return [*super().checks(), in_range]

    def groups(self, model: nn.Module) -> list[Group]:
        own = {"rule": "muon", "fused": True, "momentum": self.momentum, "precision": "no", "processes": 1}
        return decay_groups(
            model, self.weight_decay, self.lr, _scales(self), lambda kind, _: own if kind == "matrix" else self.adamw_group()
        )

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return ByRules(self.groups(model), {"muon": muon_rule, "adamw": adamw_rule})

    def moments(self, group: Group, parameter: torch.Tensor) -> float:
        return 1.0 if group["rule"] == "muon" else 2.0


@dataclass(frozen=True, kw_only=True)
class Lion:
    """The sign of a mean of gradients (Chen et al. 2023, "Symbolic discovery of optimization algorithms")."""

    name: Literal["lion"] = option("lion", "")
    lr: float = option(1e-4, "peak learning rate, 3 to 10 times below AdamW's", aliases=_LR_ALIASES)
    weight_decay: float = option(1.0, "decoupled, on matrices and embeddings only; 3 to 10 times AdamW's")
    beta1: float = option(0.9, "weight of the mean of gradients in an update")
    beta2: float = option(0.99, "decay of the mean of gradients")
    embedding_lr_scale: float = option(1.0, _EMBEDDING_DOC)
    head_lr_scale: float = option(1.0, _HEAD_DOC)

    def __post_init__(self) -> None:
        refuse(*_common_checks(self), *_beta_checks(self), *_scale_checks(self))

    def groups(self, model: nn.Module) -> list[Group]:
        own = {"rule": "lion", "fused": True, "betas": (self.beta1, self.beta2)}
        return decay_groups(model, self.weight_decay, self.lr, _scales(self), lambda *_: own)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return ByRules(self.groups(model), {"lion": frugal.lion_rule})

    def moments(self, group: Group, parameter: torch.Tensor) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class AdamW8(_Adam):
    """AdamW whose two moments of matrices and embeddings are a byte each: a quarter of the memory."""

    name: Literal["adamw8"] = option("adamw8", "")

    def groups(self, model: nn.Module) -> list[Group]:
        own = {"rule": "adamw8", "betas": (self.beta1, self.beta2), "eps": self.eps}
        return decay_groups(
            model, self.weight_decay, self.lr, _scales(self), lambda _, own_: own if own_.ndim == 2 else self.adamw_group()
        )

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return ByRules(self.groups(model), {"adamw8": frugal.adamw8_rule, "adamw": adamw_rule})

    def moments(self, group: Group, parameter: torch.Tensor) -> float:
        if group["rule"] == "adamw":
            return 2.0
        return 2 * (0.25 + frugal.blocks(parameter.shape[1]) / parameter.shape[1])


@dataclass(frozen=True, kw_only=True)
class GaLore(_Adam):
    """AdamW in a space of few dimensions, of each matrix's gradient (Zhao et al. 2024, "GaLore")."""

    name: Literal["galore"] = option("galore", "")
    projection_rank: int | None = option(
        None, "dimensions that are left of each row of a matrix; smaller matrices follow AdamW; null: d_model / 3"
    )
    projection_interval: int = option(50, "updates after which these dimensions are chosen anew")

    def checks(self) -> list[tuple[bool, str]]:
        counts = {"projection_rank": self.projection_rank, "projection_interval": self.projection_interval}
        few = [(count is not None and count < 1, f"{name}: must be at least 1, got {count}") for name, count in counts.items()]
        return [*super().checks(), *few]

    def groups(self, model: nn.Module) -> list[Group]:
        rank = self.projection_rank or _third(model)
        own = {"rule": "galore", "rank": rank, "interval": self.projection_interval}
        own |= {"betas": (self.beta1, self.beta2), "eps": self.eps}

        def rule(kind: str, parameter: torch.Tensor) -> Group:
            return own if parameter.ndim == 2 and min(parameter.shape) > rank else self.adamw_group()

        return decay_groups(model, self.weight_decay, self.lr, _scales(self), rule)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return ByRules(self.groups(model), {"galore": frugal.galore_rule, "adamw": adamw_rule})

    def moments(self, group: Group, parameter: torch.Tensor) -> float:
        if group["rule"] == "adamw":
            return 2.0
        R, C = parameter.shape
        return group["rank"] * (2 / C + 1 / R)


def _third(model: nn.Module) -> int:
    """A third of the width of a model, a multiple of 8 where it can be."""
    narrow = [min(own.shape) for own in model.parameters() if own.ndim == 2]
    third = max(1, (model.config.d_model if isinstance(model, Transformer) else min(narrow)) // 3)
    return third - third % 8 if third >= 8 else third


@dataclass(frozen=True, kw_only=True)
class AdamWScheduleFree(_Adam):
    """AdamW at a rate that stays, and an average of its weights (Defazio et al. 2024): :mod:`accel_pretrain.schedule_free`."""

    name: Literal["schedule_free"] = option("schedule_free", "")
    lr: float = option(2.5e-3, "learning rate, for a constant schedule; several times AdamW's", aliases=_LR_ALIASES)
    beta1: float = option(0.9, "where gradients are taken: 1 at the average, 0 at the weights that take the steps")

    def groups(self, model: nn.Module) -> list[Group]:
        own = self.adamw_group() | {"rule": "schedule_free"}
        return decay_groups(model, self.weight_decay, self.lr, _scales(self), lambda *_: own)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return ScheduleFree(self.groups(model))

    def moments(self, group: Group, parameter: torch.Tensor) -> float:
        return 2.0


Optimizer = AdamW | SGD | Muon | Lion | AdamW8 | GaLore | AdamWScheduleFree


def _common_checks(config: _Adam | SGD | Lion) -> list[tuple[bool, str]]:
    return [
        (config.lr <= 0, f"lr: must be positive, got {config.lr}"),
        (config.weight_decay < 0, f"weight_decay: must not be negative, got {config.weight_decay}"),
    ]


def _beta_checks(config: _Adam | Lion) -> list[tuple[bool, str]]:
    return [
        (not 0 <= config.beta1 < 1, f"beta1: must be at least 0 and below 1, got {config.beta1}"),
        (not 0 <= config.beta2 < 1, f"beta2: must be at least 0 and below 1, got {config.beta2}"),
    ]


def _scale_checks(config: _Adam | Lion) -> list[tuple[bool, str]]:
    return [(scale <= 0, f"{kind}_lr_scale: must be positive, got {scale}") for kind, scale in _scales(config).items()]


def _scales(config: _Adam | Lion) -> dict[str, float]:
    return {"embedding": config.embedding_lr_scale, "head": config.head_lr_scale}


def problems(optimizer: Optimizer, config: ModelConfig, vocab_size: int) -> list[str]:
    """What an optimizer cannot do for a model."""
    found, base = [], config.mup_base_width
    if base is not None and isinstance(optimizer, SGD):
        found.append(f"model.mup_base_width {base}: its rates are not those of sgd; type --optimizer.name adamw")
    if not isinstance(optimizer, GaLore) or (rank := optimizer.projection_rank) is None:
        return found
    if base is not None:
        fixed = f"optimizer.projection_rank {rank}: with mup_base_width it has to grow as d_model does"
        found.append(f"{fixed}; type --projection_rank null")
    elif kept_per_weight(optimizer, config, vocab_size) >= 2:
        found.append(f"optimizer.projection_rank {rank}: keeps no less than AdamW of this model; type --projection_rank null")
    return found


def kept_per_weight(optimizer: Optimizer, config: ModelConfig, vocab_size: int) -> float:
    """What the optimizer keeps of a model, in float32 numbers per parameter."""
    model = hollow(config, vocab_size)
    groups = optimizer.groups(model)
    kept = sum(optimizer.moments(group, own) * own.numel() for group in groups for own in group["params"])
    return kept / sum(own.numel() for own in model.parameters())


def describe_groups(optimizer: Optimizer, config: ModelConfig, vocab_size: int) -> list[str]:
    """A line for each group of parameters: what is in it, how much, its rule, its learning rate and its decay."""
    model = hollow(config, vocab_size)
    kinds = {id(own): kind_of(name, own) for name, own in model.named_parameters()}
    lines = []
    for group in optimizer.groups(model):
        own = group["params"]
        found = ", ".join(dict.fromkeys(kinds[id(parameter)] for parameter in own))
        size = f"{len(own)} tensors, {sum(parameter.numel() for parameter in own):,} parameters"
        rule = group.get("rule", optimizer.name)
        lines.append(f"{found}: {size}, {rule}, lr {group['lr']:g}, weight_decay {group['weight_decay']:g}")
    return lines


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Write the learning rate of the coming update, as a Python float: a NumPy scalar would make checkpoints unloadable.

    Groups that have a ``lr_scale`` keep their ratio.
    """
    for group in optimizer.param_groups:
        group["lr"] = float(lr) * group.get("lr_scale", 1.0)
