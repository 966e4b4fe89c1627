"""Units of work: what one worker reads, encodes and commits at a time.

How a corpus is cut depends on the corpus alone, never on the number of workers: this is why the output does not either.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from prep.documents import BadDocument, Document, Piece, Tally, stamp_of

if TYPE_CHECKING:  # what finds sources is much to import for a worker that is told what to read
    from prep.sources import Source

LARGEST_UNIT = 8_000_000
SMALLEST_UNIT = 250_000
UNITS_WANTED = 64


class Unit(NamedTuple):
    """Pieces that are processed together; ``split`` is None where each document's content decides."""

    pieces: tuple[Piece, ...]
    split: str | None = None

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def name(self) -> str:
        """For messages: the file, or the first of them."""
        first, more = self.pieces[0], len(self.pieces) - 1
        return first.path + (f" (and {more} more files)" if more else "")

    def documents(self, tally: Tally | None = None) -> Iterator[Document | BadDocument]:
        for piece in self.pieces:
            yield from piece.documents(tally)

    def located(self, tally: Tally | None = None) -> Iterator[tuple[Piece, Document | BadDocument]]:
        """:meth:`documents`, each with the piece that it is from."""
        for piece in self.pieces:
            for document in piece.documents(tally):
                yield piece, document

    def content(self) -> bytes:
        """A hash of what the unit is made of; reading its documents to the end with one tally gives the same."""
        tally = Tally()
        for piece in self.pieces:
            piece.reader.identify(piece, tally)
        return self.content_in(tally)

    def content_in(self, tally: Tally) -> bytes:
        """:meth:`content`, from the tally with which :meth:`documents` was read to its end."""
        return hashlib.sha256(f"{self.split}".encode() + tally.content.digest()).digest()


def keys_of(units: Sequence[Unit], job: str) -> list[str]:
    """The names under which the work on ``units`` is kept: they change with the job, the cut, or a file's size or time."""
    stamps: dict[str, str] = {}
    keys = []
    for unit in units:
        digest = hashlib.sha256(f"{job} {unit.split}".encode())
        for piece in unit.pieces:
            if piece.path not in stamps:
                stamps[piece.path] = stamp_of(piece.path) if os.path.exists(piece.path) else ""
            stamp = stamps[piece.path] or piece.identity().hex()
            digest.update(f"\n{piece._replace(reader=None)} {piece.reader} {stamp}".encode())  # pyright: ignore
        keys.append(digest.hexdigest()[:32])
    return keys


def unit_size(total: int) -> int:
    """Bytes per unit for a corpus of ``total`` bytes: enough units to keep many cores busy, none needlessly small."""
    return min(LARGEST_UNIT, max(SMALLEST_UNIT, total // UNITS_WANTED))


def plan_pieces(sources: Iterable[Source], unit_bytes: int) -> Iterator[Piece]:
    """The pieces of every file, none much longer than ``unit_bytes`` where its reader can cut it."""
    for source in sources:
        for file in source.files:
            yield from file.reader.pieces(file.path, file.size, unit_bytes)


def plan_units(sources: Iterable[Source], unit_bytes: int, split: str | None = None) -> list[Unit]:
    """Cut long files into pieces, and pack short ones together, into units of about ``unit_bytes``, in order."""
    return pack(plan_pieces(sources, unit_bytes), unit_bytes, split)


def pack(pieces: Iterable[Piece], unit_bytes: int, split: str | None = None) -> list[Unit]:
    units: list[Unit] = []
    waiting: list[Piece] = []
    size = 0
    for piece in pieces:
        length = piece.size
        if waiting and size + length > unit_bytes:
            units.append(Unit(tuple(waiting), split))
            waiting, size = [], 0
        waiting.append(piece)
        size += length
    return [*units, Unit(tuple(waiting), split)] if waiting else units
