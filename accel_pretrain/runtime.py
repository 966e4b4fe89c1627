"""The process and its surroundings: the Accelerator, device, precision, random seeds, launchers, and agreement.

The only module that reads the environment variables of launchers. Machines are described there and in
``accelerate_config.yaml``; numbers that change the result are described in the config file.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs, set_seed

from accel_pretrain.errors import ConfigError, refuse
from accel_pretrain.permutation import key_of
from accel_pretrain.typed_yaml import option

_PRECISIONS = {"no": "no", "float32": "no", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How much to train, in which portions, and on what."""

    batch_size: int = option(64, "sequences per process and micro-step")
    gradient_accumulation_steps: int | None = option(None, "micro-steps per update; null: 1, or derived from global_batch_size")
    global_batch_size: int | None = option(None, "sequences per update over all processes; null: what the two above give")
    max_iters: int | None = option(None, "updates; null: from max_tokens or epochs, else 100000", aliases=("max_steps",))
    max_tokens: int | None = option(None, "stop after the update that reaches this many tokens")
    epochs: float | None = option(None, "passes over the training data", aliases=("num_epochs",))
    grad_clip: float | None = option(1.0, "largest norm of the gradient; null: no clipping", aliases=("max_grad_norm",))
    mixed_precision: Literal["no", "bf16", "fp16", "float32", "bfloat16", "float16"] | None = option(
        None, "no | bf16 | fp16; null: the launcher's, else bf16 on a GPU that has it", aliases=("dtype",)
    )
    compile: bool = option(False, "compile the blocks with torch.compile (takes a minute, pays off in long runs)")
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: cuda, else mps, else cpu")
    cpu_threads: int | None = option(None, "threads per process on a CPU; null: the cores shared among the processes here")
    seed: int = option(42, "of the initial weights, the data order and dropout")
    hang_timeout: float | None = option(600.0, "seconds without progress after which a process says where it hangs and ends")
    requeue: bool | None = option(None, "after SIGUSR1, give the job back to Slurm's queue; null: if Slurm runs it")
    on_spike: Literal["log", "skip", "rollback"] = option(
        "log",
        "loss or gradient norm 6 standard deviations above the last 128: log | skip the update | rollback to a checkpoint",
    )
    rollback_updates: int = option(100, "a rollback leaves out the samples of so many updates, the last being the spike")
    max_rollbacks: int = option(3, "the next one ends the run")

    def __post_init__(self) -> None:
        amounts = (
            "batch_size", "gradient_accumulation_steps", "global_batch_size", "max_iters", "max_tokens", "cpu_threads",
            "rollback_updates",
        )  # fmt: skip
        both = self.gradient_accumulation_steps is not None and self.global_batch_size is not None
        ends = [name for name in ("max_iters", "max_tokens", "epochs") if getattr(self, name) is not None]
        refuse(
            *(
                ((value := getattr(self, name)) is not None and value < 1, f"{name}: must be at least 1, got {value}")
                for name in amounts
            ),
            (both, "global_batch_size: give it or gradient_accumulation_steps, not both: each follows from the other"),
            ((self.cpu_threads or 1) > 4096, f"cpu_threads: at most 4096, got {self.cpu_threads}"),
            (len(ends) > 1, f"{' and '.join(ends)}: give one of them, each says when to stop"),
            (self.epochs is not None and self.epochs <= 0, f"epochs: must be positive, got {self.epochs}"),
            (self.grad_clip is not None and self.grad_clip <= 0, f"grad_clip: must be positive or null, got {self.grad_clip}"),
            (self.max_rollbacks < 0, f"max_rollbacks: must not be negative, got {self.max_rollbacks}"),
            (
                self.hang_timeout is not None and self.hang_timeout <= 0,
                f"hang_timeout: must be positive, got {self.hang_timeout}",
            ),
            (not 0 <= self.seed < 2**63, f"seed: must be at least 0 and below 2^63, got {self.seed}"),
        )


