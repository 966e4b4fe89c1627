"""Muon: what is made orthogonal, against torch's own for one matrix, over processes, and through checkpoints."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from accel_pretrain import muon
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.muon import JORDAN, POLAR_EXPRESS, orthogonal
from accel_pretrain.optim import AdamW, Muon, Optimizer, set_lr
from accel_pretrain.rules import settle_in
from tests.running import TINY, Train, assert_same_bits, losses, newest, run_processes, weights_and_moments

SHAPE = ModelConfig(
    context_length=8, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=64, qk_norm=True, value_embeddings=True
)
MUON = ("--optimizer.name", "muon", "--lr", "2e-3")


def matrices(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class One(nn.Module):
    """A matrix."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.detach().clone())


def one_matrix(shape: tuple[int, int]) -> One:
    return One(matrices(0, *shape))


def trained(optimizer: Optimizer, updates: int = 4, precision: str = "no", seed: int = 0) -> Transformer:
    """A model after updates by gradients that are noise."""
    torch.manual_seed(0)
    model = Transformer(SHAPE, 32)
    built = optimizer.build(model)
    settle_in(built, precision, 1)
    for step in range(updates):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = matrices(1000 * seed + 50 * step + number, *parameter.shape)
        built.step()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (48, 48)])
def test_singular_values_come_near_to_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    u, _, v = torch.linalg.svd(matrices(1, 5, *shape), full_matrices=False)
    spread = torch.logspace(0, -2, min(shape))  # the largest is a hundred times the smallest
    made = orthogonal((u * spread @ v * 7.0).to(dtype))
    values = torch.linalg.svdvals(made.float())
    assert values.min() > 0.65
    assert values.max() < 1.15
    aligned = torch.linalg.matrix_norm(made.float() - u @ v, ord=2)
    assert aligned.max() < 0.4  # the same singular vectors
    before = torch.linalg.svdvals(orthogonal((u * spread @ v).to(dtype), POLAR_EXPRESS[:3]).float())
    assert before.min() < 0.6  # control: fewer steps do not


def test_nothing_is_made_of_nothing() -> None:
    assert orthogonal(torch.zeros(2, 3, 4)).count_nonzero() == 0


def test_each_polynomial_is_the_best_for_what_the_one_before_leaves() -> None:
    """The error on an interval has its largest size four times, with changing signs: then no other quintic does better."""
    low, high = 1e-3, 1.0
    for number, (a, b, c) in enumerate(POLAR_EXPRESS):
        slack = muon._SLACK ** (2 if number == 0 else 1)
        x = torch.linspace(max(low, 0.0240733 * high), high, 200_001, dtype=torch.float64)
        error = 1 - (a * (x * slack) + b * (x * slack) ** 3 + c * (x * slack) ** 5)
        inner = error[1:-1][(error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) < 0]
        extremes = torch.stack([error[0], *inner, error[-1]])
        assert len(extremes) == 4
        assert (extremes.sign() == torch.tensor([1, -1, 1, -1])).all()
        # the ends are balanced again for values below the cushion: up to that factor, sizes are equal
        scale = 2 / (2 - extremes[0] - extremes[-1])
        sizes = (1 - scale * (1 - extremes)).abs()
        assert (sizes.max() - sizes.min()) / sizes.max() < (2e-3 if low > 0.0240733 * high else 0.2)
        low = a * (low * slack) + b * (low * slack) ** 3 + c * (low * slack) ** 5
        high = 2 - low


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_it_equals_torchs_own_for_one_matrix(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "orthogonal", partial(orthogonal, polynomials=JORDAN))

    def far(**changed: float) -> float:
        ours, theirs = one_matrix(shape), one_matrix(shape)
        given = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.9} | changed
        built = Muon(**given).build(ours)  # type: ignore[arg-type]
        settle_in(built, "bf16", 1)
        reference = torch.optim.Muon(
            theirs.parameters(), lr=0.02, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw"
        )
        for step in range(5):
            gradient = matrices(step, *shape)
            ours.matrix.grad, theirs.matrix.grad = gradient.clone(), gradient.clone()
            set_lr(built, given["lr"])
            built.step()
            reference.step()
        apart, moved = ours.matrix - theirs.matrix, theirs.matrix - matrices(0, *shape)
        return (apart.abs().max() / moved.abs().max()).item()

    assert far() < 5e-3
    for wrong in ({"momentum": 0.8}, {"weight_decay": 0.0}, {"lr": 0.019}):
        assert far(**wrong) > 2e-2


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_matrix_alone_is_updated_as_among_others(precision: str) -> None:
    among = trained(Muon(lr=0.01), precision=precision)
    torch.manual_seed(0)
    begun, name = Transformer(SHAPE, 32), "layers.1.mlp.up_proj.weight"
    number = list(dict(begun.named_parameters())).index(name)
    alone = One(dict(begun.named_parameters())[name])
    built = Muon(lr=0.01).build(alone)
    settle_in(built, precision, 1)
    for step in range(4):
        alone.matrix.grad = matrices(50 * step + number, *alone.matrix.shape)
        built.step()
    far = (alone.matrix - dict(among.named_parameters())[name]).abs().max()
    assert far < 1e-7
    assert (dict(begun.named_parameters())[name] - alone.matrix).abs().max() > 1e-3


