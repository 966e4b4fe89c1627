"""Config files as mappings of text: YAML with every scalar left as it is written, or JSON. Part of typed_yaml.

What is larger, deeper or more entangled than a config is refused before it costs time.
"""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import Any

import yaml

from accel_pretrain.errors import ConfigError

MAX_FILE_BYTES = 64 << 10  # which takes half a second to read; a config with every key has 12 KiB
UNREADABLE = (yaml.YAMLError, ValueError, OverflowError, RecursionError)  # what the YAML and JSON readers raise


def show(raw: Any) -> str:
    """A value for a message: as Python writes it, and not longer than a line."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 60
    return shown.repr(raw)


def read_list(text: str) -> Any:
    """``[a, b]`` as a list of texts; anything that YAML cannot read comes back as it is."""
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except UNREADABLE:
        return text


class _Loader(yaml.BaseLoader):
    """Every scalar stays text; a key that stands twice in one mapping is an error (YAML silently keeps the last)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list as a key: refused below
            if (key := key_node.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return mapping


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; raises :class:`ConfigError` that names the path tried, or line and reason."""
    if not os.path.isfile(path):
        kind = "is a directory, not a config file" if os.path.isdir(path) else "does not exist"
        raise ConfigError(f"--config {path}: {os.path.abspath(path)} {kind}")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than 64 KiB, so not a config file")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            mapping = json.loads(text, object_pairs_hook=_unique_pairs)
        else:
            mapping = yaml.load(text, Loader=_Loader)
    except (*UNREADABLE, OSError) as error:
        raise ConfigError(f"{path}: {_reason(error)}") from None
    if mapping is None or mapping == "":
        return {}
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: expected keys and values, found {show(mapping)}")
    return mapping


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a character or a number is out of range" if isinstance(error, OverflowError) else str(error).replace("\n", " ")
