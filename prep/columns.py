"""Text in a column of a table: Parquet files, the Arrow files of Hugging Face ``datasets``, .csv and .tsv.

Of Parquet and Arrow only the one column is read, a range of rows at a time, by pyarrow alone: workers need no ``datasets``.
Whether a Parquet file is the same still is known by the bytes of that column; of an Arrow file, which is mapped and not read,
by its size and time of change. Arrow believes what such a file says of itself, to the point of reading memory that is not
there, so that all of it is checked before it is used.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from accel_pretrain.errors import ConfigError, DataError
from prep.documents import CHUNK, OR_SKIP, BadDocument, Document, Piece, Tally, digest_of, opened, read_some, stamp_of
from prep.readers import LARGEST_DOCUMENT, _Text, decoded

_ROWS = 256  # of one Parquet batch
# Columns by which a table points at texts that are somewhere else (python-edu of smollm-corpus, The Stack v2).
_POINTERS = ("blob_id", "content_id", "swhid")


def pyarrow_for(what: str) -> Any:
    """The pyarrow package, or one line that says how to get it."""
    try:
        import pyarrow as pa
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{what}: reading it needs pyarrow: pip install 'accel_pretrain[data]'") from None
    return pa


def refuse_column(path: str, column: str, kinds: dict[str, str]) -> str | None:
    """Why a table with these columns (name: type) cannot be read by ``column``; None if it can."""
    shown = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"
    if column not in kinds:
        if pointers := [name for name in _POINTERS if name in kinds]:
            return (
                f"{path}: no column {column!r}, and no other text: column {pointers[0]!r} names contents that are kept "
                f"elsewhere (Software Heritage), which must be fetched first; the columns are {shown}"
            )
        return f"{path}: no column {column!r}; choose with --text_column NAME, one of: {shown}"
    kind = kinds[column].removeprefix("dictionary<values=").partition(",")[0]
    if not kind.startswith(("string", "large_string", "binary", "large_binary", "string_view", "binary_view")):
        return f"{path}: column {column!r} holds {kinds[column]}, not text; choose with --text_column NAME, one of: {shown}"
    return None


@dataclass(frozen=True)
class BrokenFile:
    """Stands for a file that cannot be opened as what it should be: one bad document, so that ``--on_error`` decides."""

    reason: str

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]:
        yield Piece(path, 0, 1, self)

    def documents(self, piece: Piece, tally: Tally | None = None) -> Iterator[Document | BadDocument]:
        self.identify(piece, tally or Tally())
        yield BadDocument(piece.path, 0, self.reason + OR_SKIP, "")

    def identify(self, piece: Piece, tally: Tally) -> None:
        tally.content.update(f" {self}".encode())


@dataclass(frozen=True)
class _Table:
    """What the readers of binary tables share: documents from batches of a column."""

    column: str
    largest: int = LARGEST_DOCUMENT

    def identify(self, piece: Piece, tally: Tally) -> None:
        tally.content.update(f" {stamp_of(piece.path)} {piece.start} {piece.stop} {piece.reader}".encode())

    def _documents(self, batches: Iterable[Any], path: str, row: int) -> Iterator[Document | BadDocument]:
        """``batches`` are Arrow arrays; ``row`` is the number of their first row in the file, counted from 1."""
        for batch in batches:
            values = _as_bytes(batch)
            if isinstance(values, str) and len(batch) > 1:  # which of its rows is it?
                yield from self._documents((batch.slice(index, 1) for index in range(len(batch))), path, row)
            elif isinstance(values, str):
                yield BadDocument(path, 0, f"damaged file ({values}){OR_SKIP}", f"row {row}")
            else:
                for index, data in enumerate(values):
                    yield self._document(data, path, row + index)
            row += len(batch)

    def _document(self, data: bytes | None, path: str, row: int) -> Document | BadDocument:
        place = f"row {row}"
        if data is None:
            return BadDocument(path, 0, f"column {self.column!r} holds null, not text{OR_SKIP}", place)
        if len(data) > self.largest:
            reason = f"a document of more than {self.largest:,} bytes; raise --max_document{OR_SKIP}"
            return BadDocument(path, 0, reason, place)
        clean = decoded(data, path, 0, place=place)
        return clean if isinstance(clean, BadDocument) else Document(clean, digest_of(clean), place=place)


@dataclass(frozen=True)
class ParquetRows(_Table):
    """A Parquet file; ``start`` and ``stop`` count row groups."""

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]:
        groups = _parquet(path).metadata
        for group in range(groups.num_row_groups):
            weight = max(1, self._weight(groups.row_group(group)))
            yield Piece(path, group, group + 1, self, weight=weight)

    def identify(self, piece: Piece, tally: Tally) -> None:
        tally.content.update(f" {piece.start} {piece.stop} {piece.reader}".encode())
        with opened(piece.path) as file:
            for start, size in self._column_bytes(piece):
                tally.content.update(f" {size} ".encode())
                file.seek(start)
                while size > 0 and (data := read_some(file, min(size, CHUNK))):
                    tally.content.update(data)
                    size -= len(data)

    def documents(self, piece: Piece, tally: Tally | None = None) -> Iterator[Document | BadDocument]:
        self.identify(piece, tally or Tally())
        file = _parquet(piece.path)
        row = 1 + sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        done = 0
        try:
            groups = list(range(piece.start, piece.stop))
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=[self.column]):
                yield from self._documents([batch.column(0)], piece.path, row + done)
                done += batch.num_rows
        except OSError as error:  # ArrowInvalid is a ValueError; a page that cannot be unpacked is an OSError
            yield self._damaged(piece, row + done, error)
        except ValueError as error:
            yield self._damaged(piece, row + done, error)

    def _damaged(self, piece: Piece, row: int, error: Exception) -> BadDocument:
        return BadDocument(piece.path, 0, f"damaged Parquet file ({_one_line(error)}){OR_SKIP}", f"row {row}")

    def _weight(self, group: Any) -> int:
        return sum(chunk.total_uncompressed_size for chunk in self._chunks(group))

    def _column_bytes(self, piece: Piece) -> Iterator[tuple[int, int]]:
        """Where in the file the bytes of the column begin, and how many there are, for each row group."""
        about = _parquet(piece.path).metadata
        for number in range(piece.start, piece.stop):
            for chunk in self._chunks(about.row_group(number)):
                begins = [chunk.data_page_offset, *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])]
                yield max(0, min(begins)), chunk.total_compressed_size

    def _chunks(self, group: Any) -> Iterator[Any]:
        columns = (group.column(index) for index in range(group.num_columns))
        return (column for column in columns if column.path_in_schema == self.column)


@dataclass(frozen=True)
class ArrowRows(_Table):
    """An Arrow file as ``datasets`` writes it; ``start`` and ``stop`` count rows."""

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]:
        column = _arrow(path).column(self.column)
        total = max(1, min(column.nbytes, size))  # a damaged file can say anything
        rows = max(1, column.length() * unit_bytes // total)
        for start in range(0, column.length(), rows):
            stop = min(start + rows, column.length())
            yield Piece(path, start, stop, self, weight=max(1, total * (stop - start) // column.length()))

    def documents(self, piece: Piece, tally: Tally | None = None) -> Iterator[Document | BadDocument]:
        self.identify(piece, tally or Tally())
        column = _arrow(piece.path).column(self.column).slice(piece.start, piece.stop - piece.start)
        parts = (chunk.slice(at, _ROWS) for chunk in column.chunks for at in range(0, len(chunk), _ROWS))
        yield from self._documents(parts, piece.path, piece.start + 1)


@dataclass(frozen=True)
class SeparatedValues(_Text):
    """A .csv or .tsv file whose first line names its columns. A quoted text may hold line ends, so it is read as one piece."""

    column: str
    delimiter: str = ","
    largest: int = LARGEST_DOCUMENT

    def pieces(self, path: str, size: int, unit_bytes: int) -> Iterator[Piece]:
        yield Piece(path, 0, size, self)

    def parse(self, chunks: Iterable[bytes], path: str, offset: int, packing: str | None) -> Iterator[Document | BadDocument]:
        csv.field_size_limit(self.largest)
        rows = csv.reader(_lines(chunks), delimiter=self.delimiter, strict=True)
        position, after = None, 0
        try:
            for row in rows:
                place, after = str(after + 1), rows.line_num  # where the row begins
                if position is None:
                    position = self._position(row, path)
                elif row:
                    yield self._document(row, position, path, place)
        except csv.Error as error:
            yield BadDocument(
                path, 0, f"not valid {self._kind()} ({error}), so the rest cannot be read{OR_SKIP}", str(after + 1)
            )

    def _position(self, header: list[str], path: str) -> int:
        names = [name.removeprefix("\ufeff") for name in header]
        if problem := refuse_column(path, self.column, dict.fromkeys(names, "string")):
            raise DataError(problem)
        return names.index(self.column)

    def _document(self, row: list[str], position: int, path: str, place: str) -> Document | BadDocument:
        if position >= len(row):
            return BadDocument(path, 0, f"{len(row)} values, none for column {self.column!r}{OR_SKIP}", place)
        data = row[position].encode(errors="surrogateescape")
        clean = decoded(data, path, 0, place=place)
        return clean if isinstance(clean, BadDocument) else Document(clean, digest_of(clean), place=place)

    def _kind(self) -> str:
        return "TSV" if self.delimiter == "\t" else "CSV"


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines with their ends; a byte that is not UTF-8 comes through, for :func:`decoded` to complain about."""
    tail = b""
    for chunk in chunks:
        *lines, tail = (tail + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="surrogateescape") + "\n"
    if tail:
        yield tail.decode(errors="surrogateescape")


