"""Tokenizers in from the Hugging Face world: what is tiktoken's kind becomes that, all else is wrapped, damage is one line."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accel_pretrain.errors import DataError, PretrainError
from accel_pretrain.hf import tokenizers as hf
from accel_pretrain.hf.byte_level import merges_of
from accel_pretrain.hf.tokenizers import check_with_transformers, read_hf_tokenizer, write_hf_tokenizer
from accel_pretrain.sample import decode_stream
from accel_pretrain.tokenizer import END_OF_TEXT, BpeTokenizer, HfTokenizer, load_tokenizer
from tests.hf_tokenizers import (
    EXPORTED,
    RANKS,
    documents,
    encode_with,
    llama3_like,
    save_backend,
    sentencepiece_like,
    tokenizers,
    transformers,
    unigram_like,
    write_gpt2_files,
)
from tests.running import first_and_slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's kind, exported."""
    folder = tmp_path_factory.mktemp("exported")
    write_hf_tokenizer(EXPORTED["gpt2"], folder, context_length=8)
    return folder


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2s_old_files_give_the_fingerprint_of_the_same_ranks(names: tuple[str, str], tmp_path: Path):
    same = write_gpt2_files(tmp_path, names)
    assert read_hf_tokenizer(tmp_path).fingerprint == same.fingerprint


def test_what_transformers_saves_of_gpt2_gives_it_too(tmp_path: Path):
    same = write_gpt2_files(tmp_path / "old")
    transformers.GPT2Tokenizer.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "merges.txt").exists()
    assert json.loads((tmp_path / "new" / "tokenizer.json").read_text())["pre_tokenizer"]["type"] == "ByteLevel"
    assert read_hf_tokenizer(tmp_path / "new").fingerprint == same.fingerprint


def test_old_files_of_another_kind_are_refused(tmp_path: Path):
    write_gpt2_files(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({f"{token}</w>": id for token, id in vocab.items()} | {END_OF_TEXT: 700}))
    with pytest.raises(DataError, match=r"merges\.txt|cannot use"):
        read_hf_tokenizer(tmp_path, END_OF_TEXT)


def test_what_is_tiktokens_kind_becomes_that_with_its_own_end_of_text(tmp_path: Path):
    path = llama3_like(tmp_path) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    tokenizer = read_hf_tokenizer(tmp_path)
    assert isinstance(tokenizer, BpeTokenizer)
    assert (tokenizer.eot, tokenizer.eot_id, tokenizer.vocab_size, tokenizer.bos_id) == ("<|end_of_text|>", 701, 703, None)
    backend = tokenizers.Tokenizer.from_file(str(path))
    assert len(json.loads(backend.to_str())["model"]["merges"]) > len(merges_of(RANKS)[0])
    for text in itertools.islice(documents(), 0, None, 4):
        assert tokenizer.encode(text).tolist() == backend.encode(text, add_special_tokens=False).ids
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    write_hf_tokenizer(tokenizer, tmp_path / "out", context_length=8)
    assert read_hf_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("eos", first_and_slow([None, "<|reserved|>"]))
def test_a_llama_3_keeps_its_first_token_and_its_template(eos: str | None, tmp_path: Path):
    folder = llama3_like(tmp_path / "in")
    own = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|reserved|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "special_tokens_map.json").write_text(json.dumps(own))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}é", encoding="utf-8")
    tokenizer = read_hf_tokenizer(folder, eos)
    assert isinstance(tokenizer, HfTokenizer)
    assert (tokenizer.bos_id, tokenizer.eot_id, tokenizer.vocab_size) == (700, 701, 702) if eos is None else (700, 702, 703)
    assert 700 not in tokenizer.encode("a <|begin_of_text|>")
    tokenizer.save(tmp_path / "run" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "run")
    assert (loaded.fingerprint, loaded.bos_id) == (tokenizer.fingerprint, 700)
    write_hf_tokenizer(loaded, tmp_path / "out", context_length=77)
    check_with_transformers(loaded, tmp_path / "out")
    names = ["tokenizer.json", "chat_template.jinja", *["special_tokens_map.json"] * (eos is None)]
    assert all((tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in names)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token) == (700, 702, eos or "<|end_of_text|>")
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|begin_of_text|>hié"
    assert theirs("a").input_ids == [700, *tokenizer.encode("a")]


