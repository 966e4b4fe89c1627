"""Making checkpoints, on all processes together: what is written, by whom, and when it counts.

:func:`publish` writes everything into ``.tmp_checkpoint_...`` by Accelerate's ``save_state``; every process flushes and hashes
what it wrote; the main one writes the manifest and renames the folder, as :mod:`accel_pretrain.commit` has it. A failure of one
process is a failure of all, before anyone goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import accelerate
import torch
from accelerate import Accelerator

from accel_pretrain.checkpoint import TrainState, not_finite, optimizer_updates
from accel_pretrain.commit import STATE, checkpoints, commit, hash_files, names_in, point, prune, seal, step_of
from accel_pretrain.errors import CheckpointError, DivergedError, StorageError
from accel_pretrain.peers import Peers, reason_of

_RANK = re.compile(r"(?:random_states_|__|rank_?)(\d+)(?=\D)")
_ROOM = 1.2  # free space to ask for, in sizes of the last checkpoint
_log = logging.getLogger(__name__)


class Source(Protocol):
    """What is saved: ``weights`` by name, the updates that the optimizer counts, and how to write both into a folder."""

    @property
    def weights(self) -> Mapping[str, torch.Tensor]: ...

    @property
    def updates(self) -> int | None: ...

    def write(self, folder: Path) -> None: ...


class Live:
    """What is being trained, as it is now, by ``save_state``."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        return {name: parameter for model in self._accelerator._models for name, parameter in model.named_parameters()}

    @property
    def updates(self) -> int | None:
        return optimizer_updates(self._accelerator._optimizers[0]) if self._accelerator._optimizers else None

    def write(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._accelerator.save_state(str(folder), safe_serialization=True)


def publish(
    accelerator: Accelerator,
    run_dir: Path,
    state: TrainState,
    *,
    facts: Mapping[str, Any],
    write_extras: Callable[[Path], None],
    is_best: bool = False,
    is_stable: bool = False,
    keep_last: int | None = None,
    pin_interval: int | None = None,
    protected: Collection[str] = (),
    source: Source | None = None,
    peers: Peers | None = None,
) -> Path:
    """Save model, optimizer and ``state`` as ``run_dir/checkpoint_<step>``, and return that path. Collective.

    ``facts`` go into the manifest, and into ``trainer_state.json`` beside the counters for
    :func:`~accel_pretrain.checkpoint.read_facts`; ``write_extras`` adds files (on the main process). The checkpoints named in
    ``protected`` are kept. ``source`` and ``peers`` are for a background thread: a copy of the state, and a process group of
    its own. If any process fails, all raise :class:`StorageError`, or :class:`DivergedError` for weights that are not finite,
    and nothing that was there is lost.
    """
    peers, source = peers or Peers(accelerator), source or Live(accelerator)
    final, temporary = (run_dir / f"{kind}checkpoint_{state.step:08d}" for kind in ("", ".tmp_"))
    failure = (StorageError, f"{final} could not be saved")
    with peers.together(*failure):
        if bad := not_finite(source.weights):
            raise DivergedError(f"{bad} is not finite after update {state.step}: not saved; {run_dir} holds what it held")
        if peers.is_main:
            _refuse_full_disk(run_dir)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    try:
        with peers.together(*failure):
            temporary.mkdir(parents=True, exist_ok=True)  # a machine that does not share the directory makes one of its own
            source.write(temporary)
            # All random numbers here are functions of the position: there is no need for a pickle of them, nor for trust in it.
            (temporary / f"random_states_{peers.rank}.pkl").unlink(missing_ok=True)
            if peers.is_main:
                _write_state(temporary, {**dataclasses.asdict(state), "optimizer_updates": source.updates, **facts})
                write_extras(temporary)
        with peers.together(*failure):
            own = hash_files(temporary, [name for name in names_in(temporary) if _writer_of(name, peers.count) == peers.rank])
        files = {name: about for every in peers.gather(own) for name, about in every.items()}
        with peers.together(*failure):
            if peers.is_main:
                seal(temporary, files, {"step": state.step, **facts, **_surroundings()})
                commit(temporary, final)
    except BaseException:
        if peers.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if peers.is_main:
        pointers = [name for name, wanted in (("best", is_best), ("stable", is_stable), ("latest", True)) if wanted]
        _tidy(final, pointers, keep_last, {*_milestones(run_dir, pin_interval), *protected})
    peers.gather(None)  # nobody reads the directory before it is as it stays
    if not peers.is_main:  # where the directory is not shared
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _milestones(run_dir: Path, every: int | None) -> list[str]:
    return [path.name for path in checkpoints(run_dir) if every and step_of(path) % every == 0]


def _tidy(final: Path, pointers: Collection[str], keep_last: int | None, protected: Collection[str]) -> None:
    """Let the pointers name the new checkpoint, and remove old ones. It exists: what fails here is no failure of the save."""
    try:
        for pointer in pointers:
            point(final.parent / pointer, final.name)
        prune(final.parent, keep_last, protected)
    except (OSError, CheckpointError) as error:  # the next start mends what names it
        _log.warning("%s is saved, but what names it or the old ones could not be changed: %s", final, reason_of(error))


def publish_weights(run_dir: Path, write: Callable[[Path], None]) -> Path:
    """Publish what ``write`` puts into a folder as ``run_dir/checkpoint_00000000``: weights that no run here has made.

    It has no optimizer, so that a run can begin with it (``init_from``) but not resume it. Raises :class:`CheckpointError` when
    ``run_dir`` holds checkpoints already. For one process.
    """
    if existing := checkpoints(run_dir):
        raise CheckpointError(f"{run_dir} already holds {existing[0].name}; name another directory")
    final = run_dir / "checkpoint_00000000"
    temporary = run_dir / f".tmp_{final.name}"
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        _write_state(temporary, dataclasses.asdict(TrainState()))
        seal(temporary, hash_files(temporary, names_in(temporary)))
        commit(temporary, final)
        point(run_dir / "latest", final.name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise
    return final


def _writer_of(name: str, count: int) -> int:
    """The rank that wrote a file: torch and Accelerate put it into the name of what every process writes."""
    match = _RANK.search(name)
    return int(match[1]) if match and int(match[1]) < count else 0


def _refuse_full_disk(run_dir: Path) -> None:
    """Raise :class:`StorageError` where there is no room for a checkpoint like the newest one, and some more."""
    for newest in checkpoints(run_dir)[:1]:
        needed = int(_ROOM * sum((newest / name).stat().st_size for name in names_in(newest)))
        if (free := shutil.disk_usage(run_dir).free) < needed:
            raise StorageError(
                f"{run_dir}: a checkpoint needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free; "
                "make room, or keep fewer with --keep_last"
            )


def _surroundings() -> dict[str, Any]:
    """For whoever wants to know later why numbers differ."""
    versions = {"torch": torch.__version__, "accelerate": accelerate.__version__, "python": platform.python_version()}
    return {"versions": versions, "threads": torch.get_num_threads()}


def _write_state(folder: Path, document: dict[str, Any]) -> None:
    (folder / STATE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
