"""Two machines, made of network namespaces: one run over a real link, which is cut, mended, or slow; disks that are not shared.

Each "machine" has a network stack, a host name and, where a test says so, a run directory of its own; only processors and the
rest of the disk are shared. What needs root, ``ip`` and the right to make namespaces is skipped with the reason elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.processes import leave_nothing_running, rank_of, saved_step, start, status, trainers, until, updates  # noqa: F401
from tests.running import TINY, Train, assert_same_bits, losses, newest

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/multinode.yaml"]
MAIN = "10.77.0.1"
TIMEOUT = 3  # seconds of silence after which a process ends


class Machines:
    """Two network namespaces and the link between them; machine 0 is ``10.77.0.1``."""

    def __init__(self) -> None:
        self.names = [f"ap{os.getpid()}n{number}" for number in range(2)]
        self.links = [f"ap{os.getpid() % 10**6}v{number}" for number in range(2)]  # at most 15 characters
        self.private: list[Path | None] = [None, None]  # what a machine sees as its own run directory

    def __enter__(self) -> Machines:
        for name in self.names:
            _ip("netns", "add", name)
        ends = [["name", link, "netns", name] for link, name in zip(self.links, self.names, strict=True)]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for number, name in enumerate(self.names):
            _ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", self.links[number])
            for link in ("lo", self.links[number]):
                _ip("-n", name, "link", "set", link, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)

    def command(self, number: int, words: list[str], run_dir: Path) -> list[str]:
        """The command that runs ``words`` on one machine."""
        own = self.private[number]
        bind = f'mount --bind "{own}" "{run_dir}"; ' if own else ""
        script = f'hostname node{number}; {bind}exec "$@"'
        inside = ["unshare", "--uts", *(["--mount"] if own else []), "sh", "-ec", script, "sh"]
        return ["ip", "netns", "exec", self.names[number], *inside, *words]

    def start(self, number: int, arguments: list[str], run_dir: Path, log: Path, each: int = 1) -> subprocess.Popen[str]:
        """Start ``accelerate launch`` on one machine, with ``each`` processes; what it prints is in ``log``."""
        options = ["--num_processes", str(2 * each), "--machine_rank", str(number), "--main_process_ip", MAIN]
        words = [*LAUNCH, *options, "-m", "accel_pretrain.train", *arguments]
        return start(self.command(number, words, run_dir), log, GLOO_SOCKET_IFNAME=self.links[number])

    def start_both(self, arguments: list[str], run_dir: Path, each: int = 1) -> list[subprocess.Popen[str]]:
        return [self.start(n, arguments, run_dir, run_dir.with_suffix(f".log{n}"), each) for n in range(2)]

    def cut(self, how: str = "link") -> None:
        """Packets get lost from here on, and nobody is told: a cable that is pulled, or a switch that sends them elsewhere."""
        if how == "link":
            _ip("-n", self.names[1], "link", "set", self.links[1], "down")
        else:
            self._neighbours("replace", "lladdr", "02:00:00:00:00:99", "nud", "permanent")

    def mend(self, how: str = "link") -> None:
        if how == "link":
            _ip("-n", self.names[1], "link", "set", self.links[1], "up")
        else:
            self._neighbours("del")

    def _neighbours(self, what: str, *to: str) -> None:
        for number, name in enumerate(self.names):
            _ip("-n", name, "neigh", what, f"10.77.0.{2 - number}", "dev", self.links[number], *to)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "mount", "hostname"))):
        pytest.skip("two machines need Linux, root, and the programs ip, unshare, mount and hostname")
    made = Machines()
    try:
        with made:
            yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{' '.join(error.cmd)}: {error.stderr.strip()}")


def limited(dataset: Path, run_dir: Path, updates: int = 150, *more: str) -> list[str]:
    """Words of a run of 8 sequences per update; ``dataset`` may be shared."""
    words = [
        "--max_iters",
        str(updates),
        "--checkpoint_interval",
        "10",
        "--keep_last",
        "2",
        "--dropout",
        "0.1",
        "--global_batch_size",
        "8",
    ]
    where = ["--train_data_path", str(dataset), "--checkpoint_dir", str(run_dir), "--hang_timeout", str(TIMEOUT)]
    return [*TINY, *words, *where, *more]


def log(run_dir: Path, number: int) -> str:
    return run_dir.with_suffix(f".log{number}").read_text()


def ends(processes: list[subprocess.Popen[str]], run_dir: Path, seconds: float = 90) -> list[int]:
    """The exit codes of two launchers."""
    until(lambda: all(process.poll() is not None for process in processes), seconds=seconds)
    return [process.wait() for process in processes]


def cut_and_mend(machines: Machines, dataset: Path, run_dir: Path, how: str, each: int = 1) -> None:
    """Cut the link of a run; both sides end in time, say where, and go on when it is mended."""
    words = limited(dataset, run_dir, 150, "--batch_size", str(4 // each))
    processes = machines.start_both(words, run_dir, each)
    until(lambda: updates(run_dir) >= 42, processes[0])
    machines.cut(how)  # soon after a save: in one, a process would be given three times as long
    began = time.monotonic()
    assert ends(processes, run_dir, TIMEOUT + 5) == [1, 1]  # Accelerate's word for any failure
    assert time.monotonic() - began <= TIMEOUT + 5
    assert f"Processes: {2 * each} on 2 machines" in log(run_dir, 0)
    said = status(run_dir)
    assert (said["state"], said["exit_code"]) == ("failed", 75)
    assert "nothing moved for" in said["reason"]
    for rank in range(2 * each):
        assert f"(rank {rank}); where every thread was is in {run_dir}/hang_rank{rank}.txt; --hang_timeout" in log(
            run_dir, rank // each
        )
        assert "in fit" in (run_dir / f"hang_rank{rank}.txt").read_text()
    assert 40 <= saved_step(run_dir) < 150
    machines.mend(how)
    assert ends(machines.start_both(words, run_dir, each), run_dir) == [0, 0], log(run_dir, 0) + log(run_dir, 1)
    assert f"Resuming from {run_dir}/checkpoint_" in log(run_dir, 0)


@pytest.mark.network
def test_a_link_that_is_cut_ends_both_machines_and_the_same_command_goes_on(
    machines: Machines, run_train: Train, dataset: Path, tmp_path: Path
) -> None:
    """To the bits of one machine that was never interrupted."""
    assert run_train(tmp_path / "whole", *limited(dataset, tmp_path / "whole")) == 0
    cut_and_mend(machines, dataset, tmp_path / "run", "link")
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "run"))
    np.testing.assert_allclose(losses(tmp_path / "run")[-100:], losses(tmp_path / "whole")[-100:], atol=1e-6, rtol=0)


@pytest.mark.network
def test_lost_packets_between_two_machines_of_two_processes(
    machines: Machines, run_train: Train, dataset: Path, tmp_path: Path
) -> None:
    cut_and_mend(machines, dataset, tmp_path / "run", "packets", each=2)
    assert run_train(tmp_path / "one", *limited(dataset, tmp_path / "one"), "--batch_size", "2") == 0
    np.testing.assert_allclose(losses(tmp_path / "run")[-100:], losses(tmp_path / "one")[-100:], atol=1e-4, rtol=0)
    other = limited(dataset, tmp_path / "control", 150, "--batch_size", "2", "--seed", "43")
    assert run_train(tmp_path / "control", *other) == 0
    assert np.abs(np.subtract(losses(tmp_path / "control")[-100:], losses(tmp_path / "one")[-100:])).max() > 1e-2


# ---------------------------------------------------------------------------------------------------- disks that are not shared


@pytest.fixture
def apart(machines: Machines, tmp_path: Path) -> Machines:
    """Machines that see folders of their own under the name of the run directory."""
    (tmp_path / "run").mkdir()
    for number in range(2):
        machines.private[number] = tmp_path / f"disk{number}"
        (tmp_path / f"disk{number}").mkdir()
    return machines


@pytest.mark.network
@pytest.mark.parametrize("how", [[], ["--strategy", "fsdp2", "--asynchronous", "true"]], ids=["ddp", "fsdp2"])
def test_a_run_directory_of_one_machine(
    apart: Machines, run_train: Train, dataset: Path, tmp_path: Path, how: list[str]
) -> None:
    """The run begins with a notice. Going on needs a copy: refused without, never from nothing, and exact with it."""
    run_dir, disks = tmp_path / "run", [tmp_path / "disk0", tmp_path / "disk1"]
    words = limited(dataset, run_dir, 20, *how)
    assert 0 not in ends(apart.start_both([*words, "--on_spike", "rollback"], run_dir), run_dir)
    assert f"error: training.on_spike: rollback needs a folder that all machines share, and {run_dir} is node0's own" in log(
        run_dir, 0
    )
    assert ends(apart.start_both(words, run_dir), run_dir) == [0, 0], log(run_dir, 0) + log(run_dir, 1)
    assert f"Notice: {run_dir} is node0's own, and node1 cannot see it" in log(run_dir, 0)
    assert newest(disks[0]).name == "checkpoint_00000020"
    assert [path.name for path in disks[1].iterdir()] == []

    words = limited(dataset, run_dir, 40, *how)
    refusal = (
        f"{run_dir}/checkpoint_00000020 is on node0, and node1 cannot see it; give all machines one shared --checkpoint_dir"
    )
    assert 0 not in ends(apart.start_both(words, run_dir), run_dir)
    assert f"error: {refusal}" in log(run_dir, 0)
    assert f"error (rank 1): {refusal}" in log(run_dir, 1)

    apart.private.reverse()  # the main process is where no checkpoint is
    assert 0 not in ends(apart.start_both(words, run_dir), run_dir)
    assert f"{run_dir} holds checkpoint_00000020 on node1 and nothing on node0, where the main process is" in log(run_dir, 0)
    apart.private.reverse()

    copy = Path(shutil.copytree(newest(disks[0]), disks[1] / "checkpoint_00000020")) / "optimizer.bin"
    content = copy.read_bytes()
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert 0 not in ends(apart.start_both(words, run_dir), run_dir)
    assert f"checkpoint_00000020 on node1 (rank 1) is damaged: {copy.name} was changed after it was written" in log(run_dir, 0)
    copy.write_bytes(content)
    assert ends(apart.start_both(words, run_dir), run_dir) == [0, 0], log(run_dir, 0) + log(run_dir, 1)
    assert run_train(tmp_path / "whole", *limited(dataset, tmp_path / "whole", 20)) == 0
    assert run_train(tmp_path / "whole", *limited(dataset, tmp_path / "whole", 40)) == 0
    np.testing.assert_allclose(losses(disks[0])[-20:], losses(tmp_path / "whole")[-20:], atol=1e-5, rtol=0)
    if not how:  # a sharded run adds up in another order than one process
        assert_same_bits(newest(tmp_path / "whole"), newest(disks[0]))


@pytest.mark.network
def test_data_that_only_one_machine_has(machines: Machines, dataset: Path, tmp_path: Path) -> None:
    """Both sides end, at once, and the one that lacks it says what."""
    run_dir = tmp_path / "run"
    processes = [
        machines.start(number, limited(data, run_dir), run_dir, run_dir.with_suffix(f".log{number}"))
        for number, data in enumerate((dataset, tmp_path / "nothing"))
    ]
    assert 0 not in ends(processes, run_dir, 60)
    assert f"error (rank 1): {tmp_path}/nothing" in log(run_dir, 1)
    lines = "another process of this run has ended or does not answer|the 2 processes of this run did not meet at 10.77.0.1"
    assert re.search(f"error: ({lines})", log(run_dir, 0))  # the second if it has ended that soon
    assert "[rank0]: Traceback" not in log(run_dir, 0)
    assert not (run_dir / "metrics.jsonl").exists()


# -------------------------------------------------------------------------------------------------------------- fewer machines


@pytest.mark.network
@pytest.mark.timeout(240)
@pytest.mark.parametrize("lost", ["machine", "launcher"])
def test_a_run_goes_on_with_the_machines_that_are_left(run_train: Train, dataset: Path, tmp_path: Path, lost: str) -> None:
    """``torchrun --nnodes 1:2``: one launcher is killed, with its process or alone, and the other goes on with all samples."""
    run_dir, port = tmp_path / "run", 29_641 + len(lost)
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "test"]
    conf = "last_call_timeout=3,join_timeout=60,keep_alive_interval=1,keep_alive_max_attempt=2"
    options = ["--nnodes", "1:2", "--nproc_per_node", "1", "--max_restarts", "3", *rendezvous, "--rdzv_conf", conf]
    words = [*options, "-m", "accel_pretrain.train", *limited(dataset, run_dir, 400)]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    first = start([*launcher, "--node_rank", "0", *words], run_dir.with_suffix(".log0"))
    time.sleep(1)  # the first one's is the store
    second = start([*launcher, "--node_rank", "1", *words], run_dir.with_suffix(".log1"))
    until(lambda: updates(run_dir) >= 42, first)
    if lost == "machine":
        os.kill(next(pid for pid in trainers(run_dir) if rank_of(pid) == 1), signal.SIGKILL)
    second.kill()
    assert first.wait(timeout=100) == 0, log(run_dir, 0)
    assert "Processes: 2" in log(run_dir, 0) + log(run_dir, 1)
    assert "Processes: 1 |" in log(run_dir, 0)
    assert f"Resuming from {run_dir}/checkpoint_" in log(run_dir, 0)
    assert "4 sequences x 2 micro-steps x 1 processes" in log(run_dir, 0)
    assert run_train(tmp_path / "whole", *limited(dataset, tmp_path / "whole", 400)) == 0
    assert_same_bits(newest(tmp_path / "whole"), newest(run_dir))
