"""What a report says about runs in words: summary, plan against run, settings that differ, what befell them. No HTML here."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from accel_pretrain.commit import checkpoints
from accel_pretrain.config import RunConfig
from accel_pretrain.curves import Run, as_number, short
from accel_pretrain.errors import ConfigError
from accel_pretrain.files import is_alive
from accel_pretrain.hindsight import PLAN_FILE
from accel_pretrain.metrics import read_metrics
from accel_pretrain.status import read_status
from accel_pretrain.trackers import SAMPLES_FILE
from accel_pretrain.typed_yaml import to_yaml
from accel_pretrain.yaml_files import read_mapping

LEDGER = "skipped_samples.json"
CPU_MEMORY = "Peak memory in GB (run: with libraries and the heap's holes)"
MOST_SAMPLES, LONGEST_SAMPLE, MOST_EVENTS = 40, 2000, 200


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object, or an empty one where it cannot be had."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        document = json.loads(path.read_text(encoding="utf-8"))
        return document if isinstance(document, dict) else {}
    return {}


def at(document: Mapping[str, Any], *keys: str) -> Any:
    """What stands under nested keys; None where there is nothing."""
    found: Any = document
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def settings(run: Run) -> dict[str, str]:
    """Every setting of a run by its dotted name, as text; empty where its config cannot be read."""
    try:
        return _flat(read_mapping(run.folder / "config.yaml"))
    except (ConfigError, OSError):
        return {}


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else str(value)
    return flat


def defaults() -> dict[str, str]:
    return _flat(yaml.load(to_yaml(RunConfig()), Loader=yaml.BaseLoader))


def differences(configs: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all of ``configs``, each with its values; "" where one does not have it."""
    keys = dict.fromkeys(key for config in configs for key in config)
    found = [(key, [config.get(key, "") for config in configs]) for key in keys]
    return [(key, values) for key, values in found if len(set(values)) > 1]


# -------------------------------------------------------------------------------------------------------------- summary


def summary(run: Run) -> dict[str, str]:
    """Names and values, those that are known, in the order in which a person asks for them."""
    start = run.starts[-1] if run.starts else {}
    plan, versions = start.get("plan") or {}, start.get("versions") or {}
    hours = float(run.axis("time")[-1]) if run.rows else 0.0
    tokens, parameters = run.last("tokens"), as_number(at(plan, "parameters"))
    goal, flops = as_number(at(plan, "max_iters")), run.flops_per_token
    facts = {
        "State": state(run),
        "Model": model(settings(run), plan),
        "Updates": f"{run.last('step'):,.0f}" + (f" of {goal:,.0f}" if math.isfinite(goal) else ""),
        "Tokens": f"{tokens:,.0f}" + (f", {tokens / parameters:.2g} per parameter" if parameters > 0 else ""),
        "Compute": f"{tokens * flops:.2e} FLOP" if flops else "",
        "Time": duration(3600 * hours),
        "Training loss": last_of(run, "train/loss"),
        **losses(run),
        "Tokens per second": middle(run, "train/tokens_per_sec", "{:,.0f}"),
        "MFU": middle(run, "train/mfu", "{:.1%}"),
        "Peak memory": most(run, "train/peak_memory_gb", "{:.2f} GB"),
        "Ran on": str(start.get("runtime") or ""),
        "Starts": str(len(run.starts) or ""),
        "Skipped updates": most(run, "train/skipped_updates", "{:,.0f}"),
        "Versions": ", ".join(f"{name} {number}" for name, number in versions.items()) if isinstance(versions, dict) else "",
        "Commit": str(start.get("git") or ""),
    }
    return {name: value for name, value in facts.items() if value}


def state(run: Run) -> str:
    """Running, finished, interrupted or failed and why; a run whose process is gone without a word is not running."""
    status = read_status(run.folder)
    said = str(status.get("state") or "not known")
    pid = status.get("pid")
    if said == "running" and status.get("host") == socket.gethostname() and isinstance(pid, int) and not is_alive(pid):
        return "ended without a word (killed?)"
    return f"{said}: {status['reason']}" if status.get("reason") else said


def model(config: Mapping[str, str], plan: Mapping[str, Any]) -> str:
    parts = []
    if math.isfinite(count := as_number(at(plan, "parameters"))):
        parts.append(f"{short(count)} parameters")
    names = {"num_layers": "{} layers", "d_model": "width {}", "num_heads": "{} heads", "context_length": "context {}"}
    parts += [shape.format(config[f"model.{name}"]) for name, shape in names.items() if f"model.{name}" in config]
    if math.isfinite(count := as_number(at(plan, "vocab_size"))):
        parts.append(f"vocabulary {count:,.0f}")
    return ", ".join(parts)


