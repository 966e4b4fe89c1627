"""What can be found out about a ``tokenizer.json``: the bytes its tokens stand for, and which ids it gives when. Torch-free."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any


def byte_alphabet() -> list[str]:
    """How byte-level BPE writes each of the 256 bytes as one visible character (Radford et al. 2019)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def decoder_steps(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if odd := {step["type"] for step in steps} - {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}:
        raise ValueError(f"its tokens do not stand for text that can be put together token by token: decoder {odd.pop()}")
    return steps


def decode_token(token: str, steps: Sequence[Mapping[str, Any]]) -> bytes:
    """What one token of a ``tokenizer.json`` stands for in the middle of a text: Strip is for the ends, Fuse joins."""
    for step in steps:
        if step["type"] == "ByteLevel" and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        if step["type"] == "ByteFallback" and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        if step["type"] == "Metaspace":
            token = token.replace(step["replacement"], " ")
        if step["type"] == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
    return token.encode()


def first_id(backend: Any) -> int | None:
    """The id of the token that the post-processor puts before every text; one that it puts at the end does not count."""
    first = backend.encode("").ids[:1]
    if not first or backend.encode("a").ids[:1] != first or backend.encode("a", add_special_tokens=False).ids[:1] == first:
        return None
    return first[0]


def never_found(backend: Any) -> set[int]:
    """The special tokens that no text becomes while ``encode_special_tokens`` is on: ``backend``'s model does not know them.

    Or it does, but does not find them in texts that spell them: merges do not lead to them.
    """
    own = backend.get_vocab(with_added_tokens=False)

    def may_be_found(id: int, text: str) -> bool:
        try:
            return any(id in backend.encode(around, add_special_tokens=False).ids for around in (text, f" {text} a{text}a"))
        except Exception:  # the library's are bare ones; who encodes a text gets them again
            return True

    special = {id: token.content for id, token in backend.get_added_tokens_decoder().items() if token.special}
    return {id for id, text in special.items() if text not in own or not may_be_found(id, text)}


_BYTE_OF = {character: byte for byte, character in enumerate(byte_alphabet())}
