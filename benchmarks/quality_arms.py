"""What :mod:`benchmarks.quality` compares: the text, the baselines, our recipe, and what that is made of."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from accel_pretrain.config import RunConfig, flat
from benchmarks.quality_race import Arm, Settings

RECIPE = Path(__file__).parent.parent / "configs" / "speedrun_cpu.yaml"
CHUNK, CHUNKS = 1024, 64  # of the held-out text: any context length that divides a chunk sees the same tokens

# GPT-2 as nanoGPT has it: LayerNorm, learned positions, tied output, no biases (its default), AdamW with cosine to a tenth.
_GPT2: dict[str, Any] = {
    "model.norm": "layernorm", "model.activation": "gelu", "model.position": "learned", "model.bias": False,
    "model.tie_embeddings": True, "model.d_ff": None, "training.grad_clip": 1.0,
    "optimizer.name": "adamw", "optimizer.weight_decay": 0.1, "optimizer.beta1": 0.9, "schedule.name": "cosine",
}  # fmt: skip
# Its config/train_shakespeare_char.py, for a GPU; and what its README says for a CPU (there in 2000 updates).
_BABY = {
    "model.d_model": 384, "model.num_layers": 6, "model.num_heads": 6, "model.context_length": 256,
    "training.batch_size": 64, "optimizer.beta2": 0.99,
}  # fmt: skip
_CPU = {
    "model.d_model": 128, "model.num_layers": 4, "model.num_heads": 4, "model.context_length": 64,
    "training.batch_size": 12, "optimizer.beta2": 0.99, "schedule.warmup_iters": 100,
}  # fmt: skip

# For each corpus the baseline, with the learning rate of 1.25e-3, 2.5e-3, 5e-3 and 1e-2 that comes furthest: see --figure tune.
BASELINES: dict[str, dict[str, Any]] = {
    "code": _GPT2 | _CPU | {"optimizer.lr": 5e-3},
    "text": _GPT2 | _CPU | {"optimizer.lr": 5e-3},
}
# Where the recipe differs: with thousands of ids, what is done for each of them is most of the time.
RECIPE_CHANGES: dict[str, dict[str, Any]] = {
    "code": {"model.tie_embeddings": True, "model.value_embeddings": False, "model.logit_softcap": None},
    "text": {},
}
ADAMW_RATES = (5e-4, 1e-3, 2e-3)  # of matrices, for Muon's rival on the recipe's model
ADAMW_BEST = 1e-3
GRID = (1.25e-3, 2.5e-3, 5e-3, 1e-2)  # learning rates of the baseline


def baseline(corpus: str) -> Arm:
    return Arm("baseline", BASELINES[corpus])


def recipe(corpus: str, share: float = 1.0) -> Arm:
    """configs/speedrun_cpu.yaml, without what says where and for how long."""
    document = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    found = {f"{section}.{key}": value for section, values in document.items() for key, value in values.items()}
    left_out = ("data.", "evaluation.", "checkpoint.", "logging.", "training.max_iters", "training.mixed_precision")
    own = {key: value for key, value in found.items() if not key.startswith(left_out)}
    return Arm("recipe", own, share).but("recipe", RECIPE_CHANGES[corpus])


def with_adamw(muon: Arm, rate: float) -> Arm:
    """The same with AdamW in Muon's place, ``rate`` for matrices; embeddings keep theirs."""
    embedding = muon.settings["optimizer.lr"] * muon.settings["optimizer.embedding_lr_scale"]
    return muon.but(f"adamw {rate:g}", {
        "optimizer.name": "adamw", "optimizer.lr": rate, "optimizer.embedding_lr_scale": embedding / rate,
        "optimizer.beta2": muon.settings["optimizer.beta2"],
    })  # fmt: skip


@dataclass(frozen=True)
class Ingredient:
    """One difference between baseline and recipe, by its keys; a section with a dot at its end stands for all of its keys."""

    name: str
    keys: tuple[str, ...]

    def part(self, settings: Settings) -> dict[str, Any]:
        """What ``settings`` say of it, and the package's defaults where they say nothing."""
        defaults = flat(RunConfig())
        found = {key: settings.get(key, defaults[key]) for key in self.keys if not key.endswith(".")}
        for section in (key for key in self.keys if key.endswith(".")):
            found |= {f"{section}name": defaults[f"{section}name"]}
            found |= {key: value for key, value in settings.items() if key.startswith(section)}
        return found


