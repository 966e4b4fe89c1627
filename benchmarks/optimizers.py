"""What each optimizer keeps, how low it comes, and how few tokens Muon needs: ``python -m benchmarks.optimizers``.

A small Transformer learns the bytes of the Python standard library's source code. Every optimizer has the same model, batches
and schedule (linear warm-up, then linear to nearly 0; for schedule_free, a rate that stays), and the best of its learning
rates, AdamW's too; the table gives the validation loss of that one, mean and standard error over the seeds. Muon then runs
with a part of AdamW's updates and the schedule for that many: the least part that comes as low is its share of tokens. A best
rate that is the first or the last is said to be so: a better one may lie beyond, and Muon's share is not looked for. On a CPU,
10 to 50 minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.optim import AdamW, AdamW8, AdamWScheduleFree, GaLore, Lion, Muon, Optimizer, set_lr
from accel_pretrain.rules import begin_update, settle_in

VOCAB, T, B = 256, 64, 16
RATES: dict[str, tuple[float, ...]] = {
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3), "muon": (2e-3, 4e-3, 8e-3, 1.6e-2), "lion": (1e-4, 2e-4, 4e-4, 8e-4),
    "adamw8": (1e-3, 2e-3, 4e-3, 8e-3), "galore": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "schedule_free": (1e-3, 2e-3, 4e-3, 8e-3),
}  # fmt: skip
NOT_BRACKETED = "at the edge of the grid: not bracketed"
PARTS = (0.4, 0.5, 0.6, 0.75)


@dataclass(frozen=True)
class Outcome:
    """Validation loss in nats per byte, milliseconds of an update in the optimizer, float32 numbers kept per parameter."""

    loss: float
    milliseconds: float
    kept: float


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on, and bytes to validate on."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    ids = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    return ids[: -len(ids) // 20], ids[-len(ids) // 20 :]


def shape(width: int, layers: int = 3, mup_base_width: int | None = None) -> ModelConfig:
    """Heads are 32 wide, whatever the width of the model."""
    return ModelConfig(
        context_length=T, d_model=width, num_layers=layers, num_heads=width // 32, d_ff=4 * width, activation="relu2",
        qk_norm=True, mup_base_width=mup_base_width,
    )  # fmt: skip


def batch(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(ids) - T, (B,), generator=generator)
    return torch.stack([ids[start : start + T + 1] for start in starts.tolist()]).long()


def nats(model: Transformer, ids_BS: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        nats_B = model(ids_BS[:, :-1], ids_BS[:, 1:])
    return nats_B.sum() / (B * T)


def train(model_config: ModelConfig, optimizer: Optimizer, updates: int, seed: int) -> Outcome:
    """One run from a seed."""
    learn, hold = corpus()
    torch.manual_seed(seed)
    model = Transformer(model_config, VOCAB)
    built, own, spent = optimizer.build(model), torch.Generator().manual_seed(seed), 0.0
    settle_in(built, "bf16", 1)
    for step in range(updates):
        falling = 1.0 if optimizer.name == "schedule_free" else (updates - step) / (0.9 * updates)
        set_lr(built, optimizer.lr * min((step + 1) / (0.1 * updates), falling))
        begin_update(built, ready=lambda: None)
        nats(model, batch(learn, own)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        begin = time.perf_counter()
        built.step()
        spent += time.perf_counter() - begin
        built.zero_grad()
    fixed = torch.Generator().manual_seed(0)
    with torch.no_grad():
        loss = statistics.fmean(nats(model, batch(hold, fixed)).item() for _ in range(40))
    kept = sum(own.nbytes for state in built.state.values() for own in state.values()) / 4 / model.num_parameters()
    return Outcome(loss, spent / updates * 1000, kept)


def bracketed(losses: Mapping[float, float]) -> bool:
    """Whether the best rate has worse ones on both sides."""
    return min(losses, key=lambda rate: losses[rate]) not in (min(losses), max(losses))


def optimizers() -> dict[str, Optimizer]:
    return {"adamw": AdamW(), "muon": Muon(), "lion": Lion(), "adamw8": AdamW8(), "galore": GaLore(),
            "schedule_free": AdamWScheduleFree(beta1=0.95)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(RATES))
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    words = parser.parse_args()
    torch.set_num_threads(1)
    model, found, best = shape(words.width), {}, {}
    print("optimizer  best lr  loss             memory of AdamW's  ms per update", flush=True)
    for name, plain in optimizers().items():
        if name not in words.only:
            continue
        tried = {lr: train(model, replace(plain, lr=lr), words.updates, seed=0) for lr in RATES[name]}
        lr = min(tried, key=lambda rate: tried[rate].loss)
        known = bracketed({rate: run.loss for rate, run in tried.items()})
        best[name] = replace(plain, lr=lr)
        runs = [tried[lr], *(train(model, best[name], words.updates, seed) for seed in range(1, words.seeds))]
        losses = [run.loss for run in runs]
        error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
        found[name] = {"lr": lr, "losses": losses, "memory": runs[0].kept / 2, "ms": runs[0].milliseconds}
        found[name]["bracketed"] = known
        print(
            f"{name:<10} {lr:<8g} {statistics.fmean(losses):.4f} ± {error:.4f}  {runs[0].kept / 2:<18.3f} "
            f"{runs[0].milliseconds:<6.1f} {'' if known else NOT_BRACKETED}", flush=True,
        )  # fmt: skip
    if all(name in found and found[name]["bracketed"] for name in ("adamw", "muon")):
        wanted = statistics.fmean(found["adamw"]["losses"])
        for part in PARTS:
            losses = [train(model, best["muon"], round(part * words.updates), seed).loss for seed in range(words.seeds)]
            found[f"muon with {part:g} of the tokens"] = {"losses": losses}
            print(f"muon with {part:g} of AdamW's tokens: {statistics.fmean(losses):.4f}, AdamW {wanted:.4f}", flush=True)
            if statistics.fmean(losses) <= wanted:
                break
    if words.out:
        words.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
