"""Ways to start a run: each that is meant starts as many processes as was meant, each that is not is one line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DDPCommunicationHookType, DistributedType
from torch.distributed.run import get_args_parser

from accel_pretrain import launch_checks, launchers, slurm, train
from accel_pretrain.errors import ConfigError, PeerError
from accel_pretrain.launch_checks import launch_notices, refuse_missing_processes, refuse_too_few_gpus, settle_launch
from accel_pretrain.runtime import TrainingConfig, build_accelerator, ddp_settings
from tests.processes import leave_nothing_running, start  # noqa: F401
from tests.running import REPO, TINY, environment, losses, refused

CONFIGS = sorted((REPO / "configs" / "accelerate").glob("*.yaml"))
OURS = [*CONFIGS, REPO / "accelerate_config.yaml"]
TYPES = {"NO": "", "MULTI_GPU": "multi_gpu", "FSDP": "use_fsdp"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
SLURM_TASK = {
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nobody has exported anything."""
    for name in launchers.launcher_variables():
        monkeypatch.delenv(name)


def words(dataset: Path, run_dir: Path, *more: str) -> list[str]:
    given = ["--train_data_path", str(dataset), "--checkpoint_dir", str(run_dir), "--max_iters", "2"]
    return [*TINY, "--global_batch_size", "8", *given, *more]


def said(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=100)
    assert process.returncode == code, output
    return output


# ------------------------------------------------------------------------------------------------------- Accelerate's files


