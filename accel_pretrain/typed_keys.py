"""The tree of keys that a dataclass knows, and which of them a person means. Part of :mod:`accel_pretrain.typed_yaml`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from dataclasses import dataclass
from typing import Any

from accel_pretrain.redaction import looks_secret
from accel_pretrain.typed_values import accepts, is_union

_LONGEST = 100  # letters of a key that is no key


@dataclass(frozen=True)
class Leaf:
    """One settable key: its dotted path, the types that it has in the members of a union, and its documentation."""

    path: str
    types: tuple[Any, ...]
    doc: str
    aliases: tuple[str, ...]

    @property
    def is_flag(self) -> bool:
        return self.types[0] is bool or set(typing.get_args(self.types[0])) == {bool, type(None)}


def members_of(annotation: Any) -> tuple[type[Any], ...]:
    """The dataclasses in an annotation: one for a section, several for a union, none for a leaf."""
    options = typing.get_args(annotation) if is_union(annotation) else (annotation,)
    return tuple(option for option in options if dataclasses.is_dataclass(option))  # type: ignore[misc]


@functools.cache
def fields_of(cls: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(item, hints[item.name]) for item in dataclasses.fields(cls)]


def leaves(cls: type[Any], prefix: str = "") -> dict[str, Leaf]:
    """Every settable key below ``cls``, in declaration order, by dotted path."""
    found: dict[str, Leaf] = {}
    for item, annotation in fields_of(cls):
        path = f"{prefix}{item.name}"
        if members := members_of(annotation):
            for member in members:
                for key, leaf in leaves(member, path + ".").items():
                    seen = found.get(key)
                    found[key] = dataclasses.replace(seen, types=(*seen.types, *leaf.types)) if seen else leaf
        else:
            doc, aliases = item.metadata.get("doc", ""), item.metadata.get("aliases", ())
            found[path] = Leaf(path, (annotation,), doc, aliases)
    return found


class Keys:
    """Finds the leaf that a written key means: a dotted path, or a last part or alias that is unique in the tree."""

    def __init__(self, cls: type[Any]) -> None:
        self.leaves = leaves(cls)
        self.sections = {item.name for item, annotation in fields_of(cls) if members_of(annotation)}
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
            candidates = [leaf for leaf in candidates if any(accepts(kind, raw) for kind in leaf.types)] or candidates
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            return f"{key}: several keys end so; write one of {', '.join(leaf.path for leaf in candidates)}"
        if looks_secret(key) and not difflib.get_close_matches(key.rpartition(".")[2], self.short, n=1, cutoff=0.85):
            variable = key.rpartition(".")[2].upper()
            return f"{key}: a secret has no place in a config, which is recorded; set the environment variable {variable}"
        shown = key if len(key) <= _LONGEST else f"{key[:_LONGEST]}..."
        return f"{shown}: there is no such key{self._suggestion(shown)}"

    def _suggestion(self, key: str) -> str:
        last = key.rpartition(".")[2]
        if last not in self.short and (near := difflib.get_close_matches(key, self.leaves, n=1, cutoff=0.75)):
            return f"; did you mean {near[0]}?"
        if near := difflib.get_close_matches(last, self.short, n=1, cutoff=0.6):
            return f"; did you mean {self.short[near[0]][0].path}?"
        return f"; the sections are {', '.join(sorted(self.sections))}" if self.sections else ""
