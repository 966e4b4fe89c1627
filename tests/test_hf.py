"""``python -m accel_pretrain.hf``: folders of transformers in and out, against transformers itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from accel_pretrain.checkpoint import load_model, write_model_description
from accel_pretrain.hf.__main__ import main
from accel_pretrain.hf.exporting import choose_family
from accel_pretrain.hf.verify import probes
from accel_pretrain.models import ModelConfig
from accel_pretrain.models.rope import rope_table
from accel_pretrain.publish import publish_weights
from accel_pretrain.tokenizer import BpeTokenizer, ByteTokenizer, load_tokenizer
from tests.running import REPO, environment, first_and_slow, launch, losses, newest
from tests.test_hf_parity import SHAPES, family_of

transformers = pytest.importorskip("transformers")
V = 257


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch):
    """transformers warns about its own future in ways that change with its version."""
    monkeypatch.setattr("warnings.showwarning", lambda *args, **kwargs: None)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run(*words: object) -> int:
    """The exit code of a command."""
    try:
        return main([str(word) for word in words])
    except SystemExit as done:
        return int(done.code or 0)


def train(*words: object) -> int:
    """The exit code of a short run in this process; the shape is that of ``--init_from``."""
    from accelerate.state import AcceleratorState, GradientState

    from accel_pretrain import train

    try:
        small = ("--batch_size", "4", "--eval_iters", "1", "--device", "cpu", "--cpu_threads", "1")
        return train.main([str(word) for word in (*small, *words)])
    except SystemExit as done:
        return int(done.code or 0)
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def hf_folder(folder: Path, shape: str, *, vocab_size: int = V, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """What ``save_pretrained`` writes for one of the shapes, with random weights; no tokenizer."""
    family, config = family_of(shape), replace(SHAPES[shape][1], vocab_size=vocab_size)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**family.write_config(config, eot_id=256)), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def their_logits(folder: Path, tokens_BT: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens_BT).logits


def our_logits(run_dir: Path, tokens_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(run_dir)(tokens_BT)


def tokens(vocab_size: int = V, T: int = 30) -> torch.Tensor:
    return torch.randint(vocab_size, (3, T), generator=torch.Generator().manual_seed(1))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- both directions


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "no bias" not in shape])
def test_import_export_import_for_every_family(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = hf_folder(tmp_path / "source", shape)
    assert run("import", source, "-o", tmp_path / "run") == 0
    assert "Logits equal those of transformers" in capsys.readouterr().out
    expected = their_logits(source, tokens())
    assert (our_logits(tmp_path / "run", tokens()) - expected).abs().max() <= 1e-4

    assert run("export", "--checkpoint", tmp_path / "run", "-o", tmp_path / "again") == 0
    assert (their_logits(tmp_path / "again", tokens()) - expected).abs().max() <= 1e-5
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() - {"lm_head.weight"} == after.keys() - {"lm_head.weight"}
    assert all(torch.equal(before[name], after[name]) for name in after if name in before)

    assert run("import", tmp_path / "again", "-o", tmp_path / "run again") == 0
    assert run("export", "--checkpoint", tmp_path / "run again", "-o", tmp_path / "once more") == 0
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert digest(tmp_path / "again" / name) == digest(tmp_path / "once more" / name), name
    changed = after | {name: tensor + 1e-3 for name, tensor in after.items() if "norm" in name or "ln_" in name}
    save_file(changed, tmp_path / "once more" / "model.safetensors", metadata={"format": "pt"})
    assert (their_logits(tmp_path / "once more", tokens()) - expected).abs().max() > 1e-4  # control
    assert digest(tmp_path / "again" / "model.safetensors") != digest(tmp_path / "once more" / "model.safetensors")


@pytest.mark.parametrize("layout", ["sharded", "bin", "sharded bin", "bare names", "multimodal"])
def test_other_layouts_of_a_folder(layout: str, tmp_path: Path):
    shape = "gemma3" if layout == "multimodal" else "gpt2" if layout == "bare names" else "llama"
    source = hf_folder(tmp_path / "source", shape, max_shard_size="50KB" if layout.startswith("sharded") else "5GB")
    expected = their_logits(source, tokens())
    weights = source / "model.safetensors"
    if layout.startswith("sharded"):
        assert len(list(source.glob("model-*.safetensors"))) > 2
    if layout == "bin":
        torch.save(load_file(weights), source / "pytorch_model.bin")
        weights.unlink()
    if layout == "sharded bin":
        for shard in source.glob("model-*.safetensors"):
            torch.save(load_file(shard), source / f"pytorch_{shard.stem}.bin")
            shard.unlink()
        index = source / "model.safetensors.index.json"
        text = re.sub(r"(model-\S*?)\.safetensors", r"pytorch_\1.bin", index.read_text())
        (source / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()
    if layout == "bare names":  # as the hub's gpt2, masks included
        state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(weights).items()}
        save_file(state | {"h.0.attn.bias": torch.ones(1, 1, 40, 40)}, weights, metadata={"format": "pt"})
    if layout == "multimodal":
        text_config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(
            json.dumps({"model_type": "gemma3", "text_config": text_config, "vision_config": {}})
        )
        state = {f"language_model.{name}": tensor for name, tensor in load_file(weights).items()}
        save_file(state | {"vision_tower.x.weight": torch.ones(3)}, weights, metadata={"format": "pt"})
    verify = ["--verify", "false"] if layout == "multimodal" else []
    assert run("import", source, "-o", tmp_path / "run", *verify) == 0
    assert (our_logits(tmp_path / "run", tokens()) - expected).abs().max() <= 1e-4


@pytest.mark.slow
def test_hub_id_is_found_in_the_hubs_own_cache(tmp_path: Path):
    """The same call that downloads: without a network it gives what an earlier download left."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    hf_folder(repository / "snapshots" / "0123abc", "qwen3")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    command = [sys.executable, "-m", "accel_pretrain.hf", "import", "someone/tiny", "-o", str(tmp_path / "run")]
    env = environment(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = their_logits(repository / "snapshots" / "0123abc", tokens())
    assert (our_logits(tmp_path / "run", tokens()) - expected).abs().max() <= 1e-4
    command[4] = "someone/absent"
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "someone/absent is not a local folder, and could not be had from the hub" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_in_and_out(dtype: str, tmp_path: Path):
    source = hf_folder(tmp_path / "source", "llama", dtype=getattr(torch, dtype))
    assert run("import", source, "-o", tmp_path / "run") == 0
    assert (our_logits(tmp_path / "run", tokens()) - their_logits(source, tokens())).abs().max() <= 1e-4
    assert run("export", "--checkpoint", tmp_path / "run", "-o", tmp_path / "out", "--dtype", dtype) == 0
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(after[name].dtype == getattr(torch, dtype) and torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == dtype


@pytest.mark.slow
def test_qwen2_exports_without_a_tokenizer_that_transformers_would_replace(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """For this family transformers ignores what tokenizer_config.json says, and splits text by Qwen's own pattern."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"12": 256}
    BpeTokenizer("pairs", ranks, r"\d\d|[^\d]|\d").save(tmp_path / "pairs")
    run(
        "import",
        hf_folder(tmp_path / "source", "qwen2", vocab_size=258),
        "-o",
        tmp_path / "run",
        "--tokenizer",
        tmp_path / "pairs",
    )
    assert run("export", "--checkpoint", tmp_path / "run", "-o", tmp_path / "out") == 2
    assert "type --without_tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("export", "--checkpoint", tmp_path / "run", "-o", tmp_path / "out", "--without_tokenizer") == 0
    run(
        "import",
        hf_folder(tmp_path / "llama", "llama", vocab_size=258),
        "-o",
        tmp_path / "other",
        "--tokenizer",
        tmp_path / "pairs",
    )
    assert run("export", "--checkpoint", tmp_path / "other", "-o", tmp_path / "control") == 0  # control


def test_sharded_export_loads(tmp_path: Path):
    source = hf_folder(tmp_path / "source", "llama")
    run("import", source, "-o", tmp_path / "run")
    assert run("export", "--checkpoint", tmp_path / "run", "-o", tmp_path / "out", "--max_shard_gb", "5e-5") == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert torch.equal(their_logits(tmp_path / "out", tokens()), their_logits(source, tokens()))


# ------------------------------------------------------------------------------------------------------------- the vocabulary


@pytest.mark.parametrize("shape", first_and_slow(["gpt2", "llama"]))
def test_padded_vocabulary_keeps_the_logits_and_is_hardly_ever_drawn(shape: str, tmp_path: Path):
    source = hf_folder(tmp_path / "source", shape)
    expected = their_logits(source, tokens())
    assert run("import", source, "-o", tmp_path / "run", "--pad_vocab_to_multiple_of", "64") == 0
    padded = our_logits(tmp_path / "run", tokens())
    assert padded.shape[-1] == 320
    assert (padded[..., :V] - expected).abs().max() <= 1e-4
    torch.testing.assert_close(padded[..., V:], expected.mean(-1, keepdim=True).expand(-1, -1, 63), atol=1e-4, rtol=1e-4)
    assert run("export", "--checkpoint", tmp_path / "run", "-o", tmp_path / "out", "--trim_vocab") == 2  # no tokenizer: unknown
    words = ("export", "--checkpoint", tmp_path / "run", "-o", tmp_path / "out", "--trim_vocab", "--tokenizer", "bytes")
    assert run(*words) == 0
    assert (their_logits(tmp_path / "out", tokens()) - expected).abs().max() <= 1e-4
    assert their_logits(tmp_path / "out", tokens()).shape[-1] == V


# ---------------------------------------------------------------------------------------------- what a person does with it


def test_imported_model_trains_evaluates_and_samples(tmp_path: Path, dataset: Path):
    """And is exported again with its tokenizer, so that transformers reads and writes text with it."""
    source = hf_folder(tmp_path / "source", "qwen3")
    assert run("import", source, "-o", tmp_path / "imported", "--tokenizer", "bytes") == 0
    words = [
        "--init_from",
        str(tmp_path / "imported"),
        "--train_data_path",
        str(dataset),
        "--checkpoint_dir",
        str(tmp_path / "run"),
    ]
    words += ["--max_iters", "30", "--lr", "3e-3", "--batch_size", "8", "--log_interval", "1", "--eval_interval", "30"]
    words += ["--eval_iters", "1", "--device", "cpu", "--checkpoint_interval", "10"]
    env = environment(OMP_NUM_THREADS="1")

    def program(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = launch(arguments, module=f"accel_pretrain.{module}")
        return subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=200)

    trained = program("train", *words)
    assert trained.returncode == 0, trained.stderr
    assert f"Beginning with the weights of {tmp_path}/imported/checkpoint_00000000" in trained.stdout
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 1
    again = program("train", *words, "--max_iters", "32")
    assert f"Resuming from {newest(tmp_path / 'run').parent}/checkpoint_00000030" in again.stdout, again.stdout + again.stderr
    evaluated = program("evaluate", "--checkpoint", str(tmp_path / "imported"), "--data", str(dataset), "--eval_iters", "1")
    assert "nats per token" in evaluated.stdout, evaluated.stderr
    sampled = program("sample", "--checkpoint", str(tmp_path / "run"), "--prompt", "import ", "--temperature", "0")
    assert sampled.stdout.startswith("import "), sampled.stderr

    assert run("export", "--checkpoint", tmp_path / "run", "-o", tmp_path / "out") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tokenizer("import ", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=30, do_sample=False)[0])
    assert sampled.stdout.startswith(text.removesuffix("<|endoftext|>"))
    assert model.generation_config.eos_token_id == ByteTokenizer().eot_id


def test_init_from_begins_with_the_very_weights(tmp_path: Path, dataset: Path):
    source = hf_folder(tmp_path / "source", "llama")
    run("import", source, "-o", tmp_path / "imported", "--tokenizer", "bytes")
    words = (
        "--init_from",
        tmp_path / "imported",
        "--train_data_path",
        dataset,
        "--max_iters",
        "1",
        "--lr",
        "1e-30",
        "--eval_iters",
        "1",
    )
    assert train(*words, "--weight_decay", "0", "--checkpoint_dir", tmp_path / "run") == 0
    ours, imported = load_model(tmp_path / "run"), load_model(tmp_path / "imported")
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), imported.parameters(), strict=True))
    assert train(*words, "--lr", "1e-3", "--checkpoint_dir", tmp_path / "other") == 0
    other = load_model(tmp_path / "other")
    assert not torch.equal(other.embed_tokens.weight, imported.embed_tokens.weight)  # control


def test_init_from_goes_with_a_config_file_and_resumes_from_its_own(tmp_path: Path, dataset: Path):
    """A file may say what is so anyway, in other words; and the run's own config names every key of the model."""
    run("import", hf_folder(tmp_path / "source", "llama"), "-o", tmp_path / "imported", "--tokenizer", "bytes")
    (tmp_path / "c.yaml").write_text("model:\n  d_model: 48\n  head_dim: null\n  context_length: 16\n  dropout: 0.1\n")
    words = ("--init_from", tmp_path / "imported", "--train_data_path", dataset, "--checkpoint_dir", tmp_path / "run")
    assert train("--config", tmp_path / "c.yaml", *words, "--max_iters", "1") == 0
    assert load_model(tmp_path / "run").config.context_length == 16
    assert train("--config", tmp_path / "run" / "config.yaml", "--max_iters", "2") == 0
    assert train("--resume_from", tmp_path / "run", "--max_iters", "3") == 0
    assert newest(tmp_path / "run").name == "checkpoint_00000003"


def test_init_from_with_another_context_keeps_the_rotary_frequencies(tmp_path: Path, dataset: Path):
    shape = replace(SHAPES["llama 3.1"][1], vocab_size=V, rope_original_context=None, rope_factor=1.25)
    checkpoint_of(tmp_path / "start", shape)
    words = ("--init_from", tmp_path / "start", "--train_data_path", dataset, "--max_iters", "1", "--context_length", "20")
    assert train(*words, "--checkpoint_dir", tmp_path / "run") == 0
    before, after = load_model(tmp_path / "start"), load_model(tmp_path / "run")
    assert torch.equal(before.rope[:, :20], after.rope)
    assert not torch.equal(rope_table(replace(shape, context_length=20)), after.rope)  # control: unpinned, they follow it


def test_tokenizer_of_an_imported_run_makes_data(tmp_path: Path):
    run("import", hf_folder(tmp_path / "source", "llama"), "-o", tmp_path / "imported", "--tokenizer", "bytes")
    assert load_tokenizer(tmp_path / "imported").fingerprint == ByteTokenizer().fingerprint


def test_special_tokens_and_sampling_of_the_source_come_out_again(tmp_path: Path):
    source = hf_folder(tmp_path / "source", "llama")
    keys = json.loads((source / "config.json").read_text()) | {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
    (source / "config.json").write_text(json.dumps(keys))
    said = {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(said))
    run("import", source, "-o", tmp_path / "run")
    assert run("export", "--checkpoint", tmp_path / "run", "-o", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == said
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [exported[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [1, [2, 3], 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--d_model", "64"), "model.d_model: {imported} has 48, this config says 64"),
        (("--qk_norm", "true", "--bias", "true"), "model.qk_norm: {imported} has False, this config says True"),
        (("--vocab_size", "300"), "model.vocab_size: {imported} has 257, this config says 300"),
    ],
)
def test_init_from_refuses_another_shape(
    words: tuple[str, ...], message: str, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    run("import", hf_folder(tmp_path / "source", "llama"), "-o", tmp_path / "imported", "--tokenizer", "bytes")
    imported = tmp_path / "imported"
    code = train("--init_from", imported, "--train_data_path", dataset, "--checkpoint_dir", tmp_path / "run", *words)
    assert code == 2
    assert message.format(imported=imported) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_init_from_refuses_data_of_another_tokenizer(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    BpeTokenizer("other", ranks, r"\S+|\s+").save(tmp_path / "other")
    source = hf_folder(tmp_path / "source", "llama", vocab_size=300)
    run("import", source, "-o", tmp_path / "imported", "--tokenizer", tmp_path / "other")
    assert train("--init_from", tmp_path / "imported", "--train_data_path", dataset, "--checkpoint_dir", tmp_path / "run") == 2
    assert "made with the tokenizer bytes, but" in capsys.readouterr().err


def test_resuming_from_imported_weights_says_what_to_type(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]):
    run("import", hf_folder(tmp_path / "source", "llama"), "-o", tmp_path / "imported", "--tokenizer", "bytes")
    assert train("--resume_from", tmp_path / "imported", "--train_data_path", dataset) == 2
    assert f"no optimizer: to begin a run with it, type --init_from {tmp_path}/imported" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- what is refused


def checkpoint_of(run_dir: Path, config: ModelConfig) -> Path:
    """A published checkpoint with random weights."""
    from accel_pretrain.models import Transformer

    assert config.vocab_size is not None
    torch.manual_seed(0)
    model = Transformer(config, config.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)

    def write(folder: Path) -> None:
        save_file(model.state_dict(), folder / "model.safetensors")
        write_model_description(folder, config, V)
        ByteTokenizer().save(folder / "tokenizer")

    return publish_weights(run_dir, write)


LLAMA = replace(SHAPES["llama"][1], vocab_size=V)


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"logit_softcap": 15.0}, "llama, the nearest of gpt2, llama, mistral"),
        ({"activation": "relu2"}, "has no activation: relu2"),
        ({"norm": "rmsnorm_plain", "activation": "relu2", "qk_norm": True, "value_embeddings": True}, "value_embeddings: True"),
        ({"sliding_window": 8, "window_pattern": "SF"}, "window_pattern: SFS"),
    ],
)
def test_what_transformers_has_no_class_for_is_refused(
    changes: dict[str, Any], lacking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint_of(tmp_path / "run", replace(LLAMA, **changes))
    assert run("export", "--checkpoint", tmp_path / "run", "-o", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "transformers has no architecture for this model" in said
    assert lacking in said
    assert os.listdir(tmp_path) == ["run"]
    assert choose_family(LLAMA).model_type == "llama"  # control


def test_the_family_is_the_one_the_shape_came_from():
    chosen = {shape: choose_family(config).model_type for shape, (_, config) in SHAPES.items()}
    assert chosen == {shape: model_type for shape, (model_type, _) in SHAPES.items()}


def test_export_whose_logits_differ_is_not_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    checkpoint_of(tmp_path / "run", LLAMA)
    from accel_pretrain.hf import exporting

    right = exporting.read_theirs
    monkeypatch.setattr(
        exporting, "read_theirs", lambda link, *rest: right(link, *rest) * (1.02 if "q_proj" in link.theirs else 1)
    )
    assert run("export", "--checkpoint", tmp_path / "run", "-o", tmp_path / "out") == 2
    assert "its logits differ from those of the checkpoint by" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run"]
    monkeypatch.undo()
    assert run("export", "--checkpoint", tmp_path / "run", "-o", tmp_path / "out") == 0  # control


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys, state: keys.update(model_type="bloom"), "model_type bloom is not one of gpt2, llama"),
        (lambda keys, state: keys.update(hidden_act="gelu"), "llama: hidden_act 'gelu' is not supported, only 'silu'"),
        (
            lambda keys, state: keys.update(rope_parameters={"rope_type": "yarn", "factor": 2.0}),
            "of the type 'yarn' are not supported",
        ),
        (lambda keys, state: keys.update(quantization_config={"bits": 4}), "quantised weights"),
        (lambda keys, state: keys.update(rope_parameters="x"), "config.json: rope_parameters must be an object, got 'x'"),
        (lambda keys, state: keys.update(rope_parameters={"rope_theta": "x"}), "config.json: damaged"),
        (lambda keys, state: keys.update(num_hidden_layers=10**8), "layers are not supported"),
        (lambda keys, state: keys.update(hidden_size="wide"), "config.json: d_model: expected a whole number, got 'wide'"),
        (lambda keys, state: keys.update(intermediate_size=100), "has the shape (48, 96), but the config says (48, 100)"),
        (lambda keys, state: keys.update(num_hidden_layers=4), "model.layers.3.input_layernorm.weight is missing, and 8 more"),
        (
            lambda keys, state: state.update({"model.extra": torch.ones(2)}),
            "model.extra is not part of a llama of transformers",
        ),
        (lambda keys, state: state["model.norm.weight"].fill_(torch.nan), "model.norm.weight holds NaN or infinity"),
        (lambda keys, state: state.update({"model.norm.weight": torch.ones(48).int()}), "quantised weights are not supported"),
    ],
)
def test_import_refuses_with_one_line(
    change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    source = hf_folder(tmp_path / "source", "llama")
    keys, state = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    change(keys, state)
    (source / "config.json").write_text(json.dumps(keys))
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    assert run("import", source, "-o", tmp_path / "deep" / "run") == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert os.listdir(tmp_path) == ["source"]  # nothing is left behind


@pytest.mark.parametrize(
    "words", [("import",), ("export",), ("convert", "x"), ("import", "a", "b", "-o", "c"), ("import", "/nowhere", "-o", "x")]
)
def test_bad_command_lines_exit_with_two(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    assert run(*words) == 2
    assert capsys.readouterr().err.startswith("error:")


def test_existing_directories_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = hf_folder(tmp_path / "source", "llama")
    assert run("import", source, "-o", tmp_path / "run") == 0
    before = digest(tmp_path / "run" / "checkpoint_00000000" / "model.safetensors")
    assert run("import", source, "-o", tmp_path / "run") == 2
    assert "already holds checkpoint_00000000" in capsys.readouterr().err
    assert run("export", "--checkpoint", tmp_path / "run", "-o", source) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err
    assert before == digest(tmp_path / "run" / "checkpoint_00000000" / "model.safetensors")


def test_probes_reach_beyond_the_window():
    assert [tokens_BT.shape[1] for tokens_BT in probes(replace(LLAMA, context_length=2048, sliding_window=512), V)] == [
        1,
        9,
        528,
    ]
    assert [tokens_BT.shape[1] for tokens_BT in probes(replace(LLAMA, context_length=4), V)] == [1, 4]
