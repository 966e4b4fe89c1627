"""YAML or JSON plus command-line overrides to frozen dataclasses, and back. Knows nothing of machine learning.

Start at :func:`load` (values in, dataclass out) and :func:`parse_command_line` (``argv`` in, values out).

The declared type of a field decides what a text means, never YAML 1.1: a file is read with every scalar as text, so that
``6e-4`` and ``1e9`` are numbers, ``on`` is not a boolean, and ``017`` is not fifteen. A key is written in full
(``training.batch_size``) or, where its last part is unique in the whole tree, alone (``batch_size``). A section whose type is
a union of dataclasses is told apart by its ``name``: that union is the registry of what can be chosen. Every problem found is
collected, and all of them are raised as one :class:`~accel_pretrain.errors.ConfigError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from accel_pretrain.errors import ConfigError

T = TypeVar("T")

MAX_FILE_BYTES = 1 << 20
_UNREADABLE = (yaml.YAMLError, ValueError, OverflowError, RecursionError)  # what the YAML and JSON readers raise
NULLS = frozenset({"null", "none", "~", ""})
FLAG = "true"  # the value of `--use_wandb` with nothing behind it


def option(default: Any, doc: str, *, aliases: tuple[str, ...] = ()) -> Any:
    """A field with its documentation, and other names under which it may stand alone (``learning_rate`` for ``lr``)."""
    return field(default=default, metadata={"doc": doc, "aliases": aliases})


def section(default_factory: type[Any], doc: str) -> Any:
    """A field that holds a nested dataclass, or a union of them."""
    return field(default_factory=default_factory, metadata={"doc": doc, "aliases": ()})


@dataclass(frozen=True)
class Entry:
    """One value as somebody wrote it: text (or a JSON scalar, or a list), and where it came from, for messages."""

    raw: Any
    origin: str


# ------------------------------------------------------------------------------------------------ the tree of known keys


@dataclass(frozen=True)
class Leaf:
    """One settable key: its dotted path, the types that it has in the members of a union, and its documentation."""

    path: str
    types: tuple[Any, ...]
    doc: str
    aliases: tuple[str, ...]

    @property
    def is_flag(self) -> bool:
        return self.types[0] is bool


def _members(annotation: Any) -> tuple[type[Any], ...]:
    """The dataclasses in an annotation: one for a section, several for a union, none for a leaf."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return tuple(option for option in options if dataclasses.is_dataclass(option))  # type: ignore[misc]


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


@functools.cache
def _fields(cls: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(item, hints[item.name]) for item in dataclasses.fields(cls)]


def leaves(cls: type[Any], prefix: str = "") -> dict[str, Leaf]:
    """Every settable key below ``cls``, in declaration order, by dotted path."""
    found: dict[str, Leaf] = {}
    for item, annotation in _fields(cls):
        path = f"{prefix}{item.name}"
        if members := _members(annotation):
            for member in members:
                for key, leaf in leaves(member, path + ".").items():
                    seen = found.get(key)
                    found[key] = dataclasses.replace(seen, types=(*seen.types, *leaf.types)) if seen else leaf
        else:
            doc, aliases = item.metadata.get("doc", ""), item.metadata.get("aliases", ())
            found[path] = Leaf(path, (annotation,), doc, aliases)
    return found


class _Keys:
    """Finds the leaf that a written key means: a dotted path, or a last part or alias that is unique in the tree."""

    def __init__(self, cls: type[Any]) -> None:
        self.leaves = leaves(cls)
        self.sections = {item.name for item, annotation in _fields(cls) if _members(annotation)}
        self.short: dict[str, list[Leaf]] = {}
        for leaf in self.leaves.values():
            for name in (leaf.path.rpartition(".")[2], *leaf.aliases):
                self.short.setdefault(name, []).append(leaf)

    def find(self, key: str, raw: Any = None) -> Leaf | str:
        """The leaf, or the sentence that says why there is none. Of several candidates, the one whose type takes ``raw``."""
        key = key.replace("-", "_")
        if key in self.leaves:
            return self.leaves[key]
        candidates = self.short.get(key, [])
        if len(candidates) > 1 and raw is not None:
            candidates = [leaf for leaf in candidates if any(_accepts(kind, raw) for kind in leaf.types)] or candidates
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            return f"{key}: several keys end so; write one of {', '.join(leaf.path for leaf in candidates)}"
        return f"{key}: there is no such key{self._suggestion(key)}"

    def _suggestion(self, key: str) -> str:
        last = key.rpartition(".")[2]
        if last not in self.short and (near := difflib.get_close_matches(key, self.leaves, n=1, cutoff=0.75)):
            return f"; did you mean {near[0]}?"
        if near := difflib.get_close_matches(last, self.short, n=1, cutoff=0.6):
            return f"; did you mean {self.short[near[0]][0].path}?"
        return f"; the sections are {', '.join(sorted(self.sections))}" if self.sections else ""


