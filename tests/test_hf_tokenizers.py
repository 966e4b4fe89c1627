"""Tokenizers out to the Hugging Face world: equal ids, equal fingerprints on the way back, a refusal of what would differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accel_pretrain.errors import CheckpointError
from accel_pretrain.hf import byte_level
from accel_pretrain.hf.byte_level import byte_level_definition, merges_of
from accel_pretrain.hf.split_pattern import contested, from_oniguruma, to_oniguruma
from accel_pretrain.hf.tokenizers import check_with_transformers, read_hf_tokenizer, write_hf_tokenizer
from accel_pretrain.tokenizer import END_OF_TEXT, GPT2_PATTERN, BpeTokenizer, ByteTokenizer
from tests.hf_tokenizers import EXPORTED, LLAMA3_PATTERN, RANKS, documents, encode_with, transformers
from tests.running import first_and_slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every tokenizer of EXPORTED, exported."""
    paths = {name: tmp_path_factory.mktemp("exported") / name for name in EXPORTED}
    for name, path in paths.items():
        write_hf_tokenizer(EXPORTED[name], path, context_length=1 << 20)
    return paths


@pytest.mark.parametrize("name", EXPORTED)
def test_the_exported_tokenizer_gives_equal_ids(folders: dict[str, Path], name: str):
    ours, theirs = EXPORTED[name], transformers.AutoTokenizer.from_pretrained(folders[name])
    count = 0
    for text in documents():
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
        count += 1
    assert count > 5000
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token) == (ours.eot_id, ours.eot_id, None)
    assert len(theirs) <= ours.vocab_size
    assert theirs.model_max_length == 1 << 20


@pytest.mark.parametrize("name", EXPORTED)
def test_a_literal_special_token_is_text_if_asked_for(folders: dict[str, Path], name: str):
    ours, theirs = EXPORTED[name], transformers.AutoTokenizer.from_pretrained(folders[name])
    text = f"a {theirs.eos_token}b<pad>\n{theirs.eos_token}{theirs.eos_token}"
    assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text).tolist()
    assert ours.eot_id in theirs(text)["input_ids"]  # the convention there, and a control


@pytest.mark.parametrize("name", first_and_slow(EXPORTED))
def test_the_exported_tokenizer_comes_back_as_the_same(folders: dict[str, Path], name: str, tmp_path: Path):
    ours = EXPORTED[name]
    saved_again = tmp_path / "again"
    transformers.AutoTokenizer.from_pretrained(folders[name]).save_pretrained(saved_again)
    for folder in (folders[name], saved_again):
        back = read_hf_tokenizer(folder)
        assert (back.fingerprint, back.eot_id, back.vocab_size) == (ours.fingerprint, ours.eot_id, ours.vocab_size)
        assert (type(back), back.name) == (type(ours), ours.name)


def test_a_merge_out_of_place_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    right = merges_of

    def wrong(ranks: dict[bytes, int]) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
        merges, whole = right(ranks)
        return [*merges[200:], *merges[:200]], whole

    monkeypatch.setattr(byte_level, "merges_of", wrong)
    with pytest.raises(CheckpointError, match=r"the exported tokenizer gives \[.*\] where ours gives \["):
        write_hf_tokenizer(EXPORTED["gpt2"], tmp_path, context_length=8)


def test_a_pattern_that_is_only_copied_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(byte_level, "to_oniguruma", lambda pattern: pattern)
    with pytest.raises(CheckpointError, match="where ours gives"):
        write_hf_tokenizer(EXPORTED["cl100k"], tmp_path, context_length=8)


def test_classes_of_which_the_engines_know_different_things():
    pattern = r"\w+|[^\w]+"
    assert {"\u200d", "²"} <= contested(pattern)  # a joiner is of \w for Rust, a superscript for Oniguruma
    tokenizer = BpeTokenizer("words", RANKS | {"²".encode(): 700, "²x".encode(): 701}, pattern)
    definition = byte_level_definition(tokenizer.ranks, tokenizer.specials, pattern)
    text = "self\u200dself self²x ½a ⅷa\u0301"
    assert encode_with(definition, text) == tokenizer.encode(text).tolist()
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern  # control
    assert encode_with(definition, text) != tokenizer.encode(text).tolist()