def build_accelerator(training: TrainingConfig, log_with: list[str], run_dir: Path) -> Accelerator:
    """The Accelerator, made before anything else: it decides device, precision and process group.

    Raises :class:`ConfigError` for a device or precision that this machine does not have, and when the launcher started a
    number of processes that Accelerate does not see, or fewer than it was asked for.
    """
    cpu = _use_cpu(training.device)
    precision, _ = resolve_precision(training, cpu)
    refuse((precision == "fp16" and cpu, "training.mixed_precision: fp16 needs a GPU; try --mixed_precision bf16"))
    if cpu:
        torch.set_num_threads(_threads(training.cpu_threads))
    # Longer than the watchdog of any process waits, so that it is the one to say where a run hangs.
    timeout = timedelta(seconds=3 * (training.hang_timeout or 24 * 3600) + 60)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        # A plugin, because the bare argument would give way to a variable that `accelerate launch` may export.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1, adjust_scheduler=False, sync_with_dataloader=False
        ),
        # Rotary tables are buffers and equal everywhere: broadcasting them at every forward would only cost time.
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timeout, init_method=_meeting_place()),
        ],
        log_with=[*log_with] or None,
        project_dir=str(run_dir),
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ConfigError(f"the launcher started {expected} processes, but Accelerate sees {accelerator.num_processes}")
    _refuse_missing_processes(cpu, accelerator.num_processes)
    return accelerator


def _threads(wanted: int | None) -> int:
    """Launchers set OMP_NUM_THREADS to 1 where nobody chose, which would leave most of a CPU idle: then cores are shared."""
    chosen = int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
    if wanted is not None or chosen > 1 or (chosen == 1 and not launched()):
        return wanted or chosen
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _use_cpu(wanted: str) -> bool:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    available = {"auto": True, "cpu": True, "cuda": cuda, "mps": mps}[wanted]
    refuse((not available, f"training.device: {wanted} is not available on this machine; type --device auto"))
    return wanted == "cpu" or forced or not (cuda or mps)


def resolve_precision(training: TrainingConfig, cpu: bool) -> tuple[str, str]:
    """The precision in Accelerate's words, and who decided it: the config, the launcher, or the device."""
    if training.mixed_precision is not None:
        return _PRECISIONS[training.mixed_precision], "config"
    if launcher := os.environ.get("ACCELERATE_MIXED_PRECISION"):
        return launcher, "launcher"
    capable = not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return ("bf16" if capable else "no"), "device"


def runtime_of(training: TrainingConfig) -> tuple[bool, int]:
    """Whether a run with these settings uses the CPU of this machine, and how many threads it has there."""
    return _use_cpu(training.device), _threads(training.cpu_threads)


def wandb_knows_me() -> bool:
    """Whether wandb will find a key, or was told to work offline."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE", "online") != "online":
        return True
    names = (".netrc", "_netrc")
    return any("wandb" in path.read_text(errors="replace") for name in names if (path := Path.home() / name).is_file())


def describe_runtime(accelerator: Accelerator, training: TrainingConfig) -> str:
    """One line: device, processes, precision and who chose it."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    precision, source = resolve_precision(training, device.type == "cpu")
    shown = "fp32" if precision == "no" else precision
    return f"Device: {device} ({name}) | Processes: {accelerator.num_processes} | Precision: {shown} (from the {source})"


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every process: called before the model is made, so that its weights are equal."""
    set_seed(seed % 2**32)


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Make the coming forward's dropout a function of the update and of the micro-batch's number within it.

    ``micro_batch`` counts over all processes, so the masks do not depend on how micro-batches are spread over processes, and a
    resumed run draws the same ones without any saved random state.
    """
    torch.manual_seed(key_of(seed, step, micro_batch))


# ------------------------------------------------------------------------------------------------------------ launchers


def launched() -> bool:
    """Whether a launcher, Accelerate's or torch's, started this process; a person may have exported Accelerate's variables."""
    return elastic() or ("ACCELERATE_MIXED_PRECISION" in os.environ and _is_accelerate(parent_command()))