# ------------------------------------------------------------------------------------------------------- text to values


class _Mismatch(Exception):
    """A text that its declared type does not take; carries what was expected."""


def _accepts(annotation: Any, raw: Any) -> bool:
    try:
        convert(annotation, raw)
    except _Mismatch:
        return False
    return True


def convert(annotation: Any, raw: Any) -> Any:
    """``raw`` as the declared type, or :class:`_Mismatch` with what was expected."""
    if _is_union(annotation):
        return _convert_union(annotation, raw)
    if typing.get_origin(annotation) is tuple:
        item = typing.get_args(annotation)[0]
        if raw is None or isinstance(raw, str):
            raw = _flow_list(raw or "")
        if not isinstance(raw, list):
            raise _Mismatch(f"a list of {_describe(item)}")
        return tuple(convert(item, element) for element in raw)
    if isinstance(raw, list | dict):
        raise _Mismatch(_describe(annotation))
    if typing.get_origin(annotation) is Literal:
        choices = {str(choice).lower(): choice for choice in typing.get_args(annotation)}
        if (text := str(raw).strip().lower()) in choices:
            return choices[text]
        raise _Mismatch(_describe(annotation))
    scalars = {bool: _bool, int: _int, float: _float, str: _str, Path: _path}
    return scalars[annotation](raw)


def _convert_union(annotation: Any, raw: Any) -> Any:
    options = typing.get_args(annotation)
    if types.NoneType in options and _is_null(raw):
        return None
    listed = isinstance(raw, str) and raw.lstrip().startswith("[")  # where one or several are meant, this is several
    for kind in sorted(options, key=lambda kind: listed and typing.get_origin(kind) is not tuple):
        if kind is not types.NoneType and _accepts(kind, raw):
            return convert(kind, raw)
    raise _Mismatch(_describe(annotation))


def _is_null(raw: Any) -> bool:
    return raw is None or (isinstance(raw, str) and raw.strip().lower() in NULLS)


def _flow_list(text: str) -> Any:
    if text.lstrip().startswith("["):
        try:
            return yaml.load(text, Loader=yaml.BaseLoader)
        except _UNREADABLE:
            return text
    return [] if _is_null(text) else [part.strip() for part in text.split(",")]


def _bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and (text := raw.strip().lower()) in ("true", "false"):
        return text == "true"
    raise _Mismatch("true or false")


def _int(raw: Any) -> int:
    value = _number(raw, "a whole number")
    if value != int(value):
        raise _Mismatch("a whole number")
    return int(value)


def _float(raw: Any) -> float:
    try:
        return float(_number(raw, "a number"))
    except OverflowError:  # a whole number beyond 1e308
        raise _Mismatch("a number") from None


def _number(raw: Any, expected: str) -> int | float:
    if isinstance(raw, bool) or raw is None:
        raise _Mismatch(expected)
    try:
        return int(str(raw))
    except ValueError:
        pass
    try:
        value = float(str(raw))
    except ValueError:
        raise _Mismatch(expected) from None
    if not math.isfinite(value):
        raise _Mismatch(expected)
    return value


def _str(raw: Any) -> str:
    if raw is None:
        raise _Mismatch("text")
    return raw if isinstance(raw, str) else json.dumps(raw)


def _path(raw: Any) -> Path:
    if not isinstance(raw, str) or not raw.strip() or "\0" in raw:
        raise _Mismatch("a path")
    return Path(os.path.expanduser(raw))  # unlike Path.expanduser, leaves the name of an unknown user as it is


def _describe(annotation: Any) -> str:
    if _is_union(annotation):
        return " or ".join(_describe(kind) for kind in typing.get_args(annotation))
    if typing.get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return f"a list of {_describe(typing.get_args(annotation)[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return "null" if annotation is types.NoneType else names[annotation]


def _show(raw: Any) -> str:
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 60
    return shown.repr(raw)


# ---------------------------------------------------------------------------------------------------- reading one source


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
            raise ConfigError(f"{path}: larger than 1 MiB, so not a config file")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            mapping = json.loads(text, object_pairs_hook=_unique_pairs)
        else:
            mapping = yaml.load(text, Loader=_Loader)
    except (*_UNREADABLE, OSError) as error:
        raise ConfigError(f"{path}: {_reason(error)}") from None
    if mapping is None or mapping == "":
        return {}
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: expected keys and values, found {_show(mapping)}")
    return mapping


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a character or a number is out of range" if isinstance(error, OverflowError) else str(error).replace("\n", " ")


