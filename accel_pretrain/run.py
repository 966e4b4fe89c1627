"""A training run, put together: what :mod:`accel_pretrain.train` makes and :mod:`accel_pretrain.loop` works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from accel_pretrain.aids import Aids
from accel_pretrain.config import Plan, RunConfig, Splits
from accel_pretrain.data import TokenBatches
from accel_pretrain.guard import Guard
from accel_pretrain.hindsight import Hindsight
from accel_pretrain.metrics import Stopwatch
from accel_pretrain.models import Transformer
from accel_pretrain.saver import Saver
from accel_pretrain.status import RunStatus
from accel_pretrain.stopping import StopSignal
from accel_pretrain.system import SystemMeter
from accel_pretrain.tokenizer import Tokenizer
from accel_pretrain.trackers import RunLog
from accel_pretrain.watchdog import Watchdog


def batches_of(
    config: RunConfig, plan: Plan, splits: Splits, rank: int, kind: type[TokenBatches] = TokenBatches
) -> TokenBatches:
    """What a process of a run reads."""
    return kind(
        splits.train, context_length=config.model.context_length, batch_size=plan.batch_size, seed=config.training.seed,
        accumulation=plan.accumulation, warmup=plan.batch_warmup, sampling=config.data.sampling,
        packing=config.data.packing, world_size=plan.world_size, rank=rank,
    )  # fmt: skip


def sequence_weights(plan: Plan, device: torch.device) -> torch.Tensor:
    """What a nat of each sequence of a micro-batch counts in the gradient of a whole update: ``weights_B``."""
    return torch.full((plan.batch_size,), plan.world_size / plan.tokens_per_step, device=device)


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Everything that the loop needs, made by :mod:`accel_pretrain.train`.

    ``model`` is prepared and ``module`` the same unwrapped. ``weights_B`` is what a nat of a sequence counts in the gradient.
    """

    config: RunConfig
    plan: Plan
    splits: Splits
    accelerator: Accelerator
    model: nn.Module
    module: Transformer
    optimizer: torch.optim.Optimizer
    batches: TokenBatches
    weights_B: torch.Tensor
    tokenizer: Tokenizer | None
    log: RunLog
    stop: StopSignal
    saver: Saver
    watch: Stopwatch = field(default_factory=Stopwatch)
    guard: Guard = field(default_factory=Guard)
    parameters: list[nn.Parameter] = field(default_factory=list)
    hindsight: Hindsight = field(default_factory=Hindsight)
    watchdog: Watchdog = field(default_factory=Watchdog)
    status: RunStatus = field(default_factory=RunStatus)
    system: SystemMeter = field(default_factory=SystemMeter)
    peak_flops: float | None = None  # of this device, at this precision
    aids: Aids = field(default_factory=Aids)

    @property
    def run_dir(self) -> Path:
        return self.config.checkpoint.checkpoint_dir

    def interrupted(self) -> bool:
        """Asked between two batches of an evaluation, which goes on only if nobody was asked to stop. Collective."""
        self.watchdog.beat()
        return self.stop.agreed()