def elastic() -> bool:
    """Whether torch's elastic launcher watches this process; ``accelerate launch`` uses it for more than one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _meeting_place() -> str | None:
    """Where processes that an elastic launcher starts find each other; None leaves it to Accelerate.

    After a restart (``--max_restarts``) the launcher's store still holds the addresses of the dead processes, and torch
    2.13 may wait for those for ever. So each start gets a part of the store for itself.
    """
    if not elastic():
        return None
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

    start = f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def meet(url: str, **options: Any) -> Iterator[tuple[PrefixStore, int, int]]:
        for store, rank, world_size in rendezvous(url.replace("restartable:", "env:", 1), **options):
            yield PrefixStore(start, store), rank, world_size

    with contextlib.suppress(RuntimeError):  # it is registered already
        register_rendezvous_handler("restartable", meet)
    return "restartable://"


_LAUNCHERS = (
    "ACCELERATE_",
    "FSDP_",
    "TORCHELASTIC_",
    "TORCH_NCCL_",
    "MASTER_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
)


def launcher_variables() -> dict[str, str]:
    """What a launcher, or a person in its place, has set in the environment."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_LAUNCHERS)}


def environment_of_its_own(**extra: str) -> dict[str, str]:
    """The environment for a run that another program starts: this one without what a launcher has set, and ``extra``."""
    dropped = launcher_variables().keys() - {"ACCELERATE_USE_CPU"}
    return {name: value for name, value in os.environ.items() if name not in dropped} | extra


def is_restart() -> bool:
    """Whether a launcher (``--max_restarts``) or Slurm (requeue) has started this command again by itself."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def slurm_job() -> str | None:
    """The number of the Slurm job that this process belongs to."""
    return os.environ.get("SLURM_JOB_ID")


def parent_command() -> list[str]:
    """The command line of the process that started this one; empty where the system does not tell."""
    try:
        if sys.platform == "linux":
            return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        shown = subprocess.run(["ps", "-o", "command=", "-p", str(os.getppid())], capture_output=True, text=True, timeout=5)
        return shown.stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return []


def _is_accelerate(words: list[str]) -> bool:
    """Whether a command line is that of ``accelerate launch``, in one of the ways to type it."""
    return any(Path(word).name.startswith("accelerate") for word in words[:4])


def _asked_for(words: list[str]) -> int:
    """How many processes a command line of ``accelerate launch`` asks for, itself or in its config file; 1 if it is none."""
    if not _is_accelerate(words):
        return 1
    values: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--num_processes", "--num-processes", "--config_file", "--config-file"):
            values.setdefault(name.replace("-", "_"), value if equals else following)
    number = values.get("__num_processes")
    if number is None:
        file = values.get("__config_file") or (None if "--cpu" in words else default_config_file)
        try:
            document = yaml.safe_load(Path(file).read_text(encoding="utf-8")) if file else {}
            alone = str(document.get("distributed_type", "NO")) in ("NO", "False")
            number = "1" if alone else document.get("num_processes", 1)
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            number = "1"
    return int(number) if str(number).isdigit() else 1


def _refuse_missing_processes(cpu: bool, seen: int) -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one process, and says nothing."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or elastic():
        return
    asked = _asked_for(parent_command())
    instead = f"accelerate launch --multi_gpu --num_processes {asked} -m accel_pretrain.train ..."
    refuse(
        (
            asked > seen,
            f"accelerate launch was asked for {asked} processes and started {seen}; "
            f"type: {'ACCELERATE_USE_CPU=1 ' if cpu else ''}{instead} (without --cpu)",
        )
    )


# ----------------------------------------------------------------------------------------------------------- agreement


def all_agree(accelerator: Accelerator, ok: bool) -> bool:
    """Whether ``ok`` holds on every process. Collective: a failure on one rank must not leave the others waiting."""
    if accelerator.num_processes == 1:
        return ok
    flag = torch.tensor(0 if ok else 1, device=accelerator.device)
    return int(accelerator.reduce(flag, reduction="sum")) == 0  # type: ignore[arg-type]


@contextlib.contextmanager
def together(accelerator: Accelerator, error: type[Exception]) -> Iterator[None]:
    """Run a block on every process; if it raises anywhere, raise everywhere. Collective."""
    caught: Exception | None = None
    try:
        yield
    except Exception as problem:  # whatever it is, the others must hear of it before anyone raises
        caught = problem
    if not all_agree(accelerator, caught is None):
        raise caught or error("another process failed; its message is above")
