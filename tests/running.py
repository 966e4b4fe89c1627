"""What many tests share: a small real dataset, and ways to run programs as real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from accel_pretrain.commit import hash_files, names_in, seal
from accel_pretrain.shards import Manifest, ShardWriter, write_manifest
from accel_pretrain.tokenizer import ByteTokenizer

REPO = Path(__file__).parent.parent
TINY = [
    "--d_model",
    "32",
    "--num_layers",
    "2",
    "--num_heads",
    "2",
    "--d_ff",
    "64",
    "--context_length",
    "32",
    "--batch_size",
    "4",
    "--lr",
    "3e-3",
    "--log_interval",
    "1",
    "--eval_interval",
    "1000",
    "--eval_iters",
    "16",
    "--device",
    "cpu",
    "--cpu_threads",
    "1",
    "--mixed_precision",  # the same numbers on every processor
    "no",
    "--compile",
    "false",
]

Train = Callable[..., int]


def first_and_slow(cases: Iterable[Any]) -> list[Any]:
    """Of cases that are alike, the first; the others run in make test-slow."""
    first, *others = cases
    return [first, *(pytest.param(case, marks=pytest.mark.slow) for case in others)]


def stdlib_text(characters: int) -> str:
    """Source code of the Python standard library: real text that every machine has."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for path in sorted(folder.glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= characters:
            break
    return text[:characters]


def write_dataset(folder: Path, train_text: str, val_text: str) -> Path:
    """A dataset of bytes, written as prep writes it."""
    folder.mkdir(parents=True)
    tokenizer, infos = ByteTokenizer(), []
    for split, text in (("train", train_text), ("val", val_text)):
        writer = ShardWriter(folder / f"{split}.bin", split, "uint16", tokenizer.vocab_size)
        writer.append(tokenizer.encode_document(text), documents=1, utf8_bytes=len(text.encode()))
        infos.append(writer.close())
    tokenizer.save(folder / "tokenizer")
    about = {key: getattr(tokenizer, key) for key in ("name", "vocab_size", "eot_id", "fingerprint")}
    write_manifest(folder, Manifest(dtype="uint16", tokenizer=about, files=tuple(infos)))
    return folder


def launch(arguments: Sequence[str], processes: int = 1, module: str = "accel_pretrain.train") -> list[str]:
    """The command that runs ``module`` in one process by plain python, or in several by torch's launcher."""
    if processes == 1:
        return [sys.executable, "-m", module, *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, "-m", module, *arguments]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, without what would change the numbers."""
    hidden = ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "WANDB_API_KEY")
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    return kept | {"PYTHONPATH": str(REPO), "ACCELERATE_USE_CPU": "1"} | extra


def run_processes(arguments: Sequence[str], processes: int = 1, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the trainer as real processes, to the end."""
    return subprocess.run(
        launch(arguments, processes), env=environment(), cwd=REPO, capture_output=True, text=True, timeout=timeout
    )


def begun_by_two(run_train: Train, folder: Path, plan: Sequence[str], strategy: str) -> list[float]:
    """The losses of ten updates: three and three by two processes with a ``strategy``, the rest by one that goes on."""
    words = [*TINY, *plan, "--batch_size", "2", "--strategy", strategy, "--checkpoint_dir", str(folder)]
    for updates in ("3", "6"):
        done = run_processes([*words, "--max_iters", updates], processes=2)
        assert done.returncode == 0, done.stderr
        assert "Processes: 2" in done.stdout
    assert run_train(folder, *plan, "--max_iters", "10") == 0
    return losses(folder)


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    """The training loss of every update, by step."""
    return [row["train/loss"] for row in rows(run_dir) if "train/loss" in row]


def newest(run_dir: Path) -> Path:
    """The checkpoint that ``latest`` names."""
    return run_dir / (run_dir / "latest").read_text().strip()


def weights_and_moments(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the model and of the optimizer, by name."""
    tensors = dict(load_file(checkpoint / "model.safetensors"))
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    return tensors | {f"{index}.{name}": tensor for index, own in state.items() for name, tensor in own.items()}


def assert_same_bits(one: Path, other: Path) -> None:
    """The same names and the same bits in the weights and moments of two checkpoints."""
    ours, theirs = weights_and_moments(one), weights_and_moments(other)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def reseal(checkpoint: Path) -> None:
    """Give a checkpoint whose files a test has changed a manifest that fits them again."""
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    seal(checkpoint, hash_files(checkpoint, names_in(checkpoint)))


def refused(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line on stderr with which a program refuses these words."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err
