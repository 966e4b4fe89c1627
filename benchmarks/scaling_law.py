"""Where the loss is lowest at equal compute, against what the dial takes: five shapes of ``--preset depth=N`` on a CPU.

    python -m benchmarks.scaling_law --minutes 60 --out law.json --plot law.png     the standard library in bytes
    python -m benchmarks.scaling_law --data data/mine --depths 2,3,4,5 --seeds 3

The method is IsoFLOP (Hoffmann et al. 2022, section 3.2): every shape trains for so many tokens that all do C operations. A
small model sees many tokens, a large one few, and in between lies the best. A parabola of the loss over the logarithm of the
parameters has its minimum there. The dial has an opinion on that: :data:`accel_pretrain.preset.TOKENS_PER_PARAMETER`.

Parameters are those that multiply, as the dial counts them. Rate and batch of each run are the dial's for its tokens; the
context is the same for all, else losses were of different things. All runs are the trainer's own command line. C is what fits
into ``--minutes`` at the speed that each shape has here, measured first. It decides where the minimum can lie: at 12 tokens per
parameter, C = 72 P^2, so that with bytes 3e11 operations are for depth 1, 1e13 for depth 2, 1.4e14 for depth 3. Where C is
small for the depths, the minimum lies outside, and the benchmark says so: take more minutes, or other ``--depths``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel_pretrain.config import RunConfig, flat, make_plan, open_splits
from accel_pretrain.preset import TOKENS_PER_PARAMETER, load_with, multiplying
from accel_pretrain.typed_yaml import parse_command_line
from benchmarks.quality_arms import prepare
from benchmarks.quality_race import Arm, Machine, mean_se, speeds, words_of
from benchmarks.quality_wsd import final_loss

PROBE_SECONDS = 12.0


@dataclass(frozen=True)
class Shape:
    """One shape of the dial. ``parameters``: those that multiply; ``flops``: of a token, forward and backward."""

    depth: int
    parameters: int
    flops: int
    tokens_per_update: int
    config: RunConfig
    settings: dict[str, Any]


@dataclass(frozen=True)
class Minimum:
    """That of a parabola over the logarithm of parameters. ``inside``: between the shapes that were trained."""

    parameters: float
    tokens: float
    loss: float
    inside: bool

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


def shape_of(depth: int, data: dict[str, Any], options: argparse.Namespace) -> Shape:
    """What the dial makes of a depth, with the context of all."""
    own = {"model.context_length": options.context, "checkpoint.save_best": False}
    words = parse_command_line(RunConfig, words_of({**data, **own})).overrides
    config = load_with(RunConfig, f"depth={depth}", None, words)
    plan = make_plan(config, open_splits(config.data), 1)
    count = multiplying(config.model, plan.vocab_size)
    return Shape(depth, count, plan.flops_per_token, plan.tokens_per_step, config, {"preset": f"depth={depth}", **own})


def compute(
    shapes: Sequence[Shape], data: dict[str, Any], folder: Path, options: argparse.Namespace, machine: Machine
) -> float:
    """C, the operations of every run, so that all runs together take ``options.minutes``."""
    if options.flops is not None:
        return options.flops
    left = ("data.", "evaluation.", "checkpoint.", "logging.", "debug.", "training.max_tokens", "training.device")
    left += ("training.compile", "training.mixed_precision")
    arms = []
    for shape in shapes:
        settings = {key: value for key, value in flat(shape.config).items() if not key.startswith(left)}
        arms.append(Arm(str(shape.depth), settings))
    speed = speeds(arms, data, folder, min(PROBE_SECONDS, 3 * options.minutes), machine)
    seconds = sum(1 / (speed[str(shape.depth)] * shape.tokens_per_update * shape.flops) for shape in shapes)
    return 60 * options.minutes / (options.seeds * seconds)


def fit(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> Minimum | None:
    """The minimum of a parabola through the losses; None where it has none. Tokens: a straight line in logarithms."""
    x = np.log10(np.asarray(parameters, dtype=float))
    a, b, c = np.polyfit(x, losses, 2)
    if not a > 0:
        return None
    at = -b / (2 * a)
    slope, offset = np.polyfit(x, np.log10(tokens), 1)
    inside = bool(x.min() <= at <= x.max())
    return Minimum(float(10**at), float(10 ** (slope * at + offset)), float(c - b * b / (4 * a)), inside)


def train_all(
    shapes: Sequence[Shape], flops: float, data: dict[str, Any], folder: Path, options: argparse.Namespace, machine: Machine
) -> list[dict[str, Any]]:
    """A row for each shape: what it was, what it saw, and the loss of every seed."""
    rows = []
    print(f"  {'depth':>5}{'parameters':>13}{'tokens':>13}{'each':>8}{'loss':>20}")
    for shape in shapes:
        tokens = max(options.context, round(flops / shape.flops))
        arm = Arm(f"depth_{shape.depth}", shape.settings)
        losses = [
            final_loss(
                arm, data, folder / f"{arm.name}_{seed}", seed, machine,
                {"training.max_tokens": tokens, "checkpoint.checkpoint_interval": 10**6, "checkpoint.keep_last": 1},
            )
            for seed in range(1, options.seeds + 1)
        ]  # fmt: skip
        mean, error = mean_se(losses)
        each = tokens / shape.parameters
        rows.append({
            "depth": shape.depth, "parameters": shape.parameters, "tokens": tokens, "tokens_per_parameter": each,
            "flops_per_token": shape.flops, "loss": mean, "standard_error": error if math.isfinite(error) else None,
            "losses": losses,
        })  # fmt: skip
        shown = f"{mean:.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")
        print(f"  {shape.depth:>5}{shape.parameters:>13,}{tokens:>13,}{each:>8.1f}{shown:>20}", flush=True)
    return rows


def verdict(found: Minimum | None) -> str:
    """The sentence that the benchmark is for."""
    if found is None:
        return "the losses have no minimum over parameters: take other --depths, or more --minutes"
    where = f"{found.parameters:,.0f} parameters, {found.tokens:,.0f} tokens"
    said = f"lowest at {where}: {found.tokens_per_parameter:.3g} tokens per parameter; the dial takes {TOKENS_PER_PARAMETER}"
    return said if found.inside else f"{said}. That is OUTSIDE of what was trained, so a guess"


def plot(rows: Sequence[dict[str, Any]], found: Minimum | None, flops: float, path: Path) -> None:
    """Losses over parameters, the parabola, its minimum, and where the dial's ratio lies."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from accel_pretrain.look import FAINT, STYLE, TRAIN, VAL

    x, y = np.array([row["parameters"] for row in rows], dtype=float), np.array([row["loss"] for row in rows])
    errors = [row["standard_error"] or 0.0 for row in rows]
    tokens = np.log10([row["tokens"] for row in rows])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.2), facecolor="white", layout="constrained")
        ax = figure.subplots()
        fine = np.geomspace(x.min(), x.max(), 200)
        ax.plot(fine, np.polyval(np.polyfit(np.log10(x), y, 2), np.log10(fine)), color=TRAIN, linewidth=1.2)
        ax.errorbar(x, y, errors, color=TRAIN, linestyle="", marker="o", markersize=5)
        for row in rows:
            label = f"depth {row['depth']}\n{row['tokens_per_parameter']:.3g} each"
            ax.annotate(label, (row["parameters"], row["loss"]), (0, 9), textcoords="offset points", ha="center", fontsize=8)
        slope, offset = np.polyfit(np.log10(x), tokens - np.log10(x), 1)
        dial = 10 ** ((math.log10(TOKENS_PER_PARAMETER) - offset) / slope)
        ax.axvline(dial, color=FAINT, linewidth=0.9, linestyle="--")
        ax.annotate(f"dial: {TOKENS_PER_PARAMETER} each", (dial, 0.02), (4, 0), xycoords=("data", "axes fraction"),
                    textcoords="offset points", color=FAINT, fontsize=8)  # fmt: skip
        if found is not None and found.inside:
            ax.plot([found.parameters], [found.loss], color=VAL, marker="v", markersize=7, linestyle="")
            ax.annotate(f"{found.tokens_per_parameter:.3g} each", (found.parameters, found.loss), (0, -15),
                        textcoords="offset points", color=VAL, ha="center", fontsize=9)  # fmt: skip
        ax.set_xscale("log")
        ax.margins(0.08, 0.18)
        ax.set_xlabel("parameters that multiply")
        ax.set_title(f"Held-out loss (nats per token) after {flops:.1e} FLOP each", loc="left", fontsize=11)
        figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if len(set(options.depths)) < 3:
        sys.exit("error: --depths: a parabola needs three different ones or more; type --depths 1,2,3,4,5")
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}", flush=True)
    machine = Machine(options.threads, False, options.precision)
    if options.data is None:
        options.folder.mkdir(parents=True, exist_ok=True)
        data = prepare(options.folder, "code", None, "bytes")
    else:
        data = {"data.train_data_path": options.data}
    shapes = [shape_of(depth, data, options) for depth in options.depths]
    with tempfile.TemporaryDirectory() as name:
        flops = compute(shapes, data, Path(name), options, machine)
        print(f"scaling law: {len(shapes)} shapes x {options.seeds} seeds, {flops:.3g} FLOP each", flush=True)
        rows = train_all(shapes, flops, data, Path(name), options, machine)
    found = fit(*([row[key] for row in rows] for key in ("parameters", "tokens", "loss")))
    print(f"  {verdict(found)}")
    if options.plot is not None:
        plot(rows, found, flops, options.plot)
    if options.out is not None:
        about = {"command": shlex.join(sys.argv), "machine": platform.platform(), "torch": torch.__version__}
        minimum = None if found is None else {**asdict(found), "tokens_per_parameter": found.tokens_per_parameter}
        document = {**about, "flops": flops, "dial": TOKENS_PER_PARAMETER, "rows": rows, "minimum": minimum}
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--data", type=Path, help="a dataset of prep.tokenize; else the standard library in bytes")
    words.add_argument("--folder", type=Path, default=Path("data/scaling_law"), help="where to prepare that")
    words.add_argument("--depths", type=lambda text: [int(word) for word in text.split(",")], default=[1, 2, 3, 4, 5])
    words.add_argument("--minutes", type=float, default=60.0, help="of all runs together, about")
    words.add_argument("--flops", type=float, help="of each run, instead of what fits into --minutes")
    words.add_argument("--seeds", type=int, default=1)
    words.add_argument("--context", type=int, default=256, help="positions, the same for all")
    words.add_argument("--threads", type=int, default=2)
    words.add_argument("--precision", default="bf16")
    words.add_argument("--out", type=Path, help="JSON")
    words.add_argument("--plot", type=Path, help="PNG")
    return words


if __name__ == "__main__":
    main()
