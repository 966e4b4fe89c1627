"""What several benchmarks do alike: a run put together without a session, and processes that take turns."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from accel_pretrain.checkpoint import TrainState
from accel_pretrain.config import RunConfig, make_plan, open_splits
from accel_pretrain.run import TrainingRun
from accel_pretrain.runtime import build_accelerator
from accel_pretrain.session import Session
from accel_pretrain.train import assemble


def assembled(config: RunConfig) -> tuple[TrainingRun, TrainState]:
    """The run that :func:`accel_pretrain.train.pretrain` would train, in this process."""
    run_dir = config.checkpoint.checkpoint_dir
    run_dir.mkdir(exist_ok=True)  # as a session does, which there is none of here
    splits = open_splits(config.data)
    accelerator = build_accelerator(config.training, [], run_dir)
    return assemble(config, make_plan(config, splits, accelerator.num_processes), splits, accelerator, Session())


def in_turns(target: Callable[..., None], members: Mapping[str, tuple[Any, ...]], rounds: int) -> dict[str, list[Any]]:
    """What each member answers in so many rounds. All are resident in processes of their own, and one works at a time.

    A member runs ``target(pipe, *members[name])``: an answer for each True from the pipe, and False at the end. Raises EOFError
    with the name of one that has ended before.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name, words in members.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=target, args=(theirs, *words), daemon=True).start()
        theirs.close()
    answers: dict[str, list[Any]] = {name: [] for name in members}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            try:
                answers[name].append(pipe.recv())
            except EOFError:
                raise EOFError(name) from None
    for pipe in pipes.values():
        pipe.send(False)
    return answers
