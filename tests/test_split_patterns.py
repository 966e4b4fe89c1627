"""The quick spelling of a split pattern gives the ids that tiktoken gives with the pattern as its makers spell it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_pretrain.split_patterns import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, quick_spelling
from accel_pretrain.tokenizer import BpeTokenizer

PATTERNS = {"gpt2": GPT2_PATTERN, "cl100k": CL100K_PATTERN, "o200k": O200K_PATTERN}
# Merges that join what a pattern must part or keep together: across white space, cases, digits, signs, the end of a character.
TOKENS = [bytes([byte]) for byte in range(256)]
PAIRS = [
    b"  ",
    b"\n\n",
    b" a",
    b"a ",
    b"aa",
    b"aA",
    b"Aa",
    b"a1",
    b"1a",
    b"11",
    b"a!",
    b"!a",
    b"!!",
    b" !",
    b"!\n",
    b"\n ",
    b" \n",
]
PAIRS += [b"'s", b"s'", b"'l", b"/\n", b"\r\n", b"\t\t", b"\n\t", b"a\n", b"\na", b"1\n", b" 1", b"1 ", b"A'", b"' "]
PAIRS += [bytes([byte]) + after for byte in range(0x80, 0xC0) for after in (b"a", b"A", b"1", b"!", b"\n", b" ")]
RANKS = {token: rank for rank, token in enumerate([*TOKENS, *PAIRS])}
ALPHABET = [
    *"aZ19'-_.!/ \n\t\r", "  ", "   ", "\r\n", "'s", "'LL", "é", "e\u0301", "ß", "中", "ー", "한", "\u00a0", "\u2028", "\u0085",
    "\u3000", "٣", "½", "Ⅷ", "\U0001f600", "\u200d", "\u0903", "ǅ", "ʰ", "\u1acf", "\U000323b0", "\U00010940", "\0",
    "\x0b", "\x1c",
]  # fmt: skip


def encoding_of(pattern: str) -> tiktoken.Encoding:
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=RANKS, special_tokens={"<|endoftext|>": len(RANKS)})


REFERENCES = {name: encoding_of(pattern) for name, pattern in PATTERNS.items()}
TOKENIZERS = {name: BpeTokenizer(name, RANKS, pattern) for name, pattern in PATTERNS.items()}


def same(name: str, text: str) -> bool:
    return TOKENIZERS[name].encode(text).tolist() == REFERENCES[name].encode_ordinary(text)


def fuzz(count: int, seed: int) -> list[str]:
    source = random.Random(seed)
    return ["".join(source.choices(ALPHABET, k=source.randint(1, 24))) for _ in range(count)]


@pytest.mark.parametrize("name", PATTERNS)
def test_same_ids_of_fuzz(name: str) -> None:
    assert [ascii(text) for text in fuzz(30_000, 0) if not same(name, text)] == []


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_same_ids_of_any_text(text: str) -> None:
    assert all(same(name, text) for name in PATTERNS)


@pytest.mark.parametrize("name", PATTERNS)
def test_same_ids_beside_all_kinds_of_characters(name: str) -> None:
    few = [*range(0x3400, 0xA000, 64), *range(0xAC00, 0xD800, 64), *range(0x10000, 0x110000, 32)]  # ideographs and the like
    codes = sorted([*range(0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x10000), *few])
    for start in range(0, len(codes), 4096):
        found = map(chr, codes[start : start + 4096])
        text = "".join(f"{c}a {c}1 {c}! {c}A {c}\n aA{c} '{c} \n{c}{c}  {c}" for c in found)
        ids = REFERENCES[name].encode_to_numpy(text, disallowed_special=())
        assert np.array_equal(TOKENIZERS[name].encoding.encode_to_numpy(text, disallowed_special=()), ids), f"U+{start:04X}..."


def gives_up(encoding: tiktoken.Encoding, text: str) -> bool:
    try:
        encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("before", "white", "after"), [("a", " ", "x"), ("", "\u3000", "")])
def test_gives_up_at_the_same_run_of_white_space(name: str, before: str, white: str, after: str) -> None:
    """Where tiktoken gives up, the text is cut: the ids are equal only if both spellings give up at the same place."""
    quick, reference = TOKENIZERS[name].encoding, REFERENCES[name]
    few, many = 999_900, 1_000_100
    if gives_up(reference, before + white * few + after):
        few, many = 1, few
    if not gives_up(reference, before + white * many + after):
        assert not gives_up(quick, before + white * many + after)
        return
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if gives_up(reference, before + white * middle + after) else (middle, many)
    assert [gives_up(quick, before + white * count + after) for count in (few, many)] == [False, True]


@pytest.mark.parametrize(
    "wrong",
    [
        quick_spelling(GPT2_PATTERN).replace(r"|\s+(?!\S)", ""),
        quick_spelling(GPT2_PATTERN).replace(r"|\s+$", r"|\s+"),
        quick_spelling(GPT2_PATTERN).replace(r" ?\p{N}+", r"\p{N}+"),
        quick_spelling(GPT2_PATTERN).replace("'(?:[sdmt]|ll|ve|re)|", ""),
    ],
)
def test_control_another_split_is_seen(wrong: str) -> None:
    assert wrong != quick_spelling(GPT2_PATTERN)
    found = encoding_of(wrong)
    assert any(found.encode_ordinary(text) != REFERENCES["gpt2"].encode_ordinary(text) for text in fuzz(3_000, 1))


def test_a_pattern_that_is_not_known_stays_and_no_fingerprint_changes() -> None:
    assert quick_spelling(r"\p{L}+|\s+") == r"\p{L}+|\s+"
    for name, pattern in PATTERNS.items():
        assert quick_spelling(pattern) != pattern
        assert TOKENIZERS[name].pattern == pattern
    assert len({tokenizer.fingerprint for tokenizer in TOKENIZERS.values()}) == len(PATTERNS)
