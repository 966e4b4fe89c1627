"""AdamW without a schedule: its three sequences by hand, what an update that is not made leaves, and runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from accel_pretrain import loop
from accel_pretrain.optim import AdamWScheduleFree
from accel_pretrain.rules import begin_update
from accel_pretrain.run import TrainingRun
from accel_pretrain.schedule_free import ScheduleFree
from accel_pretrain.stopping import StopSignal
from tests.running import Train, assert_same_bits, begun_by_two, losses, newest

WORDS = ("--optimizer.name", "schedule_free", "--schedule.name", "constant")
TARGET = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


class Quadratic(nn.Module):
    """Its gradient depends on where it is taken, and is ten times as steep along the last column as along the first."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self) -> torch.Tensor:
        return ((self.matrix - TARGET).square() * torch.logspace(0, 1, 4)).sum()


def built(module: Quadratic) -> ScheduleFree:
    found = AdamWScheduleFree(lr=0.02, weight_decay=0.3, beta1=0.8, beta2=0.95).build(module)
    assert isinstance(found, ScheduleFree)
    return found


def update(module: Quadratic, optimizer: ScheduleFree, lr: float, *, begin: bool = True) -> None:
    optimizer.param_groups[0]["lr"] = lr
    if begin:
        begin_update(optimizer, ready=lambda: None)
    module().backward()
    optimizer.step()
    optimizer.zero_grad()


def by_hand(rates: list[float], beta1: float = 0.8, beta2: float = 0.95, decay: float = 0.3) -> np.ndarray:
    """The algorithm in float64, written from the paper."""
    x = Quadratic().matrix.detach().double().numpy()
    z, v, total, steep = x.copy(), np.zeros_like(x), 0.0, np.logspace(0, 1, 4)
    for t, rate in enumerate(rates, start=1):
        y = (1 - beta1) * z + beta1 * x
        g = 2 * (y - TARGET.double().numpy()) * steep
        v = beta2 * v + (1 - beta2) * g * g
        z = z - rate * (g / (np.sqrt(v / (1 - beta2**t)) + 1e-8) + decay * y)
        total += rate**2
        x = x + rate**2 / total * (z - x)
    return x


def test_it_follows_its_algorithm() -> None:
    rates = [0.01, 0.02, *[0.03] * 20]  # with a warm-up
    module = Quadratic()
    optimizer = built(module)
    for rate in rates:
        update(module, optimizer, rate)
    ours = module.matrix.detach().double().numpy()
    np.testing.assert_allclose(ours, by_hand(rates), rtol=2e-5, atol=1e-6)
    for control in (by_hand(rates, beta1=1.0), by_hand(rates, beta1=0.0), by_hand(rates[1:])):
        assert np.abs(control - ours).max() > 1e-3


def test_gradients_are_taken_between_and_weights_come_back() -> None:
    module = Quadratic()
    optimizer = built(module)
    for _ in range(3):
        update(module, optimizer, 0.05)
    average, fast = module.matrix.detach().clone(), optimizer.state[module.matrix]["fast"].clone()
    begin_update(optimizer, ready=lambda: None)
    assert torch.allclose(module.matrix, 0.8 * average + 0.2 * fast)
    assert not torch.equal(module.matrix, average)
    module().backward()
    optimizer.zero_grad()  # dropped
    assert torch.equal(module.matrix, average)
    assert module.matrix.grad is None
    # Control: who takes gradients at the average ends elsewhere.
    twin = Quadratic()
    other = built(twin)
    for _ in range(3):
        update(twin, other, 0.05, begin=False)
    assert not torch.allclose(twin.matrix, average)


