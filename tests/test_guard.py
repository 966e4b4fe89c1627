"""Numbers that go wrong: what is not finite touches no weight, spikes are seen, and rollbacks replay. Poison is in the data."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from accel_pretrain import guard, loop
from accel_pretrain.checkpoint import read_state
from accel_pretrain.data import TokenBatches, numbers_of
from accel_pretrain.guard import Guard, Health
from accel_pretrain.recovery import merged
from accel_pretrain.shards import open_split
from tests.running import TINY, Train, assert_same_bits, environment, losses, newest, rows, run_processes, stdlib_text
from tests.test_resume import reseal

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
G, SPIKE = 4, 120  # samples per update, and the update that reads the poison
RUN = (
    "--vocab_size",
    "257",
    "--max_iters",
    "130",
    "--warmup_iters",
    "10",
    "--checkpoint_interval",
    "50",
    "--keep_last",
    "null",
)
RARE = 255


def write_ids(folder: Path, updates: Sequence[int], poison: Sequence[int]) -> tuple[str, ...]:
    """Text as bare ids whose windows read at these updates are replaced by ``poison``; the words that train on it."""
    folder.mkdir()
    ids = np.frombuffer(stdlib_text(40_000).encode("ascii", "replace"), dtype=np.uint8).astype("<u2")
    ids[:3000].tofile(folder / "val.ids")
    places = np.arange(ids.size, dtype="<u2")
    places.tofile(folder / "places.ids")
    batches = TokenBatches(open_split(folder / "places.ids", "train"), context_length=32, batch_size=G, seed=42)
    for update in updates:
        for begin in batches.samples(np.arange((update - 1) * G, update * G))[:, 0]:
            ids[begin + 8 : begin + 24] = np.resize(poison, 16)
    ids.tofile(folder / "train.ids")
    return ("--train_data_path", str(folder / "train.ids"), "--val_data_path", str(folder / "val.ids"), *RUN)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Bytes that the text never holds, in all windows of one update."""
    draw = np.random.default_rng(0)
    return write_ids(tmp_path_factory.mktemp("poisoned") / "data", [SPIKE], draw.integers(200, 250, 16).tolist())


def spikes(run_dir: Path) -> list[tuple[float, float]]:
    return [(row["spike/step"], row["spike/sigmas"]) for row in rows(run_dir) if "spike/step" in row]


# ---------------------------------------------------------------------------------------------------------------- spikes


def test_a_spike_in_the_data_is_reported_and_applied(
    run_train: Train, tmp_path: Path, poisoned: tuple[str, ...], capsys: Capture
) -> None:
    assert run_train(tmp_path / "run", *poisoned) == 0
    assert [step for step, _ in spikes(tmp_path / "run")] == [SPIKE]
    assert f"Spike at iteration {SPIKE}: loss " in (shown := capsys.readouterr().out)
    assert "not applied" not in shown
    assert read_state(newest(tmp_path / "run")).health.skipped == 0


def test_control_without_poison_there_is_no_spike(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path / "run", *write_ids(tmp_path / "data", [], [])) == 0
    assert spikes(tmp_path / "run") == []


def test_a_resumed_run_sees_the_same_spike(run_train: Train, tmp_path: Path, poisoned: tuple[str, ...]) -> None:
    """Its threshold needs what the guard remembered before the restart."""
    assert run_train(tmp_path / "whole", *poisoned) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint_00000100", tmp_path / "parts" / "checkpoint_00000100")
    shutil.copytree(tmp_path / "parts", tmp_path / "forgetful")
    assert run_train(tmp_path / "parts", *poisoned) == 0
    assert spikes(tmp_path / "parts") == spikes(tmp_path / "whole")
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert read_state(newest(tmp_path / "whole")) == read_state(newest(tmp_path / "parts"))
    forget = tmp_path / "forgetful" / "checkpoint_00000100"  # control
    edit_state(forget, lambda document: document.pop("health"))
    assert run_train(tmp_path / "forgetful", *poisoned) == 0
    assert spikes(tmp_path / "forgetful") == []


def edit_state(checkpoint: Path, change: Any) -> None:
    path = checkpoint / "trainer_state.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document, indent=2) + "\n")
    reseal(checkpoint)


