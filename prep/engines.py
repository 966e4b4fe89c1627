"""What turns a document into ids: tiktoken, or what gives the same ids sooner.

``tiktoken`` is the reference. ``gigatoken`` encodes ten times as fast; it stands in for tiktoken where it is proven to give
the same ids. Proven means: the versions are among :data:`PROVEN`, or an exhaustive comparison of every code point is made now;
and each process compares the two on :data:`PROBE` before it starts. What remains are code points that the two know from
different versions of Unicode: a document that may hold one goes to tiktoken. So does a document with a very long run of white
space, at which tiktoken gives up and cuts. Which engine ran is therefore not part of a dataset's identity.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from accel_pretrain.errors import ConfigError
from accel_pretrain.split_patterns import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN
from accel_pretrain.tokenizer import RANKS_FILE, BpeTokenizer, ByteTokenizer, Tokenizer

# (gigatoken, tiktoken) whose exhaustive comparison found the differences in DIFFERING and no others.
PROVEN = frozenset({("0.10.0", "0.14.0")})
# The patterns that gigatoken has under a name.
SCHEMES = {GPT2_PATTERN: "gpt2", CL100K_PATTERN: "gpt4", O200K_PATTERN: "o200k"}
# Letters, digits and marks of Unicode 17, which tiktoken's tables do not know yet: first and last of each range.
DIFFERING = tuple(
    tuple(int(end, 16) for end in word.split("-"))
    for word in [
        "88f-88f",
        "c5c-c5c",
        "cdc-cdc",
        "1acf-1add",
        "1ae0-1aeb",
        "a7ce-a7cf",
        "a7d2-a7d2",
        "a7d4-a7d4",
        "a7f1-a7f1",
        "10940-10959",
        "10ec5-10ec7",
        "10efa-10efb",
        "11b60-11b67",
        "11db0-11ddb",
        "11de0-11de9",
        "16ea0-16eb8",
        "16ebb-16ed3",
        "16ff2-16ff6",
        "187f8-187ff",
        "18d09-18d1e",
        "18d80-18df2",
        "1e6c0-1e6de",
        "1e6e0-1e6f5",
        "1e6fe-1e6ff",
        "2b73a-2b73f",
        "2cea2-2cead",
        "323b0-33479",
    ]
)
_LOOKED_AFTER = 4_000_000  # bytes of text, behind which a process looks how much it has grown,
_KEPT = 64_000_000  # and bytes of growth, behind which it gives back the words that gigatoken has kept
_RENEWED_AFTER = 32_000_000  # bytes of text, behind which it does where it cannot know its size
_LONG_TEXT = 400_000  # bytes; no shorter text can hold a run of white space at which tiktoken gives up (a million characters)
_WHITE = rb"(?:[\s\x1c-\x1f]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
_IN_A_RUN = re.compile(rb"[\x80-\xbf]{0,2}" + _WHITE + b"{20}")
PROBE = (
    "Don't we'll THEY'RE it's 's'S 'll  x\t\ty \n\n  z\r\n\r\n 12345 3.14 0x1F _a__b -- ...!?\n   \n\u00a0\u00a0\u2003é É ß ﬁ "
    "naïve Привет мир Ελλάδα שלום עולם مرحبا ١٢٣ हिन्दी क्षि ไทย 中文字符。日本語のテキスト 한국어 ½ ² Ⅷ 𝒜𝓑 "
    "😀👩‍👩‍👧 e\u0301 \u200b "
    "<|endoftext|> \u2028\u2029 a\u0085b def f(x):\n\treturn x+1  # ok\n    \n" + "x" * 300 + " " * 300 + "1" * 50 + "\n" * 9
)


class Engine(Protocol):
    """Encodes documents, given as valid UTF-8, into ids without the end-of-text id."""

    name: str

    @property
    def tokenizer(self) -> Tokenizer: ...

    def encode(self, data: bytes) -> np.ndarray: ...


class TiktokenEngine:
    """The tokenizer's own way, which for byte-pair encodings is tiktoken into a raw buffer."""

    name = "tiktoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, data: bytes) -> np.ndarray:
        return self.tokenizer.encode(data.decode())


