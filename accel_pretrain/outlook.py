"""What a run will be, as far as it can be known before it starts: :class:`Outlook`. The plan prints it, the lint reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from accel_pretrain.checkpoint import read_model_config, resolve
from accel_pretrain.cluster import StepTime, modelled_micro_step, optimizer_seconds, step_time
from accel_pretrain.compiling import wants_compile
from accel_pretrain.config import Plan, RunConfig, Splits, make_plan, open_splits
from accel_pretrain.data import Windows
from accel_pretrain.errors import ConfigError
from accel_pretrain.estimates import Memory, Workload, checkpoint_bytes, flops_per_token, memory, parameters
from accel_pretrain.files import expanded
from accel_pretrain.hardware import CONTEXT_BYTES, KERNEL_BYTES, Machine, free_disk
from accel_pretrain.mixture import are_there
from accel_pretrain.models import ModelConfig, mup
from accel_pretrain.optim import kept_per_weight
from accel_pretrain.preset import load_with
from accel_pretrain.probe import probe
from accel_pretrain.runtime import resolve_precision
from accel_pretrain.shards import TokenSplit
from accel_pretrain.typed_yaml import CommandLine, Entry, to_plain
from accel_pretrain.update_costs import with_update

T = TypeVar("T", bound=RunConfig)

CHINCHILLA = 20  # tokens per parameter at the least compute for a loss (Hoffmann et al. 2022, table 3)
HEAP = 1.5  # of what PyTorch asks for on a CPU, glibc may hold (1.2 to 1.47 in benchmarks.plan): its heap has holes


@dataclass(frozen=True)
class Pace:
    """Seconds of one update, and where that number is from."""

    seconds: float
    source: str
    parts: StepTime | None = None


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A run before it starts. ``splits`` is None where the data is not here; ``pace`` where nobody can say."""

    config: RunConfig
    plan: Plan
    load: Workload
    machine: Machine | None
    splits: Splits | None
    memory: Memory
    disk_free: int | None
    pace: Pace | None = None
    pace_missing: str = "type --probe, --tokens_per_sec N, or --hardware h100"

    @property
    def tokens(self) -> int:
        return self.plan.tokens

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.plan.parameters

    @property
    def flops(self) -> float:
        return float(self.tokens) * self.plan.flops_per_token

    @property
    def passes(self) -> float | None:
        """Over the training data; None where it is not known."""
        return self.plan.epochs if self.splits else None

    @property
    def memory_needed(self) -> int:
        """Bytes that must be free on a device: tensors, and what surrounds them."""
        if self.load.device == "cpu":
            return round(HEAP * self.memory.total)
        return self.memory.total + CONTEXT_BYTES

    @property
    def host_memory(self) -> int:
        """Bytes that rank 0 needs in main memory to save: of a sharded run, all weights and moments in float32, for everybody.

        0 where each process holds everything anyway. See :class:`accel_pretrain.saver.Gathered`.
        """
        sharded = self.load.strategy != "ddp" and self.load.world_size > 1
        return round(4 * (1 + self.load.moments) * self.plan.parameters) if sharded else 0

    @property
    def checkpoint(self) -> int:
        return checkpoint_bytes(self.load)

    @property
    def checkpoints_kept(self) -> int:
        """The most that are on disk at a time: those to keep, the best, and the one being written."""
        config = self.config.checkpoint
        made = self.plan.max_iters // config.checkpoint_interval + 1
        kept = made if config.keep_last is None else min(made, config.keep_last)
        return kept + int(config.save_best) + 1

    @property
    def hours(self) -> float | None:
        """By the time of whole updates: smaller ones at the beginning take as much less."""
        return None if self.pace is None else self.pace.seconds * (self.tokens / self.plan.tokens_per_step) / 3600

    @property
    def eval_windows(self) -> int | None:
        """Windows of each of the two splits that an evaluation reads; None where neither the config nor the data says."""
        counts = [] if self.plan.eval_windows is None else [self.plan.eval_windows]
        if self.splits is not None:
            counts.append(Windows(self.splits.val, self.config.model.context_length).count)
        return min(counts, default=None)

    @property
    def eval_share(self) -> float | None:
        """Time in evaluations per time in updates: a third of an update's operations for each token, on both splits."""
        if self.eval_windows is None:
            return None
        return 2 / 3 * self.eval_windows / (self.config.evaluation.eval_interval * self.plan.samples_per_step)


