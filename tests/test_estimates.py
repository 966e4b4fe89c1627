"""Formulas against what PyTorch counts: parameters, operations, the tensors that autograd keeps, the allocator's peak."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from accel_pretrain import muon
from accel_pretrain.cluster import BUCKET_BYTES, LINK_SHARE, optimizer_seconds, sent_bytes, step_time
from accel_pretrain.config import RunConfig
from accel_pretrain.estimates import (
    Workload,
    activations,
    block_parameters,
    checkpoint_bytes,
    decayed,
    flops_per_token,
    memory,
    parameters,
    seen_positions,
    weight_copies,
)
from accel_pretrain.hardware import HARDWARE, Machine, free_disk, free_memory, here
from accel_pretrain.models import ModelConfig, Transformer, cpu_loss, head_loss
from accel_pretrain.optim import SGD, AdamW, AdamW8, AdamWScheduleFree, GaLore, Lion, Muon, Optimizer, kept_per_weight
from accel_pretrain.outlook import critical_batch, first_loss
from accel_pretrain.peaks import peak_of
from accel_pretrain.probe import probe
from accel_pretrain.rules import ByRules, begin_update, settle_in
from accel_pretrain.typed_yaml import load
from accel_pretrain.update_costs import newton_schulz_flops, with_update
from tests.running import REPO
from tests.test_config import PUBLISHED_SIZES

VOCAB = 1000
BASE = ModelConfig(context_length=64, d_model=96, num_layers=2, num_heads=4, d_ff=160, vocab_size=VOCAB)
GPT2 = {"norm": "layernorm", "bias": True, "position": "learned", "activation": "gelu_tanh", "tie_embeddings": True}
GEMMA2 = {
    "num_kv_heads": 2, "attention_softcap": 50.0, "logit_softcap": 30.0, "sandwich_norm": True, "activation": "geglu",
    "norm": "rmsnorm_1p", "tie_embeddings": True, "sliding_window": 16, "window_pattern": "SF", "scale_embeddings": True,
}  # fmt: skip
SHAPES = {
    "llama": {},
    "grouped": {"num_kv_heads": 2, "qkv_bias": True},
    "qwen3": {"num_kv_heads": 2, "qk_norm": True, "head_dim": 32},
    "gpt2": GPT2,
    "gpt2 with dropout": {**GPT2, "dropout": 0.1, "tie_embeddings": False},
    "gemma2": GEMMA2,
    "softcap and dropout": {"attention_softcap": 50.0, "dropout": 0.1},
    "sliding": {"sliding_window": 16, "sliding_rope_theta": 1e3},
    "modern": {
        "norm": "rmsnorm_plain", "activation": "relu2", "qk_norm": True, "logit_softcap": 15.0, "value_embeddings": True,
    },
    "sandwich of layer norms": {"norm": "layernorm", "qk_norm": True, "sandwich_norm": True, "dropout": 0.1},
}  # fmt: skip


SHORT = dataclasses.replace(BASE, context_length=8)  # so few logits that the loss is not computed in chunks
SHORT_GPT2 = dataclasses.replace(SHORT, **GPT2)


def shape(name: str) -> ModelConfig:
    return dataclasses.replace(BASE, **SHAPES[name])


def new_model(model: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    return Transformer(model, VOCAB).train()


def ids(model: ModelConfig, batch_size: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch_size, model.context_length + 1))


# -------------------------------------------------------------------------------------------- parameters and operations


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_and_operations_are_those_of_the_module(name: str):
    model = shape(name)
    with torch.device("meta"):
        module = Transformer(model, VOCAB)
    assert sum(parameters(model, VOCAB).values()) == module.num_parameters()
    assert decayed(model, VOCAB) == sum(p.numel() for p in module.parameters() if p.ndim >= 2)
    assert sum(flops_per_token(model, VOCAB).values()) == module.flops_per_token()


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_published_sizes(name: str):
    vocab_size, size = PUBLISHED_SIZES[name]
    assert sum(parameters(load(RunConfig, REPO / "configs" / f"{name}.yaml").model, vocab_size).values()) == size


@pytest.mark.parametrize("name", ["llama", "grouped", "gpt2", "gemma2"])
def test_forward_operations_are_a_third_of_what_torch_counts(name: str):
    model = dataclasses.replace(shape(name), sliding_window=None)  # the counter counts the whole of a masked product
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        batch = ids(model, 2)
        new_model(model)(batch[:, :-1], batch[:, 1:])
    counted = counter.get_total_flops()
    scores = 4 * model.num_heads * model.head_width * seen_positions(model, causal=False) * 128
    if counted < 0.99 * sum(flops_per_token(model, VOCAB).values()) / 3 * 128:
        counted += scores  # torch has no formula for the CPU's fused attention
    assert counted == pytest.approx(sum(flops_per_token(model, VOCAB).values()) / 3 * 128, rel=1e-6)


def test_a_window_is_seen_by_its_layers_only():
    T = 64
    full = seen_positions(dataclasses.replace(BASE, context_length=T))
    assert full == 2 * (T + 1) / 2
    model = dataclasses.replace(BASE, context_length=T, sliding_window=16, window_pattern="SF")
    by_hand = sum(min(position + 1, 16) for position in range(T)) / T
    assert seen_positions(model) == pytest.approx(by_hand + (T + 1) / 2)
    assert seen_positions(model, causal=False) == 16 + T
    assert sum(flops_per_token(model, VOCAB).values()) < sum(flops_per_token(BASE, VOCAB).values())


# --------------------------------------------------------------------------------------------------------------- memory


def kept_by_autograd(model: ModelConfig, batch_size: int, precision: str) -> int:
    """Bytes of the storages that a forward pass saves for the backward pass, parameters and tables left out."""
    module = new_model(model)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = ids(model, batch_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            nats_B = module(batch[:, :-1], batch[:, 1:])
    assert nats_B.shape == (batch_size,)
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_what_autograd_keeps(name: str, precision: str):
    model = shape(name)
    workload = Workload(model=model, vocab_size=VOCAB, batch_size=3, precision=precision)
    log_probabilities = 4 + (workload.width if model.logit_softcap is not None else 0)
    expected = activations(workload) + workload.tokens * VOCAB * log_probabilities + weight_copies(workload)
    assert kept_by_autograd(model, 3, precision) == pytest.approx(expected, rel=0.001)


def most_allocated(profiler: profile) -> int:
    """Bytes beyond what there was at first."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, now)
    return most


