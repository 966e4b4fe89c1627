"""Settings that are legal and probably not meant: the rules that need nothing but the config and the plan.

Every rule is a function that yields findings; ``kind`` names the mistake, ``fix`` is what to type. Bounds are wide on purpose:
what a published recipe does is never a finding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from accel_pretrain.models import ModelConfig
from accel_pretrain.optim import SGD, AdamW, AdamWScheduleFree, Lion, Muon
from accel_pretrain.outlook import Outlook, critical_batch, first_loss
from accel_pretrain.schedule import Constant, WarmupStableDecay

# Below so many operations a run takes minutes, and how it spends them does not matter much: about an hour of a laptop's CPU.
WORTH_PLANNING = 1e15


@dataclass(frozen=True)
class Finding:
    """One mistake. ``serious``: it spoils or breaks the run; otherwise it is advice."""

    kind: str
    text: str
    fix: str
    serious: bool = True

    def __str__(self) -> str:
        return f"{self.text}; {self.fix}"


Findings = Iterator[Finding]


def intervals(o: Outlook) -> Findings:
    """Things that happen now and then, and may never."""
    config, last = o.config, o.plan.max_iters
    log, evaluate, save = config.logging.log_interval, config.evaluation.eval_interval, config.checkpoint.checkpoint_interval
    if log > last:
        text = f"logging.log_interval {log} is beyond the last update {last}: no training metrics will be printed"
        yield Finding("log_beyond_end", text, f"type --log_interval {max(1, last // 20)}")
    if not log <= evaluate <= save:
        text = f"usual is log_interval <= eval_interval <= checkpoint_interval; here they are {log}, {evaluate}, {save}"
        usual = sorted((log, evaluate, save))
        fix = f"type --log_interval {usual[0]} --eval_interval {usual[1]} --checkpoint_interval {usual[2]}"
        yield Finding("interval_order", text, fix)
    if evaluate > last >= 1000:
        text = f"evaluation.eval_interval {evaluate} is beyond the last update {last}: no validation loss before the end"
        yield Finding("eval_beyond_end", text, f"type --eval_interval {last // 20}")
    if log == 1 and last >= 50_000:
        text = f"logging.log_interval 1 writes {last:,} rows of metrics"
        yield Finding("log_every_update", text, "type --log_interval 10", serious=False)
    if save < 10 and last > 100 and save < last:
        text = f"checkpoint.checkpoint_interval {save} writes {last // save:,} checkpoints of {o.checkpoint / 1e9:.2f} GB"
        yield Finding("checkpoint_too_often", text, f"type --checkpoint_interval {max(10, last // 20)}")
    samples = config.logging.sample_interval
    if samples is not None and samples * 50 < last and samples < 50:
        text = f"logging.sample_interval {samples} stops training {last // samples:,} times to generate text"
        yield Finding("sample_too_often", text, f"type --sample_interval {max(50, last // 20)}", serious=False)


def schedule(o: Outlook) -> Findings:
    """The learning rate over time."""
    config, last, warmup = o.config.schedule, o.plan.max_iters, o.plan.warmup_iters
    peak, floor = o.config.optimizer.lr, getattr(config, "min_lr", None)
    if warmup > last / 4 and last >= 20:
        text = f"schedule.warmup_iters: {warmup} of {last} updates are warm-up"
        yield Finding("warmup_most", text, f"type --warmup_iters {max(1, last // 50)}")
    if warmup == 0 and last >= 1000 and isinstance(o.config.optimizer, AdamW):
        text = "schedule.warmup_iters 0: Adam's averages know nothing yet, and full-size first updates may never be made good"
        yield Finding("warmup_none", text, f"type --warmup_iters {last // 50}")
    if floor is not None and floor > peak / 2:
        text = f"schedule.min_lr {floor:g} is more than half of lr {peak:g}: the rate hardly comes down"
        yield Finding("min_lr_high", text, f"type --min_lr {peak / 10:g}")
    averages = isinstance(o.config.optimizer, AdamWScheduleFree)
    if averages and not isinstance(config, Constant):
        text = f"schedule.name {config.name}: schedule_free averages weights, for which the rate has to stay"
        yield Finding("schedule_free_falls", text, "type --schedule.name constant")
    if isinstance(config, Constant) and last >= 1000 and o.flops > WORTH_PLANNING and not averages:
        text = "schedule.name constant: without a decay at the end the loss stays above what it could be"
        yield Finding("never_decays", text, "type --schedule.name wsd", serious=False)
    if isinstance(config, WarmupStableDecay) and config.decay_iters is not None and config.decay_iters < last / 50:
        text = f"schedule.decay_iters: a cool-down of {config.decay_iters} in {last} updates is too short to gain from"
        yield Finding("decay_short", text, f"type --decay_iters {last // 5}", serious=False)


def optimizer(o: Outlook) -> Findings:
    """Adam's constants, also where it serves a part of the parameters."""
    config, last = o.config.optimizer, o.plan.max_iters
    if isinstance(config, SGD):
        text = "optimizer.name sgd: Transformers train slowly with it (Zhang et al. 2020)"
        yield Finding("sgd", text, "type --optimizer.name adamw", serious=False)
    if isinstance(config, Muon) and o.flops > WORTH_PLANNING:
        own = o.load.update_flops / (o.load.tokens * o.load.accumulation * o.plan.flops_per_token)
        if own > 1 / 4:
            text = f"optimizer.name muon: making matrices orthogonal takes {own:.2g} times the operations of so few tokens"
            yield Finding("muon_costly", text, "type --optimizer.name adamw, or a larger --batch_size", serious=False)
    if isinstance(config, SGD | Lion):
        return
    decays = not isinstance(config, AdamWScheduleFree)  # whose beta1 is a place between two weights
    if decays and config.beta1 > config.beta2:
        text = f"optimizer.beta1 {config.beta1:g} is above beta2 {config.beta2:g}: they look swapped"
        yield Finding("betas_swapped", text, f"type --beta1 {config.beta2:g} --beta2 {config.beta1:g}")
    elif decays and config.beta1 < 0.5:
        text = f"optimizer.beta1 {config.beta1:g}: updates follow single batches"
        yield Finding("beta1_low", text, "type --beta1 0.9")
    if last > 100 and 2 / (1 - config.beta2) > last:
        text = f"optimizer.beta2 {config.beta2:g} averages over {1 / (1 - config.beta2):.0f} updates, and there are only {last}"
        yield Finding("beta2_long", text, "type --beta2 0.95")
    elif config.beta2 < 0.9:
        text = f"optimizer.beta2 {config.beta2:g}: the size of gradients is judged by {1 / (1 - config.beta2):.0f} updates"
        yield Finding("beta2_low", text, "type --beta2 0.95")
    if config.eps > 1e-5:
        text = f"optimizer.eps {config.eps:g} is above the size of typical gradients: Adam becomes plain momentum"
        yield Finding("eps_large", text, "type --eps 1e-8")
    if config.eps < 1e-15:
        text = f"optimizer.eps {config.eps:g} vanishes beside float32 numbers: rows that are seldom used take huge steps"
        yield Finding("eps_small", text, "type --eps 1e-8")
    if config.weight_decay == 0 and o.flops > WORTH_PLANNING:
        text = "optimizer.weight_decay 0: published recipes have 0.1, which keeps long runs stable"
        yield Finding("weight_decay_none", text, "type --weight_decay 0.1", serious=False)
    if config.weight_decay > 0.5:
        text = f"optimizer.weight_decay {config.weight_decay:g}: published recipes have 0.1"
        yield Finding("weight_decay_large", text, "type --weight_decay 0.1")


