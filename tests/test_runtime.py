"""The process and its surroundings: device, precision, threads, the wish to stop, and agreement between processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor

from accel_pretrain import compiling, launchers, runtime
from accel_pretrain.commit import problem_with
from accel_pretrain.compiling import resolve_compile
from accel_pretrain.errors import CheckpointError, ConfigError
from accel_pretrain.runtime import (
    TrainingConfig,
    _threads,
    all_agree,
    build_accelerator,
    resolve_precision,
    seed_dropout,
    together,
)  # fmt: skip
from tests.running import REPO, TINY, environment, launch, losses, newest

LAUNCHER = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


# ------------------------------------------------------------------------------------------------ device and precision


@pytest.mark.parametrize(
    ("wanted", "launcher", "device", "expected"),
    [
        ("bfloat16", "fp16", "bf16 GPU", ("bf16", "config")),
        ("no", "bf16", "bf16 GPU", ("no", "config")),
        (None, "fp16", "bf16 GPU", ("fp16", "launcher")),
        (None, "no", "bf16 GPU", ("bf16", "device")),
        (None, None, "bf16 GPU", ("bf16", "device")),
        (None, None, "old GPU", ("no", "device")),
        (None, None, "cpu", ("no", "device")),
        (None, None, "bf16 CPU", ("bf16", "device")),
        (None, "no", "bf16 CPU", ("bf16", "device")),
        ("no", None, "bf16 CPU", ("no", "config")),
    ],
)
def test_precision_is_the_configs_else_the_launchers_else_the_devices(
    monkeypatch: pytest.MonkeyPatch, wanted: Any, launcher: str | None, device: str, expected: tuple[str, str]
) -> None:
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device.endswith("GPU"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: device == "bf16 GPU")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: device == "bf16 CPU")
    assert resolve_precision(TrainingConfig(mixed_precision=wanted), cpu=not device.endswith("GPU")) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("accelerate launch --mixed_precision no -m accel_pretrain.train", ("no", "launcher")),
        ("python /bin/accelerate launch --mixed-precision=no -m accel_pretrain.train", ("no", "launcher")),
        ("accelerate launch -m accel_pretrain.train", ("bf16", "device")),
        ("bash run.sh --mixed_precision no", ("bf16", "device")),
    ],
)
def test_a_no_that_somebody_has_typed_counts(monkeypatch: pytest.MonkeyPatch, words: str, expected: tuple[str, str]) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(launchers, "parent_command", words.split)
    assert resolve_precision(TrainingConfig(), cpu=True) == expected


@pytest.mark.parametrize(
    ("wanted", "device", "flops", "expected"),
    [
        (None, "cpu", 9e14, False),
        (None, "cpu", 1e15, True),
        (None, "cuda", 9e16, False),
        (None, "cuda", 1e17, True),
        (None, "mps", 1e30, False),
        (True, "cpu", 0, True),
        (False, "cpu", 1e30, False),
    ],
)
def test_runs_are_compiled_where_it_pays_or_where_one_says_so(
    monkeypatch: pytest.MonkeyPatch, wanted: bool | None, device: str, flops: float, expected: bool
) -> None:
    monkeypatch.setattr(compiling, "_compiler_problem", lambda _: None)
    compiled, notice = resolve_compile(TrainingConfig(compile=wanted), flops, torch.device(device))
    assert (compiled, notice is not None) == (expected, expected)


def test_without_a_compiler_nothing_is_compiled_and_one_line_says_so() -> None:
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        compiled, notice = resolve_compile(TrainingConfig(compile=True), 0, torch.device("cpu"))
    assert not compiled
    assert notice == "not compiled: torch.compile needs a C++ compiler, such as g++, and found none"


@pytest.mark.slow
def test_a_compiler_that_cannot_build_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where Python's headers are missing: by default, a long run would compile, and end with a traceback."""
    broken = tmp_path / "g++"
    lines = ['case "$*" in *.cpp*) echo "fatal error: Python.h: not found" >&2; exit 1;; esac', 'exec g++ "$@"']
    broken.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    broken.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert resolve_compile(TrainingConfig(), 1e18, torch.device("cpu"))[0]  # control; and PyTorch finds out about the processor
    torch.compiler.reset()
    with inductor.patch({"cpp.cxx": (None, str(broken))}):
        compiled, notice = resolve_compile(TrainingConfig(), 1e18, torch.device("cpu"))
    torch.compiler.reset()
    assert not compiled
    assert notice == "not compiled: torch.compile fails here (fatal error: Python.h: not found)"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (TrainingConfig(device="cuda"), "training.device: cuda is not available on this machine; type --device auto"),
        (TrainingConfig(device="mps"), "training.device: mps is not available on this machine; type --device auto"),
        (TrainingConfig(mixed_precision="fp16"), "training.mixed_precision: fp16 needs a GPU; try --mixed_precision bf16"),
    ],
)
def test_what_the_machine_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: TrainingConfig, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        build_accelerator(wanted, [], tmp_path)
    assert caught.value.message == message


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else each of them would train alone, on the same data, and overwrite the others' checkpoints."""
    monkeypatch.setattr(runtime, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="the launcher started 2 processes, but Accelerate sees 1"):
        build_accelerator(TrainingConfig(device="cpu", cpu_threads=1), [], tmp_path)