def understood(path: Path) -> dict[str, Any]:
    """What ``accelerate launch`` makes of a file, in its own words."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "-m", "accel_pretrain.train"])
    return vars(_validate_launch_command(args)[0])


def ignored(path: Path) -> set[str]:
    """The keys of a file that ``accelerate launch`` does not heed."""
    document, args = yaml.safe_load(path.read_text()), understood(path)
    kind = TYPES[document.pop("distributed_type")]
    assert [name for name in TYPES.values() if name and args[name]] == ([kind] if kind else [])
    assert document.pop("compute_environment") == "LOCAL_MACHINE"
    inner = document.pop("fsdp_config", {})
    nowhere = inner.keys() - vars(launch_command_parser().parse_args(["script.py"])).keys()
    return nowhere | {name for name, value in (document | inner).items() if str(args.get(name)) != str(value)}


def test_there_are_the_files_that_the_readme_names() -> None:
    assert [path.stem for path in CONFIGS] == ["cpu", "ddp", "fsdp2", "multinode", "single_gpu"]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_accelerate_heeds_every_key_of_our_files(path: Path) -> None:
    assert ignored(path) == set()
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes >= loaded.num_machines  # pyright: ignore[reportAttributeAccessIssue]
    assert loaded.distributed_type == DistributedType(yaml.safe_load(path.read_text())["distributed_type"])
    first = path.read_text().splitlines()
    assert first[0].startswith("# ")
    assert any(f"--config_file {path.relative_to(REPO)}" in line for line in first if line.startswith("#"))


README = [
    command
    for command in re.findall(r"`([^`\n]+)`", (REPO / "README.md").read_text(encoding="utf-8"))
    if command.startswith(("accelerate launch ", "torchrun ")) and " -m accel_pretrain.train" in command
]


def test_there_are_such_commands() -> None:
    assert len(README) >= 5


@pytest.mark.parametrize("command", README)
def test_launchers_understand_what_the_readme_says(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """And they take the words after the module for ours."""
    monkeypatch.chdir(REPO)
    launcher, *given = shlex.split(command.removeprefix("accelerate "))
    args = (launch_command_parser() if launcher == "launch" else get_args_parser()).parse_args(given)
    args = _validate_launch_command(args)[0] if launcher == "launch" else args
    assert args.module
    assert args.training_script == "accel_pretrain.train"
    assert args.training_script_args[:1] == ["--config"]
    if "--num_machines" in given or "multinode" in command:
        assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, 0)
        assert (args.main_process_ip, args.main_process_port) == ("10.0.0.1", 29500)


@pytest.mark.parametrize("line", ["rdzv_backend: c10d", "same_network: true", "enable_cpu_affinity: true"])
def test_control_a_key_that_accelerate_ignores_is_seen(tmp_path: Path, line: str) -> None:
    file = tmp_path / "ddp.yaml"
    file.write_text(f"{(REPO / 'configs/accelerate/ddp.yaml').read_text()}{line}\n")
    assert ignored(file) == {line.partition(":")[0]}
    file.write_text((REPO / "configs/accelerate/fsdp2.yaml").read_text().replace("fsdp_offload", "fsdp_ofload"))
    assert ignored(file) == {"fsdp_ofload_params"}


@pytest.mark.slow
def test_files_for_one_process_and_the_default_one_of_accelerate(dataset: Path, tmp_path: Path) -> None:
    """Ours win when they are named; what a forgotten ``accelerate config`` has left is told. Real launches."""
    left = tmp_path / "home" / "accelerate" / "default_config.yaml"
    left.parent.mkdir(parents=True)
    left.write_text("distributed_type: 'NO'\nnum_processes: 1\nmixed_precision: bf16\nuse_cpu: true\ndebug: false\n")

    def launched(name: str, *options: str) -> subprocess.Popen[str]:
        run = ["-m", "accel_pretrain.train", *words(dataset, tmp_path / name, "--batch_size", "8")]
        return start([*LAUNCH, *options, *run], HF_HOME=str(tmp_path / "home"))

    started = [launched("cpu", "--config_file", "configs/accelerate/cpu.yaml"), launched("default")]
    ours, theirs = map(said, started)
    assert "Processes: 1 | Precision: fp32" in ours
    assert "Notice: accelerate launch" not in ours
    assert f"Notice: accelerate launch took {left} (distributed_type NO, num_processes 1, mixed_precision bf16" in theirs
    assert "--config_file accelerate_config.yaml takes this project's" in theirs


@pytest.mark.network
def test_a_second_compiler_is_refused_with_the_file_that_asks_for_it(dataset: Path, tmp_path: Path) -> None:
    compiling = tmp_path / "compiling.yaml"
    own, key = (REPO / "accelerate_config.yaml").read_text(), "dynamo_backend: 'no'\n"
    assert key in own  # the old form of this setting, which wins over the new one
    compiling.write_text(own.replace(key, "dynamo_config:\n  dynamo_backend: INDUCTOR\n"))
    run = ["-m", "accel_pretrain.train", *words(dataset, tmp_path / "compiled")]
    refusal = said(start([*LAUNCH, "--config_file", str(compiling), *run]), 1)
    line = f"error: ACCELERATE_DYNAMO_BACKEND=INDUCTOR would compile the model a second time (it comes from {compiling}); "
    assert f"{line}leave it out (dynamo_backend: 'no'), and type --compile true\n" in refusal
    assert "exit status 2" in refusal
    assert not (tmp_path / "compiled").exists()


@pytest.mark.parametrize("file", ["ddp", pytest.param("fsdp2", marks=pytest.mark.network)])
def test_two_processes_of_one_machine(dataset: Path, tmp_path: Path, file: str) -> None:
    options = ["--config_file", f"configs/accelerate/{file}.yaml", "--num_processes", "2"]
    output = said(start([*LAUNCH, *options, "-m", "accel_pretrain.train", *words(dataset, tmp_path / "run")]))
    assert "Device: cpu" in output
    assert "Processes: 2 | Precision: fp32 (from the config)" in output
    assert ("| Sharded: fsdp2 (from the launcher)" in output) == (file == "fsdp2")
    assert "Batch: 4 sequences x 1 micro-steps x 2 processes" in output


# -------------------------------------------------------------------------------------------------------------------- Slurm


def srun(tasks: Sequence[Sequence[str]], **more: str) -> list[subprocess.Popen[str]]:
    """Start tasks as srun does on one node, each with words of its own: no launcher, only Slurm's variables."""
    step = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(len(tasks)),
        "SLURM_NTASKS": str(len(tasks)), "SLURM_STEP_TASKS_PER_NODE": str(len(tasks)), "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0", **more,
    }  # fmt: skip
    python = [sys.executable, "-m", "accel_pretrain.train"]
    return [
        start([*python, *own], None, **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank, own in enumerate(tasks)
    ]


def test_tasks_of_srun_are_one_run(dataset: Path, tmp_path: Path, run_train: Any) -> None:
    first, second = srun([words(dataset, tmp_path / "run")] * 2)
    assert run_train(tmp_path / "one", "--global_batch_size", "8", "--max_iters", "2") == 0
    assert "Processes: 2 | Precision" in said(first)
    assert "Processes" not in said(second)  # one of them reports
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "one"), atol=1e-6, rtol=0)


def test_what_all_processes_refuse_is_said_once(dataset: Path, tmp_path: Path) -> None:
    first, second = srun([words(dataset, tmp_path / "run", "--global_batch_size", "7")] * 2)
    output = said(first, 2) + said(second, 2)
    assert output.count("7 is not a multiple of batch_size 4 x 2 processes") == 1
    assert output.count("error") == 1


@pytest.mark.network
def test_tasks_that_were_told_different_things_are_refused(dataset: Path, tmp_path: Path) -> None:
    """As where a command is typed on every machine, and a mistake on one."""
    tasks = [words(dataset, tmp_path / "run", "--lr", rate) for rate in ("1e-3", "2e-3")]
    for process in srun(tasks):
        output = said(process, 2)
        assert "optimizer.lr: 0.001 on " in output
        assert "(rank 0), 0.002 on " in output
        assert "type the same command on every machine" in output
        assert "Traceback" not in output


