"""Training on a CPU: our ``train_step`` against the loops of others, in turns, on identical work.

    python -m benchmarks.train --shape small --eager --nanogpt PATH/TO/nanoGPT
    python -m benchmarks.train --shape 124m --compiled --peers nanogpt trainer

Each loop has a process of its own with the same number of threads; all are resident, and one update of one loop runs at a time,
in turns, so that a slow minute of the machine is slow for all. Weights, tokens, batches, AdamW and clipping are the same, and
over the first updates the losses must be too (to 1e-4 relative in float32, 2e-3 in bfloat16). GPT-2's shape for nanoGPT, the
Trainer of transformers and an Accelerate loop around its model; Llama's for litgpt. Those with a peer in ``--peers`` run.
The first update's time, which has the compilation in it, is reported apart. The share is that of the rate of large
products, measured in the same turns, which the operations of the model reach.

nanoGPT is a checkout (https://github.com/karpathy/nanoGPT); litgpt installs without touching torch:
``pip install --no-deps --target DIR litgpt lightning lightning-utilities torchmetrics jsonargparse``, then ``--path DIR``.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

GPT, LLAMA = ("nanogpt", "trainer", "accelerate"), ("litgpt",)
COMPARED = 4  # updates whose losses must agree
SIZE, PRODUCTS = 2048, 8  # of square matrices, whose rate is the measure of all


def shapes(name: str) -> dict[str, Any]:
    """The two models of a size, and the batch."""
    from accel_pretrain.models import ModelConfig

    sizes = {
        "small": ({"vocab_size": 8192, "context_length": 256, "d_model": 256, "num_layers": 6, "num_heads": 8}, 704, 16),
        "124m": ({"vocab_size": 50304, "context_length": 512, "d_model": 768, "num_layers": 12, "num_heads": 12}, 2048, 4),
    }
    size, gated_width, batch = sizes[name]
    gpt = {"norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True, "tie_embeddings": True}
    return {
        "gpt": ModelConfig(**size, **gpt, d_ff=None),  # type: ignore[arg-type]
        "llama": ModelConfig(**size, d_ff=gated_width),  # type: ignore[arg-type]
        "batch_size": batch,
    }


def child(pipe: Connection, name: str, arguments: argparse.Namespace) -> None:
    """One loop in its process: an update for each word from the pipe, answered by its loss, seconds and peak memory."""
    sys.path += arguments.path
    import torch

    from benchmarks import train_loops

    torch.set_num_threads(arguments.threads)
    found = shapes(arguments.shape)
    work = train_loops.Work(
        model=found["llama" if name in ("litgpt", "ours llama") else "gpt"], batch_size=found["batch_size"],
        bf16=arguments.precision == "bf16", compiled=arguments.compiled, nanogpt=arguments.nanogpt,
    )  # fmt: skip
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    begin = clock()

    def turn(loss: float | None) -> None:
        nonlocal begin
        if loss is not None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            pipe.send((loss, clock() - begin, peak))
        if not pipe.recv():
            os._exit(0)
        torch.set_num_threads(arguments.threads)
        begin = clock()

    if name == "trainer":
        train_loops.trainer(work, turn)
    loops: dict[str, Callable[[train_loops.Work], Any]] = {
        "nanogpt": train_loops.nanogpt, "accelerate": train_loops.accelerate_loop, "litgpt": train_loops.litgpt,
        "products": products,
    }  # fmt: skip
    updates = loops.get(name, train_loops.ours)(work)
    loss = None
    while True:
        turn(loss)
        loss = next(updates)


def products(work: Any) -> Iterator[float]:
    """No training: a few products of large square matrices, the most that the processor can do."""
    import torch

    one, other = (torch.randn(SIZE, SIZE, dtype=torch.bfloat16 if work.bf16 else torch.float32) for _ in range(2))
    out = torch.empty_like(one)
    while True:
        for _ in range(PRODUCTS):
            torch.mm(one, other, out=out)
        yield 0.0


def check_losses(answers: dict[str, list[tuple[float, float, int]]], precision: str) -> list[str]:
    """Where the losses of a peer part from ours."""
    tolerance = {"fp32": 1e-4, "bf16": 2e-3}[precision]
    parted = []
    for name, own in answers.items():
        base = answers.get("ours llama" if name in ("litgpt", "ours llama") else "ours", own)
        pairs = list(zip(own[:COMPARED], base[:COMPARED], strict=True))
        if any(abs(a[0] - b[0]) > tolerance * b[0] for a, b in pairs):
            parted.append(f"{name}: " + ", ".join(f"{a[0]:.5f} / {b[0]:.5f}" for a, b in pairs))
    return parted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["small", "124m"], default="small")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--eager", dest="compiled", action="store_false")
    parser.add_argument("--peers", nargs="*", choices=[*GPT, *LLAMA], default=[*GPT, *LLAMA])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; without it, that peer is left out")
    parser.add_argument("--path", nargs="*", default=[], help="folders where peers are installed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu_time", action="store_true", help="count processor time: with --threads 1, for a busy machine")
    parser.add_argument("--warmup", type=int, default=4, help="updates that are not timed")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    peers = [name for name in arguments.peers if name != "nanogpt" or arguments.nanogpt]
    assert arguments.threads == 1 or not arguments.cpu_time, "threads that wait for each other use processor time"
    names = ["ours"] * any(name in GPT for name in peers) + [name for name in peers if name in GPT]
    names += ["ours llama"] * any(name in LLAMA for name in peers) + [name for name in peers if name in LLAMA]
    from accel_pretrain.models.hollow import hollow
    from benchmarks import runs

    load = os.getloadavg()[0]
    members = {name: (name, arguments) for name in (*(names or ["ours", "ours llama"]), "products")}
    answers = runs.in_turns(child, members, arguments.warmup + arguments.rounds)
    rate = PRODUCTS * 2 * SIZE**3 / statistics.median(seconds for _, seconds, _ in answers.pop("products")[arguments.warmup :])
    found = shapes(arguments.shape)
    tokens = found["batch_size"] * found["gpt"].context_length
    print(
        f"\n{arguments.shape}, {arguments.precision}, {'compiled' if arguments.compiled else 'eager'}, "
        f"{arguments.threads} threads, medians of {arguments.rounds} updates in turns; load when it began: {load:.1f}"
    )
    print(f"{'':<12}{'tokens/s':>10}{'quickest':>10}{'ours is':>10}{'peak MB':>9}{'first s':>9}{'share':>7}")
    timed = {name: [seconds for _, seconds, _ in rows[arguments.warmup :]] for name, rows in answers.items()}
    for name, rows in answers.items():
        kind, base = ("llama", "ours llama") if name in ("litgpt", "ours llama") else ("gpt", "ours")
        flops = tokens * hollow(found[kind], found[kind].vocab_size).flops_per_token()
        share = flops / statistics.median(timed[name]) / rate
        ratio = statistics.median(timed[name]) / statistics.median(timed[base])
        print(
            f"{name:<12}{tokens / statistics.median(timed[name]):>10.0f}{tokens / min(timed[name]):>10.0f}{ratio:>9.2f}x"
            f"{rows[-1][2]:>9}{rows[0][1]:>9.1f}{share:>7.0%}"
        )
    print(f"share: of {rate / 1e12:.2f} TFLOP/s, products of {SIZE} x {SIZE} matrices in the same turns")
    parted = check_losses(answers, arguments.precision)
    print("\n".join(["the losses part from ours:", *parted]) if parted else f"losses agree over {COMPARED} updates")
    sys.exit(1 if parted else 0)


if __name__ == "__main__":
    main()