def test_a_skipped_spike_changes_no_bit(run_train: Train, tmp_path: Path, poisoned: tuple[str, ...], capsys: Capture) -> None:
    common = (*poisoned, "--on_spike", "skip", "--max_iters", "121", "--schedule.name", "constant")
    for end in ("119", "120", "121"):
        assert run_train(tmp_path / end, *common, "--max_iters", end, "--checkpoint_interval", "1000") == 0
    assert_same_bits(newest(tmp_path / "119"), newest(tmp_path / "120"))
    with pytest.raises(AssertionError):
        assert_same_bits(newest(tmp_path / "120"), newest(tmp_path / "121"))
    assert "(not applied)" in capsys.readouterr().out
    assert read_state(newest(tmp_path / "121")).health.skipped == 1


def test_a_rollback_leaves_out_the_window_and_replays(
    run_train: Train, tmp_path: Path, poisoned: tuple[str, ...], capsys: Capture
) -> None:
    common = (*poisoned, "--on_spike", "rollback", "--rollback_updates", "10")
    assert run_train(tmp_path / "run", *common) == 0
    shown = capsys.readouterr().out
    assert "Rolled back to checkpoint_00000100; samples 440 to 479 are left out from now on" in shown
    state = read_state(newest(tmp_path / "run"))
    assert (state.step, state.samples, state.tokens) == (130, 130 * G, 130 * G * 32)
    assert (state.health.left_out, state.health.rollbacks) == ([[440, 480]], 1)
    ledger = json.loads((tmp_path / "run" / "skipped_samples.json").read_text())
    assert ledger == {"rollbacks": 1, "ranges_of_samples": [[440, 480]]}
    assert [row["step"] for row in rows(tmp_path / "run") if "train/loss" in row] == list(range(1, 131))
    assert spikes(tmp_path / "run") == []  # of a future that did not happen

    # What follows is a function of (seed, position, ledger): a run that had the ledger at update 100 ends in the same bits,
    # and so does one that was killed before the rollback was saved, and has to find the spike again.
    for name in ("told", "again", "without"):
        shutil.copytree(tmp_path / "run" / "checkpoint_00000100", tmp_path / name / "checkpoint_00000100")
    told = tmp_path / "told" / "checkpoint_00000100"
    edit_state(told, lambda document: document["health"].update(left_out=[[440, 480]], rollbacks=1))
    for name, options in (("told", common), ("again", common), ("without", poisoned)):
        assert run_train(tmp_path / name, *options) == 0
    for name in ("told", "again"):
        assert_same_bits(newest(tmp_path / "run"), newest(tmp_path / name))
        assert read_state(newest(tmp_path / name)) == state
    with pytest.raises(AssertionError):  # control: the ledger matters
        assert_same_bits(newest(tmp_path / "run"), newest(tmp_path / "without"))


def test_a_rollback_waits_for_a_save_under_way(run_train: Train, tmp_path: Path, poisoned: tuple[str, ...]) -> None:
    """The checkpoint to return to may still be in the making; the end is the same."""
    common = (*poisoned, "--on_spike", "rollback", "--rollback_updates", "10", "--checkpoint_interval", "119")
    for name, asynchronous in (("sync", "false"), ("async", "true")):
        assert run_train(tmp_path / name, *common, "--asynchronous", asynchronous) == 0
        state = read_state(newest(tmp_path / name))
        assert (state.step, state.health.left_out) == (130, [[476, 480]])
    assert_same_bits(newest(tmp_path / "sync"), newest(tmp_path / "async"))


@pytest.mark.slow
def test_two_processes_roll_back_as_one(run_train: Train, tmp_path: Path, poisoned: tuple[str, ...]) -> None:
    common = (*poisoned, "--on_spike", "rollback", "--rollback_updates", "10", "--global_batch_size", "4")
    assert run_train(tmp_path / "one", *common, "--batch_size", "2") == 0
    words = [*TINY, *common, "--batch_size", "2", "--checkpoint_dir", str(tmp_path / "two")]
    done = run_processes(words, processes=2)
    assert done.returncode == 0, done.stderr
    assert "Processes: 2" in done.stdout
    assert "Rolled back to checkpoint_00000100" in done.stdout
    ours, theirs = (read_state(newest(tmp_path / name)).health for name in ("one", "two"))
    assert (ours.left_out, ours.rollbacks) == (theirs.left_out, theirs.rollbacks) == ([[440, 480]], 1)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5, rtol=0)