def first_loss(model: ModelConfig, vocab_size: int) -> float:
    """The loss to expect of new weights: ln V, plus half the variance of the logits, more where embeddings are tied.

    The last norm gives numbers of size 1 and the output matrix has ``init_std``, so logits are normal with variance
    D init_std^2, and the log of the mean of their exponentials is half of that. A soft cap bounds them. A tied matrix makes the
    logit of the token that was just read D init_std times what is left of its embedding after all blocks.
    """
    spread = math.sqrt(model.d_model) * model.init_std * mup.init_scale(model, "lm_head.weight")
    own = model.d_model * model.init_std * _left_of_embedding(model) if model.tie_embeddings else -math.inf
    if (cap := model.logit_softcap) is not None:
        spread, own = min(spread, cap), cap * math.tanh(own / cap)
    usual = math.log(vocab_size) + spread**2 / 2
    return max(usual, own) + math.log1p(math.exp(-abs(usual - own)))


def _left_of_embedding(model: ModelConfig) -> float:
    """The cosine between a token's embedding and what new blocks make of it: 1 if they add nothing."""
    variance, F = model.init_std**2, model.ff_width
    own = variance * (model.d_model if model.scale_embeddings else 1)
    before = model.d_model * variance  # of what the feed-forward's activation gets: its moment below is for small numbers
    moment = {"relu2": 1.5 * before**2, "swiglu": before**2 / 4, "geglu": before**2 / 4}.get(model.activation, before / 4)
    added = 2.0 * model.num_layers if model.sandwich_norm else 0.0 if model.zero_init else F * moment * variance / 2
    positions = variance if model.position == "learned" else 0.0
    return math.sqrt(own / (own + added + positions)) if own else 0.0


def critical_batch(parameters: int, tokens: int) -> float:
    """Tokens per update beyond which larger updates stop saving updates, by the end of a run.

    B = 2e8 / L^4.76 (Kaplan et al. 2020, eq. 1.4) at the loss L = 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28 (Hoffmann et al. 2022,
    eq. 10): an order of magnitude, since both were fitted to other data.
    """
    loss = 1.69 + 406.4 / parameters**0.34 + 410.7 / max(1, tokens) ** 0.28
    return 2e8 / loss**4.76


def unknown_splits(config: RunConfig) -> Splits:
    """Stand-ins for data that is not here, endless and without memory, so that what does not depend on it can be planned."""
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        raise ConfigError("model.vocab_size: the data is not here to say; type --vocab_size N, or --train_data_path DIR")
    if config.training.epochs is not None:
        raise ConfigError("training.epochs: the data is not here to say how many updates that is; type --max_iters N")
    endless = np.broadcast_to(np.zeros(1, dtype=np.uint16), (1 << 40,))
    split = TokenSplit(source="unknown", files=(endless,), max_id=vocab_size - 1, fingerprint="unknown")
    return Splits(split, split)


def workload(config: RunConfig, plan: Plan, device: str) -> Workload:
    """What one process of a run has to carry. What a launcher may ask for is not known here."""
    moments = kept_per_weight(config.optimizer, config.model, plan.vocab_size)
    flops = plan.flops_per_token * plan.tokens / plan.world_size
    load = Workload(
        model=config.model, vocab_size=plan.vocab_size, batch_size=plan.batch_size, accumulation=plan.accumulation,
        precision=precision_of(config, device), device="cpu" if device == "cpu" else "cuda",
        compiled=wants_compile(config.training, flops, device), checkpointing=config.training.activation_checkpointing,
        moments=moments, strategy=config.parallel.strategy or "ddp", world_size=plan.world_size,
        chunked=config.training.chunked_loss,
    )  # fmt: skip
    return with_update(load, config.optimizer)


def precision_of(config: RunConfig, device: str) -> str:
    """The precision on a device that may not be here: what the config or launcher says, else bf16 on a GPU."""
    chosen, source = resolve_precision(config.training, device == "cpu")
    return "bf16" if source == "device" and device == "cuda" else chosen


def load_with_shape(cls: type[T], line: CommandLine) -> T:
    """A config with more sections than a run's: defaults, the preset, the shape of ``init_from``, the file, the overrides."""
    config = load_with(cls, line.preset, line.config, line.overrides)
    if config.checkpoint.init_from is None:
        return config
    shape = read_model_config(resolve(expanded(config.checkpoint.init_from))).resolved()
    beneath = {f"model.{key}": Entry(value, str(config.checkpoint.init_from)) for key, value in to_plain(shape).items()}
    return load_with(cls, line.preset, line.config, line.overrides, beneath)


def splits_of(config: RunConfig) -> Splits | None:
    """The data, or None where it is not here and the config says enough without."""
    given = config.data.train_data_path
    if config.model.vocab_size is not None and (given is None or not are_there(given)):
        return None
    return None if given is None else open_splits(config.data)


