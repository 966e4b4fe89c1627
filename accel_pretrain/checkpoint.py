"""Checkpoints that are whole or do not exist: publish, verify, find, restore, prune.

A run directory holds ``checkpoint_00005000/`` folders and two text pointers, ``latest`` and ``best``. :func:`publish` writes
everything into ``.tmp_checkpoint_...``, flushes every file to disk, writes ``manifest.json`` with the size and SHA-256 of each,
and only then renames the folder: **a folder without a manifest that verifies is not a checkpoint**. Old ones are removed after
that, never before. Accelerate's ``save_state`` and ``load_state`` write and read the model and optimizer; naming, completeness,
rotation and everything else that a run needs are here, as JSON. Nothing that is loaded can execute code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from accel_pretrain.errors import CheckpointError, refuse
from accel_pretrain.files import sha256_of, sync_folder, write_whole
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.runtime import together
from accel_pretrain.tokenizer import Tokenizer, load_tokenizer
from accel_pretrain.typed_yaml import from_mapping, option, to_plain

MANIFEST, STATE, MODEL, WEIGHTS = "manifest.json", "trainer_state.json", "model.json", "model.safetensors"
FORMAT = "accel_pretrain.checkpoint"
_NAME = re.compile(r"checkpoint_(\d{8,})")
_LEGACY_NAME = re.compile(r"checkpoint(?:_iter)?_(\d+)(?:\.pt)?")  # how earlier training programs called theirs
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where and how often to save, what to keep, and from what to go on."""

    checkpoint_dir: Path = option(Path("checkpoints"), "the run directory", aliases=("out_dir", "output_dir"))
    checkpoint_interval: int = option(5000, "updates between checkpoints", aliases=("save_interval",))
    keep_last: int | None = option(3, "how many of the newest to keep (the best is kept besides); null: all")
    save_best: bool = option(True, "publish a checkpoint whenever the validation loss is the lowest so far")
    resume_from: str | None = option(
        "auto", "auto: the newest checkpoint in checkpoint_dir, if any; never; or a path", aliases=("resume",)
    )
    init_from: Path | None = option(None, "a run or checkpoint whose shape and weights a new run begins with, at step 0")

    def __post_init__(self) -> None:
        refuse(
            (self.checkpoint_interval < 1, f"checkpoint_interval: must be at least 1, got {self.checkpoint_interval}"),
            (self.keep_last is not None and self.keep_last < 1, f"keep_last: must be at least 1 or null, got {self.keep_last}"),
        )


