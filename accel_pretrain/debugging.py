"""Puts the aids that a config asks for into a run."""

from __future__ import annotations

from accel_pretrain import one_batch
from accel_pretrain.anomaly import AnomalyDetector
from accel_pretrain.checkpoint import TrainState
from accel_pretrain.inspection import Inspector
from accel_pretrain.profiling import Profiler
from accel_pretrain.run import TrainingRun


def install(run: TrainingRun) -> None:
    """Make ready what ``config.debug`` asks for, and say so. On every process alike, with the first update still to come."""
    debug = run.config.debug
    if debug.overfit_one_batch:
        one_batch.begin(run)
    if debug.detect_anomaly:
        run.aids.installed.append(AnomalyDetector(run))
    if debug.inspect_interval is not None:
        run.aids.installed.append(Inspector(run, debug.inspect_interval, debug.inspect_histograms))
    if debug.profile is not None:
        run.aids.installed.append(Profiler(run, debug.profile))


def conclude(run: TrainingRun, state: TrainState) -> None:
    """What is to be said when the last update is done."""
    run.aids.close()
    if run.config.debug.overfit_one_batch and state.step == run.plan.max_iters:
        one_batch.conclude(run, state)
