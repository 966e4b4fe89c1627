"""Files that ``torch.save`` wrote: read by ``torch.load(weights_only=True)`` and nothing else, so that none can execute code.

Found in them: a state dict, or a checkpoint that holds one beside other things (``{"model": {...}, "model_args": {...}}``). The
zip format of today is mapped; the format before torch 1.6 cannot be, and is read whole.
"""

from __future__ import annotations

import math
import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from accel_pretrain.errors import CheckpointError
from accel_pretrain.hf.tensor_map import Weight, damaged, nbytes, parsing, quoted, require_file, zip_members

MAX_PICKLE_BYTES = 256 << 20
MAX_EXTRAS = 100_000  # values: a pickle of a kilobyte can refer to the same lists billions of times
_NESTED = ("model", "state_dict", "model_state_dict", "module")
_MAP_AGAIN_AFTER = 256 << 20
_REFUSED_NAME = re.compile(r"GLOBAL (\S+)")
_COMPILED = re.compile(r"(^|\.)_orig_mod\.")  # what torch.compile puts in front, as DistributedDataParallel puts module.
_ZIP_START = b"PK\x03\x04"


def read_torch(path: Path) -> tuple[dict[str, Weight], dict[str, Any]]:
    """The tensors of one file, and what else it holds as plain Python values. Raises :class:`CheckpointError`."""
    source = _TorchFile(path)
    weights = {}
    for name, tensor in source.tensors.items():
        shape = tuple(tensor.shape)
        weights[name] = Weight(dtype=tensor.dtype, shape=shape, path=path, read=partial(source.read, name))
    return weights, source.extras


class _TorchFile:
    """The content of one file. Its mapping is made again from time to time, which gives back the memory of the old one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        require_file(path)
        with path.open("rb") as file:
            self._mapped = file.read(4) == _ZIP_START
        _check_zip(path) if self._mapped else _refuse_tar(path)
        document = self._load()
        self.tensors, rest = _state_dict(document, path)
        self.extras = _plain_values(rest)
        self._read_bytes = 0

    def read(self, name: str) -> torch.Tensor:
        if self._mapped and self._read_bytes > _MAP_AGAIN_AFTER:
            self.tensors, self._read_bytes = _state_dict(self._load(), self.path)[0], 0
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} was changed while it was read")
        tensor = self.tensors[name].detach()
        self._read_bytes += nbytes(tensor.dtype, tensor.shape)
        return tensor

    def _load(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats, of which nothing can be done here
            with parsing(self.path):
                try:
                    return torch.load(str(self.path), map_location="cpu", weights_only=True, mmap=self._mapped)
                except pickle.UnpicklingError as error:
                    raise _refused(self.path, str(error)) from None


def _refused(path: Path, message: str) -> CheckpointError:
    if found := _REFUSED_NAME.search(message):
        return CheckpointError(
            f"{path} asks for {quoted(found[1], 80)}, which is not part of weights: it was not loaded, and nothing "
            "in it was run; save the state dict alone, or as safetensors"
        )
    return damaged(path, "its pickle is not one of tensors")


def _check_zip(path: Path) -> None:
    """Refuse zip files that ``torch.save`` does not write: mapping one of these would give other bytes than its own."""
    with parsing(path), zipfile.ZipFile(path) as archive:
        infos = zip_members(archive)
        pickles = [info for info in infos if info.filename.rpartition("/")[2] == "data.pkl"]
        if any(info.filename.rpartition("/")[2] == "constants.pkl" for info in infos):
            raise CheckpointError(f"{path} is a TorchScript program, which is not loaded; save its state dict")
        if len(pickles) != 1:
            raise ValueError(f"a zip file with {len(pickles)} pickles, which torch.save does not write")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"a pickle of {pickles[0].file_size:,} bytes")
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ValueError("a compressed zip file, which torch.save does not write")
        if pickles[0].CRC:  # torch can be told to write none
            archive.read(pickles[0])  # compares it, as torch does not


def _refuse_tar(path: Path) -> None:
    with parsing(path):
        if tarfile.is_tarfile(path):
            raise CheckpointError(f"{path} is a tar file, as torch wrote them before 2017; save it again with a newer torch")


# ------------------------------------------------------------------------------------------------ what the document holds


def _state_dict(document: Any, path: Path) -> tuple[dict[str, torch.Tensor], dict[Any, Any]]:
    """The tensors of a document by their names without the prefixes of wrappers, and the rest of it."""
    if not isinstance(document, Mapping):
        raise CheckpointError(f"{path} holds a {quoted(type(document).__name__)}, not a state dict")
    rest: dict[Any, Any] = dict(document)
    key = next((key for key in _NESTED if _holds_tensors(document.get(key))), None)
    state = rest.pop(key) if key else {name: rest.pop(name) for name, value in document.items() if _is_tensor(value)}
    tensors = {name: value for name, value in state.items() if _is_tensor(value)}
    if not tensors:
        keys = ", ".join(quoted(key, 40) for key in list(document)[:5])
        raise CheckpointError(f"{path} holds no tensors, at its top or under {', '.join(_NESTED)}; its keys are: {keys}")
    if strangers := [name for name in tensors if not isinstance(name, str)]:
        raise damaged(path, f"a tensor's name is {strangers[0]!r}")
    for name, tensor in tensors.items():
        _check_tensor(tensor, name, path)
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    renamed = {_COMPILED.sub(r"\1", name.removeprefix(prefix)): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise damaged(path, "two tensors have the same name but for _orig_mod. or module.")
    return renamed, rest


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(_is_tensor(entry) for entry in value.values())


def _check_tensor(tensor: torch.Tensor, name: str, path: Path) -> None:
    """Refuse what is not a dense tensor with a number of its own for every element."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.device.type != "cpu" or tensor.is_quantized:
        raise CheckpointError(f"{path}: {quoted(name)} is not a dense tensor; save it as one")
    if tensor.untyped_storage().nbytes() < nbytes(tensor.dtype, tensor.shape):
        raise damaged(path, f"{name!r} is {tuple(tensor.shape)}, more elements than are stored")


def _plain_values(rest: Mapping[Any, Any]) -> dict[str, Any]:
    """What is not a weight, as plain Python values: a tensor of one element becomes a number, other objects are left out."""
    left = MAX_EXTRAS

    def plain(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > 20:
            return None
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu":
            return value.item() if value.numel() == 1 and not value.is_quantized else None
        if isinstance(value, Mapping):
            pairs = ((key, plain(entry, depth + 1)) for key, entry in value.items() if isinstance(key, str | int))
            return {key: entry for key, entry in pairs if entry is not None}
        if isinstance(value, list | tuple | set | frozenset):
            return [plain(entry, depth + 1) for entry in value]
        return value if isinstance(value, str | bool | int) or (isinstance(value, float) and not math.isnan(value)) else None

    return {key: entry for key, value in rest.items() if isinstance(key, str) and (entry := plain(value, 0)) is not None}
