"""Mixtures: the turns keep their proportions in every prefix, and each dataset is read as it would be alone."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_pretrain import evaluate
from accel_pretrain.config import RunConfig, Splits, make_plan, open_splits
from accel_pretrain.data import DataConfig, TokenBatches
from accel_pretrain.errors import ConfigError, DataError
from accel_pretrain.mixture import LONGEST_CYCLE, Turns, cycle, join, open_data, parse_entry, weights_by_size, whole
from accel_pretrain.permutation import key_of
from accel_pretrain.shards import TokenSplit
from accel_pretrain.typed_yaml import load, parse_command_line, to_yaml
from tests.running import Train, assert_same_bits, losses, newest, stdlib_text, write_dataset

T = 16
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
weights = st.lists(st.integers(1, 400), min_size=1, max_size=9)


def part(number: int, *sizes: int) -> TokenSplit:
    """A dataset whose ids say which dataset it is, and where in it they are: ``number`` * 100,000 + place."""
    ends = np.cumsum(sizes)
    begin = 100_000 * number
    files = tuple(np.arange(begin + end - size, begin + end).astype("<u4") for end, size in zip(ends, sizes, strict=True))
    about = {"name": "t", "fingerprint": "t", "vocab_size": 10**6}
    return TokenSplit(
        source=f"part{number}", files=files, max_id=begin + int(ends[-1]) - 1, fingerprint=f"f{number}", tokenizer=about
    )


PARTS = [part(0, 40 * T + 1), part(1, 5 * T + 1, 8 * T + 3), part(2, 3 * T + 1)]
MIXTURE = join(PARTS, (5, 3, 2))


def batches(split: TokenSplit, **changed: Any) -> TokenBatches:
    return TokenBatches(split, **{"context_length": T, "batch_size": 1, "seed": 42, **changed})


def by_part(ids: np.ndarray) -> dict[int, np.ndarray]:
    """The rows of each dataset, in order."""
    return {number: ids[ids[:, 0] // 100_000 == number] for number in range(3)}


# -------------------------------------------------------------------------------------------------------------- whose turn


@quick
@given(weights=weights)
def test_no_prefix_strays_by_a_sample(weights: list[int]):
    turns, total = cycle(weights), sum(weights)
    counts = np.cumsum(turns[:, None] == np.arange(len(weights)), axis=0)
    owed = np.arange(1, total + 1)[:, None] * np.array(weights)
    bound = total * (1 - Fraction(1, max(2, 2 * len(weights) - 2)))
    assert np.abs(total * counts - owed).max() <= (bound if len(weights) > 1 else 0)
    assert counts[-1].tolist() == weights


def test_prefix_control_turns_in_a_row_stray():
    turns = np.repeat([0, 1], [7, 3])
    counts = np.cumsum(turns == 0)
    assert np.abs(counts - 0.7 * np.arange(1, 11)).max() > 1


@quick
@given(weights=weights, begin=st.integers(0, 10**15), count=st.integers(1, 300))
def test_turns_are_a_function_of_the_number(weights: list[int], begin: int, count: int):
    turns = Turns(weights)
    numbers = np.arange(begin, begin + count)
    parts, positions = turns(numbers)
    for number in {0, count // 2, count - 1}:
        one, place = turns(numbers[number : number + 1])
        assert (one[0], place[0]) == (parts[number], positions[number])
    for own in range(len(weights)):  # within a dataset, positions go on one by one
        assert np.array_equal(np.diff(positions[parts == own]), np.ones(max(0, int((parts == own).sum()) - 1)))
    assert sum(int(positions[parts == own][0]) for own in set(parts.tolist())) <= begin + len(weights)


def test_positions_begin_at_zero_and_leave_none_out():
    parts, positions = Turns([5, 3, 2])(np.arange(1000))
    for own, share in enumerate((500, 300, 200)):
        assert positions[parts == own].tolist() == list(range(share))


def test_the_longest_cycle_is_made_in_a_moment():
    turns = cycle([LONGEST_CYCLE // 2, LONGEST_CYCLE // 4, LONGEST_CYCLE // 8, LONGEST_CYCLE // 8 - 1, 1])
    assert np.bincount(turns).tolist() == [32768, 16384, 8192, 8191, 1]


# ----------------------------------------------------------------------------------------------------------- what is read


def test_proportions_hold_in_every_prefix_of_what_is_read():
    first = batches(MIXTURE).samples(np.arange(500))[:, 0] // 100_000
    for number, share in enumerate((0.5, 0.3, 0.2)):
        counts = np.cumsum(first == number)
        assert np.abs(counts - share * np.arange(1, 501)).max() < 1


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_each_dataset_is_read_as_it_would_be_alone(sampling: Any):
    mixed = by_part(batches(MIXTURE, sampling=sampling).samples(np.arange(1000)))
    for number, own in enumerate(PARTS):
        seed = 42 if number == 0 else key_of(42, number)
        alone = batches(own, sampling=sampling, seed=seed).samples(np.arange(len(mixed[number])))
        assert np.array_equal(mixed[number], alone)
        assert len(alone) == (500, 300, 200)[number]
        other = batches(own, sampling=sampling, seed=seed + 1).samples(np.arange(len(mixed[number])))
        assert not np.array_equal(mixed[number], other)  # control


def test_every_window_comes_once_per_epoch_of_its_dataset():
    mixed = by_part(batches(MIXTURE).samples(np.arange(2000)))
    for number, windows in ((0, 40), (1, 13), (2, 3)):
        starts = mixed[number][:, 0].tolist()
        for epoch in range(3):
            seen = Counter(starts[epoch * windows : (epoch + 1) * windows])
            assert len(seen) == windows
            assert max(seen.values()) == 1
        assert max(Counter(starts[: windows + windows // 2 + 1]).values()) >= 1


def test_no_sample_crosses_from_one_dataset_or_file_to_another():
    for sampling in ("shuffle", "random"):
        ids = batches(MIXTURE, sampling=sampling).samples(np.arange(3000))
        assert (np.diff(ids, axis=1) == 1).all()
        places = ids[ids[:, 0] // 100_000 == 1] - 100_000
        edge = 5 * T + 1  # between the two files of the second dataset
        assert ((places[:, 0] >= edge) == (places[:, -1] >= edge)).all()


def test_datasets_of_the_same_size_are_in_different_orders():
    twins = join([part(0, 40 * T + 1), part(1, 40 * T + 1)], (1, 1))
    mixed = by_part(batches(twins).samples(np.arange(80)))
    assert not np.array_equal(mixed[0], mixed[1] - 100_000)


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
@pytest.mark.parametrize(("world_size", "batch_size", "accumulation"), [(1, 24, 1), (2, 3, 4), (3, 4, 2), (4, 1, 6)])
def test_the_cluster_does_not_change_the_order(world_size: int, batch_size: int, accumulation: int, sampling: Any):
    shape: dict[str, Any] = {
        "world_size": world_size,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "sampling": sampling,
    }
    readers = [batches(MIXTURE, rank=rank, **shape) for rank in range(world_size)]
    rows = []
    for update in range(8):
        shares = [reader.micro_batches(24 * update) for reader in readers]
        rows += [shares[rank][step].ids_BS for step in range(accumulation) for rank in range(world_size)]
    assert np.array_equal(torch.cat(rows).numpy(), batches(MIXTURE, sampling=sampling).samples(np.arange(192)))


@quick
@given(begin=st.integers(0, 10**12), count=st.integers(1, 40), sampling=st.sampled_from(["shuffle", "random"]))
def test_a_run_can_go_on_at_any_sample(begin: int, count: int, sampling: Any):
    used, fresh = batches(MIXTURE, sampling=sampling), batches(MIXTURE, sampling=sampling)
    used.samples(np.arange(100))
    numbers = np.arange(begin, begin + count)
    one_by_one = np.concatenate([used.samples(numbers[i : i + 1]) for i in range(count)])
    assert np.array_equal(fresh.samples(numbers), one_by_one)


def test_a_mixture_of_many_files_reads_the_same_windows():
    """Many files are read row by row, few by a gather from each: the same rows."""
    sizes = [T + 1 + 7 * number for number in range(30)]
    reader = batches(join([part(0, *sizes), part(1, *sizes)], (2, 1)))
    ids = reader.samples(np.arange(400))
    assert (np.diff(ids, axis=1) == 1).all()
    assert ids.dtype == np.int64
    edges = np.cumsum(sizes)
    files = np.searchsorted(edges, ids % 100_000, side="right")
    assert (files[:, 0] == files[:, -1]).all()
    assert len(set(files[:, 0].tolist())) == 30


# ---------------------------------------------------------------------------------------------------------- as it is written


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a@0.7", "a", Fraction(7, 10)),
        ("a@1", "a", Fraction(1)),
        ("a@.5", "a", Fraction(1, 2)),
        ("a@2.", "a", Fraction(2)),
        ("user@host/a", "user@host/a", None),
        ("a@0.7@2", "a@0.7", Fraction(2)),
        ("a@1e3", "a@1e3", None),
        ("@0.5", "@0.5", None),
        ("a", "a", None),
    ],
)
def test_entries(text: str, path: str, weight: Fraction | None):
    assert parse_entry(Path(text)) == (Path(path), weight)


def test_weights_become_whole_numbers():
    assert whole([Fraction("0.7"), Fraction("0.3")]) == (7, 3)
    assert whole([Fraction(20), Fraction(40)]) == (1, 2)
    assert weights_by_size([300, 100]) == (3, 1)
    assert weights_by_size([10**9, 1]) == (10_000, 1)
    assert sum(weights_by_size([123_457, 345_679, 567_891])) <= 10_001


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_data_path": ()}, "train_data_path: the list is empty; name a dataset"),
        (
            {"train_data_path": ("a@0.5", "b")},
            "train_data_path: b has no weight and others have; write b@0.5, say, or leave all weights out",
        ),
        ({"train_data_path": ("a@1", "a@2")}, "train_data_path: a stands twice; name it once, and add up its weights"),
        ({"train_data_path": ("a@1", "b@0")}, "train_data_path: a weight of 0 reads nothing of that dataset; leave it out"),
        (
            {"train_data_path": ("a@0.1234567", "b@0.9")},
            "train_data_path: weights as fine as these do not come round within 65,536 samples; use at most four digits",
        ),
        (
            {"val_data_path": ("a@1", "b@1")},
            "val_data_path: a@1: every dataset is read once, so a weight has no meaning; leave @ and the numbers out",
        ),
    ],
)
def test_lists_that_mean_nothing(given: dict[str, tuple[str, ...]], message: str):
    paths: dict[str, Any] = {key: tuple(Path(name) for name in names) for key, names in given.items()}
    with pytest.raises(ConfigError) as caught:
        DataConfig(**paths)
    assert caught.value.problems[0] == message


def test_a_list_is_written_and_read_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("data:\n  train_data_path: [a@0.7, sub/b@0.3]\n  val_data_path:\n    - v\n")
    config = load(RunConfig, tmp_path / "c.yaml")
    assert config.data.train_data_path == (Path("a@0.7"), Path("sub/b@0.3"))
    (tmp_path / "d.yaml").write_text(to_yaml(config))
    again = load(RunConfig, tmp_path / "d.yaml").data
    assert again.train_data_path == (tmp_path / "a@0.7", tmp_path / "sub/b@0.3")
    assert again.val_data_path == (tmp_path / "v",)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("[a@0.7, b@0.3]", (Path("a@0.7"), Path("b@0.3"))),
        ("[a]", (Path("a"),)),
        ("a", Path("a")),
        ("a,b@0.3", Path("a,b@0.3")),
        ("null", None),
    ],
)
def test_a_list_is_typed_in_brackets(typed: str, meant: object):
    line = parse_command_line(RunConfig, ["--train_data_path", typed])
    assert load(RunConfig, None, line.overrides).data.train_data_path == meant


def test_a_mixture_trains_goes_on_and_refuses_another(
    folders: list[Path], run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Two updates and two more are four in one go, to the bit; other weights are refused."""
    typed = [
        f"[{', '.join(f'{folder}@{weight}' for folder, weight in zip(folders, own, strict=True))}]"
        for own in ((5, 3, 2), (5, 3, 1))
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_train(whole, "--max_iters", "4", "--train_data_path", typed[0]) == 0
    assert "Mixture: 50.00% " in capsys.readouterr().out
    assert run_train(cut, "--max_iters", "2", "--train_data_path", typed[0], "--schedule.name", "constant") == 0
    assert run_train(cut, "--max_iters", "4", "--train_data_path", typed[1], "--schedule.name", "constant") == 2
    assert "was trained on other tokens than" in capsys.readouterr().err
    assert run_train(cut, "--max_iters", "4", "--train_data_path", typed[0], "--schedule.name", "constant") == 0
    again = tmp_path / "again"
    assert run_train(again, "--max_iters", "4", "--train_data_path", typed[0], "--schedule.name", "constant") == 0
    assert_same_bits(newest(cut), newest(again))
    assert losses(whole)[0] == losses(again)[0]
    assert evaluate.main(["--checkpoint", str(cut), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["split"], report["data"]) == ("val", ", ".join(map(str, folders)))
    assert report["tokens"] == 32 * 3 * (3000 // 32)


# ----------------------------------------------------------------------------------------------------- as it is opened


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three datasets of bytes, each with a val split."""
    root, text = tmp_path_factory.mktemp("mixture"), stdlib_text(60_000)
    cuts = [(0, 30_000), (30_000, 45_000), (45_000, 50_000)]
    return [
        write_dataset(root / f"d{number}", text[begin:end], text[50_000 + 3000 * number :][:3000])
        for number, (begin, end) in enumerate(cuts)
    ]


def data_of(folders: list[Path], *weights: object, **more: Any) -> DataConfig:
    names = [f"{folder}@{weight}" for folder, weight in zip(folders, weights, strict=True)] if weights else folders
    return DataConfig(train_data_path=tuple(Path(name) for name in names), **more)


def test_open(folders: list[Path]):
    splits = open_splits(data_of(folders, 0.5, 0.3, 0.2))
    assert splits.train.weights == (5, 3, 2)
    assert [own.source for own in splits.train.parts] == [str(folder) for folder in folders]
    assert splits.train.source == ", ".join(map(str, folders))
    assert splits.train.tokens == sum(open_data(folder, "train").tokens for folder in folders) == 50_003
    assert (splits.train.documents, splits.train.utf8_bytes) == (3, 50_000)
    assert splits.train.tokenizer_path == folders[0] / "tokenizer"
    assert (splits.val.parts, len(splits.val.files), splits.val.tokens) == ((), 3, 9003)
    only = open_splits(data_of(folders, 0.5, 0.3, 0.2, val_data_path=(folders[1], folders[2])))
    assert only.val.tokens == 6002


def test_without_weights_every_dataset_has_its_share_of_the_tokens(folders: list[Path]):
    assert open_splits(data_of(folders)).train.weights == (6, 3, 1)


def test_a_list_of_one_is_that_dataset(folders: list[Path]):
    one = open_splits(data_of(folders[:1], 0.5)).train
    alone = open_splits(DataConfig(train_data_path=folders[0])).train
    assert (one.fingerprint, one.parts, one.source) == (alone.fingerprint, (), alone.source)


def test_the_fingerprint_covers_datasets_weights_and_order(folders: list[Path]):
    found = [
        open_splits(data).train.fingerprint
        for data in (
            data_of(folders, 5, 3, 2), data_of(folders, 0.5, 0.3, 0.2), data_of(folders, 5, 3, 1),
            data_of(folders[::-1], 2, 3, 5), data_of(folders[:2], 5, 3), DataConfig(train_data_path=folders[0]),
        )
    ]  # fmt: skip
    assert found[0] == found[1]
    assert len(set(found)) == 5


def test_one_tokenizer(folders: list[Path]):
    splits = [open_data(folder, "train") for folder in folders]
    other = dataclasses.replace(splits[1], tokenizer={"name": "gpt2", "fingerprint": "g", "vocab_size": 50_257})
    with pytest.raises(DataError) as caught:
        join([splits[0], other], (1, 1))
    assert caught.value.message == (
        f"{folders[1]} was made with tokenizer gpt2, {folders[0]} with bytes; make it again with the same: "
        f"python -m prep.tokenize SRC... --tokenizer {folders[0] / 'tokenizer'}"
    )
    bare = dataclasses.replace(splits[1], tokenizer=None, tokenizer_path=None, utf8_bytes=None, documents=None)
    mixed = join([bare, splits[0]], (1, 1))  # a bare file does not say; its largest id is checked by the plan
    assert (mixed.tokenizer, mixed.utf8_bytes, mixed.documents) == (splits[0].tokenizer, None, None)


def test_a_bare_file_in_a_mixture_has_no_val_split(folders: list[Path]):
    with pytest.raises(ConfigError, match=r"data\.val_data_path: not given; a bare file of ids has no val split"):
        open_splits(data_of([folders[0], folders[1] / "train.bin"], 1, 1))
    assert open_splits(data_of([folders[0], folders[1] / "train.bin"], 1, 1, val_data_path=folders[0])).val.tokens == 3001


def test_what_looks_like_a_mixture_and_is_one_path(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"several datasets with weights are written '\[DIR@0\.7, DIR@0\.3\]'"):
        open_splits(DataConfig(train_data_path=tmp_path / "a@0.7,b@0.3"))


def test_the_plan_says_how_often_each_dataset_is_read(folders: list[Path]):
    config = load(RunConfig, None, ())
    model = dataclasses.replace(config.model, context_length=32, d_model=32, num_layers=1, num_heads=2, d_ff=64)
    training = dataclasses.replace(config.training, batch_size=8, max_iters=100)
    data = data_of(folders, 0.5, 0.3, 0.2)
    splits = open_splits(data)
    plan = make_plan(dataclasses.replace(config, model=model, training=training, data=data), splits, 1)
    windows = [(own.tokens - 1) // 32 for own in splits.train.parts]
    assert plan.samples_per_epoch == sum(windows)
    assert plan.mixture == tuple(
        f"{share:.2%} {folder}: {own.tokens:,} tokens, read {800 * share / count:.2f} times"
        for share, folder, own, count in zip((0.5, 0.3, 0.2), folders, splits.train.parts, windows, strict=True)
    )
    assert f"mixture              50.00% {folders[0]}" in plan.describe()
    single = Splits(splits.train.parts[0], splits.val)
    assert make_plan(dataclasses.replace(config, model=model, training=training), single, 1).mixture == ()
