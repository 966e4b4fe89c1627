"""One dial: ``--preset depth=N`` chooses shape, rates, batch and length of a run. What a file or a person says lies above it.

The dial is that of nanochat (Karpathy 2025, ``--depth``): one number, and runs that cost least for the loss that they reach.

**Shape**: that of configs/modern.yaml. N layers, 64 N wide (nanochat's aspect ratio; its log found 128 worse), heads 128 wide
where there are four of them or more, else 64. 1024 positions, and in smaller models fewer: the power of two up to 128 N.
N = 12 is configs/modern.yaml itself.

**Parameters** P: those that multiply, in the matrices of attention and feed-forward and the output matrix. Embeddings of tokens
and values are looked up and do not count. nanochat's log (dev/LOG.md, 27 January 2026) compares three ways to count: only with
this one is the best number of tokens per parameter the same from 1e18 to 1e19 FLOP.

**Tokens** D = 12 P: nanochat's default; its log has 10.3 to 11.2. Chinchilla's 20 (Hoffmann et al. 2022) counts everything.

**Batch** B = 0.58 D^0.571 tokens and **rate** 1.79 P^-0.713 D^0.307 are Step Law (Li et al. 2025, "Predictable scale, part I"),
from 3,700 runs of 60 million parameters and more with AdamW, whose rates Muon's are like here (:mod:`accel_pretrain.muon`), so
that one serves all groups, and embedding_lr_scale and head_lr_scale stay 1. The batch is the nearest power of two, or what is
near that and can be shared among the processes. The rate is multiplied by sqrt(batch / B), as nanochat does (Malladi et al.
2022), whoever has chosen the batch, but by no more than 4: far above B larger updates gain little (McCandlish et al. 2018).
Before that it is at most 0.07 / sqrt(width): so fall Muon's best rates (Yang, Simon & Bernstein 2023, "A spectral condition for
feature learning"; nanochat's are 0.1 / sqrt(width) in our units, for far larger batches). That is the smaller one below some
seventy million parameters, where Step Law's runs end, and it is too high there. The standard library's bytes, nats for each,
context 128, one seed:

    rate                             0.005   0.01    0.02    0.04     Step Law    here
    N = 1, 1024 tokens per update    1.640   1.626   1.645   1.710    0.038       0.0076
    N = 2, 4096 tokens per update    1.090   1.095   1.106            0.020       0.0063

For N = 12 and nanochat's vocabulary and batch, 2^19 tokens, Step Law comes to 1.4 times nanochat's rate.

Not taken: nanochat's batch, 2^19 tokens (D / D of N = 12)^0.383 (Bergsma et al. 2025, "Power lines"). It is for runs on eight
GPUs. So far below N = 12 it leaves too few updates: N = 1 on bytes has 24, and ends at 2.13 nats with the better of two rates,
where 1024 tokens per update end at 1.62. Who has many devices types a ``--global_batch_size``, and the rate follows.
``mup_base_width`` neither: it knows width, but depth and length change with the dial, too.

**Decay** of weights 0.1 (Liu et al. 2025, "Muon is scalable"). **Schedule**: linear to 0 (Bergsma et al. 2025, "Straight to
zero"), after a warm-up of 2 %. Ten evaluations, of so many windows that they take a sixtieth of the time, more in short runs.

What was said elsewhere counts: the parameters are those of the shape in force, ``max_tokens`` is D for batch and rate
(``max_iters`` and ``epochs`` only end a run), and the rate is that of the batch in force. An optimizer to which the rate does
not apply (sgd, lion) keeps its own, and for one that averages weights (schedule_free) the rate stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accel_pretrain.config import USUAL_UPDATES, RunConfig
from accel_pretrain.errors import ConfigError
from accel_pretrain.estimates import parameters
from accel_pretrain.launchers import place
from accel_pretrain.mixture import open_data
from accel_pretrain.models import ModelConfig
from accel_pretrain.optim import SGD, AdamWScheduleFree, Lion
from accel_pretrain.typed_yaml import Entry, keys_given, load

T = TypeVar("T", bound=RunConfig)

TOKENS_PER_PARAMETER = 12
LARGEST = 64
_MICRO_TOKENS = 16_384  # of a process and micro-step, at most: configs/modern.yaml's
_NOTHING: Mapping[str, Entry] = {}


def load_with(
    cls: type[T], preset: str | None, file: Path | None, overrides: Iterable[tuple[str, Entry]],
    beneath: Mapping[str, Entry] = _NOTHING,
) -> T:  # fmt: skip
    """:func:`accel_pretrain.typed_yaml.load`, with a preset below everything else: defaults, preset, ``beneath``, file, words.

    The shape comes first. What follows from the number of parameters is chosen for the shape that is in force.
    """
    if preset is None:
        return load(cls, file, overrides, beneath)
    depth, overrides = depth_of(preset), tuple(overrides)

    def loaded(values: Mapping[str, Any]) -> T:
        below = {key: Entry(value, f"--preset {preset}") for key, value in values.items()}
        return load(cls, file, overrides, {**below, **beneath})

    chosen: dict[str, Any] = {"optimizer.name": "muon", "schedule.name": "linear", **shape(depth)}
    config = loaded(chosen)
    if isinstance(config.optimizer, AdamWScheduleFree):
        chosen["schedule.name"] = "constant"
        config = loaded(chosen)
    if config.checkpoint.init_from is not None and not beneath:
        return config  # the caller reads the shape there, and comes again with it beneath
    given = keys_given(cls, file, overrides)
    chosen["checkpoint.checkpoint_dir"] = f"runs/depth_{depth}"
    return loaded(chosen | _amounts(config, given, processes=_processes(config)))


def depth_of(preset: str) -> int:
    """The N of ``depth=N``; anything else is a :class:`ConfigError` that says what there is."""
    name, _, value = preset.partition("=")
    if name != "depth":
        known = f"there is depth=N, N layers from 1 to {LARGEST}; a recipe in a file is --config FILE"
        raise ConfigError(f"--preset {preset}: no such preset; {known}")
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= LARGEST):
        raise ConfigError(f"--preset {preset}: depth must be a whole number from 1 to {LARGEST}; type --preset depth=4")
    return int(value)


# -------------------------------------------------------------------------------------------------------------- the rules


def shape(depth: int) -> dict[str, Any]:
    """That of configs/modern.yaml, with so many layers."""
    width = 64 * depth
    wide = width % 128 == 0 and width >= 4 * 128
    return {
        "model.num_layers": depth, "model.d_model": width, "model.num_heads": width // (128 if wide else 64),
        "model.context_length": min(1024, _power_below(128 * depth)), "model.d_ff": None, "model.norm": "rmsnorm_plain",
        "model.activation": "relu2", "model.qk_norm": True, "model.logit_softcap": 15.0, "model.value_embeddings": True,
        "model.zero_init": True,
    }  # fmt: skip


def multiplying(model: ModelConfig, vocab_size: int) -> int:
    """P: the parameters of attention, feed-forward and output matrix, which may be the embeddings' too."""
    groups = parameters(model, vocab_size)
    return groups["attention"] + groups["feed-forward"] + (groups["output"] or groups["token embeddings"])


