"""Optimizers that keep less than AdamW's two float32 numbers for each weight.

| rule | keeps for each weight of a matrix | source |
|---|---|---|
| lion | one number: a mean of gradients, whose sign is the update | Chen et al. 2023, algorithm 2 |
| adamw8 | AdamW's two moments, a byte each | after Dettmers et al. 2022; see :func:`encode` for the code |
| galore | AdamW's moments of a projection of the gradient to ``rank`` columns | Zhao et al. 2024, algorithm 2 |

All that is kept of a matrix is shared out by its rows, as the matrix is, but for GaLore's projection: that all have whole.
Products over shares are added up in another order, and orthogonal columns differ more than what they span: with another number
of processes GaLore's moments may differ by a thousandth, while losses agree.

Eight bits tell less apart beside large neighbours in a block: of weights whose gradients are noise, a hundredth to a millionth
as large as the neighbours', adamw8 moved them at most 2.2 times as far as AdamW in 1,000 updates (root mean square).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional as F

from accel_pretrain.rules import ByRules, Group, is_share, local, rows_like

BLOCK = 256  # numbers of a row that share a scale
_SIGNED, _UNSIGNED = 127, 255  # the largest codes
_IN_CACHE, _AT_ONCE = 1 << 17, 1 << 24  # numbers to decode at a time, on a CPU and on a GPU
_GOLDEN = 0.6180339887498949  # multiples of it, without their whole parts, fill 0 to 1 evenly
POWER_STEPS = 2


def lion_rule(optimizer: ByRules, group: Group, parameters: list[torch.Tensor]) -> None:
    """W = W - lr (sign(beta1 M + (1 - beta1) G) + decay W), then M = beta2 M + (1 - beta2) G."""
    optimizer.count(group, parameters)
    means, (beta1, beta2), rate = optimizer.moments(parameters, "exp_avg"), group["betas"], optimizer.rate(group)
    for parameter, mean in zip(parameters, means, strict=True):
        weight, gradient = local(parameter), optimizer.gradient(parameter, unless=mean)
        weight.mul_(1 - rate * group["weight_decay"]).sub_(mean.lerp(gradient, 1 - beta1).sign_() * rate)
        mean.lerp_(gradient, 1 - beta2)


# --------------------------------------------------------------------------------------------------------- 8-bit moments


def blocks(columns: int) -> int:
    """How many scales a row of so many numbers has."""
    return -(-columns // BLOCK)


def encode(x_RC: torch.Tensor, signed: bool, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes for numbers, and a float32 scale for each :data:`BLOCK` of a row, its largest size.

    With code c in [0, 1], a number is scale c^2 (with a sign), or scale c^4: powers, because moments of one row differ by
    orders of magnitude. Rounding is up or down by turns of ``step``, so that changes smaller than a code add up in the end.
    A mean is right on average, and may become 0: one that did not would move its weight for ever. Of squares nothing but 0
    becomes 0: they must not vanish beside the mean of what was squared.
    """
    columns = x_RC.shape[1]
    width, top = min(BLOCK, columns), _SIGNED if signed else _UNSIGNED
    x_RNB = F.pad(x_RC, (0, -columns % width)).unflatten(1, (-1, width))
    size_RNB = x_RNB.abs()
    scale_RN1 = size_RNB.amax(2, keepdim=True)
    zeros_RNB = None if signed else size_RNB == 0
    code_RNB = size_RNB.div_(scale_RN1.clamp(min=1e-38)).sqrt_()
    code_RNB = (code_RNB if signed else code_RNB.sqrt_()).mul_(top)
    turn_B = (torch.arange(width, device=x_RC.device) * _GOLDEN + step * _GOLDEN**2) % 1
    if zeros_RNB is None:
        below_RNB = code_RNB.floor()
        share_RNB = code_RNB.square_().sub_(below_RNB.square()).div_(2 * below_RNB + 1)  # of the way to the next number
        code_RNB = share_RNB.add_(turn_B).floor_().add_(below_RNB).clamp_(max=top).copysign_(x_RNB).add_(128)
    else:
        code_RNB = code_RNB.add_(turn_B).floor_().clamp_(min=1, max=top).masked_fill_(zeros_RNB, 0)
    return code_RNB.to(torch.uint8).flatten(1)[:, :columns], scale_RN1.squeeze(2)


def decode(code_RC: torch.Tensor, scale_RN: torch.Tensor, signed: bool) -> torch.Tensor:
    """The numbers that :func:`encode` has stood for, in float32."""
    columns = code_RC.shape[1]
    width = min(BLOCK, columns)
    code_RNB = F.pad(code_RC, (0, -columns % width)).unflatten(1, (-1, width)).float()
    if signed:
        code_RNB = code_RNB.sub_(128).mul_(1 / _SIGNED)
        x_RNB = code_RNB.abs().mul_(code_RNB)
    else:
        x_RNB = code_RNB.mul_(1 / _UNSIGNED).square_().square_()
    return x_RNB.mul_(scale_RN.unsqueeze(2)).flatten(1)[:, :columns]


