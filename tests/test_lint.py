"""Every kind of mistake is found where it is planted, says what to type, and is not seen in any config that we ship."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel_pretrain import lint_run, lint_settings
from accel_pretrain.config import RunConfig, Splits
from accel_pretrain.hardware import Machine
from accel_pretrain.lint import findings, notices
from accel_pretrain.lint_settings import Finding
from accel_pretrain.mixture import join
from accel_pretrain.outlook import Outlook, Pace, look_ahead
from accel_pretrain.parallel import ParallelConfig
from accel_pretrain.shards import TokenSplit
from accel_pretrain.typed_yaml import load, parse_command_line
from tests.test_config import CONFIGS, PUBLISHED_SIZES

GPU = Machine(name="a GPU", device="cuda", memory=80 * 10**9)
OLD_GPU = dataclasses.replace(GPU, has_bf16=False)
SMALL_GPU = dataclasses.replace(GPU, memory=2 * 10**9)
ROOMY_GPU = dataclasses.replace(GPU, memory=10**12)  # Gemma 2's scores at 8192 positions alone take more than 80 GB
CPU = Machine(name="a CPU", device="cpu", memory=10**12)
BIG = "--vocab_size 32000 --max_iters 20000 --batch_size 64"  # large enough that everything matters


def split(tokens: int = 10**7, *, largest: int = 256, print_: str = "train", documents: int | None = None) -> TokenSplit:
    about = {"name": "bytes", "vocab_size": largest + 1, "eot_id": largest, "fingerprint": "bytes"}
    files = (np.zeros(tokens, dtype=np.uint16),)
    return TokenSplit(source=print_, files=files, max_id=largest, fingerprint=print_, tokenizer=about, documents=documents)


TRAIN, VAL = split(), split(10**6, print_="val")


def outlook(words: str, *, train: TokenSplit | None = None, val: TokenSplit | None = None, **known: Any) -> Outlook:
    """The outlook on a run; ``train`` makes it one whose data is here."""
    config = load(RunConfig, None, parse_command_line(RunConfig, words.split()).overrides)
    pace, disk_free = known.pop("pace", None), known.pop("disk_free", None)
    found = look_ahead(config, Splits(train, val or VAL) if train else None, **known)
    return dataclasses.replace(found, pace=Pace(pace, "said so") if pace else None, disk_free=disk_free)


def kinds(o: Outlook) -> set[str]:
    return {finding.kind for finding in findings(o)}


MISTAKES: list[tuple[str, str, dict[str, Any]]] = [
    ("log_beyond_end", "--vocab_size 256 --max_iters 99", {}),
    ("interval_order", "--vocab_size 256 --eval_interval 6000", {}),
    ("eval_beyond_end", "--vocab_size 256 --max_iters 2000 --eval_interval 3000", {}),
    ("log_every_update", "--vocab_size 256 --log_interval 1", {}),
    ("checkpoint_too_often", "--vocab_size 256 --checkpoint_interval 5 --eval_interval 5 --log_interval 1", {}),
    ("sample_too_often", "--vocab_size 256 --sample_interval 10", {}),
    ("warmup_most", "--vocab_size 256 --max_iters 1000 --warmup_iters 900", {}),
    ("warmup_none", f"{BIG} --warmup_iters 0", {}),
    ("min_lr_high", f"{BIG} --lr 6e-4 --min_lr 5e-4", {}),
    ("never_decays", f"{BIG} --schedule.name constant", {}),
    ("decay_short", f"{BIG} --schedule.name wsd --decay_iters 10", {}),
    ("schedule_free_falls", f"{BIG} --optimizer.name schedule_free", {}),
    ("sgd", f"{BIG} --optimizer.name sgd", {}),
    ("betas_swapped", f"{BIG} --beta1 0.95 --beta2 0.9", {}),
    ("beta1_low", f"{BIG} --beta1 0", {}),
    ("beta2_long", "--vocab_size 256 --max_iters 1000 --beta2 0.999", {}),
    ("beta2_low", f"{BIG} --beta1 0.5 --beta2 0.6", {}),
    ("eps_large", f"{BIG} --eps 1e-3", {}),
    ("eps_small", f"{BIG} --eps 1e-30", {}),
    ("weight_decay_none", f"{BIG} --weight_decay 0", {}),
    ("weight_decay_large", f"{BIG} --weight_decay 1", {}),
    ("lr_high", f"{BIG} --lr 0.02", {}),
    ("lr_low", f"{BIG} --lr 1e-6", {}),
    ("no_clip", f"{BIG} --grad_clip null", {}),
    ("clip_tiny", f"{BIG} --grad_clip 0.001", {}),
    ("clip_huge", f"{BIG} --grad_clip 1e6", {}),
    ("head_dim", f"{BIG} --num_heads 64", {}),
    ("head_dim", f"{BIG} --num_heads 1", {}),
    ("d_ff_odd", f"{BIG} --d_ff 256", {}),
    ("aspect", f"{BIG} --num_layers 200", {}),
    ("mup_d_ff", f"{BIG} --mup_base_width 128 --d_ff 1024", {}),
    ("mup_heads", f"{BIG} --mup_base_width 256 --d_model 1024 --num_heads 4", {}),
    ("mup_heads", f"{BIG} --mup_base_width 512 --d_model 1024 --num_heads 8", {}),
    ("muon_costly", f"{BIG} --optimizer.name muon --context_length 128 --batch_size 8", {}),
    ("rope_theta_small", f"{BIG} --context_length 32768 --batch_size 1", {}),
    ("window_idle", f"{BIG} --sliding_window 4096", {}),
    ("window_idle", f"{BIG} --sliding_window 64 --window_pattern F", {}),
    ("init_std", f"{BIG} --init_std 1", {}),
    ("tied_and_scaled", f"{BIG} --d_model 2048 --tie_embeddings --scale_embeddings", {}),
    ("norm_eps", f"{BIG} --norm_eps 0.1", {}),
    ("logit_softcap_low", f"{BIG} --logit_softcap 2", {}),
    ("attention_softcap_low", f"{BIG} --attention_softcap 2", {}),
    ("dropout_high", f"{BIG} --dropout 0.9", {}),
    ("batch_huge", f"{BIG} --global_batch_size 65536", {}),
    ("batch_tiny", f"{BIG} --batch_size 1", {}),
    ("tokens_few", "--vocab_size 32000 --d_model 2048 --num_layers 24 --max_iters 1000", {}),
    ("tokens_many", "--vocab_size 256 --d_model 64 --num_layers 2 --d_ff 256 --max_iters 1000000", {}),
    ("passes_many", "--max_iters 20000", {"train": split(5 * 10**7)}),
    ("passes_useless", "--max_iters 20000", {"train": split(10**6)}),
    ("dropout_one_pass", "--max_iters 100 --dropout 0.1", {"train": TRAIN}),
    ("sampling_random", "--epochs 1 --sampling random", {"train": TRAIN}),
    ("mixture_repeats", "--epochs 1", {"train": join([split(10**5), split(10**7, print_="b")], (1, 1))}),
    ("val_is_train", "--epochs 1", {"train": TRAIN, "val": TRAIN}),
    ("vocab_unused", "--epochs 1 --vocab_size 50304", {"train": TRAIN}),
    ("context_long", "--epochs 1 --context_length 4096", {"train": split(documents=10**6)}),
    ("val_small", "--epochs 1", {"train": TRAIN, "val": split(2000, print_="val")}),
    ("eval_costly", f"{BIG} --eval_interval 50", {}),
    ("threads", f"{BIG} --cpu_threads 1000", {"machine": CPU}),
    ("fp16", f"{BIG} --mixed_precision fp16", {"machine": GPU}),
    ("float32", f"{BIG} --mixed_precision no", {"machine": GPU}),
    ("bf16_missing", f"{BIG} --mixed_precision bf16", {"machine": OLD_GPU}),
    ("vocab_odd", f"{BIG} --vocab_size 50257", {"machine": GPU}),
    ("width_odd", f"{BIG} --d_ff 1365", {"machine": GPU}),
    ("batch_could_grow", f"{BIG} --batch_size 1 --gradient_accumulation_steps 64", {"machine": GPU}),
    ("compile_off", f"{BIG} --max_iters 1000000 --compile false", {"machine": GPU}),
    ("memory", BIG, {"machine": SMALL_GPU}),
    ("memory_to_save", f"{BIG} --strategy fsdp2 --d_model 8192 --num_heads 64 --num_layers 200", {"world_size": 512}),
    ("memory_to_save", f"{BIG} --strategy fsdp2", {"world_size": 2, "machine": dataclasses.replace(GPU, host=10**8)}),
    ("disk", BIG, {"disk_free": 10**9}),
    ("keep_one", f"{BIG} --keep_last 1 --save_best false", {}),
    ("checkpoint_rare", BIG, {"pace": 2.0}),
    ("checkpoint_rare", f"{BIG} --every_minutes 90", {"pace": 2.0}),
    ("compile_short", "--vocab_size 256 --max_iters 1000 --compile", {"pace": 0.01}),
    ("log_fast", "--vocab_size 256 --log_interval 1", {"pace": 0.001}),
]


@pytest.mark.parametrize(("kind", "words", "known"), MISTAKES, ids=[f"{at}-{kind}" for at, (kind, _, _) in enumerate(MISTAKES)])
def test_a_planted_mistake_is_found(kind: str, words: str, known: dict[str, Any]):
    found = {finding.kind: finding for finding in findings(outlook(words, **known))}
    assert kind in found
    line = str(found[kind])
    assert "\n" not in line
    assert found[kind].fix.startswith(("type ", "write ", "prepare "))


@pytest.mark.slow
def test_what_is_typed_can_be_typed():
    """The keys in what to type exist, and what they make of the config no longer has the mistake."""
    for kind, words, known in MISTAKES:
        fix = next(finding for finding in findings(outlook(words, **known)) if finding.kind == kind).fix
        typed = fix.removeprefix("type ").partition(",")[0]
        if not typed.startswith("--") or " NEW" in typed or " with " in typed or " on " in typed or " a " in typed:
            continue
        keys = {word for word in typed.split() if word.startswith("--")}
        kept = words.split()
        for key in keys:
            if key in kept:
                place = kept.index(key)
                del kept[place : place + 2]
        if keys & {"--epochs", "--max_iters"}:
            ends = ("--max_iters", "--epochs")
            kept = [word for at, word in enumerate(kept) if word not in ends and kept[at - 1] not in ends]
        assert kind not in kinds(outlook(" ".join([*kept, typed]), **known)), f"{kind}: {words} + {typed}"


def test_muon_and_heads_that_are_as_they_should_be():
    assert "muon_costly" not in kinds(outlook(f"{BIG} --optimizer.name muon"))
    for heads in ("--num_heads 16", "--num_heads 8 --head_dim 128"):
        assert "mup_heads" not in kinds(outlook(f"{BIG} --mup_base_width 512 --d_model 1024 {heads}"))
    assert "mup_heads" not in kinds(outlook(f"{BIG} --mup_base_width 1024 --d_model 1024 --num_heads 8"))


def test_used_directories_and_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "checkpoint_00000010").mkdir()
    assert "directory_used" in kinds(outlook(f"{BIG} --checkpoint_dir {tmp_path} --resume_from never"))
    assert "directory_used" not in kinds(outlook(f"{BIG} --checkpoint_dir {tmp_path}"))
    monkeypatch.setattr(lint_run, "wandb_knows_me", lambda: False)
    assert "wandb_login" in kinds(outlook(f"{BIG} --use_wandb"))
    monkeypatch.setattr(lint_run, "wandb_knows_me", lambda: True)
    assert not {"wandb_login", "wandb_missing"} & kinds(outlook(f"{BIG} --use_wandb"))
    monkeypatch.setattr(lint_run.importlib.util, "find_spec", lambda name: None)
    assert "wandb_missing" in kinds(outlook(f"{BIG} --trackers wandb"))


def test_every_kind_is_planted():
    made: set[str] = set()
    for module in (lint_settings, lint_run):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding":
                made.add(ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "?")
    elsewhere = {"directory_used", "wandb_login", "wandb_missing", "?"}  # the test above; "?" stands for the two soft caps
    assert made - {kind for kind, _, _ in MISTAKES} == elsewhere
    assert len(made) >= 60


# ------------------------------------------------------------------------------------------------------- no false alarms


def shipped(path: Path, *, known: bool) -> Outlook:
    config = load(RunConfig, path)
    usual = 4096 if path.stem == "demo" else 50_304  # as make demo makes it
    vocab_size = PUBLISHED_SIZES.get(path.stem, (config.model.vocab_size or usual, 0))[0]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    tokens = 3_000_000 if path.stem in ("demo", "tinystories") else 1 << 38
    files = (np.broadcast_to(np.zeros(1, dtype=np.uint16), (tokens * (200 if path.stem == "tinystories" else 1),)),)
    train = dataclasses.replace(split(1000, largest=vocab_size - 1), files=files)
    val = split(150_000 if path.stem == "demo" else 10**6, largest=vocab_size - 1, print_="val")
    return dataclasses.replace(look_ahead(config, Splits(train, val) if known else None), disk_free=10**12)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_false_alarm_on_what_we_ship(path: Path):
    assert [str(finding) for finding in findings(shipped(path, known=False))] == []
    assert [str(finding) for finding in findings(shipped(path, known=True))] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_false_alarm_on_the_machines_that_they_are_for(path: Path):
    config = load(RunConfig, path)
    sequences, at_once = config.training.global_batch_size or 64, config.training.batch_size
    world = max(size for size in (1, 8, 16, 32, 64) if sequences % (at_once * size) == 0)
    base = shipped(path, known=False)
    large = base.plan.parameters > 2 * 10**9
    machine = ROOMY_GPU if large else GPU
    run = dataclasses.replace(base.config, parallel=ParallelConfig(strategy="fsdp2" if large else "ddp"))
    o = look_ahead(run, None, world_size=world, machine=machine)
    assert [str(finding) for finding in findings(dataclasses.replace(o, disk_free=10**12))] == []


def test_the_first_lines_of_a_run_have_what_is_serious_and_count_the_rest():
    config = load(
        RunConfig, None, parse_command_line(RunConfig, ["--max_iters", "99", "--d_ff", "256", "--device", "cpu"]).overrides
    )
    o = look_ahead(config, Splits(TRAIN, VAL))
    assert notices(config, o.plan, Splits(TRAIN, VAL), cpu=True) == [
        "logging.log_interval 100 is beyond the last update 99: no training metrics will be printed; type --log_interval 4",
        "1 more remark; type python -m accel_pretrain.plan with the same settings",
    ]
    assert str(Finding("x", "wrong", "type --right")) == "wrong; type --right"
