"""How pictures look: colours, and what matplotlib is told with ``rc_context``. One look for all of them."""

from __future__ import annotations

from typing import Any

INK, FAINT = "#333333", "#8a8a8a"
TRAIN, VAL = "#4878a8", "#d1603d"
RUN_COLOURS = (
    TRAIN, VAL, "#5b9a68", "#8d6cab", "#b8923a", "#4a9fa5", "#b0567f", "#6d6d6d", "#7a8f2b", "#8a5a3c",
)  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#bbbbbb",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "xtick.major.size": 3, "ytick.major.size": 0, "ytick.minor.size": 0, "lines.solid_capstyle": "round",
    "legend.frameon": False, "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.wspace": 0.04,
}  # fmt: skip
