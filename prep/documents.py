"""What a reader hands over: documents, what is not one, the pieces that a file is cut into, and what was counted on the way.

A reader does two things. :meth:`Reader.pieces` cuts a file into ranges that can be read apart, at ends of records, without
decoding it. :meth:`Reader.documents` turns one such range into documents. What ``start`` and ``stop`` count (bytes of a text
file, row groups of a Parquet file, rows of an Arrow file) is the reader's own business: nobody else may subtract them, but
asks :attr:`Piece.size` how much work there is, in bytes of text, and :meth:`Piece.identity` whether it is the same text still.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, Protocol

from accel_pretrain.errors import DataError

CHUNK = 1 << 20
OR_SKIP = "; or leave such documents out with --on_error skip"


class Document(NamedTuple):
    """One text as valid UTF-8, or a part of one; ``digest`` is the hash of the whole text, which decides its split.

    ``offset``, ``place`` and ``packing`` say where it begins, as those of :class:`BadDocument` do.
    """

    data: bytes
    digest: int
    whole: bool = True
    ends: bool = True  # False: the text goes on in the next piece, so no end-of-text yet
    whole_key: bytes | None = None  # of a part: the key of the whole text
    offset: int = 0
    place: str | None = None
    packing: str | None = None

    @property
    def is_empty(self) -> bool:
        return self.whole and (not self.data or self.data.isspace())

    @property
    def text(self) -> str:
        return self.data.decode()

    @property
    def key(self) -> bytes:
        """128 bits that equal texts share, whatever their white space and Unicode form: what ``--dedup exact`` compares."""
        from prep.normal import key_of  # only when it is asked for

        return self.whole_key or key_of(self.data)


class BadDocument(NamedTuple):
    """Something that is not a text; the line is only counted when somebody wants to read the message.

    ``packing`` is the suffix of a packed file (``offset`` then counts the unpacked bytes); ``place`` says where it is in a
    file that has no lines to count, such as a row of a Parquet file; "" is the file as a whole.
    """

    path: str
    offset: int
    reason: str
    place: str | None = None
    packing: str | None = None

    @property
    def problem(self) -> str:
        place = line_of(self.path, self.offset, self.packing) if self.place is None else self.place
        return f"{self.path}:{place}: {self.reason}" if place else f"{self.path}: {self.reason}"


class Reader(Protocol):
    """One kind of file."""

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]: ...

    def documents(self, piece: Piece, tally: Tally | None = None) -> Iterator[Document | BadDocument]: ...

    def identify(self, piece: Piece, tally: Tally) -> None:
        """Give ``tally.content`` what reading all documents of the piece would give it."""
        ...


class Piece(NamedTuple):
    """A range of one file. With a ``digest``, it is a part of one long document that has this digest (and this ``key``).

    ``weight`` is the work in it, in bytes of text, where ``start`` and ``stop`` do not count these.
    """

    path: str
    start: int
    stop: int
    reader: Reader
    digest: int | None = None
    ends: bool = True
    key: bytes | None = None
    weight: int | None = None

    @property
    def size(self) -> int:
        """Bytes of text, about: the measure of work."""
        return self.stop - self.start if self.weight is None else self.weight

    def documents(self, tally: Tally | None = None) -> Iterator[Document | BadDocument]:
        """The documents in order. A ``tally`` counts what was left out and, at the end, knows :meth:`identity`'s bytes."""
        return self.reader.documents(self, tally)

    def place_of(self, index: int) -> str:
        """Where the document with this index begins in the file, as messages say it: its line, its row."""
        for document in itertools.islice(self.documents(), index, None):
            if document.place is None:
                return str(line_of(self.path, document.offset, document.packing))
            return document.place
        return f"document {index + 1}"

    def identity(self) -> bytes:
        """32 bytes that change when the content of the piece does, or how it is read.

        The same bytes come out of ``tally.content.digest()`` after ``documents(tally)`` of a fresh tally was read to its end:
        who reads the documents anyway need not read the file twice.
        """
        tally = Tally()
        self.reader.identify(self, tally)
        return tally.content.digest()

    def read(self) -> bytes:
        """The bytes of the range; raises :class:`DataError` when the file is no longer there or has become shorter."""
        return b"".join(self.chunks(chunk=self.stop - self.start))

    def chunks(self, tally: Tally | None = None, chunk: int = CHUNK) -> Iterator[bytes]:
        """The bytes of the range, a few at a time; they go into ``tally.content``. Raises as :meth:`read` does."""
        if tally is not None:
            tally.content.update(f" {self.start} {self.stop} {self.reader} ".encode())
        left = self.stop - self.start
        with opened(self.path) as file:
            file.seek(self.start)
            while left:
                data = read_some(file, min(chunk, left))
                if not data:
                    raise DataError(f"{self.path}: became shorter while it was read; run again when nothing writes to it")
                left -= len(data)
                if tally is not None:
                    tally.content.update(data)
                yield data


