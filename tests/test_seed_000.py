"""The ten checks that a first training script has to pass, in the order in which one builds it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from accel_pretrain.checkpoint import load_model, read_state
from accel_pretrain.config import RunConfig
from accel_pretrain.data import Batch, TokenBatches
from accel_pretrain.loss import next_token_loss
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.optim import AdamW, set_lr
from accel_pretrain.schedule import Cosine
from accel_pretrain.shards import open_split
from accel_pretrain.train import main
from accel_pretrain.typed_yaml import load, parse_command_line

B, T, V = 4, 16, 64
CONFIG = ModelConfig(context_length=T, d_model=64, num_layers=2, num_heads=4, d_ff=128)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bare files of uint16 ids, each id mostly the one before plus one: there is something to learn."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for name, size in (("train.ids", 20_000), ("val.ids", 2_000)):
        steps = np.where(random.random(size) < 0.9, 1, random.integers(0, V, size))
        (np.cumsum(steps) % V).astype(np.uint16).tofile(folder / name)
    return folder


def one_batch(data: Path) -> Batch:
    reader = TokenBatches(open_split(data / "train.ids", "train"), context_length=T, batch_size=B, seed=0)
    return reader.micro_batches(0)[0]


def build(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(CONFIG, V)


def mean_loss(model: Transformer, batch: Batch) -> torch.Tensor:
    return model(batch.inputs_BT, batch.targets_BT).sum() / batch.targets_BT.numel()


def train(data: Path, run: Path, *, max_iters: int, checkpoint_interval: int = 1000, seed: int = 42) -> int:
    return main(
        f"--train_data_path {data}/train.ids --val_data_path {data}/val.ids --vocab_size {V} --context_length {T} --d_model 64 "
        f"--num_layers 2 --num_heads 4 --d_ff 128 --batch_size 8 --lr 3e-3 --max_iters {max_iters} --checkpoint_dir {run} "
        f"--checkpoint_interval {checkpoint_interval} --log_interval 5 --eval_interval 50 --eval_iters 4 --device cpu "
        f"--keep_last null --mixed_precision no --schedule.name constant --seed {seed}".split()
    )


def rows(run: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in lines if key in row}


def test_01_config_system(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("training:\n  batch_size: 64\noptimizer:\n  lr: 6.0e-4\n")
    assert load(RunConfig, path).training.batch_size == 64
    line = parse_command_line(RunConfig, ["--config", str(path), "--training.batch_size", "128"])
    config = load(RunConfig, line.config, line.overrides)
    assert config.training.batch_size == 128
    assert type(config.training.batch_size) is int
    assert config.optimizer.lr == 6e-4


def test_02_initialization():
    model = build()
    by_hand = 2 * V * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert model.num_parameters() == by_hand
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_03_data_pipeline(data: Path):
    batch = one_batch(data)
    assert batch.inputs_BT.shape == batch.targets_BT.shape == (B, T)
    assert torch.equal(batch.inputs_BT[:, 1:], batch.targets_BT[:, :-1])
    assert not torch.equal(batch.inputs_BT, batch.targets_BT)
    assert 0 <= int(batch.ids_BS.min()) <= int(batch.ids_BS.max()) < V


def test_04_forward_pass(data: Path):
    assert build()(one_batch(data).inputs_BT).shape == (B, T, V)


def test_05_loss_computation(data: Path):
    model, batch = build(), one_batch(data)
    logits_BTV = model(batch.inputs_BT)
    loss = next_token_loss(logits_BTV, batch.targets_BT).sum() / (B * T)
    flattened = torch.nn.functional.cross_entropy(logits_BTV.reshape(B * T, V), batch.targets_BT.reshape(B * T))
    assert loss.ndim == 0
    torch.testing.assert_close(loss, flattened)
    assert loss.item() == pytest.approx(math.log(V), rel=0.05)


def test_06_backward_pass(data: Path):
    model = build()
    assert all(parameter.grad is None for parameter in model.parameters())
    mean_loss(model, one_batch(data)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert 0 < parameter.grad.abs().max() < math.inf, name


def test_07_full_step(data: Path):
    model, batch = build(), one_batch(data)
    optimizer = AdamW(lr=1e-3).build(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.zero_grad()
    mean_loss(model, batch).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    after = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert norm > 0.5
    assert after.item() == pytest.approx(0.5, rel=1e-3)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_08_multiple_iterations(data: Path):
    def losses(peak: float) -> list[float]:
        model, batch, found = build(), one_batch(data), []
        optimizer, schedule = AdamW(lr=1.0).build(model), Cosine(warmup_iters=2)
        for step in range(1, 11):
            set_lr(optimizer, schedule.lr(step, peak, 10))
            optimizer.zero_grad()
            loss = mean_loss(model, batch)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    learning = losses(1e-2)
    assert learning[-1] < 0.7 * learning[0]
    assert len(set(learning)) == 10
    assert len(set(losses(0.0))) == 1  # control: the rate of the schedule is the one that is used


def test_09_checkpoint_cycle(data: Path, tmp_path: Path):
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert train(data, run, max_iters=5) == 0
    checkpoint = run / "checkpoint_00000005"
    assert (read_state(checkpoint).step, read_state(checkpoint).samples) == (5, 40)
    saved = load_model(run).state_dict()
    assert not torch.equal(build().state_dict()["embed_tokens.weight"], saved["embed_tokens.weight"])

    assert train(data, run, max_iters=10) == 0  # goes on from 5
    assert train(data, straight, max_iters=10) == 0
    resumed, expected = load_model(run).state_dict(), load_model(straight).state_dict()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert rows(run, "train/loss")[10] == rows(straight, "train/loss")[10]
    assert not torch.equal(
        resumed["embed_tokens.weight"], saved["embed_tokens.weight"]
    )  # control: five updates make a difference


def test_10_full_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "not" / "yet" / "there"
    assert train(data, run, max_iters=100, checkpoint_interval=40) == 0
    complete = sorted(path.parent.name for path in run.glob("checkpoint_*/manifest.json"))
    assert complete == [f"checkpoint_{step:08d}" for step in (40, 50, 80, 100)]  # 50 was the best so far
    assert (run / "latest").read_text().strip() == "checkpoint_00000100"
    losses = rows(run, "train/loss")
    assert list(losses) == list(range(5, 101, 5))
    assert losses[5] > 3
    assert losses[100] < 0.6 * losses[5]
    assert rows(run, "eval/val_loss").keys() == {50, 100}
    assert rows(run, "final/val_loss")[100] < 2.5
    assert load_model(run)(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, V)
    printed = capsys.readouterr().out
    assert "Total parameters: " in printed
    assert "Iter    100 | Loss: " in printed
    assert "Evaluating at iteration 50..." in printed
