"""Weights of a mixture that move: still a function of the sample's number, and as straight a line as whole samples allow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_pretrain.curriculum import MovingTurns
from accel_pretrain.data import TokenBatches
from accel_pretrain.mixture import Turns, open_data
from tests.running import Train, assert_same_bits, losses, newest, stdlib_text, write_dataset

MOVING = (
    "--mixture_end",
    "[0.2, 0.8]",
    "--mixture_end_tokens",
    str(40 * 32),
    "--checkpoint_interval",
    "5",
    "--max_iters",
    "10",
)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    weights=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=4).filter(
        lambda pairs: all(any(column) for column in zip(*pairs, strict=True))
    ),
    over=st.integers(1, 700),
    cut=st.integers(0, 900),
)
def test_every_part_counts_its_own_samples(weights: list[tuple[int, int]], over: int, cut: int):
    """However the numbers are asked for: the n-th sample of a part is number n of it."""
    begin, end = zip(*weights, strict=True)
    turns = MovingTurns(begin, end, over)
    parts, positions = turns(np.arange(900))
    for part in range(len(weights)):
        assert np.array_equal(positions[parts == part], np.arange((parts == part).sum()))
    assert turns.counts(cut) == np.bincount(parts[:cut], minlength=len(weights)).tolist()
    again = [own[cut:] for own in (parts, positions)]
    assert all(np.array_equal(*pair) for pair in zip(turns(np.arange(cut, 900)), again, strict=True))


def test_the_shares_follow_a_straight_line_and_stay_at_its_end():
    turns = MovingTurns((9, 1, 0), (1, 1, 8), 64_000)
    parts, _ = turns(np.arange(100_000))
    for begin in range(0, 64_000, 8000):
        way = (begin + 4000) / 64_000
        share = np.bincount(parts[begin : begin + 8000], minlength=3) / 8000
        assert share == pytest.approx([0.9 - 0.8 * way, 0.1, 0.8 * way], abs=0.004)
    assert np.bincount(parts[64_000:], minlength=3) / 36_000 == pytest.approx([0.1, 0.1, 0.8], abs=0.001)
    still, _ = Turns((9, 1))(np.arange(100_000))
    assert np.bincount(still[-8000:])[0] / 8000 == pytest.approx(0.9)  # control


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, text = tmp_path_factory.mktemp("two"), stdlib_text(30_000)
    write_dataset(folder / "lower", text.lower(), text[:3000].lower())
    write_dataset(folder / "upper", text.upper(), text[:3000].upper())
    return f"[{folder}/lower@0.8, {folder}/upper@0.2]"


def test_processes_read_the_same_samples_together(two: str):
    folders = tuple(Path(part.strip()) for part in two.strip("[]").split(","))
    split = open_data(folders, "train", mixed=True, end=[0.2, 0.8], end_tokens=40 * 32)
    alone = TokenBatches(split, context_length=32, batch_size=8, seed=1).micro_batches(16)[0].ids_BS
    ranks = [TokenBatches(split, context_length=32, batch_size=4, seed=1, world_size=2, rank=rank) for rank in range(2)]
    shares = [own.micro_batches(16)[0].ids_BS for own in ranks]
    assert np.array_equal(np.concatenate(shares), alone)


def test_a_restart_gives_the_same_bits_and_other_weights_are_refused(
    run_train: Train, tmp_path: Path, two: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--train_data_path", two)
    assert run_train(tmp_path / "whole", *data, *MOVING) == 0
    assert "Mixture: 80.00% to 20.00%" in capsys.readouterr().out
    again = (
        "--resume_from",
        str(tmp_path / "whole" / "checkpoint_00000005"),
        *MOVING,
        "--checkpoint_dir",
        str(tmp_path / "parts"),
    )
    assert run_train(tmp_path / "parts", *data, *again) == 0
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert run_train(tmp_path / "still", *data, "--max_iters", "10") == 0
    assert losses(tmp_path / "still") != losses(tmp_path / "whole")
    assert run_train(tmp_path / "whole", *data, *MOVING, "--max_iters", "12", "--mixture_end", "[0.3, 0.7]") == 2
    assert "was trained on other tokens than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mixture_end", "[1, 2, 3]", "--mixture_end_tokens", "9"), "mixture_end: 3 weights for 2 datasets"),
        (("--mixture_end", "[1, -2]", "--mixture_end_tokens", "9"), "mixture_end: weights are at least 0"),
        (("--mixture_end", "[1, 2]"), "mixture_end and mixture_end_tokens: give both, or neither"),
    ],
)
def test_what_does_not_fit_is_refused(
    run_train: Train, tmp_path: Path, two: str, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert run_train(tmp_path, "--train_data_path", two, *words) == 2
    assert message in capsys.readouterr().err