def best_batch(tokens: float) -> float:
    """Tokens per update for a run of so many."""
    return 0.58 * tokens**0.571


def best_rate(count: int, width: int, tokens: float, batch: float) -> float:
    """The peak rate of ``count`` parameters that see so many tokens, ``batch`` in an update."""
    return min(1.79 * count**-0.713 * tokens**0.307, 0.07 / math.sqrt(width)) * min(4.0, math.sqrt(batch / best_batch(tokens)))


def evaluations(updates: int, sequences: int, windows: int, context: int, interval: int | None = None) -> tuple[int, int]:
    """Updates from one to the next of about ten, and batches of so many ``windows`` in each: 1/40 of what is trained between.

    ``interval`` is what a person has said of the first.
    Both splits are read, for a third of an update's operations: 1/60 of the time. Never fewer than 32 windows, or 2^15 tokens.
    """
    interval = interval or min(5000, max(100, updates // 10))
    return interval, math.ceil(min(6400, max(32, 2**15 / context, interval * sequences / 40)) / windows)


# ---------------------------------------------------------------------------------------------------------- put together


@dataclass(frozen=True)
class Chosen:
    """What the rules say of a shape and what else is in force. Batches in sequences."""

    count: int
    tokens: int
    sequences: int
    micro: int


def _choose(config: RunConfig, given: frozenset[str], processes: int) -> Chosen:
    training, T = config.training, config.model.context_length
    count = multiplying(config.model, vocab_size_of(config))
    tokens = training.max_tokens or TOKENS_PER_PARAMETER * count
    sequences = 2 ** max(0, round(math.log2(best_batch(tokens) / T)))
    own = training.global_batch_size if "training.global_batch_size" in given else None
    steps, largest = training.gradient_accumulation_steps, max(1, _MICRO_TOKENS // T)
    if steps is None and own is None and "training.global_batch_size" in given:
        steps = 1  # null there, from a person: what one micro-step gives
    micro = _power_below(max(1, min(largest, sequences // (processes * (steps or 1)))))
    if "training.batch_size" in given:
        micro = training.batch_size
    elif own is not None:
        micro = _divisor_below(largest, max(1, own // processes))
    per_micro_step = micro * processes
    sequences = own or per_micro_step * (steps or max(1, round(sequences / per_micro_step)))
    return Chosen(count, tokens, sequences, micro)


def _amounts(config: RunConfig, given: frozenset[str], processes: int) -> dict[str, Any]:
    """The settings that follow from the number of parameters."""
    own, optimizer = _choose(config, given, processes), config.optimizer
    per_update = own.sequences * config.model.context_length
    updates, evaluation = config.training.max_iters or own.tokens // per_update, config.evaluation
    said = evaluation.eval_interval if "evaluation.eval_interval" in given else None
    interval, batches = evaluations(updates, own.sequences, evaluation.eval_batch_size, config.model.context_length, said)
    chosen: dict[str, Any] = {
        "training.batch_size": own.micro, "evaluation.eval_interval": interval, "evaluation.eval_iters": batches
    }  # fmt: skip
    if config.training.gradient_accumulation_steps is None:
        chosen["training.global_batch_size"] = own.sequences
    if config.training.max_iters is None and config.training.epochs is None:
        chosen["training.max_tokens"] = own.tokens
    if not isinstance(optimizer, SGD | Lion):
        if (base := config.model.mup_base_width) is not None and "optimizer.lr" not in given:
            found = f"model.mup_base_width {base}: the rate of --preset is that of its width already"
            raise ConfigError(f"{found}; type --lr RATE, the best one at width {base}, or --mup_base_width null")
        rate = best_rate(own.count, config.model.d_model, own.tokens, per_update)
        chosen |= {"optimizer.lr": float(f"{rate:.3g}"), "optimizer.weight_decay": 0.1}
    if hasattr(config.schedule, "min_lr"):
        chosen["schedule.min_lr"] = 0.0
    return chosen


def describe(preset: str, config: RunConfig) -> str:
    """One line: what a preset has become, with everything that was said above it."""
    model, training = config.model, config.training
    count = multiplying(model, vocab_size_of(config))
    each = training.global_batch_size or training.batch_size * (training.gradient_accumulation_steps or 1) * _processes(config)
    if training.max_tokens is not None:
        length = f"{training.max_tokens:,} tokens, {training.max_tokens / count:.3g} for each"
    elif training.epochs is not None:
        length = f"{training.epochs:g} epochs"
    else:
        length = f"{training.max_iters or USUAL_UPDATES:,} updates"
    where = f"{_several(model.num_layers, 'layer')} of width {model.d_model}, {_several(model.num_heads, 'head')}"
    how = f"{config.optimizer.name} with lr {config.optimizer.lr:g}, {config.schedule.name}"
    return (
        f"Preset {preset}: {where}, context {model.context_length}; {count:,} parameters that multiply; {length}; "
        f"{each * model.context_length:,} tokens per update, {how}"
    )


def vocab_size_of(config: RunConfig) -> int:
    """The number of token ids that the config says, or else the dataset."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if config.data.train_data_path is None:
        counted = "--preset counts parameters with it"
        raise ConfigError(f"model.vocab_size: {counted}; type --train_data_path DIR (made by prep.tokenize), or --vocab_size N")
    known = open_data(config.data.train_data_path, "train", config.data.dtype).tokenizer
    if known is None:
        raise ConfigError("model.vocab_size: a bare file of ids does not say, and --preset needs it; type --vocab_size N")
    return int(known["vocab_size"])


def _processes(config: RunConfig) -> int:
    """Those that are planned or measured for, or else those that there are."""
    for name in ("plan", "tune"):
        if hasattr(config, name):
            return int(getattr(config, name).world_size)
    return place()[1]


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _divisor_below(largest: int, number: int) -> int:
    """The largest divisor of a number that is not above ``largest``."""
    return next(size for size in range(min(largest, number), 0, -1) if number % size == 0)


def _power_below(number: int) -> int:
    """The largest power of two that is not above a number from 1 on."""
    return 1 << (number.bit_length() - 1)