INGREDIENTS = (
    Ingredient("shape", ("model.d_model", "model.num_layers", "model.num_heads", "model.d_ff")),
    Ingredient("context and batch", ("model.context_length", "training.batch_size")),
    Ingredient("RoPE", ("model.position",)),
    Ingredient("RMSNorm", ("model.norm",)),
    Ingredient("ReLU²", ("model.activation",)),
    Ingredient("QK-norm", ("model.qk_norm",)),
    Ingredient("zero init", ("model.zero_init",)),
    Ingredient("untied output", ("model.tie_embeddings",)),
    Ingredient("value embeddings", ("model.value_embeddings",)),
    Ingredient("soft cap", ("model.logit_softcap",)),
    Ingredient("optimizer", ("optimizer.",)),
    Ingredient("faster embeddings", ("optimizer.embedding_lr_scale",)),
    Ingredient("schedule", ("schedule.",)),
    Ingredient("clipping", ("training.grad_clip",)),
)


def ingredient_arms(corpus: str) -> list[Arm]:
    """The baseline, and with each ingredient of the recipe; the recipe, and without each. AdamW has a rate that suits."""
    plain, ours = baseline(corpus), recipe(corpus)
    added, removed = [], []
    for ingredient in INGREDIENTS:
        new, old = ingredient.part(ours.settings), ingredient.part(plain.settings)
        if new == old:
            continue
        added.append(plain.but(f"+ {ingredient.name}", new))
        without = with_adamw(ours, ADAMW_BEST) if ingredient.name == "optimizer" else ours.but("", old)
        removed.append(replace(without, name=f"- {ingredient.name}"))
    return [plain, *added, ours, *removed]


def tune_arms(corpus: str) -> list[Arm]:
    """Both published baselines at every rate of the grid; the recipe at rates around its own."""
    shapes = {"baby": Arm("", _GPT2 | _BABY), "cpu": Arm("", _GPT2 | _CPU)}
    ours = recipe(corpus, 0.5)
    arms = [Arm(f"{name} lr {lr:g}", {**arm.settings, "optimizer.lr": lr}) for name, arm in shapes.items() for lr in GRID]
    rates = [ours.settings["optimizer.lr"] * times for times in (0.5, 1, 2)]
    return [*arms, *(ours.but(f"recipe lr {lr:g}", {"optimizer.lr": lr}) for lr in rates)]


# -------------------------------------------------------------------------------------------------------------- the text


def prepare(folder: Path, corpus: str, text: Path | None, tokenizer: str) -> dict[str, Any]:
    """Make the dataset of a corpus, or take the one that is there: where its tokens are, as settings.

    ``code``: the standard library of this Python, in BPE; ``text``: the bytes of a file, the last tenth held out.
    """
    home = folder / corpus
    source = ["--demo"] if corpus == "code" else [str(text), "--val", "10%"]
    ids = tokenizer if corpus == "code" else "bytes"
    if not (home / "manifest.json").exists():
        command = [sys.executable, "-m", "prep.tokenize", *source, "-o", str(home), "--tokenizer", ids]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    held_out = folder / f"{corpus}_held_out.bin"
    if not held_out.exists():
        write_held_out(home / "val.bin", held_out)
    return {"data.train_data_path": home, "data.val_data_path": held_out}


def write_held_out(val: Path, path: Path) -> None:
    """Evenly spaced chunks of the val split, and one id more, so that windows of any length see each target once."""
    ids = np.fromfile(val, dtype="<u2")
    chunks = min(CHUNKS, (ids.size - 1) // CHUNK)
    starts = np.linspace(0, ids.size - 1 - CHUNK, chunks).astype(np.int64)
    np.concatenate([*(ids[start : start + CHUNK] for start in starts), ids[-1:]]).tofile(path)