def peak_of_allocator(load: Workload, kind: Optimizer | None = None) -> int:
    """The most bytes that PyTorch had allocated during two updates, parameters and tables included."""
    module = new_model(load.model) if load.vocab_size == VOCAB else Transformer(load.model, load.vocab_size)
    module.recompute(load.checkpointing)  # type: ignore[arg-type]
    module.chunked_loss = load.chunked
    optimizer = (kind or AdamW()).build(module)
    settle_in(optimizer, load.precision, 1)
    standing = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    batch = torch.randint(load.vocab_size, (load.batch_size, load.model.context_length + 1))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(2):
            begin_update(optimizer, ready=lambda: None)
            for _ in range(load.accumulation):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=load.precision == "bf16"):
                    nats_B = module(batch[:, :-1], batch[:, 1:])
                nats_B.backward(gradient=torch.ones(load.batch_size))
                del nats_B
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return standing + most_allocated(profiler)


@pytest.mark.parametrize(
    ("words", "moment"),
    [
        ({"batch_size": 8}, "the loss"),
        ({"batch_size": 8, "precision": "bf16"}, "the loss"),
        ({"batch_size": 4, "accumulation": 2, "model": shape("gpt2 with dropout")}, "the loss"),
        ({"batch_size": 4, "model": shape("modern")}, "the loss"),
        ({"batch_size": 1, "vocab_size": 20_000}, "the loss"),
        ({"batch_size": 1, "vocab_size": 20_000, "model": SHORT}, "the end of the backward pass"),
        ({"batch_size": 1, "vocab_size": 20_000, "model": SHORT, "precision": "bf16"}, "the end of the backward pass"),
        ({"batch_size": 1, "vocab_size": 20_000, "model": shape("gpt2"), "precision": "bf16"}, "the loss"),
        ({"batch_size": 1, "vocab_size": 20_000, "model": SHORT_GPT2, "accumulation": 2}, "the end of the backward pass"),
        ({"batch_size": 32, "vocab_size": 20_000, "precision": "bf16"}, "the loss"),  # in several chunks
        ({"batch_size": 32, "vocab_size": 20_000, "model": shape("gemma2")}, "the loss"),
    ],
)
def test_the_peak_is_that_of_the_allocator(words: dict, moment: str):
    workload = Workload(**{"model": BASE, "vocab_size": VOCAB, **words})
    expected = memory(workload)
    assert expected.moment == moment
    assert peak_of_allocator(workload) == pytest.approx(expected.total, rel=0.02)