def test_a_special_tokens_map_that_is_damaged_or_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (llama3_like(tmp_path) / "special_tokens_map.json").write_text("{")
    with pytest.raises(DataError, match=r"special_tokens_map\.json: damaged JSON"):
        read_hf_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"x": "y" * 1000}))
    monkeypatch.setattr(hf, "LARGEST_SETTINGS", 1000)
    with pytest.raises(DataError, match="more than 1,000 are not read"):
        read_hf_tokenizer(tmp_path)


def small_plan(size: int) -> dict[str, Any]:
    """Of Gemma's kind: 3 special tokens, 256 bytes, and characters up to ``size`` tokens."""
    plan = json.loads(sentencepiece_like(prepend=False).to_str())
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(0x61, 0x61 + size - 259))]
    plan["model"] |= {"vocab": {name: id for id, name in enumerate(names)}, "merges": []}
    return plan


def added(id: int, text: str, *, special: bool = True) -> dict[str, Any]:
    return {"id": id, "content": text, **FLAGS, "special": special}


@pytest.mark.parametrize("in_vocab", [False, True])
def test_a_special_token_beyond_the_vocabulary_does_not_count(in_vocab: bool, tmp_path: Path):
    """Gemma 3 as it is published: 262,144 rows, and one more token for images."""
    plan = small_plan(300)
    plan["added_tokens"].append(added(300, "<image>"))
    if in_vocab:
        plan["model"]["vocab"]["<image>"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(plan))
    tokenizer = read_hf_tokenizer(tmp_path, "</s>")
    assert (tokenizer.vocab_size, tokenizer.eot_id, tokenizer.bos_id) == (300, 2, None)
    assert tokenizer.encode("a <image> b").max() < 300
    assert read_hf_tokenizer(tmp_path, "<image>").vocab_size == 301
    plan["added_tokens"][-1]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(plan))
    assert read_hf_tokenizer(tmp_path, "</s>").vocab_size == 301
    plan["added_tokens"][-1]["special"] = True
    for single, bos, size in (("<image> $A </s>", 300, 301), ("$A </s>", None, 300)):
        processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=[("<image>", 300), ("</s>", 2)])
        backend = tokenizers.Tokenizer.from_str(json.dumps(plan))
        backend.post_processor = processor
        tokenizer = read_hf_tokenizer(save_backend(tmp_path, backend), "</s>")
        assert (tokenizer.bos_id, tokenizer.vocab_size) == (bos, size)


def test_a_special_token_that_the_model_finds_by_its_text_counts(tmp_path: Path):
    plan = small_plan(300)
    plan["model"]["vocab"]["é"] = 300
    plan["added_tokens"].append(added(300, "é"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(plan))
    tokenizer = read_hf_tokenizer(tmp_path, "</s>")
    assert tokenizer.vocab_size == 301
    assert 300 in tokenizer.encode("é")


def test_a_first_token_that_there_is_not_is_refused(tmp_path: Path):
    backend = sentencepiece_like(prepend=True)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4_000_000)])
    with pytest.raises(DataError, match="adds a token that it does not have"):
        read_hf_tokenizer(save_backend(tmp_path, backend), "</s>")


@pytest.mark.parametrize("prepend", [True, False], ids=["llama2", "gemma"])
def test_sentencepiece_is_wrapped(prepend: bool, tmp_path: Path):
    backend = sentencepiece_like(prepend=prepend)
    folder = save_backend(tmp_path / "in", backend, eos_token={"content": "</s>"}, bos_token="<s>")
    tokenizer = read_hf_tokenizer(folder)
    assert isinstance(tokenizer, HfTokenizer)
    assert (tokenizer.eot_id, tokenizer.vocab_size, tokenizer.eot) == (2, 900, "</s>")
    space = " " * prepend
    for text in ("the café 中文 😀 self", "  two\n\nlines\t", "a </s><s> b<0x41>", "x▁y"[:1], "\ud800"):
        ids = tokenizer.encode(text)
        if "</s>" not in text and text != "\ud800":
            assert ids.tolist() == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.eot_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eot_id]) == space + text.replace("\ud800", "\ufffd")
        assert "".join(decode_stream(tokenizer, ids)) == tokenizer.decode(ids)
    assert tokenizer.decode_bytes([3 + 0xE9]) == b"\xe9"