class ByteEngine:
    """A byte is its id."""

    name = "numpy"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, dtype=np.uint8)


class GigatokenEngine:
    """gigatoken, and tiktoken for the texts on which the two may differ; raises :class:`ConfigError` when it cannot be that."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        if reason := why_not_gigatoken(tokenizer):
            raise ConfigError(f"--engine gigatoken: {reason}")
        assert isinstance(tokenizer, BpeTokenizer)
        self.tokenizer = tokenizer
        self._reference = TiktokenEngine(tokenizer)
        self._ranks = (folder / RANKS_FILE).read_bytes()
        self._renew()
        for text in (PROBE, PROBE.upper(), PROBE[::-1]):
            if not np.array_equal(self._encode(text.encode()), tokenizer.encode(text)):
                raise ConfigError(
                    "--engine gigatoken: it gives other ids than tiktoken for this tokenizer; use --engine tiktoken"
                )

    def encode(self, data: bytes) -> np.ndarray:
        if may_differ(data):
            return self._reference.encode(data)
        self._unseen += len(data)
        if self._unseen > _LOOKED_AFTER and self._has_grown():
            self._renew()
        return self._encode(data)

    def _has_grown(self) -> bool:
        size = memory_in_use()
        if not size:
            return self._unseen > _RENEWED_AFTER
        self._unseen = 0
        return size - self._size > _KEPT

    def _renew(self) -> None:
        """Load it anew: it keeps every word that it has seen, and a corpus has no end of words."""
        import gigatoken

        assert isinstance(self.tokenizer, BpeTokenizer)
        self._encode: Any = None  # the old one goes before the new one comes
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / RANKS_FILE
            path.write_bytes(self._ranks)
            self._encode = gigatoken.Tokenizer.from_tiktoken(path, SCHEMES[self.tokenizer.pattern], {}).backend.encode
        self._unseen, self._size = 0, memory_in_use()


def memory_in_use() -> int:
    """Bytes of memory that this process has now (Linux); 0 elsewhere."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def may_differ(data: bytes) -> bool:
    """Whether ``data`` may hold something on which gigatoken and tiktoken differ: no false "no", and few false "yes"."""
    if not data.isascii() and (_SUPPLEMENTARY.search(data) or _finds_a_needle(data)):
        return True
    if len(data) <= _LONG_TEXT:
        return False
    return any(_IN_A_RUN.match(data, at) for at in range(0, len(data), _LONG_TEXT // 10))


def _finds_a_needle(data: bytes) -> bool:
    # First bytes alone are found at the speed of the memory, and most texts have none of these.
    return any(start[:1] in data and start in data for start in _NEEDLES)


def _starts(ranges: Iterable[tuple[int, ...]]) -> tuple[tuple[bytes, ...], re.Pattern[bytes]]:
    """Bytes with which the code points in ``ranges`` begin: of three bytes as they are, of four (from U+10000) as a pattern."""
    needles, longer = set[bytes](), set[bytes]()
    for first, last in ranges:
        starts = {chr(code).encode()[:3] for code in range(first, last + 1)}
        if first > 0xFFFF:
            longer |= starts
        else:
            needles |= starts if len(starts) <= 2 else {start[:2] for start in starts}
    # One literal byte first: the regular expression engine then looks for it as fast as the memory gives it.
    return tuple(sorted(needles)), re.compile(b"\xf0(?:" + b"|".join(re.escape(start[1:]) for start in sorted(longer)) + b")")


_NEEDLES, _SUPPLEMENTARY = _starts(DIFFERING)


# ------------------------------------------------------------------------------------------------------------- choosing


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing that native code prints is seen."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream, _ in kept:
            os.dup2(null, stream)
        yield
    finally:
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)
        os.close(null)


def choose_engine(wanted: str, tokenizer: Tokenizer, folder: Path) -> Engine:
    """The engine to use; proves gigatoken where nobody has yet; raises :class:`ConfigError` when it is wanted and cannot be.

    ``folder`` is where ``tokenizer`` is saved.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return ByteEngine(tokenizer)
    reason = "" if wanted == "tiktoken" else why_not_gigatoken(tokenizer)
    if wanted != "tiktoken" and not reason:
        try:
            with silence():
                engine = GigatokenEngine(tokenizer, folder)
            if _versions() in PROVEN or not (found := unexpected_differences()):
                return engine
            reason = f"gigatoken {_versions()[0]} and tiktoken {_versions()[1]} differ at U+{found[0]:04X}"
        except ConfigError as error:
            reason = error.message
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a vocabulary that it does not load; a panic of Rust's is not an Exception
            reason = f"gigatoken does not take this tokenizer ({' '.join(str(error).split())[:100]})"
    if wanted == "gigatoken":
        raise ConfigError(f"--engine gigatoken: {str(reason).removeprefix('--engine gigatoken: ')}")
    return TiktokenEngine(tokenizer)


def make_engine(name: str, tokenizer: Tokenizer, folder: Path) -> Engine:
    """The engine of that name, in another process than the one that chose it."""
    if isinstance(tokenizer, ByteTokenizer):
        return ByteEngine(tokenizer)
    return GigatokenEngine(tokenizer, folder) if name == GigatokenEngine.name else TiktokenEngine(tokenizer)


def why_not_gigatoken(tokenizer: Tokenizer) -> str | None:
    if _versions()[0] is None:
        return "gigatoken is not installed: pip install 'accel_pretrain[fast]'"
    if not isinstance(tokenizer, BpeTokenizer) or tokenizer.pattern not in SCHEMES:
        return f"gigatoken does not know the split pattern of tokenizer {tokenizer.name}; use --engine tiktoken"
    return None


def _versions() -> tuple[str | None, str | None]:
    return _version("gigatoken"), _version("tiktoken")


def _version(package: str) -> str | None:
    import importlib.metadata  # slow to import, and most workers need it not

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def unexpected_differences() -> list[int]:
    """The code points outside :data:`DIFFERING` that gigatoken and tiktoken class differently: five seconds of work.

    With a made-up vocabulary whose only merges join the last byte of a character and what follows, the ids show for every
    character whether it belongs to the letters, the digits or neither.
    """
    import gigatoken
    import tiktoken

    print("gigatoken: comparing this version with tiktoken, character by character", file=sys.stderr, flush=True)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes([byte]) + after for byte in range(0x80, 0xC0) for after in (b"a", b"A", b"1", b"!", b"\n")]
    found: set[int] = set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / RANKS_FILE
        path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
        for pattern, scheme in SCHEMES.items():
            ranks = {token: rank for rank, token in enumerate(tokens)}
            ours = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
            theirs = gigatoken.Tokenizer.from_tiktoken(path, scheme, {}).backend
            found.update(_compare(ours, theirs))
    return sorted(found)


def _compare(ours: Any, theirs: Any) -> Iterator[int]:
    known = {code for first, last in DIFFERING for code in range(first, last + 1)}
    codes = [code for code in range(0x80, 0x110000) if not 0xD800 <= code < 0xE000 and code not in known]
    halves = [codes[start : start + 4096] for start in range(0, len(codes), 4096)]
    while halves:
        part = halves.pop()
        text = "".join(f"{chr(code)}a {chr(code)}1 {chr(code)}! {chr(code)}A {chr(code)}\n aA{chr(code)} " for code in part)
        if np.array_equal(ours.encode_to_numpy(text, disallowed_special=()), theirs.encode(text)):
            continue
        if len(part) == 1:
            yield part[0]
        else:
            halves += [part[: len(part) // 2], part[len(part) // 2 :]]
