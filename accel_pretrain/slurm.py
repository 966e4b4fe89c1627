"""What ``srun`` tells each process that it starts, in the words of torch's launcher. Functions of an environment alone.

``srun python -m accel_pretrain.train`` starts one process per task, and nobody else tells them of each other. The names are
those of srun's manual, "OUTPUT ENVIRONMENT VARIABLES"; those of the *step* are what srun itself started, and a batch script,
which sees the same ``SLURM_PROCID`` as the first task, has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_PORTS = range(15_000, 30_000)  # below those that Linux hands out by itself


def tasks_of_step(environ: Mapping[str, str]) -> int:
    """How many tasks the ``srun`` around this process has started; 0 where there is none."""
    return int(environ["SLURM_STEP_NUM_TASKS"]) if environ.get("SLURM_STEP_NUM_TASKS", "").isdigit() else 0


def tasks_without_srun(environ: Mapping[str, str]) -> int:
    """How many tasks the job was given where no ``srun`` starts them, as in a batch script; 0 else."""
    return int(environ["SLURM_NTASKS"]) if environ.get("SLURM_NTASKS", "").isdigit() and not tasks_of_step(environ) else 0


def rendezvous(environ: Mapping[str, str]) -> dict[str, str]:
    """``RANK``, ``WORLD_SIZE`` and where to meet, for a task among several of one ``srun``; empty for one alone.

    The first task's node is where all meet, at a port that is a function of the job and the step: two runs on one node
    take different ones.
    """
    if tasks_of_step(environ) < 2:
        return {}
    per_node = spread(environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1")))
    node = int(environ.get("SLURM_NODEID", "0"))
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
    job, step = (int(environ.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[node] if node < len(per_node) else 1),
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(_PORTS[(17 * job + step) % len(_PORTS)]),
    }


def first_host(nodes: str) -> str:
    """The first of a list as Slurm writes it: ``gpu[03-05,9],cpu1`` -> ``gpu03``."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else nodes)


def spread(tasks: str) -> list[int]:
    """Tasks of each node, from the way Slurm writes it: ``4(x2),1`` -> 4, 4, 1."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(times or 1)
    return counts
