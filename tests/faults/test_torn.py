"""metrics.jsonl and status.json, cut at every byte: what is whole is read, what follows is appended, nothing crashes (F31)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from accel_pretrain.metrics import MetricsFile, read_metrics
from accel_pretrain.plot import main as plot
from accel_pretrain.status import STATUS, RunStatus, read_status
from tests.faults.tally import TALLY


@pytest.fixture
def metrics(scratch: Path) -> bytes:
    file = MetricsFile(scratch, 0)
    for step in range(1, 5):
        file.append(step, 100 * step, {"train/loss": 5.0 / step, "note/é": float("nan")})
    file.close()
    return (scratch / "metrics.jsonl").read_bytes()


def test_metrics_cut_at_every_byte(scratch: Path, metrics: bytes) -> None:
    path = scratch / "metrics.jsonl"
    for cut in range(len(metrics) + 1):
        path.write_bytes(metrics[:cut])
        whole = metrics[:cut].count(b"\n")
        steps = [row["step"] for row in read_metrics(path)]
        assert steps in ([*range(1, whole + 1)], [*range(1, whole + 2)])  # the line break alone may be missing
        file = MetricsFile(scratch, resumed_step=whole)
        file.append(whole + 1, 0, {"train/loss": 1.0})
        file.close()
        TALLY.add("torn logs")
        assert [row["step"] for row in read_metrics(path)] == [*range(1, whole + 2)]
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_metrics_with_lost_sectors(scratch: Path, metrics: bytes) -> None:
    """Zeros and garbage in any place cost the lines that they are in, and no other."""
    draw = random.Random(0)
    for _ in range(200):
        begin, length = draw.randrange(len(metrics)), draw.randrange(1, 200)
        torn = metrics[:begin] + draw.choice((bytes(length), draw.randbytes(length))) + metrics[begin + length :]
        (scratch / "metrics.jsonl").write_bytes(torn)
        TALLY.add("torn logs")
        found = [row for row in read_metrics(scratch / "metrics.jsonl") if row["step"] in range(1, 5)]
        untouched = set(torn.split(b"\n")) & set(metrics.strip().split(b"\n"))
        assert {row["step"] for row in found} >= {json.loads(line)["step"] for line in untouched}
        MetricsFile(scratch, resumed_step=4).close()


def test_control_a_reader_that_believes_every_line_fails(scratch: Path, metrics: bytes) -> None:
    caught = False
    try:
        [json.loads(line) for line in metrics[:-5].decode().splitlines()]
    except ValueError:
        caught = True
    assert TALLY.mutant(caught)


def test_a_plot_of_a_torn_log(scratch: Path, metrics: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "metrics.jsonl").write_bytes(metrics[:-7])
    assert plot([str(scratch)]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_status_cut_at_every_byte(scratch: Path) -> None:
    with RunStatus(scratch) as status:
        status.progress(step=3, tokens=300, checkpoint=scratch / "checkpoint_00000003")
    content = (scratch / STATUS).read_bytes()
    assert read_status(scratch)["step"] == 3
    for cut in range(len(content)):
        (scratch / STATUS).write_bytes(content[:cut])
        TALLY.add("torn logs")
        assert read_status(scratch) in ({}, json.loads(content))
    for odd in (b"[" * 100_000, b"\xff\xfe", b"null", b"[]", b"1"):
        (scratch / STATUS).write_bytes(odd)
        assert read_status(scratch) == {}
    with RunStatus(scratch) as status:
        status.end("finished", 0)
    assert read_status(scratch)["state"] == "finished"
