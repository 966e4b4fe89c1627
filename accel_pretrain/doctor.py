"""Is this machine ready, and does this config keep the promises? ``python -m accel_pretrain.doctor [--config C.yaml]``.

Without a config, what the package needs and finds here. With one, the same, and then proofs by real runs of it made small (see
:mod:`accel_pretrain.proofs`): nothing of the person's own run directory is touched. Exit code 0 if all is well, else 1.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.version import Version

from accel_pretrain.config import RunConfig
from accel_pretrain.errors import reported
from accel_pretrain.launchers import environment_of_its_own, launcher_variables
from accel_pretrain.proofs import Result, prove
from accel_pretrain.redaction import looks_secret, redact
from accel_pretrain.typed_yaml import load, parse_command_line

USAGE = """\
usage: python -m accel_pretrain.doctor                                    what this machine has
       python -m accel_pretrain.doctor --config FILE [--key VALUE]...     and what this config does on it, proven by small runs
       python -m accel_pretrain.doctor --train_data_path DIR [...]

  --help           show this
"""

# As in pyproject.toml, and a test says so.
CORE = {
    "torch": "2.11", "accelerate": "1.15", "numpy": "2.0", "pyyaml": "6.0", "safetensors": "0.5", "tiktoken": "0.13",
    "tqdm": "4.66",
}  # fmt: skip
EXTRAS = {
    "hf": {"transformers": "5.3"},
    "data": {"datasets": "4.0", "pyarrow": "17", "zstandard": "0.22"},
    "fast": {"gigatoken": "0.10"},
    "ray": {"ray": "2.40"},
    "bpe": {"rustbpe": "0.1"},
    "track": {"wandb": "0.19", "tensorboard": "2.17", "trackio": "0.2"},
    "plot": {"matplotlib": "3.9"},
    "report": {"bokeh": "3.9"},
    "eval": {"lm-eval": "0.4.12"},
}
ENOUGH_DISK = 5 << 30


@dataclass(frozen=True)
class Finding:
    """One line about the machine: ``ok`` is None where nothing is wrong and something could be added."""

    what: str
    ok: bool | None
    detail: str


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    with reported():
        words = sys.argv[1:] if argv is None else argv
        line = parse_command_line(RunConfig, words, flags={"help"}, short={"-h": "help"})
        if "help" in line.flags:
            print(USAGE)
            return 0
        config = load(RunConfig, line.config, line.overrides) if line.config or line.overrides else None
        run_dir = config.checkpoint.checkpoint_dir if config else Path()
        well = True
        for finding in examine(run_dir):
            mark = {True: "ok", False: "PROBLEM", None: "-"}[finding.ok]
            print(f"{finding.what:<22} {mark:<8} {redact(finding.detail)}")
            well = well and finding.ok is not False
        if config is not None:
            well = show_proofs(config) and well
        print("\nall is well" if well else "\nsomething is wrong: see the lines above")
        return 0 if well else 1
    return 2


def show_proofs(config: RunConfig) -> bool:
    """Run the proofs, print a line as each is done; whether all hold."""
    print("\nproofs: real runs of this config, made small, in a folder that is removed afterwards")
    well = True
    with tempfile.TemporaryDirectory(prefix="accel_pretrain_doctor_") as folder:
        for result in prove(config, Path(folder), lambda text: print(f"  {text}")):
            print(_line(result), flush=True)
            well = well and result.passed
    return well


def _line(result: Result) -> str:
    return f"{'holds' if result.passed else 'FAILS':<6} {result.seconds:6.1f} s  {result.check}: {redact(result.seen)}"


# --------------------------------------------------------------------------------------------------------- the machine


def examine(run_dir: Path) -> Iterator[Finding]:
    """Everything about the machine that a run may trip over."""
    yield Finding("Python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.platform()}")
    for name, least in CORE.items():
        version = _version(name)
        enough = version is not None and Version(version) >= Version(least)
        advice = "" if enough else f"; type: pip install '{name}>={least}'"
        yield Finding(name, enough, f"{version or 'missing'}{advice}")
    for extra, packages in EXTRAS.items():
        versions = {name: _version(name) for name in packages}
        missing = [name for name, version in versions.items() if version is None or Version(version) < Version(packages[name])]
        shown = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
        advice = f"; to have it: pip install 'accel_pretrain[{extra}]'" if missing else ""
        yield Finding(f"extra {extra}", None if missing else True, shown + advice)
    yield from _hardware()
    yield from _folders(run_dir)
    yield from _environment()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(number).total_memory / 2**30
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            yield Finding(f"GPU {number}", True, f"{torch.cuda.get_device_name(number)}, {memory:.0f} GiB, {bf16}")
    else:
        mps = "; Apple's GPU is there" if torch.backends.mps.is_available() else ""
        yield Finding("GPU", None, f"none that torch {torch.__version__} can use: runs take the CPU{mps}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("CPU", True, f"{cores} cores, {torch.get_num_threads()} threads in torch")


def _folders(run_dir: Path) -> Iterator[Finding]:
    place = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place):
            yield Finding("run directory", True, f"{place} can be written to")
    except OSError as error:
        yield Finding("run directory", False, f"{place} cannot be written to ({error.strerror}); type --checkpoint_dir DIR")
    free = shutil.disk_usage(place).free
    advice = "" if free >= ENOUGH_DISK else "; a checkpoint takes 12 bytes per parameter, and several are kept"
    yield Finding("disk", True if free >= ENOUGH_DISK else None, f"{free / 2**30:.1f} GiB free{advice}")


def _environment() -> Iterator[Finding]:
    variables = environment_of_its_own()
    set_by_launcher = ", ".join(f"{name}={value}" for name, value in launcher_variables().items() if not looks_secret(name))
    yield Finding("launcher", True, set_by_launcher or "none: one process")
    cache = variables.get("TIKTOKEN_CACHE_DIR") or variables.get("DATA_GYM_CACHE_DIR")
    there = cache is not None and Path(cache).is_dir()
    empty = "TIKTOKEN_CACHE_DIR is not set: --tokenizer gpt2 fetches its vocabulary from the network at first use"
    yield Finding("tiktoken's cache", there or (None if cache is None else False), cache or empty)
    unsafe = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if variables.get(unsafe):
        yield Finding(unsafe, False, "is set: files that torch loads could execute code; unset it")
    logged_in = [name for name in ("WANDB_API_KEY", "HF_TOKEN") if variables.get(name)]
    yield Finding("secrets", True, f"{', '.join(logged_in) or 'none'} in the environment, where they stay")


if __name__ == "__main__":
    sys.exit(main())
