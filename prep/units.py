"""Units of work: what one worker reads, encodes and commits at a time.

How a corpus is cut depends on the corpus alone, never on the number of workers: this is why the output does not either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from prep.readers import BadDocument, Document, Piece
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
        return sum(piece.stop - piece.start for piece in self.pieces)

    @property
    def name(self) -> str:
        """For messages: the file, or the first of them."""
        first, more = self.pieces[0], len(self.pieces) - 1
        place = f"{first.path}, bytes {first.start} to {first.stop}"
        return place + (f" (and {more} more files)" if more else "")

    def documents(self) -> Iterator[Document | BadDocument]:
        for piece in self.pieces:
            yield from piece.documents()

    def content(self) -> bytes:
        """A hash of the bytes of the unit, and of how they are cut."""
        digest = hashlib.sha256(f"{self.split}".encode())
        for piece in self.pieces:
            digest.update(f" {piece.start} {piece.stop} {piece.reader} ".encode())
            digest.update(piece.read())
        return digest.digest()


def unit_size(total: int) -> int:
    """Bytes per unit for a corpus of ``total`` bytes: enough units to keep many cores busy, none needlessly small."""
    return min(LARGEST_UNIT, max(SMALLEST_UNIT, total // UNITS_WANTED))


def plan_units(sources: Iterable[Source], unit_bytes: int, split: str | None = None) -> list[Unit]:
    """Cut long files into pieces, and pack short ones together, into units of about ``unit_bytes``, in order."""
    pieces = (
        piece for source in sources for file in source.files for piece in file.reader.pieces(file.path, file.size, unit_bytes)
    )
    return pack(pieces, unit_bytes, split)


def pack(pieces: Iterable[Piece], unit_bytes: int, split: str | None = None) -> list[Unit]:
    units: list[Unit] = []
    waiting: list[Piece] = []
    size = 0
    for piece in pieces:
        length = piece.stop - piece.start
        if waiting and size + length > unit_bytes:
            units.append(Unit(tuple(waiting), split))
            waiting, size = [], 0
        waiting.append(piece)
        size += length
    return [*units, Unit(tuple(waiting), split)] if waiting else units
