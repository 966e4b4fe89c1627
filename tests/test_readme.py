"""What the README says can be pasted: its commands run, its files exist, its tables name things that are there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from accel_pretrain.config import RunConfig
from accel_pretrain.typed_yaml import load, parse_command_line
from tests.running import REPO, environment, stdlib_text

README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line and not line.startswith("make")]
TABLE = [line for line in README.splitlines() if line.startswith("|")]
TABLE_COMMANDS = [cell for line in TABLE for cell in re.findall(r"`([^`]+)`", line) if "accel_pretrain.train --config" in cell]
SMALL = (
    "--max_iters 2 --d_model 32 --num_layers 1 --num_heads 2 --d_ff 32 --context_length 16 --batch_size 2 "
    "--eval_iters 1 --cpu_threads 1"
)


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"\b[A-Z]+_MINUTES\b|\bOVERHEAD\b|\bLOADER\b|\bEVALUATION\b", README)


def test_the_commands_for_own_text_run_as_they_stand(tmp_path: Path) -> None:
    """Pasted in order into one folder; only the size of the training is scaled down, by overrides at the end."""
    (tmp_path / "books").mkdir()
    for number in range(3):
        text = stdlib_text(40_000)[number * 10_000 :]
        (tmp_path / "books" / f"{number}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "accelerate_config.yaml").write_bytes((REPO / "accelerate_config.yaml").read_bytes())
    own = [command for command in COMMANDS if "books" in command]
    assert len(own) == 4
    for command in own:
        command = command.replace("train:8192", "train:400")
        if "accel_pretrain.train" in command:
            command += " " + SMALL
        if "accel_pretrain.sample" in command:
            command += " --max_new_tokens 5"
        words = command.replace("accelerate launch", f"{sys.executable} -m accelerate.commands.launch")
        words = re.sub(r"^python ", f"{sys.executable} ", words)
        done = subprocess.run(words, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs/books/latest").exists()
    assert (tmp_path / "hf/books/tokenizer.json").exists()


def test_every_launch_line_parses() -> None:
    assert len(TABLE_COMMANDS) >= 4
    for command in TABLE_COMMANDS:
        words = shlex.split(command.partition("accel_pretrain.train")[2].replace("C.yaml", str(REPO / "configs/demo.yaml")))
        line = parse_command_line(RunConfig, words)
        load(RunConfig, line.config, line.overrides)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_linked_files_exist(target: str) -> None:
    assert (REPO / target).exists()


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", README))))
def test_named_modules_exist(module: str) -> None:
    path = REPO / module.replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()
