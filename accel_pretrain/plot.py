"""Draw what runs recorded: ``python -m accel_pretrain.plot RUN... [--out FILE]`` makes a picture of their ``metrics.jsonl``.

Panels over updates, tokens, operations or hours: loss, learning rate, gradient norm, throughput, and memory if it was recorded.
One run is drawn in colours by quantity, several in a colour each. :func:`draw` returns the figure; nothing here keeps global
state or opens a window.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from accel_pretrain.curves import Run, Series, is_noisy, metrics_path, moving_median, read_runs, short, unit_of, wants_log
from accel_pretrain.errors import ConfigError, PretrainError, refuse, reported
from accel_pretrain.layer_maps import draw_layers
from accel_pretrain.look import FAINT, RUN_COLOURS, STYLE, TRAIN, VAL
from accel_pretrain.typed_yaml import load, option, parse_command_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

USAGE = """\
usage: python -m accel_pretrain.plot RUN... [--out FILE] [--x tokens] [--smooth N] [--log xy]

  RUN              a run directory, or a metrics.jsonl
  --out, -o FILE   where to; the ending says the format (png, svg, pdf); else RUN/plot.png, or plot.png here for several runs
  --x WHAT         update | tokens | flops | time: what runs are compared by (time: hours of training, without what lies between
                   starts); update
  --smooth N       rows that the moving median of noisy curves spans; 1: none; else 1/25 of all
  --log WHERE      auto | none | x | y | xy; auto: y where a spike would flatten the rest
  --help           show this

A run that has recorded its layers (debug.inspect_interval) gets a second picture, plot_layers.png, beside the first.
"""

FORMATS = (".png", ".svg", ".pdf")
PANELS = {
    "train/loss": "Loss (nats per token)",
    "train/learning_rate": "Learning rate",
    "train/grad_norm": "Gradient norm (before clipping)",
    "train/tokens_per_sec": "Throughput (tokens per second)",
    "train/peak_memory_gb": "Peak memory (GB)",
}
LOG_FOR_SPIKES = ("train/loss", "train/grad_norm")
LOG_TOO = (*LOG_FOR_SPIKES, "train/learning_rate")
FROM_ZERO = ("train/learning_rate", "train/tokens_per_sec", "train/peak_memory_gb")


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """What ``accel_pretrain.plot`` can be told besides the runs."""

    out: Path | None = option(None, "the picture to write")
    x: Literal["update", "tokens", "flops", "time"] = option("update", "what runs are compared by")
    smooth: int | None = option(None, "rows that the moving median of noisy curves spans; 1: none; null: 1/25 of all")
    log: Literal["auto", "none", "x", "y", "xy"] = option("auto", "which axes are logarithmic")

    def __post_init__(self) -> None:
        refuse((self.smooth is not None and self.smooth < 1, f"smooth: must be at least 1, got {self.smooth}"))


def main(argv: Sequence[str] | None = None) -> int:
    with reported():
        words = sys.argv[1:] if argv is None else argv
        line = parse_command_line(PlotConfig, words, flags={"help"}, short={"-h": "help", "-o": "out"}, positionals=True)
        if "help" in line.flags:
            print(USAGE, end="")
            return 0
        out = plot([Path(word) for word in line.positionals], load(PlotConfig, line.config, line.overrides))
        print(
            f"wrote {out}" + (f" and {layers_path(out)}" if len(line.positionals) == 1 and layers_path(out).is_file() else "")
        )
        return 0
    return 2


def plot(paths: Sequence[Path], config: PlotConfig) -> Path:
    """Draw the runs at ``paths``, and return where the picture is."""
    if not paths:
        raise ConfigError("no run given; type: python -m accel_pretrain.plot RUN")
    runs, out = read_runs(paths), config.out
    if out is None:
        out = Path("plot.png") if len(paths) > 1 else metrics_path(paths[0]).with_name("plot.png")
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(f"out: {out} must end in {', '.join(FORMATS)}")
    figure = draw(runs, config)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
        if len(runs) == 1 and (layers := draw_layers(runs[0])) is not None:
            layers.savefig(layers_path(out), dpi=150)
    except OSError as error:
        raise ConfigError(f"out: cannot write {out.absolute()} ({error.strerror}); type --out FILE") from None
    return out


def layers_path(out: Path) -> Path:
    """Beside the picture of a run, that of its layers, if it has recorded them (debug.inspect_interval)."""
    return out.with_name(f"{out.stem}_layers{out.suffix}")


# ------------------------------------------------------------------------------------------------------------- drawing


def draw(runs: Sequence[Run], config: PlotConfig | None = None) -> Figure:
    """A figure with a panel for each of ``PANELS``, in that order; without memory if no run has recorded it."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # pyplot is not needed: no window, no state, always drawn by Agg
    except ImportError:
        raise PretrainError("plotting needs matplotlib: pip install 'accel_pretrain[plot]'") from None
    config = config or PlotConfig()
    shown = [metric for metric in PANELS if metric != "train/peak_memory_gb" or any(run.has(metric) for run in runs)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.2) if len(shown) == 4 else (13, 6.2), facecolor="white", layout="constrained")
        axes, (label, unit) = panels_of(figure, shown), unit_of(runs, config.x)
        for ax, metric in zip(axes, shown, strict=True):
            for run, colour in zip(runs, itertools.cycle(RUN_COLOURS if len(runs) > 1 else [TRAIN])):
                draw_line(ax, run.series(metric, config.x).over(unit), colour, config.smooth)
                if metric == "train/loss":
                    train, val = (run.series(name, config.x).over(unit) for name in ("eval/train_loss", "eval/val_loss"))
                    errors = run.values_at("eval/val_loss_standard_error", val.rows)
                    draw_evaluations(ax, train, val, errors, (colour, colour if len(runs) > 1 else VAL))
            finish_panel(ax, metric, PANELS[metric], config.log)
        finish_x(axes, np.concatenate([run.axis(config.x) / unit for run in runs]), label, config)
        key_to_losses(axes[0], runs)
        if len(runs) == 1:
            head_for_one(figure, runs[0])
        else:
            legend_for_several(figure, runs)
    return figure


