"""Weights of any origin behind one interface: :func:`open_weights`, and the writers of safetensors.

What can be opened: a Hugging Face folder (safetensors or the older ``pytorch_model.bin``, in one file or in shards), a folder
of litgpt, of nanoGPT, or with OpenAI's TensorFlow checkpoint of GPT-2, and single files of torch, safetensors or NumPy. Opening
reads names, shapes and dtypes; data is mapped when a tensor is read, and nothing that was read is kept. Nothing that is read
can execute code, and an index cannot lead out of its folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml

from accel_pretrain.errors import CheckpointError
from accel_pretrain.hf.numpy_files import read_npz
from accel_pretrain.hf.safetensors_files import INDEX, WEIGHTS, TensorEntry, read_safetensors, write_safetensors, write_sharded
from accel_pretrain.hf.tensor_map import Weight, damaged, parsing, quoted, read_json
from accel_pretrain.hf.tensorflow import SUFFIX, find_index, read_tensorflow
from accel_pretrain.hf.torch_files import read_torch

__all__ = ["TensorEntry", "WeightFiles", "open_weights", "write_safetensors", "write_sharded"]

# What a folder may hold, in the order in which it is looked for.
IN_FOLDER = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json", "lit_model.pth", "ckpt.pt")
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_INDEX_SUFFIX = ".index.json"
_LITGPT_CONFIG = "model_config.yaml"
_MAX_CONFIG_BYTES = 1 << 20
_CANNOT = {
    ".pkl": "is a pickle, which can execute code and is never loaded; save its state dict as safetensors",
    ".pickle": "is a pickle, which can execute code and is never loaded; save its state dict as safetensors",
    ".npy": "is one array without a name, or a pickled dictionary; save named arrays with numpy.savez",
    ".tar": "is a tar file; unpack it, and name what is in it",
    ".zip": "is a zip file; unpack it, and name what is in it",
    ".gz": "is compressed; unpack it",
}

Content = tuple[dict[str, Weight], dict[str, Any]]


class WeightFiles:
    """Named tensors in files. ``extras`` is what else the files hold, as plain Python values.

    Reading gives the values as they are stored, mapped from the file where that is possible: they are not to be changed. A
    context manager; after :meth:`close` nothing can be read, and tensors that were read stay valid.
    """

    def __init__(self, weights: Mapping[str, Weight], extras: Mapping[str, Any]) -> None:
        self._weights = dict(weights)
        self.extras = dict(extras)

    def names(self) -> list[str]:
        """The names in the order of the file."""
        return list(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._of(name).dtype

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return str(self._of(name).path)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU. Raises :class:`CheckpointError` when its data is damaged or gone."""
        weight = self._of(name)
        tensor = weight.read()
        if (tuple(tensor.shape), tensor.dtype) != (weight.shape, weight.dtype):
            raise CheckpointError(f"{weight.path} was changed while it was read")
        return tensor

    def close(self) -> None:
        self._weights.clear()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _of(self, name: str) -> Weight:
        if name not in self._weights:
            near = difflib.get_close_matches(name, self._weights, n=1)
            raise CheckpointError(f"there is no tensor {quoted(name)}" + (f"; there is {quoted(near[0])}" if near else ""))
        return self._weights[name]


def open_weights(path: Path) -> WeightFiles:
    """The tensors of a folder or a file. Raises :class:`CheckpointError` when there are none, or they are damaged or unsafe.

    A TensorFlow checkpoint can also be named as TensorFlow does it: ``folder/model.ckpt``.
    """
    if path.is_dir():
        path = _file_in(path)
    elif not path.exists():
        if not (index := path.with_name(path.name + SUFFIX)).is_file():
            raise CheckpointError(f"{path.absolute()} does not exist; name a folder or a file of weights")
        path = index
    weights, extras = _read_file(path)
    if not weights:
        raise CheckpointError(f"{path} holds no tensors")
    if odd := [name for name in weights if not name.isprintable()]:
        raise damaged(path, f"a tensor is called {odd[0]!r}")
    return WeightFiles(weights, extras)


