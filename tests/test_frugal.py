"""Optimizers that keep less: Lion's rule, moments of a byte, projected gradients; what each keeps, shares and saves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from accel_pretrain import frugal
from accel_pretrain.frugal import BLOCK, decode, encode
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.optim import (
    AdamW,
    AdamW8,
    AdamWScheduleFree,
    GaLore,
    Lion,
    Muon,
    Optimizer,
    describe_groups,
    kept_per_weight,
    problems,
)
from tests.running import Train, assert_same_bits, begun_by_two, losses, newest

MODERN = ModelConfig(
    context_length=8, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=128, qk_norm=True, value_embeddings=True
)
GPT2 = ModelConfig(
    context_length=8, d_model=64, num_layers=2, num_heads=4, d_ff=None, norm="layernorm", activation="gelu_tanh",
    position="learned", bias=True, tie_embeddings=True,
)  # fmt: skip
EVERY = (AdamW(), Muon(), Lion(), AdamW8(), GaLore(projection_rank=16), AdamWScheduleFree())


class One(nn.Module):
    """A matrix."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(noise(0, rows, columns))


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(optimizer: Optimizer, gradients: list[torch.Tensor]) -> tuple[One, torch.optim.Optimizer]:
    module = One(*gradients[0].shape)
    built = optimizer.build(module)
    for gradient in gradients:
        module.matrix.grad = gradient.clone()
        built.step()
    return module, built


def moved(module: One) -> torch.Tensor:
    return (module.matrix - noise(0, *module.matrix.shape)).detach()


# ------------------------------------------------------------------------------------------------------------------- Lion


def test_lion_follows_its_algorithm() -> None:
    gradients = [noise(step, 5, 7) for step in range(1, 9)]
    ours = trained(Lion(lr=0.01, weight_decay=0.5, beta1=0.8, beta2=0.95), gradients)[0].matrix.detach().double().numpy()

    def expected(beta1: float, beta2: float) -> np.ndarray:
        weight, mean = noise(0, 5, 7).double().numpy(), np.zeros((5, 7))
        for gradient in (own.double().numpy() for own in gradients):
            weight = weight - 0.01 * (np.sign(beta1 * mean + (1 - beta1) * gradient) + 0.5 * weight)
            mean = beta2 * mean + (1 - beta2) * gradient
        return weight

    assert np.abs(ours - expected(0.8, 0.95)).max() < 1e-6
    assert np.abs(ours - expected(0.95, 0.8)).max() > 1e-2  # control: swapped


# --------------------------------------------------------------------------------------------------------- 8-bit moments


