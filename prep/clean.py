"""What may happen to a text between its file and the tokenizer: cleaning, and filters. Each is a pure function of the text.

``--clean`` none leaves a text as its reader gives it: UTF-8, no byte order mark, line ends ``\\n``. The others:

- ``web``: every form of line end and page break becomes ``\\n``; control characters, zero-width spaces, byte order marks
  and soft hyphens go; spaces that are not U+0020 become it (the ideographic one stays); Unicode form NFC; runs of spaces
  and tabs become one space, also at the ends of lines; more than one blank line becomes one.
- ``code``: line ends become ``\\n``, white space at the ends of lines goes, more than two blank lines become two. The rest
  stays: indentation, whatever characters a string literal holds, and all lines among which one of several lines may be.
- ``gutenberg``: the books without their frame (:mod:`prep.gutenberg`), then as web, but indentation stays (verse), and
  chapters keep up to two blank lines. ``--unwrap`` joins the lines of paragraphs that were wrapped at a fixed width.

Joiners (U+200C, U+200D) stay everywhere: Persian, the scripts of India and emoji need them.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from prep.documents import BadDocument, Document, Piece, Reader, Tally, digest_of
from prep.gutenberg import strip_gutenberg
from prep.readers import WholeText

Mode = Literal["none", "web", "code", "gutenberg"]

_CODE_LINE_ENDS = ("\r\n", "\r")
_LINE_ENDS = (*_CODE_LINE_ENDS, "\x0b", "\x0c", "\x85", "\u2028", "\u2029")
_QUOTES = ('"', "'", "`", '"""', "'''")
_ESCAPED = re.compile(r"\\.")
_HEREDOC = re.compile(r"<<[-~]?[\"'\\]?[A-Za-z_]")
_WIDE_SPACE = "\u3000"
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff]")
_RUN_OF_SPACES = re.compile("[ \t]+")
_BLANK_LINES = {count: re.compile(f"\n{{{count + 2},}}") for count in (1, 2)}


def normalise(text: str) -> str:
    """One form for each thing that Unicode can say in several; see the docstring of this module."""
    text = _INVISIBLE.sub("", _line_ends(text))  # before NFC: what stood beside them now stands side by side
    return text if text.isascii() else unicodedata.normalize("NFC", _SPACES.sub(" ", text))


def clean_web(text: str) -> str:
    return _blank_lines("\n".join([_even(line) for line in normalise(text).split("\n")]), 1)


def clean_code(text: str) -> str:
    lines = _line_ends(text, _CODE_LINE_ENDS).split("\n")
    first, stop = _literal_lines(lines)
    cleaned: list[str] = []
    blank = 0
    for number, line in enumerate(lines):
        inside = first <= number < stop
        line = line if inside else line.rstrip(" \t")
        blank = 0 if line or inside else blank + 1
        if inside or line or (cleaned and blank <= 2):
            cleaned.append(line)
    while cleaned and not cleaned[-1] and stop < len(lines):
        cleaned.pop()
    return "\n".join(cleaned)


def _literal_lines(lines: list[str]) -> tuple[int, int]:
    """The first line, and the one behind the last, among which a literal of several lines may be; equal where there is none.

    Such a literal begins and ends on a line with an odd number of quotes of a kind, or it is a here-document, whose end any
    line could be. What only looks like that costs no more than some white space that stays.
    """
    marks = [number for number, line in enumerate(lines) if _may_leave_open(line)]
    if any("<<" in line and _HEREDOC.search(line) for line in lines):
        marks.append(len(lines) - 1)
    return (marks[0], max(marks) + 1) if marks else (0, 0)


def _may_leave_open(line: str) -> bool:
    """Whether a literal may begin on ``line`` and not end there, or the other way round."""
    if '"' not in line and "'" not in line and "`" not in line and "[[" not in line and "]]" not in line and "<<" not in line:
        return False
    spellings = [line] if "\\" not in line else [line, _ESCAPED.sub("", line)]
    odd = any(spelling.count(quote) % 2 for spelling in spellings for quote in _QUOTES)
    return odd or line.count("[[") != line.count("]]") or _HEREDOC.search(line) is not None


