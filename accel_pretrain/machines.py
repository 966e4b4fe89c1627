"""Several processes as one run, before it begins: told the same, and one folder of checkpoints.

A command is typed on every machine, and a disk may be one machine's own: what differs would be found late, or never. The
files of a run are made by its main process and read by all, so ``checkpoint_dir`` has to be a folder that all machines share.
Where it is not, a run can begin and save (all is on the main process's machine), and a resume is refused as long as one
process does not see what the others see: nothing begins anew in silence.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel_pretrain.commit import MANIFEST, checkpoints
from accel_pretrain.errors import CheckpointError, ConfigError
from accel_pretrain.peers import Peers


def refuse_differences(peers: Peers, told: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` on every process where what one was ``told`` is not what the main one was. Collective."""
    everybody = peers.gather((socket.gethostname(), dict(told)))
    host, own = everybody[0]
    problems: dict[str, str] = {}
    for rank, (other, theirs) in enumerate(everybody):
        for key in (key for key in own if theirs.get(key) != own[key]):
            problems.setdefault(key, f"{key}: {own[key]} on {host} (rank 0), {theirs.get(key)} on {other} (rank {rank})")
    if problems:
        raise ConfigError([*problems.values(), "type the same command on every machine"])


def refuse_other_folders(peers: Peers, run_dir: Path, found: Path | None) -> str | None:
    """Whether all processes see the checkpoint ``found`` to go on from (None: the run begins) as the main one does. Collective.

    Raises :class:`CheckpointError` on all if not. Returns a notice where the run begins in a folder that is not shared.
    ``run_dir`` holds what the main process has just written there.
    """
    host, marker = socket.gethostname(), run_dir / "config.yaml"
    newest = next((path.name for path in checkpoints(run_dir)), None)
    shared = marker.is_file()
    if not shared:
        run_dir.mkdir(parents=True, exist_ok=True)  # where this machine's reports go
    everybody = peers.gather((host, newest, shared, found is not None and (found / MANIFEST).is_file()))
    main = everybody[0][0]
    if found is not None:
        if blind := sorted({host for host, _, _, sees in everybody if not sees}):
            raise CheckpointError(
                f"{found} is on {main}, and {' and '.join(blind)} cannot see it; give all machines one shared "
                f"--checkpoint_dir, or copy it there: rsync -a {main}:{found.absolute()} {run_dir.absolute()}/"
            )
        return None
    for host, name, _, _ in everybody:
        if name is not None:
            raise CheckpointError(
                f"{run_dir} holds {name} on {host} and nothing on {main}, where the main process is; "
                f"start {host} with --machine_rank 0, or copy it: rsync -a {host}:{run_dir.absolute()}/ {run_dir.absolute()}/"
            )
    apart = sorted({host for host, _, shared, _ in everybody if not shared})
    if not apart:
        return None
    return (
        f"{run_dir} is {main}'s own, and {' and '.join(apart)} cannot see it: checkpoints will have to be copied there to go on"
    )
