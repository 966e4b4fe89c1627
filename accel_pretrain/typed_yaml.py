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
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from accel_pretrain.errors import ConfigError
from accel_pretrain.files import expanded
from accel_pretrain.redaction import secret_in
from accel_pretrain.typed_keys import Keys, Leaf, fields_of, members_of
from accel_pretrain.typed_keys import leaves as leaves  # through here for everybody else
from accel_pretrain.typed_values import Mismatch, accepts, convert
from accel_pretrain.yaml_files import MAX_FILE_BYTES, read_mapping, show

T = TypeVar("T")

MAX_PROBLEMS = 50  # of one file: what has more is not a config
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


# ---------------------------------------------------------------------------------------------------- reading one source


def _flatten(
    keys: Keys, mapping: Mapping[Any, Any], origin: str, entries: dict[str, Entry], problems: list[str], prefix: str = ""
) -> None:
    for key, raw in mapping.items():
        if len(problems) >= MAX_PROBLEMS:
            return
        path = f"{prefix}{key}"
        if isinstance(raw, dict) and path not in keys.leaves:
            if any(known.startswith(path + ".") for known in keys.leaves):
                _flatten(keys, raw, origin, entries, problems, path + ".")
            else:
                problems.append(f"{origin}: {keys.find(path)}")
            continue
        if path in keys.sections:
            if raw not in ("", None):
                problems.append(f"{origin}: {path} is a section and holds keys, found {show(raw)}")
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
    """What :func:`parse_command_line` found: the config file, the overrides in order, bare words, program flags, a preset."""

    config: Path | None
    overrides: tuple[tuple[str, Entry], ...]
    positionals: tuple[str, ...]
    flags: frozenset[str]
    preset: str | None = None


def parse_command_line(
    cls: type[Any],
    argv: Sequence[str],
    *,
    flags: Iterable[str] = (),
    short: Mapping[str, str] | None = None,
    positionals: bool = False,
    presets: bool = False,
) -> CommandLine:
    """Split ``argv`` by the keys of ``cls``.

    An override is ``--training.batch_size 128``, ``--training.batch_size=128``, ``training.batch_size=128``, or any of these
    with a unique last part (``--batch_size 128``); a boolean may stand without a value (``--use_wandb``). ``--config FILE``
    names the file, ``--preset NAME``, where there are ``presets``, what lies beneath it. ``flags`` are switches of the program
    itself (``--print_config``); ``short`` maps ``-o`` to a key.
    Raises one :class:`ConfigError` with everything that could not be understood.
    """
    keys, words, problems = Keys(cls), list(argv), []
    config: Path | None = None
    preset: str | None = None
    own = {"config", "preset"} if presets else {"config"}
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
        leaf = keys.find(name, value if equals else follows) if name not in own else None
        if isinstance(leaf, Leaf) and leaf.is_flag and not equals and (follows is None or not accepts(leaf.types[0], follows)):
            value = FLAG
        elif not equals and follows is None:
            problems.append(leaf if isinstance(leaf, str) else f"--{name}: a value must follow")
            continue
        elif not equals:
            value = words.pop(0)
        if name == "config":
            config = expanded(value)
        elif name in own:
            preset = value
        elif isinstance(leaf, str):
            problems.append(leaf)
        elif leaf is not None:
            overrides.append((leaf.path, Entry(value, f"--{name}")))
    if problems:
        raise ConfigError(problems)
    return CommandLine(config, tuple(overrides), tuple(bare), frozenset(raised), preset)


def _names_a_key(keys: Keys, name: str) -> bool:
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
    keys, problems = Keys(cls), list[str]()
    entries: dict[str, Entry] = {}
    if file is not None:
        _flatten(keys, read_mapping(file), str(file), entries, problems)
    entries = {**beneath, **entries, **dict(overrides)}
    problems += _secrets_in(entries)
    config = _build(cls, "", entries, problems)
    if problems or config is None:
        raise ConfigError(problems)
    if len(to_yaml(config).encode()) > MAX_FILE_BYTES:
        raise ConfigError("all keys together: larger than 64 KiB, which no config file may be in which a run records them")
    return config


def keys_given(cls: type[Any], file: Path | None, overrides: Iterable[tuple[str, Entry]]) -> frozenset[str]:
    """The keys that a file and the overrides name; what is wrong with them is for :func:`load` to say."""
    entries: dict[str, Entry] = {}
    if file is not None:
        _flatten(Keys(cls), read_mapping(file), str(file), entries, [])
    return frozenset(entries.keys() | dict(overrides).keys())


def entries_of(cls: type[Any], mapping: Mapping[Any, Any], origin: str) -> dict[str, Entry]:
    """Values by the dotted keys of ``cls`` that they are for, as overrides for :func:`load`; refuses what is no key."""
    problems, entries = list[str](), dict[str, Entry]()
    _flatten(Keys(cls), mapping, origin, entries, problems)
    if problems:
        raise ConfigError(problems)
    return entries


def from_mapping(cls: type[T], mapping: Mapping[str, Any], origin: str) -> T:
    """Build ``cls`` from a mapping that was already read (from JSON, say); ``origin`` names it in messages."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{origin}: expected keys and values, found {show(mapping)}")
    problems, entries = list[str](), dict[str, Entry]()
    _flatten(Keys(cls), mapping, origin, entries, problems)
    problems += _secrets_in(entries)
    config = _build(cls, "", entries, problems)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def _secrets_in(entries: Mapping[str, Entry]) -> list[str]:
    """A problem for every value that holds a secret of the environment: a config is recorded, and sent to trackers."""
    texts = ((path, text) for path, entry in entries.items() for text in _texts_of(entry.raw))
    found = ((path, secret_in(text)) for path, text in texts)
    return [f"{path}: holds the value of the environment variable {name}; leave it out" for path, name in found if name]


def _texts_of(raw: Any) -> list[str]:
    return [raw] if isinstance(raw, str) else [text for text in raw if isinstance(text, str)] if isinstance(raw, list) else []


def _build(cls: type[T], prefix: str, entries: Mapping[str, Entry], problems: list[str]) -> T | None:
    values: dict[str, Any] = {}
    before = len(problems)
    for item, annotation in fields_of(cls):
        path = f"{prefix}{item.name}"
        if members := members_of(annotation):
            member = _choose(members, item, path, entries, problems)
            values[item.name] = _build(member, path + ".", entries, problems) if member else None
        elif path in entries:
            entry = entries[path]
            try:
                values[item.name] = convert(annotation, entry.raw)
            except Mismatch as expected:
                shown = "" if entry.origin.startswith("--") else f"{entry.origin}: "
                problems.append(f"{shown}{path}: expected {expected}, got {show(entry.raw)}")
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
        problems.append(f"{path}.name: expected {' | '.join(by_name)}, got {show(raw)}")
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
    for item, annotation in fields_of(cls):
        if not (members := members_of(annotation)):
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