def clean_book(text: str, unwrapped: bool) -> str:
    """One book whose frame is gone already."""
    text = _blank_lines("\n".join([_indented(line) for line in normalise(text).split("\n")]), 2)
    return unwrap(text) if unwrapped else text


def _line_ends(text: str, ends: Iterable[str] = _LINE_ENDS) -> str:
    for end in ends:
        if end in text:
            text = text.replace(end, "\n")
    return text


def _even(line: str) -> str:
    """``line`` with one space between words."""
    if _WIDE_SPACE in line:  # which `split` takes for white space
        return _RUN_OF_SPACES.sub(" ", line).strip(" ")
    return " ".join(line.split())


def _indented(line: str) -> str:
    """``line`` with one space between words, but whatever stood before the first."""
    body = line.lstrip(" \t")
    return line[: len(line) - len(body)] + _even(body) if body else ""


def _blank_lines(text: str, most: int) -> str:
    if "\n" * (most + 2) not in text:
        return text.strip("\n")
    return _BLANK_LINES[most].sub("\n" * (most + 1), text).strip("\n")


# ---------------------------------------------------------------------------------------------------------------- unwrap

_NARROWEST, _WIDEST = 40, 100  # characters of a line that a person or a program has wrapped


def unwrap(text: str) -> str:
    """Join the lines of prose that was wrapped at a fixed width; verse, tables, lists and headings stay as they are.

    Most lines of verse begin with a capital, and most of wrapped prose do not: in doubt, a paragraph stays as it is.
    """
    return "\n\n".join(_unwrapped(paragraph) for paragraph in text.split("\n\n"))


def _unwrapped(paragraph: str) -> str:
    lines = paragraph.strip("\n").split("\n")
    width = max(map(len, lines))
    wrapped = len(lines) > 1 and _NARROWEST <= width <= _WIDEST and not any(line[:1].isspace() for line in lines)
    # Wrapped lines end where the next word would not have fitted; verse and lists end earlier.
    if not wrapped or any(len(line) + 1 + len(_first_word(after)) <= width - 4 for line, after in itertools.pairwise(lines)):
        return paragraph
    capitals = sum(_begins_with_capital(line) for line in lines[1:])
    if 4 * capitals >= 3 * (len(lines) - 1):
        return paragraph
    leading = paragraph[: len(paragraph) - len(paragraph.lstrip("\n"))]
    joined = "".join(line if line.endswith("-") else line + " " for line in lines)
    return leading + joined.rstrip(" ")


def _begins_with_capital(line: str) -> bool:
    letter = next(filter(str.isalpha, line), "")
    return letter.isupper() or letter.istitle()


def _first_word(line: str) -> str:
    return line.partition(" ")[0]


# --------------------------------------------------------------------------------------------------------------- filters