@dataclass
class TrainState:
    """All that a run must remember besides weights and optimizer: three counters and the best validation loss."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    best_val_loss: float | None = None


# ---------------------------------------------------------------------------------------------------------------- saving


def publish(
    accelerator: Accelerator,
    run_dir: Path,
    state: TrainState,
    *,
    facts: Mapping[str, Any],
    write_extras: Callable[[Path], None],
    is_best: bool = False,
    keep_last: int | None = None,
) -> Path:
    """Save model, optimizer and ``state`` as ``run_dir/checkpoint_<step>``, and return that path. Collective.

    ``facts`` go into ``trainer_state.json`` beside the counters, for :func:`read_facts`; ``write_extras`` adds files (on the
    main process) before the manifest is made. If any process fails, all raise, and the
    run directory is as it was before.
    """
    final = run_dir / f"checkpoint_{state.step:08d}"
    temporary = run_dir / f".tmp_{final.name}"
    with together(accelerator, CheckpointError):
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    try:
        with together(accelerator, CheckpointError), _quiet():
            accelerator.save_state(str(temporary), safe_serialization=True)
        with together(accelerator, CheckpointError):
            if accelerator.is_main_process:
                _write_json(temporary / STATE, {**dataclasses.asdict(state), **facts})
                write_extras(temporary)
                _seal(temporary)
                _commit(temporary, final, is_best)
    except Exception:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if accelerator.is_main_process:
        _prune(run_dir, keep_last)
    accelerator.wait_for_everyone()
    return final


def publish_weights(run_dir: Path, write: Callable[[Path], None]) -> Path:
    """Publish what ``write`` puts into a folder as ``run_dir/checkpoint_00000000``: weights that no run here has made.

    It has no optimizer, so that a run can begin with it (``init_from``) but not resume it. Raises :class:`CheckpointError` when
    ``run_dir`` holds checkpoints already. For one process.
    """
    if existing := _checkpoints(run_dir):
        raise CheckpointError(f"{run_dir} already holds {existing[0].name}; name another directory")
    final = run_dir / "checkpoint_00000000"
    temporary = run_dir / f".tmp_{final.name}"
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        _write_json(temporary / STATE, dataclasses.asdict(TrainState()))
        _seal(temporary)
        _commit(temporary, final, is_best=False)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise
    return final


def _seal(folder: Path) -> None:
    """Flush every file, then write the manifest that lists them: what follows may rely on their bytes."""
    files = {}
    mode = 0o666 & ~_umask()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        path.chmod(mode)  # safetensors makes files that only their owner can read
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    _write_json(folder / MANIFEST, {"format": FORMAT, "version": 1, "files": files})
    for directory in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync_folder(directory)


def _commit(temporary: Path, final: Path, is_best: bool) -> None:
    """Give the sealed folder its name: from here on it is the newest checkpoint."""
    if final.exists():  # the same step again, after going back to an older checkpoint
        trash = final.with_name(f".trash_{final.name}")
        shutil.rmtree(trash, ignore_errors=True)
        final.rename(trash)
    temporary.rename(final)
    sync_folder(final.parent)
    for pointer in ("best", "latest") if is_best else ("latest",):
        _point(final.parent / pointer, final.name)
    shutil.rmtree(final.with_name(f".trash_{final.name}"), ignore_errors=True)


def _point(pointer: Path, name: str) -> None:
    write_whole(pointer, f"{name}\n".encode())


def _prune(run_dir: Path, keep_last: int | None) -> None:
    if keep_last is None:
        return
    best = _read_pointer(run_dir / "best")
    for path in _checkpoints(run_dir)[keep_last:]:
        if path.name != best:
            trash = path.with_name(f".trash_{path.name}")
            try:
                path.rename(trash)
                shutil.rmtree(trash)
            except OSError as error:
                _log.warning("could not remove the old checkpoint %s: %s", path, error)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextlib.contextmanager
def _quiet():  # noqa: ANN202
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --------------------------------------------------------------------------------------------------- finding and verifying


def _checkpoints(run_dir: Path) -> list[Path]:
    """Folders that are named as checkpoints, newest first."""
    if not run_dir.is_dir():
        return []
    named = [path for path in run_dir.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name.rpartition("_")[2]), reverse=True)


def _read_pointer(path: Path) -> str | None:
    try:
        name = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if _NAME.fullmatch(name) else None


def problem_with(checkpoint: Path) -> str | None:
    """Why a folder is not a good checkpoint, after comparing names, sizes and hashes with its manifest; None if it is one."""
    try:
        document = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            return f"its {MANIFEST} is of {document['format']}, not of a checkpoint"
        listed = {name: (int(info["bytes"]), str(info["sha256"])) for name, info in document["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    present = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir()} - {MANIFEST}
    if present != set(listed):
        odd = sorted(present ^ set(listed))[0]
        return f"{odd} is {'missing' if odd in listed else 'not part of it'}"
    for name, (size, sha256) in listed.items():
        path = checkpoint / name
        if path.is_symlink() or path.stat().st_size != size:
            return f"{name} has the wrong size"
        if sha256_of(path) != sha256:
            return f"{name} was changed after it was written"
    return None


def find_newest(run_dir: Path) -> Path | None:
    """The newest checkpoint that verifies, or None in a directory without any. Damaged ones are named in a warning."""
    candidates = _checkpoints(run_dir)
    problems = []
    for path in candidates:
        if (problem := problem_with(path)) is None:
            return path
        problems.append(f"{path}: {problem}")
        _log.warning("skipping the damaged checkpoint %s: %s", path, problem)
    if candidates:
        raise CheckpointError([f"no checkpoint in {run_dir} can be read", *problems])
    return None


def resolve(path: Path) -> Path:
    """The good checkpoint that a person means: a checkpoint folder, a run directory, or its ``latest`` or ``best`` pointer.

    ``checkpoint_iter_5000.pt`` and ``checkpoint_5000`` are taken for ``checkpoint_00005000``. Raises
    :class:`CheckpointError` when there is none or it is damaged.
    """
    if path.is_file() and (name := _read_pointer(path)):
        path = path.parent / name
    elif not path.exists() and (match := _LEGACY_NAME.fullmatch(path.name)):
        path = path.parent / f"checkpoint_{int(match[1]):08d}"
    if not path.is_dir():
        found = [candidate.name for candidate in _checkpoints(path.parent)]
        hint = f"; there are {', '.join(found[:5])}" if found else ""
        raise CheckpointError(f"{os.path.abspath(path)} does not exist or is not a checkpoint folder{hint}")
    if not _NAME.fullmatch(path.name) and not (path / MANIFEST).exists():
        newest = find_newest(path)
        if newest is None:
            raise CheckpointError(f"{os.path.abspath(path)} holds no checkpoint")
        return newest
    if problem := problem_with(path):
        raise CheckpointError(f"{path} is damaged: {problem}")
    return path


def go_back(run_dir: Path, checkpoint: Path) -> list[Path]:
    """Set aside the checkpoints that are newer than the one to go on from: they belong to a future that will not happen.

    They are renamed, not removed, and no reader takes them for checkpoints any more. ``best`` goes back to the checkpoint that
    was the best by then. Raises :class:`CheckpointError` when ``run_dir`` holds another run than ``checkpoint``'s.
    """
    existing = _checkpoints(run_dir)
    if existing and checkpoint.resolve().parent != run_dir.resolve():
        raise CheckpointError(f"{run_dir} already holds {existing[0].name} of another run; type another --checkpoint_dir")
    newer = [path for path in existing if path.name > checkpoint.name]
    for path in newer:
        aside = path.with_name(f"set_aside_{path.name}")
        while aside.exists():
            aside = aside.with_name(aside.name + "_again")
        path.rename(aside)
    if newer:
        _point(run_dir / "latest", checkpoint.name)
        lowest = read_state(checkpoint).best_val_loss
        older = [path for path in reversed(_checkpoints(run_dir)) if problem_with(path) is None]
        best = next((path for path in older if lowest is not None and read_state(path).best_val_loss == lowest), None)
        if best is not None:
            _point(run_dir / "best", best.name)
        else:
            (run_dir / "best").unlink(missing_ok=True)
    return newer


def sweep(run_dir: Path) -> None:
    """Remove what interrupted saves and removals left behind: names that no reader looks at."""
    if run_dir.is_dir():
        for path in run_dir.iterdir():
            if path.name.startswith((".tmp_", ".trash_")):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- loading


def read_state(checkpoint: Path) -> TrainState:
    """The counters of a checkpoint, checked for their types."""
    document = read_facts(checkpoint)
    return TrainState(
        step=int(document["step"]), samples=int(document["samples"]), tokens=int(document["tokens"]),
        best_val_loss=None if document["best_val_loss"] is None else float(document["best_val_loss"]),
    )  # fmt: skip


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """All of ``trainer_state.json``: the counters, and the facts that were given to :func:`publish`."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def restore(accelerator: Accelerator, optimizer: torch.optim.Optimizer, checkpoint: Path) -> TrainState:
    """Load weights and optimizer state from a verified checkpoint into what ``accelerator`` prepared. Collective.

    Learning rate, decay and the like stay what the config says now; only the moments come from the checkpoint.
    """
    require_optimizer(checkpoint)
    refused = [path.name for path in checkpoint.glob("*") if path.name.startswith(("custom_checkpoint", "pytorch_model"))]
    if refused:
        raise CheckpointError(f"{checkpoint}: {refused[0]} is a pickle, which is never loaded")
    hyperparameters = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with together(accelerator, CheckpointError), _quiet():
        try:
            accelerator.load_state(str(checkpoint))
        except (RuntimeError, ValueError, OSError, KeyError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0][:300]
            raise CheckpointError(
                f"{checkpoint} does not fit this model or optimizer, or was tampered with: {reason}"
            ) from None
    for group, own in zip(optimizer.param_groups, hyperparameters, strict=True):
        group.update(own)
    return read_state(checkpoint)


