"""Whether an update may touch the weights: the guard against numbers that are not finite, and against spikes.

An update whose loss or gradient is not finite leaves weights and moments as they are, bit for bit. A *spike* is a loss or a
gradient norm more than six standard deviations above its mean over the last 128 updates, which is the rule (and the figures) of
OLMo-core's skip-step optimizer. Loss and gradient norm are the same bits on every process, and so is every decision here.
On a GPU nothing waits for the device: the decision about what is not finite is taken there, and the numbers come over together
when somebody asks (:meth:`Guard.settle`). Only ``on_spike: skip`` and ``rollback`` need an answer before every update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from accel_pretrain.parallel import local
from accel_pretrain.rules import unwrapped

WINDOW, SIGMAS = 128, 6.0
MAX_IN_A_ROW, MAX_IN_A_ROW_FP16 = 10, 20  # the scaler of fp16 begins with a scale that is too large, and halves it
RECENT, MAX_OF_RECENT = 1000, 5


@dataclass
class Health:
    """What the guard remembers. It is saved with the counters of a run, so that a resumed run judges as if never stopped.

    ``losses`` and ``grad_norms`` are the finite ones of the last :data:`WINDOW` updates, ``bad`` the numbers of the updates
    among the last :data:`RECENT` that were not finite. ``left_out`` is the ledger of rollbacks: ranges ``[first, end)`` of
    samples that the run does not read, ascending.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0
    in_a_row: int = 0
    bad: list[int] = field(default_factory=list)
    rollbacks: int = 0
    left_out: list[list[int]] = field(default_factory=list)

    @classmethod
    def parse(cls, document: Mapping[str, Any] | None) -> Health:
        """From the JSON of a checkpoint, or None from one of before there was a guard. ValueError if it is nothing of ours."""
        if document is None:
            return cls()
        try:
            health = cls(**document)
            lists = (health.losses, health.grad_norms, health.bad, health.left_out)
            counts = [health.skipped, health.in_a_row, health.rollbacks, *health.bad]
            counts += [number for first, end in health.left_out for number in (first, end)]
            sound = all(type(own) is list for own in lists) and all(type(number) is int and number >= 0 for number in counts)
            if sound and all(type(number) is float and math.isfinite(number) for number in health.losses + health.grad_norms):
                return health
        except (TypeError, ValueError):
            pass
        raise ValueError(f"health is not as a run writes it: {str(document)[:60]}")


@dataclass(frozen=True)
class Spike:
    """An update that was out of the ordinary: its number, loss in nats per token, gradient norm, and by how much."""

    step: int
    loss: float
    grad_norm: float
    sigmas: float

    def __str__(self) -> str:
        return (
            f"Spike at iteration {self.step}: loss {self.loss:.4f}, gradient norm {self.grad_norm:.2f}, "
            f"{self.sigmas:.1f} standard deviations above the last {WINDOW}"
        )


