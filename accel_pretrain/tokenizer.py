"""Text to token ids and back, through tiktoken's byte-pair encoder or plain bytes. Torch-free.

:func:`load_tokenizer` takes a name (``gpt2``, ``bytes``, any tiktoken encoding), a file of ``.tiktoken`` ranks, or a folder
that :meth:`Tokenizer.save` wrote (a dataset or a run holds one as ``tokenizer/``). A saved tokenizer is text: ranks as tiktoken
writes them, and JSON. The split pattern is saved with the ranks, because a ``.tiktoken`` file does not carry it and another
pattern gives other ids.

Text is text: a literal ``<|endoftext|>`` in a document is encoded as its characters, never as the special token.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from accel_pretrain.errors import DataError

SPEC_FILE = "spec.json"
RANKS_FILE = "ranks.tiktoken"
END_OF_TEXT = "<|endoftext|>"
# GPT-2's pre-tokenisation pattern (Radford et al. 2019), in tiktoken's possessive spelling: same splits, no backtracking.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Tokenizer(ABC):
    """Encodes and decodes; ids run from 0 to ``vocab_size - 1``, and ``eot_id`` ends every document.

    ``fingerprint`` is a SHA-256 over everything that decides the ids: two tokenizers with equal fingerprints are the same.
    """

    name: str
    vocab_size: int
    eot_id: int
    fingerprint: str

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of ``text`` (uint32), without an end-of-text token."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ``ids`` stand for; the end-of-text token stands for none."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the files from which :func:`load_tokenizer` builds an equal tokenizer."""

    def encode_document(self, text: str) -> np.ndarray:
        """The ids of ``text`` followed by the end-of-text id (uint32)."""
        return np.append(self.encode(text), np.uint32(self.eot_id))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte, and 256 for the end of a text."""

    def __init__(self) -> None:
        self.name = "bytes"
        self.vocab_size = 257
        self.eot_id = 256
        self.fingerprint = hashlib.sha256(b"accel_pretrain bytes 257").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(id for id in ids if id < 256)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SPEC_FILE).write_text(json.dumps({"kind": "bytes", "fingerprint": self.fingerprint}, indent=2) + "\n")


class BpeTokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken, from ranks, a split pattern, and special tokens of which one ends a text."""

    def __init__(self, name: str, ranks: Mapping[bytes, int], pattern: str, specials: Mapping[str, int] | None = None) -> None:
        import tiktoken

        self.name = name
        self._ranks, self._pattern = dict(ranks), pattern
        self._specials = dict(specials or {END_OF_TEXT: len(ranks)})
        if END_OF_TEXT not in self._specials:
            raise DataError(f"tokenizer {name} has no {END_OF_TEXT} token, which must end every document")
        self.eot_id = self._specials[END_OF_TEXT]
        self.vocab_size = 1 + max(max(self._ranks.values()), *self._specials.values())
        self.fingerprint = _fingerprint(self._ranks, pattern, self._specials)
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=self._ranks, special_tokens=self._specials)

    def encode(self, text: str) -> np.ndarray:
        try:
            return self._encode_piece(text)
        except UnicodeEncodeError:
            return self._encode_piece(_utf8(text).decode())
        except ValueError:  # tiktoken gives up on a run of about a million spaces before a letter
            return np.concatenate([self._encode_piece(piece) for piece in _cut_whitespace(text)])

    def _encode_piece(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint32, copy=False)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        tokens = (self._bytes_of.get(int(id), b"") for id in ids)
        return b"".join(tokens)

    @functools.cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        specials = {id: text.encode() for text, id in self._specials.items() if id != self.eot_id}
        return specials | {rank: token for token, rank in self._ranks.items()}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        ordered = sorted(self._ranks.items(), key=lambda item: item[1])
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ordered)
        (folder / RANKS_FILE).write_text("".join(lines))
        spec = {
            "kind": "bpe",
            "name": self.name,
            "pattern": self._pattern,
            "special_tokens": self._specials,
            "fingerprint": self.fingerprint,
        }
        (folder / SPEC_FILE).write_text(json.dumps(spec, indent=2) + "\n")


def _fingerprint(ranks: Mapping[bytes, int], pattern: str, specials: Mapping[str, int]) -> str:
    digest = hashlib.sha256(pattern.encode())
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(len(token).to_bytes(4, "little") + token + rank.to_bytes(4, "little"))
    digest.update(json.dumps(sorted(specials.items())).encode())
    return digest.hexdigest()


def _utf8(text: str) -> bytes:
    """UTF-8 of any string: two halves of a surrogate pair become their character, a lone half U+FFFD, as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _cut_whitespace(text: str, longest: int = 100_000) -> list[str]:
    """Cut inside very long runs of white space; the pieces' ids are close to, not always equal to, the whole text's ids."""
    pieces, start = [], 0
    for run in re.finditer(rf"\s{{{longest}}}", text):
        pieces.append(text[start : run.end()])
        start = run.end()
    return [*pieces, text[start:]]


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """A tokenizer from a name, a ``.tiktoken`` file, or a folder written by :meth:`Tokenizer.save` (or one that holds it)."""
    path = Path(spec)
    for folder in (path, path / "tokenizer"):
        if (folder / SPEC_FILE).is_file():
            return _load_saved(folder)
    if path.suffix == ".tiktoken" or path.exists():
        return _load_ranks(path)
    if spec == "bytes":
        return ByteTokenizer()
    return _load_by_name(str(spec))


def _load_saved(folder: Path) -> Tokenizer:
    try:
        spec = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
        if spec["kind"] == "bytes":
            tokenizer: Tokenizer = ByteTokenizer()
        else:
            tokenizer = BpeTokenizer(spec["name"], _read_ranks(folder / RANKS_FILE), spec["pattern"], spec["special_tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a saved tokenizer ({error})") from None
    if tokenizer.fingerprint != spec["fingerprint"]:
        raise DataError(f"{folder}: the ranks or the pattern were changed after they were saved; write the dataset again")
    return tokenizer


def _load_ranks(path: Path) -> Tokenizer:
    if not path.is_file():
        raise DataError(f"--tokenizer {path}: {path.absolute()} does not exist or is not a .tiktoken file")
    return BpeTokenizer(path.stem, _read_ranks(path), GPT2_PATTERN)


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        pairs = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise DataError(f"{path}: not a file of tiktoken ranks ({error})") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(f"{path}: ranks must be 0, 1, 2, ... and hold all 256 single bytes")
    return ranks


def _load_by_name(name: str) -> Tokenizer:
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        known = ", ".join(["bytes", *tiktoken.list_encoding_names()])
        raise DataError(f"--tokenizer {name}: not one of {known}, and no such file or folder")
    reason = ""
    names = ("r50k_base", "gpt2") if name == "gpt2" else (name,)  # the same ids; r50k_base is one small download
    for candidate in names:
        try:
            encoding = tiktoken.get_encoding(candidate)
        except Exception as error:  # tiktoken lets the errors of whichever HTTP client it has come through
            reason = f"{type(error).__name__}: {str(error)[:120]}"
            continue
        return BpeTokenizer(name, encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens)
    raise DataError(
        f"--tokenizer {name}: tiktoken has to download its ranks once and could not ({reason}). Connect, or point "
        f"TIKTOKEN_CACHE_DIR to a folder that has them, or give a .tiktoken file, or use --tokenizer bytes or train:8192"
    )
