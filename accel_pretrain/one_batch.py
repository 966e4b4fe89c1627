"""``debug.overfit_one_batch``: can the model learn one batch by heart? What cannot has a mistake in it, or too low a rate."""

from __future__ import annotations

import numpy as np
import torch

from accel_pretrain.checkpoint import TrainState
from accel_pretrain.data import Batch, TokenBatches
from accel_pretrain.parallel import forget_gathered
from accel_pretrain.run import TrainingRun

MEMORISED = 0.1  # nats per token above the lowest loss that is possible: the right token gets 90 % of its share, in the mean


class OneBatch(TokenBatches):
    """The first update's samples, whichever are asked for."""

    def numbers(self, first_sample: int) -> np.ndarray:
        return super().numbers(0)

    def micro_batches(self, first_sample: int) -> list[Batch]:
        return super().micro_batches(0)


def lowest_loss(ids_BS: np.ndarray) -> float:
    """The mean loss, in nats per token, of a model that knows these sequences by heart.

    It is above 0 where sequences that have been alike so far go on differently: each of n continuations then gets its
    frequency at best, and nobody can tell which one comes.
    """
    B, S = ids_BS.shape
    nats, groups_B = 0.0, np.zeros(B, dtype=np.int64)  # sequences alike so far have the same number
    for position in range(S - 1):
        groups_B = _numbered(groups_B, ids_BS[:, position])
        if groups_B.max() == B - 1:
            break  # all different by now
        both, pairs = np.bincount(groups_B), np.bincount(_numbered(groups_B, ids_BS[:, position + 1]))
        nats += float((both * np.log(both)).sum() - (pairs * np.log(pairs)).sum())
    return nats / (B * (S - 1))


def _numbered(groups_B: np.ndarray, ids_B: np.ndarray) -> np.ndarray:
    """The same number, from 0 without gaps, for those that have the same group and the same id."""
    _, numbers_B = np.unique(np.stack([groups_B, ids_B]), axis=1, return_inverse=True)
    return numbers_B.reshape(-1)


@torch.no_grad()
def batch_loss(run: TrainingRun) -> float:
    """The loss of the batch that all updates see, without dropout, in nats per token. Collective."""
    run.module.eval()
    total = torch.zeros((), dtype=torch.float32, device=run.accelerator.device)
    for cpu_batch in run.batches.micro_batches(0):
        batch = cpu_batch.to(run.accelerator.device)
        total += run.module(batch.inputs_BT, batch.targets_BT).sum()
    forget_gathered(run.module)
    run.module.train()
    if run.plan.world_size > 1:
        total = run.accelerator.reduce(total, reduction="sum")
    return float(total) / run.plan.tokens_per_step  # type: ignore[arg-type]


def begin(run: TrainingRun) -> None:
    """Say what is going to happen."""
    run.log.line(f"Every update sees the same {run.plan.samples_per_step} sequences (debug.overfit_one_batch)")
    if run.config.model.dropout:
        run.log.line("Notice: dropout makes it harder to learn them by heart; --dropout 0 leaves it out")


def conclude(run: TrainingRun, state: TrainState) -> None:
    """At the end of such a run, say whether the model knows the batch by heart. Collective."""
    loss, lowest = batch_loss(run), lowest_loss(run.batches.samples(np.arange(run.plan.samples_per_step)))
    run.log.metrics(state.step, state.tokens, {"overfit/loss": loss, "overfit/lowest_loss": lowest})
    facts = f"its loss is {loss:.4f} after {state.step} updates, and {lowest:.4f} is the lowest possible"
    if loss <= lowest + MEMORISED:
        run.log.line(f"One batch: memorised ({facts})")
    else:
        run.log.line(
            f"One batch: NOT memorised ({facts}); if it still falls, give it more --max_iters; else another --lr (--lr_find "
            "suggests one); if none helps, something in model, data or optimizer is wrong: --detect_anomaly, --inspect_interval"
        )
