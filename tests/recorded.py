"""Run directories as a trainer leaves them, written row by row: for what reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def train_row(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    rates = {"train/learning_rate": 1e-3 / step, "train/grad_norm": 1.0 + 1 / step, "train/tokens_per_sec": 5e4}
    return {"step": step, "time": 0.0, "tokens": 64 * step, "train/loss": loss, **rates, **more}


def eval_row(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "time": 0.0, "tokens": 64 * step, "eval/train_loss": loss - 0.1, "eval/val_loss": loss, **more}


def usual_rows(count: int = 20) -> list[dict[str, Any]]:
    return [train_row(step, 4 - step / 10) for step in range(1, count + 1)] + [eval_row(10, 3.2), eval_row(20, 2.2)]


def lines_of(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_run(folder: Path, rows: Iterable[dict[str, Any]], tail: str = "", **files: str) -> Path:
    """A run with these metrics; ``files`` are others, by their name with ``_`` for the dot."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(lines_of(rows) + tail)
    for name, text in files.items():
        stem, _, ending = name.rpartition("_")
        (folder / f"{stem}.{ending}").write_text(text)
    return folder
