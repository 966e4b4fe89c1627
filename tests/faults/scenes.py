"""What may be interrupted: a directory as it is before, and the action on it. Every function here runs in a server's child.

A checkpoint's *value* is a number that is in its weights, in its optimizer and in its counters: where they differ, files of
two checkpoints were mixed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from accel_pretrain import commit
from accel_pretrain.checkpoint import TrainState, read_state
from accel_pretrain.errors import reported
from accel_pretrain.publish import publish
from tests.faults.shim import Operation, fail_at, kill_at, listing, watching


def save(run_dir: Path, step: int, *, value: int | None = None, is_best: bool = False, **options: object) -> Path:
    """Publish a checkpoint whose value is ``value`` (the step, where it is not given). The best one's loss is 1 / value."""
    value, width = step if value is None else value, 8
    before = [path for path in commit.checkpoints(run_dir) if commit.problem_with(path) is None]
    lowest = 1 / value if is_best else read_state(before[0]).best_val_loss if before else None
    accelerator = Accelerator(cpu=True)
    module = nn.Linear(width, width)
    _, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters()))
    module(torch.ones(1, width)).sum().backward()
    optimizer.step()
    for parameter in module.parameters():
        parameter.data.fill_(value)
        for tensor in optimizer.state[parameter].values():
            tensor.fill_(value)
    state = TrainState(step=step, samples=value, tokens=value, best_val_loss=lowest)
    options["is_best"] = is_best
    return publish(accelerator, run_dir, state, facts={}, write_extras=_extras, **options)  # type: ignore[arg-type]


def _extras(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: {}\n")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}\n")


def value_of(checkpoint: Path) -> int:
    """The value of a checkpoint that verifies; an AssertionError where its parts belong to several."""
    assert commit.problem_with(checkpoint) is None
    weights = load_file(checkpoint / "model.safetensors")
    moments = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    found = {float(value) for tensor in weights.values() for value in tensor.flatten()}
    found |= {float(value) for own in moments.values() for tensor in own.values() for value in tensor.flatten()}
    found |= {float(read_state(checkpoint).samples), float(read_state(checkpoint).tokens)}
    assert len(found) == 1, f"{checkpoint} mixes {sorted(found)}"
    return int(found.pop())


def best_of(run_dir: Path) -> str | None:
    """The checkpoint that has the lowest loss that the newest knows of, if it is there."""
    good = [path for path in commit.checkpoints(run_dir) if commit.problem_with(path) is None]
    lowest = read_state(good[0]).best_val_loss if good else None
    return next((path.name for path in good if lowest is not None and value_of(path) == round(1 / lowest)), None)


def recover(run_dir: Path) -> Path | None:
    """What a start of training does before anything else: clear away what was interrupted, and find what to go on from."""
    commit.sweep(run_dir)
    return commit.find_newest(run_dir, quarantine=True)


def snapshot(run_dir: Path) -> dict[str, object]:
    """All that matters of a run directory: the value of each checkpoint, the pointers, and the names of all else."""
    good = {path.name: value_of(path) for path in commit.checkpoints(run_dir) if commit.problem_with(path) is None}
    pointers = {name: commit.read_pointer(run_dir / name) for name in ("latest", "best")}
    others = sorted(path.relative_to(run_dir).as_posix() for path in [*run_dir.iterdir(), *run_dir.glob("quarantine/*")])
    return {"good": good, "pointers": pointers, "names": [name for name in others if name not in good]}


# -------------------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """``prepare`` makes the directory, ``act`` is what is interrupted; ``values`` are what may be found after that."""

    prepare: Callable[[Path], object]
    act: Callable[[Path], object]
    values: Sequence[int | None]
    done: int | None


def _one_and_two(run_dir: Path) -> None:
    save(run_dir, 1, is_best=True)
    save(run_dir, 2)


