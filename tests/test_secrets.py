"""Secrets stay in the environment: a run directory, its logs and its trackers are searched for them, byte by byte."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from accel_pretrain import redaction, train
from accel_pretrain.config import RunConfig
from accel_pretrain.errors import ConfigError, PretrainError, reported
from accel_pretrain.redaction import looks_secret, redact, secret_in
from accel_pretrain.typed_yaml import load, parse_command_line
from tests.running import REPO, TINY, environment, launch, newest, refused

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_QwErTyUiOpAsDfGhJkLzXcVbNm",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCY",
    "MLFLOW_TRACKING_PASSWORD": "correct horse battery",
}


@pytest.fixture
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    redaction._secrets.cache_clear()
    monkeypatch.setattr(redaction, "_secrets", redaction._secrets.__wrapped__)


def found_in(folder: Path, *texts: str) -> list[str]:
    """Which secrets stand in any file below ``folder``, or in ``texts``."""
    content = b"\n".join(
        [*(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()), *map(str.encode, texts)]
    )
    return [name for name, value in SECRETS.items() if value.encode() in content]


def test_no_secret_is_in_anything_that_a_run_leaves_behind(dataset: Path, tmp_path: Path) -> None:
    """A real run with every secret in its environment, a tracker that records its config, and an offline wandb."""
    words = [*TINY, "--max_iters", "4", "--checkpoint_interval", "2", "--trackers", "[tensorboard, wandb]"]
    words += ["--wandb_run_name", "marker-of-this-run", "--train_data_path", str(dataset)]
    run = subprocess.run(
        launch([*words, "--checkpoint_dir", str(tmp_path / "run")]), cwd=REPO, capture_output=True, text=True, timeout=240,
        env=environment(WANDB_MODE="offline", WANDB_SILENT="true") | SECRETS,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert newest(tmp_path / "run").name == "checkpoint_00000004"
    assert found_in(tmp_path, run.stdout, run.stderr) == []
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())  # control: it is searched
    assert everything.count(b"marker-of-this-run") >= 3
    assert list((tmp_path / "run").rglob("*.wandb")), "wandb was to record something"


@pytest.mark.parametrize("key", ["max_token", "sample_token"])
def test_a_key_that_is_nearly_one_of_ours_is_no_secret(capsys: pytest.CaptureFixture[str], key: str):
    assert "did you mean" in refused(train.main, capsys, f"--{key}", "5")


@pytest.mark.parametrize("key", ["wandb_api_key", "logging.wandb_api_key", "hf-token", "password", "training.secret"])
def test_a_key_that_is_named_as_a_secret_is_refused_and_its_value_not_shown(key: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"{key}: s3cr3t-value\n")
    for refusal in (lambda: load(RunConfig, file), lambda: parse_command_line(RunConfig, [f"--{key}", "s3cr3t-value"])):
        with pytest.raises(ConfigError, match="a secret has no place in a config, which is recorded") as caught:
            refusal()
        assert "s3cr3t" not in caught.value.message
    with pytest.raises(ConfigError) as caught:  # control: another unknown key gets another answer
        parse_command_line(RunConfig, ["--wandb_project_name", "x"])
    assert "secret" not in caught.value.message


@pytest.mark.usefixtures("_secrets")
def test_a_value_that_is_a_secret_is_refused(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    for name, value in SECRETS.items():
        file.write_text(json.dumps({"logging": {"wandb_run_name": f"my {value}"}}))
        for words in (["--config", str(file)], ["--sample_prompts", json.dumps(["a", value])]):
            complaint = refused(train.main, capsys, "--train_data_path", dataset, *words)
            assert f"holds the value of the environment variable {name}; leave it out" in complaint
            assert value not in complaint


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("WANDB_API_KEY", True), ("HF_TOKEN", True), ("AWS_SECRET_ACCESS_KEY", True), ("NEPTUNE_API_TOKEN", True),
        ("CLEARML_API_SECRET_KEY", True), ("PGPASSWORD", True), ("comet.api-key", True), ("MYSQL_PASSWD", True),
        ("TOKENIZERS_PARALLELISM", False), ("HF_TOKEN_PATH", False), ("sample_tokens", False), ("max_tokens", False),
        ("token", True), ("PATH", False), ("tokenizer", False), ("KEYBOARD", False), ("monkey", False),
    ],
)  # fmt: skip
def test_names(name: str, secret: bool) -> None:
    assert looks_secret(name) == secret


@pytest.mark.usefixtures("_secrets")
def test_messages_logs_and_tracebacks_show_names_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    value = SECRETS["HF_TOKEN"]
    assert (secret_in(f"a {value}!"), secret_in("hf_")) == ("HF_TOKEN", None)
    assert redact(f"a {value}!") == "a [HF_TOKEN]!"
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    for error, code in ((PretrainError(f"at {value}"), 2), (RuntimeError(f"at {value}"), 1), (OSError(5, f"at {value}"), None)):
        with pytest.raises(SystemExit) as stop, reported():
            raise error
        assert code is None or stop.value.code == code
    with reported():
        logging.getLogger("x").warning("sent %s", value)
        try:
            raise ValueError(value)
        except ValueError:
            logging.getLogger("x").exception("badly")
    shown = capsys.readouterr().err
    assert value not in shown
    assert shown.count("[HF_TOKEN]") >= 5
    assert "Traceback" in shown
    with pytest.raises(RuntimeError, match="nothing to hide"), reported():  # control: other tracebacks stay as they are
        raise RuntimeError("nothing to hide")
