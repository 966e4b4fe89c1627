"""Weight files of every kind read back bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from accel_pretrain.errors import CheckpointError, PretrainError
from accel_pretrain.hf import torch_files
from accel_pretrain.hf.weight_files import open_weights
from tests.weights import (
    KINDS,
    Tensors,
    as_bytes,
    assert_equal,
    small_tensors,
    write_hf_bin,
    write_hf_safetensors,
    write_index,
    write_sharded_bin,
    write_sharded_safetensors,
)

# --------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_back(kind: str, tmp_path: Path) -> None:
    tensors = small_tensors()
    path = KINDS[kind](tmp_path, tensors)
    with open_weights(path) as files:
        assert_equal(files, tensors)
        assert Path(files.where("wte.weight")).parent == tmp_path
    if kind not in ("npz", "compressed npz"):
        assert_equal(open_weights(tmp_path), tensors)


def test_the_comparison_control_sees_one_bit() -> None:
    tensors = small_tensors()
    assert as_bytes(tensors["wte.weight"]) != as_bytes(torch.nextafter(tensors["wte.weight"], torch.tensor(9.0)))


def test_a_closed_file_gives_nothing_and_a_tensor_outlives_it(tmp_path: Path) -> None:
    tensors = small_tensors()
    with open_weights(write_hf_safetensors(tmp_path, tensors)) as files:
        kept = files.read("wte.weight")
    assert list(files) == []
    assert torch.equal(kept, tensors["wte.weight"])
    with pytest.raises(CheckpointError, match=r"there is no tensor wte\.weight"):
        files.read("wte.weight")


def test_an_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor wte\.weigth; there is wte\.weight"):
        open_weights(write_hf_bin(tmp_path, small_tensors())).shape("wte.weigth")


def test_safetensors_come_before_bin(tmp_path: Path) -> None:
    write_hf_bin(tmp_path, {"old": torch.zeros(1)})
    write_hf_safetensors(tmp_path, {"new": torch.zeros(1)})
    assert open_weights(tmp_path).names() == ["new"]


def test_reading_does_not_change_the_file(tmp_path: Path) -> None:
    for write in (write_hf_safetensors, write_hf_bin):
        path = write(tmp_path, small_tensors())
        before = path.read_bytes()
        open_weights(path).read("wte.weight").zero_()
        assert path.read_bytes() == before


def test_metadata_of_safetensors_are_extras(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", metadata={"format": "pt", "step": "7"})
    assert open_weights(tmp_path / "x.safetensors").extras == {"format": "pt", "step": "7"}


def test_nanogpt(tmp_path: Path) -> None:
    weights = {"transformer.wte.weight": torch.randn(9, 4), "lm_head.weight": torch.randn(9, 4)}
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    document = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in weights.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {"n_layer": 2, "bias": False, "vocab_size": None},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3, "betas": (0.9, 0.95)},
    }
    torch.save(document, tmp_path / "ckpt.pt")
    with open_weights(tmp_path) as files:
        assert_equal(files, weights)
        assert files.extras["model_args"] == {"n_layer": 2, "bias": False}
        assert (files.extras["iter_num"], files.extras["best_val_loss"]) == (2000, 1.5)
        assert files.extras["config"] == {"dataset": "shakespeare_char", "learning_rate": 1e-3, "betas": [0.9, 0.95]}
        assert json.dumps(files.extras)  # nothing but plain values


@pytest.mark.parametrize("nested", [True, False])
def test_litgpt(nested: bool, tmp_path: Path) -> None:
    weights = {"transformer.h.0.attn.qkv.weight": torch.randn(6, 2, dtype=torch.bfloat16)}
    torch.save({"model": weights} if nested else weights, tmp_path / "lit_model.pth")
    (tmp_path / "model_config.yaml").write_text("n_layer: 6\nname: pythia-14m\nnorm_eps: 1.0e-05\n")
    files = open_weights(tmp_path)
    assert_equal(files, weights)
    assert files.extras["model_config"] == {"n_layer": 6, "name": "pythia-14m", "norm_eps": 1e-5}


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_state_dicts_are_found_and_wrappers_taken_off(key: str, prefix: str, tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(2), "b.module.weight": torch.randn(3)}
    torch.save({key: {prefix + name: value for name, value in weights.items()}, "step": 3}, tmp_path / "x.ckpt")
    files = open_weights(tmp_path / "x.ckpt")
    assert_equal(files, weights)
    assert files.extras == {"step": 3}


def test_tied_strided_and_trained_tensors_of_torch(tmp_path: Path) -> None:
    table = torch.randn(6, 4)
    parameter = torch.nn.Parameter(torch.randn(2, 3))
    tensors = {"wte": table, "lm_head": table, "transposed": table.T, "part": table[2:4, 1:], "parameter": parameter}
    torch.save(tensors, tmp_path / "x.pt")
    files = open_weights(tmp_path / "x.pt")
    assert_equal(files, {**tensors, "parameter": parameter.detach()})
    assert not files.read("parameter").requires_grad


def test_npz_of_other_machines_and_orders(tmp_path: Path) -> None:
    array = np.arange(15, dtype=np.float32).reshape(3, 5)
    np.savez(
        tmp_path / "x.npz", big=array.astype(">f4"), fortran=np.asfortranarray(array), scalar=np.float64(2), half=array[0] > 2
    )
    expected = torch.from_numpy(array)
    with open_weights(tmp_path / "x.npz") as files:
        assert torch.equal(files.read("big"), expected)
        assert torch.equal(files.read("fortran"), expected)
        assert (files.read("scalar").item(), files.shape("scalar"), files.dtype("half")) == (2.0, (), torch.bool)


def test_a_file_of_torch_is_mapped_again_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_files, "_MAP_AGAIN_AFTER", 100)
    tensors = {f"w{number}": torch.randn(20) for number in range(8)}
    assert_equal(open_weights(write_hf_bin(tmp_path, tensors)), tensors)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_files, "_MAP_AGAIN_AFTER", 0)
    tensors = {"w": torch.randn(20), "v": torch.randn(3)}
    files = open_weights(write_hf_bin(tmp_path, tensors))
    files.read("w")
    (tmp_path / "pytorch_model.bin").unlink()
    write_hf_bin(tmp_path, {"w": torch.randn(21)})
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        files.read("w")
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        files.read("v")
    other = open_weights(write_hf_safetensors(tmp_path, tensors))
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="shorter than it says"):
        other.read("w")


# --------------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("write", [write_sharded_safetensors, write_sharded_bin])
def test_the_hub_cache_with_its_links(write: Callable[[Path, Tensors], Path], tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write(snapshot, small_tensors())
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(Path("../../blobs") / f"{number:064x}")
    assert_equal(open_weights(snapshot), small_tensors())
    aside = snapshot.rename(tmp_path / "elsewhere")  # the same links, in a place that is not a cache
    (tmp_path / "models--a--b").rename(tmp_path / "gone")
    for path in aside.iterdir():
        name = path.readlink().name
        path.unlink()
        path.symlink_to(tmp_path / "gone" / "blobs" / name)
    with pytest.raises(CheckpointError, match="outside of its folder; refused"):
        open_weights(aside)


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "a\\b.safetensors",
        "x\n.safetensors",
        "x.pkl",
        "\0",
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(file: str, tmp_path: Path) -> None:
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret.safetensors", inside / "sub" / "x.safetensors"):
        save_file({"a": torch.zeros(1)}, place)
    write_index(inside, "model.safetensors.index.json", {"a": file})
    with pytest.raises(CheckpointError, match=r"is not a file of weights beside it; refused") as error:
        open_weights(inside)
    assert "\n" not in str(error.value)


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    index = write_sharded_safetensors(tmp_path, small_tensors())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    good = json.loads(index.read_text())["weight_map"]
    cases = {
        r"'h\.9' is not in model-00001": good | {"h.9": first},
        r"'wte\.weight' is not in model-00002": good | {"wte.weight": second},
        "model-00003-of-00003.safetensors is missing": good | {"h.9": "model-00003-of-00003.safetensors"},
        "has no weight_map": {},
    }
    for message, weight_map in cases.items():
        write_index(tmp_path, index.name, weight_map)
        with pytest.raises(CheckpointError, match=message):
            open_weights(tmp_path)
    write_index(tmp_path, index.name, good | {"x": 3})  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_weights(tmp_path)
    write_index(tmp_path, index.name, good)
    shutil.copy(tmp_path / first, tmp_path / second)
    with pytest.raises(
        CheckpointError, match=r"'h\.0\.attn\.bias' is also in model-00001|'h\.0\.count' is also in model-00001"
    ):
        open_weights(tmp_path)
    index.write_text('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}')
    with pytest.raises(CheckpointError, match="the key 'a' comes twice"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.gguf", "convert it to safetensors"),
        ("x.pkl", "is a pickle, which can execute code and is never loaded"),
        ("x.npy", "numpy.savez"),
        ("gone.safetensors", "does not exist"),
        (".", "holds no TensorFlow checkpoint and none of model.safetensors"),
    ],
)
def test_what_is_not_a_file_of_weights(name: str, message: str, tmp_path: Path) -> None:
    for file in ("x.gguf", "x.pkl", "x.npy"):
        (tmp_path / file).write_bytes(b"something")
    with pytest.raises(PretrainError, match=message) as error:
        open_weights(tmp_path / name)
    assert "\n" not in str(error.value)
