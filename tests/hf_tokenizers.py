"""Tokenizers to send out, and tokenizers of others to read in, all learned here from the standard library's sources."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from accel_pretrain.hf import byte_level
from accel_pretrain.hf.byte_level import merges_of
from accel_pretrain.tokenizer import END_OF_TEXT, GPT2_PATTERN, BpeTokenizer, ByteTokenizer, Tokenizer
from tests.running import stdlib_text

transformers = pytest.importorskip("transformers", reason="pip install 'accel_pretrain[hf]'")
tokenizers = pytest.importorskip("tokenizers")

CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
# Llama 3's: what others write in Oniguruma's language, and in place of CL100K_PATTERN.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = stdlib_text(400_000)


def learned(size: int) -> dict[bytes, int]:
    """Ranks of ``size`` byte-level tokens, learned from TEXT."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT[:150_000]], trainer)
    return {byte_level._bytes(token): id for token, id in backend.get_vocab().items()}


RANKS = learned(700)
ODD = {b"qzx": 700, "naïve €".encode(): 701, b" " * 9: 703}  # found as whole pieces only, and an id is left out
EXPORTED: dict[str, Tokenizer] = {
    "bytes": ByteTokenizer(),
    "gpt2": BpeTokenizer("gpt2", RANKS, GPT2_PATTERN),
    "cl100k": BpeTokenizer("cl100k", RANKS | ODD, CL100K_PATTERN, {END_OF_TEXT: 702, "<|fim_prefix|>": 720}),
    "o200k": BpeTokenizer("o200k", RANKS, O200K_PATTERN, {"<pad>": 701, "<|end_of_text|>": 700}, eot="<|end_of_text|>"),
}


def documents() -> Iterator[str]:
    """About 5,000: code, lines, and random characters of every kind, other ones than the export's own probes."""
    draw = random.Random(20)
    pool = [*"abcdefgstmlrveABCSTM0123456789", *" \t\n\r\x0b\x0c\x85\xa0\u2003\u3000\u2028", *"'''.,!?-_()[]{}<>|/\\#@$%", "'s"]
    pool += [
        "'LL",
        " the",
        "  ",
        "\r\n",
        "1234",
        "é",
        "ß",
        "ſ",
        "中",
        "日本",
        "😀",
        "👍🏽",
        "\u0301",
        "ﬁ",
        "K",
        "²",
        "self",
        "return",
    ]
    yield from (TEXT[start : start + 4000] for start in range(0, len(TEXT), 4000))
    yield from TEXT.splitlines(keepends=True)[:1400]
    for _ in range(1200):
        yield "".join(draw.choices(pool, k=draw.randint(0, 80)))
        yield "".join(chr(code) for code in draw.choices(range(0xD800), k=draw.randint(1, 30)))
        yield "".join(chr(draw.randrange(0xE000, 0x110000)) for _ in range(draw.randint(1, 30)))


def encode_with(definition: dict[str, object], text: str) -> list[int]:
    return tokenizers.Tokenizer.from_str(json.dumps(definition)).encode(text).ids


def save_backend(folder: Path, backend: Any, **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_gpt2_files(folder: Path, names: tuple[str, str] = ("vocab.json", "merges.txt")) -> BpeTokenizer:
    """``vocab.json`` and ``merges.txt`` as GPT-2 came in, and the tokenizer that they are."""
    vocab = {byte_level._visible(token): id for token, id in RANKS.items()} | {END_OF_TEXT: len(RANKS)}
    merges = [f"{byte_level._visible(left)} {byte_level._visible(right)}" for left, right in merges_of(RANKS)[0]]
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(json.dumps(vocab))
    (folder / names[1]).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return BpeTokenizer("same", RANKS, GPT2_PATTERN)


def llama3_like(folder: Path) -> Path:
    """Ranks as transformers converts them: several merges for one token, special tokens at the end, a first token added."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    BpeTokenizer("ranks", RANKS, GPT2_PATTERN).save(folder / "ranks")
    extra = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved|>"]
    backend = TikTokenConverter(str(folder / "ranks" / "ranks.tiktoken"), extra_special_tokens=extra).converted()
    first = ("<|begin_of_text|>", 700)
    single = "<|begin_of_text|> $A"
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=[first])
    return save_backend(folder, backend, eos_token="<|end_of_text|>", bos_token="<|begin_of_text|>")


def sentencepiece_like(*, prepend: bool, byte_fallback: bool = True) -> Any:
    """What Llama 2 (a space before every text) and Gemma (none) ship: BPE on characters, unknown ones as bytes."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    before = [normalizers.Prepend("▁")] if prepend else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")  # to learn words; taken out below
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    specials = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*specials, *pieces], limit_alphabet=100, show_progress=False
    )
    backend.train_from_iterator([TEXT[:150_000]], trainer)
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    plan = json.loads(backend.to_str())
    plan["added_tokens"] = plan["added_tokens"][:3]
    return tokenizers.Tokenizer.from_str(json.dumps(plan | {"pre_tokenizer": None}))


def unigram_like() -> Any:
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXT[:60_000].splitlines(), trainer)
    return backend