def look_ahead(
    config: RunConfig,
    splits: Splits | None,
    *,
    world_size: int = 1,
    machine: Machine | None = None,
    plan: Plan | None = None,
) -> Outlook:
    """The outlook on a run, without its pace. Raises :class:`ConfigError` with everything that does not fit together."""
    if plan is None and splits is None:
        nowhere = replace(config, data=config.data.without_documents())
        plan = make_plan(nowhere, unknown_splits(config), world_size)
    plan = plan or make_plan(config, splits or unknown_splits(config), world_size)
    load = workload(config, plan, machine.device if machine else "cuda")
    return Outlook(
        config=config, plan=plan, load=load, machine=machine, splits=splits, memory=_with_libraries(memory(load), load.device),
        disk_free=free_disk(Path(config.checkpoint.checkpoint_dir)),
    )  # fmt: skip


def _with_libraries(tensors: Memory, device: str) -> Memory:
    """With what a CPU's libraries take while they compute; that of a GPU is in :attr:`Outlook.memory_needed`."""
    return replace(tensors, parts=tensors.parts | {"libraries": KERNEL_BYTES}) if device == "cpu" else tensors


def with_tokens_per_sec(outlook: Outlook, tokens_per_sec: float) -> Outlook:
    """At a throughput that somebody knows, of all devices together."""
    return replace(outlook, pace=Pace(outlook.plan.tokens_per_step / tokens_per_sec, "the given tokens per second"))


def with_model_of(outlook: Outlook, machine: Machine) -> Outlook:
    """At the pace that data sheets and published runs let expect; see :mod:`accel_pretrain.cluster`."""
    load = outlook.load
    micro, optimizer = modelled_micro_step(load, machine), optimizer_seconds(load, machine)
    if micro is None or optimizer is None:
        why = "in float32" if load.width == 4 else "of a training run on it"
        return replace(outlook, pace_missing=f"no published figure for {machine.name} {why}; type --tokens_per_sec N")
    parts = step_time(load, machine, micro, optimizer)
    if parts is None:
        missing = f"the links between machines with {machine.name} are not known; type --network BYTES_PER_SECOND"
        return replace(outlook, pace_missing=missing)
    return replace(outlook, pace=Pace(parts.seconds, f"a model of {machine.name}, see accel_pretrain/cluster.py", parts))


def with_probe(outlook: Outlook, machine: Machine, seconds: float) -> Outlook:
    """At the pace that so many seconds of real updates have on this machine."""
    load_ = outlook.load
    speed = probe(load_, outlook.config.optimizer, machine.torch_device, seconds=seconds, free=machine.memory)
    if isinstance(speed, str):
        return replace(outlook, pace_missing=f"no probe: {speed}; type --tokens_per_sec N or --hardware h100")
    parts = step_time(load_, machine, speed.micro_step, speed.optimizer)
    if parts is None:
        return replace(outlook, pace_missing="how fast devices talk here is not known; type --link BYTES_PER_SECOND")
    ran = "" if speed.layers == load_.model.num_layers else f", {speed.layers} of {load_.model.num_layers} layers"
    eager = ", not compiled" if load_.compiled else ""
    source = f"a probe of {speed.rounds} updates here ({speed.sequences} of {load_.batch_size} sequences{ran}{eager})"
    return replace(outlook, pace=Pace(parts.seconds, source, parts))


def split_overlap(splits: Splits) -> bool:
    """Whether training and validation read the same file somewhere."""
    return bool(set(map(_place, splits.train.files)) & set(map(_place, splits.val.files)))


def _place(ids: np.ndarray) -> object:
    """Which file an array was mapped from, or else which array it is."""
    base: object = ids
    while base is not None and not isinstance(base, np.memmap):
        base = getattr(base, "base", None)
    return id(ids) if base is None else (str(base.filename), base.offset)


def groups(load: Workload) -> dict[str, tuple[int, int]]:
    """Parameters and operations per token by group, for a table: those that a model has."""
    counts, flops = parameters(load.model, load.vocab_size), flops_per_token(load.model, load.vocab_size)
    return {
        "embeddings": (sum(count for name, count in counts.items() if name.endswith("embeddings")), 0),
        "attention": (counts["attention"], flops["attention matrices"] + flops["attention scores"]),
        "feed-forward": (counts["feed-forward"], flops["feed-forward"]),
        "norms": (counts["norms"], 0),
        "output": (counts["output"], flops["output"]),
    }
