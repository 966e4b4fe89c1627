"""The loss in chunks against the plain one and against float64: nats and gradients, as on a GPU, here on a CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from accel_pretrain.loss import IGNORE, next_token_loss
from accel_pretrain.models import ModelConfig, Transformer, head_loss

B, T, D, V = 3, 20, 16, 101


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets_BT = torch.randint(V, (B, T), generator=generator)
    targets_BT[1, 5:9] = IGNORE
    return torch.randn(B, T, D, generator=generator), torch.randn(V, D, generator=generator), targets_BT


def plain(x_BTD: torch.Tensor, weight_VD: torch.Tensor, targets_BT: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits_BTV = x_BTD @ weight_VD.t()
    if softcap is not None:
        logits_BTV = softcap * torch.tanh(logits_BTV / softcap)
    if logits_BTV.dtype == torch.float64:  # next_token_loss computes in float32
        nats = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
        return nats.view(B, T).sum(dim=1)
    return next_token_loss(logits_BTV, targets_BT)


def found(function, dtype: torch.dtype, softcap: float | None, counts: tuple[float, ...] = (0.25,) * B) -> list[torch.Tensor]:
    x_BTD, weight_VD, targets_BT = inputs()
    leaves = [x.to(dtype).requires_grad_() for x in (x_BTD, weight_VD)]
    nats_B = function(*leaves, targets_BT, softcap)
    nats_B.backward(gradient=torch.tensor(counts, dtype=nats_B.dtype))
    return [nats_B.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(one, other, strict=True)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head_loss, "_CHUNK_BYTES", 4 * V * 7)  # 7 of 60 tokens: the last chunk is smaller


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_in_float32_to_rounding(softcap: float | None):
    chunked = found(head_loss.chunked_loss, torch.float32, softcap)
    assert max(apart(chunked, found(plain, torch.float64, softcap))) < 1e-6
    assert min(apart(chunked, found(plain, torch.float64, 4.9))) > 1e-4  # control


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_in_bfloat16_no_worse_than_the_plain_loss(softcap: float | None):
    exact = found(plain, torch.float64, softcap)
    with torch.autocast("cpu", torch.bfloat16):
        chunked, usual = (found(function, torch.float32, softcap) for function in (head_loss.chunked_loss, plain))
    assert all(ours <= 1.5 * theirs for ours, theirs in zip(apart(chunked, exact), apart(usual, exact), strict=True))
    assert [x.dtype for x in chunked] == [torch.float32] * 3


def test_sequences_that_count_differently_are_refused_on_the_device():
    _, x_grad, weight_grad = found(head_loss.chunked_loss, torch.float32, None, (1.0, 1.0, 0.5))
    assert x_grad.isnan().all()
    assert weight_grad.isnan().all()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_gives_the_same_loss_and_gradients(tied: bool):
    config = ModelConfig(context_length=T, d_model=32, num_layers=2, num_heads=2, vocab_size=V, tie_embeddings=tied)
    config = dataclasses.replace(config, logit_softcap=10.0)
    ids_BS = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))
    courses = []
    for chunked in (False, True):
        torch.manual_seed(0)
        model = Transformer(config, V)
        model.chunked_loss = chunked
        nats_B = model(ids_BS[:, :-1], ids_BS[:, 1:])
        assert type(nats_B.grad_fn).__name__.startswith("_ChunkedLoss") == chunked
        nats_B.backward(gradient=torch.full((B,), 1 / 60))
        courses.append([nats_B.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert max(apart(courses[1], courses[0])) < 1e-5
