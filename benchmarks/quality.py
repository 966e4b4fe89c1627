"""Half the time to the same loss: our recipe against a GPT-2-shaped baseline with nanoGPT's hyperparameters, on a CPU.

    python -m benchmarks.quality --text tinyshakespeare.txt --out quality.json     everything; some hours on two cores
    python -m benchmarks.quality --text tinyshakespeare.txt --quick                time and tokens, shorter, in 20 minutes
    python -m benchmarks.quality --figure ingredients --corpus code --minutes 1.5  one of them
    python -m benchmarks.quality --figure race --arms 'a=@recipe' 'b=@recipe --model.d_model 320' '0.5 c=@baseline'

Two corpora: ``code``, the sources of the Python standard library in a vocabulary of 8192 that is learned from them, and, with
``--text FILE``, the bytes of that file (of tinyshakespeare, its characters). The figures:

**time**: how long the recipe (configs/speedrun_cpu.yaml) needs for the validation loss that the baseline reaches in
``--minutes``. A learning rate has to know when a run ends. So the baseline has a cosine over its whole time, and the recipe
runs with horizons that are fixed beforehand, ``--shares`` of that time, each a run of its own. A horizon counts if its run
reached the loss with every seed; then the figure is the mean of when it did, between two evaluations by a straight line. The
baseline's loss is the lowest of its curve, and its time the one at which it had that. The baseline is what nanoGPT's README
gives for a CPU, at the best of a grid of learning rates; **tune** tries that, and nanoGPT's settings for a GPU. The rates of
the recipe come from a search of the same kind. Model, batch and context of the recipe are its own: what a person waits for is a
loss, not a model of so many parameters. Text, tokenizer, held-out tokens, order of the data, precision, threads and code are
the same. The baseline runs on the fast paths of this package, too.
**tokens**: Muon against AdamW at three rates, of which the best counts, with the same model, batches and schedule and the same
rate of the embeddings: the part of AdamW's tokens that Muon needs.
**wsd**: three horizons by one WSD run and branches from its checkpoints, against three full cosine runs.
**ingredients**: everything of which the recipe is made, added to the baseline and removed from the recipe, at equal FLOPs (of
the model), and what it does to the time. Nothing else is tuned again for it: a row is what that one thing does there.

Arms are trained in turns by :mod:`benchmarks.quality_race`: a slice of some seconds each, and the clock of an arm counts only
its own slices; evaluation is not counted. ``ratio`` is of seconds; FLOPs and tokens to the same loss are beside it. Seeds
change weights and order of the data. Values are means ± standard errors. ``--cpu_time`` is for one thread on a busy machine.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import quality_arms, quality_wsd
from benchmarks.quality_race import Arm, Machine, Point, best, mean_se, operations, planned, race, ratios, speeds

BAR = {"time": 0.5, "tokens": 0.75}
PROBE_SECONDS = 12.0
Curves = Sequence[Mapping[str, list[Point]]]


def run(arms: Sequence[Arm], data: dict[str, Any], options: argparse.Namespace, *, equal: str = "time") -> list[Any]:
    """The curves of all arms, for every seed: in equal time, or in the updates or FLOPs that the first does in that time."""
    seconds, machine = 60 * options.minutes, Machine(options.threads, options.cpu_time, options.precision)
    probe = min(PROBE_SECONDS, max(seconds / 15, min(6.0, seconds / 5)))
    with tempfile.TemporaryDirectory() as folder:
        speed = speeds(arms if equal == "time" else arms[:1], data, Path(folder), probe, machine)
        if equal != "time":
            costs = {arm.name: operations(arm, data) if equal == "flops" else 1.0 for arm in arms}
            speed = {name: speed[arms[0].name] * costs[arms[0].name] / cost for name, cost in costs.items()}
        updates = planned(arms, speed, seconds)
        print("  " + ", ".join(f"{name}: {count} updates" for name, count in updates.items()), flush=True)
        curves = []
        for seed in range(1, options.seeds + 1):
            curves.append(race(arms, updates, data, Path(folder), seed, options.rounds, machine))
            ends = (f"{name} {curve[-1].loss:.4f} in {curve[-1].seconds:.0f} s" for name, curve in curves[-1].items())
            print(f"  seed {seed}: " + ", ".join(ends), flush=True)
    return curves


def summary(curves: Curves, arms: Sequence[Arm], against: str) -> dict[str, Any]:
    """Of every arm: its best loss, its speed, and what it needs of seconds, tokens and FLOPs for the loss of ``against``."""
    rows: dict[str, Any] = {}
    for arm in arms:
        ends = [seed[arm.name][-1] for seed in curves]
        row: dict[str, Any] = {"share": arm.share, "loss": mean_se([best(seed[arm.name]).loss for seed in curves])}
        row |= {"seconds": mean_se([end.seconds for end in ends]), "tokens": ends[0].tokens, "flops": ends[0].flops}
        for what in ("seconds", "tokens", "flops"):
            found = ratios(curves, arm.name, against, what)
            whole = [ratio for ratio in found if ratio is not None]
            row[f"{what}_ratio"] = mean_se(whole) if len(whole) == len(found) else None
        row["reached"] = f"{sum(ratio is not None for ratio in found)} of {len(found)}"
        rows[arm.name] = row
    return rows


def _pm(pair: tuple[float, float] | None, digits: int) -> str:
    if pair is None:
        return "not reached"
    mean, error = pair
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def show(rows: dict[str, Any]) -> None:
    print(f"  {'':<24}{'loss':>18}{'seconds':>10}{'Mtokens':>9}{'ratio':>16}{'FLOPs':>16}{'tokens':>16}")
    for name, row in rows.items():
        needs = "".join(f"{_pm(row[f'{what}_ratio'], 2):>16}" for what in ("seconds", "flops", "tokens"))
        print(f"  {name:<24}{_pm(row['loss'], 4):>18}{row['seconds'][0]:>10.0f}{row['tokens'] / 1e6:>9.2f}{needs}", flush=True)


def changes(curves: Curves, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """What each arm changes: ``+ x`` of the first arm, ``- x`` of the recipe. Of loss and time: mean and error of the pairs."""
    found: dict[str, dict[str, Any]] = {}
    for name in (arm.name for arm in arms if arm.name[:2] in ("+ ", "- ")):
        base = arms[0].name if name[0] == "+" else "recipe"
        losses = [best(seed[name]).loss - best(seed[base]).loss for seed in curves]
        times = [seed[name][-1].seconds / seed[base][-1].seconds for seed in curves]
        found[name] = {"loss": mean_se(losses), "time": mean_se(times)}
    return found


def show_changes(found: Mapping[str, dict[str, Any]]) -> None:
    """A row for each ingredient."""
    print(f"  {'':<20}{'added: loss':>18}{'time':>8}{'removed: loss':>18}{'time':>8}")
    for name in (name[2:] for name in found if name[0] == "+"):
        pairs = (found[f"{sign} {name}"] for sign in "+-")
        cells = (f"{pair['loss'][0]:>+9.3f} ± {pair['loss'][1]:.3f}{pair['time'][0]:>7.2f}x" for pair in pairs)
        print(f"  {name:<20}" + "  ".join(cells), flush=True)


def verdict(rows: dict[str, Any], figure: str, what: str) -> float | None:
    """The smallest ratio of the arms that reached the loss with every seed, against the bar."""
    found = [row[f"{what}_ratio"][0] for row in rows.values() if row[f"{what}_ratio"] is not None]
    least = min(found, default=None)
    said = "not reached" if least is None else f"{least:.3f}"
    print(f"  {figure} to the same loss: {said} ({'met' if least and least <= BAR[figure] else 'MISSED'}: {BAR[figure]})")
    return least


def measure(figure: str, corpus: str, data: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One figure on one corpus: what was found, for JSON."""
    print(f"{figure}, {corpus}: {options.minutes:g} minutes, {options.seeds} seeds", flush=True)
    if figure == "wsd":
        return {**quality_wsd.compare(quality_arms.recipe(corpus), data, options), "corpus": corpus}
    equal = "time"
    if figure == "time":
        arms = [quality_arms.baseline(corpus)]
        arms += [replace(quality_arms.recipe(corpus, share), name=f"recipe {share:g}") for share in options.shares]
    elif figure == "tokens":
        muon, equal = quality_arms.recipe(corpus), "updates"
        arms = [quality_arms.with_adamw(muon, rate) for rate in quality_arms.ADAMW_RATES]
        arms += [replace(muon, name=f"muon {s:g}", share=s) for s in options.token_shares]
    elif figure == "ingredients":
        arms, equal = quality_arms.ingredient_arms(corpus), "flops"
    elif figure == "tune":
        arms = quality_arms.tune_arms(corpus)
    else:
        arms = [parse_arm(text, corpus) for text in options.arms]
    curves = run(arms, data, options, equal=equal)
    rivals = [arm.name for arm in arms if arm.name.startswith("adamw")] if figure == "tokens" else [arms[0].name]
    rival = min(rivals, key=lambda name: mean_se([best(seed[name]).loss for seed in curves])[0])
    rows = summary(curves, arms, rival)
    show(rows)
    found: dict[str, Any] = {"figure": figure, "corpus": corpus, "minutes": options.minutes, "rows": rows}
    if figure in BAR:
        found[f"{figure}_ratio"] = verdict(
            {name: row for name, row in rows.items() if name not in rivals}, figure, "seconds" if figure == "time" else "tokens"
        )
    if figure == "ingredients":
        found["changes"] = changes(curves, arms)
        show_changes(found["changes"])
    found["curves"] = [{name: [asdict(point) for point in curve] for name, curve in seed.items()} for seed in curves]
    return found