def test_some_matrices_at_a_time_are_updated_as_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the order of sums in batched products, which may depend on their number."""
    together = list(trained(Muon(lr=0.01)).parameters())
    other = trained(Muon(lr=0.01), seed=1).parameters()
    for size in (1, 3 * 4 * 32 * 32):
        monkeypatch.setattr(muon, "CHUNK_BYTES", size)
        parts = trained(Muon(lr=0.01)).parameters()
        assert max((a - b).abs().max().item() for a, b in zip(together, parts, strict=True)) < 1e-7
    assert max((a - b).abs().max().item() for a, b in zip(together, other, strict=True)) > 1e-3  # control


def test_all_but_matrices_follow_adamw() -> None:
    ours, theirs = trained(Muon(lr=0.01, weight_decay=0.3)), trained(AdamW(lr=0.01, weight_decay=0.3))
    same = {name for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True) if torch.equal(a, b)}
    blocks = {f"layers.{layer}.{part}_proj.weight" for layer in (0, 1) for part in (
        *(f"self_attn.{own}" for own in "qkvo"), *(f"mlp.{own}" for own in ("gate", "up", "down")),
    )}  # fmt: skip
    assert same == set(dict(ours.named_parameters())) - blocks


def test_an_update_is_as_large_as_adamws() -> None:
    """Each entry moves by about 0.2 of the rate, whatever the shape, which is why AdamW's rate carries over."""
    for shape in ((64, 256), (128, 128), (256, 64)):
        module = one_matrix(shape)
        built = Muon(lr=1.0, weight_decay=0.0).build(module)
        module.matrix.grad = matrices(3, *shape)
        built.step()
        moved = (module.matrix - matrices(0, *shape)).square().mean().sqrt().item()
        assert moved == pytest.approx(0.2, rel=0.1)


def test_what_is_not_finite_changes_nothing_when_the_device_decides() -> None:
    """``found_inf`` is set by the guard, on a GPU."""
    model = trained(Muon(lr=0.01))
    built = Muon(lr=0.01).build(model)
    for bad in (False, True, False):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = matrices(number, *parameter.shape) * (float("nan") if bad else 1.0)
        before = copy.deepcopy([list(model.parameters()), built.state_dict()["state"]])
        built.found_inf = torch.tensor(float(bad))  # type: ignore[attr-defined]
        built.step()
        kept = all(torch.equal(old, new) for old, new in zip(before[0], model.parameters(), strict=True))
        assert kept == bad
    assert {float(own["step"]) for own in built.state.values()} == {2.0}
    assert all(torch.isfinite(own).all() for state in built.state.values() for own in state.values())


def test_rates_keep_their_ratios() -> None:
    model = Transformer(SHAPE, 32)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    built = Muon(lr=0.01, embedding_lr_scale=10.0, head_lr_scale=0.5).build(model)
    for rate in (0.01, 0.004):
        rates = {names[id(own)]: group["lr"] / rate for group in built.param_groups for own in group["params"]}
        assert rates["embed_tokens.weight"] == rates["layers.1.self_attn.value_embedding.embed.weight"] == pytest.approx(10)
        assert rates["lm_head.weight"] == pytest.approx(0.5)
        others = {name: own for name, own in rates.items() if "embed_tokens" not in name and "embedding.embed" not in name}
        assert {own for name, own in others.items() if name != "lm_head.weight"} == {1.0}
        set_lr(built, 0.004)


def test_a_run_resumes_to_the_same_bits(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path / "whole", *MUON, "--max_iters", "6") == 0
    assert run_train(tmp_path / "parts", *MUON, "--max_iters", "3", "--schedule.name", "constant") == 0
    assert run_train(tmp_path / "straight", *MUON, "--max_iters", "6", "--schedule.name", "constant") == 0
    assert run_train(tmp_path / "parts", *MUON, "--max_iters", "6", "--schedule.name", "constant") == 0
    assert_same_bits(newest(tmp_path / "straight"), newest(tmp_path / "parts"))
    assert losses(tmp_path / "straight") == losses(tmp_path / "parts")
    with pytest.raises(AssertionError):  # control: another schedule
        assert_same_bits(newest(tmp_path / "straight"), newest(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(run_train: Train, dataset: Path, tmp_path: Path) -> None:
    """Under ddp each makes some matrices orthogonal; under zero2 and fsdp2 of shares of them. One goes on from another."""
    plan = (*MUON, "--optimizer.eps", "1e-4", "--global_batch_size", "4", "--max_iters", "8", "--checkpoint_interval", "4")
    plan += ("--keep_last", "null", "--train_data_path", str(dataset))
    assert run_train(tmp_path / "one", *plan) == 0
    one = losses(tmp_path / "one")
    for strategy in ("ddp", "zero2", "fsdp2"):
        own = tmp_path / strategy
        words = [*TINY, *plan, "--batch_size", "2", "--strategy", strategy, "--checkpoint_dir", str(own)]
        done = run_processes(words, processes=2)
        assert done.returncode == 0, done.stderr
        assert "Processes: 2" in done.stdout
        np.testing.assert_allclose(losses(own), one, rtol=1e-6)
        ours, theirs = weights_and_moments(newest(own)), weights_and_moments(newest(tmp_path / "one"))
        assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
        assert run_train(own, *plan, "--max_iters", "12", "--strategy", "null") == 0
    assert run_train(tmp_path / "one", *plan, "--max_iters", "12") == 0
    for strategy in ("ddp", "zero2", "fsdp2"):
        np.testing.assert_allclose(losses(tmp_path / strategy), losses(tmp_path / "one"), rtol=1e-5)
    assert run_train(tmp_path / "other", *plan, "--seed", "43") == 0
    assert np.abs(np.array(losses(tmp_path / "other")) / np.array(one) - 1).max() > 1e-3  # control