def within(pieces: Iterable[Piece], limit: int | None) -> Iterator[Piece]:
    """The first of ``pieces`` that together have ``limit`` bytes of text, or a piece more; None: all of them."""
    done = 0
    for piece in pieces:
        done += piece.size
        if limit is not None and done >= limit:
            yield piece._replace(ends=True)  # a long document that is cut off here ends here
            return
        yield piece


# ------------------------------------------------------------------------------------------------------ what was counted


@dataclass
class FileChange:
    """What cleaning did to one file: bytes of text before and after, documents, how many were left as they were, and why."""

    before: int = 0
    after: int = 0
    documents: int = 0
    kept: int = 0
    why: str | None = None


@dataclass
class Tally:
    """What was noticed while documents were read: a hash of what was read, documents left out, and changes per file.

    ``content`` stays where it is; :meth:`plain` of the rest goes into a record, and :meth:`add` adds records up.
    """

    content: Any = field(default_factory=hashlib.sha256)
    left_out: Counter[str] = field(default_factory=Counter)
    files: dict[str, FileChange] = field(default_factory=dict)

    def change_of(self, path: str) -> FileChange:
        return self.files.setdefault(path, FileChange())

    def plain(self) -> dict[str, Any]:
        """Dicts, lists and numbers, for JSON."""
        files = {path: vars(change).copy() for path, change in self.files.items()}
        return {"left_out": dict(self.left_out), "files": files}

    def add(self, plain: dict[str, Any]) -> None:
        """Add what another tally counted."""
        self.left_out.update(plain["left_out"])
        for path, other in plain["files"].items():
            change = self.change_of(path)
            change.before += other["before"]
            change.after += other["after"]
            change.documents += other["documents"]
            change.kept += other["kept"]
            change.why = change.why or other["why"]


# ---------------------------------------------------------------------------------------------------------------- bytes


def digest_of(data: bytes) -> int:
    """The hash that decides a document's split, in [0, 2**64)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def opened(path: str) -> IO[bytes]:
    """``path`` opened for reading bytes; raises :class:`DataError`."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_some(file: IO[bytes], size: int) -> bytes:
    """Up to ``size`` bytes; raises :class:`DataError` where the disk or the network fails."""
    try:
        return file.read(size)
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read ({error.strerror})") from None


def stamp_of(path: str) -> str:
    """Size and time of change of a file, as text: the cheap witness that its content is what it was."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return f"{found.st_size} {found.st_mtime_ns}"


def line_of(path: str, offset: int, packing: str | None = None) -> int:
    """The line, counted from 1, in which byte ``offset`` of the text lies."""
    from prep.packed_files import unpacked_file  # only when somebody wants to read the message

    line = 1
    with opened(path) as file:
        chunks = unpacked_file(file, packing) if packing else iter(lambda: read_some(file, CHUNK), b"")
        for chunk in chunks:
            line += chunk[:offset].count(b"\n")
            offset -= len(chunk)
            if offset <= 0:
                break
    return line
