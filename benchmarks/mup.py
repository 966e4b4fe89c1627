"""Whether widths share their best learning rate, with ``mup_base_width`` and without: ``python -m benchmarks.mup``.

The coordinate check (Yang & Hu 2022, appendix D): after each of the first updates, how much the size (root mean square) of
what each part of the model gives has changed; with muP it must not grow or vanish with the width. Then the loss of short runs
over learning rates, for each width: the best of width 64 is to be the best of width 512. ``--plot FILE.png`` draws both.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.optim import AdamW, Muon, Optimizer, set_lr
from accel_pretrain.rules import settle_in
from benchmarks.optimizers import NOT_BRACKETED, VOCAB, B, batch, bracketed, corpus, nats, shape, train

BASE = 64
PARTS = ("layers.1.self_attn.o_proj", "layers.1.mlp.down_proj", "lm_head")


def model_of(width: int, scaled: bool) -> ModelConfig:
    return replace(shape(width, layers=2), mup_base_width=BASE if scaled else None, init_std=1 / math.sqrt(BASE))


def coordinates(width: int, optimizer: Optimizer, scaled: bool, updates: int = 4) -> dict[str, float]:
    """Root mean square of how far the output of each part has moved after some updates at a constant rate."""
    learn, _ = corpus()
    torch.manual_seed(0)
    model = Transformer(model_of(width, scaled), VOCAB)
    built = optimizer.build(model)
    settle_in(built, "bf16", 1)
    ids = batch(learn, torch.Generator().manual_seed(0))
    given: dict[str, torch.Tensor] = {}
    for name in PARTS[:2]:

        def kept(module: nn.Module, inputs: object, output: torch.Tensor, name: str = name) -> None:
            given[name] = output.detach().float()

        model.get_submodule(name).register_forward_hook(kept)

    def logits(module: nn.Module, inputs: object, output: torch.Tensor) -> None:  # the loss takes the matrix, not the layer
        given["lm_head"] = model.unembed(output).detach().float()

    model.norm.register_forward_hook(logits)

    def looked() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            nats(model, ids)
        return dict(given)

    before = looked()
    for _ in range(updates):
        nats(model, ids).backward()
        set_lr(built, optimizer.lr)
        built.step()
        built.zero_grad()
    after = looked()
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in PARTS}


def best_of(losses: dict[float, float]) -> float:
    """The learning rate at the bottom of a parabola through the best one and its neighbours, over the logarithm."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda number: losses[rates[number]])
    if not 0 < at < len(rates) - 1:
        return rates[at]
    x = [math.log(rate) for rate in rates[at - 1 : at + 2]]
    left, middle, right = (losses[rate] for rate in rates[at - 1 : at + 2])
    bend = left - 2 * middle + right
    return math.exp(x[1] + (x[1] - x[0]) * (left - right) / (2 * bend)) if bend > 0 else rates[at]


def verdict(losses: Mapping[int, dict[float, float]]) -> str:
    """The best rate of each width; how far they are apart, if each lies between worse ones."""
    bests = {width: best_of(own) for width, own in losses.items()}
    edges = {width: "" if bracketed(own) else f" ({NOT_BRACKETED})" for width, own in losses.items()}
    line = "best lr: " + " and ".join(f"{best:.2g}{edges[width]}" for width, best in bests.items())
    return line if any(edges.values()) else f"{line}, {max(bests.values()) / min(bests.values()):.2f}x apart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3, help="losses are means over so many runs")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--rates", type=float, nargs="*", default=[2.0**-k for k in (11, 10, 9, 8, 7, 6, 5)])
    parser.add_argument("--check_only", action="store_true", help="only the coordinate check: a minute")
    parser.add_argument("--plot", type=Path, help="draw both there, as a PNG")
    words = parser.parse_args()
    torch.set_num_threads(1)
    plain: Optimizer = AdamW(weight_decay=0.0) if words.optimizer == "adamw" else Muon(weight_decay=0.0)
    moved: dict[bool, dict[int, dict[str, float]]] = {}
    for scaled in (True, False):
        print(f"how far outputs move in 4 updates, {'muP' if scaled else 'as it is'}: width, {', '.join(PARTS)}")
        moved[scaled] = {width: coordinates(width, replace(plain, lr=2.0**-8), scaled) for width in words.widths}
        for width, sizes in moved[scaled].items():
            print(f"{width:>5} " + " ".join(f"{size:10.4f}" for size in sizes.values()), flush=True)
    losses: dict[bool, dict[int, dict[float, float]]] = {True: {}, False: {}}
    for scaled in () if words.check_only else (True, False):
        for width in (words.widths[0], words.widths[-1]):
            own = dict(losses[True][width]) if not scaled and width == BASE else {}  # where nothing is scaled
            for rate in () if own else words.rates:
                config, optimizer = model_of(width, scaled), replace(plain, lr=rate)
                own[rate] = statistics.mean(train(config, optimizer, words.updates, seed).loss for seed in range(words.seeds))
                print(f"{'muP' if scaled else 'as it is'}, width {width}, lr {rate:.2g}: {own[rate]:.4f}", flush=True)
            losses[scaled][width] = own
        print(verdict(losses[scaled]), flush=True)
    if words.plot:
        draw(words.plot, moved, losses)


def draw(path: Path, moved: dict[bool, dict[int, dict[str, float]]], losses: dict[bool, dict[int, dict[float, float]]]) -> None:
    """Coordinates over width above, losses over learning rate below; muP on the left."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from accel_pretrain.look import RUN_COLOURS, STYLE

    rows = 2 if losses[True] else 1
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6 * rows), facecolor="white", layout="constrained")
        axes = figure.subplots(rows, 2, sharey="row", squeeze=False)
        for column, scaled in enumerate((True, False)):
            for name, color in zip(PARTS, RUN_COLOURS, strict=False):
                sizes = [own[name] for own in moved[scaled].values()]
                axes[0, column].plot(list(moved[scaled]), sizes, "o-", color=color, markersize=4, label=name)
            axes[0, column].set(xscale="log", yscale="log", xlabel="width")
            axes[0, column].set_xticks(list(moved[scaled]), labels=list(map(str, moved[scaled])))
            axes[0, column].minorticks_off()
            axes[0, column].set_title("mup_base_width 64" if scaled else "not scaled", loc="left", fontsize=11)
            for (width, own), color in zip(losses[scaled].items(), RUN_COLOURS, strict=False):
                axes[1, column].plot(list(own), list(own.values()), "o-", color=color, markersize=4, label=f"width {width}")
            if losses[True]:
                axes[1, column].set(xscale="log", xlabel="learning rate")
        axes[0, 0].set_ylabel("how far outputs move in 4 updates")
        axes[0, 0].legend(fontsize=8)
        if losses[True]:
            axes[1, 0].set_ylabel(f"loss after updates of {B} sequences")
            axes[1, 0].legend(fontsize=8)
        figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
