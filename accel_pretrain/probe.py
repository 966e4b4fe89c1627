"""How fast this machine trains a given model: a second or so of real updates, timed.

The real model runs on made-up tokens: forward, backward, clipping, optimizer, as in :func:`accel_pretrain.loop.train_step`, but
without data, processes or files. Where a whole micro-batch would take too long, fewer sequences and fewer blocks run, and their
time is extended along a straight line: time is proportional to sequences, and each block takes as long as the next of its kind.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from accel_pretrain.estimates import Workload, flops_per_token, memory
from accel_pretrain.models import Transformer
from accel_pretrain.optim import Optimizer
from accel_pretrain.rules import begin_update, settle_in

Clock = Callable[[], float]
_GEMM = 1024  # side of the square matrices whose product says how much will fit into the time
_LEAST = 3  # timed rounds, even if they take longer than wished


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the probe found: seconds of one micro-step and of clipping plus optimizer, and how much of the model ran."""

    micro_step: float
    optimizer: float
    sequences: int
    layers: int
    rounds: int

    def seconds_per_update(self, accumulation: int) -> float:
        return accumulation * self.micro_step + self.optimizer


def probe(
    load: Workload,
    optimizer: Optimizer,
    device: torch.device,
    *,
    seconds: float = 1.0,
    free: int | None = None,
    clock: Clock = time.perf_counter,
) -> Speed | str:
    """Time ``load`` on ``device`` for about so many seconds, or say in a few words why that cannot be done.

    ``free``: bytes that may be used; more than that is not tried. ``clock`` is another than the wall's on a crowded machine.
    """
    wanted = replace(load, accumulation=1, world_size=1, compiled=False)
    full = sum(flops_per_token(load.model, load.vocab_size).values()) * load.tokens
    affordable = 0.25 * seconds * _gemm_rate(device, load.precision, clock)
    period = len(load.model.window_pattern) if load.model.sliding_window is not None else 1
    period = max(period, 2 if load.model.value_embeddings else 1)
    sequences = max(1, min(load.batch_size, round(load.batch_size * affordable / full)))
    whole = full * sequences / load.batch_size <= 4 * affordable or load.model.num_layers <= 2 * period
    depths = [load.model.num_layers] if whole else [period, 2 * period]
    shapes = [
        replace(wanted, batch_size=sequences, model=replace(load.model, num_layers=depth, vocab_size=load.vocab_size))
        for depth in depths
    ]
    needed = memory(shapes[-1]).total
    if free is not None and needed > 0.9 * free:
        return f"even {depths[-1]} of {load.model.num_layers} layers on one sequence need {needed / 1e9:.1f} GB here"
    state = torch.random.get_rng_state()
    try:
        found = [_measure(shape, optimizer, device, seconds / len(shapes), clock) for shape in shapes]
    except torch.OutOfMemoryError:
        return "the device has too little memory"
    finally:
        torch.random.set_rng_state(state)
    (micro, update, rounds), deepest = found[0], shapes[-1]
    if len(found) == 2:
        micro += (found[1][0] - micro) * (load.model.num_layers - depths[0]) / (depths[1] - depths[0])
        update, rounds = found[1][1], rounds + found[1][2]
    return Speed(
        micro_step=micro * load.batch_size / sequences, optimizer=update * load.parameters / deepest.parameters,
        sequences=sequences, layers=depths[-1], rounds=rounds,
    )  # fmt: skip


def _gemm_rate(device: torch.device, precision: str, clock: Clock) -> float:
    """FLOP/s of a product of two square matrices: how much to try, nothing else follows from it."""
    a = torch.ones(_GEMM, _GEMM, device=device, dtype=torch.float32 if precision == "no" else torch.bfloat16)
    once = timer(device, lambda: a @ a, clock)
    once()
    return 2 * _GEMM**3 / min(once() for _ in range(2))


def _measure(
    load: Workload, optimizer: Optimizer, device: torch.device, seconds: float, clock: Clock
) -> tuple[float, float, int]:
    """Median seconds of a micro-step and of the rest of an update, and how many were timed."""
    with torch.device(device):
        model = Transformer(load.model, load.vocab_size).train()
        ids_BS = torch.randint(load.vocab_size, (load.batch_size, load.model.context_length + 1))
        weights_B = torch.full((load.batch_size,), 1.0 / load.tokens)
    built, parameters = optimizer.build(model), list(model.parameters())
    settle_in(built, load.precision, 1)
    low = torch.float16 if load.precision == "fp16" else torch.bfloat16

    def micro_step() -> None:
        with torch.autocast(device.type, dtype=low, enabled=load.precision != "no"):
            nats_B = model(ids_BS[:, :-1], ids_BS[:, 1:])
        nats_B.backward(gradient=weights_B)

    def update() -> None:
        begin_update(built, ready=lambda: None)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        built.step()
        built.zero_grad(set_to_none=True)

    micro_timer, update_timer = timer(device, micro_step, clock), timer(device, update, clock)
    _ = micro_timer(), update_timer()  # the first makes the optimizer's state and loads kernels
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < _LEAST or (time.perf_counter() < end and len(times) < 1000):
        times.append((micro_timer(), update_timer()))
    return statistics.median(micro for micro, _ in times), statistics.median(rest for _, rest in times), len(times)


def timer(device: torch.device, work: Callable[[], object], clock: Clock) -> Callable[[], float]:
    """``work`` as a function that says how many seconds it took, until the device is done."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    def timed() -> float:
        wait()
        begin = clock()
        work()
        wait()
        return clock() - begin

    return timed