def require_optimizer(checkpoint: Path) -> None:
    """Raise :class:`CheckpointError` for weights that no run has trained: there is nothing to go on from."""
    if not any(checkpoint.glob("optimizer*")):
        begin = f"to begin a run with it, type --init_from {checkpoint.parent} --checkpoint_dir NEW"
        raise CheckpointError(f"{checkpoint} holds weights and no optimizer: {begin}")


def write_model_description(folder: Path, config: ModelConfig, vocab_size: int) -> None:
    """Write ``model.json``: enough to build the model without anything else."""
    _write_json(folder / MODEL, {**to_plain(config), "vocab_size": vocab_size})


def load_model(run_or_checkpoint: Path | str) -> Transformer:
    """The trained model in evaluation mode and float32, on the CPU, from a run directory (its newest) or a checkpoint."""
    return read_model(resolve(Path(run_or_checkpoint)))


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The model's shape, vocabulary included, from a verified checkpoint."""
    path = checkpoint / MODEL
    try:
        config = from_mapping(ModelConfig, json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    refuse((config.vocab_size is None, f"{path}: vocab_size is missing"))
    return config


def read_model(checkpoint: Path) -> Transformer:
    """The same as :func:`load_model`, from a checkpoint that :func:`resolve` has verified: hashing it once is enough.

    The parameters are mapped from the file: what is not used takes no memory, and changing them does not change the file.
    """
    config = read_model_config(checkpoint)
    assert config.vocab_size is not None
    with torch.device("meta"):
        model = Transformer(config, config.vocab_size)
    model.load_state_dict(load_file(checkpoint / WEIGHTS), assign=True)
    model.make_tables()
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
