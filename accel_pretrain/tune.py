"""The fastest way to train a config on this machine: ``python -m accel_pretrain.tune --config C.yaml [overrides]``.

Micro-batch, torch.compile and activation checkpointing are tried one after the other, each candidate with real updates in a
process of its own, and what won before is kept. The sequences of an update stay the same, and so does the loss curve, within
rounding. What was found is remembered: the same command answers at once the next time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from accel_pretrain import __version__
from accel_pretrain.config import Plan, make_plan
from accel_pretrain.errors import ConfigError, refuse, reported
from accel_pretrain.files import write_whole
from accel_pretrain.hardware import cores, free_memory
from accel_pretrain.ladder import Candidate, Search, TunedRun, as_run
from accel_pretrain.launchers import launcher_variables
from accel_pretrain.outlook import load_with_shape, splits_of, unknown_splits
from accel_pretrain.peaks import processor
from accel_pretrain.preset import describe
from accel_pretrain.runtime import cache_folder, resolve_precision, runtime_of
from accel_pretrain.stopping import signals_as_exceptions
from accel_pretrain.trial import Trial, measure
from accel_pretrain.typed_yaml import parse_command_line, reference, to_plain, to_yaml

USAGE = """\
usage: python -m accel_pretrain.tune --config FILE [--section.key VALUE | --key VALUE | section.key=VALUE]...
       python -m accel_pretrain.tune --config FILE --only batch_size      only the largest micro-batch that pays

  --preset depth=N the choices of accel_pretrain.train for N layers, beneath FILE and what is typed
  --fresh          measure, also if it was measured before
  --help           show this

