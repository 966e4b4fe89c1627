"""The one table of peaks; a CPU's is measured once; what is not known is n/a and no number."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from accel_pretrain import hardware, peaks
from accel_pretrain.peaks import kind_of, measured_peak, peak_flops, peak_of
from tests.running import Train, rows


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 494, 67),
        ("NVIDIA H100 PCIe", 756, 378, 51),
        ("NVIDIA H100 NVL", 835, 417, 60),
        ("NVIDIA H200", 989, 494, 67),
        ("NVIDIA GH200 480GB", 989, 494, 67),
        ("NVIDIA B200", 2250, 1125, 75),
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 156, 19.5),
        ("NVIDIA L4", 121, 60, 30.3),
        ("NVIDIA L40S", 362, 183, 91.6),
        ("NVIDIA A10G", 70, 35, None),
        ("NVIDIA GeForce RTX 4090", 165, 82.6, 82.6),
        ("AMD Instinct MI300X", 1307, 654, 163),
        # their names hold another's
        ("NVIDIA L40", None, None, None),
        ("NVIDIA A10", None, None, None),
        ("NVIDIA RTX A1000", None, None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None, None),
        ("NVIDIA GeForce RTX 3090 Ti", None, None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None, None),
        ("Tesla V100-SXM2-16GB", None, None, None),
    ],
)
def test_a_gpu_is_known_or_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, bf16: float | None, tf32: float | None, fp32: float | None
):
    assert [peak_of(name, kind) for kind in ("bf16", "tf32", "fp32")] == [
        None if teraflops is None else pytest.approx(teraflops * 1e12) for teraflops in (bf16, tf32, fp32)
    ]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert peak_flops(torch.device("cuda"), "bf16", tmp_path) == peak_of(name, "bf16")
    assert list(tmp_path.iterdir()) == []  # nothing is measured


def test_the_plan_knows_the_pcie_card_of_a_chip_as_slower(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (80 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 PCIe")
    assert hardware.here(cpu=False).peak_bf16 == 756e12


@pytest.mark.parametrize(
    ("precision", "tf32", "kind"),
    [("bf16", False, "bf16"), ("fp16", True, "bf16"), ("no", True, "tf32"), ("no", False, "fp32")],
)
def test_the_peak_is_that_of_the_precision(precision: str, tf32: bool, kind: str):
    assert kind_of(precision, tf32=tf32) == kind


@pytest.mark.parametrize(
    ("name", "cores", "teraflops"), [("Apple M1 Max", 32, 10.4), ("Apple M2", 10, 3.6), ("Apple M4 Pro", 20, None)]
)
def test_apple_s_are_cores_times_what_one_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, cores: int, teraflops: float | None
):
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: name, raising=False)
    monkeypatch.setattr(torch.backends.mps, "get_core_count", lambda: cores, raising=False)
    found = peak_flops(torch.device("mps"), "fp32", tmp_path)
    assert found == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_a_cpu_is_measured_once_for_each_number_of_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    measured: list[torch.dtype] = []
    monkeypatch.setattr(peaks, "_products_per_second", lambda dtype: measured.append(dtype) or 1e9 * len(measured))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    torch.set_num_threads(1)
    assert [measured_peak(kind, tmp_path) for kind in ("fp32", "bf16", "fp32", "bf16")] == [1e9, 2e9, 1e9, 2e9]
    torch.set_num_threads(2)
    assert measured_peak("fp32", tmp_path) == 3e9
    assert measured == [torch.float32, torch.bfloat16, torch.float32]
    (tmp_path / "peaks.json").write_text("{ torn")
    assert measured_peak("fp32", tmp_path) == 4e9
    assert len(json.loads((tmp_path / "peaks.json").read_text())) == 1
    assert measured_peak("fp32", tmp_path / "peaks.json" / "no folder") == 5e9  # where nothing can be kept
    assert measured_peak("fp32", None) == 6e9  # or nobody has a home


def test_what_was_measured_on_a_busy_machine_is_measured_again_on_one_that_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    load, found = [0.0], iter([1e9, 3e9, 9e9, 2e9])
    monkeypatch.setattr(os, "getloadavg", lambda: (load[0] * (os.cpu_count() or 1), 0.0, 0.0))
    monkeypatch.setattr(peaks, "_products_per_second", lambda dtype: next(found))
    given: list[float] = []
    for load[0] in (1.5, 1.5, 0.5, 0.2):
        given.append(measured_peak("fp32", tmp_path))
    assert given == [1e9, 1e9, 3e9, 3e9]
    [key] = json.loads((tmp_path / "peaks.json").read_text())
    (tmp_path / "peaks.json").write_text(json.dumps({key: 1e9}))  # of before loads were told
    assert measured_peak("fp32", tmp_path) == 9e9
    (tmp_path / "peaks.json").write_text(json.dumps({key: {"flops": 5e9, "load": 2.0}}))
    assert measured_peak("fp32", tmp_path) == 5e9  # the larger one, though the machine was busy


def test_a_run_on_a_cpu_has_a_share_of_a_measured_peak(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(peaks, "_SIDE", 256)
    monkeypatch.setattr(peaks, "_SECONDS", 0.01)
    assert run_train(tmp_path / "run", "--max_iters", "2") == 0
    [key] = (known := json.loads((tmp_path / "cache" / "accel_pretrain" / "peaks.json").read_text()))
    assert re.fullmatch(r".+ \| 1 threads \| torch .+ \| fp32", key)
    assert known[key]["flops"] > 1e8
    plan = json.loads((tmp_path / "run" / "starts.jsonl").read_text())["plan"]
    first = rows(tmp_path / "run")[0]
    expected = first["train/tokens_per_sec"] * plan["flops_per_token"] / known[key]["flops"]
    assert 0 < first["train/mfu"] == pytest.approx(expected)
    assert re.search(r"Iter      1 \| .* \| MFU: \d+\.\d%", capsys.readouterr().out)


def test_an_unknown_device_has_no_share(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("accel_pretrain.train.peak_for", lambda accelerator, training: None)
    assert run_train(tmp_path, "--max_iters", "1") == 0
    assert "train/mfu" not in rows(tmp_path)[0]
    assert re.search(r"Iter      1 \| .* \| MFU: n/a", capsys.readouterr().out)
