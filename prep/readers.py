"""How bytes become documents: one reader per kind of text file, packed or not.

:mod:`prep.documents` says what a reader is. The readers here also have ``parse``, which takes the bytes of a file a few at a
time and needs no file: :mod:`prep.packed_files` unpacks into it. No more than one document is in memory, and a document longer
than ``largest`` never is: it is an error like any other text that cannot be used.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Protocol

from accel_pretrain.errors import DataError
from prep.documents import CHUNK, OR_SKIP, BadDocument, Document, Piece, Reader, Tally, digest_of, opened, read_some
from prep.normal import key_of_chunks

__all__ = [
    "BadDocument", "Document", "JsonLines", "Piece", "Reader", "SeparatedText", "Tally", "TextReader", "WholeText", "digest_of",
]  # fmt: skip

LARGEST_DOCUMENT = 64_000_000
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF32_BOMS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_MOST_DIGITS = 4000
_LINE_END = re.compile(rb"\n")
# Where a long text may be cut so that every tokenizer of tiktoken gives the parts the same ids as the whole: after a
# line end between two visible characters. Left out are bytes that can begin or end white space of more than one byte,
# and the slash, which o200k_base takes to the line end before it.
_SAFE_CUT = re.compile(rb"[\x21-\x7e\xb0-\xbf]\r?\n(?=[\x21-\x2e\x30-\x7e\xc3-\xe0\xe4-\xf4])")
# In a text without line ends: before a single space between two words.
_WORD_CUT = re.compile(rb"[A-Za-z](?= [A-Za-z])")


class TextReader(Reader, Protocol):
    """A reader of text that need not lie in a file as it is."""

    def parse(self, chunks: Iterable[bytes], path: str, offset: int, packing: str | None) -> Iterator[Document | BadDocument]:
        """The documents in ``chunks``, which begin ``offset`` bytes into the text of ``path``."""
        ...


@dataclass(frozen=True)
class _Text:
    """What the three readers share."""

    def documents(self: Any, piece: Piece, tally: Tally | None = None) -> Iterator[Document | BadDocument]:
        return self.parse(piece.chunks(tally), piece.path, piece.start, None)

    def identify(self, piece: Piece, tally: Tally) -> None:
        for _ in piece.chunks(tally):
            pass


@dataclass(frozen=True)
class WholeText(_Text):
    """A text file is one document. A long one is cut into parts that are encoded apart, to the same ids.

    Without ``cut`` it stays in one piece, for those who must see all of it; with ``keyed``, parts carry the key of the whole.
    """

    largest: int = LARGEST_DOCUMENT
    cut: bool = True
    keyed: bool = False

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]:
        found = _survey(path) if self.cut and size > unit_bytes else None
        if not isinstance(found, int):  # short; or not valid text, which `documents` will say
            yield Piece(path, 0, size, self)
            return
        ranges = list(_ranges(path, size, unit_bytes, _SAFE_CUT, _WORD_CUT))
        if any(stop - start > self.largest for start, stop in ranges):  # then all of it is too long, and none is left out alone
            yield Piece(path, 0, size, self)
            return
        key = _key_of_file(path) if self.keyed else None
        for start, stop in ranges:
            yield Piece(path, start, stop, self, found, ends=stop == size, key=key)

    def documents(self, piece: Piece, tally: Tally | None = None) -> Iterator[Document | BadDocument]:
        if piece.stop - piece.start > self.largest:
            self.identify(piece, tally or Tally())
            found = _survey(piece.path)
            yield found if isinstance(found, BadDocument) else _too_long(piece.path, piece.start, None, self.largest)
            return
        for document in super().documents(piece, tally):
            if piece.digest is not None:
                if isinstance(document, BadDocument):  # it was looked at before it was cut
                    raise DataError(f"{piece.path}: changed while it was read; run again when nothing writes to it")
                document = document._replace(digest=piece.digest, whole=False, ends=piece.ends, whole_key=piece.key)
            yield document

    def parse(self, chunks: Iterable[bytes], path: str, offset: int, packing: str | None) -> Iterator[Document | BadDocument]:
        held: list[bytes] = []
        size = 0
        for chunk in chunks:
            size += len(chunk)
            if size <= self.largest:
                held.append(chunk)
            else:
                held.clear()
        too_long = _too_long(path, offset, packing, self.largest)
        yield too_long if size > self.largest else _document(b"".join(held), path, offset, packing)


@dataclass(frozen=True)
class SeparatedText(_Text):
    """A text file whose documents stand between separators; line ends next to a separator belong to no document."""

    separator: str
    largest: int = LARGEST_DOCUMENT

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]:
        for start, stop in _ranges(path, size, unit_bytes, self._pattern()):
            yield Piece(path, start, stop, self)

    def parse(self, chunks: Iterable[bytes], path: str, offset: int, packing: str | None) -> Iterator[Document | BadDocument]:
        for begin, record, ended in _records(chunks, self._pattern(), self.largest):
            if record is None:
                yield _too_long(path, offset + begin, packing, self.largest)
                continue
            stripped = record.lstrip(b"\r\n")
            if stripped.strip() or ended:  # nothing after the last separator is not an empty document
                place = offset + begin + len(record) - len(stripped)
                yield _document(stripped.rstrip(b"\r\n"), path, place, packing)

    def _pattern(self) -> re.Pattern[bytes]:
        spellings = {self.separator, self.separator.replace("\n", "\r\n")}
        return re.compile(b"|".join(re.escape(spelling.encode()) for spelling in sorted(spellings)))


@dataclass(frozen=True)
class JsonLines(_Text):
    """A file with one JSON object per line; ``column`` is the key of its text."""

    column: str
    largest: int = LARGEST_DOCUMENT

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]:
        for start, stop in _ranges(path, size, unit_bytes, _LINE_END):
            yield Piece(path, start, stop, self)

    def parse(self, chunks: Iterable[bytes], path: str, offset: int, packing: str | None) -> Iterator[Document | BadDocument]:
        decoder = json.JSONDecoder(object_pairs_hook=self._once, parse_int=_number)
        for begin, line, _ in _records(chunks, _LINE_END, self.largest):
            if line is None:
                yield _too_long(path, offset + begin, packing, self.largest)
            elif line.strip():
                yield self._document(decoder, line, path, offset + begin, packing)

    def _document(
        self, decoder: json.JSONDecoder, line: bytes, path: str, offset: int, packing: str | None
    ) -> Document | BadDocument:
        clean = decoded(line, path, offset, packing)
        if isinstance(clean, BadDocument):
            return clean
        try:
            row = decoder.decode(clean.decode())
            if not isinstance(row, dict):
                reason = f"expected one JSON object per line, found {type(row).__name__}"
            elif self.column not in row:
                reason = f"no column {self.column!r}, only {', '.join(row) or 'none'}; choose with --text_column NAME"
            elif not isinstance(text := row[self.column], str):
                reason = f"column {self.column!r} holds {type(text).__name__}, not text; choose with --text_column NAME"
            elif "\0" in text:
                reason = f"a NUL character in column {self.column!r}: not text"
            else:
                data = _plain_line_ends(text.encode())
                return Document(data, digest_of(data), offset=offset, packing=packing)
        except UnicodeEncodeError:
            reason = f"half a surrogate pair in column {self.column!r}: not text"
        except (ValueError, RecursionError) as error:
            reason = f"not valid JSON ({error})"
        return BadDocument(path, offset, reason + OR_SKIP, packing=packing)

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs) and sum(key == self.column for key, _ in pairs) > 1:
            raise ValueError(f"the key {self.column!r} stands twice")
        return row


def _number(digits: str) -> int | float:
    """No int from more digits than Python reads: whatever the number is, it is no text."""
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


# ---------------------------------------------------------------------------------------------------------------- bytes


def decoded(data: bytes, path: str, offset: int, packing: str | None = None, place: str | None = None) -> bytes | BadDocument:
    """Valid UTF-8 without byte order mark and with plain line ends; ``offset`` is where ``data`` begins in the text."""

    def bad(at: int, reason: str) -> BadDocument:
        return BadDocument(path, at, reason + OR_SKIP, place, packing)

    if offset == 0 and data.startswith(_UTF32_BOMS):  # first: the one of UTF-32 begins with the one of UTF-16
        return bad(0, "UTF-32 text; convert it: iconv -f UTF-32 -t UTF-8")
    if offset == 0 and data.startswith(_UTF16_BOMS):
        return bad(0, "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8")
    if (at := data.find(b"\0")) >= 0:
        return bad(offset + at, f"byte {offset + at} is NUL: binary data or UTF-16, not UTF-8 text")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        return bad(at, f"byte {at} (0x{data[error.start]:02x}) is not UTF-8; convert it with iconv")
    if offset == 0:
        data = data.removeprefix(_UTF8_BOM)
    return _plain_line_ends(data)


def _plain_line_ends(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n") if b"\r" in data else data  # to look is much cheaper than to replace


def _document(data: bytes, path: str, offset: int, packing: str | None) -> Document | BadDocument:
    clean = decoded(data, path, offset, packing)
    return clean if isinstance(clean, BadDocument) else Document(clean, digest_of(clean), offset=offset, packing=packing)


def _too_long(path: str, offset: int, packing: str | None, largest: int) -> BadDocument:
    reason = f"a document of more than {largest:,} bytes; separate the documents in it with --doc_sep, or raise --max_document"
    return BadDocument(path, offset, reason + OR_SKIP, packing=packing)


def _records(chunks: Iterable[bytes], boundary: re.Pattern[bytes], largest: int) -> Iterator[tuple[int, bytes | None, bool]]:
    """The bytes between matches of ``boundary``: where they begin, they (None: too long to hold), whether a match ends them."""
    overlap = 0 if boundary is _LINE_END else len(boundary.pattern)  # no shorter than what it matches
    # A record may be many chunks long: what of it was searched waits in `head`, and is joined once.
    head, size, lost = list[bytes](), 0, False
    buffer, begin, base = b"", 0, 0
    for chunk in chunks:
        buffer += chunk
        used = 0
        for match in boundary.finditer(buffer):
            too_long = lost or size + match.start() - used > largest
            yield begin, None if too_long else b"".join([*head, buffer[used : match.start()]]), True
            head, size, lost, used = [], 0, False, match.end()
            begin = base + used
        stay = max(used, len(buffer) - overlap)
        head.append(buffer[used:stay])
        size += stay - used
        if size > largest:
            lost, head = True, []
        base, buffer = base + stay, buffer[stay:]
    if size or buffer:
        too_long = lost or size + len(buffer) > largest
        yield begin, None if too_long else b"".join([*head, buffer]), False


def _survey(path: str) -> int | BadDocument:
    """:func:`digest_of` a whole text file, or where it is not valid text, in constant memory."""
    digest, decoder = hashlib.blake2b(digest_size=8), codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for chunk in _plain_chunks(path):
        try:
            if (at := chunk.find(b"\0")) >= 0:
                raise UnicodeDecodeError("utf-8", chunk, at, at + 1, "")
            decoder.decode(chunk)
        except UnicodeDecodeError:
            with opened(path) as file:  # `decoded` puts it into words: a few bytes around it are enough
                at = max(0, offset - 4) if offset else 0
                file.seek(at)
                return _problem_in(read_some(file, 2 * CHUNK), path, at)
        offset += len(chunk)
        digest.update((chunk if offset > len(chunk) else chunk.removeprefix(_UTF8_BOM)).replace(b"\r\n", b"\n"))
    if decoder.getstate()[0]:
        return _problem_in(decoder.getstate()[0], path, offset - len(decoder.getstate()[0]))
    return int.from_bytes(digest.digest(), "big")


def _problem_in(data: bytes, path: str, offset: int) -> BadDocument:
    """What is wrong with ``data``, which may begin inside a character and holds something that is not text."""
    inside = next((index for index, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0) if offset else 0
    found = decoded(data[inside:], path, offset + inside)
    return found if isinstance(found, BadDocument) else BadDocument(path, offset, "not UTF-8 text" + OR_SKIP)


def _key_of_file(path: str) -> bytes:
    """The key of a whole text file that is valid text, in constant memory."""
    head = itertools.chain([next(chunks := _plain_chunks(path)).removeprefix(_UTF8_BOM)], chunks)
    return key_of_chunks(head)


def _plain_chunks(path: str) -> Iterator[bytes]:
    """The bytes of a file, the two bytes of a line end always together."""
    with opened(path) as file:
        chunk = read_some(file, CHUNK)
        while chunk:
            following = read_some(file, CHUNK)
            if following and chunk.endswith(b"\r"):
                chunk, following = chunk[:-1], b"\r" + following
            yield chunk
            chunk = following


def _ranges(
    path: str, size: int, unit_bytes: int, boundary: re.Pattern[bytes], otherwise: re.Pattern[bytes] | None = None
) -> Iterator[tuple[int, int]]:
    """Ranges of about ``unit_bytes`` that end behind a match of ``boundary``, the last at the end of the file."""
    start = 0
    with opened(path) as file:
        while start < size:
            stop = size
            if size - start > unit_bytes:
                stop = _find(file, start + unit_bytes, size, boundary, otherwise)
            yield start, stop
            start = stop


def _find(file: IO[bytes], position: int, size: int, boundary: re.Pattern[bytes], otherwise: re.Pattern[bytes] | None) -> int:
    """Where the first match at or after ``position`` ends, or one of ``otherwise`` in the same megabyte; else ``size``."""
    overlap = 4096  # longer than any boundary
    while position < size:
        file.seek(position)
        window = read_some(file, CHUNK)
        if match := boundary.search(window) or (otherwise and otherwise.search(window)):
            return position + match.end()
        position += max(1, len(window) - overlap) if position + len(window) < size else len(window)
    return size
