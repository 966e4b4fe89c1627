"""Before a run begins: ways to start it that would train something else than was meant, or nothing, and say no word.

Each is refused with one line that says what to type (:func:`settle_launch`, :func:`refuse_missing_processes`), or, where it
may well be meant, told (:func:`launch_notices`).
"""

from __future__ import annotations

import os
import re

from accel_pretrain import slurm
from accel_pretrain.errors import refuse
from accel_pretrain.launchers import elastic, is_restart, launched, parent_command, request_of

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_OTHERWISE = "type --config_file configs/accelerate/ddp.yaml or fsdp2.yaml"
_TOLD = ("distributed_type", "num_processes", "mixed_precision", "use_cpu")


def settle_launch(cpu: bool, gpus: int = 0) -> None:
    """Know how many processes there are, before Accelerate asks. Raises :class:`ConfigError` for what would go wrong unseen."""
    join_tasks()
    refuse_half_a_launch(cpu)
    refuse_what_we_do_not_do()
    if gpus:
        refuse_too_few_gpus(gpus)


def join_tasks() -> None:
    """Let the tasks of one ``srun`` find each other, before anything asks how many processes there are.

    What a launcher or a person has set stays. Raises :class:`ConfigError` where that does not fit to what srun started.
    """
    found = slurm.rendezvous(os.environ)
    if not found:
        return
    tasks = int(found["WORLD_SIZE"])
    if elastic():
        shrunk = is_restart() or any(re.fullmatch(r"(--nnodes=)?\d+:\d+", word) for word in parent_command())
        refuse(
            (
                os.environ.get("GROUP_WORLD_SIZE") == "1" and not shrunk,
                f"srun started {tasks} launchers that do not know of each other; type: srun --ntasks-per-node 1 bash -c "
                f"'accelerate launch --num_machines {tasks} --machine_rank $SLURM_NODEID ...', "
                "or leave the launcher out: srun python -m accel_pretrain.train ...",
            )
        )
        return
    left = {name: os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in os.environ}
    # A rank without a size is a leftover also where it happens to be right: that task would wait for those that are refused.
    wrong = [name for name, value in left.items() if value != found[name] or "WORLD_SIZE" not in left]
    told = " and ".join(f"{name}={left[name]}" for name in wrong)
    task = f", of which this is number {found['RANK']}" if "RANK" in wrong else ""
    refuse((bool(wrong), f"srun started {tasks} tasks{task}, but {told} is set; type: unset {' '.join(wrong)}"))
    for name, value in found.items():
        os.environ.setdefault(name, value)


def refuse_half_a_launch(cpu: bool) -> None:
    """Raise :class:`ConfigError` where a process would wait for others that nobody has started, or train without them."""
    given = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    size, missing = given["WORLD_SIZE"] or "1", [name for name, value in given.items() if not value]
    leave = "start it with accelerate launch or torchrun, which set all of them, or type: unset WORLD_SIZE RANK LOCAL_RANK"
    refuse((not size.isdigit() or size == "0", f"WORLD_SIZE={size} is no number of processes; {leave}"))
    several = int(size) > 1 or given["LOCAL_RANK"] is not None
    rank = given["RANK"] or "0"
    mpi = next((name for name in _MPI_SIZES if (os.environ.get(name) or "1") != "1"), None)
    refuse(
        (several and bool(missing), f"WORLD_SIZE={size} is set, and {' and '.join(missing)} not: {leave}"),
        (not rank.isdigit() or int(rank) >= int(size), f"RANK={rank} is none of WORLD_SIZE={size} processes; {leave}"),
        (
            not several and mpi is not None and not (cpu and given["MASTER_ADDR"]),
            f"mpirun started processes that do not know of each other ({mpi}={os.environ.get(mpi or '')}); "
            "type torchrun or accelerate launch in its place, or srun python -m accel_pretrain.train",
        ),
    )


