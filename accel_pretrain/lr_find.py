"""``accel_pretrain.train --lr_find``: a range test of the learning rate (Smith 2015, "Cyclical Learning Rates", section 3.3).

One short training whose rate rises exponentially, from far too low to far too high, on the run's own model, data, batch and
processes. The run directory is neither read nor written: the run is built anew, and a picture goes to the current folder, in
place of the one before.

The suggestion is the rate by which four fifths of the fall of the smoothed loss are done. Where the loss falls fastest, it does
so for the first easy nats, at a rate far too low for a larger model, and another for each seed; where it is lowest, the curve
is flat, and the place a matter of chance. At widths 32, 128 and 256, with AdamW and Muon, suggestions of three seeds were
within a factor of 1.4; with AdamW they lay between the two best of a grid of half decades, after 200 updates at each.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from accel_pretrain.aids import DebugConfig
from accel_pretrain.checkpoint import TrainState
from accel_pretrain.config import RunConfig, make_plan, open_splits
from accel_pretrain.errors import PretrainError, refuse
from accel_pretrain.look import STYLE, TRAIN, VAL
from accel_pretrain.loop import train_step
from accel_pretrain.origin import find_origin, weights_of
from accel_pretrain.pace import tiny_is_zero
from accel_pretrain.parallel import fill
from accel_pretrain.peers import Peers
from accel_pretrain.runtime import build_accelerator, describe_runtime
from accel_pretrain.schedule import Constant
from accel_pretrain.trial import build, whole_updates
from accel_pretrain.typed_values import NULLS

UPDATES = 200
LOWEST, HIGHEST = 1e-6, 10.0
PICTURE = Path("lr_find.png")
_DONE = 0.8  # of the fall of the smoothed loss, from its first value to its lowest, up to the suggestion
_SMOOTH = 5  # updates to either side: the standard deviation of the Gaussian that smooths the losses
_HOPELESS = 1.0  # nats above the best smoothed loss, where the test ends
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rising(Constant):
    """The rate of update 1 is ``LOWEST``, of the last ``HIGHEST``; each is the same multiple of the one before."""

    def lr(self, step: int, peak: float, total: int) -> float:
        return LOWEST * (HIGHEST / LOWEST) ** ((step - 1) / max(1, total - 1))

    def warmup(self, total: int) -> int:
        return 0


@dataclass(frozen=True)
class RangeTest:
    """What was measured: ``losses`` at ``rates``, smoothed, and the number of the update at whose rate to train."""

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    chosen: int

    @property
    def suggestion(self) -> float:
        """Two digits of it: the test says no more."""
        return float(f"{self.rates[self.chosen]:.1e}")


@tiny_is_zero()
def find(config: RunConfig) -> int:
    """Measure, draw, and say what to type; returns the exit code. Collective."""
    refuse_what_is_another_run(config)
    debug = DebugConfig()
    training = replace(whole_updates(config.training, UPDATES), on_spike="log")
    config = replace(config, training=training, schedule=Rising(), debug=debug)
    with tempfile.TemporaryDirectory(prefix="lr_find_") as folder:
        accelerator = build_accelerator(config.training, [], Path(folder), config.parallel)
        say = accelerator.print
        splits = open_splits(config.data)
        with Peers(accelerator).once():
            plan = make_plan(config, splits, accelerator.num_processes)
        run = build(config, plan, splits, accelerator, Path(folder))
        if config.checkpoint.init_from is not None:
            fill(run.module, weights_of(find_origin(config.checkpoint), run.module, splits))
        say(describe_runtime(accelerator, config.training, config.parallel))
        say(f"Range test: up to {UPDATES} updates of {plan.tokens_per_step:,} tokens, learning rates {LOWEST:g} to {HIGHEST:g}")
        state, rates, losses = TrainState(), list[float](), list[float]()
        while len(losses) < UPDATES and not is_hopeless(losses):
            update = train_step(run, state)
            assert update is not None  # nobody is asked to stop here
            state.step += 1
            state.samples += update.samples
            rates.append(update.lr)
            losses.append(update.loss.item())
        run.log.close()
        result = evaluate(np.array(rates), np.array(losses))
        if accelerator.is_main_process:
            report(result, say)
        accelerator.end_training()
    return 0


def refuse_what_is_another_run(config: RunConfig) -> None:
    """A range test begins anew, on the data as it comes."""
    resume = config.checkpoint.resume_from
    refuse(
        (
            resume not in ("auto", "never", None) and str(resume).lower() not in NULLS,
            "--lr_find begins anew, and does not go on from a checkpoint; leave out --resume_from, or type --init_from",
        ),
        (
            config.debug != DebugConfig(),
            "--lr_find is a run of its own; leave out --overfit_one_batch, --profile, --detect_anomaly and --inspect_*",
        ),
    )


def is_hopeless(losses: list[float]) -> bool:
    """Whether higher rates will not do any better: not finite any more, or far above what has been reached."""
    if losses and not math.isfinite(losses[-1]):
        return True
    means = np.convolve(losses, np.full(5, 0.2), "valid") if len(losses) > 20 else np.zeros(1)
    return bool(means[-1] > means.min() + _HOPELESS)


def evaluate(rates: np.ndarray, losses: np.ndarray) -> RangeTest:
    """The suggestion. PretrainError if the loss did not fall anywhere."""
    fine = np.isfinite(losses)
    rates, losses = rates[fine], losses[fine]
    smoothed = smooth(losses)
    lowest = int(smoothed.argmin()) if smoothed.size else 0
    if lowest < 5 or smoothed[0] - smoothed[lowest] < 0.05:
        raise PretrainError(
            f"--lr_find: the loss did not fall at any learning rate from {LOWEST:g} on (it began at "
            f"{losses[0] if losses.size else math.nan:.3f}); type --overfit_one_batch, or --detect_anomaly, to see why"
        )
    there = smoothed <= smoothed[0] - _DONE * (smoothed[0] - smoothed[lowest])
    return RangeTest(rates, losses, smoothed, int(there.argmax()))


def smooth(losses: np.ndarray) -> np.ndarray:
    """Losses averaged with a Gaussian over their neighbours; at the ends, over those that there are."""
    offsets = np.arange(losses.size)
    weights = np.exp(-0.5 * ((offsets[:, None] - offsets) / _SMOOTH) ** 2)
    return weights @ losses / weights.sum(1)


def report(result: RangeTest, say: Callable[[str], None]) -> None:
    """The line to type, and the picture, if there is something to draw with and somewhere to put it."""
    lowest = int(result.smoothed.argmin())
    say(
        f"The loss has done four fifths of its fall at {result.rates[result.chosen]:.1e}, is lowest at "
        f"{result.rates[lowest]:.1e}, and the test ended at {result.rates[-1]:.1e}\ntype: --lr {result.suggestion:g}"
    )
    try:
        draw(result, PICTURE)
        say(f"wrote {PICTURE}")
    except ImportError:
        say("no picture: pip install 'accel_pretrain[plot]'")
    except OSError as error:
        _log.warning("no picture: %s could not be written (%s)", PICTURE.absolute(), error.strerror or error)


def draw(result: RangeTest, path: Path) -> None:
    """Loss over learning rate: as measured, smoothed, and where the suggestion is. ImportError without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5), facecolor="white", layout="constrained")
        ax = figure.subplots()
        ax.plot(result.rates, result.losses, color=TRAIN, linewidth=0.8, alpha=0.35, label="measured")
        ax.plot(result.rates, result.smoothed, color=TRAIN, linewidth=2, label="smoothed")
        height = result.smoothed[result.chosen]
        ax.axvline(result.suggestion, color=VAL, linewidth=1, linestyle=(0, (4, 3)))
        ax.plot([result.suggestion], [height], "o", color=VAL, label=f"suggestion: --lr {result.suggestion:g}")
        ax.set_xscale("log")
        ax.set_ylim(result.smoothed.min() - 0.2, result.smoothed[: result.smoothed.argmin() + 1].max() + 0.5)
        ax.set_xlabel("Learning rate")
        ax.set_title("Loss (nats per token), the rate rising from update to update", loc="left", fontsize=11)
        ax.legend()
        figure.savefig(path, dpi=150)
