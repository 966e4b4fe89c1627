"""``--tokenizer train:N``: learn a byte-level BPE vocabulary from a sample of the train split, with gigatoken or rustbpe.

Both learn the same vocabulary in the same order. Left out of the sample are the few documents that hold characters which they
know from different versions of Unicode. It is learned in a process of its own, which can be ended at any time.
"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from accel_pretrain.errors import ConfigError, DataError, PretrainError
from accel_pretrain.tokenizer import GPT2_PATTERN, BpeTokenizer
from prep.documents import Document
from prep.engines import may_differ, silence
from prep.split import TRAIN, SplitRule
from prep.units import Unit
from prep.workers import spawned

_Trainer = Callable[[Iterable[str], int], dict[bytes, int]]
PREFIX = "train:"
SAMPLE_BYTES = 64_000_000
SMALLEST = 258  # 256 bytes, one merge, the end of a text
# rustbpe's regex engine panics on about a million white spaces before a letter; no vocabulary needs that many.
_LONG_RUN = re.compile(r"(\s{1000})\s+")
# Both take hours for a word of a million letters: pairs of it are counted again after each merge. No word of a vocabulary comes
# near this length, so that the parts teach what the whole does.
_LONGEST_WORD = 1000
_IN_A_LONG_WORD = re.compile(r"[^\W_]{500}|(?:[^\w\s]|_){500}")
_LONG_WORD = re.compile(r"(?<![^\W_])[^\W_]{1001,}|(?<![^\w\s])(?<!_)(?:[^\w\s]|_){1001,}")


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
    ranks = _ranks_from_child(spec, units, rule, size - 1)
    if len(ranks) < size - 1:
        reached = f"{PREFIX}{len(ranks) + 1}" if len(ranks) + 1 >= SMALLEST else "bytes"
        raise DataError(f"--tokenizer {spec}: the text is too short for so many ids; use --tokenizer {reached}, or more text")
    return BpeTokenizer(spec, ranks, GPT2_PATTERN)


def _ranks_from_child(spec: str, units: Sequence[Unit], rule: SplitRule, size: int) -> dict[bytes, int]:
    """What a new process learns; it is gone when this returns or raises, be it on Ctrl-C."""
    outcome: Any = None
    for again in (True, False):  # whoever ended the first may not have meant it
        process, channel = spawned(_learn, _trainer(spec), tuple(units), rule, size)
        try:
            outcome = channel.recv()
        except (EOFError, ConnectionResetError):
            process.join()
            outcome = f"its process ended with code {process.exitcode}, as it does when memory runs out"
            if again:
                continue
        finally:
            process.kill()
            process.join()
            channel.close()
        break
    if isinstance(outcome, PretrainError):
        raise outcome
    if isinstance(outcome, str):
        raise DataError(f"--tokenizer {spec}: cannot be learned from this text ({outcome}); use --tokenizer gpt2 or bytes")
    return outcome


def _learn(train: _Trainer, units: Sequence[Unit], rule: SplitRule, size: int, channel: Connection[Any, Any]) -> None:
    """What the process does: it sends the ranks, or what went wrong."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        outcome: object = train(_sample(units, rule), size)
    except PretrainError as error:
        outcome = error
    except BaseException as error:  # a panic in a Rust extension is not an Exception, and cannot be pickled
        outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    with contextlib.suppress(BrokenPipeError):
        channel.send(outcome)


def _trainer(spec: str) -> _Trainer:
    for train in (_with_gigatoken, _with_rustbpe):
        with contextlib.suppress(ImportError):
            __import__(train.__name__.removeprefix("_with_"))
            return train
    raise ConfigError(
        f"--tokenizer {spec}: learning a vocabulary needs gigatoken or rustbpe: pip install 'accel_pretrain[bpe]'; "
        "or use --tokenizer bytes, which needs nothing"
    )


def _with_rustbpe(texts: Iterable[str], size: int) -> dict[bytes, int]:
    import rustbpe

    trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train_from_iterator(iter(texts), vocab_size=size, pattern=GPT2_PATTERN)
    return {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}


def _with_gigatoken(texts: Iterable[str], size: int) -> dict[bytes, int]:
    import gigatoken

    # A text never holds NUL, so NUL can part them. Equally frequent pairs are merged in the order of rustbpe.
    data = b"\0".join(text.encode() for text in texts)
    if not data:
        return {bytes([byte]): byte for byte in range(256)}
    with silence():
        vocabulary, _ = gigatoken.train_bpe(data, size, [], tie_breaking="raw_token_ids", separator=b"\0")
    tokens = [vocabulary[rank] for rank in range(len(vocabulary))]
    # When every word is one token, it goes on with pairs that do not occur, some of them for the second time. What comes before
    # a token that does occur is no such pair.
    first = {token: rank for rank, token in reversed(list(enumerate(tokens)))}
    known, count = 256, next((rank for rank, token in enumerate(tokens) if first[token] < rank), len(tokens))
    unknown = count + 1
    while known < count:
        known, unknown = (count, unknown) if _occurs(tokens[:count], data) else (known, count)
        count = (known + unknown) // 2
    return {token: rank for rank, token in enumerate(tokens[:known])}


def _occurs(tokens: list[bytes], data: bytes) -> bool:
    """Whether the last of ``tokens`` is among those of a text in ``data``."""
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("part", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return any(
        (encoding.encode_to_numpy(text.decode(), disallowed_special=()) == len(tokens) - 1).any()
        for text in data.split(b"\0")
        if tokens[-1] in text
    )


def _sample(units: Sequence[Unit], rule: SplitRule) -> Iterator[str]:
    """Documents of the train split, up to :data:`SAMPLE_BYTES`, from all over the corpus."""
    total = max(1, sum(unit.size for unit in units))
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
                if split == TRAIN and not may_differ(part.data):
                    yield from _digestible(part.data[: int(budget) + 1].decode(errors="ignore"))
                budget -= len(part.data)


def _digestible(text: str) -> list[str]:
    """``text`` without very long white space, and cut into several where a word is very long."""
    text = _LONG_RUN.sub(r"\1", text)
    # One in five hundred characters is looked at: a long word has one behind which there are five hundred of it.
    if not any(_IN_A_LONG_WORD.match(text, at) for at in range(0, len(text), _LONGEST_WORD // 2)):
        return [text]
    return _LONG_WORD.sub(_in_parts, text).split("\0")  # NUL is in no text


def _in_parts(match: re.Match[str]) -> str:
    return "\0".join(match[0][start : start + _LONGEST_WORD] for start in range(0, len(match[0]), _LONGEST_WORD))
