"""Two machines with disks of their own, as two processes that are told other folders: what they would not go on from alike.

:mod:`tests.test_multinode` has whole runs on machines with a network between them.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from accel_pretrain.checkpoint import TrainState
from accel_pretrain.commit import checkpoints, problem_with
from accel_pretrain.publish import publish
from tests.running import REPO, TINY, environment, reseal

SCRIPT = textwrap.dedent("""
    import json, sys
    from pathlib import Path
    import torch
    from accelerate import Accelerator
    from accel_pretrain.checkpoint import CheckpointConfig, TrainState, restore
    from accel_pretrain.errors import PretrainError
    from accel_pretrain.machines import refuse_other_folders
    from accel_pretrain.peers import Peers
    from accel_pretrain.saver import Saver

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    peers, rank = Peers(accelerator), accelerator.process_index
    said = {}
    for name, folders, found, options in json.loads(sys.argv[1]):
        run_dir = Path(folders[rank])
        try:
            said[name] = refuse_other_folders(peers, run_dir, found and run_dir / found, **options)
        except PretrainError as error:
            said[name] = f"{type(error).__name__}: {error}"
    run_dir = Path(sys.argv[2 + rank])
    module = torch.nn.Linear(8, 8)
    model, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters()))
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    config = CheckpointConfig(checkpoint_dir=run_dir, asynchronous=True)
    saver = Saver(accelerator, run_dir, config, TrainState())
    state = TrainState(step=1)
    saver.save(state, facts={}, write_extras=lambda folder: None)
    saver.finish(state)
    try:
        restore(accelerator, optimizer, run_dir / "checkpoint_00000001")
    except PretrainError as error:
        said["restore"] = str(error)
    print("said", json.dumps(said))
""")


def two(*commands: list[str]) -> list[tuple[int, str]]:
    """How each of two processes ended and what it said, each the first of its machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command], cwd=REPO, env=environment(RANK=str(rank), **places), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank, command in enumerate(commands)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run directory with two checkpoints."""
    accelerator, module = Accelerator(cpu=True), nn.Linear(8, 8)
    _, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters()))
    for step in (1, 2):
        module(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        publish(accelerator, tmp_path / "run", TrainState(step=step), facts={}, write_extras=lambda folder: None)
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    return tmp_path / "run"


def test_data_that_only_one_machine_has(dataset: Path, tmp_path: Path) -> None:
    """The one that lacks it says what, and the other that it has lost that one: before there is a run."""
    words = ["-m", "accel_pretrain.train", "--checkpoint_dir", str(tmp_path / "run"), *TINY, "--max_iters", "2"]
    has, lacks = two(*([*words, "--train_data_path", str(data)] for data in (dataset, tmp_path / "nothing")))
    assert (has[0], lacks[0]) == (1, 2)
    assert f"error (rank 1): {tmp_path}/nothing does not exist; make a dataset with: " in lacks[1]
    assert "error: another process of this run has ended or does not answer (" in has[1]
    assert "Traceback" not in has[1] + lacks[1]
    assert not (tmp_path / "run").exists()


def test_folders_that_are_not_shared(saved: Path, tmp_path: Path) -> None:
    """Refused alike on both, wherever one would go on from something else; a save needs the main process's folder alone."""
    last, first = "checkpoint_00000002", "checkpoint_00000001"

    def copy(name: str) -> Path:
        return Path(shutil.copytree(saved, tmp_path / name))

    damaged, other, older = copy("damaged") / last, copy("other") / last, copy("older")
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    optimizer = torch.load(other / "optimizer.bin", weights_only=True)
    optimizer["state"][0]["exp_avg"] += 1e-3
    torch.save(optimizer, other / "optimizer.bin")
    reseal(other)
    assert problem_with(other) is None
    shutil.rmtree(older / last)
    (stale := tmp_path / "stale").mkdir()
    (begun := tmp_path / "begun").mkdir()
    for folder in (begun, stale):
        shutil.copy(saved / "config.yaml", folder)
    rolls_back, named = {"rolls_back": True}, {"named": True}
    scenes: list[tuple[str, Path, Path, str | None, dict[str, bool]]] = [
        ("the same folder", saved, saved, last, rolls_back),
        ("a copy", saved, copy("copy"), last, {}),
        ("damaged", saved, damaged.parent, last, {}),
        ("other moments", saved, other.parent, last, {}),
        ("older on the main one", older, saved, first, {}),
        ("named by a person", older, saved, first, named),
        ("a stale config", begun, stale, None, {}),
        ("rollback", saved, tmp_path / "copy", last, rolls_back),
    ]
    new = [str(tmp_path / "new0"), str(tmp_path / "new1")]
    words = json.dumps([(name, (str(one), str(two)), found, options) for name, one, two, found, options in scenes])
    (script := tmp_path / "script.py").write_text(SCRIPT)
    ended = two(*[[str(script), words, *new]] * 2)
    assert [code for code, _ in ended] == [0, 0], ended
    said = [json.loads(output.rpartition("said ")[2]) for _, output in ended]
    host = socket.gethostname()
    for own in said:
        assert [own[name] for name in ("the same folder", "a copy", "named by a person")] == [None] * 3
        assert f"{last} on {host} (rank 1) is damaged: model.safetensors was changed after it was written" in own["damaged"]
        assert f"{last} on {host} (rank 1) is another checkpoint than the main process's" in own["other moments"]
        assert f"holds {last} on {host} and {first} on {host}, where the main process is" in own["older on the main one"]
        assert "checkpoints will have to be copied there to go on" in own["a stale config"]
        assert "ConfigError: training.on_spike: rollback needs a folder that all machines share" in own["rollback"]
    assert "restore" in said[0]  # the main process has the checkpoint, and does not wait for the one that has not
    assert "holds weights and no optimizer" in said[1]["restore"]
    assert [path.name for path in checkpoints(tmp_path / "new0")] == [first]
    assert problem_with(tmp_path / "new0" / first) is None
    assert not list(tmp_path.glob("*/.tmp_*"))
