"""Text in .gz, .bz2, .xz and .zst files, unpacked while it is read: never more than a few megabytes of it are in memory.

A file that ends too early, is damaged, or expands beyond all proportion becomes a bad document, behind the whole documents that
were unpacked until then.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Protocol

from accel_pretrain.errors import ConfigError
from prep.documents import CHUNK, OR_SKIP, BadDocument, Document, Piece, Tally, read_some
from prep.readers import TextReader

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
MAX_EXPANSION = 200.0
# Before this much has come out, no ratio is suspicious: a small file of zeros hurts nobody.
FREE_EXPANSION = 64_000_000
_TYPICAL_EXPANSION = 4
_DAMAGED = (zlib.error, OSError, lzma.LZMAError, ValueError, EOFError)


class Damaged(Exception):
    """Packed bytes that cannot be unpacked further; the message says why."""


class _Unpacker(Protocol):
    """One stream of the standard library's shape: ``eof`` when it has ended, and what then was left in ``unused_data``."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    """zlib's object in the shape of those of bz2 and lzma, which keep the input that they have not yet used."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._stream.decompress(self._stream.unconsumed_tail + data, max_length)


class _Zstandard:
    """zstandard's object, fed so little at a time that what comes out is bounded: one block of 128 kB may be four bytes."""

    _FED = 1024

    def __init__(self) -> None:
        zstandard = _zstandard()
        self._error: type[Exception] = zstandard.ZstdError
        self._stream: Any = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._waiting, self.unused_data = b"", b""

    @property
    def eof(self) -> bool:
        return self._stream.eof

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        waiting, at, out, size = self._waiting + data, 0, list[bytes](), 0
        try:
            while at < len(waiting) and not self.eof and size < max_length:
                out.append(self._stream.decompress(waiting[at : at + self._FED]))
                at += self._FED
                size += len(out[-1])
        except self._error as error:
            raise ValueError(str(error)) from None
        self._waiting = waiting[at:]
        if self.eof:
            self.unused_data = self._stream.unused_data + self._waiting
        return b"".join(out)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise ConfigError("reading .zst files needs zstandard: pip install 'accel_pretrain[data]'") from None
    return zstandard


_UNPACKERS: dict[str, type[Any]] = {
    ".gz": _Gzip, ".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor, ".zst": _Zstandard,
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A packed text file, read by ``inner``; one piece, since it can only be unpacked from its start."""

    inner: TextReader
    suffix: str
    max_expansion: float = MAX_EXPANSION

    def __post_init__(self) -> None:
        if self.suffix == ".zst":
            _zstandard()  # or say so before anything is begun

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]:
        yield Piece(path, 0, size, self, weight=_TYPICAL_EXPANSION * size)

    def documents(self, piece: Piece, tally: Tally | None = None) -> Iterator[Document | BadDocument]:
        done = 0

        def counted() -> Iterator[bytes]:
            nonlocal done
            for chunk in unpacked(packed, self.suffix):
                done += len(chunk)
                if done > max(FREE_EXPANSION, self.max_expansion * piece.stop):
                    raise Damaged(
                        f"expands to more than {self.max_expansion:g} times its size: raise --max_expansion if it is sane"
                    )
                yield chunk

        packed = piece.chunks(tally)
        try:
            yield from self.inner.parse(counted(), piece.path, 0, self.suffix)
        except Damaged as error:
            place = f"after {done:,} unpacked bytes"
            yield BadDocument(piece.path, done, f"{error}{OR_SKIP}", place)
            for _ in packed:  # for the tally
                pass

    def identify(self, piece: Piece, tally: Tally) -> None:
        for _ in piece.chunks(tally):
            pass


def unpacked_file(file: IO[bytes], suffix: str) -> Iterator[bytes]:
    """The unpacked bytes of an open file, as far as they go."""
    try:
        yield from unpacked(iter(lambda: read_some(file, CHUNK), b""), suffix)
    except Damaged:
        return


def unpacked(packed: Iterable[bytes], suffix: str) -> Iterator[bytes]:
    """What ``packed`` unpacks to, a megabyte or so at a time; one stream may follow another. Raises :class:`Damaged`."""
    make, stream, begun = _UNPACKERS[suffix], None, False
    try:
        for data in packed:
            while True:
                if stream is None:
                    data = data.lstrip(b"\0")  # padding between streams
                    if not data:
                        break
                    stream, begun = make(), True
                if out := stream.decompress(data, CHUNK):
                    yield out
                data = b""
                if stream.eof:
                    data, stream = stream.unused_data, None
                elif len(out) < CHUNK:  # all that was there is used
                    break
    except _DAMAGED as error:
        raise Damaged(f"damaged {suffix} file ({error})") from None
    if stream is not None or not begun:
        raise Damaged(f"truncated {suffix} file: it ends in the middle")