"""


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    with reported():
        words = sys.argv[1:] if argv is None else argv
        line = parse_command_line(TunedRun, words, flags={"help", "fresh"}, short={"-h": "help"}, presets=True)
        if "help" in line.flags:
            print(USAGE + reference(TunedRun), end="")
            return 0
        if int(launcher_variables().get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("tune measures in one process: type python -m accel_pretrain.tune --world_size N ...")
        config = load_with_shape(TunedRun, line)
        refuse_early(config, line.config)
        if line.preset is not None:
            print(describe(line.preset, config))
        plan = make_plan(config, splits_of(config) or unknown_splits(config), config.tune.world_size)
        search = Search(config, plan, measuring(config, plan), kind=kind_of(config))
        search.say = lambda candidate: print(table_row(search, candidate), flush=True)
        memory = memory_file(search)
        remembered = None if "fresh" in line.flags or memory is None else recall(memory)
        if remembered is not None:
            search.rows = remembered
        print(_TABLE_HEAD)
        if remembered is not None:
            rows = [table_row(search, candidate) for candidate in remembered]
            print("\n".join([*rows, f"(measured before, {memory}; --fresh measures anew)"]))
        else:
            measure_all(search, memory)
        print("\n".join(report(search)))
        if config.tune.write is not None:
            write_whole(config.tune.write, to_yaml(as_run(config, plan, search.best)).encode())
            print(f"the config with these is in {config.tune.write}")
        return 0
    return 2


def refuse_early(config: TunedRun, source: Path | None) -> None:
    """What would be found after all measuring, or by every candidate."""
    cpu, _ = runtime_of(config.training)
    write = config.tune.write
    refuse(
        (
            cpu and resolve_precision(config.training, cpu)[0] == "fp16",
            "training.mixed_precision: fp16 needs a GPU; try --mixed_precision bf16",
        ),
        (
            write is not None and not write.absolute().parent.is_dir(),
            f"tune.write: the folder of {write} does not exist; type: mkdir -p {write and write.parent}",
        ),
        (write is not None and write.is_dir(), f"tune.write: {write} is a folder; type --write {write}/best.yaml"),
        (
            write is not None and source is not None and write.resolve() == source.resolve(),
            f"tune.write: {write} is what --config reads; type --write FILE with another name",
        ),
    )


def measure_all(search: Search, memory: Path | None) -> None:
    """Search and remember. Who ends it early still gets to know what is the best so far."""
    try:
        with signals_as_exceptions():
            if search.run() and memory is not None:
                remember(memory, search.rows)
    except (KeyboardInterrupt, SystemExit):
        if any(trial.problem is None for trial in search.rows.values()):
            print("\n".join(["", "Not finished. So far:", *report(search)]), flush=True)
        raise


def kind_of(config: TunedRun) -> str:
    """The kind of device that the run will use on this machine."""
    cpu, _ = runtime_of(config.training)
    return "cpu" if cpu else "cuda" if torch.cuda.is_available() and config.training.device != "mps" else "mps"


def measuring(config: TunedRun, plan: Plan) -> Callable[[Candidate, float], Trial]:
    """How the search measures: each candidate in a process of its own, in the memory that is free now."""
    limit, (cpu, _) = limit_of(config), runtime_of(config.training)

    def measured(candidate: Candidate, left: float) -> Trial:
        run = as_run(config, plan, candidate)
        if cpu:
            run = replace(run, training=replace(run.training, cpu_threads=threads_of(config)))
        return measure(
            run, vocab_size=plan.vocab_size, samples=plan.samples_per_step // plan.world_size,
            updates=plan.max_iters, seconds=config.tune.budget / 30, timeout=left, limit=limit,
        )  # fmt: skip

    return measured


def limit_of(config: TunedRun) -> int | None:
    """Bytes that a candidate may have; None on a GPU, which has its own, if nothing is said."""
    if config.tune.memory_gb is not None:
        return int(config.tune.memory_gb * 1e9)
    return int(0.9 * free) if runtime_of(config.training)[0] and (free := free_memory()) else None


def threads_of(config: TunedRun) -> int:
    """Threads that one process of the planned run has on a CPU: all of them share the cores, but for what was asked for."""
    _, threads = runtime_of(config.training)
    return config.training.cpu_threads or min(threads, max(1, cores() // config.tune.world_size))


# ----------------------------------------------------------------------------------------------------------- for people

_TABLE_HEAD = (
    f"{'micro-batch':>11}{'micro-steps':>13}{'compile':>9}  {'checkpointing':<18}{'tokens/s':>10}{'peak GB':>9}{'first s':>9}"
)


def table_row(search: Search, candidate: Candidate) -> str:
    """One candidate: tokens per second of one process, its peak memory, and what the first update took longer."""
    trial, steps = search.rows[candidate], search.samples // candidate.batch_size
    setting = f"{candidate.batch_size:>11}{steps:>13}{'yes' if candidate.compiled else 'no':>9}  "
    setting += f"{candidate.checkpointing + (' +chunks' if candidate.chunked else ''):<18}"
    if trial.problem:
        return f"{setting}  {trial.problem}"
    tokens = search.samples * search.config.model.context_length / trial.seconds
    return f"{setting}{tokens:>10,.0f}{trial.peak / 1e9:>9.2f}{trial.first:>9.1f}"


def report(search: Search) -> list[str]:
    """The winner, as words to paste, and what to know about it."""
    best, start = search.best, search.start
    lines = ["", f"Best for {search.plan.max_iters:,} updates: {words_for(search, best)}"]
    if best == start:
        lines.append("The config is as fast as anything that was tried.")
    elif search.rows[start].problem is None:
        lines.append(
            f"The planned run ends {search.hours(start) / search.hours(best):.2f} times as fast as with the config as it is."
        )
    if search.once:
        lines.append(f"No time to measure it again; type --budget {2 * search.config.tune.budget:g}")
    if best.batch_size != start.batch_size and search.config.model.dropout:
        lines.append("Dropout masks are drawn for each micro-batch: with another batch_size they are others.")
    if search.left_out:
        left = ", ".join(words_for(search, candidate) for candidate in search.left_out)
        lines.append(f"No time for: {left}; type --budget {2 * search.config.tune.budget:g}")
    return lines


def words_for(search: Search, candidate: Candidate) -> str:
    """The overrides that make a run train like this."""
    training = as_run(search.config, search.plan, candidate).training
    words = f"--batch_size {training.batch_size}"
    if training.gradient_accumulation_steps is not None:
        words += f" --gradient_accumulation_steps {training.gradient_accumulation_steps}"
    words += f" --compile {str(training.compile).lower()} --activation_checkpointing {training.activation_checkpointing}"
    return f"{words} --chunked_loss {str(candidate.chunked).lower()}" if search.on_gpu else words


# ----------------------------------------------------------------------------------------------------- what was found before


def memory_file(search: Search) -> Path | None:
    """Where the rows of this question are kept: what they depend on, hashed. None without a home."""
    config, plan, cpu, limit = search.config, search.plan, not search.on_gpu, limit_of(search.config)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "mps"
    device = f"{processor()}, {threads_of(config)} threads" if cpu else device
    facts = {
        "device": device, "torch": torch.__version__, "version": __version__,
        "model": to_plain(config.model.resolved()), "vocab_size": plan.vocab_size, "optimizer": config.optimizer.name,
        "precision": resolve_precision(config.training, cpu)[0], "samples": search.samples, "start": asdict(search.start),
        "updates": plan.max_iters,
        "options": [config.tune.only, config.training.tf32, config.training.grad_clip, config.training.on_spike],
        "memory": limit and round(math.log2(limit)),  # what is free is never the same twice
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder()
    return folder and folder / "tune" / f"{key}.json"


def remember(path: Path, rows: dict[Candidate, Trial]) -> None:
    """Keep the rows for the same question; where that cannot be written, the next time measures again."""
    document = {"rows": [[asdict(candidate), asdict(trial)] for candidate, trial in rows.items()]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(document).encode())
    except OSError as error:
        logging.getLogger(__name__).warning("%s could not be written: %s", path, error.strerror or error)


def recall(path: Path) -> dict[Candidate, Trial] | None:
    """The rows that were measured before; None if there are none that can be read."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {Candidate(**candidate): Trial(**trial) for candidate, trial in document["rows"]} or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


if __name__ == "__main__":
    sys.exit(main())
