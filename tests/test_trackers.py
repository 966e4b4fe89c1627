"""Whatever a tracker does, the run goes on and ``metrics.jsonl`` is complete."""

from __future__ import annotations

import contextlib
import errno
import http.server
import importlib.util
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from accel_pretrain import outbox
from accel_pretrain.errors import ConfigError
from accel_pretrain.trackers import LoggingConfig, RunLog, _postfix
from tests.running import REPO, TINY, Train, environment, launch, newest, rows


class Recorder(GeneralTracker):
    """A tracker that remembers what it was told, and fails in the method that is named."""

    name, requires_logging_directory = "recorder", False

    def __init__(self, fails_in: str = "") -> None:
        super().__init__()
        self.fails_in = fails_in
        self.calls: list[tuple[str, Any, Any]] = []

    @property
    def tracker(self) -> Recorder:
        return self

    def _call(self, method: str, values: Any = None, step: int | None = None) -> None:
        self.calls.append((method, values, step))
        if method == self.fails_in:
            raise RuntimeError(f"no network in {method}\nand much more")

    def start(self) -> None:
        self._call("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._call("store_init_configuration", values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._call("log", values, step)

    def finish(self) -> None:
        self._call("finish")


class TableRecorder(Recorder):
    """One that has tables."""

    def log_table(self, table_name: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        self._call("log_table", (table_name, columns, data), step)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_tracker_gets_the_config_and_the_rows_of_the_file(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(LoggingConfig, "tracker_names", [recorder])
    assert run_train(tmp_path, "--max_iters", "3", "--eval_interval", "2") == 0
    assert [method for method, _, _ in recorder.calls] == ["start", "store_init_configuration", *["log"] * 5, "finish"]
    settings = recorder.calls[1][1]
    assert (settings["training.max_iters"], settings["model.dropout"], settings["optimizer.name"]) == (3, 0.0, "adamw")
    assert (settings["plan.tokens_per_step"], settings["about.versions.torch"]) == (128, torch.__version__)
    assert {"about.git", "about.host", "about.command"} <= settings.keys()
    logged = [values | {"step": step} for method, values, step in recorder.calls if method == "log"]
    assert logged == [{key: value for key, value in row.items() if key != "time"} for row in rows(tmp_path)]
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("method", ["start", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_costs_one_warning(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    recorder = Recorder(fails_in=method)
    monkeypatch.setattr(LoggingConfig, "tracker_names", [recorder])
    assert run_train(tmp_path, "--max_iters", "3") == 0
    assert warnings_of(caplog) == [f"tracker recorder failed and gets no more metrics: no network in {method}"]
    assert recorder.calls[-1][0] == method
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 3]
    assert newest(tmp_path).name == "checkpoint_00000003"


class Hanging(Recorder):
    """One whose method ``hangs_in`` does not come back before the test is over."""

    def __init__(self, hangs_in: str) -> None:
        super().__init__()
        self.hangs_in, self.over = hangs_in, threading.Event()

    def _call(self, method: str, values: Any = None, step: int | None = None) -> None:
        super()._call(method, values, step)
        if method == self.hangs_in:
            self.over.wait(60)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("start", "did not start within 0 s"),
        ("log", "does not answer: 4 calls wait"),
        ("finish", "did not finish in time; what it has not sent is in metrics.jsonl alone"),
    ],
)
def test_a_tracker_that_hangs_costs_one_warning_and_no_time(
    run_train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
    reason: str,
) -> None:
    """The other tracker gets everything."""
    hanging, whole = Hanging(method), Recorder()
    for name, value in (("AWAITED", 0.1), ("START", 0.2), ("_ROWS", 4)):
        monkeypatch.setattr(outbox, name, value)
    monkeypatch.setattr("accel_pretrain.session.PATIENT_TEARDOWN", 3.0)
    monkeypatch.setattr(LoggingConfig, "tracker_names", [hanging, whole])
    try:
        monkeypatch.setattr(whole, "log", lambda values, step=None, **_: Recorder.log(whole, values, step))
        begin = time.monotonic()
        assert run_train(tmp_path, "--max_iters", "9") == 0
        assert time.monotonic() - begin < 50
    finally:
        hanging.over.set()
    assert warnings_of(caplog) == [f"tracker recorder failed and gets no more metrics: {reason}"]
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, 10), 9]
    assert whole.calls[-1][0] == "finish"
    assert newest(tmp_path).name == "checkpoint_00000009"


def test_who_waits_for_a_tracker_at_the_end_is_told_and_ctrl_c_leaves(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(Hanging):
        def finish(self) -> None:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
            super().finish()

    hanging = Interrupted("finish")
    monkeypatch.setattr(outbox, "SILENT", 0.2)
    monkeypatch.setattr(LoggingConfig, "tracker_names", [hanging])
    begin = time.monotonic()
    try:
        assert run_train(tmp_path, "--max_iters", "1") == 0
        assert time.monotonic() - begin < 40  # it would be 58 s
    finally:
        hanging.over.set()
    assert re.findall(r"^waiting for .*", capsys.readouterr().out, re.MULTILINE) == [
        "waiting for recorder, up to 58 s more; Ctrl+C leaves"
    ]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


def test_a_tracker_that_is_slow_gets_everything_and_holds_up_nothing(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Slow(Recorder):
        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            time.sleep(0.2)
            self._call("log", values, step)

    slow = Slow()
    monkeypatch.setattr(LoggingConfig, "tracker_names", [slow])
    assert run_train(tmp_path, "--max_iters", "6") == 0
    found = rows(tmp_path)
    assert found[5]["time"] - found[0]["time"] < 5 * 0.2  # else it would be 1 s at least
    assert [step for method, _, step in slow.calls if method == "log"] == [1, 2, 3, 4, 5, 6, 6]
    assert warnings_of(caplog) == []


def test_a_tracker_that_is_not_installed_costs_one_warning(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    assert run_train(tmp_path, "--max_iters", "2", "--use_wandb", "--trackers", "wandb") == 0
    assert warnings_of(caplog) == ["wandb is not installed, so it gets no metrics (pip install 'accel_pretrain[track]')"]
    assert len(rows(tmp_path)) == 3


@pytest.mark.parametrize("name", ["wanbd", "json", "os.path", "no.such"])
def test_a_tracker_that_nobody_knows_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoggingConfig(trackers=(name,))
    assert caught.value.message.startswith(f"trackers: {name}: not among all, aim, ")


@pytest.mark.parametrize("name", ["log_interval", "sample_interval", "sample_tokens"])
def test_amounts_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: must be at least 1"):
        LoggingConfig(**{name: 0})  # type: ignore[arg-type]


def test_the_bar_shows_loss_rate_and_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, after the next update; a file gets no bar."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    os.set_blocking(master, False)
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        log = RunLog(Accelerator(cpu=True), tmp_path, step=0, total=10)
        row = {"train/loss": 3.25, "train/learning_rate": 6e-4, "train/tokens_per_sec": 12345.6}
        log.metrics(1, 8, row)
        log.metrics(2, 16, row | {"train/mfu": 0.314})
        log.metrics(2, 16, {"eval/val_loss": 3.0})  # which leaves it as it is
        time.sleep(0.15)  # tqdm draws ten times a second
        log.advance(5)
        log.close()
        shown = (screen.read(8192) or b"").decode()
    assert "loss 3.250, LR 6.0e-04, 12.3k tokens/s, MFU 31%" in shown
    assert re.search(r"5/10 \[\d\d:\d\d<\d\d:\d\d, ", shown)
    assert _postfix(row).endswith(", MFU n/a")


def test_a_line_that_nobody_reads_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        log = RunLog(Accelerator(cpu=True), tmp_path, step=0, total=1)
        log.line("Iter 1")
        log.line("Iter 2")
        log.close()


# -------------------------------------------------------------------------------------------------------------- samples

SAMPLES = ("--max_iters", "3", "--sample_interval", "2", "--sample_tokens", "5", "--sample_prompts", "[class A, '    x = 1,']")


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_samples_go_to_the_file_the_terminal_and_tables(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, plain = TableRecorder(), Recorder()
    monkeypatch.setattr(LoggingConfig, "tracker_names", [tables, plain])
    assert run_train(tmp_path, *SAMPLES) == 0
    found = recorded(tmp_path)
    assert [(row["step"], row["prompt"]) for row in found][:2] == [(2, "class A"), (2, "    x = 1,")]
    assert all(row["text"] for row in found)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Sample at iteration ")]
    assert [line.partition(": ")[0] for line in shown] == [f"Sample at iteration {row['step']}" for row in found]
    assert all(line.partition(": ")[2].startswith(row["prompt"]) for line, row in zip(shown, found, strict=True))
    logged = {step: values for method, values, step in tables.calls if method == "log_table"}
    assert logged == {
        step: ("samples", ["step", "prompt", "text"], [list(row.values()) for row in found if row["step"] == step])
        for step in {row["step"] for row in found}
    }
    assert not any("samples" in str(values) for method, values, _ in plain.calls if method == "log")


def test_a_tracker_that_fails_at_samples_is_dropped_alone(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = TableRecorder(fails_in="log_table"), TableRecorder()
    monkeypatch.setattr(LoggingConfig, "tracker_names", [broken, whole])
    assert run_train(tmp_path, *SAMPLES) == 0
    assert warnings_of(caplog) == ["tracker recorder failed and gets no more metrics: no network in log_table"]
    assert broken.calls[-1][0] == "log_table"
    assert [method for method, _, _ in whole.calls].count("log") == 4
    assert whole.calls[-1][0] == "finish"
    assert len(recorded(tmp_path)) >= 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_texts(run_train: Train, tmp_path: Path) -> None:
    reason = "pip install 'accel_pretrain[track]'"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=reason)
    assert run_train(tmp_path, *SAMPLES, "--trackers", "tensorboard") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "transformer-lm")).Reload()
    for number, prompt in enumerate(("class A", "    x = 1,")):
        [first, *_] = events.Tensors(f"samples/{number}/text_summary")
        text = next(row["text"] for row in recorded(tmp_path) if row["prompt"] == prompt)
        assert first.step == 2
        assert first.tensor_proto.string_val[0].decode() == "    " + (prompt + text).replace("\n", "\n    ")


def test_wandb_gets_a_table(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install 'accel_pretrain[track]'")
    words = ["--train_data_path", str(dataset), "--checkpoint_dir", str(tmp_path / "run"), *TINY, *SAMPLES, "--use_wandb"]
    away = {"WANDB_MODE": "offline", "WANDB_CONFIG_DIR": str(tmp_path / "home"), "WANDB_CACHE_DIR": str(tmp_path / "home")}
    done = subprocess.run(
        launch(words), env=environment(**away, WANDB_SILENT="true", WANDB_DATA_DIR=str(tmp_path / "home")), cwd=REPO,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    tables = sorted((tmp_path / "run").glob("wandb/offline-run-*/files/media/table/samples*.json"))
    data = [row for path in tables for row in json.loads(path.read_text())["data"]]
    assert sorted(map(tuple, data)) == sorted((row["step"], row["prompt"], row["text"]) for row in recorded(tmp_path / "run"))
    assert len(data) >= 2


def test_a_sample_commands_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it end a run on a terminal that has no such character; the file holds what was written."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    log = RunLog(Accelerator(cpu=True), tmp_path, step=0, total=9)
    log.samples(7, [("a\nb", "\x1b[31m\té\r\u2028.")])
    log.close()
    shown.seek(0)
    assert shown.read() == "Sample at iteration 7: a b [31m ?  .\n"
    assert recorded(tmp_path) == [{"step": 7, "prompt": "a\nb", "text": "\x1b[31m\té\r\u2028."}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def write(_: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", shown := io.StringIO())
    monkeypatch.setattr(shown, "write", write)
    log = RunLog(Accelerator(cpu=True), tmp_path, step=0, total=9)
    (tmp_path / "samples.jsonl").symlink_to("/dev/full")
    for step in (1, 2):
        log.samples(step, [("a", "b")])
    log.close()
    assert ["samples.jsonl could not be written" in warning for warning in warnings_of(caplog)] == [True]


def test_prompts_are_one_or_several() -> None:
    assert LoggingConfig().prompts == ("",)
    assert LoggingConfig(sample_prompt="a, b").prompts == ("a, b",)
    assert LoggingConfig(sample_prompts=("a", "")).prompts == ("a", "")
    with pytest.raises(ConfigError) as caught:
        LoggingConfig(sample_prompt="a", sample_prompts=("b",), sample_temperature=-1.0)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["sample_temperature", "sample_prompts"]


# ------------------------------------------------------------------------------------------------- the real ones, in trouble


def warned(dataset: Path, folder: Path, *words: str, **variables: str) -> list[str]:
    """The warnings of a real process that must train to its end."""
    home = {f"WANDB_{name}_DIR": str(folder / "home") for name in ("CONFIG", "CACHE", "DATA")}
    command = ["--train_data_path", str(dataset), "--checkpoint_dir", str(folder / "run"), *TINY, "--max_iters", "9", *words]
    done = subprocess.run(
        launch(command), env=environment(HOME=str(folder / "home"), WANDB_SILENT="true", **home, **variables), cwd=folder,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert newest(folder / "run").name == "checkpoint_00000009"
    assert [row["step"] for row in rows(folder / "run")] == [*range(1, 10), 9]
    return [line for line in done.stderr.splitlines() if line.startswith(("WARNING", "ERROR", "Traceback"))]


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server of wandb's that knows no such key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b'{"errors": [{"message": "invalid api key", "code": 401}]}'
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.slow
def test_wandb_with_a_wrong_key_costs_one_warning(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install 'accel_pretrain[track]'")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        found = warned(dataset, tmp_path, "--use_wandb", WANDB_API_KEY="0123456789" * 4, WANDB_BASE_URL=url)
        server.shutdown()
    assert found == ["WARNING: tracker wandb failed and gets no more metrics: invalid api key"]


@pytest.mark.slow
def test_wandb_whose_server_is_down_costs_one_warning_and_a_bounded_time(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install 'accel_pretrain[track]'")
    with socket.socket() as taken:  # a port on which nobody answers
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        found = warned(dataset, tmp_path, "--use_wandb", WANDB_API_KEY="0123456789" * 4, WANDB_BASE_URL=url)
    [line] = found
    assert line.startswith("WARNING: tracker wandb failed and gets no more metrics: ")


@pytest.mark.slow
def test_wandb_without_a_key_records_here(dataset: Path, tmp_path: Path) -> None:
    """It asks nobody for one, and says how to send what it has recorded."""
    pytest.importorskip("wandb", reason="pip install 'accel_pretrain[track]'")
    [line] = warned(dataset, tmp_path, "--use_wandb")
    assert "wandb knows no key on this machine, so the run is recorded here; to send it: wandb login; wandb sync " in line
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_for_a_tracker_costs_one_warning(dataset: Path, tmp_path: Path) -> None:
    """That of metrics.jsonl has a test of its own; checkpoints are on another disk here."""
    pytest.importorskip("tensorboard", reason="pip install 'accel_pretrain[track]'")
    (full := tmp_path / "full").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        (full / "board").mkdir()
        with contextlib.suppress(OSError), (full / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "transformer-lm").symlink_to(full / "board")
        [line] = warned(dataset, tmp_path, "--trackers", "tensorboard")
        assert line.startswith("WARNING: tracker tensorboard failed and gets no more metrics: ")
    finally:
        subprocess.run(["umount", str(full)], check=True)