def parse_arm(text: str, corpus: str) -> Arm:
    """``[SHARE ]NAME=@recipe|@baseline [--key VALUE]...``"""
    name, _, what = text.partition("=")
    share, _, rest = name.rpartition(" ")
    base, *words = shlex.split(what)
    arm = {"@recipe": quality_arms.recipe, "@baseline": quality_arms.baseline}[base](corpus)
    given = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    return replace(arm.but(rest, given), share=float(share or 1))


def plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    """The curves of the figure ``time``: loss over seconds of training, every seed."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from accel_pretrain.look import FAINT, RUN_COLOURS, STYLE

    figures = [own for own in found if own["figure"] == "time"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6 * max(1, len(figures)), 4), facecolor="white", layout="constrained")
        axes = figure.subplots(1, max(1, len(figures)), squeeze=False)
        for axis, own in zip(axes[0], figures, strict=False):
            for seed, curves in enumerate(own["curves"]):
                for (name, curve), color in zip(curves.items(), RUN_COLOURS, strict=False):
                    xs, ys = ([point[key] for point in curve] for key in ("seconds", "loss"))
                    axis.plot(xs, ys, color=color, linewidth=1.2, alpha=0.8, label=name if seed == 0 else None)
            target = own["rows"]["baseline"]["loss"][0]
            axis.axhline(target, color=FAINT, linewidth=0.8, linestyle="--")
            axis.set_title(f"{own['corpus']}: held-out loss (nats per token)", loc="left", fontsize=11)
            axis.set_xlabel("seconds of training")
            axis.set_ylim(None, target + 1.0)
            axis.legend()
        figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if options.quick:
        options.minutes, options.rounds, options.figure = 0.8, 8, options.figure or ["time", "tokens"]
    corpora = options.corpus or ["code", *(["text"] if options.text else [])]
    if "text" in corpora and options.text is None:
        sys.exit("error: --corpus text needs a file; type --text FILE")
    options.data.mkdir(parents=True, exist_ok=True)
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}", flush=True)
    data = {corpus: quality_arms.prepare(options.data, corpus, options.text, options.tokenizer) for corpus in corpora}
    found = []
    for figure in options.figure or ["time", "tokens", "wsd", "ingredients"]:
        for corpus in corpora if figure == "time" or options.corpus else corpora[:1]:
            found.append(measure(figure, corpus, data[corpus], options))
            times = [own["time_ratio"] for own in found if own["figure"] == "time"]
            about = {"command": shlex.join(sys.argv), "machine": platform.platform(), "torch": torch.__version__}
            settings = {key: str(value) for key, value in vars(options).items()}
            worst = max(times) if times and None not in times else None
            if options.out:
                document = {"time_ratio": worst, "figures": found, "settings": settings, **about}
                options.out.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    if options.plot:
        plot(found, options.plot)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--figure", nargs="+", choices=["time", "tokens", "wsd", "ingredients", "tune", "race"])
    own.add_argument("--corpus", nargs="+", choices=["code", "text"], help="default: both, text only with --text")
    own.add_argument("--text", type=Path, help="a text file, trained on byte by byte")
    own.add_argument("--tokenizer", default="train:8192", help="of code, as prep.tokenize takes it")
    own.add_argument("--data", type=Path, default=Path("data/quality"), help="where the datasets are, or will be")
    own.add_argument("--minutes", type=float, default=5.0, help="training time of the baseline")
    own.add_argument("--seeds", type=int, default=3)
    own.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.35], help="horizons of the recipe")
    own.add_argument("--token_shares", type=float, nargs="+", default=[0.75, 0.6], help="of Muon, of AdamW's tokens")
    own.add_argument("--rounds", type=int, default=24, help="slices of every run, each with an evaluation")
    own.add_argument(
        "--arms", nargs="+", default=[], help="of --figure race: '[SHARE ]NAME=@recipe|@baseline [--key VALUE]...'"
    )
    own.add_argument("--threads", type=int, default=2)
    own.add_argument("--cpu_time", action="store_true", help="clocks count the processor's time: with --threads 1")
    own.add_argument("--precision", default="bf16", choices=["bf16", "no"])
    own.add_argument(
        "--quick", action="store_true", help="time and tokens with less than a minute each: at most 20 minutes in all"
    )
    own.add_argument("--out", type=Path, help="JSON with everything, and time_ratio: the larger of the corpora")
    own.add_argument("--plot", type=Path, help="a PNG of the curves of --figure time")
    return own


if __name__ == "__main__":
    main()