def test_what_srun_tells_its_tasks() -> None:
    assert slurm.rendezvous(SLURM_TASK) == {
        "RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(15_000 + 17 * 4711 % 15_000),
    }  # fmt: skip
    assert slurm.rendezvous({**SLURM_TASK, "SLURM_NODEID": "2"})["LOCAL_WORLD_SIZE"] == "1"
    assert slurm.rendezvous({**SLURM_TASK, "SLURM_STEP_NUM_TASKS": "1"}) == {}
    batch_script = {"SLURM_NTASKS": "5", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    assert slurm.rendezvous(batch_script) == {}
    assert (slurm.tasks_without_srun(batch_script), slurm.tasks_without_srun(SLURM_TASK)) == (5, 0)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("rack[0-1]n[02-03].example.org,x", "rack0n02.example.org"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert slurm.first_host(nodes) == first


# ---------------------------------------------------------------------------------------------------- what is refused, and told


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, and RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT not: "),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE=2 is set, and LOCAL_RANK not"),
        ({"LOCAL_RANK": "0"}, "WORLD_SIZE=1 is set, and WORLD_SIZE and RANK and"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no number of processes; start it with accelerate launch or torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started processes that do not know of each other (OMPI_COMM_WORLD_SIZE=4);"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED: DeepSpeed is not supported; type --config_file"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "asks for version 1 of FSDP; type --fsdp_version 2"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR would compile the model a second time"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "unset it, and type --gradient_accumulation_steps 4"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION=fp8 is not supported; type --mixed_precision bf16"),
        (SLURM_TASK | {"WORLD_SIZE": "16"}, "srun started 5 tasks, but WORLD_SIZE=16 is set; type: unset WORLD_SIZE"),
        (SLURM_TASK | {"RANK": "0"}, "srun started 5 tasks, of which this is number 3, but RANK=0 is set; type: unset RANK"),
        (
            SLURM_TASK | {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1"},
            "srun started 5 launchers that do not know of each other; type: srun --ntasks-per-node 1 bash -c",
        ),
    ],
)  # fmt: skip
def test_what_the_environment_says_behind_our_back_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    error = refused(train.main, capsys, "--train_data_path", tmp_path, "--checkpoint_dir", tmp_path / "run", "--device", "cpu")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "3"}, "but RANK=3 is set; type: unset RANK"),  # the same leftover in the task that has it right
        ({"WORLD_SIZE": "5", "RANK": "3", "LOCAL_RANK": "0"}, "but LOCAL_RANK=0 is set; type: unset LOCAL_RANK"),
    ],
)
def test_a_rank_that_srun_did_not_give_is_refused_in_every_task(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in (SLURM_TASK | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        settle_launch(cpu=True)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},  # one replica of Kubernetes
        {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "false"},
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        SLURM_TASK | {"WORLD_SIZE": "5"},
        SLURM_TASK | {"WORLD_SIZE": "5", "RANK": "3", "LOCAL_RANK": "1"},
        SLURM_TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        SLURM_TASK | {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "5"},
        SLURM_TASK | {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "2"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_control_what_launchers_set_is_let_through(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settle_launch(cpu=True)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    refuse_too_few_gpus(8)
    with pytest.raises(ConfigError) as caught:
        refuse_too_few_gpus(4)
    assert caught.value.message.startswith("8 processes on this machine, which has 4 GPUs; type --num_processes 4 (torchrun: ")
    with pytest.raises(ConfigError, match="has 1 GPU;"):
        refuse_too_few_gpus(1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")  # srun --gpus-per-task 1 shows each its own
    refuse_too_few_gpus(1)


def test_processes_that_the_launcher_lost_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--num_machines 2 --num_processes 3`` starts one on each."""
    command = "python accelerate launch --multi_gpu --num_machines 2 --num_processes 3 -m accel_pretrain.train"
    monkeypatch.setattr(launch_checks, "parent_command", command.split)
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    refuse_missing_processes(True, 3)
    with pytest.raises(ConfigError) as caught:
        refuse_missing_processes(True, 2)
    asked, advice = caught.value.message.split("; ")
    assert asked == "accelerate launch was asked for 3 processes and started 2"
    assert advice == "type: a multiple of 2 machines for --num_processes, which counts all of them together"


def test_a_batch_script_that_forgot_srun_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_notices() == []
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert launch_notices() == ["Slurm has given this job 8 tasks, and this is one process; srun python -m ... starts all"]


def test_the_cpu_where_a_gpu_was_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    with pytest.raises(ConfigError, match=r"training.device: cuda, but ACCELERATE_USE_CPU is set; type: unset"):
        build_accelerator(TrainingConfig(device="cuda"), [], tmp_path)


def test_others_that_do_not_come_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A real meeting, of two, to which one comes; and what it says meanwhile."""
    given = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29437"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launchers, "PATIENCE", 0.2)
    with pytest.raises(PeerError) as caught, launchers.meeting():
        torch.distributed.init_process_group("gloo", timeout=np.timedelta64(1, "s").astype(object))
    assert caught.value.message.startswith("the 2 processes of this run did not meet at localhost:29437: ")
    assert capsys.readouterr().err == "process 0 of 2 waits for the others at localhost:29437\n"


# ------------------------------------------------------------------------------------------------------------------ gradients


def test_gradients_are_exchanged_in_bfloat16_where_nccl_can(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ddp_settings(TrainingConfig(), cpu=True)
    assert (usual.gradient_as_bucket_view, usual.broadcast_buffers, usual.static_graph) == (True, False, False)
    assert usual.comm_hook == DDPCommunicationHookType.NO
    with pytest.raises(ConfigError) as caught:
        ddp_settings(TrainingConfig(gradient_compression="bf16"), cpu=True)
    assert caught.value.message.endswith("needs NVIDIA GPUs (NCCL) and ddp; type --gradient_compression null")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ddp_settings(TrainingConfig(gradient_compression="bf16"), cpu=False).comm_hook == DDPCommunicationHookType.BF16
    with pytest.raises(ConfigError):
        ddp_settings(TrainingConfig(gradient_compression="bf16"), cpu=False, sharded=True)


COUNTING = """
import contextlib, sys
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from accel_pretrain import train

exchanged = []

def count(state, bucket):
    exchanged.append(bucket.buffer().numel())
    return torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda done: done.value()[0])

DistributedDataParallelKwargs.register_comm_hook = lambda self, model: model.register_comm_hook(None, count)
if SYNC_ALWAYS:
    Accelerator.no_sync = lambda self, model: contextlib.nullcontext()
train.main(sys.argv[1:])
print("exchanged", sum(exchanged), flush=True)
"""


@pytest.mark.network
@pytest.mark.parametrize(("always", "times"), [(False, 1), (True, 4)])
def test_gradients_are_exchanged_once_per_update(dataset: Path, tmp_path: Path, always: bool, times: int) -> None:
    """However many micro-steps it has; the second is the control."""
    script = tmp_path / "counting.py"
    script.write_text(f"SYNC_ALWAYS = {always}\n{COUNTING}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    own = words(dataset, tmp_path / "run", "--batch_size", "1")
    done = subprocess.run([*launcher, *own], env=environment(), cwd=REPO, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "1 sequences x 4 micro-steps x 2 processes" in done.stdout
    assert done.stdout.count(f"exchanged {37_088 * 2 * times}\n") == 2


@pytest.mark.network
def test_the_benchmark_of_scaling_runs() -> None:
    words = ["-m", "benchmarks.scaling", "--quick"]
    done = subprocess.run([sys.executable, *words], env=environment(), cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.search(r"processes against threads: \d\.\d{3}x", done.stdout)
    assert re.search(r"largest difference 0\.0e\+00|\d\.\de-\d+ \(met: 1e-7 relative\)", done.stdout)
    assert re.search(r"largest error: memory [\d.]+% .*, time [\d.]+% ", done.stdout)


LEAVES = """
import atexit, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from accel_pretrain.launchers import leave_after

class Last:
    def __del__(self, say=sys.stderr.write):
        say("the interpreter was taken down")

POOL = ThreadPoolExecutor(1)

def main():
    sys.last = Last()
    POOL.submit(int).result()  # its thread now waits for more, as one of torch.compile's does
    atexit.register(print, "registered", end=" ")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread", end=" "))).start()
    print("main", end=" ")
    END

leave_after(main)
"""


@pytest.mark.parametrize(
    ("end", "code"), [("return 0", 0), ("raise SystemExit(75)", 75), ("raise KeyError(1)", 1), ("sys.exit('why')", 1)]
)
def test_one_of_several_processes_leaves_its_interpreter_standing(end: str, code: int):
    """What is registered and printed is still done. Control: a process alone takes it down."""
    for size in ("1", "2") if code == 0 else ("2",):
        done = subprocess.run(
            [sys.executable, "-c", LEAVES.replace("END", end)],
            env=environment(WORLD_SIZE=size), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (code, "main thread registered ")
        assert ("taken down" in done.stderr) == (size == "1" or "KeyError" in end)
        assert ("why" in done.stderr) == ("why" in end)


def test_who_learns_in_main_that_it_is_one_of_several_or_has_no_output_leaves_too():
    """As under srun, where nobody but main says how many there are; and as behind ``>&-``."""
    script = LEAVES.replace("END", "os.environ['WORLD_SIZE'] = '2'; sys.stdout = None; return 0")
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(WORLD_SIZE="1"), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
