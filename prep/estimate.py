"""What a run will need, before it is begun: ``--plan``, and the check of the disk."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from accel_pretrain.errors import DataError
from accel_pretrain.shards import DTYPES, dtype_for
from accel_pretrain.tokenizer import ByteTokenizer, Tokenizer
from prep.clean import Cleaned
from prep.config import PrepConfig
from prep.documents import Document, Piece, Tally
from prep.engines import Engine, choose_engine
from prep.packed_files import Packed
from prep.report import Corpus
from prep.runners import default_workers

# Bytes of text per token, on the low side, so that the disk is not found to be full after an hour.
_BYTES_PER_TOKEN = 2.2
_PROBE_SECONDS = 1.0
_PROBE_BYTES = 1_000_000  # of one document


def check_disk(folder: Path, input_bytes: int, tokenizer: Tokenizer) -> None:
    """Raises :class:`DataError` when ``folder`` has too little room for the ids of so many bytes of text."""
    needed, free = _bytes_needed(input_bytes, tokenizer), shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder.parent}: {free / 1e9:.2f} GB are free, and about {needed / 1e9:.2f} GB are needed; make room, "
            "choose another -o, or add --check_disk false"
        )


def _bytes_needed(input_bytes: int, tokenizer: Tokenizer, bytes_per_token: float = _BYTES_PER_TOKEN) -> int:
    per_token = 1.0 if isinstance(tokenizer, ByteTokenizer) else bytes_per_token
    return int(1.05 * input_bytes / per_token * DTYPES[dtype_for(tokenizer.vocab_size - 1)].itemsize)


def print_plan(config: PrepConfig, corpus: Corpus, tokenizer: Tokenizer | None) -> None:
    """What there is to do; ``tokenizer`` is None when it is still to be learned."""
    files = sum(len(source.files) for source in [*corpus.sources, *corpus.val_sources])
    print(f"{config.out or 'plan'}: {files:,} files, {corpus.size / 1e6:,.1f} MB of text, {len(corpus.units):,} units")
    print(f"  split      {'given files' if config.val_file else corpus.rule.describe()}")
    if tokenizer is None:
        tokenizer = ByteTokenizer()
        print(f"  tokenizer  {config.tokenizer}, to be learned; what follows is for bytes, of which it will need fewer")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        engine = choose_engine(config.engine, tokenizer, Path(folder))
    found = _probe(corpus, engine)
    size = int(corpus.size * found.text_share)
    workers = config.workers or default_workers(engine.name, corpus.size)
    needed, free = (
        _bytes_needed(size, tokenizer, found.bytes_per_token),
        shutil.disk_usage(_existing(config.out or Path())).free,
    )
    print(f"  tokens     about {size / found.bytes_per_token / 1e6:,.3f} million, at {found.bytes_per_token:.2f} bytes each")
    print(f"  disk       about {needed / 1e6:,.1f} MB needed, {free / 1e9:,.1f} GB free")
    print(f"  time       about {size / found.rate / workers:,.0f} s: {workers} x {found.rate / 1e6:.0f} MB/s by {engine.name}")


class _Probe(NamedTuple):
    """``text_share`` of the bytes of the input are text; ``rate`` is bytes of text per second of one core."""

    text_share: float
    bytes_per_token: float
    rate: float


def _probe(corpus: Corpus, engine: Engine) -> _Probe:
    """Read and encode what a second allows of a unit at the beginning, in the middle and at the end."""
    units = [corpus.units[number] for number in sorted({0, len(corpus.units) // 2, len(corpus.units) - 1})]
    begin = time.process_time()
    size, done, tokens, covered = 0, 0, 0, 0.0
    for number, unit in enumerate(units, 1):
        end = begin + _PROBE_SECONDS * number / len(units)
        for piece in unit.pieces:
            read, text, whole = _Read(), 0, True
            for document in piece.documents(Tally(content=read)):
                if isinstance(document, Document):
                    part = document.data if len(document.data) <= _PROBE_BYTES else document.text[:_PROBE_BYTES].encode()
                    tokens += engine.encode(part).size + document.ends
                    done += len(part)
                    text += len(document.data)
                if whole := time.process_time() < end:
                    continue
                break
            size += text
            covered += piece.size if whole else _covered(piece, read, text)
            if not whole:
                break
    if not done:
        raise DataError("the probe found no text to encode; run it without --plan to see why")
    return _Probe(size / covered, done / tokens, done / (time.process_time() - begin + 1e-12))


class _Read:
    """Stands in for a hash, and counts the bytes that it is given."""

    def __init__(self) -> None:
        self.bytes = self.last = 0

    def update(self, data: bytes) -> None:
        self.last = len(data)
        self.bytes += self.last


def _covered(piece: Piece, read: _Read, text: int) -> float:
    """How much of ``piece.size`` was read before time was up: for a packed file, as much as of its bytes."""
    reader = piece.reader.inner if isinstance(piece.reader, Cleaned) else piece.reader
    if isinstance(reader, Packed):
        return piece.size * min(1.0, (read.bytes - read.last / 2) / (piece.stop - piece.start))  # it reads ahead
    return float(min(max(1, text), piece.size))


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