def _file_in(folder: Path) -> Path:
    """The file of weights in a folder, or the index of several."""
    found = next((folder / name for name in IN_FOLDER if (folder / name).exists()), None) or find_index(folder)
    if found is None:
        present = ", ".join(sorted(quoted(path.name, 60) for path in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} holds no TensorFlow checkpoint and none of {', '.join(IN_FOLDER)}, but {present}; name a file"
        )
    return found


def _read_file(path: Path) -> Content:
    """A file by the end of its name."""
    suffix = path.suffix.lower()
    if path.name.endswith(_INDEX_SUFFIX):
        return _read_shards(path)
    if suffix == SUFFIX:
        return read_tensorflow(path)
    if suffix == ".npz":
        return read_npz(path), {}
    if suffix in TORCH_SUFFIXES or suffix == ".safetensors":
        weights, extras = _reader_of(path)(path)
        return weights, extras | _litgpt_config(path)
    reason = _CANNOT.get(suffix, f"is not one of .safetensors, {', '.join(TORCH_SUFFIXES)}, .npz; convert it to safetensors")
    raise CheckpointError(f"{path} {reason}")


def _reader_of(path: Path) -> Callable[[Path], Content]:
    return read_safetensors if path.suffix.lower() == ".safetensors" else read_torch


def _litgpt_config(path: Path) -> dict[str, Any]:
    """litgpt's description of the model, which stands beside its weights."""
    config = path.with_name(_LITGPT_CONFIG)
    if path.name != "lit_model.pth" or not config.is_file():
        return {}
    with parsing(config), config.open("rb") as file:
        text = file.read(_MAX_CONFIG_BYTES + 1)
        if len(text) > _MAX_CONFIG_BYTES:
            raise ValueError(f"more than {_MAX_CONFIG_BYTES:,} bytes")
        document = yaml.safe_load(text)
        if not isinstance(document, dict):
            raise ValueError("not a map of settings")
    return {"model_config": document}


# -------------------------------------------------------------------------------------------------------------- shards


def _read_shards(index: Path) -> Content:
    """The tensors of several files: all that the index names must be there, and no name may be in two of them."""
    document = read_json(index)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise damaged(index, "it has no weight_map from tensors to files")
    weights: dict[str, Weight] = {}
    extras: dict[str, Any] = {}
    for file in dict.fromkeys(weight_map.values()):
        shard = _shard(index, file)
        found, own_extras = _reader_of(shard)(shard)
        if twice := sorted(weights.keys() & found.keys()):
            raise damaged(shard, f"{twice[0]!r} is also in {weights[twice[0]].path.name}")
        weights |= found
        extras |= own_extras
    for name, file in weight_map.items():
        if name not in weights or weights[name].path.name != file:
            raise damaged(index, f"{name!r} is not in {file}, where the index says")
    return {name: weights[name] for name in (*weight_map, *(weights.keys() - weight_map.keys()))}, extras


def _shard(index: Path, file: str) -> Path:
    """The path of a shard, which must be in the folder of its index.

    A link may lead out of it only as in the cache of the Hugging Face hub: from ``snapshots/REVISION/...`` to ``blobs/HASH``.
    """
    shard = index.parent / file
    suffixes = (".safetensors", *TORCH_SUFFIXES)
    if Path(file).name != file or file in ("", "..") or "\\" in file or not file.isprintable() or not file.endswith(suffixes):
        raise CheckpointError(f"{index} names the file {quoted(file, 80)!r}, which is not a file of weights beside it; refused")
    if not shard.is_file():
        raise CheckpointError(f"{shard} is missing, and {index.name} needs it; download it again")
    folder, real = index.parent.resolve(), shard.resolve()
    blobs = [up.parent / "blobs" for up in folder.parents if up.name == "snapshots"]
    if real.parent not in (folder, *blobs):
        raise CheckpointError(f"{shard} is a link to {quoted(real)}, outside of its folder; refused: copy the file here")
    return shard
