"""The curves of a report, as one Bokeh document: panels that share their horizontal axis, to hover over and to zoom into.

Long runs are thinned: of every group of rows the lowest and the highest value stay (:func:`accel_pretrain.curves.thinned`), so
that a spike of one row can be seen. Every curve carries all horizontal axes, and the page switches between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from accel_pretrain.curves import AXES, Run, Series, is_noisy, moving_median, thinned, unit_of, wants_log
from accel_pretrain.errors import PretrainError
from accel_pretrain.look import RUN_COLOURS, TRAIN, VAL

if TYPE_CHECKING:
    from bokeh.models import ColumnDataSource
    from bokeh.plotting import figure as Figure

LOSS = "train/loss"
PANELS = {
    LOSS: "Loss (nats per token)",
    "eval/bits_per_byte": "Bits per byte of the validation text",
    "train/learning_rate": "Learning rate",
    "train/grad_norm": "Gradient norm (before clipping)",
    "train/tokens_per_sec": "Tokens per second",
    "train/mfu": "Share of the devices' peak (MFU)",
    "train/peak_memory_gb": "Peak memory (GB)",
}
FROM_ZERO = ("train/learning_rate", "train/tokens_per_sec", "train/mfu", "train/peak_memory_gb")
_OTHERS = 12  # panels at most for what else was recorded
_NOT_CURVES = ("step", "time", "tokens", "train/iter_time_ms", "train/skipped_updates")
_TOLD_ELSEWHERE = ("eval/train_loss", "eval/val_loss", "eval/perplexity", "final/", "spike/", "rollback/")
MANY = 150  # evaluations, beyond which their signs would be a band
MOST_POINTS, MOST_PER_CURVE = 90_000, 8000  # 27 bytes each in the page
BESIDE: dict[str, Any] = {
    "curve": "right",
    "evaluated": "above",
    "validation": "left",
}  # where values are told, one not over the other


def panels_of(runs: Sequence[Run]) -> dict[str, str]:
    """The metrics to draw, with what to write above them: the usual ones that are there, then what else was recorded."""
    recorded = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    usual = {key: label for key, label in PANELS.items() if key in recorded or (key == LOSS and "eval/val_loss" in recorded)}
    others = [key for key in recorded if key not in PANELS and key not in _NOT_CURVES and not key.startswith(_TOLD_ELSEWHERE)]
    return usual | {key: key for key in others[:_OTHERS]}


def axes_of(runs: Sequence[Run]) -> dict[str, tuple[str, float]]:
    """The horizontal axes that all runs have, each with what to write below it and what it is divided by."""
    known = [name for name in AXES if name != "flops" or all(run.flops_per_token for run in runs)]
    return {name: unit_of(runs, name) for name in known}


def document(runs: Sequence[Run], smooth: int | None = None) -> dict[str, Any]:
    """All panels as the JSON that BokehJS embeds."""
    try:
        from bokeh.embed import json_item
        from bokeh.layouts import column
        from bokeh.models import DataRange1d
    except ImportError:
        raise PretrainError("a report needs bokeh: pip install 'accel_pretrain[report]'") from None
    panels, axes = panels_of(runs), axes_of(runs)
    share = MOST_POINTS // (len(runs) * (len(panels) + 2))  # two more in the panel of the loss
    pen = Pen(axes, max(300, min(MOST_PER_CURVE, share)), smooth)
    shared = DataRange1d(range_padding=0.02)
    figures = []
    for metric, label in panels.items():
        losses = [
            run.series(name).values for run in runs for name in ([metric, "eval/val_loss"] if metric == LOSS else [metric])
        ]
        log = metric not in FROM_ZERO and wants_log(np.concatenate(losses))
        plot = new_figure(label, shared, axes["update"][0], log=log, from_zero=metric in FROM_ZERO)
        for number, (run, colour) in enumerate(zip(runs, itertools.cycle(RUN_COLOURS))):
            draw_run(plot, run, metric, colour if len(runs) > 1 else TRAIN, number, pen)
            if metric == LOSS:
                draw_evaluations(plot, run, (colour, colour) if len(runs) > 1 else (TRAIN, VAL), number, pen)
        hover_over(plot, runs)
        figures.append(plot)
    return json_item(column(figures, sizing_mode="stretch_width", css_classes=["panels"], stylesheets=[_GRID]))  # type: ignore[return-value]


_GRID = ":host{display:grid!important;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:1rem 1.5rem}"


def new_figure(label: str, shared: Any, below: str, *, log: bool, from_zero: bool) -> Figure:
    """An empty panel. Colours of text and lines come from the page's style sheet, light or dark."""
    from bokeh.models import BasicTickFormatter, DataRange1d
    from bokeh.plotting import figure

    plot = figure(
        title=label, height=280, sizing_mode="stretch_width", x_range=shared, y_axis_type="log" if log else "linear",
        y_range=DataRange1d(start=0) if from_zero else DataRange1d(), x_axis_label=below, active_drag="box_zoom",
        tools="box_zoom,pan,wheel_zoom,reset,save", background_fill_color=None, border_fill_color=None, outline_line_color=None,
    )  # fmt: skip
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    plot.xaxis.formatter = BasicTickFormatter(power_limit_high=9)
    if not log:
        plot.yaxis.formatter = BasicTickFormatter(power_limit_high=9)
    plot.xaxis.axis_label_text_font_style = "normal"
    return plot