@pytest.mark.parametrize(
    ("wanted", "variables", "expected"),
    [
        (3, {}, 3),
        (3, {"OMP_NUM_THREADS": "4"}, 3),
        (3, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 3),
        (None, {}, 8),
        (None, {"OMP_NUM_THREADS": "1"}, 1),
        (None, {"OMP_NUM_THREADS": "4"}, 4),
        (None, {"OMP_NUM_THREADS": "4", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, 4),
        (None, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, 4),
        (None, {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 8),
        (None, {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "16"}, 1),
    ],
)
def test_threads_are_the_configs_else_the_persons_else_a_fair_share(
    monkeypatch: pytest.MonkeyPatch, wanted: int | None, variables: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(launchers, "parent_command", lambda: ["python", "/bin/accelerate", "launch"])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _threads(wanted) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["bash", "-c", "source ~/accelerate/bin/activate; python -m accel_pretrain.train; true"], False),
        (["/sbin/init"], False),
        (["/usr/bin/python3", "/bin/accelerate", "launch"], True),
        (["python", "-u", "-m", "accelerate.commands.launch"], True),
    ],
)
def test_an_exported_variable_is_no_launcher(monkeypatch: pytest.MonkeyPatch, words: list[str], expected: bool) -> None:
    """``nohup bash -c 'export ACCELERATE_MIXED_PRECISION=bf16; ...'``: the end of that shell is not the end of the run."""
    monkeypatch.setattr(launchers, "parent_command", lambda: words)
    assert not launchers.launched()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launchers.launched() == expected


def test_dropout_is_a_function_of_the_update_and_of_the_micro_batch() -> None:
    def draw(*position: int) -> float:
        seed_dropout(*position)
        return torch.rand(()).item()

    state = torch.get_rng_state()
    assert draw(42, 7, 1) == draw(42, 7, 1)
    assert len({draw(42, 7, 1), draw(43, 7, 1), draw(42, 8, 1), draw(42, 7, 2), draw(42, 1, 7)}) == 5
    torch.set_rng_state(state)


# ------------------------------------------------------------------------------------------------------------- stopping


