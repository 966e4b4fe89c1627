"""What ``accel_pretrain.doctor`` proves of a config, by running it: a small run of it, killed, damaged, resumed and spread.

Every run is the real trainer in processes of its own, on the person's own data, optimizer, model options and device. What is
made smaller (:func:`shrunk`) is said. :func:`prove` runs the proofs and yields one :class:`Result` each.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from accel_pretrain.config import Plan, RunConfig, make_plan, open_splits
from accel_pretrain.errors import PretrainError
from accel_pretrain.launchers import environment_of_its_own, following
from accel_pretrain.metrics import METRICS_FILE, read_metrics
from accel_pretrain.schedule import Constant
from accel_pretrain.tokenizer import load_tokenizer
from accel_pretrain.typed_yaml import to_yaml

HALF = 3  # a run has twice as many updates
CLOSE = 1e-5  # nats per token
_LARGEST = {"cpu": 20_000_000, "cuda": 400_000_000}  # parameters of a model that is taken as it is
_TIMEOUT = 900
_NONE: Mapping[str, str] = {}


@dataclass(frozen=True)
class Result:
    """One check: what it is, whether it holds, what was seen, and how long that took."""

    check: str
    passed: bool
    seen: str
    seconds: float


class Failed(Exception):
    """A proof that does not hold; says what was seen."""


def prove(config: RunConfig, folder: Path, say: Callable[[str], None]) -> Iterator[Result]:
    """Run all proofs of ``config`` in ``folder``, which is empty; after a failure that leaves nothing to compare, no more."""
    plan: list[Plan] = []
    first = _checked("data, tokenizer and model fit", lambda: _fits(config, plan))
    yield first
    if not first.passed:
        return
    small, changes = shrunk(config, plan[0].parameters)
    for change in changes:
        say(f"for the proofs: {change}")
    runs = Runs(small, folder)
    first = _checked(f"{2 * HALF} updates of the config, made small", runs.make_reference)
    yield first
    if not first.passed:
        return
    yield _checked(f"{2 * HALF} updates = {HALF}, a restart, and {HALF} more: bit for bit", runs.prove_resume)
    killed = _checked("killed (SIGKILL) and started again: bit for bit", runs.prove_kill)
    yield killed
    if killed.passed:
        yield _checked("the newest checkpoint damaged: falls back, and bit for bit", runs.prove_damage)
    yield _checked(f"1 process = 2 processes: losses to {CLOSE:g}", runs.prove_processes)


def _checked(check: str, proof: Callable[[], str]) -> Result:
    begin = time.monotonic()
    try:
        passed, seen = True, proof()
    except (Failed, PretrainError, OSError, subprocess.TimeoutExpired) as error:
        passed, seen = False, str(error)
    return Result(check, passed, seen, time.monotonic() - begin)


def _fits(config: RunConfig, plan: list[Plan]) -> str:
    splits = open_splits(config.data)
    plan.append(make_plan(config, splits, 1))
    if splits.train.tokenizer_path is None:
        return f"{plan[0].train_tokens:,} tokens, no tokenizer: a bare file of ids"
    tokenizer = load_tokenizer(splits.train.tokenizer_path)
    ids = np.asarray(splits.val.files[0][:200]).tolist()
    text = tokenizer.decode(ids)
    if splits.train.tokenizer and tokenizer.fingerprint != splits.train.tokenizer["fingerprint"]:
        raise Failed("the tokenizer beside the data is not the one that made it; prepare the data again")
    return f"{plan[0].train_tokens:,} tokens of {tokenizer.name}, beginning {' '.join(text.split())[:30]!r}"


def shrunk(config: RunConfig, parameters: int) -> tuple[RunConfig, list[str]]:
    """The config as a run of a few seconds, and what a person should know about the difference."""
    model, schedule, changes = config.model, config.schedule, []
    updates, size = 2 * HALF, min(2, config.training.batch_size)
    changes.append(f"{updates} updates of {2 * size} sequences, evaluations of 2 windows, no trackers, no samples")
    if config.checkpoint.init_from is not None:
        changes.append("new weights instead of those of init_from")
    if config.training.compile:
        changes.append("without torch.compile")
    on_cpu = config.training.device == "cpu" or not torch.cuda.is_available()
    if model.context_length > 256 and on_cpu:
        model = replace(model, context_length=256)
        changes.append("context_length 256")
    if parameters > _LARGEST["cpu" if on_cpu else "cuda"]:
        shared = max(1, 4 * model.kv_heads // model.num_heads)
        model = replace(
            model, num_layers=min(2, model.num_layers), d_model=128, num_heads=4, num_kv_heads=shared, head_dim=32, d_ff=512
        )
        changes.append(f"a model of 2 blocks, 128 wide, in the place of {parameters:,} parameters")
    schedule = replace(schedule, warmup_iters=min(2, schedule.warmup(10_000)))
    if schedule.problems(config.optimizer.lr, updates):
        schedule = Constant(warmup_iters=schedule.warmup_iters)
        changes.append("a constant rate after the warm-up")
    small = replace(
        config, model=model, schedule=schedule,
        training=replace(
            config.training, batch_size=size, global_batch_size=2 * size, gradient_accumulation_steps=None,
            max_iters=updates, max_tokens=None, epochs=None, compile=False, batch_warmup_tokens=None, batch_warmup_from=None,
        ),
        evaluation=replace(config.evaluation, eval_interval=HALF, eval_iters=1, eval_batch_size=2),
        checkpoint=replace(
            config.checkpoint, checkpoint_interval=HALF, keep_last=None, resume_from="auto", init_from=None
        ),
        logging=replace(config.logging, log_interval=1, trackers=(), use_wandb=False, sample_interval=None),
    )  # fmt: skip
    return small, changes


def run_to_its_end(command: Sequence[str], what: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program of ours, with ``variables`` in its environment. Raises :class:`Failed` with its own first error."""
    done = subprocess.run(
        following(command), env=environment_of_its_own(**variables), capture_output=True, text=True, errors="replace",
        timeout=_TIMEOUT,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error")] or done.stderr.splitlines()[-1:]
        raise Failed(f"{what} ended with {done.returncode}: {' '.join(lines[:1])}")
    return done


class Runs:
    """Runs of one small config below one folder. The proofs return what they saw, or raise :class:`Failed`."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "config.yaml"
        self.file.write_text(to_yaml(config), encoding="utf-8")
        self.exact = config.training.device == "cpu" or not torch.cuda.is_available()

    def command(self, name: str, *words: str, processes: int = 1) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
        own = ["--config", str(self.file), "--checkpoint_dir", str(self.folder / name)]
        return [sys.executable, *launcher, "-m", "accel_pretrain.train", *own, *words]

    def train(self, name: str, *words: str, processes: int = 1, variables: Mapping[str, str] = _NONE) -> str:
        """Run the trainer to its end and return what it printed."""
        done = run_to_its_end(self.command(name, *words, processes=processes), what="the trainer", **variables)
        return done.stdout + done.stderr

    def checkpoint(self, name: str, step: int) -> Path:
        return self.folder / name / f"checkpoint_{step:08d}"

    def make_reference(self) -> str:
        self.train("whole")
        return f"losses {' '.join(f'{loss:.4f}' for loss in self.losses('whole'))}"

    def prove_resume(self) -> str:
        shutil.copytree(self.checkpoint("whole", HALF), self.checkpoint("restarted", HALF))
        self.train("restarted")
        return self.compare("restarted")

    def prove_kill(self) -> str:
        for attempt in range(3):
            shutil.rmtree(self.folder / "killed", ignore_errors=True)
            if (step := self.kill_after(1 + attempt)) is not None:
                self.train("killed", "--checkpoint_interval", "1")
                return f"killed after update {step}; {self.compare('killed')}"
        raise Failed("the run was always over before it could be killed")

    def kill_after(self, step: int) -> int | None:
        """Start a run and kill it once the checkpoint of ``step`` is there; the newest one then, None if it was too late."""
        command = self.command("killed", "--checkpoint_interval", "1")
        process = subprocess.Popen(
            following(command), env=environment_of_its_own(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _TIMEOUT
        while process.poll() is None and not self.checkpoint("killed", step).exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        if process.wait() != -signal.SIGKILL or self.checkpoint("killed", 2 * HALF).exists():
            return None
        return max(int(path.name[-8:]) for path in (self.folder / "killed").glob("checkpoint_*"))

    def prove_damage(self) -> str:
        """Turn one bit of the newest checkpoint's weights, and go on: from the one before, to the same end."""
        weights = self.checkpoint("killed", 2 * HALF) / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
        shown = self.train("killed", "--checkpoint_interval", "1")
        if f"checkpoint_{2 * HALF - 1:08d}" not in shown:
            raise Failed("the damage was not noticed")
        return self.compare("killed")

    def prove_processes(self) -> str:
        """On the CPU and in float32, unless there are two GPUs: what is proven is how the work is divided."""
        words = ["--mixed_precision", "no", "--cpu_threads", "1"]
        variables = {}
        if torch.cuda.device_count() < 2:
            words, variables = [*words, "--device", "cpu"], {"ACCELERATE_USE_CPU": "1"}
        self.train("one", *words, variables=variables)
        if "Processes: 2" not in self.train("two", *words, processes=2, variables=variables):
            raise Failed("two processes were started, and did not find each other")
        apart = max(abs(one - two) for one, two in zip(self.losses("one"), self.losses("two"), strict=True))
        if not apart <= CLOSE:
            raise Failed(f"losses up to {apart:.1e} apart")
        return f"losses up to {apart:.1e} apart"

    def losses(self, name: str) -> list[float]:
        rows = read_metrics(self.folder / name / METRICS_FILE)
        return [row["train/loss"] for row in rows if row.get("train/loss") is not None]

    def compare(self, name: str) -> str:
        """Say how the end of run ``name`` compares with the reference; raise unless it is the same in every bit."""
        ours, theirs = (_tensors(self.checkpoint(run, 2 * HALF)) for run in ("whole", name))
        if ours.keys() != theirs.keys():
            raise Failed("other tensors than in the uninterrupted run")
        apart = [float((ours[key].double() - theirs[key].double()).abs().max()) for key in ours if ours[key].numel()]
        if all(torch.equal(ours[key], theirs[key]) for key in ours):
            return f"{len(ours)} tensors of weights and optimizer are equal"
        if not self.exact and max(apart) <= CLOSE:
            return f"up to {max(apart):.1e} apart: some GPU kernels add in no fixed order"
        raise Failed(f"weights or optimizer up to {max(apart):.1e} apart")


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of model and optimizer, by name."""
    state: dict[Any, Any] = torch.load(checkpoint / "optimizer.bin", map_location="cpu", weights_only=True)["state"]
    moments = {f"{index}.{name}": torch.as_tensor(value) for index, own in state.items() for name, value in own.items()}
    return dict(load_file(checkpoint / "model.safetensors")) | moments
