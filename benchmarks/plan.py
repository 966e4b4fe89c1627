"""What ``accel_pretrain.plan`` predicts against what happens: peak memory and time per update, twelve configurations on a CPU.

    python -m benchmarks.plan                  one process each
    python -m benchmarks.plan --processes      1, 2 and 4 processes over gloo

For each configuration three processes run one after the other. The first makes the plan, with its probe of a second. The second
trains a few updates with :func:`accel_pretrain.loop.train_step`, put together by ``accel_pretrain.train``,
and its peak memory is what the kernel counts for it (``VmHWM``, reset by ``/proc/self/clear_refs``) above what it had after
training a tiny model, by when all libraries and kernels are loaded. ``MALLOC_MMAP_THRESHOLD_`` is set for that one, so that
glibc gives back what is freed: without it the heap keeps holes, whose size depends on the order of events. The third is the
same without that variable: its time is compared, and its peak shows the holes ("heap", as a ratio to the prediction; the plan
allows 1.5). ``--cpu_time`` takes the processor's time for both times instead of the wall's, which on one thread is the same on
a quiet machine, and does not count what other programs do on a crowded one. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator

from accel_pretrain.checkpoint import TrainState
from accel_pretrain.config import RunConfig, make_plan, open_splits
from accel_pretrain.loop import train_step
from accel_pretrain.models import Transformer
from accel_pretrain.plan import PlannedRun, plan_run
from accel_pretrain.probe import Clock, probe
from accel_pretrain.runtime import build_accelerator
from accel_pretrain.session import Session
from accel_pretrain.train import assemble
from accel_pretrain.typed_yaml import load, parse_command_line

SMALL = "--d_model 256 --num_layers 6 --num_heads 8 --d_ff 688 --context_length 256 --vocab_size 8192 --batch_size 8 "
SMALL += "--compile false"  # the probe does not compile
GPT2 = "--norm layernorm --activation gelu_tanh --position learned --bias --tie_embeddings --d_ff null"
CONFIGURATIONS = {
    "Llama, fp32": SMALL,
    "Llama, bf16": f"{SMALL} --mixed_precision bf16",
    "deep and narrow": f"{SMALL} --d_model 128 --num_layers 16 --num_heads 4 --d_ff 344",
    "wide and shallow": f"{SMALL} --d_model 768 --num_layers 2 --num_heads 12 --d_ff 2048 --batch_size 4",
    "long context": f"{SMALL} --context_length 2048 --batch_size 1",
    "short context": f"{SMALL} --context_length 32 --batch_size 64",
    "accumulation 4": f"{SMALL} --batch_size 2 --gradient_accumulation_steps 4",
    "GPT-2 with dropout": f"{SMALL} {GPT2} --dropout 0.1",
    "grouped, QK norm, bf16": f"{SMALL} --num_kv_heads 2 --qk_norm --mixed_precision bf16 --batch_size 12",
    "Gemma 2": f"{SMALL} --num_kv_heads 4 --norm rmsnorm_1p --sandwich_norm --activation geglu --sliding_window 64 "
    "--window_pattern SF --attention_softcap 50 --logit_softcap 30 --tie_embeddings",
    "modern, bf16": f"{SMALL} --norm rmsnorm_plain --activation relu2 --qk_norm --logit_softcap 15 --value_embeddings "
    "--mixed_precision bf16 --d_ff 1024",
    "large vocabulary": f"{SMALL} --vocab_size 50304 --num_layers 2 --batch_size 2",
}
PER_PROCESS = f"{SMALL} --num_layers 4 --batch_size 4 --gradient_accumulation_steps 2"


def status(key: str) -> int:
    """Bytes of one line of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def warm_up(config: RunConfig, accelerator: Accelerator) -> None:
    """Train a tiny model of the same kind twice, so that code is loaded and what remains is the model's."""
    shape = replace(
        config.model, d_model=64, num_heads=2, num_kv_heads=None, head_dim=None, d_ff=64, num_layers=2, context_length=64,
        vocab_size=512,
    )  # fmt: skip
    model = Transformer(shape, 512).train()
    optimizer = config.optimizer.build(model)
    ids = torch.randint(0, 512, (2, 65))
    for _ in range(2):
        with accelerator.autocast():
            nats = model(ids[:, :-1], ids[:, 1:])
        nats.sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train(words: list[str], seconds: float, clock: Clock) -> dict[str, float]:
    """Peak memory above the baseline, and median times of an update, of this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, 512, 400_000).astype("<u2").tofile(path)
        given = ["--train_data_path", str(path), "--val_data_path", str(path), "--checkpoint_dir", f"{folder}/run", *words]
        config = load(RunConfig, None, parse_command_line(RunConfig, given).overrides)
        config.checkpoint.checkpoint_dir.mkdir(exist_ok=True)  # as a session does, which there is none of here
        splits = open_splits(config.data)
        accelerator = build_accelerator(config.training, [], config.checkpoint.checkpoint_dir)
        plan = make_plan(config, splits, accelerator.num_processes)
        warm_up(config, accelerator)
        rate = all_reduce_rate() if accelerator.num_processes > 1 else 0.0
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        base = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        with contextlib.redirect_stdout(io.StringIO()):
            run, state = assemble(config, plan, splits, accelerator, Session())
        times = updates(run, state, seconds, clock)
        found = {"peak": status("VmHWM") - base, "seconds": statistics.median(times[1:]), "updates": len(times), "rate": rate}
        run.log.close()
        accelerator.end_training()
        return found


def updates(run, state: TrainState, seconds: float, clock: Clock) -> list[float]:
    """Seconds of each update, for about so long; at least six, so that all processes do the same number in the long run."""
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 6 or (run.plan.world_size == 1 and time.perf_counter() < end):
        begin = clock()
        train_step(run, state)
        times.append(clock() - begin)
        state.step += 1
        state.samples += run.plan.samples_per_step
    return times


def predict(words: list[str], clock: Clock) -> dict[str, float]:
    """Peak memory and seconds of an update as the plan has them."""
    config = load(PlannedRun, None, parse_command_line(PlannedRun, [*words, "--probe", "false"]).overrides)
    outlook = plan_run(config)
    speed = probe(outlook.load, config.optimizer, torch.device("cpu"), clock=clock)
    assert not isinstance(speed, str), speed
    return {"peak": outlook.memory.total, "seconds": speed.seconds_per_update(outlook.plan.accumulation)}


def all_reduce_rate() -> float:
    """Bytes per second and direction of an all-reduce of 32 MB: what the plan is told as --link, divided by its share."""
    numbers, n = torch.ones(8 << 20), dist.get_world_size()
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        dist.all_reduce(numbers)
        times.append(time.perf_counter() - begin)
    return 2 * (n - 1) / n * numbers.nbytes / min(times)


def run_process(command: list[str], **variables: str) -> dict:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", **variables}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout[done.stdout.index("{") :])


def one_process_each(threads: int, clock: list[str], only: str) -> None:
    print(f"{threads} threads, torch {torch.__version__}; MB and ms")
    print(f"{'':<24}{'memory':>8}{'measured':>10}{'error':>8}{'heap':>7}{'update':>11}{'measured':>10}{'error':>8}")
    errors: list[tuple[float, float]] = []
    for name, words in ((name, words) for name, words in CONFIGURATIONS.items() if only in name):
        common = [*words.split(), "--device", "cpu", "--cpu_threads", str(threads)]
        predicted = run_process(["-m", "benchmarks.plan", "--predict", *clock, *common])
        exact = run_process(["-m", "benchmarks.plan", "--train", "0", *common], MALLOC_MMAP_THRESHOLD_="65536")
        usual = run_process(["-m", "benchmarks.plan", "--train", "4", *clock, *common])
        memory, seconds = predicted["peak"], predicted["seconds"]
        error, off = memory / exact["peak"] - 1, seconds / usual["seconds"] - 1
        errors.append((error, off))
        print(
            f"{name:<24}{memory / 1e6:8.0f}{exact['peak'] / 1e6:10.0f}{error:+8.1%}{usual['peak'] / memory:7.2f}"
            f"{seconds * 1000:11.1f}{usual['seconds'] * 1000:10.1f}{off:+8.1%}",
            flush=True,
        )
    for what, values in zip(("memory", "time"), zip(*errors, strict=True), strict=True):
        worst = max(values, key=abs)
        print(f"{what}: largest error {worst:+.1%}, median size {statistics.median(map(abs, values)):.1%}")


def several_processes(words: Sequence[str], counts: Sequence[int] = (1, 2, 4)) -> list[tuple[float, float]]:
    """DDP over gloo: every process has one thread; there may be fewer cores than processes, which the plan is told.

    Returns the errors of memory and time, one pair for each number of processes.
    """
    cores, errors = len(os.sched_getaffinity(0)), []
    print(f"{cores} cores, torch {torch.__version__}; memory of one process in MB, update in ms")
    print(f"{'processes':<12}{'memory':>8}{'measured':>10}{'error':>8}{'update':>11}{'measured':>10}{'error':>8}{'GB/s':>7}")
    common = [*words, "--device", "cpu", "--cpu_threads", "1"]
    for n in counts:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
        trained = ["-m", "benchmarks.plan", "--train", "4", *common]
        measured = run_process([*launch, *trained], MALLOC_MMAP_THRESHOLD_="65536")
        timed = run_process([*launch, *trained])
        options = ["--world_size", str(n), *(["--link", str(timed["rate"] / 0.8)] if n > 1 else [])]
        plan = run_process(["-m", "accel_pretrain.plan", "--json", "--max_iters", "100", *common, *options])
        parts, memory = plan["time"], plan["memory"]["peak"]
        crowded = max(1.0, n / cores)
        seconds = (parts["seconds_per_update"] - (parts["exposed"] or 0)) * crowded + (parts["exposed"] or 0)
        errors.append((memory / measured["peak"] - 1, seconds / timed["seconds"] - 1))
        print(
            f"{n:<12}{memory / 1e6:8.0f}{measured['peak'] / 1e6:10.0f}{errors[-1][0]:+8.1%}"
            f"{seconds * 1000:11.1f}{timed['seconds'] * 1000:10.1f}{errors[-1][1]:+8.1%}"
            f"{timed['rate'] / 1e9:7.2f}",
            flush=True,
        )
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", action="store_true", help="1, 2 and 4 processes instead of twelve configurations")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--only", default="", help="the configurations with this in their name")
    parser.add_argument("--cpu_time", action="store_true", help="the processor's time instead of the wall's")
    parser.add_argument("--predict", action="store_true", help="plan what follows (for itself)")
    parser.add_argument("--train", type=float, default=None, help="train what follows for so many seconds (for itself)")
    options, words = parser.parse_known_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.predict:
        print(json.dumps(predict(words, clock)))
    elif options.train is not None:
        found = train(words, options.train, clock)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(found))
    elif options.processes:
        several_processes(PER_PROCESS.split())
    else:
        one_process_each(options.threads, ["--cpu_time"] if options.cpu_time else [], options.only)


if __name__ == "__main__":
    main()
