"""Peak memory and time of importing and exporting GPT-2 1558M: ``python -m benchmarks.hf_memory``.

A folder as transformers writes it is made with random weights, imported, and exported again, each by the command that a person
types, in a process of its own; both compare logits with transformers before they publish. Peak memory is what the kernel counts
for that process (pages that are mapped from files included), its increase over the same command's ``--help``, and the ratio
to the bytes of the weights. Needs about 20 GB of free disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from accel_pretrain.config import RunConfig
from accel_pretrain.hf.convert import theirs_shape
from accel_pretrain.hf.families import GPT2
from accel_pretrain.hf.family import names_of
from accel_pretrain.hf.weight_files import TensorEntry, write_sharded
from accel_pretrain.typed_yaml import load


def make_folder(folder: Path, config_file: Path) -> int:
    """Random weights of a GPT-2; returns their bytes."""
    config = load(RunConfig, config_file).model
    shapes = names_of(config)
    links = GPT2.links(config, list(shapes))
    entries = [TensorEntry(link.theirs, torch.float32, theirs_shape(link, shapes)) for link in links]
    shape_of = {entry.name: entry.shape for entry in entries}
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()

    def draw(name: str) -> torch.Tensor:
        return torch.randn(shape_of[name], generator=generator) * 0.02 + float(".ln_" in name and name.endswith("weight"))

    write_sharded(folder, entries, draw, 5_000_000_000)
    (folder / "config.json").write_text(json.dumps(GPT2.write_config(config)))
    return sum(entry.nbytes for entry in entries)


def measure(*words: str) -> tuple[float, float]:
    """Peak resident bytes and seconds of one command."""
    program = (
        "import resource, subprocess, sys; code = subprocess.call([sys.executable, '-m', 'accel_pretrain.hf', *sys.argv[1:]]); "
        "sys.stderr.write(f'\\nPEAK {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}'); sys.exit(code)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    return int(done.stderr.rsplit("PEAK ", 1)[1]) * unit, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/gpt2_1558m.yaml"))
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: a temporary folder")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        size = make_folder(work / "source", options.config)
        base, _ = measure("--help")
        print(f"weights {size / 1e9:.2f} GB; the program itself {base / 1e9:.2f} GB")
        for name, words in {
            "import, not compared": ("import", str(work / "source"), "-o", str(work / "unchecked"), "--verify", "false"),
            "import": ("import", str(work / "source"), "-o", str(work / "run")),
            "export": ("export", "--checkpoint", str(work / "run"), "-o", str(work / "out")),
        }.items():
            peak, seconds = measure(*words)
            print(f"{name:<22}peak {peak / 1e9:6.2f} GB = {peak / size:.2f} x the weights, {seconds:6.1f} s", flush=True)
            shutil.rmtree(work / "unchecked", ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
