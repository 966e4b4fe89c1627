"""Whatever engine encodes, and whoever learns, the ids are those of tiktoken; and files are cut at documents."""

from __future__ import annotations

import base64
import importlib.metadata
import itertools
import random
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_pretrain.errors import ConfigError, DataError
from accel_pretrain.shards import open_split
from accel_pretrain.tokenizer import GPT2_PATTERN, BpeTokenizer, ByteTokenizer, load_tokenizer
from prep import engines
from prep.engines import (
    CL100K_PATTERN,
    DIFFERING,
    O200K_PATTERN,
    ByteEngine,
    GigatokenEngine,
    TiktokenEngine,
    choose_engine,
    make_engine,
    may_differ,
)
from prep.learn import _with_gigatoken, _with_rustbpe
from prep.split import TRAIN, VAL
from tests.test_prep import (  # noqa: F401 (a fixture)
    Result,
    assert_same_files,
    documents_of,
    manifest_of,
    prep,
    stories,
    write_folder,
    write_jsonl,
)

try:
    importlib.metadata.version("gigatoken")
    has_gigatoken = True
except importlib.metadata.PackageNotFoundError:
    has_gigatoken = False
needs_gigatoken = pytest.mark.skipif(not has_gigatoken, reason="gigatoken is not installed")
PATTERNS = {"gpt2": GPT2_PATTERN, "cl100k": CL100K_PATTERN, "o200k": O200K_PATTERN}


def python_sources(size: int) -> list[str]:
    """Source files of the standard library, and some of their parts: texts that every machine has."""
    texts, found = list[str](), 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if found > size:
            break
        text = path.read_text(encoding="utf-8", errors="ignore").replace("\0", "")
        parts = text.split("\n\n")
        texts += [text, *parts[::3]]
        found += 2 * len(text)
    return texts


@pytest.fixture(scope="session")
def learned() -> dict[bytes, int]:
    """Three thousand ranks, learned from Python and from several scripts, so that merges cross all kinds of characters."""
    pytest.importorskip("rustbpe")
    foreign = [
        engines.PROBE * 3,
        "Ωμέγα здравствуй мир 中文字符 日本語 한국어 ไทย हिन्दी " * 20,
        "don't we'll 1234 --- ==== \t\t\n\n" * 20,
    ]
    return _with_rustbpe([*python_sources(2_000_000), *foreign], 3000)


@pytest.fixture(scope="session", params=PATTERNS)
def tokenizer(request: pytest.FixtureRequest, learned: dict[bytes, int]) -> BpeTokenizer:
    return BpeTokenizer(request.param, learned, PATTERNS[request.param])


@pytest.fixture(scope="session")
def giga(tokenizer: BpeTokenizer, tmp_path_factory: pytest.TempPathFactory) -> GigatokenEngine:
    if not has_gigatoken:
        pytest.skip("gigatoken is not installed")
    folder = tmp_path_factory.mktemp(tokenizer.name)
    tokenizer.save(folder)
    return GigatokenEngine(tokenizer, folder)


_references: dict[str, tiktoken.Encoding] = {}


def expected(tokenizer: BpeTokenizer, text: str) -> list[int]:
    """What tiktoken gives, with the pattern as OpenAI spells it."""
    if tokenizer.fingerprint not in _references:
        _references[tokenizer.fingerprint] = tiktoken.Encoding(
            "reference", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks, special_tokens=tokenizer.specials
        )
    return _references[tokenizer.fingerprint].encode_ordinary(text)


# ------------------------------------------------------------------------------------------------------------ same ids


def test_ids_of_thousands_of_documents(giga: GigatokenEngine, tokenizer: BpeTokenizer) -> None:
    texts = python_sources(3_000_000)
    assert len(texts) > 1500
    assert [text for text in texts if giga.encode(text.encode()).tolist() != expected(tokenizer, text)] == []