def test_before_the_first_checkpoint_a_spike_is_skipped(run_train: Train, tmp_path: Path, poisoned: tuple[str, ...]) -> None:
    common = (*poisoned, "--on_spike", "rollback", "--checkpoint_interval", "1000")
    assert run_train(tmp_path, *common) == 0
    state = read_state(newest(tmp_path))
    assert (state.step, state.health.skipped, state.health.rollbacks) == (130, 1, 0)
    assert [step for step, _ in spikes(tmp_path)] == [SPIKE]


def test_one_rollback_too_many_ends_the_run(
    run_train: Train, tmp_path: Path, poisoned: tuple[str, ...], capsys: Capture
) -> None:
    assert run_train(tmp_path, *poisoned, "--on_spike", "rollback", "--max_rollbacks", "0") == 6
    assert "this after 0 rollbacks (training.max_rollbacks): the run has diverged" in capsys.readouterr().err
    report = json.loads((tmp_path / f"diverged_step_{SPIKE}.json").read_text())
    assert report["ranks"][0]["samples"] == [list(range((SPIKE - 1) * G, SPIKE * G))]
    assert report["ranks"][0]["losses"][0] > report["last_losses"][-2]
    assert newest(tmp_path).name == "checkpoint_00000100"


def bad_updates(monkeypatch: Patch, updates: range) -> None:
    """Let the gradients of these updates be not finite, the first time that they are computed."""
    left = set(updates)
    judge: Any = Guard.step

    def step(self: Guard, *arguments: Any) -> None:
        *before, number, loss, grad_norm = arguments
        if number in left:
            left.remove(number)
            loss = loss * math.nan
        judge(self, *before, number, loss, grad_norm)

    monkeypatch.setattr(Guard, "step", step)


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in run_dir.glob("checkpoint_*"))


