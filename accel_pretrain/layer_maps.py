"""What ``debug.inspect_interval`` has recorded, as pictures: layers over updates, a colour for each value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from accel_pretrain.curves import Run, as_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYER = re.compile(r"layers/(?P<part>[\w.]+)/(?P<what>\w+)")
MAPS = {
    "grad_norm": "Gradient norm (before clipping)",
    "update_ratio": "Update / weight",
    "act_rms": "Activations: rms",
    "dead_units": "Dead units in feed-forward",
}
_SHARES = ("dead_units",)  # from 0 to 1; the others span orders of magnitude


@dataclass(frozen=True)
class LayerMap:
    """One quantity: ``values`` (parts, updates), NaN where there is none."""

    parts: list[str]
    updates: np.ndarray
    values: np.ndarray


def layer_map(run: Run, what: str) -> LayerMap | None:
    """The recorded values of one of :data:`MAPS`, or None if there are none."""
    found: dict[tuple[str, int], float] = {}
    for row in run.rows:
        for key, value in row.items():
            if key.startswith("layers/") and (match := _LAYER.fullmatch(key)) and match["what"] == what:
                found[match["part"], row["step"]] = as_number(value)
    if not found:
        return None
    parts = sorted({part for part, _ in found}, key=_place)
    updates = sorted({update for _, update in found})
    values = np.array([[found.get((part, update), np.nan) for update in updates] for part in parts])
    return LayerMap(parts, np.array(updates), values)


def _place(part: str) -> tuple[int, int, int]:
    """Embeddings, then all attentions, all feed-forwards and all norms, each from block to block, then what follows them."""
    number, _, kind = part.partition(".")
    if number.isdigit():
        return 1, ("self_attn", "mlp", "norms", "").index(kind), int(number)
    return (0, 0, 0) if part.startswith("embed") else (2, 0, part != "norm")


def draw_layers(run: Run) -> Figure | None:
    """A map for each quantity that was recorded; None if no layer was ever looked at."""
    maps = {what: found for what in MAPS if (found := layer_map(run, what)) is not None}
    if not maps:
        return None
    from matplotlib.figure import Figure

    rows = max(len(each.parts) for each in maps.values())
    figure = Figure(figsize=(13, 3.4 + min(12, 0.22 * rows)), facecolor="white", layout="constrained")
    axes = figure.subplots(2, 2, squeeze=False).flat
    for ax, what in zip(axes, MAPS, strict=True):
        if what not in maps:
            ax.set_axis_off()
            continue
        own = maps[what]
        image = ax.pcolormesh(
            _edges(own.updates), np.arange(len(own.parts) + 1), own.values, cmap="viridis", **_scale(own, what)
        )
        figure.colorbar(image, ax=ax)
        every = -(-len(own.parts) // 24)  # so many names can be read
        ax.set_yticks(np.arange(0, len(own.parts), every) + 0.5, own.parts[::every], fontsize=8, parse_math=False)
        ax.invert_yaxis()
        ax.set_title(MAPS[what], loc="left", fontsize=11)
        ax.set_xlabel("Updates")
    figure.suptitle(f"{run.name}: layer by layer", x=0.012, ha="left", fontsize=14, fontweight="bold", parse_math=False)
    return figure


def _edges(updates: np.ndarray) -> np.ndarray:
    """A column ends at its update, and begins where the one before ends."""
    first = updates[0] - (updates[1] - updates[0] if updates.size > 1 else 1)
    return np.concatenate([[first], updates])


def _scale(own: LayerMap, what: str) -> dict[str, object]:
    from matplotlib.colors import LogNorm

    known = own.values[np.isfinite(own.values) & (own.values > 0)]
    if what in _SHARES or not known.size:
        return {"vmin": 0.0, "vmax": max(0.01, float(np.nanmax(own.values, initial=0.0)))}
    return {"norm": LogNorm(float(known.min()), max(float(known.max()), float(known.min()) * 1.01))}