def test_text_that_the_pattern_drops_is_dropped_there_too(tmp_path: Path):
    tokenizer = BpeTokenizer("letters", RANKS, r"\p{L}+")
    write_hf_tokenizer(tokenizer, tmp_path, context_length=8)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("ab 12 c")["input_ids"] == tokenizer.encode("ab-c").tolist()
    assert tokenizer.decode(tokenizer.encode("ab-c")) == "abc"


@pytest.mark.parametrize(
    ("pattern", "translated"),
    [
        (r"\s++$|a", r"\s++\z|a"),
        (r"\p{N}{1,3}+|x", r"(?>\p{N}{1,3})|x"),
        (r"(?:a|b(c)){2}+d", r"(?>(?:a|b(c)){2})d"),
        (r"[^\r\n\p{L}]?+ |\x{e9}\.", r"[^\r\n\p{L}]?+ |\x{e9}\."),
    ],
)
def test_patterns_that_are_written_differently(pattern: str, translated: str):
    assert to_oniguruma(pattern) == translated


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i)a", r"\bx", r"[a&&b]", r"[a--b]", r"[[a]b]", r"a{2}?", r"^a", r"\hx", r"(?P<n>a)", r"(a)\1",
        r"\p{Zzz}", r"a)", r"(a", r"[",
    ],
)  # fmt: skip
def test_patterns_that_may_mean_something_else_are_refused(pattern: str):
    with pytest.raises(CheckpointError, match="split pattern"):
        to_oniguruma(pattern)


@pytest.mark.parametrize("pattern", [r"\s+$", r"\p{N}{1,3}+", r"(?<n>a)"])
def test_patterns_that_tiktoken_would_take_otherwise(pattern: str):
    assert from_oniguruma(pattern) is None
    assert from_oniguruma(LLAMA3_PATTERN) == LLAMA3_PATTERN  # control


def test_a_special_token_with_the_text_of_another_is_refused(tmp_path: Path):
    tokenizer = BpeTokenizer("clash", RANKS, GPT2_PATTERN, {END_OF_TEXT: 700, "self": 701})
    assert b"self" in RANKS
    with pytest.raises(CheckpointError, match="cannot hold the special token 'self'"):
        write_hf_tokenizer(tokenizer, tmp_path, context_length=8)


@pytest.mark.parametrize("family", first_and_slow(["gpt2", "llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text"]))
def test_the_family_of_the_model_does_not_change_the_tokenizer(family: str, tmp_path: Path):
    write_hf_tokenizer(ByteTokenizer(), tmp_path, context_length=8)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (" the  CAFÉ\n\n 123's ", "e\u0301 \u212a <s></s>", " 中文▁a"):
        assert theirs(text)["input_ids"] == list(text.encode())
        assert theirs.decode(list(text.encode())) == text


def test_the_check_with_transformers_passes_what_is_right(folders: dict[str, Path]):
    check_with_transformers(EXPORTED["o200k"], folders["o200k"])


def test_a_family_that_transformers_gives_its_own_tokenizer_is_refused(tmp_path: Path):
    """transformers builds Qwen2Tokenizer for ``qwen2`` whatever the folder says: NFC, and that family's pattern."""
    write_hf_tokenizer(ByteTokenizer(), tmp_path, context_length=8)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    if type(transformers.AutoTokenizer.from_pretrained(tmp_path)).__name__ != "Qwen2Tokenizer":
        pytest.skip("this transformers respects tokenizer_class")
    with pytest.raises(CheckpointError, match="loaded as Qwen2Tokenizer: the exported tokenizer gives"):
        check_with_transformers(ByteTokenizer(), tmp_path)


def test_another_end_of_text_in_the_folder_is_seen(tmp_path: Path):
    write_hf_tokenizer(ByteTokenizer(), tmp_path, context_length=8)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "a"}))
    with pytest.raises(CheckpointError, match="takes 97 for the end of a text, not 256"):
        check_with_transformers(ByteTokenizer(), tmp_path)


def test_merges_are_those_that_encoding_ends_in():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258, b"xyz": 259, b"aab": 260}
    assert merges_of(ranks) == ([(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"ab")], [b"xyz"])
