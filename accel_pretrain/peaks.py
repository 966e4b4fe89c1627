"""What a device can do at most, in FLOP/s: the one table of data sheets, and for a CPU a measurement that is kept.

What is not known is None, and is shown as n/a: a guess would make the utilisation a lie.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from accel_pretrain.files import write_whole

Kind = Literal["bf16", "tf32", "fp32"]
T = 1e12
_SIDE, _LEAST, _SECONDS = 2048, 3, 0.4  # of the measured products: their side, how many at least, and for how long
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peak:
    """Dense matrix products without sparsity, FLOP/s. ``bf16`` is fp16's too, summed in float32."""

    bf16: float
    tf32: float | None
    fp32: float | None


# By what a device's name holds; the first that fits counts. Makers' data sheets: NVIDIA's of HGX B200, H200, GH200, H100, A100,
# L40S, L4, A10G (half of what they print "with sparsity"), its Ada and GA102 white papers for the 4090 and 3090 (tensor cores
# with sums in float32); AMD's of the Instinct MI300X.
PEAKS = {
    "B200": Peak(2250 * T, 1125 * T, 75 * T),
    "H200 NVL": Peak(835 * T, 417 * T, 60 * T),
    "H200": Peak(989 * T, 494 * T, 67 * T),
    "GH200": Peak(989 * T, 494 * T, 67 * T),
    "H100 NVL": Peak(835 * T, 417 * T, 60 * T),
    "H100 PCIe": Peak(756 * T, 378 * T, 51 * T),
    "H100": Peak(989 * T, 494 * T, 67 * T),
    "A100": Peak(312 * T, 156 * T, 19.5 * T),
    "L40S": Peak(362 * T, 183 * T, 91.6 * T),
    "L4": Peak(121 * T, 60 * T, 30.3 * T),
    "A10G": Peak(70 * T, 35 * T, None),
    "RTX 4090": Peak(165 * T, 82.6 * T, 82.6 * T),
    "RTX 3090": Peak(71 * T, 35.6 * T, 35.6 * T),
    "MI300X": Peak(1307 * T, 654 * T, 163 * T),
}
_OTHER_CHIP = re.compile(r"\b(Laptop|Max-Q|MIG|Ti|D)\b")  # shares its name with a chip above, and not its speed
# Per core of the GPU: Apple's announcements of the M1 (2.6 TFLOPS, 8 cores) and M2 (3.6, 10 cores). Of later ones Apple tells
# nothing. 16 bits are no faster there than 32.
_APPLE = {"M1": 2.6 * T / 8, "M2": 3.6 * T / 10}


def kind_of(precision: str, *, tf32: bool) -> Kind:
    """Which peak counts for a run: ``precision`` in Accelerate's words, ``tf32`` whether float32 may be rounded to that."""
    return "bf16" if precision in ("bf16", "fp16") else "tf32" if tf32 else "fp32"


def peak_flops(device: torch.device, kind: Kind, cache: Path | None) -> float | None:
    """The device's peak, or None where it is not known. A CPU's is measured once, and remembered in the folder ``cache``."""
    if device.type == "cuda":
        return peak_of(torch.cuda.get_device_name(device), kind)
    if device.type == "mps":
        return _of_apple()
    return measured_peak("bf16" if kind == "bf16" else "fp32", cache) if device.type == "cpu" else None


def peak_of(name: str, kind: Kind) -> float | None:
    """Of a GPU by its name."""
    if _OTHER_CHIP.search(name):
        return None
    return next((getattr(peak, kind) for known, peak in PEAKS.items() if re.search(rf"\b{known}\b", name)), None)


def _of_apple() -> float | None:
    """Cores times what one of them does; both as macOS and PyTorch tell them."""
    backend = torch.backends.mps
    if not (hasattr(backend, "get_core_count") and hasattr(backend, "get_name")):
        return None  # an older PyTorch
    found = re.search(r"\bM\d+\b", backend.get_name())
    each = _APPLE.get(found.group()) if found else None
    return each * backend.get_core_count() if each else None


# ------------------------------------------------------------------------------------------------------------------ CPU


def processor() -> str:
    """The CPU's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.machine()


def measured_peak(kind: Kind, cache: Path | None) -> float:
    """What large products reach on this CPU with the threads that PyTorch has now: from ``cache``, else measured and put there.

    It is measured anew (half a second) for another processor, number of threads or PyTorch. What is measured while the machine
    is busy is too little: it counts until a run finds it less busy, and measures again. Without ``cache``, nothing is kept.
    """
    key = f"{processor()} | {torch.get_num_threads()} threads | torch {torch.__version__} | {kind}"
    path = None if cache is None else cache / "peaks.json"
    before, load_before = _entry(_remembered(path).get(key))
    load = _load()
    if before and (load_before <= 1 or load > 1):
        return before
    peak = max(before, _products_per_second(torch.bfloat16 if kind == "bf16" else torch.float32))
    if path is None:
        return peak
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"flops": peak, "load": round(load, 2)}
        write_whole(path, json.dumps({**_remembered(path), key: entry}, indent=2).encode())
    except OSError as error:  # then the next run measures again
        _log.debug("%s could not be written: %s", path, error)
    return peak


def _load() -> float:
    """Of the last minute, processes that wanted to run per core; 0 where nobody can say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (OSError, AttributeError):  # Windows has none
        return 0.0


def _entry(found: object) -> tuple[float, float]:
    """FLOP/s of an entry of the file, 0 if it has none, and the load at which they were measured."""
    flops, load = (found.get("flops"), found.get("load")) if isinstance(found, dict) else (found, math.inf)
    if not (isinstance(flops, int | float) and isinstance(load, int | float) and flops > 0):
        return 0.0, 0.0
    return float(flops), float(load)


def _remembered(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _products_per_second(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some products of two square matrices."""
    generator = torch.Generator().manual_seed(0)  # of its own: the run's random state is not touched
    a, b = (torch.randn(_SIDE, _SIDE, generator=generator).to(dtype) for _ in range(2))
    _ = a @ b
    times: list[float] = []
    while len(times) < _LEAST or sum(times) < _SECONDS:
        begin = time.perf_counter()
        _ = a @ b
        times.append(time.perf_counter() - begin)
    return 2 * _SIDE**3 / min(times)