@pytest.mark.parametrize("rows", [512, 100])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_the_peak_of_a_loss_in_chunks(monkeypatch: pytest.MonkeyPatch, name: str, precision: str, rows: int):
    """What a GPU does, where it can be counted: on a CPU without the loss of its own."""
    monkeypatch.setattr(cpu_loss, "PAYS_FROM", 1 << 60)
    monkeypatch.setattr(head_loss, "_CHUNK_BYTES", 4 * 2_000 * rows)
    load = Workload(model=shape(name), vocab_size=2_000, batch_size=8, precision=precision, chunked=True)
    plain = dataclasses.replace(load, chunked=False)
    assert peak_of_allocator(load) == pytest.approx(memory(load).total, rel=0.02)
    if rows == 100:  # control
        assert memory(plain).total > 1.1 * memory(load).total


DEEP = dataclasses.replace(SHORT, num_layers=6, num_heads=1, head_dim=96, d_ff=384)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("model", [DEEP, dataclasses.replace(DEEP, d_ff=32)], ids=["wide", "square"])
def test_the_peak_of_muons_update(monkeypatch: pytest.MonkeyPatch, model: ModelConfig, precision: str):
    plain = Workload(model=model, vocab_size=VOCAB, batch_size=1, precision=precision)
    plain = dataclasses.replace(plain, moments=kept_per_weight(Muon(), model, VOCAB))
    load = with_update(plain, Muon())
    assert memory(load).moment == "the update"
    whole = peak_of_allocator(load, Muon())
    assert whole == pytest.approx(memory(load).total, rel=0.01)
    assert whole > 1.1 * memory(plain).total  # control: without what the update needs
    monkeypatch.setattr(muon, "CHUNK_BYTES", 4 * 96 * 96 * 5)
    less = peak_of_allocator(load, Muon())
    assert less < 0.9 * whole
    assert less == pytest.approx(memory(with_update(plain, Muon())).total, rel=0.01)


@pytest.mark.parametrize(
    "optimizer", [AdamW(), Lion(), AdamW8(), GaLore(projection_rank=8), AdamWScheduleFree()], ids=lambda own: own.name
)
def test_what_other_updates_need(optimizer: Optimizer):
    model = dataclasses.replace(DEEP, d_model=512, d_ff=512, num_layers=1)
    load = with_update(Workload(model=model, vocab_size=VOCAB, batch_size=1), optimizer)
    module = Transformer(model, VOCAB)
    built = optimizer.build(module)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    built.step()  # makes the moments
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        built.step()
    assert most_allocated(profiler) == pytest.approx(load.update_bytes, rel=0.05, abs=100)
    if isinstance(optimizer, Lion | AdamWScheduleFree):  # as the guard has it on a GPU
        assert isinstance(built, ByRules)
        built.found_inf = torch.zeros(())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            built.step()
        there = with_update(dataclasses.replace(load, device="cuda"), optimizer)
        assert most_allocated(profiler) == pytest.approx(there.update_bytes, rel=0.05, abs=100)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_peak_beside_weights_that_are_set_aside(batch_size: int):
    plain = Workload(model=DEEP, vocab_size=VOCAB, batch_size=batch_size)
    load = with_update(plain, AdamWScheduleFree())
    assert peak_of_allocator(load, AdamWScheduleFree()) == pytest.approx(memory(load).total, rel=0.02)
    assert memory(load).total > 1.1 * memory(plain).total  # control