def test_ctrl_c_that_also_ends_the_reader_of_the_output_still_saves(dataset: Path, tmp_path: Path) -> None:
    """``train 2>&1 | tee log``: the terminal interrupts both, and ``tee`` is gone first."""
    arguments = [*TINY, "--max_iters", "100000", "--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path)]
    process = subprocess.Popen(
        launch(arguments), env=environment(), cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    assert any(line.startswith("Iter      3") for line in process.stdout)
    process.stdout.close()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert problem_with(newest(tmp_path)) is None


# ------------------------------------------------------------------------------------------------------------ agreement


def processes(number: int, failed_elsewhere: int = 0) -> Any:
    """An Accelerator as seen from one of several processes."""
    reduce = lambda flag, reduction: flag + failed_elsewhere  # noqa: E731
    return SimpleNamespace(num_processes=number, device=torch.device("cpu"), reduce=reduce)


def test_all_must_agree() -> None:
    assert all_agree(processes(1), True)
    assert not all_agree(processes(1), False)
    assert all_agree(processes(2), True)
    assert not all_agree(processes(2), False)
    assert not all_agree(processes(2, failed_elsewhere=1), True)


def test_a_failure_anywhere_is_raised_everywhere() -> None:
    with together(processes(2), CheckpointError):
        pass
    for number in (1, 2):
        with pytest.raises(OSError, match="disk full"), together(processes(number), CheckpointError):
            raise OSError("disk full")
    with pytest.raises(CheckpointError, match="another process failed"), together(processes(2, 1), CheckpointError):
        pass


def test_a_run_goes_on_where_nobody_knows_a_home(dataset: Path, tmp_path: Path) -> None:
    """As in a container that is started with ``--user 12345``; also what looks for a key of wandb."""
    unshare = [shutil.which("unshare") or "", "--user", "--map-user=12345", "--map-group=12345", "env", "-u", "HOME"]
    nobody = "import os; raise SystemExit(os.path.expanduser('~') != '~')"
    here = environment()
    for name in ("XDG_CACHE_HOME", "WANDB_MODE"):
        here.pop(name, None)
    if not unshare[0] or subprocess.run([*unshare, sys.executable, "-c", nobody], capture_output=True, env=here).returncode:
        pytest.skip("a user without a home needs user namespaces")
    words = ["--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path / "run"), *TINY, "--max_iters", "2"]
    program = "from accel_pretrain import runtime, train; assert not runtime.wandb_knows_me(); raise SystemExit(train.main())"
    command = [*unshare, sys.executable, "-c", program, *words]
    done = subprocess.run(command, env=here, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "MFU: n/a" not in done.stdout  # measured, and kept nowhere
    assert len(losses(tmp_path / "run")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # no folder with the name of a tilde


MOMENTS_LEFT = """
import sys, torch
from accel_pretrain import train
torch.set_num_threads(2)
if sys.argv[1:]:
    train.main(sys.argv[1:])
else:
    torch.ones(200_000).add_(1)  # there are threads now
assert float("1e-310") > 0, "afterwards all is as before"
if not torch.set_flush_denormal(True):  # of the main thread
    sys.exit("left unknown")
parameter = torch.nn.Parameter(torch.ones(200_000))  # so many that both threads take part
parameter.grad = torch.zeros_like(parameter)
optimizer = torch.optim.AdamW([parameter], fused=True)
optimizer.step()
average = optimizer.state[parameter]["exp_avg"].fill_(1e-37)
for _ in range(300):
    optimizer.step()
print("left", int(average.view(torch.int32).count_nonzero()))
"""


def test_numbers_that_would_slow_a_processor_down_count_as_zero(dataset: Path, tmp_path: Path) -> None:
    """On the other thread of a run too. Else 0.9 times the smallest numbers there are is rounded to the same, for ever."""
    places = ["--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path)]
    words = [*places, *TINY, "--max_iters", "1", "--cpu_threads", "2"]
    control, found = (
        subprocess.run([sys.executable, "-c", MOMENTS_LEFT, *own], capture_output=True, text=True, cwd=REPO)
        for own in ([], words)
    )
    if "left unknown" in control.stderr:
        pytest.skip("this processor cannot")
    assert control.stdout == "left 100000\n", control.stderr
    assert found.stdout.endswith("left 0\n"), found.stderr
