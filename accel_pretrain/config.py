"""The whole of a run as a person wrote it (:class:`RunConfig`), and what the machine derives from it (:class:`Plan`).

Nothing ever assigns to a config. What is only known once the data and the processes are known is in the Plan.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from accel_pretrain import __version__
from accel_pretrain.aids import ONE_BATCH_UPDATES, DebugConfig
from accel_pretrain.aids import problems as debug_problems
from accel_pretrain.checkpoint import CheckpointConfig, TrainState
from accel_pretrain.data import DataConfig, Windows
from accel_pretrain.errors import ConfigError
from accel_pretrain.mixture import open_data, paths_of
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.optim import AdamW, Optimizer
from accel_pretrain.parallel import ParallelConfig
from accel_pretrain.runtime import TrainingConfig
from accel_pretrain.schedule import Cosine, Schedule
from accel_pretrain.shards import TokenSplit, splits_in
from accel_pretrain.trackers import LoggingConfig
from accel_pretrain.typed_yaml import section, to_plain
from accel_pretrain.validation import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a person can say about a run. ``configs/reference.yaml`` lists it with its defaults."""

    data: DataConfig = section(DataConfig, "What to read, and in which order")
    model: ModelConfig = section(ModelConfig, "The Transformer")
    optimizer: Optimizer = section(AdamW, "The optimizer, chosen by name")
    schedule: Schedule = section(Cosine, "The learning rate over time, chosen by name")
    training: TrainingConfig = section(TrainingConfig, "How much, in which portions, on what")
    parallel: ParallelConfig = section(ParallelConfig, "What each of several processes holds")
    evaluation: EvaluationConfig = section(EvaluationConfig, "The loss on held-out text")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "Saving and going on")
    logging: LoggingConfig = section(LoggingConfig, "Reporting")
    debug: DebugConfig = section(DebugConfig, "Looking into a run")


@dataclass(frozen=True)
class Splits:
    """The opened data of a run."""

    train: TokenSplit
    val: TokenSplit


def open_splits(config: DataConfig) -> Splits:
    """Open training and validation data; raises DataError, or ConfigError when no path was given."""
    if config.train_data_path is None:
        raise ConfigError("data.train_data_path: not given; type --train_data_path DIR (a folder made by prep.tokenize)")
    train = open_data(config.train_data_path, "train", config.dtype, mixed=True)
    val_path = config.val_data_path
    if val_path is None:
        val_path = config.train_data_path
        if not all(splits_in(path) for path in paths_of(val_path)):
            raise ConfigError("data.val_data_path: not given; a bare file of ids has no val split: type --val_data_path FILE")
    return Splits(train, open_data(val_path, "val", config.dtype))


def flat(config: RunConfig) -> dict[str, object]:
    """Every setting by its dotted key."""
    return {f"{section}.{key}": value for section, values in to_plain(config).items() for key, value in values.items()}


