"""The loss against its definition, and the sums that make it the same for every split into micro-batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from accel_pretrain.loss import IGNORE, next_token_loss
from tests.reference import cross_entropy, cross_entropy_gradient

B, T, V = 3, 5, 11


@pytest.fixture
def logits_BTV() -> torch.Tensor:
    return 4 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets_BT() -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def test_equals_the_reference_summed_per_sequence(logits_BTV: torch.Tensor, targets_BT: torch.Tensor):
    nats_B = next_token_loss(logits_BTV, targets_BT)
    expected = [cross_entropy(logits_BTV[b].numpy(), targets_BT[b].numpy()).sum() for b in range(B)]
    assert nats_B.dtype == torch.float32
    assert nats_B.tolist() == pytest.approx(expected, rel=1e-6)
    assert next_token_loss(logits_BTV, targets_BT.roll(1, dims=1)).tolist() != pytest.approx(expected, rel=1e-2)  # control


def test_is_one_scalar_after_flattening_by_hand(logits_BTV: torch.Tensor, targets_BT: torch.Tensor):
    mean = torch.nn.functional.cross_entropy(logits_BTV.view(B * T, V), targets_BT.view(B * T))
    assert mean.ndim == 0
    assert (next_token_loss(logits_BTV, targets_BT).sum() / (B * T)).item() == pytest.approx(mean.item(), rel=1e-6)


def test_gradient_is_softmax_minus_onehot(logits_BTV: torch.Tensor, targets_BT: torch.Tensor):
    next_token_loss(logits_BTV.requires_grad_(), targets_BT).sum().backward()
    expected = cross_entropy_gradient(logits_BTV.detach().reshape(B * T, V).numpy(), targets_BT.reshape(B * T).numpy())
    assert logits_BTV.grad is not None
    np.testing.assert_allclose(logits_BTV.grad.reshape(B * T, V).numpy(), expected, atol=1e-6)


def test_ignored_targets_add_nothing_and_get_no_gradient(logits_BTV: torch.Tensor, targets_BT: torch.Tensor):
    targets_BT[1, 2:] = IGNORE
    nats_B = next_token_loss(logits_BTV.requires_grad_(), targets_BT)
    expected = cross_entropy(logits_BTV[1].detach().numpy(), targets_BT[1].numpy())
    assert expected[2:].tolist() == [0.0, 0.0, 0.0]
    assert nats_B[1].item() == pytest.approx(expected.sum(), rel=1e-6)
    nats_B.sum().backward()
    assert logits_BTV.grad is not None
    assert logits_BTV.grad[1, 2:].abs().max() == 0
    assert logits_BTV.grad[1, :2].abs().max() > 0  # control


def test_all_ignored_is_zero_and_not_nan(logits_BTV: torch.Tensor):
    assert next_token_loss(logits_BTV, torch.full((B, T), IGNORE)).tolist() == [0.0, 0.0, 0.0]


def test_takes_logits_and_targets_that_are_slices(logits_BTV: torch.Tensor, targets_BT: torch.Tensor):
    sliced = next_token_loss(logits_BTV[:, :-1], targets_BT[:, 1:])
    assert torch.equal(sliced, next_token_loss(logits_BTV[:, :-1].contiguous(), targets_BT[:, 1:].contiguous()))


def test_is_computed_in_float32_whatever_the_logits_are(logits_BTV: torch.Tensor, targets_BT: torch.Tensor):
    rounded = logits_BTV.bfloat16()
    exact = [cross_entropy(rounded[b].float().numpy(), targets_BT[b].numpy()).sum() for b in range(B)]
    assert next_token_loss(rounded, targets_BT).tolist() == pytest.approx(exact, rel=1e-6)
    in_bf16 = -rounded.log_softmax(-1).gather(2, targets_BT[..., None]).sum(dim=(1, 2))  # control: bf16 arithmetic is far off
    assert in_bf16.float().tolist() != pytest.approx(exact, rel=1e-4)


def test_large_logits_do_not_overflow():
    logits_BTV = torch.tensor([[[1e4, 0.0, -1e4]]])
    assert next_token_loss(logits_BTV, torch.tensor([[2]])).tolist() == [2e4]
    assert next_token_loss(logits_BTV, torch.tensor([[0]])).tolist() == [0.0]


def test_uniform_logits_give_ln_v():
    assert next_token_loss(torch.zeros(1, 4, 50257), torch.zeros(1, 4, dtype=torch.long)).item() / 4 == pytest.approx(
        math.log(50257)
    )


@pytest.mark.parametrize("parts", [[1, 5], [2, 2, 2], [1, 2, 3], [1] * 6])
def test_micro_batches_of_unequal_token_counts_add_up_to_the_whole(parts: list[int]):
    """Mean over all tokens of the update, not the mean of micro-batch means (a bug of several trainers until 2024)."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(6, T, 8, generator=generator)
    targets_BT = torch.randint(V, (6, T), generator=generator)
    for row in range(6):
        targets_BT[row, 5 - row % 5 :] = IGNORE
    counted = int((targets_BT != IGNORE).sum())

    def gradient(divisors: list[int]) -> torch.Tensor:
        weight = torch.linspace(-1, 1, V * 8).reshape(V, 8).requires_grad_()
        for x, y, divisor in zip(inputs.split(parts), targets_BT.split(parts), divisors, strict=True):
            (next_token_loss(x @ weight.T, y).sum() / divisor).backward()
        assert weight.grad is not None
        return weight.grad

    weight = torch.linspace(-1, 1, V * 8).reshape(V, 8).requires_grad_()
    torch.nn.functional.cross_entropy((inputs @ weight.T).view(-1, V), targets_BT.view(-1)).backward()
    torch.testing.assert_close(gradient([counted] * len(parts)), weight.grad, atol=1e-6, rtol=1e-5)
    means = [len(parts) * max(1, int((y != IGNORE).sum())) for y in targets_BT.split(parts)]
    assert not torch.allclose(gradient(means), weight.grad, atol=1e-3)  # type: ignore[arg-type]  # control: mean of means
