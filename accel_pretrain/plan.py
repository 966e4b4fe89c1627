"""What a run will be, before it costs anything: ``python -m accel_pretrain.plan --config C.yaml [overrides]``.

Parameters, operations, memory against what is free, disk, how often the data is read, what loss to expect first, time and cost;
and every setting that is legal and probably not meant, each with what to type. It takes the keys of ``accel_pretrain.train``,
works without the data if ``--vocab_size`` is given, and plans for machines that are not here: ``--world_size 512 --hardware
h100``.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from accel_pretrain.cluster import bandwidth
from accel_pretrain.config import RunConfig
from accel_pretrain.errors import refuse, reported
from accel_pretrain.estimates import seen_positions
from accel_pretrain.files import write_whole
from accel_pretrain.hardware import HARDWARE, Machine, here
from accel_pretrain.hindsight import PLAN_FILE, duration, gigabytes
from accel_pretrain.lint import findings
from accel_pretrain.lint_settings import Finding
from accel_pretrain.outlook import (
    CHINCHILLA,
    Outlook,
    critical_batch,
    first_loss,
    groups,
    load_with_shape,
    look_ahead,
    splits_of,
    with_model_of,
    with_probe,
    with_tokens_per_sec,
)
from accel_pretrain.preset import describe
from accel_pretrain.runtime import runtime_of
from accel_pretrain.typed_yaml import option, parse_command_line, reference, section

USAGE = """\
usage: python -m accel_pretrain.plan --config FILE [--section.key VALUE | --key VALUE | section.key=VALUE]...
       python -m accel_pretrain.plan --config FILE --world_size 512 --hardware h100 --price_per_hour 2.5

  --preset depth=N the choices of accel_pretrain.train for N layers, beneath FILE and what is typed
  --json           print one JSON object instead of a table
  --save           write that object into checkpoint_dir too: after 50 updates, training says how it compares
  --help           show this

