"""Sweeps: by a wandb agent, whose values reach the config, and by our own program, whose trials are real runs."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from accel_pretrain import lock, space, sweep, train
from accel_pretrain.agent import own_directory, wishes
from accel_pretrain.config import RunConfig
from accel_pretrain.errors import ConfigError
from accel_pretrain.space import Choice, Range, grid_size, parse_parameter, propose
from accel_pretrain.sweep_trials import stopped_with
from accel_pretrain.typed_keys import Keys, Leaf
from accel_pretrain.typed_yaml import load, parse_command_line
from tests.running import REPO, TINY, environment, launch, losses, refused, stdlib_text, write_dataset

# ------------------------------------------------------------------------------------------------------- what is tried


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("lr=1e-4..1e-2:log", ("lr", Range(1e-4, 1e-2, True, False))),
        ("lr=0.001..0.1", ("lr", Range(0.001, 0.1, False, False))),
        ("num_layers=2..8", ("num_layers", Range(2, 8, False, True))),
        ("batch_size=8,16, 8", ("batch_size", Choice(("8", "16")))),
        ("optimizer.name=sgd", ("optimizer.name", Choice(("sgd",)))),
        ("data=../a,../b", ("data", Choice(("../a", "../b")))),
    ],
)
def test_parameters_as_they_are_typed(word: str, expected: tuple[str, Choice | Range]):
    assert parse_parameter(word) == expected


@pytest.mark.parametrize("word", ["lr", "lr=", "=1", "lr=1e-2..1e-4", "lr=0..1:log", "lr=a..b", "lr=1..inf"])
def test_parameters_that_are_none_are_refused(word: str):
    with pytest.raises(ConfigError, match="--param"):
        parse_parameter(word)


def test_a_grid_has_every_combination_once():
    found: list[tuple[dict[str, str], float | None]] = []
    grid = {"a": Choice(("1", "2")), "b": Choice(("x", "y", "z"))}
    while (values := propose(grid, "grid", 0, found)) is not None:
        found.append((values, None))
    assert len({tuple(values.values()) for values, _ in found}) == len(found) == grid_size(grid) == 6


RANGES = {"lr": Range(1e-4, 1e-2, True, False), "n": Range(2, 5, False, True), "c": Choice(("a", "b"))}


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_draws_stay_inside_and_depend_on_the_past_alone(method: space.Method):
    if method == "tpe":
        pytest.importorskip("optuna", reason="pip install 'accel_pretrain[sweep]'")
    told: list[tuple[dict[str, str], float | None]] = []
    for number in range(30):
        values = propose(RANGES, method, 7, told)
        assert values is not None
        assert 1e-4 <= float(values["lr"]) <= 1e-2
        assert values["n"] in ("2", "3", "4", "5")
        assert values["c"] in ("a", "b")
        told.append((values, None if number % 5 == 4 else float(values["lr"])))
    assert propose(RANGES, method, 7, told[:12]) == told[12][0]
    assert propose(RANGES, method, 8, told[:12]) != told[12][0]  # control
    assert len({values["lr"] for values, _ in told}) > 20
    assert {values["n"] for values, _ in told} == {"2", "3", "4", "5"}
    decades = [float(values["lr"]) < 1e-3 for values, _ in told[:10]]
    assert any(decades)
    if method == "tpe":  # it goes where the loss, here the rate itself, was low; chance does not
        late = [float(values["lr"]) for values, _ in told[15:]]
        chance = [float(propose(RANGES, "random", 7, told[:number])["lr"]) for number in range(15, 30)]  # type: ignore[index]
        assert sorted(late)[7] < sorted(chance)[7]


# ----------------------------------------------------------------------------------------------------------- real runs

WORDS = [*TINY, "--max_iters", "2"]
FAILING = """sh -c 'echo "error: no device here"; exit 3'"""  # a launcher


def swept(dataset: Path, folder: Path, *more: str) -> list[str]:
    return ["--train_data_path", str(dataset), "--checkpoint_dir", str(folder), *WORDS, *more]


def made(dataset: Path, folder: Path, *more: str) -> sweep.Sweep:
    words, parameters = sweep.split_parameters(swept(dataset, folder, *more))
    return sweep.make_sweep(parse_command_line(sweep.SweptRun, words, presets=True), parameters)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]


def test_trials_are_runs_and_a_failed_one_is_a_row(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The same command again has nothing left to do; one that means something else is refused."""
    words = swept(dataset, tmp_path, "--param", "d_model=32,16")
    assert sweep.main([*words, "--trials", "1"]) == 0
    words += ["--launcher", FAILING]
    capsys.readouterr()
    assert sweep.main(words) == 0
    out = capsys.readouterr().out
    question, *trials = rows_of(tmp_path)
    assert question["parameters"] == {"model.d_model": {"values": ["32", "16"]}}
    assert [(row["trial"], row["state"]) for row in trials] == [(0, "running"), (0, "finished"), (1, "running"), (1, "failed")]
    assert trials[3]["reason"] == "error: no device here (exit code 3)"
    last = json.loads((tmp_path / "trial_000" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (trials[1]["val_loss"], trials[1]["standard_error"]) == (
        last["final/val_loss"],
        last["eval/val_loss_standard_error"],
    )
    shown = f"{trials[1]['val_loss']:.4f} ± {trials[1]['standard_error']:.4f}"
    assert out.index("trial_001") < out.index("val loss") < out.index(shown) < out.rindex("trial_001")
    [best] = [line for line in out.splitlines() if line.startswith("Best: python -m accel_pretrain.train ")]
    assert " --model.d_model 32 --checkpoint_dir DIR" in best
    before = (tmp_path / "sweep.jsonl").read_bytes()
    assert sweep.main(words) == 0
    assert capsys.readouterr().out.count("trial_000") == 1  # in the table
    assert (tmp_path / "sweep.jsonl").read_bytes() == before
    assert "is of another sweep (optimizer.lr was 0.003, is 0.0001)" in refused(sweep.main, capsys, *words, "--lr", "1e-4")


def test_a_trial_gets_what_was_typed_unless_that_very_key_is_swept(dataset: Path, tmp_path: Path):
    typed = ["--norm_eps", "1e-3", "--norm", "layernorm", "--sweep_seed", "3", "--trials", "1"]
    base = made(dataset, tmp_path, *typed, "--param", "norm=rmsnorm,layernorm").base
    assert "--model.norm_eps=1e-3" in base
    assert [word for word in base if word.startswith(("--model.norm=", "--sweep.", "--checkpoint.checkpoint_dir="))] == []


def test_a_preset_lies_beneath_every_trial(dataset: Path, tmp_path: Path):
    """What the trainer makes of a trial's words is what the sweep has checked, but for what is swept."""
    own = ["--preset", "depth=2", "--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path)]
    words, parameters = sweep.split_parameters([*own, "--param", "lr=1e-3..1e-1:log"])
    found = sweep.make_sweep(parse_command_line(sweep.SweptRun, words, presets=True), parameters)
    trial = train.load_config(parse_command_line(RunConfig, [*found.base, "--lr", "0.5"], presets=True))
    assert (trial.model.num_layers, trial.optimizer.name, trial.optimizer.lr) == (2, "muon", 0.5)
    assert found.settings["model.d_model"] == trial.model.d_model == 128
    assert found.anew == []
    words, parameters = sweep.split_parameters([*own, "--mup_base_width", "64", "--param", "lr=1e-3,1e-2"])
    assert sweep.make_sweep(parse_command_line(sweep.SweptRun, words, presets=True), parameters).anew == []


def test_what_a_preset_chooses_for_each_trial_is_said(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own = ["--preset", "depth=1", "--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path), "--max_iters", "1"]
    own += ["--device", "cpu", "--cpu_threads", "1", "--eval_iters", "1", "--param", "global_batch_size=4,8", "--trials", "1"]
    assert sweep.main(own) == 0
    [notice] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Notice: --preset depth=1 chooses")]
    assert "optimizer.lr" in notice
    question = rows_of(tmp_path)[0]
    assert "optimizer.lr" not in question["settings"]
    assert question["settings"]["model.num_layers"] == 1


def test_a_trial_whose_folder_is_in_use_ends_the_sweep(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One line says who is there, and the trial stays to be done."""
    (tmp_path / "trial_000").mkdir()
    file = lock.take(tmp_path / "trial_000" / ".lock")
    try:
        with pytest.raises(SystemExit) as stop:
            sweep.main(swept(dataset, tmp_path, "--param", "d_model=32,16"))
    finally:
        lock.release(file)
    out, err = capsys.readouterr()
    assert stop.value.code == 7
    assert out.splitlines() == ["trial_000 of 2: --model.d_model 32"]
    assert err.startswith("error: checkpoint.checkpoint_dir: ")
    assert f"trial_000 is in use: process {os.getpid()} on " in err
    assert len(err.splitlines()) == 1
    assert [row.get("state") for row in rows_of(tmp_path)] == [None, "running"]


@pytest.mark.parametrize("before", [{"state": "interrupted", "exit_code": 130}, {"state": "failed", "reason": "of old"}])
def test_what_an_earlier_start_has_recorded_is_not_the_end_of_this_one(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], before: dict[str, Any]
):
    """A trial that cannot even start after one that was cut off is a row with its reason."""
    (tmp_path / "trial_000").mkdir()
    (tmp_path / "trial_000" / "status.json").write_text(json.dumps(before))
    (tmp_path / "trial_000.log").write_text("error: of old\nThe last line\n")
    assert sweep.main(swept(dataset, tmp_path, "--param", "d_model=32", "--launcher", FAILING)) == 1
    assert "  error: no device here (exit code 3)\n" in capsys.readouterr().out
    [*_, row] = rows_of(tmp_path)
    assert (row["state"], row["reason"]) == ("failed", "error: no device here (exit code 3)")


def test_an_interruption_counts_with_its_exit_code():
    status = {"state": "interrupted", "exit_code": 143}
    assert stopped_with(status, 143, [sys.executable]) == 143
    assert stopped_with(status, 2, [sys.executable]) == 0
    assert stopped_with(status, 1, ["accelerate", "launch"]) == 143
    assert stopped_with({"state": "finished", "exit_code": 0}, 0, ["accelerate", "launch"]) == 0


def test_a_sweep_goes_on_with_the_same_numbers_alone(dataset: Path, tmp_path: Path):
    """However they are said: a file that was edited, or other tokens in the same place, make another sweep of it."""
    data = shutil.copytree(dataset, tmp_path / "data")
    (tmp_path / "c.yaml").write_text("model: {d_model: 32}\noptimizer: {weight_decay: 0.1}\nlr: 1e-4\n")

    def again(*more: str) -> None:
        folder = tmp_path / "sweep"
        folder.mkdir(exist_ok=True)
        sweep.recall(made(data, folder, "--config", str(tmp_path / "c.yaml"), "--param", "batch_size=4,8", *more))

    again("--batch_size", "2")
    again("--batch_size", "3", "--weight_decay", "1e-1", "--log_interval", "7", "--trials", "1")
    (tmp_path / "c.yaml").write_text("weight_decay: 0.1\nd_model: 32\nlogging: {log_interval: 9}\n")
    again()
    (tmp_path / "c.yaml").write_text("weight_decay: 0.2\n")
    with pytest.raises(ConfigError, match=r"of another sweep \(optimizer.weight_decay was 0.1, is 0.2\): type another"):
        again()
    with pytest.raises(ConfigError, match=r"of another sweep \(its parameters differ\)"):
        again("--weight_decay", "0.1", "--param", "seed=1,2")
    shutil.rmtree(data)
    write_dataset(data, stdlib_text(60_000)[::-1], stdlib_text(30_000))
    with pytest.raises(ConfigError, match=r"the tokens of data.train_data_path have changed"):
        again("--weight_decay", "0.1")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_trial_ends_with_its_sweep(tmp_path: Path):
    """Even if that is killed, and whatever starts the trial: here a launcher, whose pipe closes when it ends."""
    os.mkfifo(tmp_path / "pipe")
    launcher = ["-c", f"import signal; file = open({str(tmp_path / 'pipe')!r}, 'wb', 0); file.write(b'up'); signal.pause()"]
    program = (
        "import sys; from pathlib import Path; from accel_pretrain.sweep_trials import Trial, run_trial\n"
        f"run_trial(Trial(trial=0, parameters={{}}), Path({str(tmp_path)!r}), [sys.executable, *{launcher!r}], [])"
    )
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    process = subprocess.Popen([sys.executable, "-c", program], env=environment(), cwd=REPO)
    try:
        assert select.select([pipe], [], [], 120)[0]
        assert os.read(pipe, 9) == b"up"
        assert not select.select([pipe], [], [], 0.1)[0]  # control: it is there
        process.kill()
        assert select.select([pipe], [], [], 30)[0]
        assert os.read(pipe, 9) == b""
    finally:
        process.kill()
        process.wait()
        os.close(pipe)


@pytest.mark.slow
def test_a_sweep_that_is_cut_off_goes_on_with_the_trial_in_progress(dataset: Path, tmp_path: Path):
    """And a trial that is stopped in the middle ends in the same loss as one that is not."""
    words = swept(dataset, tmp_path / "sweep", "--param", "lr=1e-3..1e-2:log", "--trials", "2", "--checkpoint_interval", "20")
    words += ["--max_iters", "150"]
    command = launch(words, module="accel_pretrain.sweep")
    metrics = tmp_path / "sweep" / "trial_000" / "metrics.jsonl"
    process = subprocess.Popen(command, env=environment(), cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 40):
            assert process.poll() is None
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.communicate()
    assert [row.get("state") for row in rows_of(tmp_path / "sweep")] == [None, "running"]
    assert len(losses(tmp_path / "sweep" / "trial_000")) < 150
    done = subprocess.run(command, env=environment(), cwd=REPO, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    states = [(row.get("trial"), row.get("state")) for row in rows_of(tmp_path / "sweep")[2:]]
    assert states == [(0, "finished"), (1, "running"), (1, "finished")]
    rate = rows_of(tmp_path / "sweep")[1]["parameters"]["optimizer.lr"]
    alone = [*swept(dataset, tmp_path / "alone"), "--max_iters", "150", "--checkpoint_interval", "20", "--lr", rate]
    subprocess.run(launch(alone), env=environment(), cwd=REPO, capture_output=True, timeout=240, check=True)
    assert losses(tmp_path / "alone") == losses(tmp_path / "sweep" / "trial_000")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "nothing to vary; type --param"),
        (["--param", "lrr=1,2"], "there is no such key; did you mean"),
        (["--param", "lr=1e-3,high"], "optimizer.lr: expected a number"),
        (["--param", "lr=1..2", "--method", "grid"], "a grid needs lists"),
        (["--param", "lr=1,2", "--trials", "0"], "sweep.trials: must be at least 1"),
        (["--param", "checkpoint_dir=a,b"], "is the sweep's own"),
        (["--param", "lr=1,2", "--launcher", "acelerate launch"], "sweep.launcher: there is no program 'acelerate' to run"),
        (["--param", "lr=1,2", "--launcher", "accelerate 'launch"], 'sweep.launcher: "accelerate \'launch" cannot be split'),
        (["--param", "lr=1,2", "--resume_from", "never"], "checkpoint.resume_from: a sweep goes on with each trial by itself"),
    ],
)
def test_what_every_trial_would_trip_over_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
):
    assert expected in refused(sweep.main, capsys, *swept(dataset, tmp_path / "no"), *words)
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------------------------------------------------- wandb agent


def as_an_agent_does(monkeypatch: pytest.MonkeyPatch, folder: Path, values: dict[str, Any]) -> None:
    """Set what a ``wandb agent`` sets; the file as wandb itself writes it."""
    config_util = pytest.importorskip("wandb.sdk.lib.config_util", reason="pip install 'accel_pretrain[track]'")
    path = folder / "wandb" / "sweep-s1" / "config-r1.yaml"
    config_util.save_config_file_from_dict(str(path), {key: {"value": value} for key, value in values.items()})
    for name, value in (("SWEEP_ID", "s1"), ("RUN_ID", "r1"), ("SWEEP_PARAM_PATH", str(path))):
        monkeypatch.setenv(f"WANDB_{name}", value)


def test_the_values_of_an_agent_reach_the_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert wishes() == []
    values = {"optimizer.lr": 0.00125, "batch_size": 8, "model": {"dropout": 0.1}, "optimizer.fused": None, "compile": False}
    del values["optimizer.fused"]
    as_an_agent_does(monkeypatch, tmp_path, values)
    config = own_directory(load(RunConfig, None, wishes()))
    assert (config.optimizer.lr, config.training.batch_size, config.model.dropout) == (0.00125, 8, 0.1)
    assert (config.training.compile, config.logging.use_wandb) == (False, True)
    assert config.checkpoint.checkpoint_dir == Path("checkpoints/r1")
    as_an_agent_does(monkeypatch, tmp_path, {"optimizer.lrr": 1})
    with pytest.raises(
        ConfigError, match=r"the wandb sweep s1: optimizer.lrr: there is no such key; did you mean optimizer.lr"
    ):
        wishes()
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "gone.yaml")
    with pytest.raises(ConfigError, match=r"gone.yaml does not exist; start the agent in this folder"):
        wishes()


def test_the_shipped_sweep_names_keys_and_a_metric_that_exist():
    document = yaml.safe_load((REPO / "configs" / "sweep.yaml").read_text())
    keys = Keys(RunConfig)
    for name, about in document["parameters"].items():
        for value in about.get("values", [about.get("min"), about.get("max")]):
            assert isinstance(keys.find(name, str(value)), Leaf)
    assert document["metric"]["name"] == "eval/val_loss"
    file = document["command"][document["command"].index("--config") + 1]
    assert load(RunConfig, REPO / file).evaluation.eval_interval <= int(document["command"][-2])


@pytest.mark.slow
@pytest.mark.parametrize("passes_args", [True, False])
def test_a_trial_that_an_agent_starts_uses_its_values(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes_args: bool
):
    """With ``${args}`` in the sweep's command, and without; by wandb offline, whose own record has them too."""
    as_an_agent_does(monkeypatch, tmp_path, {"optimizer.lr": 0.00125})
    home = {f"WANDB_{name}_DIR": str(tmp_path / "home") for name in ("CONFIG", "CACHE", "DATA")}
    words = [*swept(dataset, tmp_path / "runs"), *(["--optimizer.lr=0.00125"] if passes_args else [])]
    done = subprocess.run(
        launch(words), env=environment(WANDB_MODE="offline", **home), cwd=tmp_path, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "r1"
    assert load(RunConfig, run / "config.yaml").optimizer.lr == 0.00125
    [record] = run.glob("wandb/offline-run-*-r1")
    assert record.is_dir()


@pytest.mark.slow
def test_a_function_of_an_agent_may_train(dataset: Path, tmp_path: Path):
    """``wandb.agent(function=...)`` calls it in a thread, where no signal handler can be set."""
    words = [*swept(dataset, tmp_path / "run")]
    program = (
        "import sys, threading; from accel_pretrain.train import main\n"
        f"thread = threading.Thread(target=lambda: codes.append(main({words!r}))); codes = []\n"
        "thread.start(); thread.join(); sys.exit(codes[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), cwd=REPO, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
