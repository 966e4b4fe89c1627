"""What is faster on a CPU, against what it stands for: losses, outputs, gradients, and the errors of both against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from accel_pretrain.loss import IGNORE
from accel_pretrain.models import ModelConfig, Transformer, cpu_attention, cpu_loss
from accel_pretrain.models.norm import RMSNorm
from accel_pretrain.models.rope import rope_table, rotate

Tensors = Sequence[torch.Tensor]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensors, exact: Tensors) -> float:
    """Relative, over all of them together."""
    difference = sum((a.double() - b.double()).square().sum() for a, b in zip(found, exact, strict=True))
    return float((difference / sum(b.double().square().sum() for b in exact)).sqrt())  # type: ignore[operator, union-attr]


def out_and_grads(function: Callable[..., torch.Tensor], inputs: Tensors, out_grad: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, out_grad.to(out.dtype))]


# --------------------------------------------------------------------------------------------------------------- attention

SHAPES = {  # B, H, G, T, E, window
    "one block": (2, 4, 4, 96, 32, None),
    "blocks": (3, 4, 4, 300, 32, None),
    "grouped": (2, 6, 2, 260, 16, None),
    "multi-query": (2, 4, 1, 129, 64, None),
    "long": (1, 2, 2, 700, 32, None),
    "window": (2, 4, 2, 300, 32, 50),
    "wide window": (2, 4, 4, 300, 32, 200),
    "window of two": (1, 2, 2, 140, 8, 2),
    "two positions": (2, 2, 2, 2, 8, None),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
SCALE = 0.3


def attention_inputs(shape: tuple[int, int, int, int, int, int | None], dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    """Queries, keys and values as the linear layers give them, and a gradient of the output."""
    B, H, G, T, E, _ = shape
    q, k, v, out_grad = (randn(B, T, n, E, seed=seed).to(dtype).transpose(1, 2) for seed, n in enumerate((H, G, G, H)))
    return (q, k, v), out_grad


def plain_attention(shape: tuple[int, int, int, int, int, int | None]) -> Callable[..., torch.Tensor]:
    T, window = shape[3], shape[5]
    mask = None if window is None else torch.ones(T, T, dtype=torch.bool).tril().triu(1 - window)
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=SCALE, enable_gqa=True
    )


@shapes
def test_attention_in_float32_is_exact(shape: tuple[int, int, int, int, int, int | None]):
    inputs, out_grad = attention_inputs(shape, torch.float32)
    exact = out_and_grads(plain_attention(shape), [x.double() for x in inputs], out_grad)
    found = out_and_grads(lambda q, k, v: cpu_attention.causal_attention(q, k, v, SCALE, shape[5]), inputs, out_grad)
    for one, other in zip(found, exact, strict=True):
        assert error([one], [other]) < 1e-6


@shapes
def test_attention_in_bfloat16_rounds_as_step_by_step_attention_does(shape: tuple[int, int, int, int, int, int | None]):
    inputs, out_grad = attention_inputs(shape, torch.bfloat16)
    exact = out_and_grads(plain_attention(shape), [x.double() for x in inputs], out_grad)
    found = out_and_grads(lambda q, k, v: cpu_attention.causal_attention(q, k, v, SCALE, shape[5]), inputs, out_grad)
    kernel = out_and_grads(plain_attention(shape), inputs, out_grad)

    def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        hidden = (distance < 0) | (distance >= (shape[5] or q.shape[2]))
        return (q @ k.transpose(2, 3) * SCALE).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    steps = out_and_grads(by_hand, inputs, out_grad)
    assert torch.equal(found[0], kernel[0])
    ours, theirs, by_steps = (error(grads[1:], exact[1:]) for grads in (found, kernel, steps))
    assert ours <= 1.01 * by_steps
    assert ours <= 2 * theirs


def test_attention_control_another_window_or_scale_is_seen():
    shape = SHAPES["window"]
    inputs, out_grad = attention_inputs(shape, torch.float32)
    exact = out_and_grads(plain_attention(shape), [x.double() for x in inputs], out_grad)
    for scale, window in ((SCALE, 49), (SCALE, None), (1.001 * SCALE, 50)):
        wrong = out_and_grads(
            lambda q, k, v, s=scale, w=window: cpu_attention.causal_attention(q, k, v, s, w), inputs, out_grad
        )
        assert all(error([one], [other]) > 1e-4 for one, other in zip(wrong, exact, strict=True))


def test_attention_is_one_operator_for_the_compiler():
    shape = SHAPES["grouped"]
    inputs, out_grad = attention_inputs(shape, torch.bfloat16)
    torch.library.opcheck(cpu_attention.causal_attention._opoverload, (*inputs, SCALE, None), test_utils="test_schema")
    torch.library.opcheck(cpu_attention.causal_attention._opoverload, (*inputs, SCALE, 5), test_utils="test_faketensor")
    torch.library.opcheck(
        cpu_attention._gradients._opoverload, (out_grad, *inputs, SCALE, None), test_utils=("test_schema", "test_faketensor")
    )


def test_attention_is_chosen_only_where_it_pays():
    (q, k, v), _ = attention_inputs(SHAPES["grouped"], torch.bfloat16)
    assert cpu_attention.fits(q, k, v)
    assert not cpu_attention.fits(q.float(), k.float(), v.float())
    assert not cpu_attention.fits(q[:, :, -1:], k, v)  # decoding
    with torch.no_grad():
        assert not cpu_attention.fits(q, k, v)


# -------------------------------------------------------------------------------------------------------------------- loss

B, T, V, D = 4, 6, 37, 16


def loss_inputs(seed: int = 0) -> tuple[Tensors, torch.Tensor]:
    return (randn(B, T, D, seed=seed), 2 * randn(V, D, seed=seed + 1)), torch.randint(
        V, (B, T), generator=torch.Generator().manual_seed(seed + 2)
    )


def plain_loss(x_BTD: torch.Tensor, weight_VD: torch.Tensor, targets_BT: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits_BTV = x_BTD @ weight_VD.T
    if softcap is not None:
        logits_BTV = softcap * torch.tanh(logits_BTV / softcap)
    losses = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view(targets_BT.shape).sum(dim=1)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("ignored", [0, 5, B * T])
@pytest.mark.parametrize("counts", [[0.25] * B, [0.5, 0.0, -2.0, 3.0]], ids=["even", "uneven"])
@pytest.mark.parametrize("rows", [1, 5, 10_000])
def test_loss_in_float32_is_exact(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, ignored: int, counts: list[float], rows: int
):
    monkeypatch.setattr(cpu_loss, "LOGIT_BYTES", 4 * V * rows)
    monkeypatch.setattr(cpu_loss, "CACHE_BYTES", 4 * V * 3)
    inputs, targets_BT = loss_inputs()
    targets_BT.view(-1)[:ignored] = IGNORE
    counts_B = torch.tensor(counts)
    exact = out_and_grads(lambda x, w: plain_loss(x, w, targets_BT, softcap), [x.double() for x in inputs], counts_B)
    found = out_and_grads(lambda x, w: cpu_loss.head_loss(x, w, targets_BT, softcap), inputs, counts_B)
    for one, other in zip(found, exact, strict=True):
        assert error([one], [other]) < 1e-6 if other.any() else not one.any()
    if ignored < B * T:
        wrong = out_and_grads(lambda x, w: cpu_loss.head_loss(x, w, targets_BT.roll(1), softcap), inputs, counts_B)
        assert all(error([one], [other]) > 1e-2 for one, other in zip(wrong, exact, strict=True))  # control


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_in_bfloat16_is_no_worse_than_the_plain_one(softcap: float | None):
    inputs, targets_BT = loss_inputs()
    counts_B = torch.full((B,), 1 / (B * T))
    exact = out_and_grads(lambda x, w: plain_loss(x, w, targets_BT, softcap), [x.double() for x in inputs], counts_B)
    with torch.autocast("cpu", torch.bfloat16):
        found = out_and_grads(lambda x, w: cpu_loss.head_loss(x, w, targets_BT, softcap), inputs, counts_B)
        plain = out_and_grads(lambda x, w: plain_loss(x, w, targets_BT, softcap), inputs, counts_B)
    assert found[0].dtype == torch.float32
    assert [x.dtype for x in found[1:]] == [torch.float32] * 2
    assert error(found[:1], exact[:1]) <= 1.1 * error(plain[:1], exact[:1])
    assert error(found[1:], exact[1:]) <= 1.1 * error(plain[1:], exact[1:])
    assert error(found[1:], exact[1:]) > 1e-4  # control: it did run in bf16


def test_loss_of_a_token_beyond_float32_is_exact():
    x_BTD, weight_VD = torch.tensor([[[1.0], [100.0]]]), torch.tensor([[1.0], [0.0], [-1.0]])
    targets_BT = torch.tensor([[2, 2]])
    assert cpu_loss.head_loss(x_BTD, weight_VD, targets_BT, None).item() == pytest.approx(202.407606, rel=1e-6)


def test_loss_can_be_differentiated_twice_over_and_leaves_what_it_gave_alone():
    (x, weight), targets_BT = loss_inputs()
    weight.requires_grad_()
    nats_B = cpu_loss.head_loss(x, weight, targets_BT, None)
    (first,) = torch.autograd.grad(nats_B, weight, torch.ones(B), retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(nats_B, weight, torch.full((B,), 2.0))
    torch.testing.assert_close(second, 2 * kept)


def test_loss_without_gradients_is_the_same_and_computes_none(monkeypatch: pytest.MonkeyPatch):
    (x, weight), targets_BT = loss_inputs()
    weight.requires_grad_()
    chunked, wanted = cpu_loss._chunked, []
    monkeypatch.setattr(cpu_loss, "_chunked", lambda *words: wanted.append(words[-1]) or chunked(*words))
    with torch.no_grad():
        nats_B = cpu_loss.head_loss(x, weight, targets_BT, None)
    assert torch.equal(nats_B, cpu_loss.head_loss(x, weight, targets_BT, None))
    assert wanted == [False, True]


def test_a_second_derivative_is_refused():
    norm, x = RMSNorm(8, 1e-6, "rmsnorm"), randn(2, 8).requires_grad_()
    (grad,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_window_as_long_as_the_text_is_none():
    config = ModelConfig(
        vocab_size=64, context_length=32, d_model=32, num_layers=2, num_heads=2, d_ff=64, sliding_window=16, window_pattern="S"
    )
    model, tokens_BT = Transformer(config, 64), torch.zeros(1, 32, dtype=torch.long)
    assert [model._look(tokens_BT[:, :T], None)[1][1].window for T in (8, 16, 17)] == [None, None, 16]


# ---------------------------------------------------------------------------------------------------------- norm, rotation


@pytest.mark.parametrize("kind", ["rmsnorm", "rmsnorm_1p", "rmsnorm_plain"])
def test_rms_norm_in_few_passes_is_exact(kind: str):
    norm = RMSNorm(48, 1e-3, kind)
    weights = [] if norm.weight is None else [norm.weight]
    x, out_grad = 3 * randn(3, 50, 48), randn(3, 50, 48, seed=1)

    def plain(x: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        factor = 1 + weight[0] if kind == "rmsnorm_1p" else weight[0] if weight else 1
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * factor

    exact = out_and_grads(plain, [x.double(), *(w.double() for w in weights)], out_grad)
    leaf = x.clone().requires_grad_()
    out = norm(leaf)
    found = [out.detach(), *torch.autograd.grad(out, [leaf, *weights], out_grad)]
    for one, other in zip(found, exact, strict=True):
        assert error([one], [other]) < 1e-6
    assert error([norm(1.01 * x + 0.01).detach()], exact[:1]) > 1e-3  # control


def test_rotation_in_few_passes_is_exact():
    cos_TE, sin_TE = rope_table(ModelConfig(context_length=40, d_model=32, num_heads=2))
    x, out_grad = randn(2, 40, 2, 16).transpose(1, 2), randn(2, 2, 40, 16, seed=1)

    def plain(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos_TE.double() + torch.cat((-high, low), dim=-1) * sin_TE.double()

    exact = out_and_grads(plain, [x.double()], out_grad)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        found = out_and_grads(lambda x: rotate(x, torch.stack((cos_TE, sin_TE))), [x.to(dtype)], out_grad)
        assert all(error([one], [other]) < bound for one, other in zip(found, exact, strict=True))
    wrong = out_and_grads(lambda x: rotate(x, torch.stack((cos_TE, -sin_TE))), [x], out_grad)
    assert all(error([one], [other]) > 0.1 for one, other in zip(wrong, exact, strict=True))  # control


# ------------------------------------------------------------------------------------------------------------ all together

MODELS = {
    "gpt2": ModelConfig(
        context_length=160, d_model=64, num_layers=2, num_heads=4, d_ff=None, norm="layernorm", activation="gelu",
        position="learned", bias=True, tie_embeddings=True,
    ),
    "llama": ModelConfig(context_length=160, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=96),
    "gemma": ModelConfig(
        context_length=160, d_model=64, num_layers=2, num_heads=4, d_ff=96, norm="rmsnorm_1p", qk_norm=True, sliding_window=32,
        window_pattern="SF", logit_softcap=20.0, tie_embeddings=True,
    ),
}  # fmt: skip


def loss_and_grads(model: Transformer, dtype: torch.dtype, ids_BS: torch.Tensor) -> list[torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        nats_B = model(ids_BS[:, :-1], ids_BS[:, 1:])
    return [nats_B.detach(), *torch.autograd.grad(nats_B.sum(), list(model.parameters()))]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_have_the_same_loss_and_gradients(config: ModelConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = Transformer(replace(config, init_std=0.1), 300)
    ids_BS = torch.randint(300, (4, 161), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(cpu_loss, "PAYS_FROM", 1)
    quick = loss_and_grads(model, dtype, ids_BS)
    monkeypatch.setattr(cpu_attention, "fits", lambda *_: False)
    monkeypatch.setattr(cpu_loss, "fits", lambda *_: False)
    plain = loss_and_grads(model, dtype, ids_BS)
    if dtype == torch.float32:
        assert error(quick[:1], plain[:1]) < 1e-6
        assert error(quick[1:], plain[1:]) < 1e-6
    else:
        exact = loss_and_grads(model, torch.float32, ids_BS)
        assert error(quick[1:], exact[1:]) <= 1.1 * error(plain[1:], exact[1:])
        assert error(quick[1:], plain[1:]) > 0


class _Sums(TorchDispatchMode):
    """Counts sums of two matrices of this shape into a third."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.add.Tensor and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def test_the_gradient_of_a_tied_embedding_is_added_in_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_loss, "PAYS_FROM", 1)
    torch.manual_seed(0)
    model = Transformer(MODELS["gpt2"], 300)
    ids_BS = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(1))

    def sums_and_gradient(times: int = 1) -> tuple[int, torch.Tensor]:
        model.zero_grad()
        with _Sums((300, 64)) as sums:
            nats_B = model(ids_BS[:, :-1], ids_BS[:, 1:])
            for _ in range(times):
                nats_B.sum().backward(retain_graph=True)
        assert model.embed_tokens.weight.grad is not None
        return sums.count, model.embed_tokens.weight.grad

    count, once = sums_and_gradient()
    assert count == 0
    _, twice = sums_and_gradient(times=2)
    assert error([twice], [2 * once]) < 1e-6

    def apart(self: cpu_loss.HandedOn, tokens_BT: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        self.matrix_VD = weight_VD
        return F.embedding(tokens_BT, weight_VD)

    monkeypatch.setattr(cpu_loss.HandedOn, "embed", apart)  # control
    count, by_engine = sums_and_gradient()
    assert count == 1
    assert error([once], [by_engine]) < 1e-6


def test_a_tied_embedding_has_all_of_its_gradient_whatever_else_it_is_in(monkeypatch: pytest.MonkeyPatch):
    """Two losses at once, a penalty on the weight, and a backward pass that stops at the embedding's output and goes on."""
    torch.manual_seed(0)
    model = Transformer(MODELS["gpt2"], 300)
    weight = model.embed_tokens.weight
    first_BS, second_BS = torch.randint(300, (2, 2, 33), generator=torch.Generator().manual_seed(1))
    embedded: list[torch.Tensor] = []
    model.embed_tokens.register_forward_hook(lambda *call: embedded.append(call[2]))

    def loss(ids_BS: torch.Tensor) -> torch.Tensor:
        return model(ids_BS[:, :-1], ids_BS[:, 1:]).sum()

    def in_two_steps() -> torch.Tensor:
        total = loss(first_BS)
        (x_grad_BTD,) = torch.autograd.grad(total, [embedded[-1]], retain_graph=True)
        return torch.autograd.grad(embedded[-1], [weight], x_grad_BTD)[0]

    def gradients() -> list[torch.Tensor]:
        together = (
            loss(first_BS) + loss(second_BS),
            loss(first_BS) + 10 * weight.square().sum(),
            model(first_BS).square().sum(),
        )
        return [*(torch.autograd.grad(own, [weight])[0] for own in together), in_two_steps()]

    monkeypatch.setattr(cpu_loss, "PAYS_FROM", 1)
    found = gradients()
    monkeypatch.setattr(cpu_loss, "PAYS_FROM", 10**12)
    for one, plain in zip(found, gradients(), strict=True):
        assert error([one], [plain]) < 1e-6


@pytest.mark.parametrize("softcap", [3.0, pytest.param(None, marks=pytest.mark.slow)])
def test_the_compiled_loss_is_the_same_and_wrong_targets_are_seen(monkeypatch: pytest.MonkeyPatch, softcap: float | None):
    monkeypatch.setattr(cpu_loss, "CACHE_BYTES", 4 * V * 5)  # 24 tokens: four pieces of five, and one that is not compiled
    inputs, targets_BT = loss_inputs()
    targets_BT[0, 0] = IGNORE
    counts_B = torch.full((B,), 0.5)

    def result(targets_BT: torch.Tensor, compiled: bool) -> list[torch.Tensor]:
        return out_and_grads(lambda x, w: cpu_loss.head_loss(x, w, targets_BT, softcap, compiled=compiled), inputs, counts_B)

    plain, found = result(targets_BT, False), result(targets_BT, True)
    for one, other in zip(found, plain, strict=True):
        assert error([one], [other]) < 1e-6
    assert error(result(targets_BT.roll(1), True), plain) > 1e-2
