"""One torch optimizer whose groups of parameters follow different rules: AdamW for some, another one for the rest.

Accelerate, checkpoints, the guard and :func:`~accel_pretrain.optim.set_lr` see one optimizer. A rule gets a group and its
parameters that have gradients; its state is tensors of the shape of the parameter, or of a shape that is shared out by the same
rows, so that a process alone and processes that hold a share each write and read the same checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim.adamw import adamw

WHOLE = ("projection",)  # state that every process has whole, whoever holds the rows of the parameter
Group = dict[str, Any]
Rule = Callable[["ByRules", Group, list[torch.Tensor]], None]


def is_share(tensor: torch.Tensor) -> bool:
    """Whether each process holds a part of this tensor: a DTensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> torch.Tensor:
    """The share of a tensor that this process holds; the tensor itself where it is not shared out."""
    return tensor.to_local() if is_share(tensor) else tensor


def rows_like(parameter: Any, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, a row of so many for each row of a matrix, shared out as that is."""
    own = torch.zeros(len(local(parameter)), columns, dtype=dtype, device=local(parameter).device)
    if not is_share(parameter):
        return own
    from torch.distributed.tensor import DTensor

    shape = torch.Size((parameter.shape[0], columns))
    return DTensor.from_local(
        own, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=(columns, 1)
    )


class ByRules(torch.optim.Optimizer):
    """Groups name their ``rule``. ``found_inf``, where the guard has set it, says on the device that nothing may change.

    Only groups with ``fused`` know it (the name is torch's: their counts of steps are on the device, too).
    """

    found_inf: torch.Tensor | None = None

    def __init__(self, groups: Iterable[Group], rules: Mapping[str, Rule]) -> None:
        super().__init__(list(groups), {})
        self.rules = rules

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody has a closure
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self.rules[group["rule"]](self, group, parameters)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, which makes the numbers of all that is kept those of the parameter, floating: codes are bytes again."""
        super().load_state_dict(state_dict)
        for own in self.state.values():
            own.update({name: value.to(torch.uint8) for name, value in own.items() if name.endswith("_code")})

    def count(self, group: Group, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
        """Count this update in ``step`` of each; the counts."""
        for parameter in parameters:
            if "step" not in self.state[parameter]:
                device = local(parameter).device if group.get("fused") else "cpu"
                self.state[parameter]["step"] = torch.zeros((), device=device)
        counts = [self.state[parameter]["step"] for parameter in parameters]
        one = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        torch._foreach_add_(counts, one)  # pyright: ignore[reportPrivateImportUsage]
        return counts

    def moments(self, parameters: list[torch.Tensor], name: str) -> list[torch.Tensor]:
        """What the state of each has by this name, as this process holds it; zeros at first."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [local(self.state[parameter][name]) for parameter in parameters]

    def gradients(self, parameters: list[torch.Tensor], unless: list[torch.Tensor]) -> list[torch.Tensor]:
        """The gradient of each; if that is not finite, ``unless``: what does not move a running mean."""
        return [self.gradient(*pair) for pair in zip(parameters, unless, strict=True)]

    def gradient(self, parameter: torch.Tensor, unless: torch.Tensor) -> torch.Tensor:
        """That of one: a copy, where ``found_inf`` is known."""
        found = local(parameter.grad)
        return found if self.found_inf is None else torch.where(self.found_inf == 0, found, unless)

    def rate(self, group: Group) -> float | torch.Tensor:
        """The learning rate; 0, on the device, if nothing may change."""
        return group["lr"] if self.found_inf is None else group["lr"] * (1.0 - self.found_inf)


def adamw_rule(optimizer: ByRules, group: Group, parameters: list[torch.Tensor]) -> None:
    """torch's fused AdamW, which counts its steps and knows ``found_inf`` itself."""
    for parameter in parameters:
        own = optimizer.state[parameter]
        if "step" not in own:
            own["step"] = torch.zeros((), device=local(parameter).device)
            own["exp_avg"], own["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    beta1, beta2 = group["betas"]
    states = [optimizer.state[parameter] for parameter in parameters]
    adamw(
        [local(parameter) for parameter in parameters], [local(parameter.grad) for parameter in parameters],
        [local(own["exp_avg"]) for own in states], [local(own["exp_avg_sq"]) for own in states], [],
        [own["step"] for own in states], fused=True, found_inf=optimizer.found_inf,
        amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        maximize=False,
    )  # fmt: skip


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that was built, of what Accelerate has made of it."""
    return getattr(optimizer, "optimizer", optimizer)


def begin_update(optimizer: torch.optim.Optimizer, ready: Callable[[], object]) -> None:
    """Before the gradients of an update are taken: some optimizers want them elsewhere, and move the weights there.

    ``ready`` is called before anything moves. ``step`` brings the weights back, or ``zero_grad``.
    """
    if (begin := getattr(unwrapped(optimizer), "begin_update", None)) is not None:
        ready()
        begin()


def resting(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What this process holds of the weights as they are between updates, also after :func:`begin_update`."""
    aside: Mapping[torch.Tensor, torch.Tensor] = getattr(unwrapped(optimizer), "aside", {})
    return [aside[own] if own in aside else local(own.detach()) for own in parameters]


def settle_in(optimizer: torch.optim.Optimizer, precision: str, processes: int) -> None:
    """Tell the groups that ask: the ``precision`` of products, in Accelerate's words, and how many ``processes`` hold all.

    Several that hold all can share out work on whole matrices.
    """
    for group in optimizer.param_groups:
        if "precision" in group:
            group.update(precision=precision, processes=processes)