def told(config: RunConfig, splits: Splits, precision: str) -> dict[str, object]:
    """What has to be the same on every machine of a run: the settings that change the numbers, the tokens, the versions."""
    own = ("training.cpu_threads", "checkpoint.checkpoint_dir", "checkpoint.init_from", "checkpoint.resume_from")
    settings = {
        key: value for key, value in flat(config).items() if not key.startswith(("data.", "logging.")) and key not in own
    }
    return settings | {
        "data.sampling": config.data.sampling,
        "the tokens of data.train_data_path": splits.train.fingerprint,
        "the tokens of data.val_data_path": splits.val.fingerprint,
        "the precision": precision,
        "the version of torch": torch.__version__,
        "the version of accel_pretrain": __version__,
    }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will be, once data and processes are known. All sizes are global unless they say otherwise."""

    world_size: int
    batch_size: int
    accumulation: int
    samples_per_step: int
    tokens_per_step: int
    max_iters: int
    warmup_iters: int
    vocab_size: int
    parameters: int
    flops_per_token: int
    train_tokens: int
    val_tokens: int
    samples_per_epoch: int
    epochs: float
    eval_windows: int | None
    mixture: tuple[str, ...] = ()

    def describe(self) -> str:
        """A table for people."""
        lines = [
            f"{key:<20} {value:,}" if isinstance(value, int) else f"{key:<20} {value}"
            for key, value in dataclasses.asdict(self).items()
            if key != "mixture"
        ]
        return "\n".join([*lines, *(f"mixture              {part}" for part in self.mixture)])


def make_plan(config: RunConfig, splits: Splits, world_size: int, done: TrainState | None = None) -> Plan:
    """Derive the Plan, or raise one :class:`ConfigError` with everything that does not fit together.

    ``done`` is what a resumed run has behind it: ``max_tokens`` and ``epochs`` count that too, also when the batch has changed.
    """
    problems: list[str] = []
    training, model = config.training, config.model
    accumulation = _accumulation(training, world_size, problems)
    samples_per_step = training.batch_size * world_size * accumulation
    vocab_size = _vocab_size(model, splits, problems)
    windows = Windows(splits.train, model.context_length)
    Windows(splits.val, model.context_length)  # refuses a split that is smaller than one window
    max_iters = _max_iters(training, samples_per_step, model.context_length, windows.count, done or TrainState())
    if config.debug.overfit_one_batch and not any((training.max_iters, training.max_tokens, training.epochs)):
        max_iters = ONE_BATCH_UPDATES
    problems += debug_problems(config.debug, max_iters - (done or TrainState()).step, training.on_spike)
    problems += (f"schedule.{problem}" for problem in config.schedule.problems(config.optimizer.lr, max_iters))
    problems += _tokenizer_problems(config, splits)
    if problems:
        raise ConfigError(problems)
    with torch.device("meta"):
        shape = Transformer(model, vocab_size)
    evaluation = config.evaluation
    return Plan(
        world_size=world_size,
        batch_size=training.batch_size,
        accumulation=accumulation,
        samples_per_step=samples_per_step,
        tokens_per_step=samples_per_step * model.context_length,
        max_iters=max_iters,
        warmup_iters=config.schedule.warmup(max_iters),
        vocab_size=vocab_size,
        parameters=shape.num_parameters(),
        flops_per_token=shape.flops_per_token(),
        train_tokens=splits.train.tokens,
        val_tokens=splits.val.tokens,
        samples_per_epoch=windows.count,
        epochs=round(max_iters * samples_per_step / windows.count, 3),
        eval_windows=None if evaluation.eval_iters is None else evaluation.eval_iters * evaluation.eval_batch_size,
        mixture=tuple(_mixture(splits.train, model.context_length, max_iters * samples_per_step)),
    )


def _accumulation(training: TrainingConfig, world_size: int, problems: list[str]) -> int:
    """Micro-steps per update. ``global_batch_size`` must divide exactly: the curve must not depend on the cluster."""
    if training.global_batch_size is None:
        return training.gradient_accumulation_steps or 1
    per_micro_step = training.batch_size * world_size
    steps, rest = divmod(training.global_batch_size, per_micro_step)
    if rest or steps == 0:
        near = sorted({max(1, steps) * per_micro_step, (steps + 1) * per_micro_step})
        counts = _numbers_of_processes(training.global_batch_size, training.batch_size, world_size)
        largest = training.global_batch_size // world_size
        fitting = [size for size in range(1, largest + 1) if training.global_batch_size % (size * world_size) == 0]
        nearest = min(fitting, key=lambda size: abs(size - training.batch_size), default=None)
        problems.append(
            f"training.global_batch_size: {training.global_batch_size} is not a multiple of batch_size {training.batch_size} x "
            f"{world_size} processes = {per_micro_step}; try "
            + (f"--batch_size {nearest}, or " if nearest else "")
            + (f"{' or '.join(map(str, counts))} processes, or " if counts else "")
            + f"in a new run --global_batch_size {' or '.join(map(str, near))}"
        )
    return max(1, steps)


def _numbers_of_processes(global_batch_size: int, batch_size: int, world_size: int) -> list[int]:
    """Up to three numbers of processes that fit an update of so many sequences: the nearest to ``world_size``."""
    micro_batches, rest = divmod(global_batch_size, batch_size)
    fitting = [] if rest else [count for count in range(1, micro_batches + 1) if micro_batches % count == 0]
    return sorted(sorted(fitting, key=lambda count: (abs(count - world_size), count))[:3])


def _vocab_size(model: ModelConfig, splits: Splits, problems: list[str]) -> int:
    known = splits.train.tokenizer["vocab_size"] if splits.train.tokenizer else None
    largest = max(splits.train.max_id, splits.val.max_id)
    vocab_size = model.vocab_size or known
    if vocab_size is None:
        problems.append(f"model.vocab_size: a bare file of ids does not say; its largest id is {largest}: type --vocab_size N")
    elif vocab_size <= largest:  # also the tokenizer's own: a bare validation file may come from another one
        problems.append(
            f"model.vocab_size: {vocab_size} is too small, the data holds token id {largest}; "
            f"type --vocab_size {max(known or 0, largest + 1)}"
        )
    return vocab_size or largest + 1


def _max_iters(training: TrainingConfig, samples_per_step: int, context_length: int, windows: int, done: TrainState) -> int:
    if training.max_tokens is not None:
        left = (training.max_tokens - done.tokens) / context_length
    elif training.epochs is not None:
        left = training.epochs * windows - done.samples
    else:
        return training.max_iters or 100_000
    return done.step + max(0, math.ceil(round(left / samples_per_step, 6)))


def _tokenizer_problems(config: RunConfig, splits: Splits) -> list[str]:
    train, val = splits.train.tokenizer, splits.val.tokenizer
    if train and val and train["fingerprint"] != val["fingerprint"]:
        return [
            f"data.val_data_path: made with tokenizer {val['name']}, the training data with {train['name']}: make both with one"
        ]
    return []


def _mixture(train: TokenSplit, context_length: int, samples: int) -> list[str]:
    """For each dataset of a mixture its share of the samples, and how often a run of so many ``samples`` reads it."""
    total = sum(train.weights)
    lines = []
    for part, weight in zip(train.parts, train.weights, strict=True):
        passes = samples * weight / total / Windows(part, context_length).count
        lines.append(f"{weight / total:.2%} {part.source}: {part.tokens:,} tokens, read {passes:.2f} times")
    return lines
