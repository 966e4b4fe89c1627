"""Longer and shorter runs out of one: what a run with a cool-down (``schedule.name wsd``) leaves for others to begin with.

Before its cool-down the rate of such a run does not depend on its length. So the checkpoint of the last update before it,
which the pointer ``stable`` names and nothing removes, is the beginning of a run of any greater length; and every checkpoint
before it that of a shorter one. :func:`raised_again` is what must not happen instead.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from accel_pretrain.checkpoint import TrainState
from accel_pretrain.commit import checkpoints, point, read_pointer, step_of
from accel_pretrain.config import Plan, RunConfig
from accel_pretrain.run import TrainingRun
from accel_pretrain.runtime import TrainingConfig

STABLE = "stable"
FIXED = (  # what a run that goes on cannot change, besides the model
    *("optimizer.name", "training.seed", "debug.overfit_one_batch"),
    *("data.sampling", "data.packing", "data.intra_document_masking"),
    *("optimizer.embedding_lr_scale", "optimizer.head_lr_scale", "optimizer.projection_rank"),  # they make the groups
)


def as_begun(config: RunConfig, done: TrainState) -> RunConfig:
    """The config of a run that goes on, with what followed from its first length and machine where it does not say otherwise.

    That is the warm-up of the rate, which were 2 % of another length now, and the size from which updates grow.
    """
    schedule, training = config.schedule, config.training
    if schedule.warmup_iters is None and done.warmup_iters is not None:
        schedule = replace(schedule, warmup_iters=done.warmup_iters)
    if training.batch_warmup_tokens is not None and training.batch_warmup_from is None and done.batch_warmup_from:
        training = replace(training, batch_warmup_from=done.batch_warmup_from)
    return replace(config, schedule=schedule, training=training)


def mark_stable(run_dir: Path, plan: Plan, checkpoint: Path | None, done: TrainState) -> None:
    """Let ``stable`` name the checkpoint that a run goes on from, if it is that and a death came before it was named."""
    here = checkpoint is not None and checkpoint.resolve().parent == run_dir.resolve()
    if checkpoint is not None and here and done.step == plan.last_stable and read_pointer(run_dir / STABLE) != checkpoint.name:
        point(run_dir / STABLE, checkpoint.name)


def longer(run: TrainingRun) -> str | None:
    """What to type so that a finished run with a cool-down goes on; None where there is none, or nothing to branch from."""
    name = read_pointer(run.run_dir / STABLE)
    if run.plan.last_stable is None or name is None:
        return None
    return (
        f"to train longer, branch off before the cool-down: --resume_from {run.run_dir / STABLE} "
        f"--checkpoint_dir {run.run_dir}_longer {_length(run.config.training, run.plan.max_iters, times=2)}"
    )


def raised_again(config: RunConfig, plan: Plan, saved: RunConfig, checkpoint: Path, done: TrainState) -> str | None:
    """The problem with going on from within a cool-down as a longer run: the rate would rise, and what it gained be lost.

    ``plan`` is that of the run to come, and ``saved`` the config of the one that has made ``checkpoint``.
    """
    before = done.max_iters or saved.training.max_iters
    last = saved.schedule.last_stable(before) if before else None
    if before is None or last is None or done.step <= last or config.schedule.last_stable(plan.max_iters) is None:
        return None
    old = saved.schedule.lr(done.step, saved.optimizer.lr, before)
    new = config.schedule.lr(done.step + 1, config.optimizer.lr, plan.max_iters)
    if done.step >= plan.max_iters or new <= old * (1 + 1e-9):
        return None
    run_dir, given = checkpoint.parent, config.checkpoint.checkpoint_dir
    kept = next((path for path in checkpoints(run_dir) if step_of(path) <= last), None)
    where = f"{run_dir}_longer" if given.resolve() == run_dir.resolve() else str(given)
    branch = f"--resume_from {kept or 'CHECKPOINT'} --checkpoint_dir {where} {_length(config.training, plan.max_iters)}"
    return (
        f"training.max_iters: {checkpoint.name} is in the cool-down of a run of {before} updates, and one of {plan.max_iters} "
        f"would raise the rate again, from {old:.2e} to {new:.2e}; branch off before it: type {branch}"
        + ("" if kept else f", with a CHECKPOINT of update {last} or before")
    )


def _length(training: TrainingConfig, max_iters: int, times: int = 1) -> str:
    """The option by which a config says how long a run is, for one that is ``times`` as long."""
    if training.max_tokens is not None:
        return f"--max_tokens {times * training.max_tokens}"
    return f"--epochs {times * training.epochs:g}" if training.epochs is not None else f"--max_iters {times * max_iters}"
