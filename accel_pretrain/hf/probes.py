"""Texts on which two tokenizers are compared before one is taken for the other: every script, and what splitting trips over."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from accel_pretrain.tokenizer import Tokenizer

# All planes that hold scripts, and some of the private ones; the planes between have no characters.
ALL_CODES = (*range(0xD800), *range(0xE000, 0x33480), *range(0xE0000, 0xE0200), *range(0xF0000, 0xF0100), 0x10FFFF)
_SPACES = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2003\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
_SAMPLES = (
    "I'll say it's we're they've I'd can't I'm; I'LL SAY IT'S WE'RE THEY'VE I'D CAN'T I'M 'tis ''s 'ſ 'S'sS ’s 'K",
    "1 12 123 1234 12345 3.14159 1,000,000 0x7f ²³ ½ Ⅷ ٣٤٥ 一二三 1st 2nd",
    "def f(x):\n    return [y for y in x if y != 0]  # ← code\n\n\nclass A:\r\n\tpass\r\n\r\n",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\dir\\file.txt $5.00 100% <a href='x'>y</a> {\"k\": [1, 2]}",
    "你好，世界。 こんにちは 안녕하세요 Здравствуй",
    "สวัสดี नमस्ते مرحبا שלום မြန်မာ",
    "👩\u200d👩\u200d👧\u200d👦 🇩🇪 👍🏽 ❤\ufe0f 😀😀😀",
    "cafe\u0301 café ﬁne straße STRASSE İstanbul ı ǅ ﬆ naïve a\u0300\u0301\u0302b Z\u0351\u036b\u0343",
    "<|endoftext|> </s> <s> <unk> <0x0A> <pad> [INST] <|im_start|> ▁ ▁▁a Ġ Ċ Ġthe \x00 \x7f \ufffd",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ======================== ................ ----//// ___snake_case__ CamelCaseHTTP",
)


def probe_texts(literals: Sequence[str] = (), leave_out: frozenset[str] = frozenset()) -> Iterator[str]:
    """About ten thousand texts, the same ones every time.

    ``literals`` are texts of tokens, tried in several surroundings; ``leave_out`` are characters that no text then contains.
    """
    texts = itertools.chain(_SAMPLES, _around(literals), _every_character(), _white_space(), _random_texts(literals))
    drop = {ord(character): None for character in leave_out}
    return (text.translate(drop) for text in texts) if drop else texts


def first_difference(one: Tokenizer, encode: Callable[[str], Iterable[int]], texts: Iterable[str]) -> str | None:
    """The first of ``texts`` for which ``encode`` gives other ids than ``one``, cut short; None if there is none."""
    for text in texts:
        if one.encode(text).tolist() != list(encode(text)):
            return _shortest(one, encode, text)
    return None


def _shortest(one: Tokenizer, encode: Callable[[str], Iterable[int]], text: str) -> str:
    """A short piece of ``text`` in which the ids still differ: a person has to look at it."""
    while len(text) > 1:
        half = len(text) // 2
        pieces = (text[:half], text[half:], text[half // 2 : half // 2 + half])
        smaller = next((piece for piece in pieces if one.encode(piece).tolist() != list(encode(piece))), None)
        if smaller is None:
            break
        text = smaller
    return text


def _around(literals: Sequence[str]) -> Iterator[str]:
    for literal in literals:
        yield from (literal, f"a{literal} b", f" {literal}\n{literal}{literal}", f"'{literal}1 {literal.upper()}")


def _every_character() -> Iterator[str]:
    characters = list(map(chr, ALL_CODES))
    for start in range(0, len(characters), 192):
        part = characters[start : start + 192]
        yield "".join(part)
        if not "\u3400" <= part[0] < "\ud700" and not "\U00020000" <= part[0] < "\U00033300":  # ideographs and syllables
            yield "".join(f" {character}a{character}1'{character}\n" for character in part)
    for character in characters[:0x800]:  # alone, where the beginning and the end of a text count
        yield f"{character}{character} {character}"


def _white_space() -> Iterator[str]:
    for first, second in itertools.product(_SPACES, repeat=2):
        run = first * 3 + second
        yield f"{first}{second}a{run}b{second}1{run}!{first}\u4e2d{run}"
    for length in range(1, 80):
        yield f"x{' ' * length}y\n{' ' * length}{chr(10) * length}\t{'7' * length}{'é' * length}"


def _random_texts(literals: Sequence[str]) -> Iterator[str]:
    draw = random.Random(0)
    words = [
        *literals,
        *"abcstdmlrvewxyzABCSTDM0123456789",
        *_SPACES,
        *"''''..!?-_/\\()[]{}<>|&%$#@",
        "é",
        "ß",
        "ſ",
        "中",
        "😀",
    ]
    words += [" the", " of", "ing", "'s", "'LL", "  ", "\r\n", "1234"]
    for _ in range(1000):
        yield "".join(draw.choices(words, k=draw.randint(1, 60)))
        yield "".join(chr(draw.choice(ALL_CODES)) for _ in range(draw.randint(1, 40)))
        yield "".join(chr(draw.randint(1, 0x17F)) for _ in range(draw.randint(1, 60)))