def test_saves_wait_for_the_end_of_bad_updates(run_train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    bad_updates(monkeypatch, range(5, 9))
    common = ("--checkpoint_interval", "2", "--keep_last", "null", "--eval_interval", "6")
    assert run_train(tmp_path, "--max_iters", "12", *common) == 0
    assert saved_steps(tmp_path) == [2, 4, 9, 10, 12]
    assert read_state(tmp_path / "checkpoint_00000010").best_val_loss is None  # that of update 6 is in no checkpoint


def test_a_last_save_amid_bad_updates_removes_nothing(run_train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    bad_updates(monkeypatch, range(6, 9))
    common = ("--checkpoint_interval", "2", "--keep_last", "1", "--save_best", "false")
    assert run_train(tmp_path, "--max_iters", "7", *common) == 0
    assert read_state(newest(tmp_path)).health.in_a_row == 2
    assert saved_steps(tmp_path) == [4, 7]


def test_a_rollback_goes_past_a_checkpoint_amid_bad_updates(run_train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    bad_updates(monkeypatch, range(6, 16))
    common = ("--checkpoint_interval", "4", "--on_spike", "rollback", "--rollback_updates", "2", "--keep_last", "null")
    assert run_train(tmp_path, *common, "--max_iters", "10") == 0
    assert read_state(newest(tmp_path)).health.in_a_row == 5
    assert run_train(tmp_path, *common, "--max_iters", "20") == 0
    assert (tmp_path / "set_aside_checkpoint_00000010").is_dir()
    assert (read_state(newest(tmp_path)).health.rollbacks, read_state(newest(tmp_path)).health.in_a_row) == (1, 0)
    assert saved_steps(tmp_path) == [4, 8, 12, 16, 20]


def test_a_rollback_begins_to_count_anew(run_train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    """Where there is only a checkpoint from amid bad updates."""
    bad_updates(monkeypatch, range(2, 12))
    common = ("--on_spike", "rollback", "--rollback_updates", "2")
    assert run_train(tmp_path, *common, "--max_iters", "10") == 0
    assert run_train(tmp_path, *common, "--max_iters", "14") == 0
    assert read_state(newest(tmp_path)).health.rollbacks == 1


def test_positions_and_numbers() -> None:
    positions = np.arange(12)
    assert numbers_of(positions, []).tolist() == list(range(12))
    assert numbers_of(positions, [[0, 2], [5, 6], [8, 20]]).tolist() == [2, 3, 4, 6, 7, *range(20, 27)]
    assert merged([[8, 20], [0, 2], [2, 3], [10, 12]]) == [[0, 3], [8, 20]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_is_left_out_does_not_depend_on_the_processes(dataset: Path, world_size: int) -> None:
    split, ranges = open_split(dataset, "train"), [[6, 9], [40, 75]]
    seen = np.empty((24, 33), dtype=np.int64)
    for rank in range(world_size):
        batches = TokenBatches(
            split, context_length=32, batch_size=2, seed=1, accumulation=4 // world_size, world_size=world_size, rank=rank
        )
        batches.micro_batches(0)  # reads ahead, which must be forgotten
        batches.leave_out(ranges)
        for update in range(3):
            for micro_step, batch in enumerate(batches.micro_batches(8 * update)):
                begin = 8 * update + (micro_step * world_size + rank) * 2
                seen[begin : begin + 2] = batch.ids_BS.numpy()
    plain = TokenBatches(split, context_length=32, batch_size=2, seed=1)
    numbers = [number for number in range(80) if not any(first <= number < end for first, end in ranges)][:24]
    assert (seen == plain.samples(np.array(numbers))).all()
    assert not (seen == plain.samples(np.arange(24))).all()


# ------------------------------------------------------------------------------------------------------------ the guard


class Toy:
    """A parameter, its optimizer and a guard, fed with made-up losses and gradients."""

    def __init__(self, on_spike: str = "log", optimizer: str = "adamw", scaler: bool = False) -> None:
        self.accelerator = Accelerator(cpu=True)
        module = torch.nn.Linear(4, 4)
        torch.nn.init.ones_(module.weight)
        torch.nn.init.ones_(module.bias)
        if scaler:
            self.accelerator.scaler = torch.amp.GradScaler("cpu")
        kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        extra = {"momentum": 0.9} if optimizer == "sgd" else {}
        built = kinds[optimizer](module.parameters(), lr=0.01, fused=True, **extra)
        self.module, self.optimizer = self.accelerator.prepare(module, built)
        self.guard, self.health, self.updates = Guard(on_spike), Health(), 0

    def step(self, loss: float, gradient: float = 1.0) -> None:
        self.updates += 1
        for parameter in self.module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        norm = torch.tensor(gradient)
        self.guard.step(self.accelerator, self.optimizer, self.health, self.updates, torch.tensor(loss), norm)

    @property
    def weights(self) -> list[float]:
        return torch.cat([parameter.detach().flatten() for parameter in self.module.parameters()]).tolist()


def ordinary(number: int) -> float:
    return 3.0 + 0.1 * math.sin(number)


def test_the_threshold_is_six_standard_deviations_of_the_last_128() -> None:
    toy = Toy()
    past = [ordinary(number) for number in range(200)]
    for loss in past:
        toy.step(loss)
    assert toy.guard.spikes == []
    known = np.array(past[-128:], dtype=np.float32).tolist()
    edge = statistics.mean(known) + 6 * statistics.stdev(known)
    toy.step(edge - 1e-3)
    assert toy.guard.spikes == []
    toy.health.losses[:] = known
    toy.step(edge + 1e-3)
    assert [spike.step for spike in toy.guard.calm()] == [202]
    toy.step(3.0, gradient=50.0)  # the norm of the gradient counts as much as the loss
    assert [spike.step for spike in toy.guard.spikes] == [203]


def test_among_equal_values_the_last_bit_is_no_spike() -> None:
    toy = Toy()
    for _ in range(100):
        toy.step(3.0)
    toy.step(3.000001)
    assert toy.guard.spikes == []
    toy.step(3.1)  # control
    assert len(toy.guard.spikes) == 1


def test_nothing_is_a_spike_while_little_is_known() -> None:
    toy = Toy()
    for number in range(63):
        toy.step(ordinary(number))
    toy.step(100.0)
    assert toy.guard.spikes == []
    for number in range(64):
        toy.step(ordinary(number))
    toy.step(1000.0)
    assert len(toy.guard.spikes) == 1


def test_a_lasting_change_is_only_at_first_a_spike() -> None:
    toy = Toy("skip")
    for number in range(400):
        toy.step(ordinary(number) + (4.0 if number >= 200 else 0.0))
    assert 1 <= toy.health.skipped <= 5


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("first_is_bad", [True, False])
def test_deciding_on_the_device_is_the_same(monkeypatch: Patch, optimizer: str, first_is_bad: bool) -> None:
    """As on a GPU: the fused optimizer is told by a tensor, and the numbers are looked at later."""
    found = []
    for late in (False, True):
        monkeypatch.setattr(guard, "_is_asynchronous", lambda device, late=late: late)
        toy = Toy(optimizer=optimizer)
        for number in range(300):
            bad = number in (5, 80, 290) or (first_is_bad and number == 0)
            loss, gradient = (ordinary(number), math.nan if number == 80 else math.inf) if bad else (ordinary(number), 0.5)
            toy.step(100.0 if number == 100 else math.nan if number == 5 else loss, gradient)
        toy.guard.settle(toy.health)
        found.append((toy.weights, toy.health, [spike.step for spike in toy.guard.calm()]))
    assert found[0] == found[1]
    assert found[0][1].skipped == 3 + first_is_bad
    assert found[0][0] != [1.0] * 20


def test_bad_updates_that_are_too_many_in_a_thousand_end_the_run() -> None:
    sparse = Toy()
    for number in range(1, 1600):
        sparse.step(math.nan if number % 201 == 0 else ordinary(number))
    assert sparse.guard.diverged == ""
    assert sparse.health.skipped == 7
    dense = Toy()
    for number in range(1, 1100):
        dense.step(math.nan if number % 180 == 0 else ordinary(number))
        if dense.guard.diverged:
            break
    assert dense.guard.diverged == "the loss or its gradient was not finite in 6 of the last 1,000 updates"
    assert dense.updates == 1080


def test_with_fp16_the_scaler_skips_and_it_is_counted() -> None:
    toy = Toy(scaler=True)
    scaler = toy.accelerator.scaler
    assert scaler is not None
    scaler.scale(torch.ones(()))
    before = toy.weights
    for gradient, changes in ((math.inf, False), (1.0, True), (math.nan, False)):
        for parameter in toy.module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scale = scaler.get_scale()
        toy.accelerator.unscale_gradients()
        toy.updates += 1
        measured = torch.tensor(3.0), torch.tensor(gradient)
        toy.guard.step(toy.accelerator, toy.optimizer, toy.health, toy.updates, *measured)
        assert (toy.weights != before) == changes
        assert (scaler.get_scale() < scale) != changes
        before = toy.weights
    assert (toy.health.skipped, toy.health.bad) == (2, [1, 3])


@pytest.mark.parametrize(
    "document",
    [
        {"losses": [math.inf]}, {"losses": [1]}, {"losses": {}}, {"bad": [True]}, {"skipped": -1}, {"skipped": 1.0}, {"x": 1},
        {"left_out": [[1]]}, {"left_out": [1]}, {"left_out": [["a", "b"]]}, {"bad": "12"}, [], "x", 3,
    ],
    ids=str,
)  # fmt: skip
def test_a_memory_that_is_none_is_refused(document: Any) -> None:
    with pytest.raises(ValueError):
        Health.parse(document)
    assert Health.parse(vars(Health(losses=[1.5], left_out=[[1, 2]]))).left_out == [[1, 2]]  # control


# ----------------------------------------------------------------------------------------------------- a run that diverged

POISON_WEIGHTS = f"""
import math
from accel_pretrain import loop, train

step = loop.train_step

def train_step(run, state):
    '''The embedding of one rare token becomes infinite: only micro-batches that hold it are not finite.'''
    run.module.embed_tokens.weight.data[{RARE}] = math.inf
    return step(run, state)

loop.train_step = train_step
"""


def test_the_report_names_samples_micro_batch_and_layers(
    run_train: Train, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Ten updates in a row read a token whose embedding is infinite; in each, only in the second micro-batch."""
    monkeypatch.setattr(loop, "train_step", loop.train_step)  # put back at the end
    exec(POISON_WEIGHTS, {})
    words = write_ids(tmp_path / "data", [], [])
    ids = np.fromfile(tmp_path / "data" / "train.ids", dtype="<u2")
    places = TokenBatches(open_split(tmp_path / "data" / "places.ids", "train"), context_length=32, batch_size=4, seed=42)
    bad = [number for update in range(5, 15) for number in (8 * update + 4, 8 * update + 5)]
    ids[places.samples(np.array(bad))[:, 10]] = RARE
    ids.tofile(tmp_path / "data" / "train.ids")
    assert run_train(tmp_path / "run", *words, "--gradient_accumulation_steps", "2", "--dropout", "0.1") == 6
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: the loss or its gradient was not finite for ")
    assert complaint.count("\n") == 1
    reports = list((tmp_path / "run").glob("diverged_step_*.json"))
    assert len(reports) == 1
    report = json.loads(reports[0].read_text())
    (own,) = report["ranks"]
    begin = 8 * (report["step"] - 1)
    assert own["samples"] == [list(range(begin, begin + 4)), list(range(begin + 4, begin + 8))]
    assert own["first_bad_micro_batch"] in (0, 1)
    assert str(own["losses"][own["first_bad_micro_batch"]]) in ("nan", "inf")
    assert own["bad_weights"] == ["embed_tokens.weight"]
    assert "layers.0.self_attn.q_proj.weight" in own["bad_gradients"]
    assert len(report["bad_updates"]) == report["skipped_updates"] >= 10
    assert len(report["last_losses"]) >= 4


def test_one_bad_process_of_two_leaves_both_untouched(tmp_path: Path) -> None:
    """The second process alone reads the token whose embedding is infinite; both skip, and both are in the report."""
    words = write_ids(tmp_path / "data", [], [])
    ids = np.fromfile(tmp_path / "data" / "train.ids", dtype="<u2")
    places = TokenBatches(open_split(tmp_path / "data" / "places.ids", "train"), context_length=32, batch_size=4, seed=42)
    bad = [8 * update + 4 for update in range(4, 40)]
    ids[places.samples(np.array(bad))[:, 10]] = RARE
    for number in range(0, 8 * 40):  # and nothing else does
        if number not in bad:
            place = places.samples(np.array([number]))[0]
            ids[place[ids[place] == RARE]] = 32
    ids.tofile(tmp_path / "data" / "train.ids")
    script = tmp_path / "poisoned_train.py"
    script.write_text(f"{POISON_WEIGHTS}\nimport sys\nsys.exit(train.main(sys.argv[1:]))\n")
    done = run_script(script, [*TINY, *words, "--checkpoint_dir", str(tmp_path / "run"), "--save_best", "false"])
    assert done.returncode != 0
    assert "Processes: 2" in done.stdout
    report = json.loads(next((tmp_path / "run").glob("diverged_step_*.json")).read_text())
    first, second = report["ranks"]
    assert (first["rank"], first["first_bad_micro_batch"], second["rank"], second["first_bad_micro_batch"]) == (0, None, 1, 0)
    assert second["samples"][0] == [number + 4 for number in first["samples"][0]]
    assert second["bad_gradients"]
    assert report["step"] == 14


def run_script(script: Path, words: list[str]) -> Any:
    import subprocess
    import sys

    from tests.running import REPO

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), *words]
    return subprocess.run(command, env=environment(), cwd=REPO, capture_output=True, text=True, timeout=240)


def test_a_run_that_never_moved_does_not_end_well(run_train: Train, tmp_path: Path, capsys: Capture) -> None:
    assert run_train(tmp_path, "--max_iters", "4", "--init_std", "3e38") == 6
    assert "none of the 4 updates could be applied: the run has diverged" in capsys.readouterr().err
    assert not list(tmp_path.glob("checkpoint_*"))
    assert json.loads((tmp_path / "diverged_step_4.json").read_text())["ranks"][0]["first_bad_micro_batch"] == 0


def test_a_huge_rate_ends_the_run_and_keeps_the_good_checkpoint(run_train: Train, tmp_path: Path, capsys: Capture) -> None:
    """A real divergence, by a learning rate that no model survives."""
    common = ("--max_iters", "60", "--checkpoint_interval", "20", "--schedule.name", "constant")
    assert run_train(tmp_path, *common, "--max_iters", "20") == 0
    assert run_train(tmp_path, *common, "--lr", "1e30", "--grad_clip", "null") == 6
    assert "the run has diverged" in capsys.readouterr().err
    assert newest(tmp_path).name == "checkpoint_00000020"