def panels_of(figure: Figure, shown: Sequence[str]) -> list[Axes]:
    """Two rows of panels; where there are five, the loss has the place of two."""
    rows = [shown[:2], shown[2:]] if len(shown) == 4 else [[shown[0], *shown[:2]], shown[2:]]
    axes = figure.subplot_mosaic([list(row) for row in rows], sharex=True)
    for ax in axes.values():
        ax.tick_params(labelbottom=len(shown) > 4 or ax in list(axes.values())[2:])
    return [axes[metric] for metric in shown]


def draw_line(ax: Axes, series: Series, colour: str, smooth_over: int | None) -> None:
    """A metric over time; one that is noisy as its moving median, with the values themselves faint behind it."""
    if not series.values.size:
        return
    smooth = moving_median(series.values, smooth_over)
    marker = "o" if np.isfinite(series.values).sum() < 3 else None
    if smooth_over != 1 and (is_noisy(series.values, smooth) or smooth_over is not None):
        ax.plot(series.x, series.values, color=colour, linewidth=0.8, alpha=0.28)
        ax.plot(series.x, smooth, color=colour, linewidth=1.6)
    else:
        ax.plot(series.x, series.values, color=colour, linewidth=1.6, marker=marker, markersize=4)


def draw_evaluations(ax: Axes, train: Series, val: Series, errors: np.ndarray, colours: tuple[str, str]) -> None:
    """The losses that were measured without training: open points for the training split, filled ones for validation.

    ``errors`` are the standard errors of the validation losses: a bar to either side of each.
    """
    of_train, of_val = colours
    ax.plot(train.x, train.values, color=of_train, linestyle="", marker="o", markersize=4.5, markerfacecolor="white")
    ax.plot(val.x, val.values, color=of_val, linewidth=1.0, linestyle=(0, (3, 2)), marker="o", markersize=4.5)
    known = np.isfinite(errors)
    low, high = (val.values - errors)[known], (val.values + errors)[known]
    ax.vlines(val.x[known], low, high, color=of_val, linewidth=3, alpha=0.4)


