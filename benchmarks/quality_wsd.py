"""Three horizons by one WSD run: its checkpoints, each with a short cool-down, against a full cosine run for every horizon.

Part of :mod:`benchmarks.quality`. All runs are the trainer's own command line; a branch is ``--resume_from CHECKPOINT`` with
another ``max_iters``. Losses are compared at equal tokens, so nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from accel_pretrain.launchers import following
from benchmarks.quality_race import Arm, Machine, mean_se, speeds, words_of

THIRDS = (1, 2, 3)  # horizons, in thirds of the longest
COOLED = 0.2  # of a horizon


def final_loss(arm: Arm, data: dict[str, Any], run_dir: Path, seed: int, machine: Machine, more: dict[str, Any]) -> float:
    """The validation loss at the end of a run of the trainer."""
    settings = {
        "training.device": "cpu", "training.compile": False, "training.mixed_precision": machine.precision,
        **arm.settings, **data, "training.cpu_threads": machine.threads, "training.seed": seed,
        "evaluation.eval_iters": None, "evaluation.eval_interval": 10**6, "checkpoint.checkpoint_dir": run_dir,
        "checkpoint.keep_last": None, **more,
    }  # fmt: skip
    command = [sys.executable, "-m", "accel_pretrain.train", *words_of(settings)]
    done = subprocess.run(following(command), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{run_dir.name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(row["final/val_loss"] for row in reversed(rows) if "final/val_loss" in row)


def compare(arm: Arm, data: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Losses of both ways at each horizon, and the updates that the two shorter horizons cost besides the longest run.

    The longest takes ``options.minutes``, about.
    """
    machine = Machine(options.threads, False, options.precision)
    losses: dict[str, dict[int, list[float]]] = {way: {third: [] for third in THIRDS} for way in ("cosine", "wsd")}
    floor = {"schedule.warmup_iters": 10, "schedule.min_lr": 0.0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        speed = speeds([arm], data, folder, min(6.0, 15 * options.minutes), machine)[arm.name]
        unit = max(4, round(speed * 60 * options.minutes / 15))  # a fifteenth: 4 of 5 are a horizon's stable part
        for seed in range(1, options.seeds + 1):
            cosine = arm.but("cosine", {"schedule.name": "cosine", **floor})
            wsd = arm.but("wsd", {"schedule.name": "wsd", **floor})
            trunk = folder / f"wsd_{seed}"
            for third in reversed(THIRDS):  # the longest first: the others begin with its checkpoints
                total, stable = 5 * third * unit, 4 * third * unit
                whole = {"training.max_iters": total, "checkpoint.checkpoint_interval": 4 * unit}
                longest, run_dir = third == THIRDS[-1], folder / f"branch_{seed}_{third}"
                cool = {"schedule.decay_iters": total - stable, **whole}
                if not longest:
                    cool |= {"checkpoint.resume_from": trunk / f"checkpoint_{stable:08d}"}
                losses["wsd"][third].append(final_loss(wsd, data, trunk if longest else run_dir, seed, machine, cool))
                own = folder / f"cosine_{seed}_{third}"
                losses["cosine"][third].append(final_loss(cosine, data, own, seed, machine, whole))
    extra = COOLED  # of a horizon is trained again, where a cosine takes the whole horizon
    horizons = []
    for third in THIRDS:
        pair = {way: mean_se(losses[way][third]) for way in losses}
        worse = pair["wsd"][0] / pair["cosine"][0] - 1
        horizons.append({"updates": 5 * third * unit, **pair, "wsd_is_worse_by": worse})
        print(
            f"  {5 * third * unit} updates: cosine {pair['cosine'][0]:.4f}, WSD {pair['wsd'][0]:.4f}: {worse:+.2%}", flush=True
        )
    largest = max(horizon["wsd_is_worse_by"] for horizon in horizons)
    print(f"  within {largest:.2%} ({'met' if largest <= 0.01 else 'MISSED'}: 1 %) at {extra:.2f}x of the extra updates (0.4)")
    return {"figure": "wsd", "horizons": horizons, "extra_compute": extra}
