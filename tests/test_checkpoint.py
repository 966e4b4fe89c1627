"""A checkpoint is whole or is not one: publishing, verifying, falling back, pruning, and files that must not be trusted."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from accel_pretrain.checkpoint import TrainState, load_model, restore
from accel_pretrain.commit import find_newest, problem_with, resolve, sweep
from accel_pretrain.errors import CheckpointError, StorageError
from accel_pretrain.publish import publish
from tests.running import REPO, Train, environment, newest, reseal

Save = Callable[..., Path]


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def save(accelerator: Accelerator, tmp_path: Path) -> Save:
    """``save(step)`` publishes a checkpoint of a small prepared model into ``tmp_path``."""
    module = nn.Linear(8, 8)
    accelerator.prepare(module, torch.optim.AdamW(module.parameters()))

    def save(step: int, **kwargs: object) -> Path:
        kwargs.setdefault("write_extras", lambda folder: None)
        return publish(accelerator, tmp_path, TrainState(step=step), facts={}, **kwargs)  # type: ignore[arg-type]

    return save


def test_the_folder_is_named_by_its_step_and_verifies(save: Save, tmp_path: Path) -> None:
    path = save(5)
    assert path == tmp_path / "checkpoint_00000005"
    assert problem_with(path) is None
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert set(listed) == {"model.safetensors", "optimizer.bin", "trainer_state.json"}
    assert (tmp_path / "latest").read_text() == "checkpoint_00000005\n"


def test_files_can_be_read_by_whom_the_umask_allows(save: Save) -> None:
    before = os.umask(0o022)
    try:
        path = save(1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o644}


def test_only_the_newest_and_the_best_are_kept(save: Save, tmp_path: Path) -> None:
    save(1, is_best=True)
    for step in (2, 3, 4, 5):
        save(step, keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint_*")) == [f"checkpoint_0000000{step}" for step in (1, 4, 5)]
    assert resolve(tmp_path / "best").name == "checkpoint_00000001"
    assert resolve(tmp_path / "latest").name == "checkpoint_00000005"
    assert resolve(tmp_path).name == "checkpoint_00000005"
    assert resolve(tmp_path / "checkpoint_iter_4.pt").name == "checkpoint_00000004"


def test_a_failed_save_leaves_the_old_one_and_no_rubbish(save: Save, tmp_path: Path) -> None:
    save(1)

    def full_disk(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"checkpoint_00000002 could not be saved: No space left on device"):
        save(2, write_extras=full_disk, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00000001", "latest"]
    assert problem_with(tmp_path / "checkpoint_00000001") is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "linked": lambda path: (path.rename(path.parent.parent / "elsewhere"), path.symlink_to(path.parent.parent / "elsewhere")),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "trainer_state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(save: Save, tmp_path: Path, damage: str, name: str) -> None:
    save(1)
    path = save(2)
    assert find_newest(tmp_path) == path
    DAMAGE[damage](path / name)
    if damage == "flipped" and name == "manifest.json":
        assert problem_with(path) is not None or json.loads((path / name).read_text())["files"]
    else:
        assert find_newest(tmp_path) == tmp_path / "checkpoint_00000001"
        with pytest.raises(CheckpointError, match="damaged"):
            resolve(path)


def test_files_swapped_or_added_are_noticed(save: Save, tmp_path: Path) -> None:
    one, two = save(1), save(2)
    shutil.copy(one / "trainer_state.json", two / "trainer_state.json")
    assert problem_with(two) == "trainer_state.json was changed after it was written"
    (one / "custom_checkpoint_0.pkl").write_bytes(b"")
    assert problem_with(one) == "custom_checkpoint_0.pkl is not part of it"
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        find_newest(tmp_path)


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.canary), "w")


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "pytorch_model.bin"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_planted_pickle_is_never_executed(save: Save, accelerator: Accelerator, tmp_path: Path, name: str, form: str) -> None:
    """Even when the attacker has made a manifest that fits."""
    path, canary = save(1), tmp_path / "canary"
    if form == "torch":
        torch.save(Payload(canary), path / name)
    else:
        (path / name).write_bytes(pickle.dumps(Payload(canary)))
    reseal(path)
    optimizer = accelerator._optimizers[0]
    with contextlib.suppress(CheckpointError):
        restore(accelerator, optimizer, path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Payload(canary))).close()  # control: the payload does what it is meant to do
    assert canary.exists()


def test_the_model_comes_back_in_evaluation_mode_and_float32(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path, "--max_iters", "2", "--tie_embeddings", "true", "--mixed_precision", "bf16") == 0
    model = load_model(tmp_path)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokens_BT = torch.randint(0, 257, (2, 8))
    assert model(tokens_BT).shape == (2, 8, 257)


@pytest.mark.parametrize("options", [(), ("--compile", "true")])
def test_names_in_the_checkpoint_are_plain(run_train: Train, tmp_path: Path, options: tuple[str, ...]) -> None:
    """No prefix of DDP or torch.compile, which would make the file unreadable elsewhere."""
    from safetensors.torch import load_file

    assert run_train(tmp_path, "--max_iters", "1", "--num_layers", "1", *options) == 0
    names = set(load_file(newest(tmp_path) / "model.safetensors"))
    assert {"embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "norm.weight", "lm_head.weight"} <= names
    assert not [name for name in names if "module." in name or "_orig_mod" in name]


def test_leftovers_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp_checkpoint_00000003").mkdir()
    (tmp_path / ".trash_checkpoint_00000001").mkdir()
    (tmp_path / ".tmp_latest").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


SAVE_FOREVER = textwrap.dedent("""
    import sys, torch
    from pathlib import Path
    from accelerate import Accelerator
    from accel_pretrain.checkpoint import TrainState
    from accel_pretrain.publish import publish
    accelerator = Accelerator(cpu=True)
    module = torch.nn.Linear(512, 512)
    accelerator.prepare(module, torch.optim.AdamW(module.parameters()))
    for step in range(1, 100_000):
        publish(accelerator, Path(sys.argv[1]), TrainState(step=step), facts={}, write_extras=lambda folder: None, keep_last=2)
        print(step, flush=True)
""")


def test_killed_at_any_moment_the_last_announced_checkpoint_or_a_newer_one_is_there(tmp_path: Path) -> None:
    """SIGKILL at random moments of saving: what ``publish`` had returned is never lost, and nothing torn is ever found."""
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    for trial in range(3):  # tests/faults kills at every moment
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path / str(trial))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), cwd=REPO) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            time.sleep(draw.uniform(0.05, 0.25))
            process.send_signal(signal.SIGKILL)
            announced = int((first + process.stdout.read()).split()[-1])
        found = find_newest(tmp_path / str(trial))
        assert found is not None, f"seed {seed}, trial {trial}"
        assert int(found.name[-8:]) >= announced, f"seed {seed}, trial {trial}"
