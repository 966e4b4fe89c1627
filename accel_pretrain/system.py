"""How busy the machine is: processor and memory from Linux's ``/proc``, an NVIDIA GPU from NVML if ``nvidia-ml-py`` is there.

What a system does not tell is left out. A reading takes some 0.1 ms, asks the device for nothing, and is made where metrics are
logged.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path
from typing import Any

import torch

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class SystemMeter:
    """Reads the machine that this process runs on, and the GPU that it uses."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = _nvml_of(device) if device is not None and device.type == "cuda" else None
        self._before = _cpu_times()

    def read(self) -> dict[str, float]:
        """``system/...``: percent of all cores since the last reading, percent of memory in use, this process's share in GB.

        Of a GPU: percent of the time in which it computed, percent of its memory, watts, degrees Celsius.
        """
        found: dict[str, float] = {}
        now = _cpu_times()
        if now is not None and self._before is not None and now[1] > self._before[1]:
            found["system/cpu_percent"] = 100 * (now[0] - self._before[0]) / (now[1] - self._before[1])
        self._before = now
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            found |= _memory()
        if self._gpu is not None:
            found |= self._gpu.read()
        return found


def _cpu_times() -> tuple[int, int] | None:
    """Ticks of all cores that were spent working, and all ticks."""
    try:
        with open("/proc/stat", "rb") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]  # guests are counted in the first two already
    except (OSError, ValueError):
        return None
    idle = sum(ticks[3:5])  # waiting for a disk is idle too
    return sum(ticks) - idle, sum(ticks)


def _memory() -> dict[str, float]:
    with open("/proc/meminfo", "rb") as file:
        kilobytes = dict(line.split(b":") for line in file.read(200).splitlines()[:3])
    total, available = (int(kilobytes[name].split()[0]) for name in (b"MemTotal", b"MemAvailable"))
    resident = int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE
    return {"system/memory_percent": 100 * (1 - available / total), "system/process_memory_gb": resident / 1e9}


class _Gpu:
    """One device of NVML."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def read(self) -> dict[str, float]:
        nvml, handle, found = self._nvml, self._handle, dict[str, float]()
        with contextlib.suppress(nvml.NVMLError):
            found["system/gpu_percent"] = float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        with contextlib.suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            found["system/gpu_memory_percent"] = 100 * memory.used / memory.total
        with contextlib.suppress(nvml.NVMLError):
            found["system/gpu_watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        with contextlib.suppress(nvml.NVMLError):
            found["system/gpu_celsius"] = float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        return found


def _nvml_of(device: torch.device) -> _Gpu | None:
    """The device in NVML, which knows nothing of CUDA_VISIBLE_DEVICES: found by its identity."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return _Gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}"))
    except Exception:  # not installed, another maker's GPU, a part of one (MIG), a driver that does not answer
        return None
