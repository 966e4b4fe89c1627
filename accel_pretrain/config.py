"""The whole of a run as a person wrote it (:class:`RunConfig`), and what the machine derives from it (:class:`Plan`).

Nothing ever assigns to a config. What is only known once the data and the processes are known is in the Plan.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from accel_pretrain import __version__
from accel_pretrain.aids import ONE_BATCH_UPDATES, DebugConfig
from accel_pretrain.aids import problems as debug_problems
from accel_pretrain.batch_warmup import BatchWarmup
from accel_pretrain.checkpoint import CheckpointConfig, TrainState
from accel_pretrain.data import DataConfig, Windows, turns_of
from accel_pretrain.errors import ConfigError
from accel_pretrain.mixture import open_data, paths_of
from accel_pretrain.models import ModelConfig, hollow
from accel_pretrain.optim import AdamW, Optimizer
from accel_pretrain.optim import problems as optimizer_problems
from accel_pretrain.parallel import ParallelConfig
from accel_pretrain.runtime import TrainingConfig
from accel_pretrain.schedule import Cosine, Schedule
from accel_pretrain.shards import TokenSplit, splits_in
from accel_pretrain.trackers import LoggingConfig
from accel_pretrain.typed_yaml import section, to_plain
from accel_pretrain.validation import EvaluationConfig

USUAL_UPDATES = 100_000  # of a run that does not say how long it is


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
    train = open_data(
        config.train_data_path, "train", config.dtype, mixed=True, end=config.mixture_end,
        end_tokens=config.mixture_end_tokens or 0,
    )  # fmt: skip
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
        **{f"data.{key}": getattr(config.data, key) for key in ("sampling", "packing", "intra_document_masking")},
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
    last_stable: int | None = None
    batch_warmup_from: int | None = None
    batch_warmup_samples: int = 0
    document_id: int | None = None
    mixture: tuple[str, ...] = ()

    @property
    def batch_warmup(self) -> BatchWarmup | None:
        """How updates grow at the beginning; None where all are alike."""
        if self.batch_warmup_from is None:
            return None
        return BatchWarmup(self.batch_warmup_from, self.samples_per_step, self.batch_warmup_samples)

    @property
    def samples(self) -> int:
        """What a run of ``max_iters`` such updates reads."""
        warmup = self.batch_warmup
        return warmup.consumed_after(self.max_iters) if warmup else self.max_iters * self.samples_per_step

    @property
    def tokens(self) -> int:
        return self.samples * (self.tokens_per_step // self.samples_per_step)

    def samples_of(self, consumed: int) -> int:
        """Sequences of the update that begins when so many samples were consumed: ``samples_per_step``, or fewer at first."""
        warmup = self.batch_warmup
        return self.samples_per_step if warmup is None else warmup.size(consumed)

    def begin_of(self, step: int, done: TrainState) -> int:
        """How many samples were consumed when update ``step`` began, seen from ``done``: the next update, or one before."""
        begin, warmup = done.samples + (step - 1 - done.step) * self.samples_per_step, self.batch_warmup
        return begin if warmup is None or begin >= min(warmup.over, done.samples) else warmup.consumed_after(step - 1)

    def describe(self) -> str:
        """A table for people."""
        lines = [
            f"{key:<20} {value:,}" if isinstance(value, int) else f"{key:<20} {value}"
            for key, value in dataclasses.asdict(self).items()
            if key != "mixture" and (self.batch_warmup_from is not None or not key.startswith("batch_warmup"))
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
    windows = Windows(splits.train, model.context_length, config.data.packing)
    Windows(splits.val, model.context_length)  # refuses a split that is smaller than one window
    done = done or TrainState()
    warmup = _batch_warmup(config, samples_per_step, world_size, done, problems)
    max_iters = _max_iters(training, warmup, model.context_length, windows.count, done)
    if config.debug.overfit_one_batch and not any((training.max_iters, training.max_tokens, training.epochs)):
        max_iters = ONE_BATCH_UPDATES
    samples = warmup.consumed_after(max_iters)
    problems += debug_problems(config.debug, max_iters - done.step, training.on_spike)
    problems += (f"schedule.{problem}" for problem in config.schedule.problems(config.optimizer.lr, max_iters))
    problems += optimizer_problems(config.optimizer, model, vocab_size)
    problems += _tokenizer_problems(config, splits)
    document_id = _document_id(config, splits, problems)
    if problems:
        raise ConfigError(problems)
    shape = hollow(model, vocab_size)
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
        epochs=round(samples / windows.count, 3),
        eval_windows=None if evaluation.eval_iters is None else evaluation.eval_iters * evaluation.eval_batch_size,
        last_stable=config.schedule.last_stable(max_iters),
        batch_warmup_from=warmup.first if warmup.over else None,
        batch_warmup_samples=warmup.over,
        document_id=document_id,
        mixture=tuple(_mixture(splits.train, config, samples)),
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


def _batch_warmup(config: RunConfig, full: int, world_size: int, done: TrainState, problems: list[str]) -> BatchWarmup:
    """How the updates grow; over no samples where they do not, or no more."""
    training, one = config.training, config.training.batch_size * world_size
    if training.batch_warmup_tokens is None or config.debug.overfit_one_batch:
        return BatchWarmup(full, full, 0)
    over = -(-training.batch_warmup_tokens // config.model.context_length)
    first = training.batch_warmup_from or one
    fits = first % one == 0 and full % first == 0
    if not fits and done.samples < over:
        sizes = [size for size in range(1, first + 1) if first % (size * world_size) == 0]
        problems.append(
            f"training.batch_warmup_from: {first} sequences must be a multiple of batch_size {training.batch_size} x "
            f"{world_size} processes = {one}, and a divisor of the {full} of a whole update; try --batch_warmup_from {one}"
            + (f", or --batch_size {sizes[-1]}" if first % one and sizes else "")
        )
    return BatchWarmup(first, full, over) if fits and first < full else BatchWarmup(full, full, 0)


def _max_iters(training: TrainingConfig, warmup: BatchWarmup, context_length: int, windows: int, done: TrainState) -> int:
    if training.max_tokens is not None:
        left = (training.max_tokens - done.tokens) / context_length
    elif training.epochs is not None:
        left = training.epochs * windows - done.samples
    else:
        return training.max_iters or USUAL_UPDATES
    return done.step + warmup.updates_until(done.samples + left, done.samples)


def _tokenizer_problems(config: RunConfig, splits: Splits) -> list[str]:
    train, val = splits.train.tokenizer, splits.val.tokenizer
    if train and val and train["fingerprint"] != val["fingerprint"]:
        return [
            f"data.val_data_path: made with tokenizer {val['name']}, the training data with {train['name']}: make both with one"
        ]
    return []


def _document_id(config: RunConfig, splits: Splits, problems: list[str]) -> int | None:
    """The id with which a document begins, where tokens are to see only their own."""
    if not config.data.intra_document_masking:
        return None
    if splits.train.tokenizer is None:
        problems.append(
            "data.intra_document_masking: a bare file of ids does not say which ends a text; make a dataset with prep.tokenize"
        )
        return None
    return int(splits.train.tokenizer["eot_id"])


def _mixture(train: TokenSplit, config: RunConfig, samples: int) -> list[str]:
    """For each dataset of a mixture its share of the samples, and how often a run of so many ``samples`` reads it."""
    turns, lines = turns_of(train, config.model.context_length), []
    shares = [[weight / sum(weights) for weight in weights] for weights in (train.weights, train.end_weights or train.weights)]
    for part, first, last, count in zip(train.parts, *shares, turns.counts(samples) if turns else (), strict=True):
        passes = count / Windows(part, config.model.context_length, config.data.packing).count
        share = f"{first:.2%}" + (f" to {last:.2%}" if train.end_weights else "")
        lines.append(f"{share} {part.source}: {part.tokens:,} tokens, read {passes:.2f} times")
    return lines