def test_a_unigram_model_does_not_take_text_for_the_end_of_one(tmp_path: Path):
    backend = unigram_like()
    tokenizer = read_hf_tokenizer(save_backend(tmp_path, backend), eos="</s>")
    backend.encode_special_tokens = True
    for text in ("a</s>b", "</s>", "</s></s> x </s>"):
        assert tokenizer.eot_id in backend.encode(text).ids  # control
        assert tokenizer.eot_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode("return self")) == " return self"


@pytest.mark.slow
def test_a_wrapped_tokenizer_is_saved_loaded_and_exported_to_the_byte(tmp_path: Path):
    folder = save_backend(
        tmp_path / "in", sentencepiece_like(prepend=True), eos_token="</s>", chat_template="{{ x }}", auto_map=1
    )
    tokenizer = read_hf_tokenizer(folder)
    tokenizer.save(tmp_path / "run" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "run")
    assert (loaded.fingerprint, loaded.name, loaded.eot_id) == (tokenizer.fingerprint, "in", 2)
    write_hf_tokenizer(loaded, tmp_path / "out", context_length=77)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["chat_template"], settings["model_max_length"], "auto_map" in settings) == ("{{ x }}", 77, False)
    check_with_transformers(loaded, tmp_path / "out")
    definition = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes()
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_bytes(definition.replace(b'"fuse_unk":true', b'"fuse_unk":false'))
    with pytest.raises(DataError, match="changed after they were saved"):
        load_tokenizer(tmp_path / "run")


SMALL = sentencepiece_like(prepend=True)
Change = Callable[[Any], object]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.update(normalizer={"type": "NFC"}),
        lambda plan: plan["added_tokens"].append({"id": 701, "content": "<think>", "special": False, **FLAGS}),
        lambda plan: plan.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        lambda plan: plan["model"]["merges"].reverse(),
        lambda plan: plan["model"]["merges"].pop(),
        lambda plan: plan["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\s+$|\S+|\s"),
        lambda plan: plan["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True}),
    ],
    ids=["normalizer", "added", "prefix", "order", "missing", "pattern", "digits"],
)
def test_what_tiktoken_would_encode_otherwise_is_wrapped(change: Change, exported: Path, tmp_path: Path):
    plan = json.loads((exported / "tokenizer.json").read_text())
    change(plan)
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(plan))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = read_hf_tokenizer(tmp_path)
    assert isinstance(tokenizer, HfTokenizer)
    text = "def café(self, x=12345):  return <think> naïve\u0301  \n\n  x"
    assert tokenizer.encode(text).tolist() == encode_with(plan, text)


@pytest.mark.slow
def test_ids_far_above_the_others(exported: Path, tmp_path: Path):
    plan = json.loads((exported / "tokenizer.json").read_text())
    plan["model"]["vocab"] |= {END_OF_TEXT: 700, "<|far|>": 5000}
    plan["added_tokens"].append({"id": 5000, "content": "<|far|>", "special": True, **FLAGS})
    (tmp_path / "tokenizer.json").write_text(json.dumps(plan))
    assert read_hf_tokenizer(tmp_path, END_OF_TEXT).vocab_size == 5001
    plan["model"]["vocab"]["<|far|>"] = plan["added_tokens"][-1]["id"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(plan))
    with pytest.raises(DataError, match="impossible ids"):
        read_hf_tokenizer(tmp_path, END_OF_TEXT)


# ------------------------------------------------------------------------------------------- the end of a text, and damage


