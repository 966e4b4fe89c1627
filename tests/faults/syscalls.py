"""Faults in the system calls themselves, by strace: what native code does is reached too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tests.faults import scenes
from tests.faults.harness import ForkServer

# What changes a file system. Calls of these names that only look are left alone: a death there changes nothing more.
CHANGING = (
    "openat", "creat", "write", "pwrite64", "writev", "fsync", "fdatasync", "rename", "renameat", "renameat2", "unlink",
    "unlinkat", "mkdir", "mkdirat", "rmdir", "ftruncate", "fallocate", "chmod", "fchmod", "fchmodat", "sendfile",
    "copy_file_range",
)  # fmt: skip
_CALL = re.compile(r"^\d+\s+(\w+)\((.*)$")


class Call(NamedTuple):
    """The ``nth`` call of this name since strace was attached."""

    name: str
    nth: int
    line: str


def calls_of(server: ForkServer, scene: str, run_dir: Path, trace: Path) -> list[Call]:
    """The system calls by which an undisturbed scene changes ``run_dir``."""
    names = ",".join(f"?{name}" for name in CHANGING)
    options = ["-e", f"trace={names}", "-y", "-s", "0", "-o", str(trace)]
    server.call(scenes.act_in_order, scene, run_dir, strace=options).check()
    counts: dict[str, int] = {}
    found: list[Call] = []
    for line in trace.read_text().splitlines():
        if not (match := _CALL.match(line)):
            continue
        name, rest = match.groups()
        counts[name] = counts.get(name, 0) + 1
        reading = name == "openat" and not re.search("O_WRONLY|O_RDWR|O_CREAT", rest)
        if str(run_dir) in rest and not reading:
            found.append(Call(name, counts[name], line))
    return found


def inject(call: Call, what: str) -> list[str]:
    """Options of strace that let ``what`` happen at this call: ``signal=SIGKILL`` or ``error=ENOSPC``."""
    return ["-e", f"trace={call.name}", "-e", f"inject={call.name}:{what}:when={call.nth}", "-o", "/dev/null"]