def learning_rate(o: Outlook) -> Findings:
    """The peak, against GPT-3's table 2.1 (Brown et al. 2020): 6e-4 at width 768, 1.2e-4 at 4096, so about 0.46 / width.

    Lion's is a fifth of that (Chen et al. 2023, section 5: 3 to 10 times below AdamW's).
    """
    config, clip = o.config.optimizer, o.config.training.grad_clip
    width = o.config.model.mup_base_width or o.config.model.d_model
    usual = 0.46 / width / (5 if isinstance(config, Lion) else 1)
    if clip is not None and clip < 0.05:
        text = f"training.grad_clip {clip:g} is below every gradient's norm: it scales all of them"
        yield Finding("clip_tiny", text, "type --grad_clip 1.0")
    if clip is not None and clip > 100:
        text = f"training.grad_clip {clip:g} clips nothing that matters"
        yield Finding("clip_huge", text, "type --grad_clip 1.0")
    if isinstance(config, SGD):
        return
    near = f"about {usual:.1g} at width {width} (GPT-3's table{', a fifth of it' * isinstance(config, Lion)})"
    if config.lr > 10 * usual:
        yield Finding("lr_high", f"optimizer.lr {config.lr:g} is far above what is usual, {near}", f"type --lr {usual:.1g}")
    if config.lr < usual / 20 and o.config.checkpoint.init_from is None:
        yield Finding("lr_low", f"optimizer.lr {config.lr:g} is far below what is usual, {near}", f"type --lr {usual:.1g}")
    if clip is None and config.lr > usual / 2:
        text = f"training.grad_clip null with lr {config.lr:g}: one bad batch can undo hours"
        yield Finding("no_clip", text, "type --grad_clip 1.0")


