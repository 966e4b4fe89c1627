"""The whole of benchmarks/gpu.py on a CPU, small: that it runs, and that its checks can fail. Its figures mean nothing here."""

from __future__ import annotations

import sys

import pytest
import torch

from accel_pretrain.models import head_loss
from benchmarks import gpu


def test_the_program_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    words = ["--device", "cpu", "--tiny", "--shapes", "124m", "--seconds", "0.1"]
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    out = capsys.readouterr().out
    assert end.value.code == 0, out
    assert {line.split()[0] for line in out.splitlines()[1:-1]} == {"gemm", "attention", "check", "sync", "speed"}
    assert "FAILED" not in out
    assert "tokens/s, " in out


def test_control_a_wrong_gradient_fails_its_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert gpu.checks(torch.device("cpu"), compiled=False, tiny=True)
    right = head_loss._nats_and_gradient

    def wrong(*words: object) -> tuple[torch.Tensor, torch.Tensor]:
        nats, gradient = right(*words)  # type: ignore[arg-type]
        return nats, 1.0001 * gradient

    monkeypatch.setattr(head_loss, "_nats_and_gradient", wrong)
    capsys.readouterr()
    assert not gpu.checks(torch.device("cpu"), compiled=False, tiny=True)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "FAILED" in line] == [
        "check      chunked loss"
    ]