def losses(run: Run) -> dict[str, str]:
    """The last and the best validation loss, with standard errors and in bits per byte where they were recorded."""
    series = run.series("eval/val_loss")
    errors = run.values_at("eval/val_loss_standard_error", series.rows)
    bits = run.values_at("eval/bits_per_byte", series.rows)

    def told(index: int) -> str:
        error = f" ± {errors[index]:.4f}" if math.isfinite(errors[index]) else ""
        per_byte = f" ({bits[index]:.4f} bits per byte)" if math.isfinite(bits[index]) else ""
        return f"{series.values[index]:.4f}{error}{per_byte}, after update {series.x[index]:,.0f}"

    if (best := series.lowest) is None:
        return {}
    last = int(np.flatnonzero(np.isfinite(series.values))[-1])
    return {"Validation loss": told(last), "Lowest validation loss": told(best)}


def last_of(run: Run, metric: str) -> str:
    """The median of the last hundredth of a noisy metric, of one value at least."""
    values = run.series(metric).values
    values = values[np.isfinite(values)]
    return f"{np.median(values[-max(1, values.size // 100) :]):.4f}" if values.size else ""


def middle(run: Run, metric: str, shape: str) -> str:
    values = run.series(metric).values
    return shape.format(np.nanmedian(values)) if np.isfinite(values).any() else ""


def most(run: Run, metric: str, shape: str) -> str:
    values = run.series(metric).values
    return shape.format(np.nanmax(values)) if np.isfinite(values).any() else ""


def duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


# ---------------------------------------------------------------------------------------------------- plan and hindsight


def hindsight(run: Run) -> list[tuple[str, str, str, str]]:
    """What ``plan --save`` said, what became of it, and by how much that differs; empty where nobody has planned."""
    plan = read_json(run.folder / PLAN_FILE)
    if not plan:
        return []
    start = run.starts[-1].get("plan") if run.starts else None
    runtime = str(run.starts[-1].get("runtime")) if run.starts else ""
    speed, seconds = (run.series(f"train/{name}").values for name in ("tokens_per_sec", "iter_time_ms"))
    first = run.series("train/loss")
    newest = next(iter(checkpoints(run.folder)), None) if run.folder.is_dir() else None
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) if newest else math.nan
    done = as_number(at(start or {}, "max_iters")) == run.last("step")
    pairs = [
        ("Parameters", ("parameters", "total"), as_number(at(start or {}, "parameters")), "{:,.0f}"),
        ("FLOP per token", ("flops_per_token", "total"), as_number(at(start or {}, "flops_per_token")), "{:.4g}"),
        ("Tokens per update", ("run", "tokens_per_step"), as_number(at(start or {}, "tokens_per_step")), "{:,.0f}"),
        ("Updates", ("run", "max_iters"), run.last("step"), "{:,.0f}"),
        (
            f"Loss after update {first.x[0]:,.0f} (planned: before the first)" if first.x.size else "First loss",
            ("run", "first_loss"), float(first.values[0]) if first.x.size else math.nan, "{:.4f}",
        ),
        ("Tokens per second", ("time", "tokens_per_sec"), _median(speed), "{:,.0f}"),
        ("Seconds per update", ("time", "seconds_per_update"), _median(seconds) / 1000, "{:.4g}"),
        ("Hours", ("time", "hours"), float(run.axis("time")[-1]) if done else math.nan, "{:.3g}"),
        (
            "Peak memory of tensors in GB" if "cuda" in runtime else CPU_MEMORY,
            ("memory", "peak"), run.last("train/peak_memory_gb") * 1e9 or math.nan, "GB",
        ),
        ("A checkpoint in GB", ("disk", "checkpoint"), size, "GB"),
    ]  # fmt: skip
    compared = [(name, *_compared(as_number(at(plan, *keys)), actual, shape)) for name, keys, actual, shape in pairs]
    return [(*row[:3], "") if row[0] == CPU_MEMORY else row for row in compared]


def _median(values: np.ndarray) -> float:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan


def _compared(planned: float, actual: float, shape: str) -> tuple[str, str, str]:
    def shown(value: float) -> str:
        if not math.isfinite(value):
            return "not known"
        return f"{value / 1e9:.3f}" if shape == "GB" else shape.format(value)

    both = math.isfinite(planned) and math.isfinite(actual) and planned != 0
    return shown(planned), shown(actual), f"{actual / planned - 1:+.1%}" if both else ""


