"""The order of the data: one list of samples, whatever reads it, each window once per epoch, every id where it belongs."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from accel_pretrain.data import Batch, TokenBatches, Windows
from accel_pretrain.errors import DataError
from accel_pretrain.shards import TokenSplit
from tests.reference import get_batch

T = 64


def split_of(*sizes: int) -> TokenSplit:
    """Files whose ids are 0, 1, 2, ... through all of them: an id says where it was read."""
    ends = np.cumsum(sizes)
    files = tuple(np.arange(end - size, end).astype("<u2") for end, size in zip(ends, sizes, strict=True))
    return TokenSplit(source="somewhere", files=files, max_id=int(ends[-1]) - 1, fingerprint="f")


def batches(split: TokenSplit, **changed: Any) -> TokenBatches:
    return TokenBatches(split, **{"context_length": T, "batch_size": 1, "seed": 42, **changed})


def first_ids(reader: TokenBatches, count: int, begin: int = 0) -> list[int]:
    return reader.samples(np.arange(begin, begin + count))[:, 0].tolist()


# ----------------------------------------------------------------------------------------------------------- what is read


def test_batch_is_int64_inputs_and_targets_shifted_by_one():
    reader = batches(split_of(8000), batch_size=4)
    [batch] = reader.micro_batches(0)
    assert batch.inputs_BT.shape == batch.targets_BT.shape == (4, T)
    assert batch.inputs_BT.dtype == batch.targets_BT.dtype == torch.int64
    assert torch.equal(batch.targets_BT, batch.inputs_BT + 1)  # ids count up, so the next one is one more
    assert torch.equal(batch.inputs_BT[:, 1:], batch.targets_BT[:, :-1])
    assert batch.to(torch.device("cpu")) is batch


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_every_sample_is_a_slice_of_the_file(sampling: Any):
    ids = np.random.default_rng(0).integers(0, 65536, size=7777).astype("<u2")
    split = TokenSplit(source="s", files=(ids,), max_id=65535, fingerprint="f")
    located = batches(split_of(7777), sampling=sampling).samples(np.arange(500))[:, 0]
    inputs, targets = get_batch(ids, T, located.tolist())
    found = Batch(torch.from_numpy(batches(split, sampling=sampling).samples(np.arange(500))))
    assert np.array_equal(found.inputs_BT.numpy(), inputs)
    assert np.array_equal(found.targets_BT.numpy(), targets)
    assert found.ids_BS.max() > 32767  # uint16 did not become negative
    assert not np.array_equal(
        found.inputs_BT.numpy(), get_batch(ids, T, (located + 1).clip(max=7777 - T - 1).tolist())[0]
    )  # control


@pytest.mark.parametrize("sizes", [(8000,), (65, 66, 129, 500, 4000), (5, 2400, 3, 320)], ids=str)
@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_no_sample_crosses_from_one_file_to_another(sizes: tuple[int, ...], sampling: Any):
    ids = batches(split_of(*sizes), sampling=sampling).samples(np.arange(3000))
    assert np.array_equal(np.diff(ids, axis=1), np.ones((3000, T)))
    edges = np.cumsum(sizes)
    files = np.searchsorted(edges, ids, side="right")
    assert np.array_equal(files, np.repeat(files[:, :1], T + 1, axis=1))
    long_enough = {file for file, size in enumerate(sizes) if size > T}
    assert set(files[:, 0]) == long_enough  # all of them are read, the others never


@pytest.mark.parametrize("sizes", [(8000,), (65,), (128,), (129,), (65, 66, 129, 500, 4000)], ids=str)
def test_each_window_comes_exactly_once_per_epoch(sizes: tuple[int, ...]):
    reader, begins = batches(split_of(*sizes)), np.cumsum([0, *sizes[:-1]])
    per_epoch = reader.samples_per_epoch
    for epoch in (0, 1, 2, 50):
        starts = first_ids(reader, per_epoch, begin=epoch * per_epoch)
        by_file = [
            sorted(start - begin for start in starts if begin <= start < begin + size)
            for begin, size in zip(begins, sizes, strict=True)
        ]
        phase = max(min(file) for file in by_file)
        assert by_file == [[min(phase + w * T, size - 1 - T) for w in range((size - 1) // T)] for size in sizes]


def test_an_epoch_trains_on_every_token_but_what_the_phase_cuts_off():
    size = 40 * T + 1
    reader = batches(split_of(size))
    for epoch in range(20):
        targets = reader.samples(np.arange(40 * epoch, 40 * (epoch + 1)))[:, 1:]
        counts = np.bincount(targets.ravel(), minlength=size)
        phase = int((counts[1:] == 0).sum())
        assert phase < T
        assert counts[1 : 1 + phase].max(initial=0) == 0
        assert counts[1 + phase :].min() >= 1
        assert counts.max() <= 2
        assert (counts == 2).sum() == phase  # the last window moved back by as much


def test_phase_and_order_change_from_epoch_to_epoch():
    reader = batches(split_of(40 * T + 1))
    epochs = [first_ids(reader, 40, begin=40 * epoch) for epoch in range(30)]
    phases = {min(starts) for starts in epochs}
    assert len(phases) > 15  # 24 of 64 are to be expected
    assert phases <= set(range(T))
    orders = {tuple((start - min(starts)) // T for start in starts) for starts in epochs}
    assert len(orders) == 30


def test_random_sampling_reaches_every_start_and_nothing_else():
    reader = batches(split_of(76, 5, 68), sampling="random")
    starts = Counter(first_ids(reader, 20_000))
    allowed = set(range(76 - T)) | set(range(81, 81 + 68 - T))
    assert set(starts) == allowed
    assert max(starts.values()) < 1.2 * 20_000 / len(allowed)


def test_far_samples_are_read_at_once():
    for sampling in ("shuffle", "random"):
        reader = batches(split_of(800), sampling=sampling)
        begin = 10**15 + 1
        assert first_ids(reader, 3, begin) == [first_ids(reader, 1, begin + i)[0] for i in range(3)]


# ------------------------------------------------------------------------------------------- the same list for every cluster


def global_order(
    split: TokenSplit, *, world_size: int, batch_size: int, accumulation: int, updates: int, **changed: Any
) -> np.ndarray:
    """What all processes read together, in the order in which the samples are numbered."""
    shape: dict[str, int] = {"world_size": world_size, "batch_size": batch_size, "accumulation": accumulation}
    readers = [batches(split, rank=rank, **shape, **changed) for rank in range(world_size)]
    per_update = world_size * batch_size * accumulation
    rows = []
    for update in range(updates):
        shares = [reader.micro_batches(update * per_update) for reader in readers]
        rows += [shares[rank][step].ids_BS for step in range(accumulation) for rank in range(world_size)]
    return torch.cat(rows).numpy()


SPLITS = [
    (world_size, 24 // world_size // accumulation, accumulation)
    for world_size in (1, 2, 3, 4)
    for accumulation in (1, 2, 3, 6)
    if 24 % (world_size * accumulation) == 0
]


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
@pytest.mark.parametrize(("world_size", "batch_size", "accumulation"), SPLITS)
def test_processes_micro_batches_and_accumulation_do_not_change_the_order(
    world_size: int, batch_size: int, accumulation: int, sampling: Any
):
    split = split_of(2400, 800)
    order = global_order(
        split, world_size=world_size, batch_size=batch_size, accumulation=accumulation, updates=10, sampling=sampling
    )
    assert np.array_equal(order, batches(split, sampling=sampling).samples(np.arange(240)))


def test_order_control_another_seed_reads_another_list():
    split = split_of(2400, 800)
    for sampling in ("shuffle", "random"):
        one, two = (batches(split, sampling=sampling, seed=seed).samples(np.arange(48)) for seed in (42, 43))
        assert not np.array_equal(one, two)


def test_ranks_share_no_sample_of_an_epoch():
    split = split_of(48 * T + 1)
    readers = [batches(split, world_size=3, rank=rank, batch_size=4, accumulation=2) for rank in range(3)]
    read = [{int(ids[0]) for update in (0, 24) for batch in r.micro_batches(update) for ids in batch.ids_BS} for r in readers]
    assert [len(ids) for ids in read] == [16, 16, 16]
    assert len(set.union(*read)) == 48


def test_updates_do_not_depend_on_what_was_read_before():
    """Any update, in any order, from a fresh reader or a used one: a resumed run reads what an uninterrupted one would."""
    split = split_of(24_000)
    shape = {"batch_size": 3, "accumulation": 2, "world_size": 2, "rank": 1}
    used = batches(split, **shape)
    for first in (0, 12, 5 * 12, 4 * 12, 1200, 12, 0, 7, 10**9, 24):
        for again, fresh in zip(used.micro_batches(first), batches(split, **shape).micro_batches(first), strict=True):
            assert torch.equal(again.ids_BS, fresh.ids_BS)
    assert not torch.equal(used.micro_batches(0)[0].ids_BS, used.micro_batches(12)[0].ids_BS)  # control


@pytest.mark.parametrize("tokens", [20_001 * T, 100 * T + 1, T + 1], ids=str)
def test_samples_around_the_ends_of_epochs_and_blocks_equal_single_ones(tokens: int):
    small = np.arange(tokens, dtype=np.int64).astype("<u4")
    split = TokenSplit(source="s", files=(small,), max_id=tokens, fingerprint="f")
    reader = batches(split)
    for edge in (256, 16384, 2 * 16384, reader.samples_per_epoch, 3 * reader.samples_per_epoch):
        numbers = np.arange(max(0, edge - 5), edge + 5)
        single = np.concatenate([batches(split).samples(numbers[i : i + 1]) for i in range(0, numbers.size, 3)])
        assert np.array_equal(reader.samples(numbers)[::3], single)
    backwards = np.array([300, 3, 259])
    assert np.array_equal(reader.samples(backwards), np.concatenate([reader.samples(backwards[i : i + 1]) for i in range(3)]))


def test_the_order_is_the_one_that_checkpoints_of_earlier_versions_go_on_in():
    for sampling, known in (
        ("shuffle", "0e2c28a8a38804d6b498df70a822535385e31df72abfad8bbc55a3991234ce2b"),
        ("random", "9184629cb55e2106157c3a27a3779d3ebb3dc897f86277c6c7bbd41752c687a2"),
    ):
        reader = batches(split_of(2400, 65, 5, 8000), sampling=sampling)
        read = np.concatenate([reader.samples(np.arange(begin, begin + 400)) for begin in (0, 10_000, 10**12)])
        assert hashlib.sha256(read.astype("<i8").tobytes()).hexdigest() == known


# --------------------------------------------------------------------------------------------------------- small datasets


def test_split_of_exactly_one_window_is_enough():
    reader = batches(split_of(T + 1), batch_size=5)
    assert reader.samples_per_epoch == 1
    assert reader.micro_batches(0)[0].ids_BS.tolist() == [list(range(T + 1))] * 5


@pytest.mark.parametrize(("sizes", "limit"), [((T,), T), ((3,), 3), ((50, 60), 60), ((2,) * 50, 2)])
def test_split_that_is_too_small_says_which_context_would_fit(sizes: tuple[int, ...], limit: int):
    with pytest.raises(DataError) as caught:
        Windows(split_of(*sizes), T)
    total = f"somewhere: {sum(sizes)} tokens are too few for one window of context_length + 1 = 65; "
    assert caught.value.message == f"{total}lower --context_length below {limit} or prepare more text"
    Windows(split_of(*sizes), limit - 1)  # what it says is true


def test_windows_count_as_the_loader_does():
    for size in range(T + 1, 5 * T, 7):
        windows = Windows(split_of(size), T)
        assert windows.count == (size - 1) // T
        starts = windows.starts_of(np.arange(windows.count))
        assert windows.read(starts)[:, 0].tolist() == [T * window for window in range(windows.count)]
