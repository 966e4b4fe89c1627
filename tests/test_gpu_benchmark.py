"""The whole of benchmarks/gpu.py on a CPU, small: that it runs, and that its checks can fail. Its figures mean nothing here."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from accel_pretrain.models import head_loss
from benchmarks import gpu
from tests.running import REPO, environment


def test_the_program_runs_on_a_cpu():
    words = ["--device", "cpu", "--tiny", "--shapes", "124m", "--seconds", "0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    parts = {line.split()[0] for line in done.stdout.splitlines()[1:-1]}
    assert parts == {"gemm", "attention", "check", "sync", "speed"}
    assert "FAILED" not in done.stdout
    assert "tokens/s, " in done.stdout


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