def _flatten(
    keys: _Keys, mapping: Mapping[Any, Any], origin: str, entries: dict[str, Entry], problems: list[str], prefix: str = ""
) -> None:
    for key, raw in mapping.items():
        path = f"{prefix}{key}"
        if isinstance(raw, dict) and path not in keys.leaves:
            if any(known.startswith(path + ".") for known in keys.leaves):
                _flatten(keys, raw, origin, entries, problems, path + ".")
            else:
                problems.append(f"{origin}: {keys.find(path)}")
            continue
        if path in keys.sections:
            if raw not in ("", None):
                problems.append(f"{origin}: {path} is a section and holds keys, found {_show(raw)}")
            continue
        leaf = keys.find(path, raw)
        if isinstance(leaf, str):
            problems.append(f"{origin}: {leaf}")
        elif leaf.path in entries:
            problems.append(f"{origin}: {leaf.path} is given twice (once as {key!r})")
        else:
            entries[leaf.path] = Entry(raw, origin)


@dataclass(frozen=True)
class CommandLine:
    """What :func:`parse_command_line` found: the config file, the overrides in order, bare words, and program flags."""

    config: Path | None
    overrides: tuple[tuple[str, Entry], ...]
    positionals: tuple[str, ...]
    flags: frozenset[str]


def parse_command_line(
    cls: type[Any],
    argv: Sequence[str],
    *,
    flags: Iterable[str] = (),
    short: Mapping[str, str] | None = None,
    positionals: bool = False,
) -> CommandLine:
    """Split ``argv`` by the keys of ``cls``.

    An override is ``--training.batch_size 128``, ``--training.batch_size=128``, ``training.batch_size=128``, or any of these
    with a unique last part (``--batch_size 128``); a boolean may stand without a value (``--use_wandb``). ``--config FILE``
    names the file. ``flags`` are switches of the program itself (``--print_config``); ``short`` maps ``-o`` to a key.
    Raises one :class:`ConfigError` with everything that could not be understood.
    """
    keys, words, problems = _Keys(cls), list(argv), []
    config: Path | None = None
    overrides: list[tuple[str, Entry]] = []
    bare: list[str] = []
    raised: set[str] = set()
    while words:
        word = words.pop(0)
        word = f"--{short[word]}" if short and word in short else word
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") and not (equals and (not positionals or _names_a_key(keys, name))):
            if not positionals or (word.startswith("-") and len(word) > 1):
                problems.append(f"{word}: an override is written --section.key VALUE or section.key=VALUE")
            bare.append(word)
            continue
        if not equals and name.replace("-", "_") in flags:
            raised.add(name.replace("-", "_"))
            continue
        follows = words[0] if words and not words[0].startswith("--") else None
        leaf = keys.find(name, value if equals else follows) if name != "config" else None
        if isinstance(leaf, Leaf) and leaf.is_flag and not equals and (follows is None or not _accepts(bool, follows)):
            value = FLAG
        elif not equals and follows is None:
            problems.append(leaf if isinstance(leaf, str) else f"--{name}: a value must follow")
            continue
        elif not equals:
            value = words.pop(0)
        if name == "config":
            config = Path(os.path.expanduser(value))
        elif isinstance(leaf, str):
            problems.append(leaf)
        elif leaf is not None:
            overrides.append((leaf.path, Entry(value, f"--{name}")))
    if problems:
        raise ConfigError(problems)
    return CommandLine(config, tuple(overrides), tuple(bare), frozenset(raised))


def _names_a_key(keys: _Keys, name: str) -> bool:
    """Whether ``name=value`` is meant as an override: a known key, or something with dots that nobody names a file."""
    return isinstance(keys.find(name, None), Leaf) or name.partition(".")[0] in keys.sections or name in keys.short


# ------------------------------------------------------------------------------------------------------ values to config


_NOTHING: Mapping[str, Entry] = {}


