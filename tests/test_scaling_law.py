"""benchmarks/scaling_law.py: its arithmetic, and that it runs from data to picture. Its losses mean nothing here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from accel_pretrain import train
from accel_pretrain.preset import TOKENS_PER_PARAMETER
from benchmarks import quality_wsd, scaling_law
from benchmarks.scaling_law import Minimum
from tests.running import stdlib_text, write_dataset


def losses(parameters: np.ndarray, at: float) -> np.ndarray:
    """A parabola over the logarithm, lowest with 2 nats at so many parameters."""
    return 2 + 0.3 * (np.log10(parameters) - np.log10(at)) ** 2


def test_the_minimum_of_a_parabola_is_found_with_its_tokens():
    parameters = np.array([1e5, 4e5, 1.4e6, 3e6, 6e6])
    tokens = 1e13 / (6 * parameters)
    found = scaling_law.fit(parameters.tolist(), tokens.tolist(), losses(parameters, 1e6).tolist())
    assert found is not None
    assert found.inside
    assert found.parameters == pytest.approx(1e6, rel=1e-3)
    assert found.loss == pytest.approx(2)
    assert found.tokens_per_parameter == pytest.approx(1e13 / 6 / 1e12, rel=1e-3)
    said = scaling_law.verdict(found)
    assert f"1.67 tokens per parameter; the dial takes {TOKENS_PER_PARAMETER}" in said
    assert "OUTSIDE" not in said


def test_a_minimum_that_was_not_seen_is_said_to_be_none():
    parameters = np.array([1e5, 4e5, 1.4e6])
    tokens = (1e13 / (6 * parameters)).tolist()
    beyond = scaling_law.fit(parameters.tolist(), tokens, losses(parameters, 1e8).tolist())
    assert beyond is not None
    assert not beyond.inside
    assert "OUTSIDE" in scaling_law.verdict(beyond)
    upside_down = scaling_law.fit(parameters.tolist(), tokens, (-losses(parameters, 4e5)).tolist())
    assert upside_down is None
    assert "no minimum" in scaling_law.verdict(upside_down)


@pytest.mark.parametrize("depths", ["1,2", "1,2,2"])
def test_two_depths_are_no_parabola(depths: str):
    with pytest.raises(SystemExit, match="--depths"):
        scaling_law.main(["--depths", depths])


def in_this_process(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
    """The trainer's command line without a new interpreter, which would take most of the time."""
    assert command[1:3] == ["-m", "accel_pretrain.train"]
    return subprocess.CompletedProcess(command, train.main(command[3:]), "", "")


def check(document: dict[str, Any], picture: Path, said: str) -> None:
    rows = document["rows"]
    assert [row["depth"] for row in rows] == [1, 2, 3]
    assert [row["parameters"] for row in rows] == [65_600, 426_112, 1_376_448]
    done = [row["tokens"] * row["flops_per_token"] for row in rows]
    assert done == pytest.approx([document["flops"]] * 3, rel=2e-2), "equal operations"
    assert all(1 < row["loss"] < 5.7 for row in rows)
    assert len({row["loss"] for row in rows}) == 3
    assert picture.stat().st_size > 1000
    minimum = document["minimum"]
    found = None if minimum is None else Minimum(*(minimum[key] for key in ("parameters", "tokens", "loss", "inside")))
    assert scaling_law.verdict(found) in said


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    text = stdlib_text(22_000)
    dataset = write_dataset(tmp_path / "data", text[:20_000], text[20_000:])
    monkeypatch.setattr(quality_wsd, "subprocess", SimpleNamespace(run=in_this_process))
    monkeypatch.setattr(quality_wsd, "following", list)
    out, picture = tmp_path / "law.json", tmp_path / "law.png"
    words = ["--data", str(dataset), "--depths", "1,2,3", "--flops", "5e8", "--context", "32", "--threads", "1"]
    scaling_law.main([*words, "--precision", "no", "--out", str(out), "--plot", str(picture)])
    check(json.loads(out.read_text()), picture, capsys.readouterr().out)


@pytest.mark.slow
def test_it_takes_about_the_time_that_it_is_given(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]):
    out, picture = tmp_path / "law.json", tmp_path / "law.png"
    words = ["--data", str(dataset), "--depths", "1,2,3", "--minutes", "0.02", "--context", "32", "--threads", "1"]
    scaling_law.main([*words, "--precision", "no", "--out", str(out), "--plot", str(picture)])
    document = json.loads(out.read_text())
    assert 1e7 < document["flops"] < 1e12, "what one thread does in half a second"
    check(document, picture, capsys.readouterr().out)