def _as_bytes(array: Any) -> list[bytes | None] | str:
    """The values of an array of text, or what is wrong with it."""
    pa = pyarrow_for("a table")
    plain = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
    try:
        # Of text in its plain form only the offsets are cast; that it is UTF-8 is for `decoded` to check, which says where not.
        array.validate(full=array.type not in plain)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        array = array.cast(pa.large_binary())
        array.validate(full=True)
    except ValueError as error:  # pyarrow's ArrowInvalid
        return _one_line(error)
    return array.to_pylist()


def parquet_problem(path: str, column: str) -> str | BrokenFile | None:
    """Why a Parquet file cannot be read: a sentence about its columns, or :class:`BrokenFile`; None when it can."""
    pyarrow_for(path)
    try:
        schema = _parquet(path).schema_arrow
    except (OSError, ValueError) as error:
        return BrokenFile(f"not a whole Parquet file ({_one_line(error)})")
    return refuse_column(path, column, {name: str(schema.field(name).type) for name in schema.names})


def arrow_problem(path: str, column: str) -> str | BrokenFile | None:
    """The same of an Arrow file."""
    pyarrow_for(path)
    try:
        schema = _arrow(path).schema
    except (OSError, ValueError) as error:
        return BrokenFile(f"not a whole Arrow file ({_one_line(error)})")
    return refuse_column(path, column, {name: str(schema.field(name).type) for name in schema.names})


@functools.lru_cache(maxsize=1)
def _parquet(path: str) -> Any:
    # No read-ahead of whole row groups and no second thread: a worker holds a page, not a gigabyte. A page that has a checksum
    # is held against it: snappy unpacks many a damaged one to another text.
    reader = pyarrow_for(path).parquet.ParquetFile
    return reader(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)


@functools.lru_cache(maxsize=1)
def _arrow(path: str) -> Any:
    """The table in an Arrow file of either kind, memory-mapped; its buffers are as long as its lengths say."""
    pa = pyarrow_for(path)
    mapped = pa.memory_map(path)
    if mapped.read(6) == b"ARROW1":
        table = pa.ipc.open_file(mapped).read_all()
    else:
        mapped.seek(0)
        table = pa.ipc.open_stream(mapped).read_all()
    table.validate()
    return table


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