@dataclass(frozen=True)
class Filters:
    """Which documents are too odd to keep: each limit in characters or as a share, None where there is none."""

    min_chars: int | None = None
    max_chars: int | None = None
    min_letters: float | None = None
    max_line: int | None = None
    max_repeated: float | None = None

    @property
    def active(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def reason(self, text: str) -> str | None:
        """The name of the first limit that ``text`` breaks."""
        checks: Iterable[tuple[str, float | int | None, Callable[[str], float], int]] = (
            ("min_chars", self.min_chars, len, -1),
            ("max_chars", self.max_chars, len, 1),
            ("max_line", self.max_line, longest_line, 1),
            ("min_letters", self.min_letters, share_of_letters, -1),
            ("max_repeated", self.max_repeated, share_of_repeated_lines, 1),
        )
        return next((name for name, limit, of, sign in checks if limit is not None and sign * of(text) > sign * limit), None)


def longest_line(text: str) -> int:
    return max(map(len, text.split("\n")))


def share_of_letters(text: str) -> float:
    """Letters of any script among the characters that are not white space."""
    visible = "".join(text.split())
    return sum(map(str.isalpha, visible)) / len(visible) if visible else 1.0


def share_of_repeated_lines(text: str) -> float:
    """The share of the lines with something on them that stood in the text before."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


# ----------------------------------------------------------------------------------------------------------- the reader


@dataclass(frozen=True)
class Cleaning:
    """What is done to every document. Where it does anything, a document is seen whole."""

    mode: Mode = "none"
    unwrap: bool = False
    filters: Filters = Filters()

    @property
    def active(self) -> bool:
        return self.mode != "none" or self.filters.active

    def texts(self, text: str) -> tuple[list[str], str | None]:
        """The cleaned documents in ``text`` (several where a file holds several books), and why it was left as it was."""
        if self.mode == "web":
            return [clean_web(text)], None
        if self.mode == "code":
            return [clean_code(text)], None
        if self.mode == "gutenberg":
            books = strip_gutenberg(_line_ends(text))
            if books.kept:
                return [text], books.kept
            return [clean_book(book, self.unwrap) for book in books.texts], None
        return [text], None


@dataclass(frozen=True)
class Cleaned:
    """A reader whose documents are those of ``inner``, cleaned and filtered; the tally counts what changed and what went."""

    inner: Reader
    cleaning: Cleaning

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]:
        for piece in self.inner.pieces(path, size, unit_bytes):
            yield piece._replace(reader=self)

    def documents(self, piece: Piece, tally: Tally | None = None) -> Iterator[Document | BadDocument]:
        tally = Tally() if tally is None else tally
        for document in self.inner.documents(piece, tally):
            if isinstance(document, BadDocument) or document.is_empty:
                yield document
                continue
            yield from self._cleaned(document, tally, piece.path)

    def identify(self, piece: Piece, tally: Tally) -> None:
        self.inner.identify(piece, tally)

    def _cleaned(self, document: Document, tally: Tally, path: str) -> Iterator[Document]:
        change = tally.change_of(path)
        change.before += len(document.data)
        texts, kept = self.cleaning.texts(document.text)
        if kept:
            change.kept, change.why = change.kept + 1, change.why or kept
        for text in texts:
            if reason := self.cleaning.filters.reason(text):
                tally.left_out[reason] += 1
                continue
            data = text.encode()
            change.after += len(data)
            change.documents += 1
            yield document._replace(data=data, digest=digest_of(data))


def cleaned(reader: Reader, cleaning: Cleaning) -> Reader:
    """``reader`` with ``cleaning``; a text file is then no longer cut into parts."""
    if not cleaning.active:
        return reader
    return Cleaned(dataclasses.replace(reader, cut=False) if isinstance(reader, WholeText) else reader, cleaning)


def summary_of(tally: Tally) -> dict[str, Any]:
    """What cleaning did, for a manifest: files, bytes before and after, and the files that were left as they were."""
    kept = sorted(path for path, change in tally.files.items() if change.kept)
    before, after = (sum(getattr(change, name) for change in tally.files.values()) for name in ("before", "after"))
    return {"files": len(tally.files), "bytes_before": before, "bytes_after": after, "left_as_they_were": kept[:1000]}


def report_lines(tally: Tally | dict[str, Any], most: int = 12) -> list[str]:
    """What cleaning did, to print: the sum, what was left out by which limit, and the files, the most changed first."""
    if isinstance(tally, dict):
        plain, tally = tally, Tally()
        tally.add(plain)
    lines = []
    if tally.files:
        before, after = (sum(getattr(change, name) for change in tally.files.values()) for name in ("before", "after"))
        share = f", {1 - after / before:.1%} less" if before else ""
        lines.append(f"cleaned {len(tally.files):,} files: {before / 1e6:.2f} MB before, {after / 1e6:.2f} MB after{share}")
    if tally.left_out:
        lines.append("left out: " + ", ".join(f"{count:,} by --{name}" for name, count in sorted(tally.left_out.items())))
    kept = [(path, change) for path, change in sorted(tally.files.items()) if change.kept]
    for path, change in kept[:most]:
        lines.append(f"  left as it was: {path}: {change.why}" + (f" ({change.kept:,} times)" if change.kept > 1 else ""))
    lines += [f"  and {len(kept) - most:,} more files left as they were"] if len(kept) > most else []
    changed = sorted(tally.files.items(), key=lambda item: (item[1].after - item[1].before, item[0]))
    changed = [(path, change) for path, change in changed if change.before != change.after]
    for path, change in changed[:most]:
        lines.append(f"  {change.before:>12,} -> {change.after:>12,} bytes  {path}")
    lines += [f"  and {len(changed) - most:,} more files changed"] if len(changed) > most else []
    return lines
