"""``--tokenizer train:N``: learn a byte-level BPE vocabulary from a sample of the train split, with rustbpe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from accel_pretrain.errors import ConfigError, DataError
from accel_pretrain.tokenizer import GPT2_PATTERN, BpeTokenizer
from prep.readers import Document
from prep.split import TRAIN, SplitRule
from prep.units import Unit

PREFIX = "train:"
SAMPLE_BYTES = 64_000_000
SMALLEST = 258  # 256 bytes, one merge, the end of a text
# rustbpe's regex engine panics on about a million white spaces before a letter; no vocabulary needs that many.
_LONG_RUN = re.compile(r"(\s{1000})\s+")


def wanted_size(spec: str) -> int | None:
    """N of ``train:N``, None for other tokenizers; raises :class:`ConfigError`."""
    if not spec.startswith(PREFIX):
        return None
    text = spec.removeprefix(PREFIX)
    if not text.isascii() or not text.isdigit() or int(text) < SMALLEST:
        raise ConfigError(f"--tokenizer {spec}: N in train:N is the number of ids, at least {SMALLEST}; for example train:8192")
    return int(text)


def learn_tokenizer(spec: str, units: Sequence[Unit], rule: SplitRule) -> BpeTokenizer:
    """A tokenizer with exactly N ids, the end-of-text id being the last; the same text always gives the same one."""
    size = wanted_size(spec)
    assert size is not None
    try:
        import rustbpe
    except ImportError:
        raise ConfigError(
            f"--tokenizer {spec}: learning a vocabulary needs rustbpe: pip install 'accel_pretrain[bpe]'; "
            "or use --tokenizer bytes, which needs nothing"
        ) from None
    trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train_from_iterator(_sample(units, rule), vocab_size=size - 1, pattern=GPT2_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < size - 1:
        reached = f"{PREFIX}{len(ranks) + 1}" if len(ranks) + 1 >= SMALLEST else "bytes"
        raise DataError(f"--tokenizer {spec}: the text is too short for so many ids; use --tokenizer {reached}, or more text")
    return BpeTokenizer(spec, ranks, GPT2_PATTERN)


def _sample(units: Sequence[Unit], rule: SplitRule) -> Iterator[str]:
    """Documents of the train split, up to :data:`SAMPLE_BYTES`, from all over the corpus."""
    total = sum(unit.size for unit in units)
    share = min(1.0, SAMPLE_BYTES / total)
    for unit in units:
        budget = share * unit.size
        for document in unit.documents():
            if budget <= 0:
                break
            if not isinstance(document, Document) or document.is_empty:
                continue
            placed = [(unit.split, document)] if unit.split else rule.place(document)
            for split, part in placed:
                if split == TRAIN:
                    yield _LONG_RUN.sub(r"\1", part.data[: int(budget) + 1].decode(errors="ignore"))
                budget -= len(part.data)
