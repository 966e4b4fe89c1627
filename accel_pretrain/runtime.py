"""The process and its device: the Accelerator, precision, threads, compilation, random seeds, and agreement among processes.

Machines are described by what a launcher sets in the environment and in ``accelerate_config.yaml``; numbers that change the
result are described in the config file.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    set_seed,
)

from accel_pretrain.errors import ConfigError, refuse
from accel_pretrain.files import expanded
from accel_pretrain.launch_checks import launch_notices, refuse_missing_processes, refuse_recomputing, settle_launch
from accel_pretrain.launchers import asked_alone, launched, machines, meeting, meeting_place, sharding_asked_for, typed_numbers
from accel_pretrain.models.recompute import Level
from accel_pretrain.parallel import ParallelConfig, build_plugin, insist, strategy_of
from accel_pretrain.peaks import kind_of, peak_flops
from accel_pretrain.permutation import key_of
from accel_pretrain.typed_yaml import option
from accel_pretrain.watchdog import patience

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
        None,
        "no | bf16 | fp16; null: the launcher's if it asks for one, else bf16 where the device has it",
        aliases=("dtype",),
    )
    gradient_compression: Literal["bf16"] | None = option(
        None, "bf16: exchange gradients in half the bytes, which changes the curve a little; NVIDIA GPUs; null: float32"
    )
    compile: bool | None = option(None, "compile the blocks with torch.compile; null: in runs so long that it pays")
    activation_checkpointing: Level = option(
        "none", "less memory, more time. none | selective: keep products and attention of a block | full: only its input"
    )
    chunked_loss: bool = option(False, "on a GPU, logits and loss of some tokens at a time: less memory, a little slower")
    tf32: bool = option(False, "on a GPU, products in float32 of inputs rounded to 10 bits: faster where mixed_precision is no")
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: cuda, else mps, else cpu")
    cpu_threads: int | None = option(None, "threads per process on a CPU; null: the cores shared among the processes here")
    seed: int = option(42, "of the initial weights, the data order and dropout")
    hang_timeout: float | None = option(600.0, "seconds without progress after which a process says where it hangs and ends")
    requeue: bool | None = option(None, "after SIGUSR1, give the job back to Slurm's queue; null: if Slurm runs it")
    on_spike: Literal["log", "skip", "rollback"] = option(
        "log",
        "loss or gradient norm 6 standard deviations above the last 128: log | skip the update | rollback to a checkpoint",
    )
    batch_warmup_tokens: int | None = option(
        None, "let updates grow from batch_warmup_from sequences to all of them over so many tokens; null: all from the start"
    )
    batch_warmup_from: int | None = option(None, "sequences of the first update; null: those of one micro-step")
    rollback_updates: int = option(100, "a rollback leaves out the samples of so many updates, the last being the spike")
    max_rollbacks: int = option(3, "the next one ends the run")

    def __post_init__(self) -> None:
        amounts = (
            "batch_size", "gradient_accumulation_steps", "global_batch_size", "max_iters", "max_tokens", "cpu_threads",
            "rollback_updates", "batch_warmup_tokens", "batch_warmup_from",
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
            (
                self.batch_warmup_from is not None and self.batch_warmup_tokens is None,
                f"batch_warmup_from: {self.batch_warmup_from} has no meaning without batch_warmup_tokens, over which to grow",
            ),
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


def build_accelerator(
    training: TrainingConfig, log_with: list[str], run_dir: Path, parallel: ParallelConfig | None = None
) -> Accelerator:
    """The Accelerator, made before anything else: it decides device, precision and process group.

    Raises :class:`ConfigError` for a device or precision that this machine does not have, and when the launcher started a
    number of processes that Accelerate does not see, or fewer than it was asked for.
    """
    cpu = _use_cpu(training.device)
    settle_launch(cpu, gpus=0 if cpu else torch.cuda.device_count())
    precision, _ = resolve_precision(training, cpu)
    refuse(
        (precision == "fp16" and cpu, "training.mixed_precision: fp16 needs a GPU; try --mixed_precision bf16"),
        (precision == "fp16" and training.chunked_loss, "training.chunked_loss: its gradients are too small for fp16"),
    )
    if cpu:
        # Huge pages for large tensors, where Linux lets one ask for them. PyTorch looks when it makes its first tensor.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        torch.set_num_threads(_threads(training.cpu_threads))
    else:
        torch.set_float32_matmul_precision("high" if training.tf32 else "highest")
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset", category=UserWarning)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    plugin = _sharding(parallel or ParallelConfig(strategy="ddp"), training, precision, expected, cpu)
    with meeting():
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            # A plugin, because the bare argument would give way to a variable that `accelerate launch` may export.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=1, adjust_scheduler=False, sync_with_dataloader=False
            ),
            kwargs_handlers=[
                ddp_settings(training, cpu, sharded=plugin is not None),
                InitProcessGroupKwargs(timeout=patience(training.hang_timeout), init_method=meeting_place()),
            ],
            fsdp_plugin=plugin,
            log_with=[*log_with] or None,
            project_dir=str(run_dir),
        )
    if cpu:
        torch.set_num_threads(_threads(training.cpu_threads))  # again: Accelerate has an opinion, for several processes
    if accelerator.num_processes != expected:
        raise ConfigError(f"the launcher started {expected} processes, but Accelerate sees {accelerator.num_processes}")
    refuse_missing_processes(cpu, accelerator.num_processes)
    if plugin is not None:
        insist(accelerator, plugin)
    return accelerator


def ddp_settings(training: TrainingConfig, cpu: bool, *, sharded: bool = False) -> DistributedDataParallelKwargs:
    """How gradients are exchanged: out of DDP's buckets without a copy, in bfloat16 if that is asked for.

    Rotary tables are buffers and equal everywhere: broadcasting them at every forward would only cost time.
    """
    half = training.gradient_compression == "bf16"
    advice = "training.gradient_compression: needs NVIDIA GPUs (NCCL) and ddp; type --gradient_compression null"
    refuse((half and (cpu or sharded or not torch.cuda.is_available()), advice))
    hook = DDPCommunicationHookType.BF16 if half else DDPCommunicationHookType.NO
    return DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False, comm_hook=hook)


def _sharding(
    parallel: ParallelConfig, training: TrainingConfig, precision: str, processes: int, cpu: bool
) -> FullyShardedDataParallelPlugin | None:
    """What Accelerate is to know about sharding; None where every process holds everything, as one alone does."""
    asked, asked_offload = sharding_asked_for() if parallel.strategy is None else (parallel.strategy, False)
    strategy = asked if asked is not None and processes > 1 else "ddp"
    offload = asked_offload if parallel.cpu_offload is None else parallel.cpu_offload
    sharded = strategy != "ddp"
    refuse_recomputing(training.activation_checkpointing)
    refuse(
        (sharded and precision == "fp16", f"training.mixed_precision: {strategy} knows no fp16; type --mixed_precision bf16"),
        (
            sharded and training.gradient_compression is not None,
            f"training.gradient_compression: {strategy} exchanges gradients in float32; type --gradient_compression null",
        ),
        (
            bool(parallel.cpu_offload) and not sharded,
            "parallel.cpu_offload: needs --strategy fsdp2 or zero2, and more than one process",
        ),
    )
    if not sharded:
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # else Accelerate would go by it
        return None
    offload = offload and not cpu  # where everything is in host memory already
    os.environ["FSDP_OFFLOAD_PARAMS"] = str(offload).lower()  # true: a process group that can talk about host memory too
    return build_plugin(strategy, precision, offload=offload)


def _threads(wanted: int | None) -> int:
    """Launchers set OMP_NUM_THREADS to 1 where nobody chose, which would leave most of a CPU idle: then cores are shared."""
    chosen = int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
    if wanted is not None or chosen > 1 or (chosen == 1 and not launched()):
        return wanted or chosen
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if own := os.environ.get("SLURM_CPUS_PER_TASK"):  # each task has its own cores
        return max(1, min(cores, int(own)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _use_cpu(wanted: str) -> bool:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    available = {"auto": True, "cpu": True, "cuda": cuda, "mps": mps}[wanted]
    refuse(
        (not available, f"training.device: {wanted} is not available on this machine; type --device auto"),
        (
            available and forced and wanted in ("cuda", "mps"),
            f"training.device: {wanted}, but ACCELERATE_USE_CPU is set; type: unset ACCELERATE_USE_CPU",
        ),
    )
    return wanted == "cpu" or forced or not (cuda or mps)


def resolve_precision(training: TrainingConfig, cpu: bool) -> tuple[str, str]:
    """The precision in Accelerate's words, and who decided it: the config, the launcher, or the device.

    ``accelerate launch`` exports ``no`` for everyone who has not said anything, and its config files hold it unasked: that
    decides nothing. ``--mixed_precision no`` on its command line does: it is float32.
    """
    if training.mixed_precision is not None:
        return _PRECISIONS[training.mixed_precision], "config"
    if (launcher := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        return launcher, "launcher"
    if "ACCELERATE_MIXED_PRECISION" in os.environ and typed_numbers() == "no":
        return "no", "launcher"
    capable = _cpu_has_bf16() if cpu else torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return ("bf16" if capable else "no"), "device"


def runtime_of(training: TrainingConfig) -> tuple[bool, int]:
    """Whether a run with these settings uses the CPU of this machine, and how many threads it has there."""
    return _use_cpu(training.device), _threads(training.cpu_threads)


def cache_folder() -> Path | None:
    """Where this user's programs keep what can be made again; None where there is no home: then nothing is kept."""
    home = expanded("~")
    folder = os.environ.get("XDG_CACHE_HOME") or (home / ".cache" if home.is_absolute() else None)
    return None if folder is None else expanded(folder) / "accel_pretrain"


