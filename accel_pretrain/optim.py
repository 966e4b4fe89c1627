"""The optimizers: each a frozen dataclass that knows how to build itself for a model. The union is the list of choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from accel_pretrain.errors import refuse
from accel_pretrain.typed_yaml import option

_LR_ALIASES = ("learning_rate",)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and embeddings (two or more dimensions) decay, biases and norm weights do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2): torch's fused implementation."""

    name: Literal["adamw"] = option("adamw", "adamw | sgd")
    lr: float = option(6e-4, "peak learning rate", aliases=_LR_ALIASES)
    weight_decay: float = option(0.1, "decoupled, on matrices and embeddings only")
    beta1: float = option(0.9, "decay of the mean of gradients")
    beta2: float = option(0.95, "decay of the mean of squared gradients")
    eps: float = option(1e-8, "added to the root of the mean of squared gradients")

    def __post_init__(self) -> None:
        refuse(
            *_common_checks(self.lr, self.weight_decay),
            (not 0 <= self.beta1 < 1, f"beta1: must be at least 0 and below 1, got {self.beta1}"),
            (not 0 <= self.beta2 < 1, f"beta2: must be at least 0 and below 1, got {self.beta2}"),
            (self.eps <= 0, f"eps: must be positive, got {self.eps}"),
        )

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = decay_groups(model, self.weight_decay)
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
            *_common_checks(self.lr, self.weight_decay),
            (not 0 <= self.momentum < 1, f"momentum: must be at least 0 and below 1, got {self.momentum}"),
            (self.nesterov and self.momentum == 0, "nesterov: needs momentum above 0"),
        )

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = decay_groups(model, self.weight_decay)
        shares = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())  # torch 2.13 does not fuse those
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=not shares)


def _common_checks(lr: float, weight_decay: float) -> list[tuple[bool, str]]:
    return [
        (lr <= 0, f"lr: must be positive, got {lr}"),
        (weight_decay < 0, f"weight_decay: must not be negative, got {weight_decay}"),
    ]


Optimizer = AdamW | SGD


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Write the learning rate of the coming update, as a Python float: a NumPy scalar would make checkpoints unloadable."""
    for group in optimizer.param_groups:
        group["lr"] = float(lr)
