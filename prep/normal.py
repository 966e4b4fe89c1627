"""The key by which ``--dedup exact`` knows equal texts: the same words in the same order, however they are spaced.

Compared are the words between ASCII white space, in Unicode form NFC. Everything else (letter case, punctuation) counts.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

KEY_BYTES = 16
_WHITE = b" \n\t\r\v\f"


def key_of(data: bytes) -> bytes:
    """The key of a text given as valid UTF-8."""
    return hashlib.blake2b(b" ".join(_words(data)), digest_size=KEY_BYTES).digest()


def key_of_chunks(chunks: Iterable[bytes]) -> bytes:
    """:func:`key_of` the joined ``chunks``, which may end inside a character, in memory for two of them."""
    digest, pending, joint = hashlib.blake2b(digest_size=KEY_BYTES), b"", b""
    for chunk in chunks:
        pending += chunk
        # Before white space: no character of ASCII is ever joined to the one before it by NFC.
        cut = max(pending.rfind(bytes([white])) for white in _WHITE)
        if cut > 0:
            if words := b" ".join(_words(pending[:cut])):
                digest.update(joint + words)
                joint = b" "
            pending = pending[cut:]
    if words := b" ".join(_words(pending)):
        digest.update(joint + words)
    return digest.digest()


def _words(data: bytes) -> list[bytes]:
    return (data if data.isascii() else unicodedata.normalize("NFC", data.decode()).encode()).split()