class Guard:
    """Applies updates, or does not. What nobody has heard of yet is in ``spikes``, ``diverged`` and ``wants_back``.

    ``on_spike``: ``log`` only tells; ``skip`` does not apply such an update; ``rollback`` does not either, and wants to go back
    to the last checkpoint, also when the run has diverged.
    """

    def __init__(self, on_spike: str = "log") -> None:
        self.on_spike = on_spike
        self.spikes: list[Spike] = []
        self.diverged = ""
        self.wants_back = False
        self._limit = MAX_IN_A_ROW
        self._measured: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    @property
    def alarmed(self) -> bool:
        """Whether there is something to report."""
        return bool(self.spikes or self.diverged)

    def step(
        self,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        health: Health,
        step: int,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
    ) -> None:
        """Apply update ``step``, whose gradients are in place, if it is good; drop the gradients. Both measures are scalars."""
        self._limit = MAX_IN_A_ROW if accelerator.scaler is None else MAX_IN_A_ROW_FP16
        self._measured.append((step, loss, grad_norm))
        # The wrapped optimizer's step costs 0.1 ms of its own; without a scaler it has nothing to add to the inner one's.
        inner = unwrapped(optimizer)
        on_device = self.on_spike == "log" and _decides_late(inner)
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm) if on_device else None
        good = on_device or self.settle(health)
        if accelerator.scaler is not None:  # fp16: the scaler looks for overflow itself, and lowers its scale
            if good or not math.isfinite(grad_norm.item()):
                optimizer.step()
            else:
                accelerator.scaler.update()
        elif good:
            if finite is not None:  # read by the fused optimizers, on the device
                inner.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
                _make_momentum(inner)
            inner.step()
        inner.zero_grad(set_to_none=True)
        if len(self._measured) >= WINDOW:
            self.settle(health)

    def settle(self, health: Health) -> bool:
        """Judge everything measured since the last call, which waits for the device; whether the newest update is good."""
        good = True
        if self._measured:
            values = torch.stack([value for _, *pair in self._measured for value in pair]).tolist()
            for (step, *_), loss, grad_norm in zip(self._measured, values[::2], values[1::2], strict=True):
                good = self._judge(health, step, loss, grad_norm)
            self._measured.clear()
        return good

    def _judge(self, health: Health, step: int, loss: float, grad_norm: float) -> bool:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            health.skipped += 1
            health.in_a_row += 1
            health.bad = [*(number for number in health.bad if number > step - RECENT), step]
            self._despair(health, step)
            return False
        health.in_a_row = 0
        sigmas = max(_sigmas(loss, health.losses), _sigmas(grad_norm, health.grad_norms))
        for past, value in ((health.losses, loss), (health.grad_norms, grad_norm)):
            past.append(value)
            del past[:-WINDOW]
        if sigmas <= SIGMAS:
            return True
        self.spikes.append(Spike(step, loss, grad_norm, sigmas))
        if self.on_spike == "log":
            return True
        health.skipped += 1
        self.wants_back = self.on_spike == "rollback"
        return False

    def _despair(self, health: Health, step: int) -> None:
        """Decide, after an update that was not finite, whether there is any sense in going on."""
        if health.in_a_row >= self._limit:
            self.diverged = f"the loss or its gradient was not finite for {health.in_a_row} updates in a row"
        elif step >= RECENT and len(health.bad) > MAX_OF_RECENT:
            self.diverged = f"the loss or its gradient was not finite in {len(health.bad)} of the last {RECENT:,} updates"
        self.wants_back = bool(self.diverged) and self.on_spike == "rollback"

    def calm(self) -> list[Spike]:
        """The spikes that nobody has heard of yet. With it, everything that the guard had to say is taken as heard."""
        heard, self.spikes, self.diverged, self.wants_back = self.spikes, [], "", False
        return heard


def _decides_late(optimizer: torch.optim.Optimizer) -> bool:
    """Whether asking for a number would make the processor wait for a queue of work, and the optimizer knows ``found_inf``."""
    (group, *_) = optimizer.param_groups
    knows = all(every.get("fused") for every in optimizer.param_groups)
    return knows and _is_asynchronous(local(group["params"][0]).device)


def _is_asynchronous(device: torch.device) -> bool:
    return device.type == "cuda"


def _make_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Begin momentum at zero, which is what a first update assumes: torch's SGD leaves it unset when it skips that one."""
    for group in optimizer.param_groups if not optimizer.state else ():
        for parameter in group["params"] if group.get("momentum") else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _sigmas(value: float, past: list[float]) -> float:
    """How many standard deviations ``value`` lies above the mean of ``past``; 0 below it, or while little is known."""
    if len(past) < WINDOW // 2:
        return 0.0
    mean = math.fsum(past) / len(past)
    if value <= mean:
        return 0.0
    deviation = math.sqrt(math.fsum((other - mean) ** 2 for other in past) / (len(past) - 1))
    deviation = max(deviation, 1e-6 * abs(mean))  # where all are equal, the last bit of a number is no spike
    return (value - mean) / deviation if deviation else 0.0
