"""The plan in short, for the first lines of a run: what it takes, how long, and what the loss begins with.

The whole of it is :mod:`accel_pretrain.plan`. Here it must cost a run nothing that it would notice: the time of an update is
what was planned with ``--save``, or what a probe finds in less than about a hundredth of the run, or, of several processes,
what published runs on this GPU let expect. Else nobody knows it before the first updates, and that is said.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from accelerate import Accelerator

from accel_pretrain.config import Plan, RunConfig, Splits
from accel_pretrain.hardware import Machine, here
from accel_pretrain.hindsight import AFTER, Forecast, duration, gigabytes, peak_of_process, planned_pace
from accel_pretrain.outlook import Outlook, Pace, first_loss, look_ahead, with_model_of, with_probe

# Floating-point operations of a run from which a probe of a third of a second is not noticed: about a minute.
PROBE_FROM_FLOPS = {"cpu": 3e13, "cuda": 3e15}
PROBE_SECONDS = 0.3


def foresee(config: RunConfig, plan: Plan, splits: Splits, accelerator: Accelerator) -> Forecast:
    """What is to be expected of a run on this machine. Before the model is built: the probe builds one too."""
    machine = here(accelerator.device.type == "cpu")
    before = peak_of_process() if sys.platform == "linux" and accelerator.device.type == "cpu" else 0
    outlook = look_ahead(config, splits, machine=machine, plan=plan)
    outlook = replace(outlook, load=replace(outlook.load, precision=accelerator.mixed_precision))
    outlook = paced(outlook, machine, planned_pace(config.checkpoint.checkpoint_dir))
    pace = outlook.pace
    return Forecast(
        lines=tuple(in_short(outlook)), max_iters=plan.max_iters, tokens_per_step=plan.tokens_per_step,
        tokens_per_sec=plan.tokens_per_step / pace.seconds if pace else None, peak=outlook.memory.total, before=before,
    )  # fmt: skip


def paced(o: Outlook, machine: Machine, planned: float | None) -> Outlook:
    """With the time of an update, where it can be had for nothing or nearly so."""
    if planned is not None:
        return replace(o, pace=Pace(o.plan.tokens_per_step / planned, "plan --save"))
    if o.plan.world_size > 1:
        return o if machine.share is None else with_model_of(o, machine)
    if o.flops < PROBE_FROM_FLOPS.get(machine.device, float("inf")) or o.plan.max_iters <= AFTER:
        return o
    o = with_probe(o, machine, PROBE_SECONDS)
    if machine.device == "cuda":
        torch.cuda.empty_cache()
    return o


def in_short(o: Outlook) -> list[str]:
    """Two lines."""
    what = "tensors and libraries" if o.load.device == "cpu" else "tensors"
    device = "up to " if o.load.device == "cpu" else "with CUDA's context "
    free = f" of {gigabytes(o.machine.memory)} that are free" if o.machine and o.machine.memory is not None else ""
    disk = f", of {gigabytes(o.disk_free)} that are free" if o.disk_free is not None else ""
    kept = o.checkpoints_kept
    lines = [
        f"Plan: {gigabytes(o.memory.total)} of {what}, {device}{gigabytes(o.memory_needed)}{free}; {kept} checkpoints of "
        f"{gigabytes(o.checkpoint)}{disk}; first loss about {first_loss(o.config.model, o.plan.vocab_size):.2f}"
    ]
    if o.pace is not None:
        speed = f"{o.plan.tokens_per_step / o.pace.seconds:,.0f} tokens/s"
        whole = duration(o.pace.seconds * o.plan.max_iters)
        lines.append(f"Plan: {duration(o.pace.seconds)} per update, {speed}, {whole} in all, from {o.pace.source}")
    elif o.plan.max_iters > AFTER and o.config.debug.takes_time:
        lines.append("Plan: how long it takes is not said: debug.* takes time too; accel_pretrain.plan says it beforehand")
    elif o.plan.max_iters > AFTER:
        lines.append(f"Plan: how long it takes is said after {AFTER} updates; accel_pretrain.plan says it beforehand")
    return lines
