"""Tokenizers: the same ids as tiktoken, a lossless round trip, and a saved folder that cannot be changed unnoticed."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_pretrain.errors import DataError
from accel_pretrain.tokenizer import END_OF_TEXT, GPT2_PATTERN, BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer

MERGES = (b"th", b"the", b" t", b"in", b"\xc3\xa9", b"  ", b"    ", b" the", b"\n\n", b"er")
RANKS = {bytes([byte]): byte for byte in range(256)} | {token: 256 + rank for rank, token in enumerate(MERGES)}
BPE = BpeTokenizer("small", RANKS, GPT2_PATTERN)
TOKENIZERS: list[Tokenizer] = [ByteTokenizer(), BPE]


def write_ranks(path: Path, ranks: dict[bytes, int] = RANKS) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200))
def test_decode_of_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_document(text)
    assert ids.dtype == np.uint32
    assert ids[-1] == tokenizer.eot_id
    assert (ids[:-1] != tokenizer.eot_id).all()
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)
def test_lone_surrogates_become_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b \ud83d\ude00")) == "a\ufffdb \U0001f600"


def test_same_ids_as_tiktoken() -> None:
    reference = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=RANKS, special_tokens={END_OF_TEXT: 266})
    for text in ("", "the thin other", "  the\n\n\n x", "café \u3000 123's", f"a{END_OF_TEXT}b"):
        assert BPE.encode(text).tolist() == reference.encode_ordinary(text)


def test_a_literal_end_of_text_is_text() -> None:
    for tokenizer in TOKENIZERS:
        ids = tokenizer.encode_document(f"a {END_OF_TEXT} b")
        assert (ids == tokenizer.eot_id).sum() == 1
        assert tokenizer.decode(ids) == f"a {END_OF_TEXT} b"


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character() -> None:
    assert ByteTokenizer().decode([0xE9]) == "\ufffd"
    assert ByteTokenizer().decode_bytes([0xE9, 256]) == b"\xe9"


def test_a_very_long_run_of_spaces_does_not_panic() -> None:
    text = " " * 1_200_000 + "x"
    with pytest.raises(ValueError, match=r"."):
        BPE.encoding.encode_to_numpy(text, disallowed_special=())  # what tiktoken does with it
    assert BPE.decode_bytes(BPE.encode(text)) == text.encode()


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)
def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    for place in (tmp_path / "tokenizer", tmp_path):  # the folder itself, or a dataset that holds it
        loaded = load_tokenizer(place)
        assert (loaded.name, loaded.vocab_size, loaded.eot_id) == (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("the café").tolist() == tokenizer.encode("the café").tolist()


def test_other_special_tokens_keep_their_ids(tmp_path: Path) -> None:
    tokenizer = BpeTokenizer("s", RANKS, GPT2_PATTERN, {"<pad>": 266, END_OF_TEXT: 300})
    assert (tokenizer.eot_id, tokenizer.vocab_size) == (300, 301)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).decode([266, 300]) == "<pad>"


def test_another_end_of_text(tmp_path: Path) -> None:
    tokenizer = BpeTokenizer("s", RANKS, GPT2_PATTERN, {END_OF_TEXT: 266, "<|end|>": 267}, eot="<|end|>")
    assert (tokenizer.eot_id, tokenizer.encode_document("").tolist()) == (267, [267])
    assert tokenizer.decode([266, 267]) == END_OF_TEXT
    tokenizer.save(tmp_path)
    assert (load_tokenizer(tmp_path).eot_id, load_tokenizer(tmp_path).fingerprint) == (267, tokenizer.fingerprint)
    assert tokenizer.fingerprint != BpeTokenizer("s", RANKS, GPT2_PATTERN, {END_OF_TEXT: 266, "<|end|>": 267}).fingerprint
    assert BpeTokenizer("s", RANKS, GPT2_PATTERN, eot="<|end|>").eot_id == 266
    with pytest.raises(DataError, match=r"has no <\|end\|> token"):
        BpeTokenizer("s", RANKS, GPT2_PATTERN, {END_OF_TEXT: 266}, eot="<|end|>")


def test_fingerprints_are_what_they_were_in_version_0_1(tmp_path: Path) -> None:
    """Datasets and checkpoints name them: they must never change."""
    assert BPE.fingerprint == "8693fc5de11389ce280c13d42cc307077dbe321d07cd79c9e4ae05f1454998da"
    assert ByteTokenizer().fingerprint == "74c98db234b3da5f9c470caba37f6c8ec5ca2fd6718fb023660a7c7642138b30"
    BPE.save(tmp_path)
    assert list(json.loads((tmp_path / "spec.json").read_text())) == [
        "kind",
        "name",
        "pattern",
        "special_tokens",
        "fingerprint",
    ]


def test_a_special_token_among_the_ranks_survives_saving(tmp_path: Path) -> None:
    """p50k_base has its end of text in the middle."""
    ranks = {token: rank + (rank >= 260) for token, rank in RANKS.items()}
    tokenizer = BpeTokenizer("gap", ranks, GPT2_PATTERN, {END_OF_TEXT: 260})
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode_document("the er").tolist() == tokenizer.encode_document("the er").tolist()
    with pytest.raises(DataError, match="ranks must be 0, 1, 2"):  # but a bare file of ranks says nothing of what is left out
        load_tokenizer(tmp_path / "ranks.tiktoken")


@pytest.mark.parametrize("changed", ["pattern", "special_tokens", "ranks", "fingerprint"])
def test_a_changed_folder_is_refused(tmp_path: Path, changed: str) -> None:
    BPE.save(tmp_path)
    spec = json.loads((tmp_path / "spec.json").read_text())
    if changed == "ranks":
        swapped = RANKS | {b"th": RANKS[b"er"], b"er": RANKS[b"th"]}
        write_ranks(tmp_path / "ranks.tiktoken", swapped)
    else:
        spec[changed] = {"pattern": r"\s+|\S+", "special_tokens": {END_OF_TEXT: 400}, "fingerprint": "0"}[changed]
        (tmp_path / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match="changed after they were saved"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kind": "bpe", "name": "x"}'])
def test_a_damaged_spec_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "spec.json").write_text(text)
    with pytest.raises(DataError, match="not a saved tokenizer"):
        load_tokenizer(tmp_path)


def test_a_file_of_ranks(tmp_path: Path) -> None:
    loaded = load_tokenizer(write_ranks(tmp_path / "mine.tiktoken"))
    assert (loaded.name, loaded.vocab_size, loaded.fingerprint) == ("mine", 267, BPE.fingerprint)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not base64!! 0\n", "not a file of tiktoken ranks"),
        (b"YQ== x\n", "not a file of tiktoken ranks"),
        (b"\xff\xfe\x00", "not a file of tiktoken ranks"),
        (b"YQ== 0\n", "hold all 256 single bytes"),
        (b"", "hold all 256 single bytes"),
    ],
)
def test_a_bad_file_of_ranks(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "bad.tiktoken").write_bytes(content)
    with pytest.raises(DataError, match=says):
        load_tokenizer(tmp_path / "bad.tiktoken")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"--tokenizer gpt5: not one of bytes, .*gpt2.*, and no such file or folder"):
        load_tokenizer("gpt5")


def test_a_missing_file_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist or is not a \.tiktoken file"):
        load_tokenizer(tmp_path / "nothing.tiktoken")


def test_no_network_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(DataError, match=r"could not \(ConnectionError: no route.*TIKTOKEN_CACHE_DIR.*--tokenizer bytes"):
        load_tokenizer("gpt2")


def test_importing_it_does_not_import_torch() -> None:
    import subprocess

    code = "import accel_pretrain.tokenizer, accel_pretrain.shards, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
