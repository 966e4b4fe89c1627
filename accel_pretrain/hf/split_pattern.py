"""Split patterns between two regex engines: tiktoken's (Rust, fancy-regex) and that of ``tokenizers`` (Oniguruma).

They read almost the same language. Where they do not, :func:`to_oniguruma` writes what means the same there: ``$`` is the end
of a line in Oniguruma, ``{1,3}+`` repeats the repetition there instead of being possessive, and classes of characters come from
Unicode tables of other years. What is not known to mean the same in both is refused, not passed on.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from accel_pretrain.errors import CheckpointError
from accel_pretrain.hf.probes import ALL_CODES

# What a pattern is made of, outside of [...]; the first that matches is taken.
_PIECES = re.compile(
    r"""(?P<atom>\\[pP](?:\{\^?\w+\}|\w)|\\[sSdDwW])
      | (?P<literal>\\(?:x\{[0-9A-Fa-f]{1,6}\}|x[0-9A-Fa-f]{2}|[rntf]|[^\w\s])|[^\\\[\](){}*+?|^$])
      | (?P<end>\\z|\$)
      | (?P<class>\[)
      | (?P<open>\((?:\?(?:i?:|=|!|<=|<!|>)|(?!\?)))
      | (?P<close>\))
      | (?P<counted>\{\d+(?:,\d*)?\}(?:\+|(?!\?)))
      | (?P<repeat>[*+?][+?]?)
      | (?P<or>\|)
    """,
    re.VERBOSE,
)
# The same inside of [...], where sets within sets and operations on sets are left out.
_IN_CLASS = re.compile(
    r"""(?P<atom>\\[pP](?:\{\^?\w+\}|\w)|\\[sSdDwW])
      | (?P<literal>\\(?:x\{[0-9A-Fa-f]{1,6}\}|x[0-9A-Fa-f]{2}|[rntf]|[^\w\s])|(?!&&|--|~~)[^\\\[\]])
    """,
    re.VERBOSE,
)
_EVERY_CHARACTER = "".join(map(chr, ALL_CODES))


def to_oniguruma(pattern: str) -> str:
    """A pattern for ``tokenizers`` that splits as ``pattern`` does in tiktoken; raises :class:`CheckpointError` if unsure."""
    written: list[str] = []
    starts: list[int] = []  # where in ``written`` each open group began
    last = 0  # where the last thing that can be repeated began
    for kind, text in _parse(pattern):
        if kind == "open":
            starts.append(len(written))
        elif kind == "close":
            last = starts.pop()
        elif kind not in ("counted", "repeat"):
            last = len(written)
        if kind == "counted" and text.endswith("+"):
            written[last:] = ["(?>", *written[last:], text[:-1], ")"]
        elif kind == "class":
            written.append(_class_to_oniguruma(text))
        elif kind == "atom":
            body = _atom_to_oniguruma(text)
            written.append(body if body == text else f"[{body}]")
        else:
            written.append(r"\z" if kind == "end" else text)
    return "".join(written)


def from_oniguruma(pattern: str) -> str | None:
    """A pattern of ``tokenizers`` if tiktoken takes it to mean the same (but for the age of the Unicode tables), else None."""
    try:
        pieces = list(_parse(pattern))
    except CheckpointError:
        return None
    same = not any(text == "$" or (kind == "counted" and text.endswith("+")) for kind, text in pieces)
    return pattern if same else None


def contested(pattern: str) -> frozenset[str]:
    """The characters that a class in ``pattern`` holds in one of the two engines only."""
    atoms = re.findall(r"\\[pP](?:\{\^?\w+\}|\w)|\\[sSdDwW]", pattern)
    return frozenset().union(*(added | missing for added, missing in map(_differences, atoms)))


def _parse(pattern: str) -> Iterator[tuple[str, str]]:
    """The pieces of a pattern as (kind, text); a class comes as one piece."""
    position, depth = 0, 0
    while position < len(pattern):
        match = _PIECES.match(pattern, position)
        end = match.end() if match else position
        kind = match.lastgroup if match else None
        if kind == "class":
            end = _class_end(pattern, position)
        depth += (kind == "open") - (kind == "close")
        if kind is None or depth < 0:
            raise CheckpointError(f"the split pattern cannot be translated for tokenizers, at {pattern[position:][:20]!r}")
        yield kind, pattern[position:end]
        position = end
    if depth:
        raise CheckpointError(f"the split pattern {pattern[:80]!r} has a group that does not end")


def _class_end(pattern: str, start: int) -> int:
    """The place after the ``]`` that belongs to the ``[`` at ``start``."""
    position = start + 1 + pattern.startswith("^", start + 1)
    first = position
    while not pattern.startswith("]", position) or position == first:
        match = _IN_CLASS.match(pattern, position)
        if match is None:
            raise CheckpointError(f"the split pattern cannot be translated for tokenizers, at {pattern[start:][:20]!r}")
        position = match.end()
    return position + 1


def _class_to_oniguruma(text: str) -> str:
    return _IN_CLASS.sub(lambda match: _atom_to_oniguruma(match["atom"]) if match["atom"] else match[0], text)


# ------------------------------------------------------------------------------------------------- the age of the tables


def _atom_to_oniguruma(atom: str) -> str:
    """What stands for the class ``atom`` within [...]: itself, and the code points in which the two tables differ."""
    added, missing = _differences(atom)
    kept = f"[{atom}&&[^{_ranges(added)}]]" if added else atom
    return kept + _ranges(missing)


@functools.cache
def _differences(atom: str) -> tuple[frozenset[str], frozenset[str]]:
    """The characters that ``atom`` matches in Oniguruma only, and in tiktoken's engine only."""
    import tiktoken
    import tokenizers

    if atom[1] in "SDWP":
        added, missing = _differences(atom[0] + atom[1].lower() + atom[2:])
        return missing, added
    bytes_only = {bytes([byte]): byte for byte in range(256)}
    try:
        encoding = tiktoken.Encoding("class", pat_str=atom, mergeable_ranks=bytes_only, special_tokens={})
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"{atom}+"), behavior="removed", invert=True)
    except Exception as error:  # whatever the two engines raise
        raise CheckpointError(
            f"the split pattern's class {atom} is not known to both tiktoken and tokenizers ({error})"
        ) from None
    ours = frozenset(encoding.decode(encoding.encode_ordinary(_EVERY_CHARACTER)))  # it leaves out what does not match
    theirs = frozenset("".join(run for run, _ in split.pre_tokenize_str(_EVERY_CHARACTER)))
    return theirs - ours, ours - theirs


def _ranges(characters: frozenset[str]) -> str:
    """Characters as the inside of a class: ``\\x{200C}-\\x{200D}``."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in ranges)
