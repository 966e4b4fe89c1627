"""Machines: what is at hand, and what data sheets say about those that are not.

What is not known is None, and whoever needs it says so: a guess would look like a fact.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from accel_pretrain.peaks import PEAKS, peak_of

GB = 10**9
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One device, and how it talks to others. Rates per device: FLOP/s, and bytes per second in one direction."""

    name: str
    device: str  # cpu, cuda or mps
    memory: int | None = None  # bytes that a run can have
    host: int | None = None  # bytes of main memory that are free, where the device is here
    peak_bf16: float | None = None  # dense, without sparsity
    share: float | None = None  # of that peak that a compiled Transformer in bf16 was seen to reach
    memory_bandwidth: float | None = None
    link: float | None = None  # to the other devices of its node
    network: float | None = None  # to other nodes
    per_node: int = 8
    has_bf16: bool = True

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


# Memory and memory bandwidth: the makers' data sheets (NVIDIA H100, H200, A100 80GB and L4 data sheets; NVIDIA Ada GPU
# architecture white paper, table 2, for the 4090; AMD Instinct MI300X data sheet). Decimal gigabytes, as printed there.
#   link     NVLink 4: 900 GB/s both ways (H100, H200), NVLink 3: 600 (A100); PCIe 4.0 x16: 32 GB/s one way (L4, 4090);
#            MI300X: seven Infinity Fabric links of 64 GB/s one way
#   network  one 400 Gb/s adapter per GPU (NVIDIA DGX H100 and H200 data sheets; Azure ND MI300X v5), 200 Gb/s (DGX A100)
#   share    published training runs: 33-39 % torchtitan Llama 3 8B, 42-46 % llm-foundry 1B and 7B, 41-46 % nanochat (8 H100);
#            43-51 % llm-foundry 125M to 350M (8 A100 80GB). H200: the H100's chip. None where no run was found.
HARDWARE = {
    "h100": Machine(
        name="H100 SXM", device="cuda", memory=80 * GB, peak_bf16=PEAKS["H100"].bf16, share=0.40,
        memory_bandwidth=3350 * GB, link=450 * GB, network=50 * GB,
    ),
    "h200": Machine(
        name="H200 SXM", device="cuda", memory=141 * GB, peak_bf16=PEAKS["H200"].bf16, share=0.40,
        memory_bandwidth=4800 * GB, link=450 * GB, network=50 * GB,
    ),
    "a100": Machine(
        name="A100 SXM 80GB", device="cuda", memory=80 * GB, peak_bf16=PEAKS["A100"].bf16, share=0.45,
        memory_bandwidth=2039 * GB, link=300 * GB, network=25 * GB,
    ),
    "l4": Machine(
        name="L4", device="cuda", memory=24 * GB, peak_bf16=PEAKS["L4"].bf16, memory_bandwidth=300 * GB, link=32 * GB
    ),
    "4090": Machine(
        name="RTX 4090", device="cuda", memory=24 * GB, peak_bf16=PEAKS["RTX 4090"].bf16, memory_bandwidth=1008 * GB,
        link=32 * GB,
    ),
    "mi300x": Machine(
        name="MI300X", device="cuda", memory=192 * GB, peak_bf16=PEAKS["MI300X"].bf16, memory_bandwidth=5300 * GB,
        link=448 * GB, network=50 * GB,
    ),
}  # fmt: skip
# The context of CUDA, its libraries and NCCL's buffers, which PyTorch's allocator does not count: an allowance, not measured.
CONTEXT_BYTES = GB


def here(cpu: bool, threads: int | None = None) -> Machine:
    """The device that a run would use on this machine, with the memory that is free now; ``threads`` is for its name."""
    if not cpu and torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()  # what this process has already counts as free
        name = torch.cuda.get_device_name()
        known = next((machine for key, machine in HARDWARE.items() if re.search(rf"\b{key}\b", name, re.IGNORECASE)), None)
        own = Machine(name=name, device="cuda", memory=free, host=free_memory(), has_bf16=torch.cuda.is_bf16_supported())
        peak = peak_of(name, "bf16")  # the PCIe card of a chip is slower
        return own if known is None else replace(known, name=name, memory=free, host=own.host, peak_bf16=peak)
    if not cpu and torch.backends.mps.is_available():
        return Machine(name="Apple GPU", device="mps", memory=free_memory())
    return Machine(name=f"this CPU, {threads or torch.get_num_threads()} threads", device="cpu", memory=free_memory())


def free_memory() -> int | None:
    """Bytes of main memory that a new process can have: what is available, and what a container's limit leaves of it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None  # not Linux
    for path in map(Path, _CGROUP_LIMITS):
        try:
            limit, used = int(path.read_text()), int(path.with_name(_usage_of(path)).read_text())
            free = min(free, max(0, limit - used))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return free


def _usage_of(limit: Path) -> str:
    return "memory.current" if limit.name == "memory.max" else "memory.usage_in_bytes"


def free_disk(folder: Path) -> int | None:
    """Bytes that can be written below ``folder``, which need not exist yet; None where that cannot be asked."""
    there = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), None)
    try:
        return shutil.disk_usage(there).free if there else None
    except OSError:
        return None


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
