"""What is in a checkpoint, and how a run, or whoever only wants the model, gets it out again.

A run directory holds ``checkpoint_00005000/`` folders and text pointers: ``latest``, ``best``, ``stable``. In a folder are the
model and optimizer, as Accelerate's ``save_state`` writes and ``load_state`` reads them, and everything else that a run needs,
as JSON. :mod:`accel_pretrain.publish` makes them; :mod:`accel_pretrain.commit` decides whether one is whole, and finds it.
Nothing that is loaded can execute code.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from accel_pretrain.commit import MANIFEST, STATE, resolve
from accel_pretrain.errors import CheckpointError, refuse
from accel_pretrain.guard import Health
from accel_pretrain.models import ModelConfig, Transformer, hollow
from accel_pretrain.parallel import load_sharded, local
from accel_pretrain.peers import Peers
from accel_pretrain.runtime import together
from accel_pretrain.tokenizer import Tokenizer, load_tokenizer
from accel_pretrain.typed_yaml import from_mapping, option, to_plain

MODEL, WEIGHTS, OPTIMIZER = "model.json", "model.safetensors", "optimizer.bin"
_DOES_NOT_LOAD = (
    *(RuntimeError, ValueError, OSError, KeyError, EOFError, TypeError, AttributeError, AssertionError, IndexError),
    *(SafetensorError, pickle.UnpicklingError),
)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where and how often to save, what to keep, and from what to go on."""

    checkpoint_dir: Path = option(Path("checkpoints"), "the run directory", aliases=("out_dir", "output_dir"))
    checkpoint_interval: int = option(5000, "updates between checkpoints", aliases=("save_interval",))
    every_minutes: float | None = option(None, "minutes between checkpoints, besides checkpoint_interval; null: that alone")
    asynchronous: bool = option(False, "copy the state while the next update computes, and write it in the background")
    keep_last: int | None = option(3, "how many of the newest to keep (best, stable and pinned are kept besides); null: all")
    pin_interval: int | None = option(None, "keep every checkpoint whose update is a multiple of this, for good")
    save_best: bool = option(True, "publish a checkpoint whenever the validation loss is the lowest so far")
    resume_from: str | None = option(
        "auto", "auto: the newest checkpoint in checkpoint_dir, if any; never; or a path", aliases=("resume",)
    )
    init_from: Path | None = option(None, "a run or checkpoint whose shape and weights a new run begins with, at step 0")
    allow_batch_change: bool = option(False, "go on with another number of sequences per update, which changes the curve")

    def __post_init__(self) -> None:
        minutes, pins = self.every_minutes, self.pin_interval
        refuse(
            (self.checkpoint_interval < 1, f"checkpoint_interval: must be at least 1, got {self.checkpoint_interval}"),
            (self.keep_last is not None and self.keep_last < 1, f"keep_last: must be at least 1 or null, got {self.keep_last}"),
            (minutes is not None and not 0 < minutes < 1e6, f"every_minutes: must be positive or null, got {minutes}"),
            (pins is not None and pins < 1, f"pin_interval: must be at least 1 or null, got {pins}"),
        )


