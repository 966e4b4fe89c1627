"""Draw what runs recorded: ``python -m accel_pretrain.plot RUN... [--out FILE]`` makes a picture of their ``metrics.jsonl``.

Four panels over the number of updates: loss, learning rate, gradient norm, throughput. One run is drawn in colours by quantity,
several in a colour each. :func:`draw` returns the figure; nothing here keeps global state or opens a window.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accel_pretrain.errors import ConfigError, DataError, PretrainError, reported
from accel_pretrain.metrics import METRICS_FILE, read_metrics
from accel_pretrain.typed_yaml import load, option, parse_command_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

USAGE = """\
usage: python -m accel_pretrain.plot RUN... [--out FILE]

  RUN              a run directory, or a metrics.jsonl
  --out, -o FILE   where to; the ending says the format (png, svg, pdf); else RUN/plot.png, or plot.png here for several runs
  --help           show this
"""

FORMATS = (".png", ".svg", ".pdf")
INK, FAINT = "#333333", "#8a8a8a"
TRAIN, VAL = "#4878a8", "#d1603d"
RUN_COLOURS = ("#4878a8", "#d1603d", "#5b9a68", "#8d6cab", "#b8923a", "#4a9fa5", "#b0567f", "#6d6d6d")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#bbbbbb",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "xtick.major.size": 3, "ytick.major.size": 0, "ytick.minor.size": 0, "lines.solid_capstyle": "round",
    "legend.frameon": False, "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.wspace": 0.04,
}  # fmt: skip
PANELS = {
    "train/loss": "Loss (nats per token)",
    "train/learning_rate": "Learning rate",
    "train/grad_norm": "Gradient norm (before clipping)",
    "train/tokens_per_sec": "Throughput (tokens per second)",
}


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """What ``accel_pretrain.plot`` can be told besides the runs."""

    out: Path | None = option(None, "the picture to write")


@dataclass(frozen=True)
class Series:
    """One metric of one run: values at update counts, NaN where the metric was not finite."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float | None:
        """The last finite value, if there is any."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if finite.size else None


@dataclass(frozen=True)
class Run:
    """The recorded rows of one run, and what to call it."""

    name: str
    rows: list[dict[str, Any]]

    def series(self, metric: str) -> Series:
        """Every row that has ``metric``, in the file's order."""
        found = [(row["step"], row[metric]) for row in self.rows if metric in row]
        values = [float(value) if isinstance(value, int | float) else math.nan for _, value in found]
        return Series(np.array([step for step, _ in found], dtype=float), np.array(values, dtype=float))


def main(argv: Sequence[str] | None = None) -> int:
    with reported():
        words = sys.argv[1:] if argv is None else argv
        line = parse_command_line(PlotConfig, words, flags={"help"}, short={"-h": "help", "-o": "out"}, positionals=True)
        if "help" in line.flags:
            print(USAGE, end="")
            return 0
        out = plot([Path(word) for word in line.positionals], load(PlotConfig, line.config, line.overrides).out)
        print(f"wrote {out}")
        return 0
    return 2


def plot(paths: Sequence[Path], out: Path | None) -> Path:
    """Draw the runs at ``paths`` into ``out``, and return where that is."""
    if not paths:
        raise ConfigError("no run given; type: python -m accel_pretrain.plot RUN")
    runs = read_runs(paths)
    if out is None:
        out = Path("plot.png") if len(paths) > 1 else _metrics_path(paths[0]).with_name("plot.png")
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(f"out: {out} must end in {', '.join(FORMATS)}")
    figure = draw(runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise ConfigError(f"out: cannot write {out.absolute()} ({error.strerror})") from None
    return out


def _metrics_path(path: Path) -> Path:
    return path / METRICS_FILE if path.is_dir() else path


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs, each under the shortest end of its path that tells it apart; DataError for one that is not there."""
    files = [_metrics_path(path) for path in paths]
    if missing := [
        f"{path.absolute()} does not exist: not a run, or nothing recorded yet" for path in files if not path.is_file()
    ]:
        raise DataError(missing)
    parts = [path.resolve().parent.parts for path in files]
    length = 1
    while len({part[-length:] for part in parts}) < len(set(parts)):
        length += 1
    return [Run("/".join(part[-length:]), read_metrics(file)) for part, file in zip(parts, files, strict=True)]


# ------------------------------------------------------------------------------------------------------------- drawing


def draw(runs: Sequence[Run]) -> Figure:
    """A figure with four panels, in the order of ``PANELS``."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # pyplot is not needed: no window, no state, always drawn by Agg
    except ImportError:
        raise PretrainError("plotting needs matplotlib: pip install 'accel_pretrain[plot]'") from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.2), facecolor="white", layout="constrained")
        panels = figure.subplots(2, 2, sharex=True).flat
        for ax, (metric, label) in zip(panels, PANELS.items(), strict=True):
            for run, colour in zip(runs, itertools.cycle(RUN_COLOURS if len(runs) > 1 else [TRAIN])):
                draw_line(ax, run.series(metric), colour)
                if metric == "train/loss":
                    draw_evaluations(ax, run, colour, colour if len(runs) > 1 else VAL)
            finish_panel(ax, metric, label)
        figure.axes[0].set_xlim(0, 1.03 * max((row["step"] for run in runs for row in run.rows), default=1) or 1)
        key_to_losses(figure.axes[0], runs)
        for ax in figure.axes[2:]:
            ax.set_xlabel("Updates")
        if len(runs) == 1:
            head_for_one(figure, runs[0])
        else:
            legend_for_several(figure, runs)
    return figure


