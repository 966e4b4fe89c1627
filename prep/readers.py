"""How bytes become documents: one reader per kind of file.

A reader does two things. :meth:`Reader.pieces` cuts a file into ranges that can be read apart, at ends of records,
without decoding it. :meth:`Reader.documents` turns one such range into documents. Whatever has these two methods is a
reader: what ``start`` and ``stop`` count (bytes here; row groups, say, elsewhere) is its own business.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple, Protocol

from accel_pretrain.errors import DataError

CHUNK = 1 << 20
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Where a long text may be cut so that every tokenizer of tiktoken gives the parts the same ids as the whole: after a
# line end between two visible characters. Left out are bytes that can begin or end white space of more than one byte,
# and the slash, which o200k_base takes to the line end before it.
_SAFE_CUT = re.compile(rb"[\x21-\x7e\xb0-\xbf]\r?\n(?=[\x21-\x2e\x30-\x7e\xc3-\xe0\xe4-\xf4])")


class Document(NamedTuple):
    """One text as valid UTF-8, or a part of one; ``digest`` is the hash of the whole text, which decides its split."""

    data: bytes
    digest: int
    whole: bool = True
    ends: bool = True  # False: the text goes on in the next piece, so no end-of-text yet

    @property
    def is_empty(self) -> bool:
        return self.whole and (not self.data or self.data.isspace())

    @property
    def text(self) -> str:
        return self.data.decode()


class BadDocument(NamedTuple):
    """Something that is not a text; the line is only counted when somebody wants to read the message."""

    path: str
    offset: int
    reason: str

    @property
    def problem(self) -> str:
        return f"{self.path}:{_line_of(self.path, self.offset)}: {self.reason}"


class Piece(NamedTuple):
    """A range of one file. With a ``digest``, it is a part of one long document that has this digest."""

    path: str
    start: int
    stop: int
    reader: Reader
    digest: int | None = None
    ends: bool = True

    def documents(self) -> Iterator[Document | BadDocument]:
        return self.reader.documents(self)

    def read(self) -> bytes:
        """The bytes of the range; raises :class:`DataError` when the file is no longer there or has become shorter."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                data = file.read(self.stop - self.start)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        if len(data) != self.stop - self.start:
            raise DataError(f"{self.path}: became shorter while it was read; run again when nothing writes to it")
        return data


class Reader(Protocol):
    """One kind of file."""

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]: ...

    def documents(self, piece: Piece) -> Iterator[Document | BadDocument]: ...