def load(
    cls: type[T],
    file: Path | None = None,
    overrides: Iterable[tuple[str, Entry]] = (),
    beneath: Mapping[str, Entry] = _NOTHING,
) -> T:
    """Build ``cls`` from its defaults, then ``beneath``, ``file``, ``overrides``; the last one that names a key wins."""
    keys, problems = _Keys(cls), list[str]()
    entries: dict[str, Entry] = {}
    if file is not None:
        _flatten(keys, read_mapping(file), str(file), entries, problems)
    entries = {**beneath, **entries, **dict(overrides)}
    config = _build(cls, "", entries, problems)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def from_mapping(cls: type[T], mapping: Mapping[str, Any], origin: str) -> T:
    """Build ``cls`` from a mapping that was already read (from JSON, say); ``origin`` names it in messages."""
    problems, entries = list[str](), dict[str, Entry]()
    _flatten(_Keys(cls), mapping, origin, entries, problems)
    config = _build(cls, "", entries, problems)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def _build(cls: type[T], prefix: str, entries: Mapping[str, Entry], problems: list[str]) -> T | None:
    values: dict[str, Any] = {}
    before = len(problems)
    for item, annotation in _fields(cls):
        path = f"{prefix}{item.name}"
        if members := _members(annotation):
            member = _choose(members, item, path, entries, problems)
            values[item.name] = _build(member, path + ".", entries, problems) if member else None
        elif path in entries:
            entry = entries[path]
            try:
                values[item.name] = convert(annotation, entry.raw)
            except _Mismatch as expected:
                shown = "" if entry.origin.startswith("--") else f"{entry.origin}: "
                problems.append(f"{shown}{path}: expected {expected}, got {_show(entry.raw)}")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:
        problems.extend(prefix + problem for problem in error.problems)
        return None


def _choose(
    members: tuple[type[Any], ...],
    item: dataclasses.Field[Any],
    path: str,
    entries: Mapping[str, Entry],
    problems: list[str],
) -> type[Any] | None:
    """The member of a union that ``name`` selects, after checking that every key given for the section belongs to it."""
    if len(members) == 1:
        return members[0]
    by_name = {tag_of(member): member for member in members}
    raw = entries[f"{path}.name"].raw if f"{path}.name" in entries else tag_of(item.default_factory)  # type: ignore[arg-type]
    tag = raw.strip().lower() if isinstance(raw, str) else ""
    if tag not in by_name:
        problems.append(f"{path}.name: expected {' | '.join(by_name)}, got {_show(raw)}")
        return None
    known = {f"{path}.{own.name}" for own in dataclasses.fields(by_name[tag])}
    for key in entries:
        if key.startswith(path + ".") and key not in known:
            owners = [
                name
                for name, member in by_name.items()
                if hasattr(member, "__dataclass_fields__") and key.removeprefix(path + ".") in member.__dataclass_fields__
            ]
            problems.append(f"{key}: {path}.name {tag} has no such key ({', '.join(owners)} has)")
    return by_name[tag]


def tag_of(member: type[Any]) -> str:
    """The ``name`` that selects a member of a union."""
    return next(str(item.default) for item in dataclasses.fields(member) if item.name == "name")


# ------------------------------------------------------------------------------------------------------ config to text


def to_plain(config: Any) -> Any:
    """A config as dicts, lists and scalars, with every path absolute: what is recorded beside a run."""
    if dataclasses.is_dataclass(config):
        return {item.name: to_plain(getattr(config, item.name)) for item in dataclasses.fields(config)}
    if isinstance(config, Path):
        return os.path.abspath(config)
    if isinstance(config, tuple):
        return [to_plain(element) for element in config]
    return config


def to_yaml(config: Any) -> str:
    """A config as YAML text that :func:`load` reads back to an equal config (up to paths made absolute)."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def reference(cls: type[Any]) -> str:
    """YAML with every key of ``cls``, its default and its documentation: the text of ``configs/reference.yaml``."""
    lines: list[str] = []
    for item, annotation in _fields(cls):
        if not (members := _members(annotation)):
            lines.append(_reference_line(item)[2:])
            continue
        default = members[0] if len(members) == 1 else item.default_factory
        lines += ["", f"# {item.metadata['doc']}", f"{item.name}:"]
        shown = {own.name: own for own in dataclasses.fields(default)}  # type: ignore[arg-type]
        lines += [_reference_line(own) for own in sorted(shown.values(), key=lambda own: own.name != "name")]
        for member in members:
            if member is not default:
                lines += _reference_of_choice(member, shown)
    return "\n".join(lines).lstrip("\n") + "\n"


def _reference_of_choice(member: type[Any], shown: Mapping[str, dataclasses.Field[Any]]) -> list[str]:
    """How the keys of another member of a union differ from the ones already shown, as comments."""
    own = {item.name: item for item in dataclasses.fields(member)}
    missing = [name for name in shown if name not in own]
    lines = [f"  # name: {tag_of(member)}" + (f" (without {', '.join(missing)})" if missing else "")]
    for name, item in own.items():
        if name != "name" and (name not in shown or item.default != shown[name].default):
            lines.append(f"  #   {_reference_line(item).strip()}")
    return lines


def _reference_line(item: dataclasses.Field[Any]) -> str:
    default = str(item.default) if isinstance(item.default, Path) else item.default
    if isinstance(default, tuple):
        default = list(default)
    text = yaml.safe_dump(default, default_flow_style=True).removesuffix("...\n").strip()
    return f"  {f'{item.name}: {text}':<36}  # {item.metadata.get('doc', '')}"
