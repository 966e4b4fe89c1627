"""Outside log steps nothing waits for the device, and what is read of the machine is what the machine says."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accel_pretrain import loop
from accel_pretrain.run import TrainingRun
from accel_pretrain.system import SystemMeter, _Gpu
from tests.running import Train, rows

# What makes the processor wait until a device has computed a value: .item(), float(), bool(), `if tensor`, equal, nonzero.
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
}


class Waits(TorchDispatchMode):
    """Counts them by the update in which they happen."""

    def __init__(self) -> None:
        super().__init__()
        self.update, self.counts = 0, Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[self.update] += func in WAITING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("interval", [4, 1])
def test_only_log_steps_wait_for_the_device(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int
) -> None:
    """With an interval of 1, the control, every update does."""
    waits, step, due = Waits(), loop.train_step, loop.due

    def train_step(run: TrainingRun, state: Any) -> Any:
        waits.update = state.step + 1
        return step(run, state)

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(loop, "finish", lambda run, state: None)
    assert due(12, 4)
    with waits:
        words = (
            "--max_iters",
            "12",
            "--log_interval",
            str(interval),
            "--grad_clip",
            "1.0",
            "--gradient_accumulation_steps",
            "2",
        )
        assert run_train(tmp_path, *words) == 0
    waited = sorted(update for update, count in waits.counts.items() if count and update > 0)
    assert waited == list(range(interval, 13, interval))
    assert [row["step"] for row in rows(tmp_path)] == waited


def test_the_machine_is_read_at_log_steps(run_train: Train, tmp_path: Path) -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("Linux tells it in /proc")
    assert run_train(tmp_path, "--max_iters", "3") == 0
    [first, *_, last] = rows(tmp_path)
    assert 0 < first["system/memory_percent"] < 100
    assert 0.05 < first["system/process_memory_gb"] < 100
    assert 0 <= first.get("system/cpu_percent", 0) <= 100  # ticks of 10 ms: there may be none between two readings
    assert not any(key.startswith("system/") for key in last)  # the row of an evaluation


def test_a_busy_core_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("Linux tells it in /proc")
    meter, end = SystemMeter(), time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert 0 < meter.read()["system/cpu_percent"] <= 100
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(OSError()))
    assert SystemMeter().read() == {}  # a system that tells nothing


def test_a_gpu_that_tells_only_some_things() -> None:
    class Error(Exception):
        pass

    class Nvml:
        NVMLError, NVML_TEMPERATURE_GPU = Error, 0

        @staticmethod
        def nvmlDeviceGetUtilizationRates(handle: object) -> Any:
            return type("Rates", (), {"gpu": 87})

        @staticmethod
        def nvmlDeviceGetMemoryInfo(handle: object) -> Any:
            return type("Memory", (), {"used": 20, "total": 80})

        @staticmethod
        def nvmlDeviceGetPowerUsage(handle: object) -> int:
            raise Error

        @staticmethod
        def nvmlDeviceGetTemperature(handle: object, sensor: int) -> int:
            return 61

    found = _Gpu(Nvml, None).read()
    assert found == {"system/gpu_percent": 87.0, "system/gpu_memory_percent": 25.0, "system/gpu_celsius": 61.0}
