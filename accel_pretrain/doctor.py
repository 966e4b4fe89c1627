"""Is this machine ready, and does this config keep the promises? ``python -m accel_pretrain.doctor [--config C.yaml]``.

What the package needs and finds here. Without a config, then a small run from text to text (:mod:`accel_pretrain.smoke`); with
one, proofs by real runs of it made small (:mod:`accel_pretrain.proofs`): nothing of the person's own run directory is touched.
Exit code 0 if all is well, else 1.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
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
from accel_pretrain.hardware import free_memory
from accel_pretrain.launchers import environment_of_its_own, launcher_variables, request_of
from accel_pretrain.preset import load_with
from accel_pretrain.proofs import Result, prove
from accel_pretrain.redaction import looks_secret, redact
from accel_pretrain.runtime import TrainingConfig, resolve_precision
from accel_pretrain.smoke import smoke
from accel_pretrain.typed_yaml import parse_command_line

USAGE = """\
usage: python -m accel_pretrain.doctor                                    what this machine has, and a run of 20 seconds on it
       python -m accel_pretrain.doctor --config FILE [--key VALUE]...     and what this config does on it, proven by small runs
       python -m accel_pretrain.doctor --train_data_path DIR [--preset depth=N] [...]

  --no_smoke       without that run
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
    "track": {"wandb": "0.19", "tensorboard": "2.17", "trackio": "0.2", "nvidia-ml-py": "12.535"},
    "sweep": {"optuna": "4.0"},
    "plot": {"matplotlib": "3.9"},
    "report": {"bokeh": "3.9"},
    "eval": {"lm-eval": "0.4.12"},
}
ENOUGH_DISK, ENOUGH_SHARED = 5 << 30, 1 << 30
SHARED_MEMORY = Path("/dev/shm")
# Of tiktoken's files, by the names that prep.tokenize takes. gpt2 has the ids of r50k_base.
RANKS = {"gpt2": "r50k_base", "p50k_base": "p50k_base", "cl100k_base": "cl100k_base", "o200k_base": "o200k_base"}
RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"


_TOLD = ("distributed_type", "num_machines", "num_processes", "mixed_precision", "use_cpu", "dynamo_config")


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
        line = parse_command_line(RunConfig, words, flags={"help", "no_smoke"}, short={"-h": "help"}, presets=True)
        if "help" in line.flags:
            print(USAGE)
            return 0
        given = line.preset or line.config or line.overrides
        config = load_with(RunConfig, line.preset, line.config, line.overrides) if given else None
        run_dir = config.checkpoint.checkpoint_dir if config else Path()
        well = True
        for finding in examine(run_dir):
            mark = {True: "ok", False: "PROBLEM", None: "-"}[finding.ok]
            print(f"{finding.what:<22} {mark:<8} {redact(finding.detail)}")
            well = well and finding.ok is not False
        if config is not None:
            well = show_proofs(config) and well
        elif "no_smoke" not in line.flags:
            well = show_smoke() and well
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


def show_smoke() -> bool:
    """Train something small, from text to text, and print one line; whether that worked."""
    print("\na small run: made-up text, a small model, in a folder that is removed afterwards", flush=True)
    with tempfile.TemporaryDirectory(prefix="accel_pretrain_doctor_") as folder:
        result = smoke(Path(folder))
    print(_line(result))
    return result.passed


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
    precision, source = resolve_precision(TrainingConfig(), not torch.cuda.is_available())
    shown = "float32" if precision == "no" else precision
    yield Finding("precision", True, f"{shown} (from the {source}), unless a config says another")
    if (free := free_memory()) is not None:
        yield Finding("memory", True, f"{free / 2**30:.1f} GiB free")
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    missing = "no C++ compiler: torch.compile does not work on a CPU; to have it, install g++"
    yield Finding("compiler", True if compiler else None, compiler or missing)


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
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        advice = "" if free >= ENOUGH_SHARED else "; processes of one machine talk through it: docker run --shm-size 8g"
        yield Finding(str(SHARED_MEMORY), True if free >= ENOUGH_SHARED else None, f"{free / 2**30:.1f} GiB free{advice}")


def _environment() -> Iterator[Finding]:
    variables = environment_of_its_own()
    set_by_launcher = ", ".join(f"{name}={value}" for name, value in launcher_variables().items() if not looks_secret(name))
    yield Finding("launcher", True, set_by_launcher or "none: one process")
    yield _accelerate_config()
    yield _tokenizers(variables.get("TIKTOKEN_CACHE_DIR") or variables.get("DATA_GYM_CACHE_DIR"))
    unsafe = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if variables.get(unsafe):
        yield Finding(unsafe, False, "is set: files that torch loads could execute code; unset it")
    logged_in = [name for name in ("WANDB_API_KEY", "HF_TOKEN") if variables.get(name)]
    yield Finding("secrets", True, f"{', '.join(logged_in) or 'none'} in the environment, where they stay")


def _accelerate_config() -> Finding:
    """What ``accelerate launch`` takes where no ``--config_file`` is typed."""
    request = request_of(["accelerate", "launch"])
    if request.file is None:
        return Finding("accelerate's config", True, "none of your own: accelerate launch takes the --config_file that you type")
    told = ", ".join(f"{key} {value}" for key, value in request.document.items() if key in _TOLD)
    return Finding("accelerate's config", None, f"{request.file}, where no --config_file is typed: {told or 'nothing in it'}")


def _tokenizers(cache: str | None) -> Finding:
    """Which vocabularies tiktoken need not fetch: in its cache, files are named by the hashes of where they are from."""
    folder = Path(cache or Path(tempfile.gettempdir()) / "data-gym-cache")
    if cache is not None and not folder.is_dir():
        return Finding("tokenizers", False, f"{folder}, which TIKTOKEN_CACHE_DIR names, is not there; make it, or unset that")
    names = {name: hashlib.sha1(RANKS_URL.format(file).encode()).hexdigest() for name, file in RANKS.items()}
    there = [name for name, hashed in names.items() if (folder / hashed).is_file()]
    others = ", ".join(name for name in names if name not in there)
    rest = f"{others}: from the network at first use; bytes and train:N need none" if others else ""
    kept = f"{', '.join(there)} in {folder}" if there else f"none in {folder}"
    return Finding("tokenizers", True if there else None, "; ".join(part for part in (kept, rest) if part))


if __name__ == "__main__":
    sys.exit(main())