def test_an_update_that_is_not_finite_changes_no_bit() -> None:
    """As a GPU does it, where nobody asks for the number: ``found_inf`` is known on the device alone."""
    module = Quadratic()
    optimizer = built(module)
    for updates in range(3):
        before = [module.matrix.detach().clone(), *(own.clone() for own in optimizer.state[module.matrix].values())]
        begin_update(optimizer, ready=lambda: None)
        module.matrix.grad = torch.full_like(module.matrix, math.nan)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        optimizer.zero_grad()
        after = [module.matrix.detach(), *optimizer.state[module.matrix].values()]
        assert [torch.equal(one, other) for one, other in zip(before, after, strict=False)] == [True] * len(before)
        optimizer.found_inf = torch.zeros(())
        update(module, optimizer, 0.02)
        assert not torch.equal(module.matrix, before[0])
        assert optimizer.state[module.matrix]["step"] == updates + 1


def test_a_dropped_update_leaves_the_bits_and_a_resumed_run_makes_them(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_train(tmp_path / "whole", *WORDS, "--max_iters", "6") == 0
    drops = StopSignal.drops_update
    asked: list[int] = []

    def in_the_fourth(self: StopSignal, micro_step: int, micro_steps: int) -> bool:
        asked.append(micro_step)
        return len(asked) == 4 or drops(self, micro_step, micro_steps)

    monkeypatch.setattr(StopSignal, "drops_update", in_the_fourth)
    assert run_train(tmp_path / "parts", *WORDS, "--max_iters", "6") == 0  # it is stopped, as far as the loop is concerned
    monkeypatch.undo()
    assert newest(tmp_path / "parts").name == "checkpoint_00000003"
    assert run_train(tmp_path / "parts", *WORDS, "--max_iters", "6") == 0
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


def test_a_checkpoint_in_the_making_has_no_weights_of_an_update(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the background, the copy is made while the next update computes: that must not have moved the weights."""
    words = (*WORDS, "--max_iters", "5", "--checkpoint_interval", "1", "--keep_last", "null")
    assert run_train(tmp_path / "at_once", *words) == 0
    assert run_train(tmp_path / "behind", *words, "--asynchronous", "true") == 0
    for step in range(1, 6):
        name = f"checkpoint_{step:08d}"
        assert_same_bits(tmp_path / "at_once" / name, tmp_path / "behind" / name)
    waits: list[bool] = []

    def noticed(optimizer: torch.optim.Optimizer, ready: object) -> None:
        assert ready == seen[0].saver.wait_until_copied
        waits.append(True)
        begin_update(optimizer, ready)  # type: ignore[arg-type]

    seen: list[TrainingRun] = []
    step = loop.train_step
    monkeypatch.setattr(loop, "begin_update", noticed)
    monkeypatch.setattr(loop, "train_step", lambda run, state: seen.append(run) or step(run, state))
    assert run_train(tmp_path / "noticed", *words) == 0
    assert len(waits) == 5


def test_what_has_diverged_is_computed_again_where_it_was(run_train: Train, tmp_path: Path) -> None:
    """Steps so large that only the weights that take them are past saving, while their average still gives a loss."""
    words = (*WORDS, "--lr", "30", "--beta1", "0.0", "--warmup_iters", "0", "--max_iters", "300")
    assert run_train(tmp_path / "run", *words) == 6
    [path] = (tmp_path / "run").glob("diverged_step_*.json")
    [rank] = json.loads(path.read_text())["ranks"]
    assert rank["bad_gradients"]


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(run_train: Train, dataset: Path, tmp_path: Path) -> None:
    """Shared out or not; and one goes on from what another has saved."""
    plan = (*WORDS, "--global_batch_size", "4", "--train_data_path", str(dataset), "--lr", "1e-3")
    assert run_train(tmp_path / "one", *plan, "--max_iters", "10") == 0
    one = losses(tmp_path / "one")
    for strategy in ("ddp", "zero2", "fsdp2"):
        np.testing.assert_allclose(begun_by_two(run_train, tmp_path / strategy, plan, strategy), one, rtol=1e-5)
    assert run_train(tmp_path / "other", *plan, "--max_iters", "10", "--beta1", "0.5") == 0
    assert np.abs(np.array(losses(tmp_path / "other")) / np.array(one) - 1).max() > 1e-4  # control
