"""The trainer, with a fault in one of its processes: ``python -m tests.sabotage FAULT RANK UPDATE [words of the trainer]...``.

The fault happens on that rank when that update begins: ``hang`` (a lock that nobody opens), ``raise``, ``exit`` (with 0), or
once, before a restart: ``kill``. ``tracker`` hangs when the trackers are to finish, ``tracker and raise`` after an error.
Everything else is the trainer's own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from accel_pretrain import loop, session, train
from accel_pretrain.trackers import RunLog


def wait_for_ever() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def commit(fault: str) -> None:
    if fault == "hang":
        wait_for_ever()
    if fault.endswith("raise"):
        raise AssertionError("a fault of this rank alone")
    if fault == "exit":
        os._exit(0)
    if fault == "kill" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def main(fault: str, rank: int, update: int, words: list[str]) -> int:
    train_step = loop.train_step

    def faulty(run: Any, state: Any) -> Any:
        if state.step + 1 >= update and run.accelerator.process_index == rank:
            commit(fault)
        return train_step(run, state)

    loop.train_step = faulty
    if fault.startswith("tracker"):
        session.TEARDOWN = session.PATIENT_TEARDOWN = 1.5
        RunLog.close = lambda *_, **__: wait_for_ever()
    return train.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
