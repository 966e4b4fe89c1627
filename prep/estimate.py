"""What a run will need, before it is begun: ``--plan``, and the check of the disk."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from accel_pretrain.errors import DataError
from accel_pretrain.shards import DTYPES, dtype_for
from accel_pretrain.tokenizer import ByteTokenizer, Tokenizer
from prep.config import PrepConfig
from prep.documents import Document
from prep.engines import Engine, choose_engine
from prep.report import Corpus
from prep.runners import default_workers

# Bytes of text per token, on the low side, so that the disk is not found to be full after an hour.
_BYTES_PER_TOKEN = 2.2
_PROBE_SECONDS = 1.0


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
    print(f"{config.out}: {files:,} files, {corpus.size / 1e6:,.1f} MB of text, {len(corpus.units):,} units")
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
    """Read a unit at the beginning, in the middle and at the end, and encode what a second allows of them."""
    units = [corpus.units[number] for number in sorted({0, len(corpus.units) // 2, len(corpus.units) - 1})]
    begin = time.process_time()
    texts = [document for unit in units for document in unit.documents() if isinstance(document, Document)]
    reading = time.process_time() - begin
    size, done, tokens = sum(len(document.data) for document in texts), 0, 0
    begin = time.process_time()
    for document in random.Random(0).sample(texts, len(texts)):
        tokens += engine.encode(document.data).size + document.ends
        done += len(document.data)
        if time.process_time() - begin > _PROBE_SECONDS:
            break
    if not done:
        raise DataError("the probe found no text to encode; run it without --plan to see why")
    encoding = time.process_time() - begin
    return _Probe(size / sum(unit.size for unit in units), done / tokens, 1 / (encoding / done + reading / size + 1e-12))


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