# What decides how a text is split: classes of characters, cases, contractions, white space, and what Unicode added lately.
ALPHABET = [
    *"aZ19'-_.!/ \n\t\r", "  ", "\r\n", "'s", "'LL", "é", "e\u0301", "ß", "中", "ー", "한", "\u00a0", "\u2028", "\u0085",
    "\u3000",
    "٣", "½", "Ⅷ", "\U0001f600", "\u200d", "\u0903", "ǅ", "ʰ", "\u1acf", "\U000323b0", "\U00010940", "<|endoftext|>", "\ufffd",
]  # fmt: skip


def test_ids_of_fuzz(giga: GigatokenEngine, tokenizer: BpeTokenizer) -> None:
    source = random.Random(0)
    for _ in range(40_000):
        text = "".join(source.choices(ALPHABET, k=source.randint(1, 24)))
        assert giga.encode(text.encode()).tolist() == expected(tokenizer, text), ascii(text)


@needs_gigatoken
@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60))
def test_ids_of_any_text(text: str) -> None:
    engine = any_engine()
    assert engine.encode(text.encode()).tolist() == expected(engine.tokenizer, text)


_kept: list[GigatokenEngine] = []


def any_engine() -> GigatokenEngine:
    """An engine with ranks that need no learning: pairs of neighbouring bytes."""
    if not _kept:
        tokens = [bytes([byte]) for byte in range(256)]
        tokens += [bytes([first, second]) for first in range(0x80, 0x100) for second in range(0x80, 0xC0)]
        tokens += [bytes([first, second]) for first in range(0x80, 0xC0) for second in b" aA1!\n'"]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        import tempfile

        folder = Path(tempfile.mkdtemp())
        tokenizer = BpeTokenizer("pairs", ranks, GPT2_PATTERN)
        tokenizer.save(folder)
        _kept.append(GigatokenEngine(tokenizer, folder))
    return _kept[0]


@needs_gigatoken
def test_the_control_sees_what_unicode_added() -> None:
    """The code points that are sent to tiktoken do differ: without that, ids would."""
    engine = any_engine()
    differing = [
        code
        for first, last in DIFFERING
        for code in range(first, last + 1)
        for text in [f"{chr(code)}a {chr(code)}1 {chr(code)}! a{chr(code)}"]
        if engine._encode(text.encode()).tolist() != expected(engine.tokenizer, text)
    ]
    assert len(differing) > 1000
    assert all(may_differ(chr(code).encode()) for code in differing)
    for code in differing[::50]:
        text = f"{chr(code)}a {chr(code)}1 {chr(code)}! a{chr(code)}"
        assert engine.encode(text.encode()).tolist() == expected(engine.tokenizer, text)


def test_what_may_differ_is_rare() -> None:
    assert all(may_differ(chr(code).encode()) for first, last in DIFFERING for code in range(first, last + 1))
    common = "naïve “quotes” — Ελλάδα Привет 中文 日本語 ไทย हिन्दी తెలుగు ಕನ್ನಡ 😀 𝒜"
    assert not may_differ(common.encode() * 100)
    assert not may_differ(("word " * 200_000).encode())
    assert not may_differ(b"")


