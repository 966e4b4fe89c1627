"""Several processes as one run, before it begins: told the same, and one folder of checkpoints.

A command is typed on every machine, and a disk may be one machine's own: what differs would be found late, or never. The
files of a run are made by its main process and read by all, so ``checkpoint_dir`` has to be a folder that all machines share.
Where it is not, a run can begin and save (all is on the main process's machine), and a resume is refused as long as one
process does not see what the others see, or sees another copy: nothing begins anew, or parts, in silence.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accel_pretrain.commit import MANIFEST, checkpoints, problem_with, step_of
from accel_pretrain.errors import CheckpointError, ConfigError
from accel_pretrain.files import sha256_of
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


def refuse_other_folders(
    peers: Peers, run_dir: Path, found: Path | None, *, named: bool = False, rolls_back: bool = False
) -> str | None:
    """Refuse folders from which the processes would not go on as one run. Collective, and the answer is everybody's.

    ``found`` is the checkpoint to go on from, which the main process has verified (None: the run begins); ``named``: a person
    has typed it. ``rolls_back``: the run may go back to a checkpoint that it has made itself. Raises :class:`CheckpointError`
    where a machine does not see ``found``, has a copy that is another one or is damaged, or has a newer checkpoint of its own,
    and :class:`ConfigError` where a run that rolls back has no shared folder. Returns a notice where the run begins without.
    """
    shared = _is_shared(peers, run_dir)
    with peers.together(CheckpointError, f"{run_dir} cannot be read"):
        if not shared:
            run_dir.mkdir(parents=True, exist_ok=True)  # where this machine's reports go
        newest = next((path.name for path in checkpoints(run_dir)), None)
        sees = found is not None and (found / MANIFEST).is_file()
    host = socket.gethostname()
    everybody = peers.gather((host, newest, shared, sees))
    main, newest_of_main, _, _ = everybody[0]
    apart = sorted({host for host, _, shared, _ in everybody if not shared})
    for host, name, shared, _ in everybody:
        if not (shared or named) and name is not None and (newest_of_main is None or _step(name) > _step(newest_of_main)):
            raise CheckpointError(
                f"{run_dir} holds {name} on {host} and {newest_of_main or 'nothing'} on {main}, where the main process is; "
                f"start {host} with --machine_rank 0, or copy it: rsync -a {host}:{run_dir.absolute()}/ {run_dir.absolute()}/"
            )
    if found is not None and (blind := sorted({host for host, _, _, sees in everybody if not sees})):
        raise CheckpointError(
            f"{found} is on {main}, and {' and '.join(blind)} cannot see it; give all machines one shared "
            f"--checkpoint_dir, or copy it there: rsync -a {main}:{found.absolute()} {run_dir.absolute()}/"
        )
    if found is not None:
        _refuse_other_copies(peers, found, everywhere=not apart and found.resolve().parent == run_dir.resolve())
    if apart and rolls_back:
        raise ConfigError(
            f"training.on_spike: rollback needs a folder that all machines share, and {run_dir} is {main}'s own, which "
            f"{' and '.join(apart)} cannot see; give all one shared --checkpoint_dir, or type --on_spike skip"
        )
    if not apart or found is not None:
        return None
    return (
        f"{run_dir} is {main}'s own, and {' and '.join(apart)} cannot see it: checkpoints will have to be copied there to go on"
    )


def _step(name: str) -> int:
    return step_of(Path(name))


def _is_shared(peers: Peers, run_dir: Path) -> bool:
    """Whether this process sees, in ``run_dir``, what the main one has just written there: a name that was never there before.

    Nothing that an earlier run has left can be taken for it, nor is it in any cache of a network's file system.
    """
    with peers.together(CheckpointError, f"{run_dir} cannot be written to"):
        name = f".tmp_{secrets.token_hex(8)}"  # swept by the next start, should this process die here
        if peers.is_main:
            (run_dir / name).touch()
    own = run_dir / peers.gather(name)[0]
    shared = own.is_file()
    peers.gather(None)  # all have looked
    if peers.is_main:
        own.unlink(missing_ok=True)
    return shared


def _refuse_other_copies(peers: Peers, found: Path, everywhere: bool) -> None:
    """Raise :class:`CheckpointError` where a machine's copy of ``found`` is damaged, or another one than the main process's.

    The first process of each machine hashes its copy. If it is ``everywhere`` the same folder, the main one has done so.
    """
    if everywhere:
        return
    with peers.together(CheckpointError, f"{found} cannot be read"):
        manifest = sha256_of(found / MANIFEST)  # names the content of all other files
    same = peers.gather(manifest)[0] == manifest
    problem = None
    with peers.together(CheckpointError, f"{found} cannot be read"):
        if not same:
            problem = "is another checkpoint than the main process's of that name"
        elif peers.is_local_main and not peers.is_main and (why := problem_with(found)):
            problem = f"is damaged: {why}"
    everybody = peers.gather((socket.gethostname(), problem))
    main = everybody[0][0]
    for rank, (host, why) in enumerate(everybody):
        if why is not None:
            raise CheckpointError(
                f"{found} on {host} (rank {rank}) {why}; "
                f"copy it there again: rsync -a --checksum --delete {main}:{found.absolute()} {found.absolute().parent}/"
            )
