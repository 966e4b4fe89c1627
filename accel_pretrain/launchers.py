"""Who started this process: Accelerate's launcher, torch's, Slurm, a restart, or a person; and what they asked for."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from accelerate.commands.config.config_args import default_config_file

from accel_pretrain.errors import PeerError, exit_code_of


def launched() -> bool:
    """Whether a launcher, Accelerate's or torch's, started this process; a person may have exported Accelerate's variables."""
    return elastic() or ("ACCELERATE_MIXED_PRECISION" in os.environ and _is_accelerate(parent_command()))


def elastic() -> bool:
    """Whether torch's elastic launcher watches this process; ``accelerate launch`` uses it for more than one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def meeting_place() -> str | None:
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
    "SLURM_STEP_",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NTASKS",
)


def launcher_variables() -> dict[str, str]:
    """What a launcher, or a person in its place, has set in the environment."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_LAUNCHERS)}


def place() -> tuple[int, int]:
    """The rank of this process and how many there are, as the launcher or srun says, before anybody has met."""
    told = launcher_variables()
    srun = int(told.get("SLURM_STEP_NUM_TASKS") or 0) > 1
    rank, count = (told["SLURM_PROCID"], told["SLURM_STEP_NUM_TASKS"]) if srun else ("0", "1")
    return int(told.get("RANK") or rank), int(told.get("WORLD_SIZE") or count)


def environment_of_its_own(**extra: str) -> dict[str, str]:
    """The environment for a run that another program starts: this one without what a launcher has set, and ``extra``."""
    dropped = launcher_variables().keys() - {"ACCELERATE_USE_CPU"}
    return {name: value for name, value in os.environ.items() if name not in dropped} | extra


# Who is killed cannot end what he has started: Linux does. Not a preexec_fn, which may lock up where there are threads.
_PR_SET_PDEATHSIG = 1
_FOLLOWING = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGTERM)})
if os.getppid() != int(sys.argv[1]):
    sys.exit({128 + signal.SIGTERM})
os.execvp(sys.argv[2], sys.argv[2:])
"""


def following(command: Sequence[str]) -> list[str]:
    """The same command, but on Linux it gets SIGTERM when the process that has started it, this one, is gone."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _FOLLOWING, str(os.getpid()), *command]


def is_restart() -> bool:
    """Whether a launcher (``--max_restarts``) or Slurm (requeue) has started this command again by itself."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def launch() -> dict[str, str | None]:
    """Who would start this command again by itself: the Slurm job, and an elastic launcher, which has its id or its place."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return {"slurm": slurm_job(), "elastic": f"{socket.gethostname()}:{os.getppid()}" if run == "none" else run}


def is_restart_of(before: Mapping[str, Any]) -> bool:
    """Whether this is a restart by the launcher or the Slurm job that had started the run ``before``; see :func:`launch`."""
    who, now = {"slurm": "SLURM_RESTART_COUNT", "elastic": "TORCHELASTIC_RESTART_COUNT"}, launch()
    return any(
        bool(now[key]) and now[key] == before.get(key) and int(os.environ.get(count) or 0) > 0 for key, count in who.items()
    )


def slurm_job() -> str | None:
    """The number of the Slurm job that this process belongs to."""
    return os.environ.get("SLURM_JOB_ID")


@dataclass(frozen=True)
class SweepTrial:
    """A run that a ``wandb agent`` has started: its sweep, its id, and the file with the values to try."""

    sweep: str
    run: str | None
    parameters: Path | None


def sweep_trial() -> SweepTrial | None:
    """What an agent has set in the environment, if one has started this run."""
    sweep, parameters = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not sweep:
        return None
    return SweepTrial(sweep, os.environ.get("WANDB_RUN_ID"), Path(parameters) if parameters else None)


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


@dataclass(frozen=True)
class Request:
    """What a command line of ``accelerate launch`` asks for, itself or in its config file; of any other one process."""

    processes: int = 1  # on all machines together
    precision: str | None = None  # on the command line itself
    file: Path | None = None  # the config file that it reads
    is_default: bool = False  # nobody named that file: it is the one that ``accelerate config`` has left
    document: Mapping[str, Any] = field(default_factory=dict)


def request_of(words: list[str]) -> Request:
    """Read the command line of a launcher, and the file that it reads."""
    if not _is_accelerate(words):
        return Request()
    values: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") in ("__num_processes", "__config_file", "__mixed_precision"):
            values.setdefault(name.replace("-", "_"), value if equals else following)
    named, default = values.get("__config_file"), None if "--cpu" in words else default_config_file
    file = named or (default if default and Path(default).is_file() else None)
    try:
        document = yaml.safe_load(Path(file).read_text(encoding="utf-8")) if file else {}
        document = document if isinstance(document, dict) else {}
    except (OSError, ValueError, yaml.YAMLError):
        document = {}
    alone = str(document.get("distributed_type", "NO")) in ("NO", "False")
    number = str(values.get("__num_processes", 1 if alone else document.get("num_processes", 1)))
    is_default = file is not None and not named
    precision, path = values.get("__mixed_precision"), Path(file) if file else None
    return Request(int(number) if number.isdigit() else 1, precision, path, is_default, document)


def typed_numbers() -> str | None:
    """The precision on the command line of ``accelerate launch`` itself; None for one that its config file or nobody names."""
    return request_of(parent_command()).precision


def machines() -> int:
    """How many machines the processes of this run are on, if all have as many as this one."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, int(os.environ.get("WORLD_SIZE") or 1) // here) if "LOCAL_WORLD_SIZE" in os.environ else 1


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """The block in which processes meet: after a while it says for whom it waits, and a failure is one line."""
    import torch.distributed as dist

    size, rank = (os.environ.get(name) for name in ("WORLD_SIZE", "RANK"))
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    told = f"process {rank} of {size} waits for the others at {place}\n"
    timer = threading.Timer(PATIENCE, lambda: sys.stderr.write(told))
    timer.daemon = True
    if size not in (None, "1"):
        timer.start()
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rpartition("] ")[2].partition(". ")[0][:300]
        raise PeerError(f"the {size} processes of this run did not meet at {place}: {reason}") from None
    finally:
        timer.cancel()


def leave_after(main: Callable[[], int]) -> NoReturn:
    """Call ``main`` and end this process with its exit code.

    One of several leaves without taking the interpreter down: threads of gloo outlive ``destroy_process_group``, and one
    that lets go of a tensor meanwhile aborts the process, whose run was whole (pytorch/pytorch#190489). What the interpreter
    does before that is done here: pools of threads end (torch.compile keeps one), other threads are waited for, and what is
    registered is called.
    """
    try:
        code = main()
    except SystemExit as asked:
        code = exit_code_of(asked)
        if code and not isinstance(asked.code, int):
            sys.stderr.write(f"{asked.code}\n")
    if os.environ.get("WORLD_SIZE", "1") == "1":  # now: of processes that srun has started, main has said it
        sys.exit(code)
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none, nobody reads, or it is closed
            stream.flush()
    os._exit(code)


PATIENCE = 15.0  # seconds of waiting for other processes after which a person wants to know


def sharding_asked_for() -> tuple[str | None, bool]:
    """The strategy that ``accelerate launch --use_fsdp``, or its config file, asks for, and whether to use host memory."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return None, False
    whole = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false"
    return "zero2" if whole else "fsdp2", os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true"


def asked_alone() -> str | None:
    """The strategy that is left in the variables of ``accelerate launch`` where a process alone was told not to shard."""
    if "FSDP_VERSION" not in os.environ:
        return None
    return "zero2" if os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false" else "fsdp2"