def shape(o: Outlook) -> Findings:
    """The model itself."""
    model = o.config.model
    width, ratio = model.head_width, model.ff_width / model.d_model
    if width > 256 or width < 16 or width % 8:
        why = "fused attention wants a multiple of 8, at most 256, and narrow heads tell little apart"
        fitting = [h for h in range(1, model.d_model + 1) if model.d_model % h == 0 and (model.d_model // h) % 8 == 0]
        heads = min(fitting or [1], key=lambda h: abs(model.d_model / h - 64))
        if model.d_model >= 64:  # a model for tests has narrow heads
            yield Finding("head_dim", f"model.head_dim {width}: {why}", f"type --num_heads {heads}", serious=width > 256)
    if not 1 <= ratio <= 8:
        text = f"model.d_ff {model.ff_width} is {ratio:.2g} times d_model: usual is 8/3 (gated) to 4, published ones 2.7 to 8"
        yield Finding("d_ff_odd", text, "type --d_ff null", serious=False)
    if not 4 <= model.d_model / model.num_layers <= 512:
        text = f"model: {model.num_layers} layers of width {model.d_model}: published shapes have 30 to 130 of width per layer"
        yield Finding("aspect", text, f"type --num_layers {max(1, model.d_model // 64)}", serious=False)
    if model.position == "rope" and model.context_length > 8192 and model.rope_theta <= 10_000 and model.rope_scaling == "none":
        text = f"model.rope_theta {model.rope_theta:g} turns too fast for {model.context_length} positions"
        yield Finding("rope_theta_small", text, "type --rope_theta 500000")
    if model.sliding_window is not None and (model.sliding_window >= model.context_length or "S" not in model.window_pattern):
        text = f"model.sliding_window {model.sliding_window} never hides a position (context {model.context_length})"
        yield Finding("window_idle", text, "type --sliding_window null")
    if model.mup_base_width is not None and model.ff_width != 4 * model.d_model and model.d_ff is not None:
        text = f"model.d_ff {model.d_ff}: with mup_base_width it has to grow as d_model does"
        yield Finding("mup_d_ff", text, "type --d_ff null", serious=False)
    yield from _mup_heads(model)
    if model.init_std > 0.1 or model.init_std < 1e-3:
        text = f"model.init_std {model.init_std:g}: usual is 0.006 to 0.02"
        yield Finding("init_std", text, "type --init_std 0.02")
    first, nothing_known = first_loss(model, o.plan.vocab_size), math.log(o.plan.vocab_size)
    if model.tie_embeddings and first > nothing_known + model.d_model * model.init_std**2 / 2 + 2:
        text = (
            "model: tied and scaled embeddings make a new model predict the token that it has just read: its first loss will "
            f"be about {first:.1f}, not {nothing_known:.1f}"
        )
        yield Finding("tied_and_scaled", text, "type --sandwich_norm true")
    if model.norm_eps > 1e-3 or model.norm_eps < 1e-12:
        yield Finding("norm_eps", f"model.norm_eps {model.norm_eps:g}: usual is 1e-5 or 1e-6", "type --norm_eps 1e-5")
    caps = {"logit_softcap": (5, 30), "attention_softcap": (10, 50)}
    for key, (least, usual_cap) in caps.items():
        if (cap := getattr(model, key)) is not None and cap < least:
            text = f"model.{key} {cap:g} does not let the model be sure of anything"
            yield Finding(f"{key}_low", text, f"type --{key} {usual_cap}")
    if model.dropout > 0.5:
        yield Finding("dropout_high", f"model.dropout {model.dropout:g} drops most of the signal", "type --dropout 0.1")


def _mup_heads(model: ModelConfig) -> Findings:
    """Heads that have grown with the model, it seems: nobody has said how wide they are, and they are wider than is usual."""
    base, width = model.mup_base_width or model.d_model, model.head_width
    if base == model.d_model or model.head_dim is not None or (width <= 64 and base % width == 0):
        return
    once = base // model.num_heads if base % model.num_heads == 0 else 64
    own = max(2, once if model.d_model % once == 0 else math.gcd(model.d_model, base))
    text = f"model.num_heads {model.num_heads}: heads are {width} wide; with mup_base_width they are to be as at width {base}"
    words = f"--num_heads {model.d_model // own}" + ("" if model.num_kv_heads is None else " --num_kv_heads null")
    yield Finding("mup_heads", text, f"type --head_dim {own} {words}, or --head_dim {width} if they were", serious=False)


def amounts(o: Outlook) -> Findings:
    """How much is trained, and in which portions. Small runs may do as they like."""
    per_update, ratio = o.plan.tokens_per_step, o.tokens_per_parameter
    if o.flops < WORTH_PLANNING:
        return
    best = critical_batch(o.plan.parameters, o.tokens)
    if per_update > 4 * best:
        text = f"training: {per_update:,} tokens per update, where more than about {best:,.0f} hardly save updates"
        least = o.plan.batch_size * o.plan.world_size
        fewer = least * max(1, round(best / o.config.model.context_length / least))
        yield Finding("batch_huge", text, f"type --global_batch_size {fewer}", serious=False)
    if per_update < 2048:
        text = f"training: {per_update:,} tokens per update are noise, and leave the device idle"
        sequences, least = max(1, 32_768 // o.config.model.context_length), o.plan.batch_size * o.plan.world_size
        yield Finding("batch_tiny", text, f"type --global_batch_size {least * -(-sequences // least)}")
    if ratio < 2:
        text = (
            f"training: {ratio:.2g} tokens per parameter, where 20 cost least for a loss (Chinchilla): a smaller model would "
            "be better at the same cost"
        )
        updates = max(1, 20 * o.plan.parameters // per_update)
        yield Finding("tokens_few", text, f"type --max_iters {updates}, or a smaller --d_model and --num_layers")
    if ratio > 20_000:
        text = f"training: {ratio:,.0f} tokens per parameter, a thousand times Chinchilla's 20: a larger model would be better"
        yield Finding("tokens_many", text, "type a larger --d_model and --num_layers", serious=False)


RULES = (intervals, schedule, optimizer, learning_rate, shape, amounts)