def draw_line(ax: Axes, series: Series, colour: str) -> None:
    """A metric over time; one that is noisy as its moving median, with the values themselves faint behind it."""
    if not series.values.size:
        return
    smooth = moving_median(series.values)
    marker = "o" if np.isfinite(series.values).sum() < 3 else None
    if is_noisy(series.values, smooth):
        ax.plot(series.steps, series.values, color=colour, linewidth=0.8, alpha=0.28)
        ax.plot(series.steps, smooth, color=colour, linewidth=1.6)
    else:
        ax.plot(series.steps, series.values, color=colour, linewidth=1.6, marker=marker, markersize=4)


def draw_evaluations(ax: Axes, run: Run, train_colour: str, val_colour: str) -> None:
    """The losses that were measured without training: open points for the training split, filled ones for validation."""
    train, val = run.series("eval/train_loss"), run.series("eval/val_loss")
    ax.plot(train.steps, train.values, color=train_colour, linestyle="", marker="o", markersize=4.5, markerfacecolor="white")
    ax.plot(val.steps, val.values, color=val_colour, linewidth=1.0, linestyle=(0, (3, 2)), marker="o", markersize=4.5)


def moving_median(values: np.ndarray) -> np.ndarray:
    """The median of a centred window of 1/25 of all values, without those that are NaN; narrower at both ends.

    A median, because it follows steep ends and leaves out spikes, where a mean would draw neither as it was.
    """
    halves = (min(values.size // 50, i) for i in range(values.size))
    windows = (values[i - half : i + half + 1] for i, half in enumerate(halves))
    finite = (window[np.isfinite(window)] for window in windows)
    return np.array([np.median(window) if window.size else math.nan for window in finite], dtype=float)


def is_noisy(values: np.ndarray, smooth: np.ndarray) -> bool:
    """Whether values stray from their moving median by more than 1 % of the range of the middle nine tenths of them."""
    finite = np.isfinite(values)
    if finite.sum() < 50:
        return False
    low, high = np.percentile(values[finite], (5, 95))
    return bool(np.std((values - smooth)[finite]) > 0.01 * (high - low))


def finish_panel(ax: Axes, metric: str, label: str) -> None:
    """Scales, tick labels, and what the panel shows: written above it, where it can be read without tilting the head."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    ax.set_ylabel(label, rotation=0, ha="left", va="bottom", fontsize=10)
    ax.yaxis.set_label_coords(0, 1.03)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.lines] or [np.empty(0)])
    values = values[np.isfinite(values)]
    if not values.size:
        ax.text(0.5, 0.5, "nothing recorded yet", transform=ax.transAxes, ha="center", va="center", color=FAINT)
        ax.set_yticks([])
    elif metric in ("train/learning_rate", "train/tokens_per_sec"):
        ax.set_ylim(0, max(float(values.max()) * 1.08, 1e-12))
    elif values.min() > 0 and values.max() > 20 * values.min():  # a spike would flatten everything else
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """A number as a tick label: 0, 2.5, 40k, 1.2M, 3e-4."""
    if value == 0:
        return "0"
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def head_for_one(figure: Figure, run: Run) -> None:
    """The run's name, its length and its best loss, above the panels."""
    steps, tokens = (max((row.get(key) or 0 for row in run.rows), default=0) for key in ("step", "tokens"))
    facts = [f"{steps:,} updates", f"{tokens:,} tokens"]
    val = run.series("eval/val_loss")
    if val.last is not None:
        best = int(np.nanargmin(val.values))
        facts.append(f"lowest validation loss {val.values[best]:.3f} after update {int(val.steps[best]):,}")
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
