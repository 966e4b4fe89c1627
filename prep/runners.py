"""Who encodes the units: processes of this machine, a Ray cluster, or the tasks of a Slurm array.

All of them do the same to the same units and leave the same files in the work folder, which more than one machine must be able
to see. So their datasets are equal, and a run that one began another can finish.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accel_pretrain.errors import ConfigError, DataError, PretrainError
from prep.config import PrepConfig, available_cores
from prep.encode import Job, UnitReport, encode_unit
from prep.engines import Engine
from prep.units import Unit
from prep.workers import Task, encode_here, encode_supervised, engine_of, of_the_machine

_BYTES_PER_WORKER = {"tiktoken": 4_000_000, "gigatoken": 100_000_000, "numpy": 100_000_000}
_RETRIES = 3


def encode_tasks(config: PrepConfig, job: Job, engine: Engine, tasks: Sequence[Task]) -> Generator[tuple[int, UnitReport]]:
    """The report of every task, in any order, from the runner that ``config`` names. ``engine`` is this process's own."""
    if config.runner == "ray":
        return _encode_by_ray(job, tasks)
    size = sum(unit.size for _, unit, _ in tasks)
    workers = min(config.workers or default_workers(job.engine, size), len(tasks))
    return encode_supervised(job, tasks, workers) if workers > 1 else encode_here(job, engine, tasks)


def default_workers(engine: str, size: int) -> int:
    """One per core, but no more than are worth their start: gigatoken learns the words of a corpus anew in each."""
    return max(1, min(available_cores(), size // _BYTES_PER_WORKER[engine]))


# ---------------------------------------------------------------------------------------------------------------- Slurm


@dataclass(frozen=True)
class ArrayTask:
    """Task ``index`` (from 0) of ``count``."""

    index: int
    count: int

    def share(self, tasks: Sequence[Task]) -> list[Task]:
        return [task for task in tasks if task[0] % self.count == self.index]


def array_task(environment: Mapping[str, str] = os.environ) -> ArrayTask:
    """Which task of a Slurm array this process is; raises :class:`ConfigError` when it is none."""
    try:
        number, count = int(environment["SLURM_ARRAY_TASK_ID"]), int(environment["SLURM_ARRAY_TASK_COUNT"])
        first, step = int(environment.get("SLURM_ARRAY_TASK_MIN", "0")), int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
        last = int(environment.get("SLURM_ARRAY_TASK_MAX", str(first + (count - 1) * step)))
    except (KeyError, ValueError):
        raise ConfigError(
            "--runner slurm: not in a task of a job array; submit the command with sbatch --array=0-15, and after it, with "
            "--dependency=afterok:JOB, the same command with --runner local, which completes the dataset"
        ) from None
    index, odd = divmod(number - first, step) if step > 0 else (0, 1)
    if odd or not 0 <= index < count or (last - first) // step + 1 != count:
        raise ConfigError(
            f"--runner slurm: task {number} of {count} from {first} to {last} is not in an unbroken array, whose tasks share "
            "the work by their numbers; submit the command with sbatch --array=0-15"
        )
    return ArrayTask(index, count)


# ------------------------------------------------------------------------------------------------------------------ Ray


def _encode_by_ray(job: Job, tasks: Sequence[Task]) -> Generator[tuple[int, UnitReport]]:
    """Units as Ray tasks: a few per core at a time; one whose node or process dies is run again elsewhere."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("--runner ray needs ray: pip install 'accel_pretrain[ray]'") from None
    ours = not ray.is_initialized()
    if ours:  # joins the cluster that RAY_ADDRESS or a local `ray start` names, else starts one here
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    try:
        remote = ray.remote(max_retries=_RETRIES, num_cpus=1)(encode_by_ray)
        shared = ray.put(job)
        waiting, running = list(reversed(tasks)), dict[Any, Task]()
        while waiting or running:
            room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
            while waiting and len(running) < room:
                number, unit, key = waiting.pop()
                running[remote.remote(shared, unit, key)] = (number, unit, key)
            for done in ray.wait(list(running))[0]:
                number, unit, _ = running.pop(done)
                yield number, _report_of(ray, done, unit)
    finally:
        if ours:
            ray.shutdown()


def _report_of(ray: Any, reference: Any, unit: Unit) -> UnitReport:
    try:
        outcome = ray.get(reference)
    except ray.exceptions.RayError as error:
        first = str(error).strip().splitlines()[0][:200]
        raise DataError(
            f"{unit.name}: Ray gave up on it after {_RETRIES + 1} tries ({type(error).__name__}: {first}); "
            "--runner local finds the document that is the cause"
        ) from None
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


_engines: dict[Job, Any] = {}


def encode_by_ray(job: Job, unit: Unit, key: str) -> UnitReport | Exception:
    """One unit, in a process of Ray's, which keeps its engine for the next."""
    if job not in _engines:
        _engines.clear()
        _engines[job] = engine_of(job)
    try:
        return encode_unit(job, _engines[job], unit, key)
    except PretrainError as error:  # ours to report; anything else is Ray's to retry
        return error
    except OSError as error:
        return of_the_machine(error, job)
