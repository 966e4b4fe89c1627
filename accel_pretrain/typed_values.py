"""Text, or a JSON scalar, as the declared type of a field: the type decides what a text means, never YAML 1.1.

So ``6e-4`` and ``1e9`` are numbers, ``on`` is not a boolean, and ``017`` is not fifteen. Part of
:mod:`accel_pretrain.typed_yaml`.
"""

from __future__ import annotations

import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

from accel_pretrain.files import expanded
from accel_pretrain.yaml_files import read_list

NULLS = frozenset({"null", "none", "~", ""})


def is_union(annotation: Any) -> bool:
    """Whether a type is ``A | B``."""
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


class Mismatch(Exception):
    """A text that its declared type does not take; carries what was expected."""


def accepts(annotation: Any, raw: Any) -> bool:
    """Whether :func:`convert` takes it."""
    try:
        convert(annotation, raw)
    except Mismatch:
        return False
    return True


def convert(annotation: Any, raw: Any) -> Any:
    """``raw`` as the declared type, or :class:`Mismatch` with what was expected."""
    if is_union(annotation):
        return _convert_union(annotation, raw)
    if typing.get_origin(annotation) is tuple:
        item = typing.get_args(annotation)[0]
        if raw is None or isinstance(raw, str):
            raw = _flow_list(raw or "")
        if not isinstance(raw, list):
            raise Mismatch(f"a list of {_describe(item)}")
        return tuple(convert(item, element) for element in raw)
    if isinstance(raw, list | dict):
        raise Mismatch(_describe(annotation))
    if typing.get_origin(annotation) is Literal:
        choices = {str(choice).lower(): choice for choice in typing.get_args(annotation)}
        if (text := str(raw).strip().lower()) in choices:
            return choices[text]
        raise Mismatch(_describe(annotation))
    scalars = {bool: _bool, int: _int, float: _float, str: _str, Path: _path}
    return scalars[annotation](raw)


def _convert_union(annotation: Any, raw: Any) -> Any:
    options = typing.get_args(annotation)
    if types.NoneType in options and _is_null(raw):
        return None
    listed = isinstance(raw, str) and raw.lstrip().startswith("[")  # where one or several are meant, this is several
    for kind in sorted(options, key=lambda kind: listed and typing.get_origin(kind) is not tuple):
        if kind is not types.NoneType and accepts(kind, raw):
            return convert(kind, raw)
    raise Mismatch(_describe(annotation))


def _is_null(raw: Any) -> bool:
    return raw is None or (isinstance(raw, str) and raw.strip().lower() in NULLS)


def _flow_list(text: str) -> Any:
    if text.lstrip().startswith("["):
        return read_list(text)
    return [] if _is_null(text) else [part.strip() for part in text.split(",")]


def _bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and (text := raw.strip().lower()) in ("true", "false"):
        return text == "true"
    raise Mismatch("true or false")


def _int(raw: Any) -> int:
    value = _number(raw, "a whole number")
    if value != int(value):
        raise Mismatch("a whole number")
    return int(value)


def _float(raw: Any) -> float:
    try:
        return float(_number(raw, "a number"))
    except OverflowError:  # a whole number beyond 1e308
        raise Mismatch("a number") from None


def _number(raw: Any, expected: str) -> int | float:
    if isinstance(raw, bool) or raw is None:
        raise Mismatch(expected)
    try:
        return int(str(raw))
    except ValueError:
        pass
    try:
        value = float(str(raw))
    except ValueError:
        raise Mismatch(expected) from None
    if not math.isfinite(value):
        raise Mismatch(expected)
    return value


def _str(raw: Any) -> str:
    if raw is None:
        raise Mismatch("text")
    return raw if isinstance(raw, str) else json.dumps(raw)


def _path(raw: Any) -> Path:
    if not isinstance(raw, str) or not raw.strip() or "\0" in raw:
        raise Mismatch("a path")
    return expanded(raw)


def _describe(annotation: Any) -> str:
    if is_union(annotation):
        return " or ".join(_describe(kind) for kind in typing.get_args(annotation))
    if typing.get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return f"a list of {_describe(typing.get_args(annotation)[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return "null" if annotation is types.NoneType else names[annotation]