# ------------------------------------------------------------------------------------------------------- what befell it


@dataclass(frozen=True)
class Event:
    """Something that happened to a run. ``kind`` is start, end, skip or fault; ``time`` in Unix seconds, where it is known."""

    kind: str
    text: str
    step: float = math.nan
    time: float = math.nan

    @property
    def when(self) -> str:
        with contextlib.suppress(ValueError, OverflowError, OSError):
            return f"{datetime.fromtimestamp(self.time, UTC):%Y-%m-%d %H:%M:%S}"
        return ""


def events(run: Run) -> list[Event]:
    """Starts, resumes, updates that were not applied, spikes, rollbacks, faults and the end, in order, as far as known."""
    found = [*_starts(run), *_from_rows(run)]
    found.sort(key=lambda event: event.time if math.isfinite(event.time) else math.inf)
    for path in sorted(run.folder.glob("diverged_step_*.json")):
        found.append(Event("fault", f"{path.name}: {read_json(path).get('reason')}", as_number(read_json(path).get("step"))))
    found += [Event("fault", f"{path.name}: a process hung") for path in sorted(run.folder.glob("hang_rank*.txt"))]
    found += [Event("fault", f"quarantine/{path.name}: damaged, set aside") for path in sorted(run.folder.glob("quarantine/*"))]
    if ledger := read_json(run.folder / LEDGER):
        found.append(Event("skip", f"samples left out after rollbacks: {ledger.get('ranges_of_samples')}"))
    if run.abandoned:
        found.append(Event("skip", f"{run.abandoned:,} recorded rows of updates that were done again are not shown"))
    status = read_status(run.folder)
    if status and (said := state(run)) != "running":
        kind = "end" if said.startswith(("finished", "interrupted")) else "fault"
        found.append(Event(kind, said, as_number(status.get("step")), as_number(status.get("time"))))
    return found


def _starts(run: Run) -> list[Event]:
    events, before = [], None
    for number, start in enumerate(run.starts):
        step, runtime = as_number(start["step"]), str(start.get("runtime") or "")
        text = "started" if number == 0 and step == 0 else f"went on after update {step:,.0f}"
        if runtime != before:
            text += f"; {runtime}"
        before = runtime
        events.append(Event("start", text, step, as_number(start["time"])))
    return events


def _from_rows(run: Run) -> list[Event]:
    """What the rows tell; what goes on over many rows is one event, at its first."""
    events, skipped, bad = [], 0.0, False
    for row in run.rows:
        step, time = as_number(row["step"]), as_number(row.get("time"))
        if "rollback/from_step" in row:
            text = f"rolled back from update {as_number(row['rollback/from_step']):,.0f} to {step:,.0f}"
            events.append(Event("skip", text, step, time))
        if "spike/step" in row:
            numbers = (as_number(row.get(f"spike/{name}")) for name in ("step", "loss", "grad_norm", "sigmas"))
            text = "spike at update {:,.0f}: loss {:.4f}, gradient norm {:.2f}, {:.1f} standard deviations".format(*numbers)
            events.append(Event("skip", text, step, time))
        if "train/loss" in row:
            now = not math.isfinite(as_number(row["train/loss"]))
            if now and not bad:
                events.append(Event("fault", "the training loss is not finite", step, time))
            bad = now
        if (count := as_number(row.get("train/skipped_updates", 0))) > skipped:
            events.append(Event("skip", f"{count - skipped:,.0f} updates not applied (not finite, or a spike)", step, time))
            skipped = count
    return events


def samples(run: Run) -> list[tuple[int, str, str]]:
    """Update, prompt and text of at most about :data:`MOST_SAMPLES` samples, all prompts of updates spread over the run."""
    try:
        rows = read_metrics(run.folder / SAMPLES_FILE)
    except OSError:
        return []
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return []
    wanted = max(2, MOST_SAMPLES * len(steps) // len(rows))
    chosen = {steps[i] for i in np.linspace(0, len(steps) - 1, min(len(steps), wanted)).astype(int).tolist()}
    texts = (
        (row["step"], str(row.get("prompt", ""))[:LONGEST_SAMPLE], str(row.get("text", ""))[:LONGEST_SAMPLE])
        for row in rows
        if row["step"] in chosen
    )
    return list(itertools.islice(texts, 4 * MOST_SAMPLES))