@dataclass(frozen=True)
class Pen:
    """How curves are drawn: the axes that each can be shown over, points per curve, and the window of medians."""

    axes: dict[str, tuple[str, float]]
    most: int
    smooth: int | None

    def source(self, run: Run, series: Series, errors: np.ndarray | None = None) -> ColumnDataSource:
        """The points of a series that are drawn, at their places on every axis."""
        from bokeh.models import ColumnDataSource

        kept = thinned(series.values, self.most)
        values = series.values[kept]
        data: dict[str, Any] = {
            name: (run.axis(name)[series.rows[kept]] / unit).astype(np.float32) for name, (_, unit) in self.axes.items()
        }
        data["y"] = values.astype(np.float32)
        if errors is not None:
            data |= {"low": values - errors[kept], "high": values + errors[kept]}
        return ColumnDataSource(data)


def draw_run(plot: Figure, run: Run, metric: str, colour: str, number: int, pen: Pen) -> None:
    """One metric of one run; noise is drawn faint behind its moving median."""
    series = run.series(metric)
    if not series.values.size:
        return
    median = moving_median(series.values, pen.smooth)
    noisy = pen.smooth != 1 and (pen.smooth is not None or is_noisy(series.values, median))
    source = pen.source(run, series)
    faint = 0.3 if series.values.size < 2000 else 0.2
    raw = plot.line(
        "update", "y", source=source, color=colour, line_alpha=faint if noisy else 1, line_width=1 if noisy else 1.5
    )
    mark(raw, number, run.name)
    if noisy:
        own = np.unique(np.linspace(0, median.size - 1, min(median.size, pen.most // 4)).astype(int))
        smoothed = pen.source(run, Series(series.x[own], median[own], series.rows[own]))
        mark(plot.line("update", "y", source=smoothed, color=colour, line_width=2), number, run.name, "median")
    if np.isfinite(series.values).sum() < 3 or (metric.startswith("eval/") and series.values.size <= MANY):
        mark(plot.scatter("update", "y", source=source, color=colour, size=6), number, run.name)


def draw_evaluations(plot: Figure, run: Run, colours: tuple[str, str], number: int, pen: Pen) -> None:
    """Losses that were measured without training: rings for the training split, discs with standard errors for validation."""
    train, val = run.series("eval/train_loss"), run.series("eval/val_loss")
    many = max(train.values.size, val.values.size) > MANY
    if train.values.size:
        source, name = pen.source(run, train), f"{run.name}, evaluated on training text"
        look: dict[str, Any] = {"source": source, "line_color": colours[0], "line_alpha": 0.6 if many else 1.0}
        if many:
            mark(plot.line("update", "y", line_dash="dotted", **look), number, name, "evaluated")
        else:
            mark(plot.scatter("update", "y", fill_color=None, size=6, **look), number, name, "evaluated")
    if not val.values.size:
        return
    errors = np.nan_to_num(run.values_at("eval/val_loss_standard_error", val.rows))
    source, name = pen.source(run, val, errors), f"{run.name}, validation"
    bars = plot.segment("update", "low", "update", "high", source=source, color=colours[1], line_width=4, line_alpha=0.4)
    mark(bars, number, name, "error")
    line = plot.line("update", "y", source=source, color=colours[1], line_width=1.5 if many else 1, line_dash="dashed")
    mark(line, number, name, "validation" if many else "guide")
    if not many:
        mark(plot.scatter("update", "y", source=source, color=colours[1], size=6), number, name, "validation")


def mark(drawn: Any, number: int, name: str, kind: str = "curve") -> None:
    """Let the page find what was drawn, by the number of its run and its kind; ``name`` is what a reader sees."""
    drawn.tags, drawn.name = [number, kind], name


def hover_over(plot: Figure, runs: Sequence[Run]) -> None:
    """What is under the pointer: of a few runs everything above and below it, of many the curve that it is on."""
    from bokeh.models import HoverTool

    mode, tooltips = "vline" if len(runs) <= 3 else "mouse", [("", "$name"), ("update", "@update{0,0}"), ("value", "@y{%.5g}")]
    for kind, side in BESIDE.items():
        shown: Any = [drawn for drawn in plot.renderers if kind in drawn.tags]
        tool = HoverTool(
            renderers=shown, tooltips=tooltips, formatters={"@y": "printf"}, mode=mode, line_policy="nearest", limit=1,
            attachment=side, visible=kind == "curve",
        )  # fmt: skip
        if shown:
            plot.add_tools(tool)