def digest_of(data: bytes) -> int:
    """The hash that decides a document's split, in [0, 2**64)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


# -------------------------------------------------------------------------------------------------------- three readers


@dataclass(frozen=True)
class WholeText:
    """A text file is one document. A long one is cut into parts that are encoded apart, to the same ids."""

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]:
        digest = _digest_of_file(path) if size > unit_bytes else None
        if digest is None:  # short; or not valid text, which `documents` will say
            yield Piece(path, 0, size, self)
            return
        for start, stop in _ranges(path, size, unit_bytes, _SAFE_CUT):
            yield Piece(path, start, stop, self, digest, ends=stop == size)

    def documents(self, piece: Piece) -> Iterator[Document | BadDocument]:
        document = _document(piece.read(), piece.path, piece.start)
        if isinstance(document, Document) and piece.digest is not None:
            document = document._replace(digest=piece.digest, whole=False, ends=piece.ends)
        yield document


@dataclass(frozen=True)
class SeparatedText:
    """A text file whose documents stand between separators; line ends next to a separator belong to no document."""

    separator: str

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]:
        for start, stop in _ranges(path, size, unit_bytes, self._pattern()):
            yield Piece(path, start, stop, self)

    def documents(self, piece: Piece) -> Iterator[Document | BadDocument]:
        data, begin = piece.read(), 0
        ends = (match.span() for match in self._pattern().finditer(data))
        for end, following in itertools.chain(ends, [(len(data), len(data))]):
            record = data[begin:end]
            stripped = record.lstrip(b"\r\n")
            offset, begin = piece.start + begin + len(record) - len(stripped), following
            if stripped.strip() or end < len(data):  # nothing after the last separator is not an empty document
                yield _document(stripped.rstrip(b"\r\n"), piece.path, offset)

    def _pattern(self) -> re.Pattern[bytes]:
        spellings = {self.separator, self.separator.replace("\n", "\r\n")}
        return re.compile(b"|".join(re.escape(spelling.encode()) for spelling in sorted(spellings)))


@dataclass(frozen=True)
class JsonLines:
    """A file with one JSON object per line; ``column`` is the key of its text."""

    column: str

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]:
        for start, stop in _ranges(path, size, unit_bytes, re.compile(rb"\n")):
            yield Piece(path, start, stop, self)

    def documents(self, piece: Piece) -> Iterator[Document | BadDocument]:
        offset = piece.start
        for line in piece.read().split(b"\n"):
            if line.strip():
                yield self._document(line, piece.path, offset)
            offset += len(line) + 1

    def _document(self, line: bytes, path: str, offset: int) -> Document | BadDocument:
        clean = _decode(line, path, offset)
        if isinstance(clean, BadDocument):
            return clean
        try:
            row = json.loads(clean)
            if not isinstance(row, dict):
                reason = f"expected one JSON object per line, found {type(row).__name__}"
            elif self.column not in row:
                reason = f"no column {self.column!r}, only {', '.join(row) or 'none'}; choose with --text_column NAME"
            elif not isinstance(text := row[self.column], str):
                reason = f"column {self.column!r} holds {type(text).__name__}, not text; choose with --text_column NAME"
            elif "\0" in text:
                reason = f"a NUL character in column {self.column!r}: not text"
            else:
                data = text.encode().replace(b"\r\n", b"\n")
                return Document(data, digest_of(data))
        except UnicodeEncodeError:
            reason = f"half a surrogate pair in column {self.column!r}: not text"
        except (ValueError, RecursionError) as error:
            reason = f"not valid JSON ({error})"
        return BadDocument(path, offset, reason + _OR_SKIP)


# ---------------------------------------------------------------------------------------------------------------- bytes

_OR_SKIP = "; or leave such documents out with --on_error skip"


def _decode(data: bytes, path: str, offset: int) -> bytes | BadDocument:
    """Valid UTF-8 without byte order mark and with plain line ends; ``offset`` is where ``data`` begins in the file."""
    if offset == 0 and data.startswith(_UTF16_BOMS):
        return BadDocument(path, 0, "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8" + _OR_SKIP)
    if (at := data.find(b"\0")) >= 0:
        at += offset
        return BadDocument(path, at, f"byte {at} is NUL: binary data or UTF-16, not UTF-8 text" + _OR_SKIP)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        shown = f"byte {at} (0x{data[error.start]:02x})"
        return BadDocument(path, at, f"{shown} is not UTF-8; convert it with iconv" + _OR_SKIP)
    if offset == 0:
        data = data.removeprefix(_UTF8_BOM)
    return data.replace(b"\r\n", b"\n")


def _document(data: bytes, path: str, offset: int) -> Document | BadDocument:
    clean = _decode(data, path, offset)
    return clean if isinstance(clean, BadDocument) else Document(clean, digest_of(clean))


def _digest_of_file(path: str) -> int | None:
    """:func:`digest_of` a whole text file, in constant memory; None where it is not valid text."""
    digest, decoder = hashlib.blake2b(digest_size=8), codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        chunk = file.read(CHUNK).removeprefix(_UTF8_BOM)
        while chunk:
            following = file.read(CHUNK)
            if following and chunk.endswith(b"\r"):  # keep the two bytes of a line end together
                chunk, following = chunk[:-1], b"\r" + following
            try:
                decoder.decode(chunk, final=not following)
            except UnicodeDecodeError:
                return None
            if b"\0" in chunk:
                return None
            digest.update(chunk.replace(b"\r\n", b"\n"))
            chunk = following
    return int.from_bytes(digest.digest(), "big")


def _ranges(path: str, size: int, unit_bytes: int, boundary: re.Pattern[bytes]) -> Iterator[tuple[int, int]]:
    """Ranges of about ``unit_bytes`` that end behind a match of ``boundary``, the last at the end of the file."""
    start = 0
    with open(path, "rb") as file:
        while start < size:
            stop = size
            if size - start > unit_bytes:
                stop = _find(file, start + unit_bytes, size, boundary)
            yield start, stop
            start = stop


def _find(file: IO[bytes], position: int, size: int, boundary: re.Pattern[bytes]) -> int:
    """Where the first match at or after ``position`` ends; ``size`` when there is none."""
    overlap = 4096  # longer than any boundary
    while position < size:
        file.seek(position)
        window = file.read(CHUNK)
        if match := boundary.search(window):
            return position + match.end()
        position += max(1, len(window) - overlap) if position + len(window) < size else len(window)
    return size


def _line_of(path: str, offset: int) -> int:
    line = 1
    with open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(CHUNK, offset))):
            line += chunk.count(b"\n")
            offset -= len(chunk)
    return line
