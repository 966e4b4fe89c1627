"""What the plan said against what happens: one line after the first updates of a run that has a ``plan.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

PLAN_FILE = "plan.json"
AFTER = 50  # updates: by then memory has reached its peak and the first slow ones do not count much


def compared(run_dir: Path, tokens_per_sec: float, device: torch.device) -> str | None:
    """The line, or None where nobody has planned with ``accel_pretrain.plan --save``, or the file cannot be read."""
    try:
        plan = json.loads((run_dir / PLAN_FILE).read_text(encoding="utf-8"))
        speed, memory = float(plan["time"]["tokens_per_sec"] or 0), int(plan["memory"]["peak"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    paced = f"{speed:,.0f} tokens/s planned, {tokens_per_sec:,.0f} so far ({tokens_per_sec / speed - 1:+.0%})" if speed else ""
    needed = f"{memory / 1e9:.2f} GB of tensors planned"
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        needed += f", {most / 1e9:.2f} at most so far ({most / memory - 1:+.0%})"
    elif sys.platform == "linux":
        needed += f", {peak_of_process() / 1e9:.2f} at most so far with libraries and the heap's holes"
    return "Plan and run: " + "; ".join(part for part in (paced, needed) if part)


def most_memory(device: torch.device) -> int | None:
    """Most bytes that this process has had so far: of tensors on a CUDA device, of everything on a CPU; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_of_process() if device.type == "cpu" and sys.platform == "linux" else None


def peak_of_process() -> int:
    """Most bytes of main memory that this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