def test_newton_schulz_is_what_torch_counts():
    with FlopCounterMode(display=False) as counter:
        muon.orthogonal(torch.randn(3, 24, 40))
    assert counter.get_total_flops() == 3 * newton_schulz_flops(40, 24)


def test_a_muon_update_takes_longer_where_it_is_not_shared_out():
    big = dataclasses.replace(BASE, d_model=1024, d_ff=4096, num_layers=24, num_heads=16, vocab_size=50_000)
    one = Workload(model=big, vocab_size=50_000, batch_size=1, precision="bf16", device="cuda")
    muons = dataclasses.replace(with_update(one, Muon()), moments=kept_per_weight(Muon(), big, 50_000))
    h100 = HARDWARE["h100"]
    of_adamw, of_muon = optimizer_seconds(one, h100) or 0.0, optimizer_seconds(muons, h100) or 0.0
    assert of_muon > 2 * of_adamw
    many = with_update(dataclasses.replace(one, world_size=8), Muon())
    assert many.update_flops == pytest.approx(muons.update_flops / 8, rel=0.02)
    assert optimizer_seconds(with_update(one, GaLore(projection_rank=256)), h100) > of_adamw  # type: ignore[operator]


def test_control_the_peak_without_logits_would_be_noticed():
    workload = Workload(model=BASE, vocab_size=VOCAB, batch_size=8)
    without = memory(workload).total - memory(workload).parts["logits"]
    assert peak_of_allocator(workload) > 1.2 * without


def test_shards_and_buckets():
    def total(**words: object) -> dict[str, int]:
        deep = dataclasses.replace(BASE, num_layers=8)
        return memory(Workload(model=deep, vocab_size=VOCAB, batch_size=1, **words)).parts  # type: ignore[arg-type]

    alone, ddp = total(), total(world_size=4)
    assert ddp["buckets of DDP"] == alone["weights"]  # they stay, and gradients that are accumulated stand beside them
    accumulated = total(world_size=4, accumulation=2)
    assert accumulated["gradients"] == accumulated["buckets of DDP"]
    zero2, fsdp2 = (total(world_size=4, strategy=strategy) for strategy in ("zero2", "fsdp2"))
    for sharded in (zero2, fsdp2):
        assert sharded["optimizer"] == pytest.approx(alone["optimizer"] / 4, rel=1e-5)
        assert sharded["weights"] == pytest.approx(alone["weights"] / 4, rel=1e-5)
    assert fsdp2["gathered weights"] < zero2["gathered weights"] == alone["weights"]
    whole, shares = (total(world_size=4, accumulation=2, strategy=strategy) for strategy in ("zero2", "fsdp2"))
    assert shares["gradients"] < whole["gradients"] == alone["weights"]


def test_a_checkpoint_is_weights_and_moments(tmp_path: Path):
    module = new_model(BASE)
    optimizer = AdamW().build(module)
    batch = ids(BASE, 1)
    module(batch[:, :-1], batch[:, 1:]).sum().backward()
    optimizer.step()
    torch.save((module.state_dict(), optimizer.state_dict()), tmp_path / "all")
    workload = Workload(model=BASE, vocab_size=VOCAB, batch_size=1)
    assert (tmp_path / "all").stat().st_size == pytest.approx(checkpoint_bytes(workload), rel=0.03)


# ---------------------------------------------------------------------------------------------------- loss, time, machines


@pytest.mark.parametrize("name", SHAPES)
def test_the_first_loss_of_a_new_model(name: str):
    model = dataclasses.replace(shape(name), dropout=0.0)
    batch = ids(model, 8)
    with torch.no_grad():
        measured = float(new_model(model)(batch[:, :-1], batch[:, 1:]).sum()) / (8 * 64)
    assert first_loss(model, VOCAB) == pytest.approx(measured, abs=0.05)


def test_the_first_loss_of_tied_and_scaled_embeddings_is_far_from_ln_v():
    model = dataclasses.replace(BASE, d_model=512, tie_embeddings=True, scale_embeddings=True)
    batch = ids(model, 4)
    with torch.no_grad():
        measured = float(new_model(model)(batch[:, :-1], batch[:, 1:]).sum()) / (4 * 64)
    assert measured > math.log(VOCAB) + 3
    assert first_loss(model, VOCAB) == pytest.approx(measured, abs=0.3)


