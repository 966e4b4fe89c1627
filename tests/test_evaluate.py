"""``accel_pretrain.evaluate``: the numbers of :mod:`accel_pretrain.validation` on a dataset, and what it refuses."""

from __future__ import annotations

import json
import lzma
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

from accel_pretrain.checkpoint import CheckpointConfig, TrainState, load_model, read_tokenizer, write_model_description
from accel_pretrain.config import RunConfig
from accel_pretrain.data import DataConfig
from accel_pretrain.errors import CheckpointError
from accel_pretrain.evaluate import main
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.publish import publish
from accel_pretrain.shards import Manifest, ShardWriter, write_manifest
from accel_pretrain.tokenizer import GPT2_PATTERN, BpeTokenizer, ByteTokenizer
from accel_pretrain.typed_yaml import to_yaml
from tests.running import refused

ROOT = Path(__file__).resolve().parents[1]
T = 32
TEXTS = {
    "train": "".join(f"cat {n} sat on mat {n * n} and ate. " for n in range(60)),
    "val": "".join(f"dog {n} näps under tree {n**3}, " for n in range(40)),
}


@dataclass(frozen=True)
class Place:
    """A dataset, and a run on it that was not trained."""

    data: Path
    run: Path
    model: Transformer


def write_dataset(folder: Path, **tokenizer_facts: Any) -> Path:
    """A dataset of ``TEXTS`` in bytes; ``tokenizer_facts`` falsify what its manifest says."""
    folder.mkdir()
    tokenizer, infos = ByteTokenizer(), []
    for split, text in TEXTS.items():
        writer = ShardWriter(folder / f"{split}.bin", split, "uint16", 257)
        writer.append(tokenizer.encode_document(text), 1, len(text.encode()))
        infos.append(writer.close())
    tokenizer.save(folder / "tokenizer")
    facts = {"name": "bytes", "vocab_size": 257, "eot_id": 256, "fingerprint": tokenizer.fingerprint} | tokenizer_facts
    write_manifest(folder, Manifest(dtype="uint16", tokenizer=facts, files=tuple(infos)))
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("evaluate")
    data, run = write_dataset(folder / "data"), folder / "run"
    torch.manual_seed(0)
    model = Transformer(ModelConfig(context_length=T, d_model=32, num_layers=1, num_heads=2, d_ff=32, init_std=0.2), 257)
    config = RunConfig(
        data=DataConfig(train_data_path=data), model=model.config, checkpoint=CheckpointConfig(checkpoint_dir=run)
    )

    def write_extras(checkpoint: Path) -> None:
        (checkpoint / "config.yaml").write_text(to_yaml(config))
        write_model_description(checkpoint, model.config, 257)
        ByteTokenizer().save(checkpoint / "tokenizer")

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    publish(accelerator, run, TrainState(step=3), facts={}, write_extras=write_extras)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return Place(data, run, load_model(run))


