"""What is legal and probably not meant once data and machine are known: rules about tokens, devices, memory, disk and time."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import replace

from accel_pretrain.data import Windows, turns_of
from accel_pretrain.estimates import memory
from accel_pretrain.hardware import CONTEXT_BYTES, cores
from accel_pretrain.launchers import is_restart
from accel_pretrain.lint_settings import WORTH_PLANNING, Finding, Findings
from accel_pretrain.outlook import Outlook, split_overlap
from accel_pretrain.runtime import wandb_knows_me
from accel_pretrain.shards import TokenSplit

GB = 1e9
HOST = 512 * 10**9  # bytes of main memory that a machine of a cluster may be taken to have
FEW_PASSES, MANY_PASSES = 4, 40  # Muennighoff et al. 2023: as good as new data up to 4, worth nothing beyond 40


def data(o: Outlook) -> Findings:
    """Tokens: how often they are read, and whether they fit the windows."""
    if o.splits is None or o.passes is None:
        return
    train, val, T = o.splits.train, o.splits.val, o.config.model.context_length
    source = " (Muennighoff et al. 2023)"
    if o.passes > MANY_PASSES and o.flops > WORTH_PLANNING:
        text = f"training: {o.passes:.0f} passes over the data; beyond {MANY_PASSES} another teaches nothing{source}"
        yield Finding("passes_useless", text, f"type --epochs {FEW_PASSES}, or bring more data")
    elif o.passes > FEW_PASSES and o.flops > WORTH_PLANNING:
        text = f"training: {o.passes:.1f} passes over the data; up to {FEW_PASSES} are as good as new data{source}"
        yield Finding("passes_many", text, f"type --epochs {FEW_PASSES}, or bring more data", serious=False)
    if o.config.model.dropout > 0 and o.passes <= 1:
        text = f"model.dropout {o.config.model.dropout:g} with {o.passes:.2f} passes: it only slows learning"
        yield Finding("dropout_one_pass", text, "type --dropout 0")
    if o.config.data.sampling == "random" and o.passes > 0.5:
        text = "data.sampling random leaves out a third of the windows in each pass, and repeats others"
        yield Finding("sampling_random", text, "type --sampling shuffle", serious=False)
    yield from mixture(o)
    if split_overlap(o.splits):
        text = f"data: training and validation both read {train.source}: the validation loss says nothing"
        yield Finding("val_is_train", text, "type --val_data_path with other text, or use a dataset of prep.tokenize")
    largest = max(train.max_id, val.max_id)
    known = train.tokenizer["vocab_size"] if train.tokenizer else largest + 1
    if o.plan.vocab_size > 1.2 * max(known, largest + 1) + 128:
        text = f"model.vocab_size {o.plan.vocab_size:,}: the data has only ids below {max(known, largest + 1):,}"
        yield Finding("vocab_unused", text, f"type --vocab_size {64 * -(-max(known, largest + 1) // 64)}")
    for split, name in ((train, "training"), (val, "validation")):
        length = split.tokens / split.documents if split.documents else T
        if length < T / 16:
            text = f"model.context_length {T}: a document of the {name} data has {length:.0f} tokens on average"
            fitting = max(64, 2 ** math.ceil(math.log2(8 * length)))
            yield Finding("context_long", text, f"type --context_length {fitting}", serious=False)
            break
    yield from validation(o, val)


def mixture(o: Outlook) -> Findings:
    """The parts of a mixture: small ones come round soon."""
    assert o.splits is not None
    train, total, turns = o.splits.train, o.plan.samples, turns_of(o.splits.train, o.config.model.context_length)
    for part, weight in zip(train.parts, turns.counts(total) if turns else (), strict=True):
        windows = Windows(part, o.config.model.context_length, o.config.data.packing)
        passes = weight / windows.count
        if passes > FEW_PASSES and passes > 1.5 * (o.passes or 0):
            text = f"data.train_data_path: {part.source} would be read {passes:.1f} times"
            fair = max(weight / total * FEW_PASSES / passes, 0.0001)
            yield Finding("mixture_repeats", text, f"write {part.source}@{fair:.4f} of 1, or less of everything")


def validation(o: Outlook, val: TokenSplit) -> Findings:
    """How well the validation loss is known, and what knowing it costs."""
    windows = o.eval_windows or 0
    if windows < 30:
        count = Windows(val, o.config.model.context_length).count
        fix = "type --eval_iters null" if count > windows else "prepare more text for the val split"
        yield Finding("val_small", f"evaluation: {windows} windows give a validation loss with a large standard error", fix)


def evaluation_cost(o: Outlook) -> Findings:
    """Time in evaluations."""
    share = o.eval_share
    if share is not None and share > 0.1 and o.plan.max_iters > o.config.evaluation.eval_interval and o.flops > WORTH_PLANNING:
        interval = o.config.evaluation.eval_interval
        text = f"evaluation: every {interval} updates it takes {share:.0%} of their time"
        yield Finding("eval_costly", text, f"type --eval_interval {round(interval * share / 0.05)}")


def device(o: Outlook) -> Findings:
    """Precision, shapes and threads on the device."""
    model, load, machine = o.config.model, o.load, o.machine
    if machine is None:
        return
    if machine.device == "cpu":
        if (wanted := o.config.training.cpu_threads) is not None and wanted > cores():
            text = f"training.cpu_threads {wanted}: there are {cores()} cores, and more threads wait for each other"
            yield Finding("threads", text, f"type --cpu_threads {cores()}")
        return
    if machine.device != "cuda":
        return
    if load.precision == "fp16" and machine.has_bf16:
        text = "training.mixed_precision fp16 needs loss scaling and overflows; this device has bf16, which is as fast"
        yield Finding("fp16", text, "type --mixed_precision bf16")
    if load.precision == "no":
        text = f"training.mixed_precision: float32 on {machine.name} is several times as slow as bf16"
        yield Finding("float32", text, "type --mixed_precision bf16")
    if load.precision == "bf16" and not machine.has_bf16:
        text = f"training.mixed_precision bf16: {machine.name} has none and imitates it slowly"
        yield Finding("bf16_missing", text, "type --mixed_precision fp16")
    exact_gpt2 = model.position == "learned" and model.norm == "layernorm" and model.bias and o.plan.vocab_size == 50257
    if o.plan.vocab_size % 64 and not exact_gpt2:
        more = 64 * -(-o.plan.vocab_size // 64)
        text = f"model.vocab_size {o.plan.vocab_size} is not a multiple of 64, which costs a GPU 3 to 14 % of its speed"
        yield Finding("vocab_odd", text, f"type --vocab_size {more}")
    for key, value in (("d_model", model.d_model), ("d_ff", model.ff_width)):
        if value % 8:
            text = f"model.{key} {value} is not a multiple of 8: tensor cores do without it"
            yield Finding("width_odd", text, f"type --{key} {64 * -(-value // 64)}")
    used = o.memory_needed / (machine.memory or 1)
    if load.accumulation > 1 and load.tokens < 4096 and used < 0.15:
        text = f"training.batch_size {load.batch_size} uses {used:.0%} of the memory, in {load.accumulation} micro-steps"
        times = next(k for k in (16, 8, 4, 2, load.accumulation) if load.accumulation % k == 0)
        keep = "" if o.config.training.global_batch_size else f" --gradient_accumulation_steps {load.accumulation // times}"
        yield Finding("batch_could_grow", text, f"type --batch_size {load.batch_size * times}{keep}", serious=False)
    if not load.compiled and o.plan.max_iters >= 10_000 and o.flops > 1e18:
        text = "training.compile false: compiling takes a minute and makes training 1.2 to 1.9 times as fast"
        yield Finding("compile_off", text, "type --compile true", serious=False)


def space(o: Outlook) -> Findings:
    """Memory and disk."""
    free = o.machine.memory if o.machine else None
    if free is not None and o.memory_needed > 0.95 * free:
        text = f"memory: about {o.memory_needed / GB:.1f} GB are needed, {free / GB:.1f} GB are free on {o.machine.name}"  # type: ignore[union-attr]
        yield Finding("memory", text, smaller(o, free))
    host = o.machine.host if o.machine else None
    if o.host_memory > (host or HOST):
        whose = f"{host / GB:.1f} GB are free here" if host else "more than machines usually have"
        text = f"memory: to save, rank 0 gathers {o.host_memory / GB:.1f} GB of weights and moments in main memory; {whose}"
        yield Finding("memory_to_save", text, "type a smaller --d_model, or give the machine of rank 0 as much")
    disk = o.checkpoints_kept * o.checkpoint
    if o.disk_free is not None and disk > o.disk_free:
        keep = max(1, o.disk_free // o.checkpoint - 2)
        fix = f"type --keep_last {keep}" if 3 * o.checkpoint < o.disk_free else "type --checkpoint_dir on a larger disk"
        where = os.path.abspath(o.config.checkpoint.checkpoint_dir)
        text = f"disk: {o.checkpoints_kept} checkpoints need {disk / GB:.1f} GB, {o.disk_free / GB:.1f} GB are free at {where}"
        yield Finding("disk", text, fix)


def smaller(o: Outlook, free: int) -> str:
    """What makes it fit: a smaller micro-batch with the same update, or shares of the model, or else a smaller one."""
    room = (0.9 * free / o.memory_needed * o.memory.total) if o.load.device == "cpu" else 0.9 * free - CONTEXT_BYTES
    for size in sorted({k for k in range(1, o.load.batch_size) if o.load.batch_size % k == 0}, reverse=True):
        times = o.load.batch_size // size
        if memory(replace(o.load, batch_size=size, accumulation=o.load.accumulation * times)).total <= room:
            steps = f" --gradient_accumulation_steps {o.load.accumulation * times}"
            return f"type --batch_size {size}{'' if o.config.training.global_batch_size else steps}"
    for strategy in ("zero2", "fsdp2") if o.load.world_size > 1 and o.load.strategy == "ddp" else ():
        if memory(replace(o.load, strategy=strategy)).total <= room:
            return f"type --strategy {strategy}"
    return "type --strategy fsdp2 with more --world_size, or a smaller --d_model and --num_layers"


def saving(o: Outlook) -> Findings:
    """What a crash would cost, and what a new start would find."""
    config, last = o.config.checkpoint, o.plan.max_iters
    if config.keep_last == 1 and not config.save_best:
        text = "checkpoint.keep_last 1 without save_best: one damaged file, or a spike, and nothing is left to go back to"
        yield Finding("keep_one", text, "type --keep_last 2")
    if o.pace is not None:
        lost = min(min(config.checkpoint_interval, last) * o.pace.seconds / 3600, (config.every_minutes or math.inf) / 60)
        if lost > 1:
            text = f"checkpoint.checkpoint_interval {config.checkpoint_interval}: a crash can lose {lost:.1f} hours"
            updates = max(1, int(1800 / o.pace.seconds))
            yield Finding("checkpoint_rare", text, f"type --checkpoint_interval {updates}")
    if config.resume_from in ("never", None) and not is_restart():
        held = sorted(path.name for path in config.checkpoint_dir.glob("checkpoint_*"))
        if held:
            text = f"checkpoint.resume_from never: {config.checkpoint_dir} holds {held[-1]}, so the run will not start"
            yield Finding("directory_used", text, "type --checkpoint_dir NEW, or --resume_from auto")


def speed(o: Outlook) -> Findings:
    """What pays only in longer or slower runs."""
    if o.pace is None or o.hours is None:
        return
    if o.config.training.compile and o.hours < 5 / 60:
        text = f"training.compile: the run takes {o.hours * 60:.1f} minutes, compiling takes one"
        yield Finding("compile_short", text, "type --compile false", serious=False)
    if o.config.logging.log_interval == 1 and o.pace.seconds < 0.005:
        text = f"logging.log_interval 1 with updates of {o.pace.seconds * 1000:.1f} ms: logging takes a visible share"
        yield Finding("log_fast", text, "type --log_interval 10", serious=False)


def trackers(o: Outlook) -> Findings:
    """Trackers that would get nothing."""
    config = o.config.logging
    if not (config.use_wandb or "wandb" in config.trackers):
        return
    if importlib.util.find_spec("wandb") is None:
        yield Finding("wandb_missing", "logging.use_wandb: wandb is not installed", "type pip install 'accel_pretrain[track]'")
    elif not wandb_knows_me():
        yield Finding("wandb_login", "logging.use_wandb: wandb knows no key on this machine", "type wandb login")


RULES = (data, evaluation_cost, device, space, saving, speed, trackers)