def test_the_critical_batch_grows_with_a_run():
    assert critical_batch(10**8, 10**9) < critical_batch(10**8, 10**11) < critical_batch(10**10, 10**12)
    assert 10**5 < critical_batch(124_000_000, 300 * 10**9) < 10**7


def test_the_peaks_are_those_of_the_metrics():
    for key, machine in HARDWARE.items():
        assert machine.peak_bf16 == peak_of({"4090": "RTX 4090"}.get(key, key.upper()), "bf16")


def test_this_machine(tmp_path: Path):
    machine = here(cpu=True)
    assert machine.device == "cpu"
    assert machine.memory is None or machine.memory > 10**8
    assert free_memory() is None or (free_memory() or 0) > 10**8
    assert (free_disk(tmp_path / "not" / "yet") or 0) > 0


def test_what_devices_send():
    workload = Workload(model=BASE, vocab_size=VOCAB, batch_size=1, world_size=4, accumulation=3)
    P = workload.parameters
    assert sent_bytes(workload) == {"gradients (all-reduce)": round(2 * 3 / 4 * 4 * P)}
    inside = sum(own.numel() for own in new_model(BASE).layers.parameters())
    assert inside == block_parameters(workload)
    sharded = sent_bytes(dataclasses.replace(workload, strategy="fsdp2"))
    gathers, scatters = "weights (all-gather)", "gradients (reduce-scatter)"
    assert sharded == {gathers: round(3 * 3 / 4 * 4 * (P + inside)), scatters: round(3 * 3 / 4 * 4 * P)}
    assert sent_bytes(dataclasses.replace(workload, strategy="zero2")) == {
        key: round(3 / 4 * 4 * P) for key in (gathers, scatters)
    }
    assert sent_bytes(dataclasses.replace(workload, world_size=1)) == {}


def test_only_what_the_backward_pass_does_not_hide_is_waited_for():
    big = dataclasses.replace(BASE, d_model=2048, d_ff=8192)
    workload = Workload(model=big, vocab_size=VOCAB, batch_size=1, world_size=8)
    machine = Machine(name="x", device="cuda", link=100e9)
    slow, fast = (step_time(workload, machine, seconds, 0.01) for seconds in (10.0, 0.001))
    assert slow is not None
    assert fast is not None
    assert slow.exposed < 0.2 * slow.communication
    assert fast.exposed > 0.9 * fast.communication
    assert slow.communication == pytest.approx(sent_bytes(workload)["gradients (all-reduce)"] / (LINK_SHARE * 100e9), rel=0.2)
    assert slow.seconds == pytest.approx(10.01 + slow.exposed)
    assert 4 * workload.parameters > BUCKET_BYTES
    assert step_time(workload, Machine(name="x", device="cuda"), 1.0, 0.1) is None  # no link known


def test_the_probe_times_real_updates():
    workload = Workload(model=BASE, vocab_size=VOCAB, batch_size=2)
    before = torch.random.get_rng_state()
    speed = probe(workload, AdamW(), torch.device("cpu"), seconds=0.2)
    assert not isinstance(speed, str)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (speed.sequences, speed.layers) == (2, 2)
    assert 0 < speed.seconds_per_update(1) < 5
    assert speed.seconds_per_update(3) == pytest.approx(3 * speed.micro_step + speed.optimizer)


def test_the_probe_does_with_less_or_says_why_not():
    deep = dataclasses.replace(BASE, num_layers=40, d_model=256, context_length=256)
    speed = probe(Workload(model=deep, vocab_size=VOCAB, batch_size=64), SGD(), torch.device("cpu"), seconds=0.05)
    assert not isinstance(speed, str)
    assert speed.sequences < 64
    refused = probe(Workload(model=deep, vocab_size=VOCAB, batch_size=1), AdamW(), torch.device("cpu"), free=10**6)
    assert isinstance(refused, str)
    assert "need" in refused