@pytest.mark.parametrize(
    ("files", "eos", "expected"),
    [
        ({}, "</s>", 2),
        ({}, 1, 1),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, "<s>", 1),
        ({"tokenizer_config.json": {"eos_token": "</s>"}, "config.json": {"eos_token_id": 1}}, None, 2),
        ({"tokenizer_config.json": {"eos_token": {"content": "<s>"}}}, None, 1),
        ({"tokenizer_config.json": {}, "generation_config.json": {"eos_token_id": [1, 2]}}, None, 1),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 2}}, None, 2),
        ({"config.json": {"text_config": {"eos_token_id": [2]}}}, None, 2),
        ({}, None, "does not say which token ends a text; name it: --eos TOKEN"),
        ({}, "<none>", "no token of the vocabulary is '<none>'"),
        ({"config.json": {"eos_token_id": 9999}}, None, "no token of the vocabulary is 9999"),
        ({"config.json": []}, None, "not a JSON object"),
    ],
)
def test_which_token_ends_a_text(files: dict[str, object], eos: str | int | None, expected: int | str, tmp_path: Path):
    save_backend(tmp_path, SMALL)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    if isinstance(expected, int):
        assert read_hf_tokenizer(tmp_path, eos).eot_id == expected
    else:
        with pytest.raises(DataError, match=expected):
            read_hf_tokenizer(tmp_path, eos)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "damaged JSON"),
        ("[]", "not a JSON object"),
        ("{}", "damaged, or not a tokenizer"),
        ("[" * 100_000, "damaged JSON"),
        ('{"model": {"vocab": {"</s>": 0}}, "added_tokens": [], "decoder": null}', "cannot use"),
        ('{"model": {"vocab": {"</s>": 0}}, "added_tokens": [], "decoder": {"type": "WordPiece"}}', "decoder WordPiece"),
    ],
)
def test_a_bad_file_is_one_line(content: str, says: str, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        read_hf_tokenizer(tmp_path, "</s>")
    assert "\n" not in caught.value.message


def test_damage_anywhere_is_one_line_or_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hf, "probe_texts", lambda *_: iter(["the self", "a\n b"]))  # what is tested is the reading
    whole = SMALL.to_str().encode()
    draw = random.Random(3)
    messages = []
    for number in range(200):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(min(len(whole), (2000, len(whole))[number % 2]))] = draw.choice(
                b'0123456789{}[]",:-tnx\\\xff'
            )
        cut = draw.randrange(len(whole)) if number % 10 == 0 else len(whole)
        (tmp_path / "tokenizer.json").write_bytes(bytes(damaged[:cut]))
        try:
            read_hf_tokenizer(tmp_path, "</s>").encode("the self")
        except PretrainError as error:
            messages.append(error.message)
    assert 100 < len(messages) < 200
    assert not any("\n" in message for message in messages)


def test_nothing_to_read_and_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match=r"holds no tokenizer\.json .*save_pretrained"):
        read_hf_tokenizer(tmp_path)
    save_backend(tmp_path, SMALL)
    monkeypatch.setattr(hf, "LARGEST_DEFINITION", 1000)
    with pytest.raises(DataError, match="more than 1,000 are not read"):
        read_hf_tokenizer(tmp_path, "</s>")
    with pytest.raises(DataError, match=r"comes in by: python -m accel_pretrain\.hf import"):
        load_tokenizer(tmp_path)


def test_a_model_without_a_token_for_all_text_is_refused(tmp_path: Path):
    plan = json.loads(SMALL.to_str()) | {
        "model": {"type": "WordLevel", "vocab": {"</s>": 2, "<s>": 1, "<unk>": 0}, "unk_token": "?"}
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(plan))
    with pytest.raises(DataError, match="cannot encode every text"):
        read_hf_tokenizer(tmp_path, "</s>")


@pytest.mark.slow
def test_a_pattern_of_ours_that_was_tampered_with_is_not_taken(exported: Path, tmp_path: Path):
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes((exported / "tokenizer.json").read_bytes())
    for pattern in (r"\s+|\S+", "(", r"(\s|\S)*x|.", 3, None):
        settings["accel_pretrain"]["pattern"] = pattern
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert read_hf_tokenizer(tmp_path).fingerprint == EXPORTED["gpt2"].fingerprint  # by the pattern in tokenizer.json


def test_random_merges_are_refused(tmp_path: Path):
    plan = json.loads(SMALL.to_str())
    plan["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(plan))
    with pytest.raises(DataError, match="drops merges at random"):
        read_hf_tokenizer(tmp_path, "</s>")


def test_without_the_extra_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'accel_pretrain\[hf\]'"):
        HfTokenizer("x", b"{}", 0)
