"""What several processes on one machine gain and cost, and whether the plan knew: DDP over gloo, on a CPU.

    python -m benchmarks.scaling                 all of it; about six minutes on two cores, which it needs for itself
    python -m benchmarks.scaling --only speed    speed | loss | plan
    python -m benchmarks.scaling --quick         the same with a tiny model, to see that it runs

**speed**: a model of 30 million parameters, the same batch for all, in turns, so that a slow minute of the machine is slow for
all: one process with two threads, and two processes with one. What DDP itself costs is the second against two processes that
do the same work, at the same time, and do not talk. One process with one thread and half the batch, alone on the machine,
shows what the cores take from each other.

**loss**: the validation loss of the same weights, by 1, 2 and 4 processes.

**plan**: memory and time of an update as ``accel_pretrain.plan`` predicts and as they are, two models with 1, 2 and 4
processes. How the three measurements of each are made is told in :mod:`benchmarks.plan`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MODEL = "--d_model 512 --num_layers 8 --num_heads 8 --d_ff 1376 --context_length 256 --vocab_size 4096"  # 29.5 million
TINY = "--d_model 64 --num_layers 2 --num_heads 2 --d_ff 128 --context_length 64 --vocab_size 4096"
BAR = 0.95  # of the speed of threads, that processes have to reach


@dataclass(frozen=True)
class Group:
    """Processes that train together, or, ``apart``, at the same time without knowing of each other."""

    name: str
    processes: int
    threads: int
    global_batch: int  # of each where they are apart
    apart: bool = False


def member(pipe: Connection, words: list[str], variables: dict[str, str]) -> None:
    """One process of a group: answers ``"update"`` with seconds, ``"validate"`` with a loss, None with its end."""
    os.environ.update(variables)
    import torch

    from accel_pretrain.config import RunConfig
    from accel_pretrain.loop import _validate, train_step
    from accel_pretrain.typed_yaml import load, parse_command_line
    from benchmarks.runs import assembled

    config = load(RunConfig, None, parse_command_line(RunConfig, words).overrides)
    with contextlib.redirect_stdout(io.StringIO()):
        run, state = assembled(config)
    pipe.send(run.plan.parameters)
    while (what := pipe.recv()) is not None:
        begin = time.perf_counter()
        if what == "validate":
            pipe.send(_validate(run, "val").loss)
            continue
        train_step(run, state)
        state.step += 1
        state.samples += run.plan.samples_per_step
        pipe.send(time.perf_counter() - begin)
    run.log.close()
    run.accelerator.end_training()
    torch.set_num_threads(1)


class Resident:
    """The processes of a group, waiting for what to do."""

    def __init__(self, group: Group, data: Path, folder: Path, words: Sequence[str]) -> None:
        self.group, context = group, multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        paths = ["--train_data_path", str(data), "--val_data_path", str(data)]
        own = ["--device", "cpu", "--cpu_threads", str(group.threads), "--global_batch_size", str(group.global_batch)]
        together = {"WORLD_SIZE": str(group.processes), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(group.processes):
            run_dir = folder / (f"{group.name} {rank}" if group.apart else group.name)
            run_dir.mkdir(exist_ok=True)
            ours, theirs = context.Pipe()
            several = group.processes > 1 and not group.apart
            variables = together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if several else {}
            variables |= {
                "ACCELERATE_USE_CPU": "1",
                "OMP_NUM_THREADS": str(group.threads),
                "LOCAL_WORLD_SIZE": str(group.processes),
            }
            self.processes.append(
                context.Process(
                    target=member,
                    args=(theirs, [*words, *paths, *own, "--checkpoint_dir", str(run_dir)], variables),
                    daemon=True,
                )
            )
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)
        self.parameters: int = max(pipe.recv() for pipe in self.pipes)

    def do(self, what: str) -> list[float]:
        for pipe in self.pipes:
            pipe.send(what)
        return [pipe.recv() for pipe in self.pipes]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)


def write_tokens(folder: Path) -> Path:
    """Random ids: what they are makes no difference to time, memory and the comparison of losses."""
    import numpy as np

    path = folder / "tokens.bin"
    np.random.default_rng(0).integers(0, 4096, 400_000).astype("<u2").tofile(path)
    return path


def speed(words: list[str], batch: int, rounds: int) -> None:
    """Tokens per second of processes and of threads, and what DDP costs; ``batch`` sequences per process and update."""
    groups = [
        Group("1 process x 2 threads", 1, 2, 2 * batch),
        Group("2 processes x 1 thread", 2, 1, 2 * batch),
        Group("2 that do not talk", 2, 1, batch, apart=True),
        Group("1 process x 1 thread, half", 1, 1, batch),
    ]
    with tempfile.TemporaryDirectory() as folder:
        data = write_tokens(Path(folder))
        residents = [Resident(group, data, Path(folder), [*words, "--batch_size", str(batch)]) for group in groups]
        times: dict[str, list[float]] = {group.name: [] for group in groups}
        for turn in range(rounds + 1):
            for resident in residents if turn % 2 else reversed(residents):
                seconds = max(resident.do("update"))
                if turn:  # the first one makes buckets and moments
                    times[resident.group.name].append(seconds)
        parameters = residents[0].parameters
        for resident in residents:
            resident.close()
    context = int(words[words.index("--context_length") + 1])
    report(times, groups, parameters, context, batch, rounds)


def report(
    times: dict[str, list[float]], groups: Sequence[Group], parameters: int, context: int, batch: int, rounds: int
) -> None:
    print(f"{parameters / 1e6:.1f} M parameters, {2 * batch} sequences of {context} per update, medians of {rounds} in turns")
    median = {name: statistics.median(own) for name, own in times.items()}
    for group in groups:
        rate = context * group.global_batch * (group.processes if group.apart else 1) / median[group.name]
        spread = (max(times[group.name]) - min(times[group.name])) / median[group.name]
        print(f"  {group.name:<28}{median[group.name] * 1000:9.0f} ms{rate:10.0f} tokens/s   spread {spread:.0%}")
    threads, processes, silent, half = (median[group.name] for group in groups)
    # Ratios of neighbours in time, round by round: steadier than the ratio of two medians.
    rounds_of = [times[group.name] for group in groups]
    paired = statistics.median(a / b for a, b in zip(rounds_of[0], rounds_of[1], strict=True))
    talk = statistics.median(b / a for a, b in zip(rounds_of[2], rounds_of[1], strict=True)) - 1
    by_medians = threads / processes
    print(
        f"  processes against threads: {by_medians:.3f}x by medians, {paired:.3f}x by rounds ({_verdict(paired >= BAR)}: {BAR})"
    )
    print(f"  DDP itself: {talk:+.1%} of an update; sharing the machine with another process: {silent / half - 1:+.1%}")


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def loss(words: list[str]) -> None:
    """The validation loss of the initial weights, which a seed gives to any number of processes."""
    found: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_tokens(Path(folder))
        for n in (1, 2, 4):
            more = [
                "--batch_size",
                "2",
                "--eval_iters",
                "3",
                "--eval_batch_size",
                "7",
            ]  # 21 windows, which 2 and 4 do not divide
            resident = Resident(Group(f"loss {n}", n, 1, 8), data, Path(folder), [*words, *more])
            found[n] = resident.do("validate")[0]
            resident.close()
    print("validation loss by processes: " + ", ".join(f"{n}: {value:.9f}" for n, value in found.items()))
    apart = max(found.values()) - min(found.values())
    print(f"  largest difference {apart:.1e} ({_verdict(apart <= 1e-7 * found[1])}: 1e-7 relative)")


def plans(quick: bool) -> None:
    """Predicted and measured memory and time of six configurations."""
    from benchmarks.plan import PER_PROCESS, several_processes

    wide = PER_PROCESS.replace("--d_model 256", "--d_model 384").replace("--d_ff 688", "--d_ff 1024")
    tiny = f"{TINY} --batch_size 4 --gradient_accumulation_steps 2"
    errors: list[tuple[float, float]] = []
    models: dict[str, str] = {"tiny": tiny} if quick else {"256 wide": PER_PROCESS, "384 wide": wide}
    for name, words in models.items():
        print(f"{name}:")
        errors += several_processes(words.split(), (2,) if quick else (1, 2, 4))
    memory, seconds = (max(map(abs, own)) for own in zip(*errors, strict=True))
    verdicts = f"memory {memory:.1%} ({_verdict(memory <= 0.1)}: 10 %), time {seconds:.1%} ({_verdict(seconds <= 0.2)}: 20 %)"
    print(f"largest error: {verdicts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "loss", "plan"], help="one of the three")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--rounds", type=int, default=7, help="updates of each, in turns")
    parser.add_argument("--batch", type=int, default=8, help="sequences per process and update")
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    options: Any = parser.parse_args()
    words: list[str] = [*(TINY if options.quick else MODEL).split(), "--mixed_precision", options.precision]
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} when it began", flush=True)
    if options.only in (None, "speed"):
        speed(words, options.batch, 3 if options.quick else options.rounds)
    if options.only in (None, "loss"):
        loss([*words[:-1], "no"])
    if options.only in (None, "plan"):
        plans(options.quick)


if __name__ == "__main__":
    main()