"""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """On what the run is planned, and how its speed is found out."""

    world_size: int = option(1, "devices, each with one process")
    hardware: Literal["h100", "h200", "a100", "l4", "4090", "mi300x"] | None = option(
        None, "h100 | h200 | a100 | l4 | 4090 | mi300x; null: this machine"
    )
    per_node: int = option(8, "devices of one node, which talk over its link; others over the network")
    probe: bool = option(True, "time a second of real updates, if the run is planned for this machine")
    probe_seconds: float = option(1.0, "how long to time them")
    tokens_per_sec: float | None = option(None, "of all devices together, if it is known; null: from the probe, or a model")
    link: float | None = option(None, "bytes per second between the devices of a node, one way; null: the data sheet's")
    network: float | None = option(None, "the same between nodes, per device")
    price_per_hour: float | None = option(None, "of one device, in any currency")

    def __post_init__(self) -> None:
        names = ("world_size", "per_node", "probe_seconds", "tokens_per_sec", "link", "network")
        refuse(
            *(
                ((value := getattr(self, name)) is not None and value <= 0, f"{name}: must be positive, got {value}")
                for name in names
            ),
            ((self.price_per_hour or 0) < 0, f"price_per_hour: must not be negative, got {self.price_per_hour}"),
        )


@dataclass(frozen=True, kw_only=True)
class PlannedRun(RunConfig):
    """A run, and the machine that it is planned for."""

    plan: PlanOptions = section(PlanOptions, "On what the run is planned (keys of accel_pretrain.plan only)")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    with reported():
        words = sys.argv[1:] if argv is None else argv
        line = parse_command_line(PlannedRun, words, flags={"help", "json", "save"}, short={"-h": "help"}, presets=True)
        if "help" in line.flags:
            print(USAGE + reference(PlannedRun), end="")
            return 0
        config = load_with_shape(PlannedRun, line)
        outlook = plan_run(config)
        found = findings(outlook)
        text = json.dumps(as_json(outlook, found), indent=2)
        if line.preset is not None and "json" not in line.flags:
            print(describe(line.preset, config))
        print(text if "json" in line.flags else as_text(outlook, found))
        if "save" in line.flags:
            folder = outlook.config.checkpoint.checkpoint_dir
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / PLAN_FILE, f"{text}\n".encode())
        return 0
    return 2


def plan_run(config: PlannedRun) -> Outlook:
    """Everything that can be known of a run; the probe, if it is wanted, takes about a second."""
    options = config.plan
    machine = machine_for(config)
    outlook = look_ahead(config, splits_of(config), world_size=options.world_size, machine=machine)
    if options.tokens_per_sec is not None:
        return with_tokens_per_sec(outlook, options.tokens_per_sec)
    if options.hardware is not None:
        return with_model_of(outlook, machine)
    return with_probe(outlook, machine, options.probe_seconds) if options.probe else outlook


def machine_for(config: PlannedRun) -> Machine:
    """The machine that was named, or else this one, with what the options say about its links."""
    options = config.plan
    if options.hardware is not None:
        machine = HARDWARE[options.hardware]
    else:
        cpu, threads = runtime_of(config.training)
        if cpu:
            torch.set_num_threads(threads)
        machine = here(cpu, threads)
    return replace(
        machine, per_node=options.per_node, link=options.link or machine.link, network=options.network or machine.network
    )


# ------------------------------------------------------------------------------------------------------------ for people


def as_text(o: Outlook, found: list[Finding]) -> str:
    """The plan as a table, and the findings below it."""
    lines = [row for part in (_model, _amounts, _memory, _disk, _time) for row in part(o)]
    serious = [finding for finding in found if finding.serious]
    advice = [finding for finding in found if not finding.serious]
    for title, group in (("Probably wrong", serious), ("Worth a look", advice)):
        lines += ["", f"{title}:", *(f"  {finding}" for finding in group)] if group else []
    return "\n".join(lines if found else [*lines, "", "Nothing in this config looks wrong."])


def _row(name: str, text: str) -> str:
    return f"{name:<20}{text}"


def _model(o: Outlook) -> list[str]:
    """Parameters and operations, by group."""
    plan, model = o.plan, o.config.model
    operations = f"{_si(plan.flops_per_token):>10}FLOP per token, forward and backward"
    rows = [_row("Parameters", f"{plan.parameters:>16,}        {operations}")]
    for name, (count, flops) in groups(o.load).items():
        if count or flops:
            share = f"{count / plan.parameters:6.1%} {_si(flops):>10}FLOP" if flops else f"{count / plan.parameters:6.1%}"
            rows.append(_row(f"  {name}", f"{count:>16,} {share}"))
    seen = seen_positions(model) / model.num_layers
    rows.append(_row("  attends to", f"{seen:,.0f} of {model.context_length:,} positions on average, over layers and tokens"))
    return rows


def _amounts(o: Outlook) -> list[str]:
    """Tokens, passes, and the first loss."""
    plan, best = o.plan, critical_batch(o.plan.parameters, o.tokens)
    rows = [
        _row(
            "Updates",
            f"{plan.max_iters:,} of {plan.tokens_per_step:,} tokens ({plan.batch_size} sequences x {plan.accumulation} "
            f"micro-steps x {plan.world_size} processes), {plan.warmup_iters:,} of them warm-up",
        ),
        _row("Tokens", f"{_si(o.tokens)}; {_number(o.tokens_per_parameter)} per parameter (least compute: {CHINCHILLA})"),
        _row("Compute", f"{o.flops:.2e} FLOP; beyond about {_si(best)}tokens per update little is gained"),
    ]
    if o.splits is None:
        rows.append(_row("Data", f"not here; vocabulary of {plan.vocab_size:,}"))
    else:
        read = f"{plan.train_tokens:,} tokens, read {plan.epochs:.3g} times"
        rows.append(_row("Data", f"{read}; vocabulary of {plan.vocab_size:,}"))
        rows += [_row("  mixture", part) for part in plan.mixture]
    loss = first_loss(o.config.model, plan.vocab_size)
    known = math.log(plan.vocab_size)
    rows.append(_row("First loss", f"about {loss:.2f} (ln V = {known:.2f}, the rest is the spread of new logits)"))
    if (windows := o.eval_windows) is not None and (share := o.eval_share) is not None:
        rows.append(_row("Evaluation", f"{windows:,} windows of each split, about {share:.1%} of the time"))
    return rows


def _memory(o: Outlook) -> list[str]:
    """Bytes on one device, and what is free."""
    where = o.machine.name if o.machine else "a device"
    rows = [_row("Memory", f"{gigabytes(o.memory.total)} per device, at {o.memory.moment} ({o.load.strategy})")]
    rows += [_row(f"  {name}", f"{gigabytes(size)}") for name, size in o.memory.parts.items() if size >= 1e5]
    free = o.machine.memory if o.machine else None
    fits = free is None or o.memory_needed <= 0.95 * free
    state = "not known" if free is None else f"{gigabytes(free)}: {'fits' if fits else 'DOES NOT FIT'}"
    around = "with the heap's holes" if o.load.device == "cpu" else "with CUDA's context"
    rows.append(_row("  needed", f"{gigabytes(o.memory_needed)} {around}; free on {where}: {state}"))
    if o.host_memory:
        rows.append(
            _row("  to save", f"{gigabytes(o.host_memory)} of main memory on the machine of rank 0, which gathers all shares")
        )
    return rows


def _disk(o: Outlook) -> list[str]:
    disk = o.checkpoints_kept * o.checkpoint
    free = "not known" if o.disk_free is None else gigabytes(o.disk_free)
    return [_row("Disk", f"{gigabytes(disk)} for {o.checkpoints_kept} checkpoints of {gigabytes(o.checkpoint)}; free: {free}")]


def _time(o: Outlook) -> list[str]:
    """Pace, what devices tell each other, and the whole of it."""
    sent = o.pace.parts.sent if o.pace and o.pace.parts else {}
    rows = [_row("Sends per update", ", ".join(f"{gigabytes(size)} of {name}" for name, size in sent.items()))] if sent else []
    if o.pace is None or o.hours is None:
        return [*rows, _row("Time", f"not known: {o.pace_missing}")]
    seconds = o.pace.seconds
    rows.append(_row("Update", f"{duration(seconds)}, {o.plan.tokens_per_step / seconds:,.0f} tokens/s, from {o.pace.source}"))
    if o.pace.parts and o.plan.world_size > 1:
        parts = o.pace.parts
        rows.append(
            _row(
                "  of which",
                f"{duration(parts.compute)} computing, {duration(parts.optimizer)} optimizer, {duration(parts.exposed)} "
                f"waiting for others (of {duration(parts.communication)} talking): {parts.efficiency:.0%} of what single "
                "devices do",
            )
        )
    evaluating = (o.eval_share or 0.0) * o.hours
    note = "" if o.eval_share is None else f", and {duration(3600 * evaluating)} of evaluations"
    rows.append(_row("Time", f"{duration(3600 * o.hours)} of updates{note}"))
    if (cost := cost_of(o)) is not None:
        hours = (o.hours + evaluating) * o.plan.world_size
        rows.append(_row("Cost", f"{cost:,.2f} for {hours:,.1f} device hours"))
    return rows


def cost_of(o: Outlook) -> float | None:
    """Price of all devices for updates and evaluations; None without a price or a pace."""
    price = o.config.plan.price_per_hour if isinstance(o.config, PlannedRun) else None
    return None if price is None or o.hours is None else price * o.hours * (1 + (o.eval_share or 0)) * o.plan.world_size


def _si(number: float) -> str:
    """Three digits and a letter: 295 G."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g} "


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


