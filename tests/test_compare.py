"""``accel_pretrain.compare``: the differences are what they should be, and what it is sure of is so."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from accel_pretrain.checkpoint import CheckpointConfig, TrainState, write_model_description
from accel_pretrain.compare import main, split_groups
from accel_pretrain.config import RunConfig
from accel_pretrain.data import DataConfig, Windows
from accel_pretrain.errorbars import Estimate, mean_of, t_outside, t_quantile, welch
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.publish import publish
from accel_pretrain.shards import open_split
from accel_pretrain.tokenizer import GPT2_PATTERN, BpeTokenizer, ByteTokenizer, Tokenizer
from accel_pretrain.typed_yaml import to_yaml
from accel_pretrain.validation import nats_per_window, validate
from tests.recorded import eval_row, train_row, write_run
from tests.running import refused, stdlib_text, write_dataset

T = 32


@dataclass(frozen=True)
class Place:
    """A dataset, and runs on it: ``a`` and ``b`` differ, ``near`` is ``a`` with hardly anything changed."""

    data: Path
    runs: dict[str, Path]
    models: dict[str, Transformer]


def save_run(run: Path, model: Transformer, data: Path, step: int = 3, tokenizer: Tokenizer | None = None) -> Path:
    """A run directory with one checkpoint."""
    config = RunConfig(
        data=DataConfig(train_data_path=data), model=model.config, checkpoint=CheckpointConfig(checkpoint_dir=run)
    )

    def write_extras(checkpoint: Path) -> None:
        (checkpoint / "config.yaml").write_text(to_yaml(config))
        write_model_description(checkpoint, model.config, model.vocab_size)
        (tokenizer or ByteTokenizer()).save(checkpoint / "tokenizer")

    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(to_yaml(config))
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    publish(accelerator, run, TrainState(step=step, tokens=128 * step), facts={}, write_extras=write_extras)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return run


def new_model(seed: int, context_length: int = T) -> Transformer:
    torch.manual_seed(seed)
    shape = ModelConfig(context_length=context_length, d_model=32, num_layers=1, num_heads=2, d_ff=32, init_std=0.2)
    return Transformer(shape, 257)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder, text = tmp_path_factory.mktemp("compare"), stdlib_text(14_000)
    data = write_dataset(folder / "data", text[:10_000], text[10_000:])
    models = {name: new_model(seed) for seed, name in enumerate(("a", "b", "c", "d"))}
    models["near"] = new_model(0)
    with torch.no_grad():
        for parameter in models["near"].parameters():
            parameter.mul_(0.995)
    models["short"] = new_model(0, context_length=16)
    runs = {name: save_run(folder / name, model, data) for name, model in models.items()}
    return Place(data, runs, models)


def compared(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main([*map(str, words), "--json", "--device", "cpu"]) == 0
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return json.loads(capsys.readouterr().out)


def losses(model: Transformer, data: Path, length: int = T) -> np.ndarray:
    """By definition: the mean loss of every window of the val split."""
    windows = Windows(open_split(data, "val"), length)
    ids_BS = torch.from_numpy(windows.read(windows.starts_of(np.arange(windows.count))).astype(np.int64))
    with torch.no_grad():
        logits_BTV = model.eval()(ids_BS[:, :-1])
        nats_BT = torch.nn.functional.cross_entropy(logits_BTV.mT, ids_BS[:, 1:], reduction="none")
    return nats_BT.double().mean(dim=1).numpy()


# ----------------------------------------------------------------------------------------------------- window by window


def test_the_difference_is_that_of_the_windows(place: Place, capsys: pytest.CaptureFixture[str]):
    found = compared(capsys, place.runs["a"], place.runs["b"], "--batch_size", 7)
    a, b = (losses(place.models[name], place.data) for name in ("a", "b"))
    assert found["count"] == a.size
    assert found["difference"] == pytest.approx((a - b).mean(), abs=1e-6)
    assert found["a"][0]["loss"] == pytest.approx(a.mean(), abs=1e-6)
    assert found["b"][0]["loss"] == pytest.approx(b.mean(), abs=1e-6)
    assert found["standard_error"] >= (a - b).std(ddof=1) / math.sqrt(a.size) * 0.999
    low, high = found["confidence_interval"]
    assert low < found["difference"] < high
    assert found["better"] == ("A" if high < 0 else "B" if low > 0 else None)


def test_pairs_see_what_two_losses_do_not(place: Place, capsys: pytest.CaptureFixture[str]):
    found = compared(capsys, place.runs["a"], place.runs["near"])
    apart = math.hypot(found["a"][0]["standard_error"], found["b"][0]["standard_error"])
    assert found["better"] is not None
    assert found["standard_error"] < apart / 10
    assert abs(found["difference"]) < 2 * apart  # control: as independent losses they could not be told apart
    other = compared(capsys, place.runs["near"], place.runs["a"])
    assert other["better"] == {"A": "B", "B": "A"}[found["better"]]
    assert other["difference"] == pytest.approx(-found["difference"])


def test_a_model_is_not_better_than_itself(place: Place, capsys: pytest.CaptureFixture[str]):
    found = compared(capsys, place.runs["a"], place.runs["a"] / "latest")
    assert (found["difference"], found["standard_error"], found["p"], found["better"]) == (0, 0, 1, None)
    assert found["verdict"] == "A and B are equal: no window shows a difference."


def test_the_shortest_context_is_the_windows(place: Place, capsys: pytest.CaptureFixture[str]):
    found = compared(capsys, place.runs["short"], place.runs["a"])
    assert found["b"][0]["loss"] == pytest.approx(losses(place.models["a"], place.data, 16).mean(), abs=1e-6)
    some = compared(capsys, place.runs["a"], place.runs["b"], "--windows", 20, "--context_length", 8)
    assert some["count"] == 20


def test_it_is_the_loss_of_validate(place: Place):
    windows, accelerator = Windows(open_split(place.data, "val"), T), Accelerator(cpu=True)
    model = place.models["a"].eval()
    for wanted in (None, 10):
        nats = nats_per_window(accelerator.device, model, windows, batch_size=4, wanted=wanted)
        result = validate(accelerator, model, windows, batch_size=3, wanted=wanted)
        assert nats.mean() / T == pytest.approx(result.loss, rel=1e-7)


def test_a_model_that_is_past_saving_is_worse(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = new_model(0)
    with torch.no_grad():
        for name in ("norm.weight", "lm_head.weight"):  # finite, so that it can be saved; its logits are not
            model.get_parameter(name).mul_(1e30)
    run = save_run(tmp_path / "nan", model, place.data)
    found = compared(capsys, run, place.runs["a"])
    assert (found["better"], found["difference"], found["a"][0]["loss"]) == ("B", None, None)
    assert found["verdict"] == "B is better: the other's loss is not finite."


# ------------------------------------------------------------------------------------------------------------- in groups


def test_groups_are_compared_by_their_runs(place: Place, capsys: pytest.CaptureFixture[str]):
    names = ("a", "near"), ("b", "c", "d")
    groups = [[place.runs[name] for name in group] for group in names]
    found = compared(capsys, *groups[0], "--windows", 50, "--against", *groups[1])
    ones, others = ([own["loss"] for own in found[letter]] for letter in ("a", "b"))
    stats = pytest.importorskip("scipy.stats")
    welch_test = stats.ttest_ind(ones, others, equal_var=False)
    assert (found["basis"], found["count"]) == ("runs", 5)
    assert found["difference"] == pytest.approx(np.mean(ones) - np.mean(others))
    assert found["p"] == pytest.approx(welch_test.pvalue, rel=1e-5)
    assert found["confidence_interval"] == pytest.approx(list(welch_test.confidence_interval(0.95)), rel=1e-4)


def test_what_follows_against_is_the_second_group():
    assert split_groups(["a", "b", "--against", "c", "d", "--json"]) == (["a", "b", "--json"], ["c", "d"])
    assert split_groups(["a", "b"]) == (["a", "b"], None)


# ----------------------------------------------------------------------------------------------------------- as recorded


def recorded(folder: Path, loss: float, error: float | None = 0.01, config: str = "") -> Path:
    more = {} if error is None else {"eval/val_loss_standard_error": error}
    return write_run(
        folder, [train_row(9, 3.0), eval_row(10, loss, **{"eval/bits_per_byte": loss}, **more)], config_yaml=config
    )


def test_without_checkpoints_what_was_recorded_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b, c = (recorded(tmp_path / name, loss) for name, loss in (("a", 2.0), ("b", 2.1), ("c", 2.02)))
    clear, unclear = compared(capsys, a, b), compared(capsys, a, c)
    assert (clear["basis"], clear["better"], unclear["better"]) == ("recorded", "A", None)
    assert clear["standard_error"] == pytest.approx(math.hypot(0.01, 0.01))
    assert "chance makes in 16% of such comparisons" in unclear["verdict"]
    assert main([str(a), str(b)]) == 0
    assert "as if of different windows" in capsys.readouterr().out
    groups = compared(capsys, a, c, "--against", b, recorded(tmp_path / "d", 2.12))
    assert (groups["basis"], groups["difference"]) == ("runs", pytest.approx(-0.1))


def test_without_error_bars_nobody_can_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = recorded(tmp_path / "a", 2.0, None), recorded(tmp_path / "b", 3.0, None)
    found = compared(capsys, a, b)
    assert (found["better"], found["standard_error"]) == (None, None)
    assert found["verdict"].startswith("Nobody can tell: the losses differ by 1.0000")


def test_losses_of_other_windows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    configs = ["evaluation:\n  eval_iters: 5\n", "evaluation:\n  eval_iters: 6\n", "data:\n  val_data_path: here\n"]
    runs = [recorded(tmp_path / str(number), 2.0, config=config) for number, config in enumerate(configs)]
    assert "different windows (evaluation.eval_iters)" in refused(main, capsys, *runs[:2])
    assert "data.val_data_path" in refused(main, capsys, runs[0], runs[2])


# -------------------------------------------------------------------------------------------------------------- refusals


def test_other_tokenizers_are_refused(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ranks = {bytes([byte]): byte for byte in range(256)}
    other = save_run(tmp_path / "other", new_model(0), place.data, tokenizer=BpeTokenizer("mine", ranks, GPT2_PATTERN))
    message = refused(main, capsys, place.runs["a"], other)
    assert "has another tokenizer (mine)" in message
    assert "bits per byte" in message


def test_what_cannot_be_compared_is_one_line(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = place.runs["a"], place.runs["b"]
    elsewhere = save_run(tmp_path / "elsewhere", new_model(3), tmp_path / "nowhere")
    no_val = write_run(tmp_path / "no_val", [train_row(1, 3.0)])
    cases = {
        (): "two runs are compared, got 0",
        (a,): "two runs are compared, got 1",
        (a, b, a): "A1 A2 --against B1 B2",
        (a, "--against", b): "two runs on either side at least",
        (a, a, "--against", b, place.runs["c"]): "stands twice",
        (a, tmp_path / "missing"): "missing does not exist",
        (a, elsewhere): "made with different data",
        (a, b, "--data", tmp_path / "missing"): "missing does not exist",
        (a, b, "--context_length", T + 1): "33 is more than a model's 32",
        (a, b, "--windows", 1): "windows: at least 2, got 1",
        (a, b, "--window", 5): "did you mean",
        (no_val, recorded(tmp_path / "val", 2.0)): "has recorded no validation loss",
    }
    for words, expected in cases.items():
        message = refused(main, capsys, *words)
        assert expected in message, words
        assert message.count("\n") == 1
        AcceleratorState._reset_state(True)


# ------------------------------------------------------------------------------------------------------------ error bars


@pytest.mark.parametrize("freedom", [1, 1.7, 3, 31, 1000, 1e6])
def test_students_t_is_scipys(freedom: float):
    t = pytest.importorskip("scipy.stats").t
    assert t_quantile(0.95, freedom) == pytest.approx(t.ppf(0.975, freedom), rel=1e-5)
    for value in (0.0, 0.5, 2.0, 6.0):
        assert t_outside(value, freedom) == pytest.approx(2 * t.sf(value, freedom), rel=1e-4, abs=1e-13)


def _found(values: np.ndarray) -> tuple[bool, bool]:
    """Whether a mean of 0 is taken for another, by us and as if all values were independent."""
    naive = Estimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(values.size), values.size - 1)
    return mean_of(values).is_certain, naive.is_certain


@pytest.mark.parametrize(("together", "ours", "naive"), [(0.0, (0.01, 0.07), (0.02, 0.09)), (0.9, (0.01, 0.15), (0.4, 0.9))])
def test_chance_is_rarely_taken_for_a_difference(together: float, ours: tuple[float, float], naive: tuple[float, float]):
    """One in twenty times; as often where neighbours are alike, which is where the usual error fails (the control)."""
    draw, count = np.random.default_rng(0), 400
    found = []
    for _ in range(count):
        steps, values = draw.normal(size=1200), np.empty(1200)
        level = 0.0
        for i, step in enumerate(steps):
            level = values[i] = together * level + step
        found.append(_found(values))
    rates = np.mean(found, axis=0)
    assert ours[0] <= rates[0] <= ours[1]
    assert naive[0] <= rates[1] <= naive[1]


def test_a_difference_that_is_there_is_found():
    values = np.random.default_rng(0).normal(0.1, 1, 4000)
    estimate = mean_of(values)
    low, high = estimate.interval
    assert low < 0.1 < high
    assert estimate.is_certain
    assert estimate.p < 1e-3


def test_a_single_value_and_equal_groups_say_nothing_more_than_they_can():
    assert not mean_of(np.array([3.0])).is_certain
    same = welch(np.array([2.0, 2.0]), np.array([2.0, 2.0]))
    assert (same.value, same.standard_error, same.p, same.is_certain) == (0, 0, 1, False)