def _leftovers(run_dir: Path) -> None:
    _one_and_two(run_dir)
    for name in (".tmp_checkpoint_00000003", ".trash_checkpoint_00000000", ".tmp_checkpoint_00000004"):
        (run_dir / name / "tokenizer").mkdir(parents=True)
        for file in ("model.safetensors", "optimizer.bin", "tokenizer/tokenizer.json"):
            (run_dir / name / file).write_bytes(b"torn")
    (run_dir / ".tmp_latest").write_bytes(b"checkpoint_0000")


def _damaged(run_dir: Path) -> None:
    _one_and_two(run_dir)
    for step in (3, 4):
        damaged = save(run_dir, step) / "optimizer.bin"
        damaged.write_bytes(damaged.read_bytes()[:-1])


def _moved_aside(run_dir: Path) -> None:
    """As a save of the same step leaves it when it is killed between its two renames."""
    _one_and_two(run_dir)
    os.rename(run_dir / "checkpoint_00000002", run_dir / ".trash_checkpoint_00000002")


def _go_back(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoint_00000001"
    commit.go_back(run_dir, checkpoint)


def _three(run_dir: Path) -> None:
    _one_and_two(run_dir)
    save(run_dir, 3, is_best=True)


SCENES = {
    "first save": Scene(lambda run_dir: None, lambda run_dir: save(run_dir, 1, is_best=True), (None, 1), 1),
    "save and prune": Scene(_one_and_two, lambda run_dir: save(run_dir, 3, is_best=True, keep_last=2), (2, 3), 3),
    "save and keep one": Scene(_one_and_two, lambda run_dir: save(run_dir, 3, keep_last=1), (2, 3), 3),
    "the same step again": Scene(_one_and_two, lambda run_dir: save(run_dir, 2, value=20), (2, 20), 20),
    "prune": Scene(_three, lambda run_dir: commit.prune(run_dir, 1, ()), (3,), 3),
    "point": Scene(_one_and_two, lambda run_dir: commit.point(run_dir / "best", "checkpoint_00000002"), (2,), 2),
    "sweep": Scene(_leftovers, commit.sweep, (2,), 2),
    "sweep what was moved aside": Scene(_moved_aside, commit.sweep, (2,), 2),
    "quarantine": Scene(_damaged, lambda run_dir: commit.find_newest(run_dir, quarantine=True), (2,), 2),
    "go back": Scene(_three, _go_back, (1, 2, 3), 1),
}


def prepare(name: str, run_dir: Path) -> None:
    run_dir.mkdir()
    SCENES[name].prepare(run_dir)


def act(name: str, run_dir: Path, how: str = "", index: int = -1, error: int = 0, forever: bool = False) -> list[Operation]:
    """Act a scene with a fault at its ``index``-th change: ``how`` is kill, fail, or nothing. Returns what was changed."""
    seen: list[Operation] = []
    say = {"kill": kill_at(index), "fail": fail_at(index, error, forever)}.get(how, listing(seen))
    with watching(run_dir, say):
        act_plainly(name, run_dir)
    return seen


def act_plainly(name: str, run_dir: Path) -> None:
    """Act a scene as it is. What the machine does to it is reported as programs do."""
    with reported():
        SCENES[name].act(run_dir)


class _InOrder:
    """In the place of a pool of threads: which system call is the how manieth is then the same every time."""

    def __init__(self, threads: int) -> None:
        self.map = map

    def submit(self, function: Callable[..., object], *arguments: object) -> Future[object]:
        done: Future[object] = Future()
        done.set_result(function(*arguments))
        return done

    def __enter__(self) -> _InOrder:
        return self

    def __exit__(self, *_: object) -> None: ...


def act_in_order(name: str, run_dir: Path) -> None:
    """Act a scene for strace."""
    commit.ThreadPoolExecutor = _InOrder  # type: ignore[assignment,misc]
    act_plainly(name, run_dir)


def act_with_little_room(name: str, run_dir: Path, limit: int) -> None:
    """Act a scene where no file can become larger than ``limit`` bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    act_plainly(name, run_dir)


def reseal(checkpoint: Path) -> None:
    """Make a manifest that fits the files as they are now, as an attacker can."""
    (checkpoint / commit.MANIFEST).unlink()
    names = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
    commit.seal(checkpoint, commit.hash_files(checkpoint, names), {})
