"""What an update takes beside weights, gradients and moments: bytes for a while, and products of matrices.

AdamW and SGD are one kernel and need neither. The formulas follow :mod:`accel_pretrain.muon`, :mod:`~accel_pretrain.frugal`
and :mod:`~accel_pretrain.schedule_free` line by line, and tests compare them with the allocator: whoever changes those changes
these. What Muon's processes send each other is left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from accel_pretrain import frugal
from accel_pretrain.estimates import FP32, Workload
from accel_pretrain.models import hollow
from accel_pretrain.muon import POLAR_EXPRESS, at_a_time
from accel_pretrain.optim import Optimizer
from accel_pretrain.rules import Group

Shape = tuple[int, int]


def with_update(load: Workload, optimizer: Optimizer) -> Workload:
    """The workload with its ``update_bytes``, ``update_flops`` and ``set_aside``, of one process."""
    groups, most, flops = optimizer.groups(hollow(load.model, load.vocab_size)), 0, 0.0
    for group in groups:
        shapes = Counter((own.shape[0], own.shape[1]) for own in group["params"] if own.ndim == 2)
        for shape, count in shapes.items():
            needed, computed = _muon(load, shape, count) if group.get("rule") == "muon" else _frugal(load, shape, group)
            most, flops = max(most, needed), flops + computed * (1 if group.get("rule") == "muon" else count)
    averages = any(group.get("rule") == "schedule_free" for group in groups)
    return replace(load, update_bytes=most, update_flops=flops, set_aside=float(averages))


def newton_schulz_flops(rows: int, columns: int) -> float:
    """Of one matrix: a product with itself, one of that with itself, and one of the two, in every step."""
    r, c = min(rows, columns), max(rows, columns)
    return len(POLAR_EXPRESS) * (2.0 * r * r * c + 2.0 * r**3 + 2.0 * r * r * c)


def _muon(load: Workload, shape: Shape, count: int) -> tuple[int, float]:
    """Bytes at the fullest moment, and operations, of so many matrices."""
    processes, holders = load.world_size, _holders(load)
    size = min(count, at_a_time(shape, processes, holders))
    each = -(-size // processes)  # matrices that this process makes orthogonal
    whole, held = shape[0] * shape[1], size * -(-shape[0] // holders) * shape[1]
    computing = 2 * each * (whole + min(shape) ** 2)
    if holders > 1:
        fullest = max(4 * held, 3 * processes * each * -(-shape[0] // holders) * shape[1] + held + computing)
    elif processes > 1:
        fullest = held + max(each * whole + computing, (processes + 1) * each * whole)
    else:
        fullest = held + computing
    chunks, rest = divmod(count, size)
    made = chunks * each + -(-rest // processes)
    return max(2 * FP32 * held, load.width * fullest), made * newton_schulz_flops(*shape)


def _frugal(load: Workload, shape: Shape, group: Group) -> tuple[int, float]:
    """Bytes at the fullest moment, and operations, of one matrix."""
    rows, columns = -(-shape[0] // _holders(load)), shape[1]
    if group.get("rule") in ("lion", "schedule_free"):
        good = 1 if load.device == "cuda" else 0  # a copy of the gradient, which counts only if the update is finite
        return (2 + good) * FP32 * rows * columns, 0.0
    if group.get("rule") == "adamw8":
        return 7 * FP32 * columns * min(rows, frugal.rows_at_once(columns, load.device)), 0.0
    if group.get("rule") == "galore":
        rank = group["rank"]
        turns = 2 * frugal.POWER_STEPS * 2.0 * rows * columns * rank + frugal.POWER_STEPS * 4.0 * columns * rank**2
        return FP32 * (rows * columns + 2 * rows * rank), 2 * 2.0 * rows * columns * rank + turns / group["interval"]
    return 0, 0.0


def _holders(load: Workload) -> int:
    """Processes that hold rows of each matrix."""
    return 1 if load.strategy == "ddp" else load.world_size
