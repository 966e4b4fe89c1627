"""Activation checkpointing against none: losses and gradients, with dropout, compiled, and under DDP; and what it saves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accel_pretrain import train
from accel_pretrain.config import RunConfig, make_plan
from accel_pretrain.estimates import Workload, memory
from accel_pretrain.models import ModelConfig, Transformer, recompute
from accel_pretrain.outlook import unknown_splits, workload
from accel_pretrain.runtime import TrainingConfig
from tests import test_estimates
from tests.running import TINY, losses, newest, run_processes, stdlib_text, weights_and_moments, write_dataset

VOCAB = 300
BASE = ModelConfig(context_length=48, d_model=64, num_layers=3, num_heads=4, d_ff=96, vocab_size=VOCAB)
SHAPES = {
    "llama": {},
    "gpt2": {"norm": "layernorm", "bias": True, "position": "learned", "activation": "gelu_tanh", "tie_embeddings": True},
    "gemma2": {
        "num_kv_heads": 2, "attention_softcap": 50.0, "sandwich_norm": True, "activation": "geglu", "sliding_window": 16,
        "window_pattern": "SF",
    },
    "modern": {"norm": "rmsnorm_plain", "activation": "relu2", "qk_norm": True, "value_embeddings": True},
}  # fmt: skip
LEVELS = ("selective", "full")


def model_of(name: str, level: recompute.Level, dropout: float) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(replace(BASE, **SHAPES[name], dropout=dropout), VOCAB).train()
    model.recompute(level)
    return model


def loss_and_gradients(model: Transformer, *, bf16: bool = False) -> list[torch.Tensor]:
    """Of one micro-batch, with the dropout masks of one seed."""
    ids_BS = torch.randint(VOCAB, (3, 49), generator=torch.Generator().manual_seed(1))
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        nats_B = model(ids_BS[:, :-1], ids_BS[:, 1:])
    nats_B.backward(gradient=torch.full((3,), 1 / 144))
    return [nats_B.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative error of any of the tensors."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_as_without(name: str, level: recompute.Level, dropout: float, bf16: bool):
    plain = loss_and_gradients(model_of(name, "none", dropout), bf16=bf16)
    again = loss_and_gradients(model_of(name, level, dropout), bf16=bf16)
    assert len(plain) == len(again) > 20
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_control_other_masks_the_second_time_are_seen(level: recompute.Level, monkeypatch: pytest.MonkeyPatch):
    plain = loss_and_gradients(model_of("llama", "none", 0.2))
    real = recompute.checkpoint
    monkeypatch.setattr(recompute, "checkpoint", lambda *words, **more: real(*words, preserve_rng_state=False, **more))
    forgetful = loss_and_gradients(model_of("llama", level, 0.2))
    assert torch.equal(forgetful[0], plain[0])
    assert apart(forgetful, plain) > 1e-2


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_in_place(caplog: pytest.LogCaptureFixture):
    """In float32; in bfloat16 the compiler rounds at other places for every choice of what to keep."""
    models = [model_of("llama", level, 0.1) for level in ("none", "selective")]
    for model in models:
        del model.layers[1:]
        model.layers[0].compile()
    plain, again = map(loss_and_gradients, models)
    assert apart(again, plain) < 1e-6
    models[1].dropout.p = 0.0
    assert apart(loss_and_gradients(models[1]), plain) > 1e-3  # control: masks matter
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "dropout"])
def test_the_plan_predicts_the_peak(name: str, level: recompute.Level, bf16: bool):
    model, precision = replace(BASE, num_layers=6, **(SHAPES.get(name) or {"dropout": 0.1})), "bf16" if bf16 else "no"
    load = Workload(model=model, vocab_size=test_estimates.VOCAB, batch_size=12, precision=precision, checkpointing=level)
    measured = test_estimates.peak_of_allocator(load)
    assert measured == pytest.approx(memory(load).total, rel=0.08)
    assert measured < 0.9 * memory(replace(load, checkpointing="none")).total  # control: it does save


def test_the_plan_knows_what_a_config_says():
    config = RunConfig(model=BASE, training=TrainingConfig(activation_checkpointing="full", max_iters=10))
    plan = make_plan(config, unknown_splits(config), 1)
    assert workload(config, plan, "cuda").checkpointing == "full"


def test_levels_are_seen_and_evaluation_has_none():
    model = model_of("llama", "full", 0.0)
    assert [layer.checkpointing for layer in model.layers] == ["full"] * 3
    with torch.no_grad():
        assert not model(torch.zeros(1, 8, dtype=torch.int64)).requires_grad


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = stdlib_text(60_000)
    return write_dataset(tmp_path_factory.mktemp("data") / "bytes", text[:50_000], text[50_000:])


@pytest.mark.slow
def test_a_run_on_two_processes_takes_the_same_course(dataset: Path, tmp_path: Path):
    words = [*TINY, "--train_data_path", str(dataset), "--global_batch_size", "16", "--max_iters", "4", "--dropout", "0.1"]
    assert train.main([*words, "--checkpoint_dir", str(tmp_path / "one")]) == 0
    own = ["--checkpoint_dir", str(tmp_path / "two"), "--activation_checkpointing", "selective"]
    done = run_processes([*words, *own], processes=2)
    assert done.returncode == 0, done.stderr
    assert "Processes: 2" in done.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    one, two = (weights_and_moments(newest(tmp_path / name)) for name in ("one", "two"))
    assert (
        apart([two[name] for name in sorted(two) if "step" not in name], [one[n] for n in sorted(one) if "step" not in n])
        < 1e-4
    )