@needs_gigatoken
@pytest.mark.parametrize("run", [" ", "\n", "\t ", "\u00a0"])
def test_a_million_white_spaces_go_the_same_way(run: str) -> None:
    engine = any_engine()
    text = "a" + run * (1_100_000 // len(run)) + "x" + " y"
    with pytest.raises(ValueError):
        engine.tokenizer.encoding.encode_to_numpy(text, disallowed_special=())
    assert may_differ(text.encode())
    assert engine.encode(text.encode()).tolist() == engine.tokenizer.encode(text).tolist()


def test_bytes_are_their_own_ids() -> None:
    engine = make_engine("tiktoken", ByteTokenizer(), Path())
    assert isinstance(engine, ByteEngine)
    data = "bytes \u00e9 😀".encode()
    assert engine.encode(data).tolist() == list(data) == ByteTokenizer().encode(data.decode()).tolist()


# ------------------------------------------------------------------------------------------------------------ choosing


@needs_gigatoken
def test_gigatoken_is_used_where_it_is_proven(tmp_path: Path, tokenizer: BpeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.save(tmp_path)
    assert choose_engine("auto", tokenizer, tmp_path).name == "gigatoken"
    assert choose_engine("tiktoken", tokenizer, tmp_path).name == "tiktoken"
    # Another version is compared first; one that differs is not used.
    monkeypatch.setattr(engines, "PROVEN", frozenset())
    monkeypatch.setattr(engines, "unexpected_differences", lambda: [0x41])
    assert choose_engine("auto", tokenizer, tmp_path).name == "tiktoken"
    with pytest.raises(ConfigError, match=r"^--engine gigatoken: gigatoken .* differ at U\+0041$"):
        choose_engine("gigatoken", tokenizer, tmp_path)
    monkeypatch.setattr(engines, "unexpected_differences", list)
    assert choose_engine("auto", tokenizer, tmp_path).name == "gigatoken"


@needs_gigatoken
def test_a_tokenizer_that_gigatoken_gets_wrong_is_not_given_to_it(tmp_path: Path, learned: dict[bytes, int]) -> None:
    other = BpeTokenizer("other", learned, r"\s+|\S+")
    other.save(tmp_path)
    assert choose_engine("auto", other, tmp_path).name == "tiktoken"
    with pytest.raises(ConfigError, match="does not know the split pattern of tokenizer other"):
        choose_engine("gigatoken", other, tmp_path)
    # Ranks that no merges lead to: gigatoken panics on these, or encodes otherwise.
    tokens = [*(bytes([byte]) for byte in range(256)), b"the", b" the", b"self", b"\xf0\x9f\x98\x80"]
    strange = BpeTokenizer("strange", {token: rank for rank, token in enumerate(tokens)}, GPT2_PATTERN)
    strange.save(tmp_path / "strange")
    assert choose_engine("auto", strange, tmp_path / "strange").name == "tiktoken"


@needs_gigatoken
def test_the_comparison_finds_what_is_known() -> None:
    """Of the exhaustive comparison, a part: the same differences as are written down, and no others."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes([byte]) + after for byte in range(0x80, 0xC0) for after in (b"a", b"A", b"1", b"!", b"\n")]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    import tempfile

    import gigatoken

    path = Path(tempfile.mkdtemp()) / "ranks.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    ours = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    theirs = gigatoken.Tokenizer.from_tiktoken(path, "gpt2", {}).backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "DIFFERING", ((0x12000, 0x10FFFF),))  # to make it short: nothing above, all below
        found = set(engines._compare(ours, theirs))
    known = {code for first, last in DIFFERING for code in range(first, last + 1) if code < 0x12000}
    assert {0x88F, 0xC5C, 0xCDC, 0x10940} <= found <= known


def test_without_gigatoken(prep: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(engines, "_version", lambda package: None)
    write_jsonl(tmp_path / "in.jsonl", stories(20))
    ranks = tmp_path / "a.tiktoken"
    ranks.write_text("".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)))
    result = prep(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--tokenizer", ranks, "--engine", "gigatoken")
    advice = "gigatoken is not installed: pip install 'accel_pretrain[fast]'"
    assert (result.code, result.err) == (2, f"error: --engine gigatoken: {advice}\n")
    assert prep(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--tokenizer", ranks).code == 0


@needs_gigatoken
def test_the_engine_is_no_part_of_a_dataset(prep: Callable[..., Result], tmp_path: Path, learned: dict[bytes, int]) -> None:  # noqa: F811
    BpeTokenizer("mine", learned, GPT2_PATTERN).save(tmp_path / "tok")
    texts = [*stories(300), *python_sources(300_000), "\U000323b0a1 \u1acf!", "  \n" * 50, "a" * 5000]
    write_jsonl(tmp_path / "in.jsonl", texts)
    words = (tmp_path / "in.jsonl", "--tokenizer", tmp_path / "tok", "--unit_bytes", 30_000)
    for engine in ("tiktoken", "gigatoken"):
        result = prep(*words, "-o", tmp_path / engine, "--engine", engine)
        assert result.code == 0, result.err
        assert f"by {engine}" in result.out
    assert_same_files(tmp_path / "tiktoken", tmp_path / "gigatoken")
    assert "already there" in prep(*words, "-o", tmp_path / "tiktoken", "--engine", "gigatoken").out
    reference = BpeTokenizer("mine", learned, GPT2_PATTERN)
    assert TiktokenEngine(reference).encode(b"self").tolist() == expected(reference, "self")


# ------------------------------------------------------------------------------------------------------------- learning


@needs_gigatoken
@pytest.mark.parametrize("size", [300, 1500])
def test_both_trainers_learn_the_same(size: int) -> None:
    pytest.importorskip("rustbpe")
    texts = python_sources(400_000)
    assert _with_gigatoken(texts, size) == _with_rustbpe(texts, size)
    assert _with_gigatoken(texts, size) != _with_rustbpe(texts[::2], size), "a control"


@needs_gigatoken
def test_both_trainers_stop_where_nothing_is_left_to_learn() -> None:
    pytest.importorskip("rustbpe")
    for seed in range(300):
        source = random.Random(seed)
        texts = ["".join(source.choices("abc \n", k=source.randint(0, 30))) for _ in range(source.randint(0, 3))]
        found = _with_gigatoken(texts, 700)
        assert found == _with_rustbpe(texts, 700), texts
        assert len(found) < 700


# ------------------------------------------------------------------------------------------- files, indexes, duplicates


@pytest.mark.parametrize("shards", [None, "1", "900", "20K", "1G"])
@pytest.mark.parametrize("unit_bytes", [700, 50_000])
def test_no_document_crosses_two_files(
    prep: Callable[..., Result],  # noqa: F811
    tmp_path: Path,
    shards: str | None,
    unit_bytes: int,
) -> None:
    texts = [*stories(200), "one long document\n" * 400, *stories(100, seed=1)]
    write_folder(tmp_path / "in", texts)
    more = ["--shards", shards] if shards else []
    result = prep(tmp_path / "in", "-o", tmp_path / "out", "--val", "10%", "--unit_bytes", unit_bytes, *more)
    assert result.code == 0, result.err
    found = {split: documents_of(tmp_path / "out", split) for split in (TRAIN, VAL)}
    assert sorted(found[TRAIN] + found[VAL]) == sorted(texts)
    assert found[TRAIN] == [text for text in texts if text in set(found[TRAIN])], "documents keep their order"
    limit = {None: 10**9, "1": 1, "900": 900, "20K": 20_000, "1G": 10**9}[shards]
    longest = max(len(text.encode()) for text in texts) + 1
    infos = manifest_of(tmp_path / "out")["files"]
    for info in infos:
        ids = np.fromfile(tmp_path / "out" / info["path"], dtype="<u2")
        ends = np.load(tmp_path / "out" / info["index"])
        assert ends.dtype == np.uint64
        assert ends.tolist() == (np.flatnonzero(ids == 256) + 1).tolist()
        assert (info["tokens"], info["documents"]) == (ids.size, ends.size) == (int(ends[-1]), info["documents"])
        assert info["utf8_bytes"] == ids.size - ends.size
        assert info["max_id"] == int(ids.max())
        assert ids.size < limit + longest
    for split in (TRAIN, VAL):
        own = [info for info in infos if info["split"] == split]
        assert all(info["tokens"] >= limit for info in own[:-1])
        names = [f"{split}_{number:06d}.bin" for number in range(1, len(own) + 1)] if shards else [f"{split}.bin"]
        assert [info["path"] for info in own] == names
        assert open_split(tmp_path / "out", split).tokens == sum(info["tokens"] for info in own)


@pytest.mark.parametrize("unit_bytes", [100, 3000, 10**6])
def test_of_equal_documents_the_first_stays(prep: Callable[..., Result], tmp_path: Path, unit_bytes: int) -> None:  # noqa: F811
    texts = stories(60)
    again = [text.replace(" ", "  \n") for text in texts[:30]]  # the same words
    order = [*texts, *again, *stories(20, seed=1), *texts[::-1]]
    write_jsonl(tmp_path / "in.jsonl", order)
    long = tmp_path / "long.txt"
    long.write_text("\n".join(stories(40, seed=2)))
    (tmp_path / "copy.txt").write_text(long.read_text())
    words = (
        tmp_path / "in.jsonl",
        long,
        tmp_path / "copy.txt",
        "-o",
        tmp_path / "out",
        "--unit_bytes",
        unit_bytes,
        "--val",
        "0",
    )
    assert prep(*words, "--dedup", "exact").code == 0
    assert documents_of(tmp_path / "out", TRAIN) == [*texts, *stories(20, seed=1), long.read_text()]
    assert manifest_of(tmp_path / "out")["prep"]["counts"]["duplicates"] == 30 + 60 + 1
    assert prep(*words, "--overwrite").code == 0
    assert len(documents_of(tmp_path / "out", TRAIN)) == len(order) + 2, "a control"


def test_a_document_that_the_tokenizer_fails_on_is_a_bad_one(
    prep: Callable[..., Result],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Panic(BaseException):
        """As the panics of Rust's extensions are."""

    def encode(self: ByteEngine, data: bytes) -> np.ndarray:
        if b"3." in data:
            raise Panic("index out of bounds")
        return np.frombuffer(data, dtype=np.uint8)

    monkeypatch.setattr(ByteEngine, "encode", encode)
    path = write_jsonl(tmp_path / "in.jsonl", ["1.", "2.", "3.", "4."])
    result = prep(path, "-o", tmp_path / "out", "--val", "0")
    says = "the tokenizer fails on it (Panic: index out of bounds); or leave such documents out with --on_error skip"
    assert (result.code, result.err) == (2, f"error: {path}:3: {says}\n")
    assert prep(path, "-o", tmp_path / "out", "--val", "0", "--on_error", "skip").code == 0
    assert documents_of(tmp_path / "out", TRAIN) == ["1.", "2.", "4."]


def test_the_plan_writes_nothing(prep: Callable[..., Result], tmp_path: Path) -> None:  # noqa: F811
    path = write_jsonl(tmp_path / "in.jsonl", stories(500))
    for more in ([], ["--tokenizer", "train:300"]):
        result = prep(path, "-o", tmp_path / "out", "--plan", *more)
        assert result.code == 0, result.err
        assert "1 files, " in result.out
        for word in ("split", "tokens", "disk", "time"):
            assert f"\n  {word} " in result.out
    size = sum(len(text.encode()) + 1 for text in stories(500))
    promised = float(result.out.partition("tokens     about ")[2].split()[0]) * 1e6
    assert 0.8 * size < promised < 1.3 * size
    assert [name.name for name in tmp_path.iterdir()] == ["in.jsonl"]


def test_saved_ranks_load_again(tmp_path: Path, learned: dict[bytes, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BpeTokenizer("mine", learned, GPT2_PATTERN).save(tmp_path)
        assert load_tokenizer(tmp_path).vocab_size == 3001
    with pytest.raises(DataError):
        load_tokenizer(tmp_path / "nowhere")


@needs_gigatoken
@pytest.mark.parametrize(("limit", "sees_its_size"), [("_KEPT", True), ("_RENEWED_AFTER", False)])
def test_giving_memory_back_changes_no_id(monkeypatch: pytest.MonkeyPatch, limit: str, sees_its_size: bool) -> None:
    engine, text, sizes = any_engine(), "Don't we all, 12345 of us?  中文 é", itertools.count(1000, 60)
    monkeypatch.setattr(engines, limit, 100)
    monkeypatch.setattr(engines, "_LOOKED_AFTER", 0)
    monkeypatch.setattr(engines, "memory_in_use", lambda: next(sizes) if sees_its_size else 0)
    engine._renew()
    renewed = 0
    for _ in range(20):
        before = engine._encode
        assert engine.encode(text.encode()).tolist() == expected(engine.tokenizer, text)
        renewed += engine._encode is not before
    assert 5 <= renewed <= 10


def test_a_process_knows_its_size() -> None:
    before = engines.memory_in_use()
    kept = bytearray(b"x" * 50_000_000)
    assert engines.memory_in_use() >= before + 40_000_000 or not before
    del kept