@pytest.mark.parametrize("columns", [3, 256, 300, 700])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_stand_for_numbers(columns: int, signed: bool) -> None:
    x = noise(1, 4, columns) * torch.logspace(0, -2, columns)
    x = x if signed else x.square()
    x[1, 0] = 0.0
    x[2] = 0.0
    code, scale = encode(x, signed, step=3)
    assert code.dtype == torch.uint8
    assert code.shape == x.shape
    assert scale.shape == (4, -(-columns // BLOCK))
    again = decode(code, scale, signed)
    assert (again[x == 0] == 0).all()
    if not signed:
        assert (again[x != 0] != 0).all()
    assert ((again.sign() == x.sign()) | (again == 0)).all()
    largest = torch.stack([part.abs().amax(1) for part in x.split(BLOCK, 1)], 1).repeat_interleave(BLOCK, 1)[:, :columns]
    share = (x.abs() / largest).nan_to_num()
    power, top = (2, 127) if signed else (4, 255)
    step = largest * ((share ** (1 / power) + 1 / top) ** power - share)  # to the next code
    assert ((again - x).abs() <= step * 1.01 + 1e-12).all()


def test_small_changes_add_up() -> None:
    """A mean that comes down by a thousandth an update, less than half a code, comes down: rounding to the nearest sticks."""
    x = torch.ones(1, BLOCK)
    x[0, 1:] = 0.01
    code, scale = encode(x, signed=False, step=0)
    for step in range(1, 1001):
        value = decode(code, scale, signed=False)
        value[0, 1:] *= 0.999
        code, scale = encode(value, signed=False, step=step)
    assert decode(code, scale, signed=False)[0, 1:].mean().item() == pytest.approx(0.01 * 0.999**1000, rel=0.1)


def test_eight_bits_follow_adamw() -> None:
    gradients = [noise(step, 30, 300) * torch.logspace(0, -3, 300) for step in range(1, 31)]
    exact, ours = (moved(trained(kind(lr=0.01), gradients)[0]) for kind in (AdamW, AdamW8))
    far = (ours - exact).norm() / exact.norm()
    assert far < 0.1
    assert (moved(trained(AdamW8(lr=0.01, beta2=0.5), gradients)[0]) - exact).norm() / exact.norm() > 2 * far


def never_zero(x_RC: torch.Tensor, signed: bool, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes that keep every number from 0: a mean then neither ends nor changes its sign."""
    code, scale = encode(x_RC, signed, step)
    if signed:
        code = torch.where((code == 128) & (x_RC != 0), 128 + x_RC.sign(), code).to(torch.uint8)
    return code, scale


@pytest.mark.parametrize(("size", "until", "times"), [(1.0, 5, 2.0), (1e-3, 1000, 3.0), (1e-4, 1000, 3.0)])
def test_what_gradients_leave_alone_stays(monkeypatch: pytest.MonkeyPatch, size: float, until: int, times: float) -> None:
    """Columns whose gradients end, or are noise much smaller than their neighbours', move about as far as with AdamW."""
    gradients = [noise(step, 4, BLOCK) for step in range(1, 1001)]
    for step, gradient in enumerate(gradients):
        gradient[:, :8] *= size if step < until else 0.0

    def far(optimizer: Optimizer) -> float:
        return moved(trained(optimizer, gradients)[0])[:, :8].square().mean().sqrt().item()

    exact, ours = far(AdamW(lr=0.01, weight_decay=0.0)), far(AdamW8(lr=0.01, weight_decay=0.0))
    assert exact / times < ours < times * exact
    if size != 1e-3:  # control; a thousandth is above the first code
        monkeypatch.setattr(frugal, "encode", never_zero)
        assert far(AdamW8(lr=0.01, weight_decay=0.0)) > 5 * exact


# ---------------------------------------------------------------------------------------------------------------- GaLore


def test_galore_finds_the_directions_of_gradients() -> None:
    """Of gradients of rank 4, four directions are all there is; of others, it moves along the largest ones."""
    left, right = noise(1, 24, 4), noise(2, 4, 40)
    few = [left * noise(step, 4) @ right for step in range(3, 13)]
    optimizer = GaLore(lr=0.01, weight_decay=0.0, projection_rank=4, projection_interval=5)
    module, built = trained(optimizer, few)
    basis = built.state[module.matrix]["projection"]
    assert basis.shape == (40, 4)
    assert (basis.mT @ basis - torch.eye(4)).abs().max() < 1e-5
    for gradient in few:
        assert (gradient - gradient @ basis @ basis.mT).norm() < 1e-3 * gradient.norm()
    assert torch.linalg.matrix_rank(moved(module)) == 4
    other = noise(9, 24, 40)
    assert (other - other @ basis @ basis.mT).norm() > 0.5 * other.norm()  # control


def test_galore_of_full_rank_is_adamw_turned() -> None:
    """With one gradient direction and its basis, the update has AdamW's length along it."""
    one = [noise(1, 20, 1) @ noise(2, 1, 30)] * 10
    module, _ = trained(GaLore(lr=0.01, weight_decay=0.0, projection_rank=1, projection_interval=3), one)
    lengths = moved(module).norm(dim=1)
    assert lengths == pytest.approx(torch.full((20,), 0.1), rel=1e-3)  # ten updates of 0.01 for every row


@pytest.mark.parametrize(("width", "rank"), [(64, 16), (72, 24), (16, 5), (2, 1)])
def test_the_rank_is_a_third_of_the_width(width: int, rank: int) -> None:
    config = ModelConfig(context_length=8, d_model=width, num_layers=1, num_heads=1, d_ff=4 * width)
    assert GaLore().groups(Transformer(config, 96))[0]["rank"] == rank
    assert kept_per_weight(GaLore(), config, 96) < 1.6  # of AdamW's 2
    assert problems(GaLore(), config, 96) == problems(GaLore(projection_rank=rank), config, 96) == []


@pytest.mark.parametrize("rank", [63, 64, 128])
def test_a_rank_that_saves_nothing_is_refused(rank: int) -> None:
    (line,) = problems(GaLore(projection_rank=rank), MODERN, 96)
    assert line == f"optimizer.projection_rank {rank}: keeps no less than AdamW of this model; type --projection_rank null"


# ------------------------------------------------------------------------------------------------------- groups and state


@pytest.mark.parametrize("optimizer", EVERY, ids=lambda own: own.name)
@pytest.mark.parametrize("shape", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_what_is_kept_is_what_was_said(optimizer: Optimizer, shape: ModelConfig) -> None:
    model = Transformer(shape, 96)
    built = optimizer.build(model)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = noise(number, *parameter.shape)
    built.step()
    kept = sum(own.nbytes for state in built.state.values() for own in state.values() if own.ndim)
    assert kept / 4 / model.num_parameters() == pytest.approx(kept_per_weight(optimizer, shape, 96), rel=1e-9)
    assert all(float(state["step"]) == 1 for state in built.state.values())
    limits = {"adamw8": 0.6, "galore": 0.8}  # of 2
    assert kept / 4 / model.num_parameters() < limits.get(optimizer.name, 2.0001)


def test_groups_as_they_are_told() -> None:
    assert describe_groups(AdamW(), GPT2, 96) == [
        "embedding, matrix: 14 tensors, 104,960 parameters, adamw, lr 0.0006, weight_decay 0.1",
        "vector: 22 tensors, 1,792 parameters, adamw, lr 0.0006, weight_decay 0",
    ]
    assert describe_groups(Muon(lr=0.01, embedding_lr_scale=5.0), MODERN, 96) == [
        "embedding: 2 tensors, 9,216 parameters, adamw, lr 0.05, weight_decay 0.1",
        "matrix: 14 tensors, 73,728 parameters, muon, lr 0.01, weight_decay 0.1",
        "gate, head: 2 tensors, 6,208 parameters, adamw, lr 0.01, weight_decay 0.1",
        "vector: 9 tensors, 384 parameters, adamw, lr 0.01, weight_decay 0",
    ]
    assert describe_groups(GaLore(projection_rank=32), MODERN, 96)[0] == (
        "embedding, matrix, head: 12 tensors, 77,824 parameters, galore, lr 0.0006, weight_decay 0.1"
    )


RUNS = {
    "lion": ("--optimizer.name", "lion"),
    "adamw8": ("--optimizer.name", "adamw8"),
    "galore": ("--optimizer.name", "galore", "--projection_rank", "4", "--projection_interval", "4"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_to_the_same_bits(run_train: Train, tmp_path: Path, name: str) -> None:
    words = (*RUNS[name], "--schedule.name", "constant")
    assert run_train(tmp_path / "whole", *words, "--max_iters", "6") == 0
    for updates in ("3", "6"):
        assert run_train(tmp_path / "parts", *words, "--max_iters", updates) == 0
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    saved = torch.load(newest(tmp_path / "parts") / "optimizer.bin", weights_only=True)["state"]
    kinds = {key: own.dtype for state in saved.values() for key, own in state.items()}
    assert {kind for key, kind in kinds.items() if key.endswith("_code")} <= {torch.uint8}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_updates_of_one(run_train: Train, dataset: Path, tmp_path: Path, name: str) -> None:
    """Shared out or not; and one goes on from what another has saved."""
    plan = (*RUNS[name], "--schedule.name", "constant", "--global_batch_size", "4", "--train_data_path", str(dataset))
    plan += ("--weight_decay", "0.1", "--lr", "1e-4")
    assert run_train(tmp_path / "one", *plan, "--max_iters", "10") == 0
    one = losses(tmp_path / "one")
    for strategy in ("ddp", "fsdp2"):
        np.testing.assert_allclose(begun_by_two(run_train, tmp_path / strategy, plan, strategy), one, rtol=1e-4)
    assert run_train(tmp_path / "other", *plan, "--max_iters", "10", "--lr", "5e-4") == 0
    assert max(abs(math.log(a / b)) for a, b in zip(losses(tmp_path / "other"), one, strict=True)) > 1e-3  # control
