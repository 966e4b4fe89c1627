"""Muon: momentum whose matrices are made orthogonal before they are used (Jordan et al. 2024).

For the gradient G of a matrix W (R, C), at update t, with a decoupled decay:

    M = momentum M + (1 - momentum) G
    U = orthogonal((1 - momentum) G + momentum M)                  Nesterov; all singular values about 1
    W = W - lr decay W - lr 0.2 sqrt(max(R, C)) U

The factor is that of Liu et al. 2025 ("Muon is scalable for LLM training", section 2.2): entries of the update then are as
large as AdamW's, so that its learning rate and decay carry over, and one rate serves all groups. The rest follows AdamW.

``torch.optim.Muon`` does the same to one matrix (a test compares). This one takes equally shaped matrices together, which is
faster, knows shares of matrices, and shares out its work over processes: each makes some of the matrices orthogonal, and
sends the result to the others. Of many matrices it takes some at a time, so that it needs little memory.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist

from accel_pretrain.rules import ByRules, Group, is_share, local

Polynomials = tuple[tuple[float, float, float], ...]
# a x + b x^3 + c x^5, one per step, each nearest to 1 on what the steps before have made of [0.001, 1], but no less than 0.024
# of its upper end: Amsel et al. 2025, "The Polar Express", algorithm 1. All are for values 1 % larger, as bfloat16 makes them;
# the first for 2 %, since the norm is rounded, too.
_SLACK = 1.01
POLAR_EXPRESS: Polynomials = tuple(
    (a / slack, b / slack**3, c / slack**5)
    for slack, a, b, c in (
        (_SLACK**2, 8.287212, -23.595887, 17.300388),
        (_SLACK, 4.107059, -2.947850, 0.544843),
        (_SLACK, 3.948691, -2.908902, 0.551819),
        (_SLACK, 3.318420, -2.488488, 0.510049),
        (_SLACK, 2.300652, -1.668904, 0.418807),
    )
)
JORDAN: Polynomials = ((3.4445, -4.7750, 2.0315),) * 5  # the first that were used, and torch's
_EPS = 1e-7
CHUNK_BYTES = 64 << 20  # of float32 matrices to update together, at least one matrix: an update needs a few times that


def orthogonal(x_NRC: torch.Tensor, polynomials: Polynomials = POLAR_EXPRESS) -> torch.Tensor:
    """N matrices with the singular vectors of these and singular values near 1; in their dtype, bfloat16 will do.

    Newton-Schulz: odd polynomials of a matrix are those of its singular values.
    """
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    x = x_NRC.mT if tall else x_NRC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)  # so that none is above 1
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_rule(optimizer: ByRules, group: Group, parameters: list[torch.Tensor]) -> None:
    """One update of matrices, all of them whole or all of them shared out by rows."""
    optimizer.count(group, parameters)
    alike: dict[tuple[int, ...], list[torch.Tensor]] = defaultdict(list)
    for parameter in parameters:
        alike[tuple(parameter.shape)].append(parameter)
    for shape, same in alike.items():
        mesh = same[0].device_mesh if is_share(same[0]) else None  # type: ignore[attr-defined]
        processes, holders = (mesh.size(), mesh.size()) if mesh is not None else (group["processes"], 1)
        size = at_a_time(shape, processes, holders)
        for first in range(0, len(same), size):
            _update(optimizer, group, same[first : first + size])


def at_a_time(shape: tuple[int, ...], processes: int, holders: int) -> int:
    """How many matrices to update together, a multiple of the processes that share the work; ``holders`` hold rows of each."""
    held = 4 * -(-shape[0] // holders) * shape[1]
    return processes * max(1, CHUNK_BYTES // (held * processes))


def _update(optimizer: ByRules, group: Group, parameters: list[torch.Tensor]) -> None:
    """That of some matrices of one shape."""
    first, rate = parameters[0], optimizer.rate(group)
    own_NRC = _ahead(optimizer, group, parameters)
    if is_share(first):
        update_NRC = _of_shares(own_NRC, first)
    elif group["processes"] > 1:
        update_NRC = _shared_out(own_NRC, group["processes"])
    else:
        update_NRC = orthogonal(own_NRC)
    del own_NRC
    update_NRC = update_NRC.to(first.dtype).mul_(rate * 0.2 * math.sqrt(max(first.shape)))
    weights = [local(parameter) for parameter in parameters]
    torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_sub_(weights, list(update_NRC.unbind()))  # pyright: ignore[reportPrivateImportUsage]


def _ahead(optimizer: ByRules, group: Group, parameters: list[torch.Tensor]) -> torch.Tensor:
    """Move the momenta on; what is to be made orthogonal, of all matrices together."""
    momenta, momentum = optimizer.moments(parameters, "momentum_buffer"), group["momentum"]
    gradients = optimizer.gradients(parameters, unless=momenta)
    torch._foreach_lerp_(momenta, gradients, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
    together_NRC = torch.stack(torch._foreach_lerp(gradients, momenta, momentum))  # pyright: ignore[reportPrivateImportUsage]
    return together_NRC.to(torch.bfloat16 if group["precision"] == "bf16" else torch.float32)


def _shared_out(x_NRC: torch.Tensor, processes: int) -> torch.Tensor:
    """:func:`orthogonal` of matrices that all processes hold, each of which does a part. Collective."""
    count = len(x_NRC)
    each = -(-count // processes)
    first = dist.get_rank() * each
    own_nRC = x_NRC.new_zeros(each, *x_NRC.shape[1:])
    if first < count:
        mine = x_NRC[first : first + each]
        own_nRC[: len(mine)] = orthogonal(mine)
    all_NRC = x_NRC.new_empty(each * processes, *x_NRC.shape[1:])
    dist.all_gather(list(all_NRC.chunk(processes)), own_nRC)
    return all_NRC[:count]


def _of_shares(x_NrC: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Own rows of :func:`orthogonal` of matrices of which each process has r of R rows, as ``like``. Collective.

    Every process brings some of the matrices together, and gives the rows back.
    """
    mesh = like.device_mesh  # type: ignore[attr-defined]
    processes, home = mesh.size(), x_NrC.device
    (count, rows, C), R = x_NrC.shape, like.shape[0]
    each, share = -(-count // processes), -(-R // processes)
    padded = x_NrC.new_zeros(processes * each, share, C, device=mesh.device_type)
    padded[:count, :rows] = x_NrC.to(padded.device)
    got = torch.empty_like(padded)
    dist.all_to_all_single(got, padded, group=mesh.get_group())  # part p of it is for process p, or from it
    whole_nRC = got.view(processes, each, share, C).transpose(0, 1).reshape(each, processes * share, C)
    whole_nRC[:, :R] = orthogonal(whole_nRC[:, :R])
    back = whole_nRC.view(each, processes, share, C).transpose(0, 1).reshape(processes * each, share, C)
    dist.all_to_all_single(padded, back.contiguous(), group=mesh.get_group())  # not into got, which back may be a view of
    return padded[:count, :rows].to(home)
