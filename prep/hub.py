"""Sources that Hugging Face ``datasets`` knows: ``hf:NAME[:CONFIG][:SPLIT]``, and folders that ``save_to_disk`` wrote.

Map-style, ``datasets`` downloads and lays out Arrow files, and :class:`prep.columns.ArrowRows` reads the one column from them:
no ``map``, no second copy. With ``--stream`` nothing but the text is kept: :func:`fetch` writes it to files of about one unit
each, beside the out folder. Each file appears whole, together with the ``state_dict`` of the stream behind it, so that an
interrupted run goes on where the last file ended; from then on they are .jsonl files like any other. They are taken again only
if the files behind the stream are still those that it began with (:func:`origin`).

NAME may also be a local folder or file of what ``datasets`` reads: the same code without a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_pretrain.errors import ConfigError, DataError, PretrainError
from accel_pretrain.files import write_whole
from prep.columns import refuse_column

PREFIX = "hf:"
STREAM_FILE_BYTES = 8_000_000
_BY_SUFFIX = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow", ".txt": "text"}


@dataclass(frozen=True)
class HubName:
    """What stands behind ``hf:``, taken apart."""

    path: str
    config: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubName:
        rest = name.removeprefix(PREFIX)
        if os.path.exists(os.path.expanduser(rest)):
            return cls(os.path.expanduser(rest))
        path, *more = rest.split(":")
        if not path or len(more) > 2:
            raise DataError(f"{name}: expected hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
        if os.path.exists(os.path.expanduser(path)):
            path = os.path.expanduser(path)
        config, split = [*more, "", ""][:2]
        return cls(path, config or None, split or None)

    def __str__(self) -> str:
        parts = [self.path, self.config or ("" if self.split else None), self.split]
        return PREFIX + ":".join(part for part in parts if part is not None)


def is_saved_dataset(folder: str) -> bool:
    """Whether ``save_to_disk`` of ``datasets`` wrote the folder."""
    inside = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return "dataset_dict.json" in inside or {"state.json", "dataset_info.json"} <= inside


def saved_files(folder: str, split: str | None = None) -> list[str]:
    """The Arrow files of a folder that ``save_to_disk`` wrote, in order; raises :class:`DataError`."""
    try:
        listing = os.path.join(folder, "dataset_dict.json")
        if os.path.exists(listing):
            splits = json.loads(Path(listing).read_text(encoding="utf-8"))["splits"]
            folder = os.path.join(folder, _choose_split(folder, splits, split))
        state = json.loads(Path(folder, "state.json").read_text(encoding="utf-8"))
        if state.get("_indices_data_files"):
            raise DataError(
                f"{folder}: saved with an order of its own; save it again: dataset.flatten_indices().save_to_disk(...)"
            )
        return [os.path.join(folder, Path(file["filename"]).name) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: a damaged folder of save_to_disk ({error}); save it again") from None


def _choose_split(name: str, splits: list[str], wanted: str | None) -> str:
    split = wanted or ("train" if "train" in splits or len(splits) != 1 else splits[0])
    if split not in splits:
        raise DataError(
            f"{name}: no split {split!r}; name one of {', '.join(splits)}: {PREFIX}NAME:CONFIG:SPLIT (CONFIG may be empty)"
        )
    return split


# -------------------------------------------------------------------------------------------------------------- datasets


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError("hf: sources need datasets: pip install 'accel_pretrain[data]'") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


def _asked(name: HubName) -> dict[str, Any]:
    """The arguments by which ``datasets`` knows ``name``; raises :class:`DataError` when it has no such config or split."""
    datasets, path = _datasets(), name.path
    if os.path.isfile(path):
        suffix = os.path.splitext(path)[1].lower()
        if suffix not in _BY_SUFFIX:
            raise DataError(f"{name}: of files, datasets reads {' '.join(_BY_SUFFIX)}")
        return {"path": _BY_SUFFIX[suffix], "data_files": {"train": path}, "split": _choose_split(path, ["train"], name.split)}
    config, split = name.config, name.split
    configs = datasets.get_dataset_config_names(path)
    if config is not None and config not in configs:
        if split is not None:
            raise DataError(f"{name}: no configuration {config!r}; there are {', '.join(configs)}")
        config, split = None, config  # hf:NAME:SPLIT
    if config is None and len(configs) > 1 and "default" not in configs:
        raise DataError(f"{name}: has several configurations; add one of {', '.join(configs)}: {PREFIX}{path}:{configs[0]}")
    splits = datasets.get_dataset_split_names(path, config)
    if split is not None and split not in splits and name.split is None:
        raise DataError(f"{name}: neither a configuration ({', '.join(configs)}) nor a split ({', '.join(splits)})")
    return {"path": path, "name": config, "split": _choose_split(str(name), splits, split)}


def _translated(name: HubName, error: Exception) -> DataError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return DataError(f"{name}: {said.rstrip('.')}; check the name and the network, or name a local folder")


def map_style_files(name: HubName, column: str) -> list[str]:
    """The Arrow files of a dataset, after downloading what is not in the cache; raises :class:`DataError`."""
    if is_saved_dataset(name.path):
        return saved_files(name.path, name.split or name.config)
    datasets = _datasets()
    try:
        asked = _asked(name)
        about = datasets.load_dataset_builder(**{key: value for key, value in asked.items() if key != "split"}).info
        if about.features and (problem := refuse_column(str(name), column, _kinds(about.features))):
            raise DataError(problem)  # before the download
        return [file["filename"] for file in datasets.load_dataset(**asked).cache_files]
    except PretrainError:
        raise
    except Exception as error:  # whatever a hub, a network, a script or a damaged file can raise: it is not ours
        raise _translated(name, error) from None


def _kinds(features: Any) -> dict[str, str]:
    return {key: getattr(kind, "dtype", None) or type(kind).__name__ for key, kind in features.items()}


# --------------------------------------------------------------------------------------------------------------- streams


def stream_folder(out: Path) -> Path:
    """Where the text of a stream waits for the tokenizer of the dataset ``out``; delete it once that is complete."""
    out = Path(os.path.abspath(out))
    return out.parent / f".{out.name}.stream"


def origin(name: HubName) -> str:
    """What changes when the files behind a dataset do: the revision of the hub, or the times of change of local files."""
    try:
        builder = _datasets().load_dataset_builder(**{key: value for key, value in _asked(name).items() if key != "split"})
        data_files: Any = builder.config.data_files or {}
        about = {str(split): [list(files), list(map(list, files.origin_metadata))] for split, files in data_files.items()}
    except PretrainError:
        raise
    except Exception as error:  # whatever a hub, a network, a script or a damaged file can raise: it is not ours
        raise _translated(name, error) from None
    local = [path for files, _ in about.values() for path in files if os.path.exists(path)]
    sizes = [os.stat(path).st_size for path in local]
    return hashlib.sha256(json.dumps([about, sizes], sort_keys=True, default=str).encode()).hexdigest()


def fetch(name: HubName, column: str, folder: Path, limit: int | None) -> list[str]:
    """Write the text of a stream to .jsonl files below ``folder``, as far as they are not there; their paths in order.

    ``limit`` is the number of bytes of text at which to stop, behind a whole document. Raises :class:`DataError` when the
    stream breaks: what was fetched stays, and the same call goes on behind it. What was fetched from other files is deleted.
    """
    request = {"name": str(name), "column": column, "limit": limit}
    readable = "".join(letter if letter.isalnum() else "_" for letter in str(name))[-60:]
    folder = folder / f"{readable}-{hashlib.sha256(str(name).encode()).hexdigest()[:8]}"
    paths, state, size = _fetched(folder, request)
    # A stream of the hub that has ended is not looked up again: what was fetched is one revision of it, and whole.
    if state and state["done"] and not os.path.exists(name.path):
        return paths
    witness = origin(name)
    if state and state.get("origin") != witness:
        print(f"{name}: has changed since its text was fetched; fetching it anew", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
        paths, state, size = [], None, 0
    if not (state and state["done"]):
        folder.mkdir(parents=True, exist_ok=True)
        for block, after in _blocks(name, column, state, size, limit):
            path = folder / f"{len(paths):08d}.jsonl"
            write_whole(path, block)
            about = {"request": request, "origin": witness, **after}
            write_whole(path.with_suffix(".state"), json.dumps(about).encode())
            paths.append(str(path))
    return paths


def origin_of(path: str) -> str:
    """The :func:`origin` that a file of :func:`fetch` was fetched from; "" for other files."""
    state = Path(path).with_suffix(".state")
    return json.loads(state.read_bytes())["origin"] if state.is_file() else ""


def _fetched(folder: Path, request: dict[str, Any]) -> tuple[list[str], dict[str, Any] | None, int]:
    """The files that are complete, the state behind the last of them, and how much text they hold."""
    paths: list[str] = []
    state: dict[str, Any] | None = None
    while (path := folder / f"{len(paths):08d}.state").exists():
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            break
        if read["request"] != request:
            raise DataError(
                f"{folder}: holds what was fetched for {read['request']}; ask for the same again, or add --fresh to lose it"
            )
        paths.append(str(path.with_suffix(".jsonl")))
        state = read
    return paths, state, state["size"] if state else 0


def _blocks(
    name: HubName, column: str, state: dict[str, Any] | None, size: int, limit: int | None
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines of JSON for one file, and the state behind them."""
    documents = state["documents"] if state else 0
    try:
        stream = _datasets().load_dataset(**_asked(name), streaming=True)
        if stream.features and (problem := refuse_column(str(name), column, _kinds(stream.features))):
            raise DataError(problem)
        if state:
            stream.load_state_dict(state["stream"])
        lines: list[bytes] = []
        held = 0
        for row in stream:
            if column not in row:
                raise DataError(
                    str(refuse_column(str(name), column, {key: type(value).__name__ for key, value in row.items()}))
                )
            lines.append(_line(column, row[column]))
            length = len(lines[-1])  # of what is no text too: a stream of nothing else must end at the limit
            if isinstance(row[column], str | bytes):
                length = len(row[column].encode(errors="replace") if isinstance(row[column], str) else row[column])
            held, size, documents = held + length, size + length, documents + 1
            if held >= STREAM_FILE_BYTES or (limit is not None and size >= limit):
                done = limit is not None and size >= limit
                yield b"".join(lines), {"stream": stream.state_dict(), "documents": documents, "size": size, "done": done}
                lines, held = [], 0
                if done:
                    return
        yield b"".join(lines), {"stream": stream.state_dict(), "documents": documents, "size": size, "done": True}
    except PretrainError:
        raise
    except Exception as error:
        said = _translated(name, error).message
        raise DataError(f"{said}; {documents:,} documents are fetched, and the same command goes on behind them") from None


def _line(column: str, value: Any) -> bytes:
    """One line of JSON, with the text as :class:`prep.columns.ArrowRows` would give it to the tokenizer.

    Bytes that are no UTF-8 stay as they are, and what is no text stays none: the reader says where they are.
    """
    if isinstance(value, bytes):
        value, errors = value.decode(errors="surrogateescape"), "surrogateescape"
    else:
        errors = "surrogatepass"
    plain = value if isinstance(value, str | int | float | None) else {"not text": type(value).__name__}
    if isinstance(plain, str):
        plain = plain.removeprefix("\ufeff")
    return json.dumps({column: plain}, ensure_ascii=False).encode(errors=errors) + b"\n"