@dataclass
class TrainState:
    """All that a run must remember besides weights and optimizer: counters, best validation loss, what the guard remembers."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    best_val_loss: float | None = None
    owes_evaluation: bool = False  # one was abandoned to save and leave
    warmup_iters: int | None = None  # of the plan in force when this was saved; null in checkpoints of version 0.1.0
    max_iters: int | None = None  # likewise
    batch_warmup_from: int | None = None  # likewise
    health: Health = field(default_factory=Health)


# ------------------------------------------------------------------------------------------------------------- loading


def read_state(checkpoint: Path) -> TrainState:
    """The counters of a checkpoint, checked for their types."""
    document = read_facts(checkpoint)
    try:
        state = TrainState(
            step=int(document["step"]), samples=int(document["samples"]), tokens=int(document["tokens"]),
            best_val_loss=None if document["best_val_loss"] is None else float(document["best_val_loss"]),
            owes_evaluation=document.get("owes_evaluation") is True, health=Health.parse(document.get("health")),
            warmup_iters=_count(document.get("warmup_iters")), max_iters=_count(document.get("max_iters")),
            batch_warmup_from=_count(document.get("batch_warmup_from")),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{checkpoint / STATE} is not as a run writes it ({error})") from None
    if min(state.step, state.samples, state.tokens) < 0:
        raise CheckpointError(f"{checkpoint / STATE} counts below zero")
    return state


def _count(value: Any) -> int | None:
    return None if value is None else max(0, int(value))


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """All of ``trainer_state.json``: the counters, and the facts that were given when it was published."""
    try:
        document = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint / STATE} cannot be read ({error})") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{checkpoint / STATE} is not as a run writes it")
    return document


def restore(accelerator: Accelerator, optimizer: torch.optim.Optimizer, checkpoint: Path) -> TrainState:
    """Load weights and optimizer state from a verified checkpoint into what ``accelerator`` prepared. Collective.

    Learning rate, decay and the like stay what the config says now; only the moments come from the checkpoint. What
    Accelerate would pass over in silence is refused: moments of another update, numbers that are not finite, ranks that differ.
    """
    with together(accelerator, CheckpointError):
        require_optimizer(checkpoint)
        refused = [path.name for path in checkpoint.glob("*") if path.name.startswith(("custom_checkpoint", "pytorch_model"))]
        if refused:
            raise CheckpointError(f"{checkpoint}: {refused[0]} is a pickle, which is never loaded")
    hyperparameters = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with together(accelerator, CheckpointError), _quiet():
        try:
            if accelerator.is_fsdp2:
                load_sharded(accelerator, checkpoint / WEIGHTS, checkpoint / OPTIMIZER)
            else:
                accelerator.load_state(str(checkpoint))
        except _DOES_NOT_LOAD as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise CheckpointError(
                f"{checkpoint} does not fit this model or optimizer, or was tampered with: {reason}"
            ) from None
    for group, own in zip(optimizer.param_groups, hyperparameters, strict=True):
        group.update(own)
    weights = {name: parameter for model in accelerator._models for name, parameter in model.named_parameters()}
    with together(accelerator, CheckpointError):
        state = read_state(checkpoint)
        _refuse_other_moments(optimizer, checkpoint, state)
        states = enumerate(optimizer.state.values())
        moments = {f"a moment ({name} of parameter {number})": own for number, every in states for name, own in every.items()}
        for tensors in (weights, moments):
            if bad := not_finite(tensors):
                raise CheckpointError(f"{checkpoint}: {bad} holds numbers that are not finite; go on from an older one")
    if accelerator.num_processes > 1:
        # Shares differ; but they are of one checkpoint if that is described alike everywhere.
        digest = (checkpoint / MANIFEST).read_bytes() if accelerator.is_fsdp2 else _digest(weights)
        if len(set(Peers(accelerator).gather(digest))) > 1:
            raise CheckpointError(f"{checkpoint}: the processes have loaded different weights; is its folder one and the same?")
    return state


def _refuse_other_moments(optimizer: torch.optim.Optimizer, checkpoint: Path, state: TrainState) -> None:
    """The optimizer counts the updates that it applied, for every parameter: as many as the counters say."""
    facts, counted = read_facts(checkpoint), optimizer_updates(optimizer)
    expected = {facts.get("optimizer_updates", counted)}
    if counted is not None and "health" in facts:  # a checkpoint of version 0.1.0 does not say what was skipped
        expected.add(state.step - state.health.skipped)
    if expected != {counted}:
        said = " and ".join(map(str, sorted(expected - {counted}, key=str)))
        raise CheckpointError(f"{checkpoint}: its optimizer has made {counted} updates, its counters say {said}")


def optimizer_updates(optimizer: torch.optim.Optimizer) -> int | None:
    """How many updates the optimizer itself counts; None if it does not count, or differently for its parameters."""
    counts = {int(own["step"]) if "step" in own else None for own in optimizer.state.values()}
    everywhere = len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)
    return counts.pop() if len(counts) == 1 and everywhere else None


def not_finite(tensors: Mapping[str, Any]) -> str | None:
    """The name of a tensor that holds, in this process, something that is not finite; None if there is none."""
    with torch.no_grad():  # a sum is finite if its terms are, and costs a thirtieth of looking at each
        floating = {name: own for name, own in tensors.items() if torch.is_tensor(own) and own.is_floating_point()}
        sums = [local(own.detach()).sum(dtype=torch.float32).cpu() for own in floating.values()]
        return next((name for name, own in zip(floating, sums, strict=True) if not torch.isfinite(own)), None)


def _digest(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """A number for the bits of each tensor of 4-byte numbers, computed where it is."""
    whole = [own.detach().contiguous().view(torch.int32) for own in tensors.values() if own.element_size() == 4]
    return tuple(int(own.sum(dtype=torch.int64)) for own in whole)


def require_optimizer(checkpoint: Path) -> None:
    """Raise :class:`CheckpointError` for weights that no run has trained: there is nothing to go on from."""
    if not any(checkpoint.glob("optimizer*")):
        begin = f"to begin a run with it, type --init_from {checkpoint.parent} --checkpoint_dir NEW"
        raise CheckpointError(f"{checkpoint} holds weights and no optimizer: {begin}")


def write_model_description(folder: Path, config: ModelConfig, vocab_size: int) -> None:
    """Write ``model.json``: enough to build the model without anything else."""
    document = {**to_plain(config), "vocab_size": vocab_size}
    (folder / MODEL).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def load_model(run_or_checkpoint: Path | str) -> Transformer:
    """The trained model in evaluation mode and float32, on the CPU, from a run directory (its newest) or a checkpoint."""
    return read_model(resolve(Path(run_or_checkpoint)))


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The model's shape, vocabulary included, from a verified checkpoint."""
    path = checkpoint / MODEL
    try:
        config = from_mapping(ModelConfig, json.loads(path.read_text(encoding="utf-8")), str(path))
        with safe_open(checkpoint / WEIGHTS, "pt") as file:
            tensors = len(file.keys())
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read, or its weights ({error})") from None
    refuse(
        (config.vocab_size is None, f"{path}: vocab_size is missing"),
        (config.num_layers > tensors, f"{path}: num_layers is {config.num_layers}, and there are only {tensors} weights"),
    )
    return config


