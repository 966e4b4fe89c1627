"""No byte of a checkpoint executes, whatever its maker put there; what cannot be used is refused in one line (F12).

Whoever can write a checkpoint can write its manifest too: everything is tried with a manifest that fits it, and without.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from accel_pretrain import commit, evaluate, sample
from accel_pretrain.hf import __main__ as hf
from tests.faults import scenes, training
from tests.faults.harness import ForkServer, Outcome
from tests.faults.tally import TALLY

WORDS = [*training.SMALL, "--max_iters", "3", "--checkpoint_interval", "1"]
LONGER = [*WORDS, "--max_iters", "4"]
# Every name that Accelerate or torch may look for in a folder, and some that look harmless.
NAMES = (
    "optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "pytorch_model.bin", "scheduler.bin", "sampler.bin",
    "scaler.pt", "dl_state_dict.bin", "model.safetensors", "model_0.safetensors", "optimizer_0.bin", "custom_checkpoint_0.bin",
    ".metadata", "__0_0.distcp", "pytorch_model_fsdp.bin", "optimizer.pt", "trainer_state.json", "config.yaml", "model.json",
    "tokenizer/tokenizer.json", "tokenizer/tokenizer.pkl", "model.py", "__init__.py", "conftest.py",
)  # fmt: skip


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.canary), "w")


def plant(path: Path, canary: Path, form: str) -> None:
    """Write the payload as a pickle, as torch's zip, or as torch's zip with what belongs there besides."""
    path.parent.mkdir(exist_ok=True)
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(canary)))
    elif form == "torch":
        _torch_save(Payload(canary), path)
    elif form == "script":
        path.write_text(f"open({str(canary)!r}, 'w')\n")
    else:
        document = torch.load(path, weights_only=True) if path.name == "optimizer.bin" else {}
        _torch_save({**document, "payload": Payload(canary)}, path)


def _torch_save(document: Any, path: Path) -> None:
    with path.open("wb") as file:  # by its name, torch refuses to write some of them
        torch.save(document, file)


@pytest.fixture(scope="module")
def trained(server: ForkServer, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 1, 2 and 3."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    outcome = server.call(training.run, dataset, run_dir, WORDS)
    assert outcome.code == 0, outcome.output
    return run_dir


# -------------------------------------------------------------------------------------------------- ways to be loaded


def run_sample(checkpoint: Path) -> None:
    raise SystemExit(sample.main(["--checkpoint", str(checkpoint), "--prompt", "x", "--max_new_tokens", "2"]))


def run_evaluate(checkpoint: Path, data: Path) -> None:
    raise SystemExit(evaluate.main(["--checkpoint", str(checkpoint), "--data", str(data), "--eval_iters", "1"]))


def run_export(checkpoint: Path, out: Path) -> None:
    raise SystemExit(hf.main(["export", "--checkpoint", str(checkpoint), "-o", str(out)]))


Way = Callable[[ForkServer, Path, Path, Path], Outcome]
WAYS: dict[str, Way] = {
    "auto": lambda server, data, path, out: server.call(training.run, data, path.parent, LONGER),
    "resume_from": lambda server, data, path, out: server.call(
        training.run, data, path.parent, [*LONGER, "--resume_from", str(path)]
    ),
    "init_from": lambda server, data, path, out: server.call(training.run, data, out, [*WORDS, "--init_from", str(path)]),
    "sample": lambda server, data, path, out: server.call(run_sample, path),
    "evaluate": lambda server, data, path, out: server.call(run_evaluate, path, data),
    "export": lambda server, data, path, out: server.call(run_export, path, out),
}


def pairs(every: int) -> Iterator[tuple[str, str, str]]:
    """Name, form and way to be loaded; ``every``: how manieth of all combinations."""
    forms = ("pickle", "torch", "torch and more", "script")
    combinations = [
        (name, forms[(index + number + shift) % 4], way)
        for shift in range(4)
        for index, name in enumerate(NAMES)
        for number, way in enumerate(WAYS)
    ]
    return (one for index, one in enumerate(combinations) if (index + index // len(WAYS)) % every == 0)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("every", [80, pytest.param(3, marks=[pytest.mark.faults, pytest.mark.timeout(1500)])])
def test_nothing_planted_is_executed(
    server: ForkServer, dataset: Path, trained: Path, scratch: Path, every: int, listed: bool
) -> None:
    for number, (name, form, way) in enumerate(pairs(every)):
        run_dir, canary = scratch / f"run{number}", scratch / f"canary{number}"
        shutil.copytree(trained, run_dir)
        checkpoint = run_dir / "checkpoint_00000003"
        plant(checkpoint / name, canary, form)
        if listed:
            scenes.reseal(checkpoint)
        else:
            assert commit.problem_with(checkpoint) is not None
        outcome = WAYS[way](server, dataset, checkpoint, scratch / f"out{number}")
        TALLY.add("malicious files")
        what = f"{name} as {form}, {way}: {outcome}"
        assert not canary.exists(), what
        judge_refusal(outcome, what, may_work=listed or way == "auto")
        shutil.rmtree(run_dir)


def judge_refusal(outcome: Outcome, what: str, *, may_work: bool) -> None:
    TALLY.tracebacks += "Traceback" in outcome.output
    assert "Traceback" not in outcome.output, what
    assert outcome.code in ((0, 2, 4) if may_work else (2, 4)), what
    errors = [line for line in outcome.output.splitlines() if line.startswith("error")]
    assert (outcome.code == 0) == (not errors), what
    assert all(len(line) < 1500 for line in errors), what


def test_control_the_payload_does_what_it_is_meant_to(tmp_path: Path) -> None:
    plant(tmp_path / "file", tmp_path / "canary", "pickle")
    pickle.loads((tmp_path / "file").read_bytes()).close()
    assert TALLY.mutant((tmp_path / "canary").exists())
    plant(tmp_path / "optimizer.pt", tmp_path / "second", "torch")
    torch.load(tmp_path / "optimizer.pt", weights_only=False).close()
    assert TALLY.mutant((tmp_path / "second").exists())


# -------------------------------------------------------------------------------------------- links, names, sizes, depth


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / commit.MANIFEST).read_text())


def change_manifest(checkpoint: Path, **files: dict[str, Any]) -> None:
    document = manifest_of(checkpoint)
    document["files"] |= files
    del document["sha256"]
    (checkpoint / commit.MANIFEST).write_text(commit.manifest_text(document))


def entry_of(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": commit.sha256_of(path)}


def symlink_out(checkpoint: Path) -> None:
    moved = shutil.move(checkpoint / "optimizer.bin", checkpoint.parent / "elsewhere")
    (checkpoint / "optimizer.bin").symlink_to(moved)


def symlink_folder(checkpoint: Path) -> None:
    shutil.move(checkpoint / "tokenizer", checkpoint.parent / "elsewhere")
    (checkpoint / "tokenizer").symlink_to(checkpoint.parent / "elsewhere")


def symlink_manifest(checkpoint: Path) -> None:
    shutil.move(checkpoint / commit.MANIFEST, checkpoint.parent / "elsewhere")
    (checkpoint / commit.MANIFEST).symlink_to(checkpoint.parent / "elsewhere")


def traversal(checkpoint: Path) -> None:
    secret = checkpoint.parent / "secret"
    secret.write_text("secret")
    change_manifest(checkpoint, **{"../secret": entry_of(secret), os.path.abspath(secret): entry_of(secret)})


def odd_sizes(checkpoint: Path) -> None:
    for number, size in enumerate((1e308, -1, "many", [], None, 10**400)):
        change_manifest(checkpoint, **{f"file{number}": {"bytes": size, "sha256": "0"}})


def million_entries(checkpoint: Path) -> None:
    entries = ",".join(f'"f{number}":{{"bytes":0,"sha256":""}}' for number in range(10**6))
    (checkpoint / commit.MANIFEST).write_text(f'{{"format":"{commit.FORMAT}","version":1,"files":{{{entries}}}}}')


def nested(name: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint / name).write_text("[" * 200_000 + "]" * 200_000)
        if name != commit.MANIFEST:
            scenes.reseal(checkpoint)

    return change


def header(size: int, text: bytes) -> Callable[[Path], None]:
    """Weights whose header claims a size, or holds what is no header."""

    def change(checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", size) + text)
        scenes.reseal(checkpoint)

    return change


def written(name: str, content: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint / name).write_text(content)
        scenes.reseal(checkpoint)

    return change


TENSOR = b'{"embed_tokens.weight":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}'
HOSTILE: dict[str, Callable[[Path], None]] = {
    "a link to a file": symlink_out, "a link to a folder": symlink_folder, "a link to the manifest": symlink_manifest,
    "names that lead out": traversal, "odd sizes": odd_sizes, "a million entries": million_entries,
    "a deep manifest": nested(commit.MANIFEST), "a deep state": nested("trainer_state.json"),
    "a deep model": nested("model.json"), "a deep config": nested("config.yaml"),
    "a deep tokenizer": nested("tokenizer/tokenizer.json"),
    "a huge header": header(2**62, b"{}"), "a header beyond the file": header(10**8, b"{}"),
    "no header": header(8, b"\x80\x04\x95abcde"), "a huge tensor": header(len(TENSOR), TENSOR + bytes(16)),
    "endless counters": written("trainer_state.json", '{"step": 1e400, "samples": 3, "tokens": 3, "best_val_loss": null}'),
    "a state that is a list": written("trainer_state.json", "[]"),
    "counters below zero": written("trainer_state.json", '{"step": -1, "samples": -4, "tokens": -9, "best_val_loss": null}'),
    "a huge model": written("model.json", '{"d_model": 1000000000, "num_layers": 1000000000, "vocab_size": 1000000000}'),
    "a wide model": written("model.json", '{"d_model": 1000000000, "num_layers": 1, "vocab_size": 1000000000}'),
    "an alias bomb": written("config.yaml", "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b]\n"),
    "a python tag": written("config.yaml", "!!python/object/apply:os.system ['touch canary']\n"),
}  # fmt: skip


@pytest.mark.parametrize("ways", [("auto", "sample"), pytest.param(tuple(WAYS), marks=pytest.mark.faults)], ids=["two", "all"])
@pytest.mark.parametrize("how", HOSTILE)
def test_what_is_hostile_is_refused_in_one_line(
    server: ForkServer, dataset: Path, trained: Path, scratch: Path, how: str, ways: tuple[str, ...]
) -> None:
    for way in ways:
        run_dir = scratch / way
        shutil.copytree(trained, run_dir)
        checkpoint = run_dir / "checkpoint_00000003"
        HOSTILE[how](checkpoint)
        outcome = WAYS[way](server, dataset, checkpoint, scratch / f"out-{way}")
        TALLY.add("hostile checkpoints")
        judge_refusal(outcome, f"{how}, {way}: {outcome}", may_work=True)
        assert outcome.seconds < 60
        assert not Path("canary").exists()


def test_a_hard_link_is_a_file(trained: Path, scratch: Path) -> None:
    """The same bytes under two names are what the manifest says; changed through the other name, they are not."""
    shutil.copytree(trained, scratch / "run")
    checkpoint = scratch / "run" / "checkpoint_00000003"
    os.link(checkpoint / "optimizer.bin", scratch / "other")
    assert commit.problem_with(checkpoint) is None
    with (scratch / "other").open("r+b") as file:
        file.write(b"changed")
    assert commit.problem_with(checkpoint) == "optimizer.bin was changed after it was written"