def rows_at_once(columns: int, device: str) -> int:
    """How many rows of 8-bit moments to decode at a time."""
    return 1 + (_AT_ONCE if device == "cuda" else _IN_CACHE) // columns


def adamw8_rule(optimizer: ByRules, group: Group, parameters: list[torch.Tensor]) -> None:
    """AdamW whose moments are decoded for an update, some rows at a time, and encoded again."""
    counts = optimizer.count(group, parameters)
    for parameter, count in zip(parameters, counts, strict=True):
        own = optimizer.state[parameter]
        if "mean_code" not in own:
            for name, zero in (("mean", 128), ("square", 0)):
                own[f"{name}_code"] = rows_like(parameter, parameter.shape[1], torch.uint8)
                local(own[f"{name}_code"]).fill_(zero)
                own[f"{name}_scale"] = rows_like(parameter, blocks(parameter.shape[1]), torch.float32)
        weight, gradient, kept = local(parameter), local(parameter.grad), {name: local(own[name]) for name in own}
        rows = rows_at_once(weight.shape[1], weight.device.type)
        for part in (slice(first, first + rows) for first in range(0, len(weight), rows)):
            mean = decode(kept["mean_code"][part], kept["mean_scale"][part], signed=True)
            square = decode(kept["square_code"][part], kept["square_scale"][part], signed=False)
            _adamw(weight[part], gradient[part], mean, square, int(count), group)
            for name, value, signed in (("mean", mean, True), ("square", square, False)):
                code, scale = encode(value, signed, int(count))
                kept[f"{name}_code"][part].copy_(code)
                kept[f"{name}_scale"][part].copy_(scale)


def _adamw(
    weight: torch.Tensor, gradient: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, step: int, group: Group,
    basis_Cr: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Loshchilov & Hutter 2019, algorithm 2, in place. With a basis, ``gradient`` and moments are in its coordinates."""
    beta1, beta2 = group["betas"]
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    update = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt_() + group["eps"])
    update = update if basis_Cr is None else update @ basis_Cr.mT
    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


# ----------------------------------------------------------------------------------------------------------------- GaLore


def galore_rule(optimizer: ByRules, group: Group, parameters: list[torch.Tensor]) -> None:
    """AdamW in the space of the ``rank`` largest right singular vectors of the gradient, taken anew every ``interval``."""
    counts = optimizer.count(group, parameters)
    for parameter, count in zip(parameters, counts, strict=True):
        own, gradient_RC = optimizer.state[parameter], local(parameter.grad)
        if "projection" not in own:
            own["projection"] = _first_basis(gradient_RC, group["rank"])
            own["exp_avg"] = rows_like(parameter, group["rank"], torch.float32)
            own["exp_avg_sq"] = rows_like(parameter, group["rank"], torch.float32)
        step, basis_Cr = int(count), own["projection"]
        if (step - 1) % group["interval"] == 0:
            turned_Cr = _basis(parameter, gradient_RC, basis_Cr)
            local(own["exp_avg"]).copy_(local(own["exp_avg"]) @ (basis_Cr.mT @ turned_Cr))
            basis_Cr = own["projection"] = turned_Cr
        mean, square = local(own["exp_avg"]), local(own["exp_avg_sq"])
        _adamw(local(parameter), gradient_RC @ basis_Cr, mean, square, step, group, basis_Cr)


def _first_basis(gradient_RC: torch.Tensor, rank: int) -> torch.Tensor:
    """Any columns that are at right angles: the same on every device and in every process."""
    noise = torch.randn(gradient_RC.shape[1], rank, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(noise).Q.to(gradient_RC.device)


def _basis(parameter: torch.Tensor, gradient_RC: torch.Tensor, basis_Cr: torch.Tensor) -> torch.Tensor:
    """The leading right singular vectors, by power steps from what they were: no decomposition of a matrix is needed, and
    of one that is shared out only products are sent (Vogels et al. 2019, "PowerSGD"). Collective where it is shared out.
    """
    for _ in range(POWER_STEPS):
        basis_Cr = gradient_RC.mT @ (gradient_RC @ basis_Cr)
        if is_share(parameter):
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            basis_Cr = basis_Cr.to(mesh.device_type)
            dist.all_reduce(basis_Cr, group=mesh.get_group())
        basis_Cr = torch.linalg.qr(basis_Cr / basis_Cr.norm().clamp(min=1e-30)).Q.to(gradient_RC.device)
    return basis_Cr