def peak_for(accelerator: Accelerator, training: TrainingConfig) -> float | None:
    """FLOP/s that this device reaches at most in the run's precision; for the main process alone, which reports."""
    if not accelerator.is_main_process:
        return None
    return peak_flops(accelerator.device, kind_of(accelerator.mixed_precision, tf32=training.tf32), cache_folder())


def wandb_knows_me() -> bool:
    """Whether wandb will find a key, or was told to work offline."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE", "online") != "online":
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "wandb"
    files = (os.environ.get("NETRC"), expanded("~/.netrc"), expanded("~/_netrc"))
    return any(server in path.read_text(errors="replace") for name in files if name and (path := Path(name)).is_file())


def _cpu_has_bf16() -> bool:
    """Whether there are instructions for products in bfloat16; where there are none, it is slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def describe_runtime(accelerator: Accelerator, training: TrainingConfig, parallel: ParallelConfig) -> str:
    """One line: device, processes and what each of several holds, precision; and who chose it. One more for each remark."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    precision, source = resolve_precision(training, device.type == "cpu")
    shown = "fp32" if precision == "no" else precision
    spread = f" on {count} machines" if (count := machines()) > 1 else ""
    processes = f"Processes: {accelerator.num_processes}{spread}"
    line = f"Device: {device} ({name}) | {processes} | Precision: {shown} (from the {source})"
    if accelerator.is_fsdp2:
        line += f" | Sharded: {strategy_of(accelerator)} (from the {'config' if parallel.strategy else 'launcher'})"
        if parallel.cpu_offload and device.type == "cpu":
            line += "\nNotice: parallel.cpu_offload has no effect on a CPU, where the shares are in host memory already"
    elif accelerator.num_processes == 1 and (strategy := parallel.strategy or asked_alone()) not in (None, "ddp"):
        line += f" | Not sharded: {strategy} needs more than one process"
    return "\n".join([line, *(f"Notice: {notice}" for notice in launch_notices())])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every process: called before the model is made, so that its weights are equal."""
    set_seed(seed % 2**32)


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Make the coming forward's dropout a function of the update and of the micro-batch's number within it.

    ``micro_batch`` counts over all processes, so the masks do not depend on how micro-batches are spread over processes, and a
    resumed run draws the same ones without any saved random state.
    """
    torch.manual_seed(key_of(seed, step, micro_batch))


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
