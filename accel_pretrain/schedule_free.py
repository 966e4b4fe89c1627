"""AdamW and an average of its weights, in place of a rate that falls (Defazio et al. 2024, "The Road Less Scheduled").

Algorithm 1 there has three sequences of weights: ``fast``, z, takes the steps, at a rate that stays; x is their running
average, which is what a run evaluates, samples and saves; gradients are taken at y, between the two:

    y = (1 - beta1) z + beta1 x
    v = beta2 v + (1 - beta2) g(y)^2
    z = z - lr_t (g(y) / (sqrt(v / (1 - beta2^t)) + eps) + decay y)
    x = (1 - c) x + c z                                        c = lr_t^2 / sum of lr_i^2 for i <= t

The correction of v is that of the authors' code, which does not count it into the rate any more, as their paper did.
The parameters are x, except from :meth:`ScheduleFree.begin_update` to the end of the update: then they are y, and x is kept
aside, so that an update that is not applied leaves the very bits that were there. Saved are x, z and v: as much as AdamW's.
"""

from __future__ import annotations

import torch

from accel_pretrain.rules import ByRules, Group, local


class ScheduleFree(ByRules):
    """Whoever takes gradients calls :func:`~accel_pretrain.rules.begin_update` before; ``step`` or ``zero_grad`` end it."""

    def __init__(self, groups: list[Group]) -> None:
        super().__init__(groups, {"schedule_free": schedule_free_rule})
        self.aside: dict[torch.Tensor, torch.Tensor] = {}  # x, while the parameter is y
        self._room: dict[torch.Tensor, torch.Tensor] = {}

    @torch.no_grad()
    def begin_update(self) -> None:
        """Move the parameters from x to y, where gradients are to be taken. In the first update they are the same."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if "fast" not in self.state.get(parameter, ()):
                    continue
                weight = local(parameter)
                if parameter not in self._room:
                    self._room[parameter] = torch.empty_like(weight)
                self.aside[parameter] = self._room[parameter].copy_(weight)
                weight.lerp_(local(self.state[parameter]["fast"]), 1 - group["betas"][0])

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; of an update that was begun and not made, the weights are again what they were."""
        for parameter, average in self.aside.items():
            local(parameter).copy_(average)
        self.aside.clear()
        super().zero_grad(set_to_none)


def schedule_free_rule(optimizer: ByRules, group: Group, parameters: list[torch.Tensor]) -> None:
    """One update of one group; parameters are y before it, and x after it."""
    assert isinstance(optimizer, ScheduleFree)
    for parameter in parameters:
        own = optimizer.state[parameter]
        if "fast" not in own:
            own["fast"] = parameter.detach().clone()
            own["rates"] = torch.zeros((), device=local(parameter).device)  # the sum of their squares
    counts, squares = optimizer.count(group, parameters), optimizer.moments(parameters, "exp_avg_sq")
    rate, beta2 = optimizer.rate(group), group["betas"][1]
    kept = 1.0 if optimizer.found_inf is None else 1.0 - optimizer.found_inf
    for parameter, count, square in zip(parameters, counts, squares, strict=True):
        weight, own = local(parameter), optimizer.state[parameter]
        gradient = optimizer.gradient(parameter, unless=square)  # any numbers, if nothing may change: all weigh 0 then
        average, fast = optimizer.aside.pop(parameter, weight), local(own["fast"])
        square.lerp_(gradient.square(), (1 - beta2) * kept)
        corrected = square.div(1 - beta2 ** count.clamp(min=1))
        step = gradient.div_(corrected.sqrt_().add_(group["eps"])).add_(weight, alpha=group["weight_decay"])
        fast.sub_(step.mul_(rate))
        own["rates"] += rate**2
        share = rate**2 / own["rates"].clamp(min=torch.finfo(torch.float32).tiny)
        weight.copy_(average.lerp(fast, share))
