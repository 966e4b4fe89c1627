"""Text to token ids and back, through tiktoken's byte-pair encoder, plain bytes, or a ``tokenizer.json``. Torch-free.

:func:`load_tokenizer` takes a name (``gpt2``, ``bytes``, any tiktoken encoding), a file of ``.tiktoken`` ranks, or a folder
that :meth:`Tokenizer.save` wrote (a dataset or a run holds one as ``tokenizer/``). A saved tokenizer is text: ranks as tiktoken
writes them, and JSON. The split pattern is saved with the ranks, because a ``.tiktoken`` file does not carry it and another
pattern gives other ids. ``tokenizer.json`` files of the Hugging Face world come in through :mod:`accel_pretrain.hf.tokenizers`.

Text is text: a literal ``<|endoftext|>`` in a document is encoded as its characters, never as the special token.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import struct
from abc import ABC, abstractmethod
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from accel_pretrain.errors import DataError
from accel_pretrain.split_patterns import GPT2_PATTERN as GPT2_PATTERN
from accel_pretrain.split_patterns import has_quick_spelling, quick_spelling
from accel_pretrain.token_text import byte_alphabet as byte_alphabet
from accel_pretrain.token_text import decode_token, decoder_steps, first_id, never_found

if TYPE_CHECKING:
    import tiktoken

SPEC_FILE = "spec.json"
RANKS_FILE = "ranks.tiktoken"
DEFINITION_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
EXTRA_FILES = ("chat_template.jinja", "special_tokens_map.json")  # kept beside these two for the way back
END_OF_TEXT = "<|endoftext|>"
LARGEST = 1 << 24  # no vocabulary has so many ids: an id beyond it is damage, and would ask for terabytes of embeddings


class Tokenizer(ABC):
    """Encodes and decodes; ids run from 0 to ``vocab_size - 1``, and ``eot_id`` ends every document.

    ``bos_id`` is the token that a model of this tokenizer expects before a text, if that is another convention than ours.
    ``fingerprint`` is a SHA-256 over everything that decides the ids: two tokenizers with equal fingerprints are the same.
    """

    name: str
    vocab_size: int
    eot_id: int
    bos_id: int | None = None
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

    def encode_prompt(self, text: str) -> list[int]:
        """What a model reads before it goes on with ``text``: never nothing, for an end of text begins a new document."""
        begin = [] if self.bos_id is None else [self.bos_id]
        return begin + self.encode(text).tolist() or [self.eot_id]

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
    """Byte-pair encoding by tiktoken, from ranks, a split pattern, and special tokens of which one, ``eot``, ends a text."""

    def __init__(
        self,
        name: str,
        ranks: Mapping[bytes, int],
        pattern: str,
        specials: Mapping[str, int] | None = None,
        eot: str = END_OF_TEXT,
    ) -> None:
        self.name = name
        self.ranks, self.pattern, self.eot = dict(sorted(ranks.items(), key=itemgetter(1))), pattern, eot
        self.specials = dict(specials or {eot: len(ranks)})
        if eot not in self.specials:
            raise DataError(f"tokenizer {name} has no {eot} token, which must end every document")
        self.eot_id = self.specials[eot]
        self.vocab_size = 1 + max(max(self.ranks.values()), *self.specials.values())
        self.fingerprint = _fingerprint(self.ranks, pattern, self.specials, eot)
        if not has_quick_spelling(pattern):
            _ = self.encoding  # a pattern from elsewhere, that tiktoken may not be able to read: ValueError

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """Built when it is first needed: who only compares or saves tokenizers does without."""
        import tiktoken

        return tiktoken.Encoding(
            self.name, pat_str=quick_spelling(self.pattern), mergeable_ranks=self.ranks, special_tokens=self.specials
        )

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
        specials = {id: text.encode() for text, id in self.specials.items() if id != self.eot_id}
        return specials | {rank: token for token, rank in self.ranks.items()}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [b"%b %d\n" % (b2a_base64(token, newline=False), rank) for token, rank in self.ranks.items()]
        (folder / RANKS_FILE).write_bytes(b"".join(lines))
        spec = {"kind": "bpe", "name": self.name, "pattern": self.pattern, "special_tokens": self.specials}
        if self.eot != END_OF_TEXT:
            spec["eot"] = self.eot
        spec["fingerprint"] = self.fingerprint
        (folder / SPEC_FILE).write_text(json.dumps(spec, indent=2) + "\n")


def _fingerprint(ranks: Mapping[bytes, int], pattern: str, specials: Mapping[str, int], eot: str) -> str:
    """``ranks`` in their order."""
    digest = hashlib.sha256(pattern.encode())
    number = struct.Struct("<I").pack
    digest.update(b"".join([number(len(token)) + token + number(rank) for token, rank in ranks.items()]))
    digest.update(json.dumps(sorted(specials.items())).encode())
    if eot != END_OF_TEXT:  # the fingerprints of datasets that were written before there was a choice stay what they are
        digest.update(eot.encode())
    return digest.hexdigest()


class HfTokenizer(Tokenizer):
    """Any other ``tokenizer.json`` of the Hugging Face world: SentencePiece's models with byte fallback, normalizers.

    ``definition`` is the content of that file, which is kept to the byte; ``settings`` is that of the ``tokenizer_config.json``
    beside it and ``extras`` that of EXTRA_FILES, for the way back. Nothing is added before or after a text. Where the tokenizer
    puts a space before every text, decoding shows it, because what is decoded is mostly the continuation of another text.
    ``vocab_size`` leaves out special tokens after all others: text never becomes one, and models may have no row for them.
    """

    def __init__(
        self,
        name: str,
        definition: bytes,
        eot_id: int,
        settings: bytes | None = None,
        extras: Mapping[str, bytes] | None = None,
    ) -> None:
        self.name, self.definition, self.eot_id, self.settings = name, definition, eot_id, settings
        self.extras = dict(extras or {})
        try:
            import tokenizers
        except ImportError:
            raise DataError(f"tokenizer {name}: a tokenizer.json needs tokenizers: pip install 'accel_pretrain[hf]'") from None
        try:
            plan = json.loads(definition)
            steps = decoder_steps(plan["decoder"])
            self.backend = tokenizers.Tokenizer.from_buffer(definition)
            self.backend.no_padding()
            self.backend.no_truncation()
            self.backend.encode_special_tokens = True
            self._bytes_of = {id: decode_token(token, steps) for token, id in self.backend.get_vocab().items()}
            added = {id: token.content for id, token in self.backend.get_added_tokens_decoder().items()}
            if added != {token["id"]: token["content"] for token in plan["added_tokens"]} or max(self._bytes_of) >= LARGEST:
                raise ValueError("its added tokens have impossible ids")
            dropout = plan["model"].get("dropout")
            self.bos_id = first_id(self.backend)
            kept = {eot_id, eot_id if self.bos_id is None else self.bos_id}
            if not kept - {eot_id} <= self._bytes_of.keys():
                raise ValueError("its post_processor adds a token that it does not have")
            never = never_found(self.backend)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's, from the library
                raise
            raise DataError(f"tokenizer {name}: cannot use its tokenizer.json ({' '.join(str(error).split())[:200]})") from None
        if dropout:
            raise DataError(f"tokenizer {name} drops merges at random; set model.dropout to null in its tokenizer.json")
        if eot_id not in self._bytes_of:
            raise DataError(f"tokenizer {name} has no token {eot_id}, which must end every document")
        self.vocab_size = 1 + max(self._bytes_of.keys() - (never - kept))
        self.eot = self.backend.id_to_token(eot_id) or ""
        self._bytes_of |= {id: text.encode() for id, text in added.items()} | {eot_id: b""}
        self.fingerprint = hashlib.sha256(f"accel_pretrain hf {eot_id}\n".encode() + definition).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        ids = self._encode_piece(text)
        if self.eot_id in ids:  # a Unigram model, for one, finds the token by its text: cut that in two
            left, right = self.eot[: len(self.eot) // 2], self.eot[len(self.eot) // 2 :]
            parts = text.split(self.eot)
            heads, tails = ["", *[right] * (len(parts) - 1)], [*[left] * (len(parts) - 1), ""]
            pieces = ("".join(piece) for piece in zip(heads, parts, tails, strict=True))
            ids = np.concatenate([self._encode_piece(piece) for piece in pieces])
        if self.eot_id in ids or ids.max(initial=0) >= self.vocab_size:
            raise DataError(f"tokenizer {self.name} takes a part of this text for the end of a text: {text[:80]!r}")
        return ids

    def _encode_piece(self, text: str) -> np.ndarray:
        return np.array(self.backend.encode(_utf8(text).decode(), add_special_tokens=False).ids, dtype=np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes_of.get(int(id), b"") for id in ids)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DEFINITION_FILE).write_bytes(self.definition)
        if self.settings is not None:
            (folder / SETTINGS_FILE).write_bytes(self.settings)
        for name, content in self.extras.items():
            (folder / name).write_bytes(content)
        spec = {"kind": "hf", "name": self.name, "eot_id": self.eot_id, "fingerprint": self.fingerprint}
        (folder / SPEC_FILE).write_text(json.dumps(spec, indent=2) + "\n")


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
    """A tokenizer from a name, a ``.tiktoken`` file, or a folder: of :meth:`Tokenizer.save`, a dataset, a checkpoint, a run."""
    path = Path(spec)
    newest = path / "latest"  # in a run directory: a file with the name of its newest checkpoint
    checkpoint = path / newest.read_text(encoding="utf-8").strip() if newest.is_file() else path
    for folder in (path, path / "tokenizer", checkpoint / "tokenizer"):
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
        elif spec["kind"] == "hf":
            settings = (folder / SETTINGS_FILE).read_bytes() if (folder / SETTINGS_FILE).exists() else None
            extras = {name: (folder / name).read_bytes() for name in EXTRA_FILES if (folder / name).exists()}
            definition = (folder / DEFINITION_FILE).read_bytes()
            tokenizer = HfTokenizer(spec["name"], definition, int(spec["eot_id"]), settings, extras)
        else:
            ranks, eot = _read_ranks(folder / RANKS_FILE, gaps=True), spec.get("eot", END_OF_TEXT)
            tokenizer = BpeTokenizer(spec["name"], ranks, spec["pattern"], spec["special_tokens"], eot)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a saved tokenizer ({error})") from None
    if tokenizer.fingerprint != spec["fingerprint"]:
        raise DataError(f"{folder}: its files were changed after they were saved; write the dataset again")
    return tokenizer


def _load_ranks(path: Path) -> Tokenizer:
    if (path / DEFINITION_FILE).exists():
        raise DataError(f"--tokenizer {path}: a Hugging Face folder comes in by: python -m accel_pretrain.hf import --help")
    if not path.is_file():
        raise DataError(f"--tokenizer {path}: {path.absolute()} does not exist or is not a .tiktoken file")
    return BpeTokenizer(path.stem, _read_ranks(path), GPT2_PATTERN)


def _read_ranks(path: Path, *, gaps: bool = False) -> dict[bytes, int]:
    """The ranks in a file; ``gaps`` lets ids be left out, as in p50k_base, where a special token has one of them."""
    try:
        pairs = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {a2b_base64(token, strict_mode=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise DataError(f"{path}: not a file of tiktoken ranks ({error})") from None
    ids = set(ranks.values())
    contiguous = gaps or ids == set(range(len(ranks)))
    if len(ids) < len(ranks) or not contiguous or any(bytes([byte]) not in ranks for byte in range(256)):
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