def evaluated(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main([*map(str, words), "--json", "--device", "cpu"]) == 0
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return json.loads(capsys.readouterr().out)


def mean_loss(model: Transformer, split: str, length: int) -> tuple[float, int]:
    """By definition, in float64: the mean over all targets of whole windows, and how many those are."""
    ids = torch.from_numpy(ByteTokenizer().encode_document(TEXTS[split]).astype(np.int64))
    begins = range(0, len(ids) - length, length)
    double = Transformer(model.config, 257).double()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits_BTV = double(torch.stack([ids[begin : begin + length] for begin in begins]))
    targets_BT = torch.stack([ids[begin + 1 : begin + length + 1] for begin in begins])
    loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    return float(loss), targets_BT.numel()


def xz_bits(text: str) -> float:
    packed = lzma.compress(text.encode(), lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(packed) / len(text.encode())


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("split", "length"), [("val", T), ("train", T), ("val", 10)])
def test_the_loss_is_its_definition(place: Place, capsys: pytest.CaptureFixture[str], split: str, length: int):
    words = ("--checkpoint", place.run, "--data", place.data, "--split", split, "--context_length", length)
    result, (loss, tokens) = evaluated(capsys, *words), mean_loss(place.model, split, length)
    assert result["tokens"] == tokens
    assert result["loss"] == pytest.approx(loss, abs=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    bytes_per_token = len(TEXTS[split].encode()) / (len(TEXTS[split].encode()) + 1)
    assert result["bits_per_byte"] == pytest.approx(loss / math.log(2) / bytes_per_token, rel=1e-6)
    assert result["bits_per_byte_standard_error"] / result["bits_per_byte"] == pytest.approx(
        result["standard_error"] / result["loss"]
    )
    assert abs(result["loss"] - mean_loss(place.model, "train" if split == "val" else "val", length)[0]) > 1e-3


def test_without_data_it_is_the_runs_own(place: Place, capsys: pytest.CaptureFixture[str]):
    own, named = (evaluated(capsys, "--checkpoint", place.run, *words) for words in ((), ("--data", place.data)))
    assert own == named
    assert (own["step"], own["split"], own["processes"], own["xz_bits_per_byte"]) == (3, "val", 1, None)


def test_batches_do_not_matter_and_a_part_is_another_number(place: Place, capsys: pytest.CaptureFixture[str]):
    one, many, part = (
        evaluated(capsys, "--checkpoint", place.run, "--batch_size", size, "--eval_iters", iters)
        for size, iters in ((1, "null"), (64, "null"), (2, 3))
    )
    assert one["loss"] == pytest.approx(many["loss"], abs=1e-6)
    assert part["tokens"] == 6 * T
    assert abs(part["loss"] - one["loss"]) > 1e-4


def test_a_bare_file_of_ids_has_no_bits_per_byte(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "val.bin").write_bytes((place.data / "val.bin").read_bytes())
    result = evaluated(capsys, "--checkpoint", place.run, "--data", tmp_path / "val.bin")
    assert result["loss"] == evaluated(capsys, "--checkpoint", place.run)["loss"]
    assert (result["bits_per_byte"], result["split"]) == (None, None)
    assert main(["--checkpoint", str(place.run), "--data", str(tmp_path / "val.bin")]) == 0
    assert "Bits per byte   unknown" in capsys.readouterr().out


def test_two_processes_give_the_number_of_one(place: Place, capsys: pytest.CaptureFixture[str]):
    words = ["-m", "accel_pretrain.evaluate", "--checkpoint", str(place.run), "--batch_size", "3", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *words],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two, one = json.loads(done.stdout), evaluated(capsys, "--checkpoint", place.run, "--batch_size", 3)
    assert (two.pop("processes"), one.pop("processes")) == (2, 1)
    assert _close(two, one)
    assert not _close(two, evaluated(capsys, "--checkpoint", place.run, "--eval_iters", 1))


def _close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        math.isclose(value, other[key], rel_tol=1e-6) if isinstance(value, float) else value == other[key]
        for key, value in one.items()
    )


# ------------------------------------------------------------------------------------------------------------------- xz


def test_xz_is_measured_on_the_same_text(place: Place, capsys: pytest.CaptureFixture[str]):
    result = evaluated(capsys, "--checkpoint", place.run, "--xz")
    assert result["xz_bits_per_byte"] == xz_bits(TEXTS["val"])
    assert result["xz_bits_per_byte"] != xz_bits(TEXTS["train"])


def test_the_lines_are_aligned_and_say_which_is_smaller(place: Place, capsys: pytest.CaptureFixture[str]):
    assert main(["--checkpoint", str(place.run), "--xz"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["Checkpoint", "Data", "Loss", "Perplexity", "Bits per byte", "  of xz -9e", ""]
    assert [line[:16].rstrip() for line in lines] == names
    assert re.fullmatch(r"Loss {12}\d\.\d{4} ± \d\.\d{4} nats per token", lines[2])
    assert re.fullmatch(r"  of xz -9e {5}\d\.\d{4}", lines[5])
    assert re.fullmatch(r" {16}xz's is smaller, \d+% of the model's", lines[6])


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_dataset_of_another_tokenizer_is_refused(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = write_dataset(tmp_path / "other", name="gpt2", fingerprint="0" * 64)
    message = refused(main, capsys, "--checkpoint", place.run, "--data", other, "--context_length", T + 1)
    assert message.startswith("error: 2 problems:")
    assert "another tokenizer (gpt2)" in message
    assert "context_length: 33 is more than the model's 32" in message


def test_ids_that_the_model_does_not_know_are_refused(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    np.arange(300, dtype="<u2").tofile(tmp_path / "ids.bin")
    assert "token id 299" in refused(main, capsys, "--checkpoint", place.run, "--data", tmp_path / "ids.bin")


def test_what_is_missing_or_means_nothing_is_one_line(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    np.zeros(100, dtype="<u2").tofile(tmp_path / "ids.bin")
    good = ("--checkpoint", place.run)
    cases = {
        (): "--checkpoint RUN",
        ("--checkpoint", tmp_path): "holds no checkpoint",
        (*good, "--data", tmp_path / "nowhere"): "nowhere does not exist",
        (*good, "--split", "test"): "has no test split, only train, val",
        (*good, "--batchsize", 3): "did you mean measure.batch_size?",
        (*good, "--batch_size", 0): "batch_size: must be at least 1",
        (*good, "--eval_iters", 0): "eval_iters: must be at least 1",
        (*good, "--xz", "--eval_iters", 2): "leave eval_iters null",
        (*good, "--xz", "--data", tmp_path / "ids.bin"): "bare file of ids",
    }
    for words, expected in cases.items():
        message = refused(main, capsys, *words)
        assert expected in message
        assert message.count("\n") == 1


def test_a_tokenizer_for_a_model_without_one(place: Place, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    write_model_description(bare, place.model.config, place.model.vocab_size)
    save_file(place.model.state_dict(), bare / "model.safetensors")
    assert read_tokenizer(bare, "bytes").fingerprint == ByteTokenizer().fingerprint
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        read_tokenizer(bare)
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ca": 256, b"cat": 257}
    BpeTokenizer("large", ranks, GPT2_PATTERN).save(tmp_path / "large")
    with pytest.raises(CheckpointError, match="large has 259 ids, the model knows only 257"):
        read_tokenizer(bare, str(tmp_path / "large"))


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]):
    assert main(["-h"]) == 0
    shown = capsys.readouterr().out
    keys = "checkpoint data split dtype tokenizer context_length batch_size eval_iters device mixed_precision xz json"
    keys += " tasks task_path num_fewshot limit bootstrap_iters"
    assert all(f"  {key}: " in shown for key in keys.split())
