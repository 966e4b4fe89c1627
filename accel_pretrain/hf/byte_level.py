"""Byte-level BPE in both spellings: ranks, as tiktoken has them, and the vocabulary and merges of a ``tokenizer.json``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from accel_pretrain.errors import CheckpointError
from accel_pretrain.hf.split_pattern import to_oniguruma
from accel_pretrain.tokenizer import byte_alphabet

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
# How others write GPT-2's pattern; the first is what a ByteLevel step of tokenizers splits by.
GPT2_SPELLINGS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)
_ALPHABET = byte_alphabet()
_BYTE_OF = {character: byte for byte, character in enumerate(_ALPHABET)}
_NEVER = 1 << 62


def byte_level_definition(ranks: Mapping[bytes, int], specials: Mapping[str, int], pattern: str | None) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` that encodes as tiktoken does with these ranks."""
    vocab = {_visible(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])}
    if clash := sorted(vocab.keys() & specials.keys()):
        raise CheckpointError(
            f"a tokenizer.json cannot hold the special token {clash[0]!r}, whose text is an ordinary token, too"
        )
    if sorted(specials.values()) != list(range(len(vocab), len(vocab) + len(specials))):
        vocab |= specials  # elsewhere than right after the others, an added token gets its id only from the vocabulary
    merges, whole = merges_of(ranks)
    split = {"type": "Split", "pattern": {"Regex": to_oniguruma(pattern or "")}, "behavior": "Removed", "invert": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": text, **SPECIAL} for text, id in sorted(specials.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]} if pattern is not None else BYTE_LEVEL,
        "post_processor": BYTE_LEVEL,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": bool(whole),
            "vocab": vocab,
            "merges": [f"{_visible(left)} {_visible(right)}" for left, right in merges],
        },
    }


def merges_of(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """The merges that ranks stand for, in their order, and the tokens that no merge leads to.

    tiktoken joins any two neighbours whose union has a rank. For one union it is always the same two: within the bytes of a
    token, merging goes on as if nothing were around it, so that only the last step of encoding the token by itself can ever
    join it. A list of these pairs is therefore all that an encoder needs that goes by pairs. A token that encoding does not
    arrive at is found only where it is a whole piece of the text, which both look up first (``ignore_merges``).
    """
    merges, whole = [], []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            pair = _last_pair(token, ranks)
            whole.append(token) if pair is None else merges.append(pair)
    return merges, whole


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, _NEVER) for left, right in itertools.pairwise(parts)]
        lowest = min(joined)
        if lowest == _NEVER:
            return None
        place = joined.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def ranks_of(plan: Mapping[str, Any], ids: Mapping[str, int], specials: Mapping[str, int]) -> dict[bytes, int] | None:
    """Ranks with which tiktoken merges as the model in ``plan`` does, if there are such."""
    model = plan["model"]
    other_kind = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout")
    if model.get("type", "BPE") != "BPE" or "merges" not in model or any(model.get(option) for option in other_kind):
        return None
    if plan.get("normalizer") or plan["decoder"]["type"] != "ByteLevel" or not all(t["special"] for t in plan["added_tokens"]):
        return None
    try:
        ranks = {_bytes(token): id for token, id in ids.items() if token not in specials}
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        merges = [(_bytes(left), _bytes(right)) for left, right in pairs]
        order = [ranks[left + right] for left, right in merges]
    except KeyError:  # a character that stands for no byte, or a merge into no token
        return None
    needed, whole = merges_of(ranks)
    in_order = all(one <= other for one, other in itertools.pairwise(order))
    unique = len({*ranks.values(), *specials.values()}) == len(ranks) + len(specials)
    bytes_known = all(bytes([byte]) in ranks for byte in range(256))
    found_whole = not whole or model.get("ignore_merges", False)
    return ranks if in_order and unique and bytes_known and found_whole and set(needed) <= set(merges) else None


def split_of(steps: Mapping[str, Any] | None) -> str | None:
    """The split pattern of a pre-tokenizer; an empty one if it does not split; None if it does something else."""
    pretokenizers = steps["pretokenizers"] if steps and steps["type"] == "Sequence" else [steps]
    match pretokenizers:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return ""
        case [{"type": "ByteLevel", "add_prefix_space": False}]:
            return GPT2_SPELLINGS[0]
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": behavior, "invert": inverted},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if (behavior, inverted) in (("Isolated", False), ("Isolated", True), ("Removed", True)):
            return pattern
    return None


def _visible(token: bytes) -> str:
    return "".join(_ALPHABET[byte] for byte in token)


def _bytes(token: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in token)