def read_model(checkpoint: Path) -> Transformer:
    """The same as :func:`load_model`, from a checkpoint that :func:`resolve` has verified: hashing it once is enough.

    The parameters are mapped from the file: what is not used takes no memory, and changing them does not change the file.
    """
    config = read_model_config(checkpoint)
    assert config.vocab_size is not None
    model = hollow(config, config.vocab_size)
    try:
        model.load_state_dict(load_file(checkpoint / WEIGHTS), assign=True)
    except _DOES_NOT_LOAD as error:
        raise CheckpointError(f"{checkpoint / WEIGHTS} does not fit its {MODEL}: {str(error).splitlines()[0][:300]}") from None
    model.make_tables()
    facts = read_facts(checkpoint) if (checkpoint / STATE).is_file() else {}  # imported weights have none
    model.document_id = _count(facts.get("document_id"))
    return model.eval()


def read_tokenizer(checkpoint: Path, named: str | None = None) -> Tokenizer:
    """The tokenizer that was saved in a verified checkpoint, or for one without any the one ``named`` by a person.

    Raises :class:`CheckpointError` when there is none, or when the one named is another one, or too large for the model.
    """
    own = checkpoint / "tokenizer"
    if named is None and not own.is_dir():
        raise CheckpointError(
            f"{checkpoint} holds no tokenizer, because it was trained on a bare file of ids; name one with --tokenizer gpt2"
        )
    tokenizer = load_tokenizer(own if named is None else named)
    if named is not None and own.is_dir() and load_tokenizer(own).fingerprint != tokenizer.fingerprint:
        raise CheckpointError(f"source.tokenizer: {checkpoint} holds its own, which is another one; leave --tokenizer out")
    vocab_size = read_model_config(checkpoint).vocab_size or 0
    if named is not None and tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"source.tokenizer: {tokenizer.name} has {tokenizer.vocab_size:,} ids, the model knows only {vocab_size:,}"
        )
    return tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
