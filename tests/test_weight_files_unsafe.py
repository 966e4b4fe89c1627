"""Weight files from strangers: nothing in them is executed, in whatever container it comes."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shlex
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel_pretrain.hf.weight_files import open_weights
from tests.weights import KINDS, read_all, refusal, small_tensors

# ------------------------------------------------------------------------------------------------------------- execution


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def payloads(canary: Path) -> dict[str, Any]:
    """Documents that create ``canary`` when they are unpickled."""
    weights = {"a": torch.zeros(2)}
    shell = Call(os.system, f"touch {shlex.quote(str(canary))}")
    return {
        "os.system": shell,
        "eval": weights | {"b": Call(eval, f"open({str(canary)!r}, 'w').close()")},
        "exec": weights | {"b": Call(exec, f"open({str(canary)!r}, 'w').close()")},
        "mkdir": weights | {"b": Call(os.mkdir, str(canary))},
        "nested": {"model": weights, "optimizer": {"state": [1, (2, {"x": [shell]})]}},
        "as a key": weights | {(shell, 1): 2},
        "getattr": weights | {"b": Call(getattr(os, "system"), f"touch {shlex.quote(str(canary))}")},  # noqa: B009
    }


def save_zip(document: Any, path: Path) -> None:
    torch.save(document, path)


def save_legacy(document: Any, path: Path) -> None:
    torch.save(document, path, _use_new_zipfile_serialization=False)


def save_pickle(document: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(document))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt", "lit_model.pth", "x.ckpt"])
@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
def test_a_malicious_file_does_not_execute(name: str, save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / name
    for title, document in payloads(canary).items():
        save(document, path)
        message = refusal(path)
        assert not canary.exists(), title
        assert save is save_pickle or "nothing in it was run" in message, (title, message)
        with contextlib.suppress(TypeError):  # control: the same file, unpickled; what was called may be no part of a key
            pickle.loads(path.read_bytes()) if save is save_pickle else torch.load(path, weights_only=False)
        assert canary.exists(), title
        canary.rmdir() if canary.is_dir() else canary.unlink()


def test_a_malicious_shard_does_not_execute(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    index = KINDS["sharded bin"](tmp_path, small_tensors())
    torch.save(payloads(canary)["nested"], tmp_path / "pytorch_model-00002-of-00002.bin")
    assert "asks for posix.system" in refusal(index)
    assert not canary.exists()


@pytest.mark.parametrize("second", ["archive/data.pkl", "other/data.pkl", "archive/sub/data.pkl"])
def test_a_zip_with_two_pickles(second: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"a": torch.zeros(2)}, tmp_path / "archive.pt")
    assert read_all(tmp_path / "archive.pt") == {"a": (2,)}
    with zipfile.ZipFile(tmp_path / "archive.pt", "a") as archive, contextlib.ExitStack() as stack:
        if second in archive.namelist():
            stack.enter_context(pytest.warns(UserWarning, match="Duplicate name"))
        archive.writestr(second, pickle.dumps(payloads(canary)["os.system"]))
    message = "two members of the zip file have the same name" if second == "archive/data.pkl" else "a zip file with 2 pickles"
    assert message in refusal(tmp_path / "archive.pt")
    assert not canary.exists()
    with zipfile.ZipFile(tmp_path / "archive.pt") as archive:
        pickle.loads(archive.read(archive.infolist()[-1]))  # control
    assert canary.exists()


def test_pickles_by_other_names(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    malicious = payloads(canary)["os.system"]
    for name in ("x.pkl", "x.pickle"):
        save_pickle({"a": 1}, tmp_path / name)
        assert "is a pickle" in refusal(tmp_path / name)
    np.save(tmp_path / "x.npy", np.array([malicious], dtype=object), allow_pickle=True)
    assert "numpy.savez" in refusal(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", a=np.zeros(2), b=np.array([malicious], dtype=object))
    assert "b holds Python objects, which are never unpickled" in refusal(tmp_path / "x.npz")
    (tmp_path / "lit_model.pth").write_bytes(b"")
    torch.save({"a": torch.zeros(1)}, tmp_path / "lit_model.pth")
    (tmp_path / "model_config.yaml").write_text(f"a: !!python/object/apply:os.mkdir [{str(canary)!r}]\n")
    assert "model_config.yaml: damaged" in refusal(tmp_path / "lit_model.pth")
    assert not canary.exists()
    np.load(tmp_path / "x.npz", allow_pickle=True)["b"]  # control
    assert canary.exists()


def test_containers_of_torch_that_are_not_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        archive.addfile(tarfile.TarInfo("../storages"), io.BytesIO())
    assert "is a tar file, as torch wrote them before 2017" in refusal(tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        archive.writestr("program/constants.pkl", b"")
    assert "is a TorchScript program" in refusal(tmp_path / "program.pt")
    torch.save({"a": torch.zeros(300)}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for info in good.infolist():
            packed.writestr(info.filename, good.read(info))
    assert "compressed zip file" in refusal(tmp_path / "packed.pt")


def test_documents_of_torch_that_are_not_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    loop: list[Any] = []
    loop.append(loop)
    bomb: list[Any] = [0]
    for _ in range(40):
        bomb = [bomb, bomb]
    torch.save({"a": torch.zeros(1), "loop": loop, "bomb": bomb, "kind": torch.float16}, path)
    files = open_weights(path)  # 2 ** 40 lists of a kilobyte: cut off
    assert files.names() == ["a"]
    cases = {
        "holds a list, not a state dict": [torch.zeros(1)],
        "holds no tensors, at its top or under model": {"step": 1},
        "a is not a dense tensor": {"a": torch.zeros(2, 2).to_sparse()},
        "more elements than are stored": {"a": torch.zeros(1).expand(10**6, 10**6)},
        "a tensor's name is 3": {3: torch.zeros(1)},
        "a tensor is called": {"a\n\x1b[31mb": torch.zeros(1)},
        "two tensors have the same name": {"a": torch.zeros(1), "_orig_mod.a": torch.zeros(1)},
    }
    for message, document in cases.items():
        torch.save(document, path)
        assert message in refusal(path)
