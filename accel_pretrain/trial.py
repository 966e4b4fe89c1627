"""How fast a config trains on this machine: real updates on made-up tokens, in a process of their own.

:func:`measure` starts that process and reads its answer, a :class:`Trial`. A config that needs too much memory, or crashes, is
a trial with a ``problem``: the process that asked lives on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from accel_pretrain.checkpoint import TrainState
from accel_pretrain.compiling import resolve_compile
from accel_pretrain.config import Plan, RunConfig, Splits, make_plan
from accel_pretrain.files import write_whole
from accel_pretrain.launchers import environment_of_its_own
from accel_pretrain.loop import train_step
from accel_pretrain.pace import tiny_is_zero
from accel_pretrain.parallel import ParallelConfig, build_model, fill, prepare
from accel_pretrain.probe import timer
from accel_pretrain.run import TrainingRun, batches_of, sequence_weights
from accel_pretrain.runtime import TrainingConfig, build_accelerator, seed_everything
from accel_pretrain.saver import Saver
from accel_pretrain.shards import TokenSplit
from accel_pretrain.stopping import StopSignal
from accel_pretrain.trackers import RunLog
from accel_pretrain.typed_yaml import from_mapping, to_plain

TOO_LARGE, TOO_SLOW = "does not fit", "took too long"
_LEAST, _MOST = 2, 30  # timed rounds
_TOKENS = 1 << 20
_GRACE = 5.0  # seconds for a process to come and go


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one process of a run would do: seconds of an update, and of the first one beyond that (compiling); peak bytes.

    Bytes are those of tensors on a GPU, and on a CPU the process's resident memory. ``problem`` says why there is no time.
    """

    seconds: float = float("inf")
    first: float = 0.0
    peak: int = 0
    problem: str | None = None


