"""Training runs in a server's child, by the program's own ``main``, small enough that saving is a good part of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel_pretrain import train
from tests.faults.shim import Operation, watching
from tests.running import TINY, losses, newest, weights_and_moments

SMALL = [*TINY, "--num_layers", "1", "--batch_size", "2", "--dropout", "0.1", "--eval_batch_size", "4"]
# A save at every other update and an evaluation now and then; the newest two are kept, and the best.
SAVING = [*SMALL, "--max_iters", "14", "--checkpoint_interval", "2", "--eval_interval", "5", "--keep_last", "2"]


def run(data: Path, run_dir: Path, words: Sequence[str] = ()) -> None:
    """Train, and leave with the program's exit code."""
    raise SystemExit(train.main(["--train_data_path", str(data), "--checkpoint_dir", str(run_dir), *words]))


def result_of(run_dir: Path) -> dict[str, Any]:
    """What must be equal, bit for bit, after any interruption: weights, moments, counters, best loss, and the loss curve."""
    state = json.loads((newest(run_dir) / "trainer_state.json").read_text())
    tensors = {name: tensor.numpy().tobytes() for name, tensor in weights_and_moments(newest(run_dir)).items()}
    assert len(tensors) > 20
    counters = {key: state[key] for key in ("step", "samples", "tokens", "best_val_loss")}
    return {"tensors": tensors, "counters": counters, "losses": losses(run_dir), "best": (run_dir / "best").read_text()}


def run_on_a_bad_disk(
    data: Path, run_dir: Path, words: Sequence[str], kind: str, number: int, error: int, forever: bool
) -> None:
    """Train while the ``number``-th change of this ``kind`` fails that a save makes, and with ``forever`` all later ones."""
    count = [0]

    def say(operation: Operation) -> None:
        if operation.kind == kind and "checkpoint_" in operation.path:
            count[0] += 1
            if count[0] == number or (forever and count[0] > number):
                raise OSError(error, os.strerror(error), operation.path)

    with watching(run_dir, say):
        run(data, run_dir, words)