def finish_panel(ax: Axes, metric: str, label: str, log: str) -> None:
    """Scales, tick labels, and what the panel shows: written above it, where it can be read without tilting the head."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    ax.set_ylabel(label, rotation=0, ha="left", va="bottom", fontsize=10)
    ax.yaxis.set_label_coords(0, 1.03)
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.lines] or [np.empty(0)])
    values = values[np.isfinite(values)]
    wanted = LOG_TOO if log in ("y", "xy") else LOG_FOR_SPIKES if log == "auto" and wants_log(values) else ()
    if not values.size:
        ax.text(0.5, 0.5, "nothing recorded yet", transform=ax.transAxes, ha="center", va="center", color=FAINT)
        ax.set_yticks([])
    elif values.min() > 0 and metric in wanted:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    elif metric in FROM_ZERO:
        ax.set_ylim(0, max(float(values.max()) * 1.08, 1e-12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def finish_x(axes: Sequence[Axes], xs: np.ndarray, label: str, config: PlotConfig) -> None:
    """One range for all panels, and what it is of, below the lower ones. ``xs`` is where all rows of all runs stand."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    xs = xs[np.isfinite(xs)]
    end, log = float(xs.max(initial=0.0)) or 1.0, config.log in ("x", "xy")
    for ax in axes:
        if log:
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator())
            ax.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        else:
            ax.xaxis.set_major_locator(MaxNLocator(integer=config.x == "update"))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    begin = max(float(xs[xs > 0].min(initial=end)), end / 1e6) / 1.03 if log else 0
    axes[0].set_xlim(begin, 1.03 * end)
    for ax in axes[2:]:
        ax.set_xlabel(label)


def head_for_one(figure: Figure, run: Run) -> None:
    """The run's name, its length and its best loss, above the panels."""
    facts = [f"{run.last('step'):,.0f} updates", f"{run.last('tokens'):,.0f} tokens"]
    val = run.series("eval/val_loss")
    if (best := val.lowest) is not None:
        facts.append(f"lowest validation loss {val.values[best]:.3f} after update {int(val.x[best]):,}")
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.92))
    figure.text(0.012, 0.975, run.name, va="top", fontsize=14, fontweight="bold", parse_math=False)
    figure.text(0.988, 0.97, "  ·  ".join(facts), ha="right", va="top", fontsize=10, color=FAINT)


def legend_for_several(figure: Figure, runs: Sequence[Run]) -> None:
    """One entry per run above the panels, with its last validation loss."""
    from matplotlib.lines import Line2D

    lasts = [run.series("eval/val_loss").last for run in runs]
    names = [run.name if last is None else f"{run.name}, validation {last:.3f}" for run, last in zip(runs, lasts, strict=True)]
    handles = [Line2D([], [], color=colour, linewidth=2.5) for _, colour in zip(runs, itertools.cycle(RUN_COLOURS))]
    columns = max(1, min(len(runs), 120 // (max(map(len, names)) + 8)))
    # matplotlib skips labels that begin with _ and reads $ as mathematics, and a run may be called so
    placeholders = [str(number) for number in range(len(names))]
    legend = figure.legend(handles, placeholders, loc="outside upper left", ncols=columns, handlelength=1.4, fontsize=11)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def key_to_losses(ax: Axes, runs: Sequence[Run]) -> None:
    """What lines and points of the loss panel are, in the corner that losses leave empty; of one run with values."""
    kinds = [
        ("train/loss", "train", {"linewidth": 1.6}, TRAIN),
        ("eval/train_loss", "train, evaluated", {"linestyle": "", "marker": "o", "markerfacecolor": "white"}, TRAIN),
        ("eval/val_loss", "validation", {"linestyle": (0, (3, 2)), "linewidth": 1.0, "marker": "o"}, VAL),
    ]
    for metric, name, style, colour in kinds:
        lasts = [last for run in runs if (last := run.series(metric).last) is not None]
        if lasts:
            label = f"{name}  {lasts[0]:.3f}" if len(runs) == 1 else name
            ax.plot([], [], color=colour if len(runs) == 1 else FAINT, markersize=4.5, label=label, **style)
    if ax.get_legend_handles_labels()[0]:
        legend = ax.legend(loc="upper right", fontsize=9.5, handlelength=1.8, borderaxespad=0)
        for text, handle in zip(legend.get_texts(), legend.get_lines(), strict=True):
            text.set_color(handle.get_color())


if __name__ == "__main__":
    sys.exit(main())
