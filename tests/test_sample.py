"""``accel_pretrain.sample``: what it prints, where, and what it refuses. The model is hand-made, so that its text is known."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from accel_pretrain.checkpoint import TrainState, write_model_description
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.publish import publish
from accel_pretrain.sample import RULE, decode_stream, main
from accel_pretrain.tokenizer import ByteTokenizer
from tests.running import refused

ROOT = Path(__file__).resolve().parents[1]
EOT, PADDING, VOCAB = 256, 300, 320
TEXT = "é日🙂"  # no byte of it comes twice
HABITS = dict(zip([EOT, *TEXT.encode()], [*TEXT.encode(), EOT], strict=True)) | {ord("z"): PADDING}


def habitual_model() -> Transformer:
    """After each token of ``HABITS`` its partner is by far the likeliest, and after ``z`` next ``y``; others are all alike."""
    config = ModelConfig(context_length=32, d_model=VOCAB, num_layers=1, num_heads=2, d_ff=8)
    model = Transformer(config, VOCAB)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # the block adds nothing
                parameter.zero_()
        model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        model.lm_head.weight.zero_()
        for token, following in HABITS.items():
            model.lm_head.weight[following, token] = 3
        model.lm_head.weight[ord("y"), ord("z")] = 2
    return model


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint of the hand-made model, and one without a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("runs")
    accelerator, model = Accelerator(cpu=True), habitual_model()
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for name, with_tokenizer in (("run", True), ("bare", False)):

        def write_extras(checkpoint: Path, with_tokenizer: bool = with_tokenizer) -> None:
            write_model_description(checkpoint, model.config, VOCAB)
            if with_tokenizer:
                ByteTokenizer().save(checkpoint / "tokenizer")

        publish(accelerator, folder / name, TrainState(step=7), facts={}, write_extras=write_extras, is_best=True)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return folder / "run"


def sampled(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def launch(*words: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "accel_pretrain.sample", *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, env=os.environ | environment, check=False)


# --------------------------------------------------------------------------------------------------------------- output


def test_standard_output_is_the_text_and_nothing_else(run_dir: Path):
    done = launch("--checkpoint", run_dir, "--temperature", 0, "--num_samples", 2)
    assert done.stdout.decode() == f"{TEXT}\n{RULE}\n{TEXT}\n"
    assert b"18 tokens in" in done.stderr
    assert b"tokens/s on cpu" in done.stderr
    assert done.returncode == 0


def test_prompts_come_from_the_command_line_standard_input_and_a_file_in_this_order(run_dir: Path, tmp_path: Path):
    (tmp_path / "prompt").write_text("one, two\n")
    words = ["--prompt", "z", "--prompt=-", "--prompt_file", tmp_path / "prompt"]
    done = launch("--checkpoint", run_dir, *words, "--max_new_tokens=1", "sampling.temperature=0", stdin="né".encode())
    texts = done.stdout.decode().split(f"\n{RULE}\n")
    assert texts[0] == "zy"  # the padding id would have been likelier
    assert texts[1].startswith("né")
    assert texts[2].startswith("one, two\n")
    assert len(texts) == 3


def test_a_terminal_without_unicode_gets_question_marks(run_dir: Path):
    done = launch("--checkpoint", run_dir, "--temperature", 0, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stdout) == (0, b"???\n")


@pytest.mark.parametrize("pointer", ["", "latest", "best", "checkpoint_00000007"])
def test_every_name_of_a_checkpoint_will_do(run_dir: Path, pointer: str, capsys: pytest.CaptureFixture[str]):
    assert sampled(capsys, "--checkpoint", run_dir / pointer, "--temperature", 0) == f"{TEXT}\n"


def test_the_seed_decides_the_text_and_other_samples_do_not(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    def text(*words: object) -> str:
        return sampled(capsys, "--checkpoint", run_dir, "--max_new_tokens", 12, *words)

    first = text("--prompt", "hello")
    assert text("--prompt", "hello") == first
    assert text("--prompt", "hello", "--seed", 7) != first
    together = text("--prompt", "before", "--prompt", "hello", "--num_samples", 2).split(f"{RULE}\n")
    assert together[2] == first
    assert len(set(together)) == 4


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_how_many_are_generated_together_changes_nothing(run_dir: Path, batch_size: int, capsys: pytest.CaptureFixture[str]):
    """Prompts and texts of several lengths, some of them beyond the context."""
    prompts = ("--prompt", "hello", "--prompt", "é", "--prompt", "much longer than the others are")
    words = ("--checkpoint", run_dir, *prompts, "--num_samples", 2, "--max_new_tokens", 40)
    text = sampled(capsys, *words, "--batch_size", batch_size)
    assert text.count(f"{RULE}\n") == 5
    assert text == sampled(capsys, *words, "--batch_size", 6)
    assert text != sampled(capsys, *words, "--seed", 1)


def test_filters_and_bfloat16_are_options(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    words = ("--checkpoint", run_dir, "--temperature", 0)
    assert sampled(capsys, *words, "--dtype", "bfloat16") == f"{TEXT}\n"
    assert sampled(capsys, "--checkpoint", run_dir, "--min_p", 1) == f"{TEXT}\n"
    words = ("--checkpoint", run_dir, "--temperature", 1, "--prompt", "日é")
    assert sampled(capsys, *words) == "日é日🙂\n"
    assert not sampled(capsys, *words, "--repetition_penalty", 100).startswith("日é日")


def test_a_prompt_that_means_null_elsewhere_is_text_here(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert sampled(capsys, "--checkpoint", run_dir, "--prompt", "null", "--max_new_tokens", 1).startswith("null")


def test_a_prompt_longer_than_the_context_says_so(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--checkpoint", str(run_dir), "--prompt", "x" * 40, "--max_new_tokens", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("x" * 40)
    assert "last 32 of its 40 tokens" in err


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    keys = "checkpoint prompt prompt_file num_samples batch_size tokenizer device dtype max_new_tokens"
    keys += " temperature top_k top_p min_p repetition_penalty seed"
    assert all(f"  {key}: " in shown for key in keys.split())


def test_each_token_is_shown_as_soon_as_it_is_there(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    shown = [""]

    class Terminal(io.StringIO):
        def flush(self) -> None:
            if self.getvalue() != shown[-1]:
                shown.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["--checkpoint", str(run_dir), "--temperature", "0"]) == 0
    assert shown == ["", "é", "é日", "é日🙂", "é日🙂\n"]


# ------------------------------------------------------------------------------------------------------------- decoding


def test_a_character_split_over_tokens_is_whole():
    pieces = list(decode_stream(ByteTokenizer(), "a日!".encode()))
    assert pieces == ["a", "", "", "日", "!", ""]


@pytest.mark.parametrize("ids", [[0xE6, 0x97], [0xFF, 65], [0xE6, 65, 0x97, 0xA5], [0xF0, 0x9F, 256, 0x99, 0x82], []])
def test_pieces_together_are_the_decoded_whole(ids: list[int]):
    assert "".join(decode_stream(ByteTokenizer(), ids)) == ByteTokenizer().decode(ids)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_is_missing_or_empty_is_one_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    good = ("--checkpoint", run_dir)
    cases = {
        (): "--checkpoint RUN",
        ("--checkpoint", tmp_path / "nowhere"): "nowhere does not exist",
        (*good, "--prompt_file", tmp_path / "empty"): "empty is empty",
        (*good, "--prompt_file", tmp_path / "latin"): "not UTF-8",
        (*good, "--prompt_file", tmp_path): "cannot read",
        (*good, "--prompt", "caf\udce9"): "not UTF-8",
        (*good, "--temprature", 1): "did you mean sampling.temperature?",
        (*good, "--top_p", 0): "top_p: must be above 0",
        (*good, "--num_samples", 0): "num_samples",
        (*good, "--batch_size", 0): "batch_size",
        (*good, "--min_p", 2): "min_p: must be",
        (*good, "--dtype", "float8"): "float32 | bfloat16",
        (*good, "--device", "tpu"): "auto | cuda | mps | cpu",
    }
    for words, expected in cases.items():
        message = refused(main, capsys, *words)
        assert expected in message
        assert message.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert "cuda is not available" in refused(main, capsys, "--checkpoint", run_dir, "--device", "cuda")


def test_a_damaged_checkpoint_is_refused(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = shutil.copytree(run_dir, tmp_path / "run") / "checkpoint_00000007"
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(weights)
    assert "model.safetensors was changed" in refused(main, capsys, "--checkpoint", checkpoint)


def test_a_run_without_tokenizer_needs_one(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    bare = run_dir.with_name("bare")
    assert "--tokenizer" in refused(main, capsys, "--checkpoint", bare)
    assert sampled(capsys, "--checkpoint", bare, "--tokenizer", "bytes", "--temperature", 0) == f"{TEXT}\n"


def test_a_tokenizer_that_is_not_the_models_is_refused(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import base64

    ranks = [bytes([byte]) for byte in range(256)] + [b"%d" % number for number in range(1000, 1100)]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (tmp_path / "big.tiktoken").write_text("".join(lines))
    words = ("--tokenizer", tmp_path / "big.tiktoken")
    assert "holds its own" in refused(main, capsys, "--checkpoint", run_dir, *words)
    assert "has 357 ids, the model knows only 320" in refused(main, capsys, "--checkpoint", run_dir.with_name("bare"), *words)
