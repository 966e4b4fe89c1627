"""How long an update takes on many devices: computing, what the devices tell each other meanwhile, and what of that shows.

The model, per device and update, with n devices, P parameters, c bytes per activation (2 under bf16), k micro-steps:

| | ddp | zero2 | fsdp2 |
|---|---|---|---|
| gradients, float32 | all-reduce 2 (n-1)/n 4P | reduce-scatter (n-1)/n 4P | reduce-scatter k (n-1)/n 4P |
| weights | - | all-gather (n-1)/n cP | all-gather 2k (n-1)/n cP |
| hidden behind | the last backward pass | the first forward, the last backward pass | the pass that it belongs to |

What is outside the blocks is gathered once per forward pass, and in float32 (see :mod:`accel_pretrain.parallel`).
(Ring algorithms: Patarasuk & Yuan 2009; ZeRO: Rajbhandari et al. 2020, section 7; ddp and zero2 accumulate.)
A message also costs a latency per hop of a tree. The slowest link on the way counts: within one node the link, else the
network. Each of the constants below is an assumption that stands here and nowhere else. ``python -m benchmarks.plan
--processes`` compares with measured runs of 1, 2 and 4 processes over gloo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from accel_pretrain.estimates import FP32, Workload, block_parameters, flops_per_token
from accel_pretrain.hardware import Machine

LINK_SHARE = 0.8  # of a link's nominal rate that collectives reach; not measured here
LATENCY = 10e-6  # seconds per hop of a collective, launch included; not measured here
BUCKET_BYTES = 25 << 20  # DDP's default bucket_cap_mb
BACKWARD_SHARE = 2 / 3  # of a micro-step's operations
EAGER_SHARE = 1 / 1.85  # of the compiled speed: nanoGPT's README, 250 against 135 ms per update on an A100


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one update on one device, and bytes that it sends. ``exposed`` is what of the communication shows."""

    compute: float
    communication: float
    exposed: float
    optimizer: float
    sent: dict[str, int]

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.optimizer

    @property
    def efficiency(self) -> float:
        """Of the speed of devices that need not talk."""
        return (self.compute + self.optimizer) / self.seconds


def sent_bytes(load: Workload) -> dict[str, int]:
    """Bytes that each device sends per update, by what they are."""
    n = load.world_size
    if n == 1:
        return {}
    part, grads = (n - 1) / n, FP32 * load.parameters
    if load.strategy == "ddp":
        return {"gradients (all-reduce)": round(2 * part * grads)}
    times, passes = (load.accumulation, 2) if load.strategy == "fsdp2" else (1, 1)
    outside = load.parameters - block_parameters(load)
    weights = passes * load.width * block_parameters(load) + FP32 * outside
    return {
        "weights (all-gather)": round(times * part * weights),
        "gradients (reduce-scatter)": round(times * part * grads),
    }


def achievable(load: Workload, machine: Machine) -> float | None:
    """FLOP/s that training can be expected to reach on one device; None where nobody has published a run."""
    if machine.peak_bf16 is None or machine.share is None or load.width == FP32:
        return None
    return machine.peak_bf16 * machine.share * (1 if load.compiled else EAGER_SHARE)


def modelled_micro_step(load: Workload, machine: Machine) -> float | None:
    """Seconds of forward and backward over one micro-batch, from the data sheet."""
    rate = achievable(load, machine)
    return None if rate is None else load.tokens * sum(flops_per_token(load.model, load.vocab_size).values()) / rate


def optimizer_seconds(load: Workload, machine: Machine) -> float | None:
    """Clipping and the update read and write every number of the state a few times: bound by memory bandwidth.

    Muon and GaLore multiply matrices as well, as fast as a compiled model does.
    """
    if machine.memory_bandwidth is None:
        return None
    touched = FP32 * (2 + 3 + 2 * load.moments)  # norm and scaling of the gradient; weight, gradient, moments; written back
    shard = 1 if load.strategy == "ddp" else load.world_size
    rate = achievable(replace(load, compiled=True), machine)
    products = 0.0 if rate is None else load.update_flops / rate
    return touched * load.parameters / shard / machine.memory_bandwidth + products


def step_time(load: Workload, machine: Machine, micro_step: float, optimizer: float) -> StepTime | None:
    """One update of ``world_size`` devices, given what computing takes; None where the links are not known."""
    compute = load.accumulation * micro_step
    n, sent = load.world_size, sent_bytes(load)
    if n == 1:
        return StepTime(compute=compute, communication=0.0, exposed=0.0, optimizer=optimizer, sent=sent)
    rate = bandwidth(machine, n)
    if rate is None:
        return None
    hops = 2 * math.ceil(math.log2(n)) * LATENCY
    if load.strategy != "ddp":
        layers = load.model.num_layers
        times, passes = (load.accumulation, 2) if load.strategy == "fsdp2" else (1, 1)
        gather = sent["weights (all-gather)"] / (times * passes) / rate + layers * hops / 2
        scatter = sent["gradients (reduce-scatter)"] / times / rate + layers * hops / 2
        forward, backward = (1 - BACKWARD_SHARE) * micro_step, BACKWARD_SHARE * micro_step
        first = (gather + scatter) / (layers + 1)  # nothing hides the first block's weights and the last one's gradients
        in_backward = (passes - 1) * gather + scatter
        exposed = times * (max(0.0, gather - forward) + max(0.0, in_backward - backward)) + first
        total = times * (passes * gather + scatter)
        return StepTime(compute=compute, communication=total, exposed=exposed, optimizer=optimizer, sent=sent)
    buckets = max(1, math.ceil(FP32 * load.parameters / BUCKET_BYTES))
    reduce = sent["gradients (all-reduce)"] / rate + buckets * hops
    exposed = max(reduce / buckets, reduce - BACKWARD_SHARE * micro_step)
    return StepTime(compute=compute, communication=reduce, exposed=exposed, optimizer=optimizer, sent=sent)


def bandwidth(machine: Machine, world_size: int) -> float | None:
    """Bytes per second and device that collectives over so many devices reach."""
    nominal = machine.link
    if world_size > machine.per_node:
        nominal = None if machine.network is None or nominal is None else min(nominal, machine.network)
    return None if nominal is None else LINK_SHARE * nominal