# ---------------------------------------------------------------------------------------------------------- for programs


def as_json(o: Outlook, found: list[Finding]) -> dict[str, Any]:
    """The same, as one object; what is not known is null. Sizes in bytes, times in seconds."""
    pace, model = o.pace, o.config.model
    parts = pace.parts if pace else None
    return {
        "parameters": {"total": o.plan.parameters, **{name: count for name, (count, _) in groups(o.load).items()}},
        "flops_per_token": {"total": o.plan.flops_per_token, **{name: flops for name, (_, flops) in groups(o.load).items()}},
        "run": {
            "max_iters": o.plan.max_iters, "tokens_per_step": o.plan.tokens_per_step, "tokens": o.tokens, "flops": o.flops,
            "world_size": o.plan.world_size, "accumulation": o.plan.accumulation, "vocab_size": o.plan.vocab_size,
            "tokens_per_parameter": o.tokens_per_parameter, "passes": o.passes, "eval_share": o.eval_share,
            "first_loss": first_loss(model, o.plan.vocab_size), "precision": o.load.precision, "strategy": o.load.strategy,
        },
        "memory": {
            "peak": o.memory.total, "moment": o.memory.moment, "parts": o.memory.parts, "needed": o.memory_needed,
            "free": o.machine.memory if o.machine else None, "to_save": o.host_memory,
        },
        "disk": {"checkpoint": o.checkpoint, "checkpoints": o.checkpoints_kept, "free": o.disk_free},
        "time": {
            "machine": o.machine.name if o.machine else None, "source": pace.source if pace else None,
            "missing": None if pace else o.pace_missing, "seconds_per_update": pace.seconds if pace else None,
            "tokens_per_sec": o.plan.tokens_per_step / pace.seconds if pace else None, "hours": o.hours,
            "sent": parts.sent if parts else None, "exposed": parts.exposed if parts else None,
            "communication": parts.communication if parts else None,
            "bandwidth": bandwidth(o.machine, o.plan.world_size) if o.machine and o.plan.world_size > 1 else None,
            "cost": cost_of(o),
        },
        "findings": [
            {"kind": finding.kind, "serious": finding.serious, "text": finding.text, "fix": finding.fix} for finding in found
        ],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