def measure(
    config: RunConfig, *, vocab_size: int, samples: int, updates: int, seconds: float, timeout: float, limit: int | None
) -> Trial:
    """Train ``config`` in a process of its own on made-up tokens, with updates of ``samples`` sequences.

    Updates are timed for about ``seconds`` after the first; after ``timeout`` seconds in all the process is ended. ``updates``
    are those of the planned run, for its learning rates. ``limit``: the bytes that it may have.
    """
    config = replace(config, parallel=ParallelConfig())  # one process shares nothing
    with tempfile.TemporaryDirectory(prefix="trial_") as folder, _lifeline() as line:
        question, answer = Path(folder) / "question.json", Path(folder) / "answer.json"
        wishes = {"vocab_size": vocab_size, "samples": samples, "updates": updates, "seconds": seconds, "limit": limit}
        question.write_text(json.dumps({"config": to_plain(config), **wishes}), encoding="utf-8")
        command = [sys.executable, "-m", "accel_pretrain.trial", str(question), str(answer), "follow"]
        process = subprocess.Popen(
            command, env=environment_of_its_own(), stdin=line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            _, err = process.communicate(timeout=timeout + _GRACE)
        except subprocess.TimeoutExpired:
            return Trial(problem=TOO_SLOW)
        finally:
            _end(process)
        if answer.exists():
            return Trial(**json.loads(answer.read_text(encoding="utf-8")))
        if process.returncode == -signal.SIGKILL or _is_about_memory(err):
            return Trial(problem=TOO_LARGE)
        last = (err.strip() or f"it ended with {process.returncode}").splitlines()[-1]
        return Trial(problem=f"failed: {last[:200]}")


@contextlib.contextmanager
def _lifeline() -> Iterator[int]:
    """The end of a pipe to read from, on which nothing comes before this process has ended, however it did."""
    there, here = os.pipe()
    try:
        yield there
    finally:
        os.close(there)
        os.close(here)


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and those that it has started (compilers), if they still run."""
    if os.name == "posix":
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except PermissionError:  # macOS, of a group that has ended
            pass
    else:
        process.kill()
    process.communicate()


def _is_about_memory(words: str) -> bool:
    signs = (
        "can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "memoryerror",
        "cannot map zero-fill pages", "failed to map segment",  # of a library that is loaded
        "without setting an exception",  # CPython, when nothing is left for the MemoryError itself
    )  # fmt: skip
    return any(sign in words.lower() for sign in signs)


# ---------------------------------------------------------------------------------------------------- in that process


def _follow(asker: int, folder: Path) -> None:
    """End with the process that asked, which holds the other end of the pipe ``asker``; with compilers, without a trace."""
    os.read(asker, 1)
    shutil.rmtree(folder, ignore_errors=True)
    if os.name == "posix":
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main(question: Path, answer: Path) -> None:
    """Do what :func:`measure` asks for in the file ``question``; write the :class:`Trial` to ``answer``."""
    asked: dict[str, Any] = json.loads(question.read_text(encoding="utf-8"))
    config = from_mapping(RunConfig, asked.pop("config"), str(question))
    try:
        trial = _trial(config, folder=answer.parent, **asked)
    except (torch.OutOfMemoryError, MemoryError):
        trial = Trial(problem=TOO_LARGE)
    except Exception as error:  # of a CPU's allocator, of the compiler, of a driver
        if not _is_about_memory(str(error)):
            raise
        trial = Trial(problem=TOO_LARGE)
    write_whole(answer, json.dumps(asdict(trial)).encode())


@tiny_is_zero()
def _trial(
    config: RunConfig, *, folder: Path, vocab_size: int, samples: int, updates: int, seconds: float, limit: int | None
) -> Trial:
    accelerator = build_accelerator(config.training, [], folder)
    device = accelerator.device
    if config.training.compile and not (resolved := resolve_compile(config.training, 0.0, device))[0]:
        return Trial(problem=resolved[1])  # else it would be timed, and praised, without
    if limit is not None:
        _limit_memory(device, limit)
    # Made-up tokens come without a tokenizer, and without documents to begin with.
    model, data = replace(config.model, vocab_size=vocab_size), replace(config.data, packing="windows")
    config = replace(config, model=model, data=data)
    splits = made_up_tokens(vocab_size)
    accumulation = samples // config.training.batch_size
    run, state = build(config, _plan(config, splits, min(2, accumulation), updates), splits, accelerator, folder), TrainState()
    two = _timer(run, state)
    beginning, usual = two(), two()  # the second is the first one with gradients and the optimizer's state in place
    if accumulation <= 2:
        timers = [two]
    elif accumulation * usual < seconds:
        timers = [_timer(_with_plan(run, _plan(config, splits, accumulation, updates)), state)]
    else:  # whole updates would take too long
        timers = [two, _timer(_with_plan(run, _plan(config, splits, 1, updates)), state)]
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < _LEAST or (time.perf_counter() < end and len(rounds) < _MOST):
        if rounds and time.perf_counter() > end + seconds:
            break  # each takes long, so one will do
        rounds.append([each() for each in timers])
    if len(timers) == 1:
        update = statistics.median(took for (took,) in rounds)
    else:  # as long as an update of one micro-step, and so many times what one of two takes longer
        update = statistics.median(
            single + (accumulation - 1) * max(0.0, double - single) for double, single in rounds[1:] or rounds
        )
    return Trial(seconds=update, first=max(0.0, beginning - usual), peak=_peak(device))


def _timer(run: TrainingRun, state: TrainState) -> Callable[[], float]:
    return timer(run.accelerator.device, lambda: _update(run, state), time.perf_counter)


def _plan(config: RunConfig, splits: Splits, accumulation: int, updates: int) -> Plan:
    training = whole_updates(config.training, updates)
    training = replace(training, global_batch_size=None, gradient_accumulation_steps=accumulation)
    return make_plan(replace(config, training=training, data=config.data.without_documents()), splits, 1)


def whole_updates(training: TrainingConfig, count: int) -> TrainingConfig:
    """The same for so many updates, all of them of the whole batch."""
    return replace(
        training, max_iters=count, max_tokens=None, epochs=None, batch_warmup_tokens=None, batch_warmup_from=None
    )  # fmt: skip


def made_up_tokens(vocab_size: int) -> Splits:
    """Random ids, of which no two windows are equal: embeddings are read, and their gradients written, all over the table."""
    ids = np.random.default_rng(0).integers(vocab_size, size=_TOKENS, dtype=np.uint32)
    split = TokenSplit(source="made-up tokens", files=(ids,), max_id=vocab_size - 1, fingerprint="made up")
    return Splits(split, split)


def build(config: RunConfig, plan: Plan, splits: Splits, accelerator: Accelerator, folder: Path) -> TrainingRun:
    """A run as :mod:`accel_pretrain.train` makes it, in the same order, which nothing saves and nobody asks to stop."""
    seed_everything(config.training.seed)
    module = build_model(accelerator, config.model, plan.vocab_size)
    fill(module, module.initial_weights())
    model, optimizer = prepare(accelerator, module, config.optimizer.build)
    module.recompute(config.training.activation_checkpointing)
    module.chunked_loss, module.document_id = config.training.chunked_loss, plan.document_id
    if config.data.intra_document_masking and plan.document_id is None:
        module.document_id = 0  # of made-up tokens, any: what it costs is the same
    flops = plan.flops_per_token * plan.tokens_per_step * plan.max_iters
    if resolve_compile(config.training, flops, accelerator.device)[0]:
        module.compile_parts()
    run = TrainingRun(
        config=config, plan=plan, splits=splits, accelerator=accelerator, model=model.train(), module=module,
        optimizer=optimizer, parameters=list(model.parameters()), tokenizer=None, stop=StopSignal(),
        batches=batches_of(config, plan, splits, accelerator.process_index),
        weights_B=sequence_weights(plan, accelerator.device),
        log=RunLog(accelerator, folder, step=0, total=plan.max_iters),
        saver=Saver(accelerator, folder, config.checkpoint, TrainState()),
    )  # fmt: skip
    return run


def _with_plan(run: TrainingRun, plan: Plan) -> TrainingRun:
    batches = batches_of(run.config, plan, run.splits, rank=0)
    return replace(run, plan=plan, batches=batches, weights_B=sequence_weights(plan, run.accelerator.device))


def _update(run: TrainingRun, state: TrainState) -> None:
    """One update; its loss stays on the device."""
    train_step(run, state)
    state.step += 1
    state.samples += run.plan.samples_per_step


def _limit_memory(device: torch.device, limit: int) -> None:
    """Let this process have only so many bytes more: what is beyond fails, instead of taking it from others."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), device)
    elif sys.platform == "linux":
        import resource

        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        data = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + limit, data + limit))


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name != "posix":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    asked, answered = map(Path, sys.argv[1:3])
    if "follow" in sys.argv[3:]:  # only who made the folder for this, and a session, may say so
        threading.Thread(target=_follow, args=(sys.stdin.fileno(), answered.parent), daemon=True).start()
    main(asked, answered)