def refuse_too_few_gpus(gpus: int) -> None:
    """Accelerate would let processes share a GPU, which NCCL does not. Where each sees one, srun may have given it its own."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = gpus == 1 and slurm.tasks_of_step(os.environ) > 1
    refuse(
        (
            here > gpus and not own,
            f"{here} processes on this machine, which has {gpus} GPU{'s' if gpus > 1 else ''}; type --num_processes {gpus} "
            f"(torchrun: --nproc_per_node {gpus}), or ACCELERATE_USE_CPU=1 before the command to train on the CPU",
        )
    )


def refuse_what_we_do_not_do() -> None:
    """Raise :class:`ConfigError` for what a launcher's config, or a variable left from another day, would do unseen."""
    request = request_of(parent_command())
    where = f" (it comes from {request.file})" if request.file else ""
    value = os.environ.get
    on = [name for name in _UNSUPPORTED if (value(name) or "").lower() in ("1", "true", "yes")]
    fsdp1 = (value("ACCELERATE_USE_FSDP") or "").lower() == "true" and value("FSDP_VERSION", "2") != "2"
    backend, precision = value("ACCELERATE_DYNAMO_BACKEND") or "NO", value("ACCELERATE_MIXED_PRECISION") or "no"
    micro_steps, device = value("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or "1", value("ACCELERATE_TORCH_DEVICE")
    refuse(
        *((True, f"{name}: {_UNSUPPORTED[name]} is not supported{where}; {_OTHERWISE}") for name in on),
        (fsdp1, f"accelerate launch asks for version {value('FSDP_VERSION')} of FSDP{where}; type --fsdp_version 2"),
        (
            backend.upper() != "NO",
            f"ACCELERATE_DYNAMO_BACKEND={backend} would compile the model a second time{where}; "
            "leave it out (dynamo_backend: 'no'), and type --compile true",
        ),
        (
            micro_steps != "1",
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={micro_steps} has no effect here{where}; "
            f"unset it, and type --gradient_accumulation_steps {micro_steps}",
        ),
        (
            precision not in ("no", "bf16", "fp16"),
            f"ACCELERATE_MIXED_PRECISION={precision} is not supported{where}; type --mixed_precision bf16",
        ),
        (
            device is not None and os.environ.get("WORLD_SIZE", "1") != "1",
            f"ACCELERATE_TORCH_DEVICE={device} would put all processes there; type: unset ACCELERATE_TORCH_DEVICE",
        ),
    )


def refuse_recomputing(level: str) -> None:
    """``fsdp_activation_checkpointing`` in a file of Accelerate's is nothing that the model here heeds."""
    on = all(
        (os.environ.get(name) or "").lower() == "true" for name in ("ACCELERATE_USE_FSDP", "FSDP_ACTIVATION_CHECKPOINTING")
    )
    advice = "set it to false, or type --activation_checkpointing full"
    refuse(
        (
            on and level == "none",
            f"accelerate launch asks for fsdp_activation_checkpointing, which has no effect here; {advice}",
        )
    )


def refuse_missing_processes(cpu: bool, seen: int) -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one process, and ``--num_machines 2 --num_processes 3`` two."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return
    asked = request_of(parent_command()).processes
    machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if elastic():
        instead = f"a multiple of {machines} machines for --num_processes, which counts all of them together"
    else:
        command = f"accelerate launch --multi_gpu --num_processes {asked} -m accel_pretrain.train ..."
        instead = f"{'ACCELERATE_USE_CPU=1 ' if cpu else ''}{command} (without --cpu)"
    refuse((asked > seen, f"accelerate launch was asked for {asked} processes and started {seen}; type: {instead}"))


def launch_notices() -> list[str]:
    """What is right and perhaps not meant about how this run was started, a line each."""
    found, request = [], request_of(parent_command())
    if launched() and request.is_default:
        known = {name: request.document[name] for name in _TOLD if request.document.get(name) not in (None, "")}
        told = ", ".join(f"{name} {value}" for name, value in known.items())
        ours = "--config_file accelerate_config.yaml takes this project's"
        found.append(f"accelerate launch took {request.file} ({told}); {ours}")
    tasks = slurm.tasks_without_srun(os.environ)
    if tasks > 1 and not elastic() and os.environ.get("WORLD_SIZE", "1") == "1":
        found.append(f"Slurm has given this job {tasks} tasks, and this is one process; srun python -m ... starts all")
    return found
