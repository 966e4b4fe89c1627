"""After the guard has raised an alarm: a report, the way back to the last good checkpoint, or what is known of the end."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from accel_pretrain.checkpoint import TrainState, read_state, restore
from accel_pretrain.commit import checkpoints, find_newest, go_back, problem_with
from accel_pretrain.data import numbers_of
from accel_pretrain.errors import CheckpointError, DivergedError, PretrainError
from accel_pretrain.files import write_whole
from accel_pretrain.parallel import is_sharded, local
from accel_pretrain.rules import begin_update
from accel_pretrain.run import TrainingRun
from accel_pretrain.runtime import seed_dropout, together

LEDGER = "skipped_samples.json"


def heed_alarm(run: TrainingRun, state: TrainState) -> None:
    """Report the spikes that the guard has seen; end the run if it has diverged. Collective."""
    if run.guard.diverged:
        raise divergence(run, state, run.guard.diverged)
    for spike in run.guard.calm():
        run.log.line(str(spike) + (" (not applied)" if run.guard.on_spike != "log" else ""))
        metrics = {"step": spike.step, "loss": spike.loss, "grad_norm": spike.grad_norm, "sigmas": spike.sigmas}
        run.log.metrics(state.step, state.tokens, {f"spike/{name}": value for name, value in metrics.items()})


def out_of_memory(run: TrainingRun, error: torch.OutOfMemoryError) -> PretrainError:
    """The end of a run whose device is too small for its micro-batch: what to type so that it fits and the curve stays."""
    plan, level = run.plan, run.config.training.activation_checkpointing
    per_process = plan.samples_per_step // plan.world_size
    smaller = max((size for size in range(1, plan.batch_size // 2 + 1) if per_process % size == 0), default=0)
    words = [f"--batch_size {smaller} --global_batch_size {plan.samples_per_step}"] if smaller else []
    if level != "full":
        words.append(f"--activation_checkpointing {'full' if level == 'selective' else 'selective'}")
    return PretrainError(
        f"training.batch_size: {plan.batch_size} does not fit into the memory of {run.accelerator.device} "
        f"({str(error).splitlines()[0]}); type {', or '.join(words) or 'a smaller model'}, or look for the fastest that fits: "
        "python -m accel_pretrain.tune"
    )


# ------------------------------------------------------------------------------------------------------------- going back


def went_back(run: TrainingRun, state: TrainState) -> bool:
    """Turn model, optimizer and ``state`` back to a good checkpoint. Collective; False, and nothing done, if there is none.

    The samples of the last ``rollback_updates`` updates that the checkpoint has not seen are never read again: they go into
    the ledger, ``state.health.left_out``, which is also written beside the checkpoints, for people. From there on the run is
    a function of (seed, position, ledger), as it was before of (seed, position).
    """
    training, per_step = run.config.training, run.plan.samples_of(state.samples)
    step, end, before = state.step + 1, state.samples + per_step, state.health
    reason = run.guard.diverged or "; ".join(map(str, run.guard.spikes))
    if before.rollbacks >= training.max_rollbacks:
        raise divergence(run, state, f"{reason}; this after {before.rollbacks} rollbacks (training.max_rollbacks)", step)
    with run.watchdog.phase("rollback"):
        run.saver.wait(state)
        checkpoint = _newest(run)
        if checkpoint is None:
            return False
        restored = restore(run.accelerator, run.optimizer, checkpoint)
    begin = max(restored.samples, end - training.rollback_updates * per_step)
    first, last = numbers_of(np.array([begin, end - 1]), before.left_out).tolist()
    run.saver.saved = copy.deepcopy(restored)
    restored.health.left_out = merged([*before.left_out, [first, last + 1]])
    restored.health.rollbacks, restored.health.in_a_row = before.rollbacks + 1, 0
    for item in fields(state):
        setattr(state, item.name, getattr(restored, item.name))
    if run.accelerator.is_main_process:
        ledger = {"rollbacks": state.health.rollbacks, "ranges_of_samples": state.health.left_out}
        with contextlib.suppress(OSError):  # the truth is in the next checkpoint
            write_whole(run.run_dir / LEDGER, (json.dumps(ledger) + "\n").encode())
    run.guard.calm()
    run.batches.leave_out(state.health.left_out)
    run.log.rewind(state.step)
    run.watch.restart(state.step, state.tokens)
    run.log.line(f"{reason}\nRolled back to {checkpoint.name}; samples {first:,} to {last:,} are left out from now on")
    run.log.metrics(state.step, state.tokens, {"rollback/from_step": step, "rollback/count": state.health.rollbacks})
    return True


def _newest(run: TrainingRun) -> Path | None:
    """The newest good checkpoint of this run, if possible not one from amid bad updates: what the main process finds."""
    found: list[Path | None] = [None]
    with together(run.accelerator, CheckpointError):
        if run.accelerator.is_main_process:
            good = (path for path in checkpoints(run.run_dir) if problem_with(path) is None)
            found[0] = next((path for path in good if not read_state(path).health.in_a_row), None) or find_newest(run.run_dir)
            if found[0] is not None:
                go_back(run.run_dir, found[0])
    if run.plan.world_size > 1:
        broadcast_object_list(found)
    return found[0]


def merged(ranges: Sequence[Sequence[int]]) -> list[list[int]]:
    """Ranges ``[first, end)`` in ascending order, those that touch or overlap made one."""
    whole: list[list[int]] = []
    for first, end in sorted(map(tuple, ranges)):
        if whole and first <= whole[-1][1]:
            whole[-1][1] = max(whole[-1][1], end)
        else:
            whole.append([first, end])
    return whole


# --------------------------------------------------------------------------------------------------------------- the end


def divergence(run: TrainingRun, state: TrainState, reason: str, step: int | None = None) -> DivergedError:
    """The error that ends a diverged run, after ``diverged_step_N.json`` was written about its last bad update. Collective."""
    health, config = state.health, run.config
    step = step or (health.bad or [state.step])[-1]
    ranks = _computed_again(run, state, step)
    path = run.run_dir / f"diverged_step_{step}.json"
    if run.accelerator.is_main_process:
        report = {
            "reason": reason, "step": step, "computed_again_after_update": state.step,
            "learning_rate": config.schedule.lr(step, config.optimizer.lr, run.plan.max_iters),
            "skipped_updates": health.skipped, "rollbacks": health.rollbacks, "bad_updates": health.bad[-100:],
            "last_losses": health.losses[-20:], "last_grad_norms": health.grad_norms[-20:], "ranks": ranks,
        }  # fmt: skip
        with contextlib.suppress(OSError):  # the run ends in any case
            write_whole(path, (json.dumps(report, indent=1) + "\n").encode())
    return DivergedError(
        f"{reason}: the run has diverged; {path} says at which samples and layers; "
        "go on from the last checkpoint with a lower --lr, or with --on_spike rollback"
    )


def _computed_again(run: TrainingRun, state: TrainState, step: int) -> list[dict[str, Any]]:
    """Compute update ``step`` once more, on the weights as they are now, and say for every process what was not finite.

    An update that is not finite changes no weight, and its samples and dropout masks are known: this is what happened. The
    gradients are those of each process alone; of a sharded model, its share of those of all; where the optimizer wants them.
    """
    config, rank = run.config, run.accelerator.process_index
    first_sample = run.plan.begin_of(step, state)
    losses: list[float] = []
    run.model.zero_grad(set_to_none=True)
    begin_update(run.optimizer, ready=run.saver.wait_until_copied)
    sharded = is_sharded(run.module)
    with contextlib.nullcontext() if sharded else run.accelerator.no_sync(run.model):
        for micro_step, cpu_batch in enumerate(run.batches.micro_batches(first_sample)):
            batch = cpu_batch.to(run.accelerator.device)
            if config.model.dropout:
                seed_dropout(config.training.seed, step - 1, micro_step * run.plan.world_size + rank)
            nats_B = run.model(batch.inputs_BT, batch.targets_BT)
            run.accelerator.backward(nats_B, gradient=run.weights_B)
            losses.append(float(nats_B.detach().mean()) / config.model.context_length)
    found = {
        "rank": rank,
        "samples": run.batches.numbers(first_sample).tolist(),
        "losses": [loss if math.isfinite(loss) else str(loss) for loss in losses],
        "first_bad_micro_batch": next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), None),
        "bad_gradients": _not_finite({name: own.grad for name, own in run.module.named_parameters()}),
        "bad_weights": _not_finite(dict(run.module.named_parameters())),
    }
    run.optimizer.zero_grad()
    return gather_object([found])


def _not_finite(tensors: Mapping[str, torch.Tensor | None]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor is not None and not torch.isfinite(local(tensor)).all()]
