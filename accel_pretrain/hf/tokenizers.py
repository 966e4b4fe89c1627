"""Tokenizers as the Hugging Face world writes them: ``tokenizer.json`` in and out.

Out: :func:`write_hf_tokenizer` writes a folder that ``AutoTokenizer`` loads without code of ours, and that gives equal ids.
In: :func:`read_hf_tokenizer` makes a :class:`BpeTokenizer` where the file is byte-pair encoding as tiktoken does it (so that
data made with ``--tokenizer gpt2`` fits a GPT-2 that came in from such a folder), and an :class:`HfTokenizer` of all others,
also where a first token is put before texts for a model, which only the file itself can say on the way out.

One convention differs. Here a literal ``<|endoftext|>`` in a text is text; there it is the special token, unless
``split_special_tokens=True`` is given. With that, and for all texts without such a literal, ids are equal.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accel_pretrain.errors import CheckpointError, DataError
from accel_pretrain.hf.byte_level import BYTE_LEVEL, GPT2_SPELLINGS, SPECIAL, byte_level_definition, ranks_of, split_of
from accel_pretrain.hf.probes import first_difference, probe_texts
from accel_pretrain.hf.split_pattern import contested, from_oniguruma, to_oniguruma
from accel_pretrain.tokenizer import (
    DEFINITION_FILE,
    END_OF_TEXT,
    EXTRA_FILES,
    GPT2_PATTERN,
    SETTINGS_FILE,
    BpeTokenizer,
    ByteTokenizer,
    HfTokenizer,
    Tokenizer,
)

SPECIALS_FILE = EXTRA_FILES[1]
OURS = "accel_pretrain"  # the field of tokenizer_config.json with what tokenizer.json has no place for
LARGEST_DEFINITION, LARGEST_SETTINGS = 256 << 20, 16 << 20  # bytes; Gemma 3's tokenizer.json, a large one, has 33 MB
PROBED_TOKENS = 2000

_HOW_TO_CONVERT = "transformers makes a tokenizer.json: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"

# ------------------------------------------------------------------------------------------------------------------- out


def write_hf_tokenizer(tokenizer: Tokenizer, folder: Path, *, context_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer``, and compare what was written with ours.

    Raises :class:`CheckpointError` when any of thousands of probes gets other ids, or does not come back as the same text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    definition, settings = _definition_and_settings(tokenizer)
    settings["model_max_length"] = context_length
    (folder / DEFINITION_FILE).write_bytes(definition)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if isinstance(tokenizer, HfTokenizer):
        for name, content in tokenizer.extras.items():
            (folder / name).write_bytes(_with_end(content, tokenizer.eot) if name == SPECIALS_FILE else content)
    else:  # the other one is that very file
        backend = HfTokenizer(tokenizer.name, definition, tokenizer.eot_id).backend
        _compare(tokenizer, lambda text: backend.encode(text).ids, backend.decode, str(folder))


def check_with_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Compare ``AutoTokenizer.from_pretrained(folder)`` with ours; raises :class:`CheckpointError` when they differ.

    To be called when ``config.json`` is written, too: for some values of its ``model_type`` (qwen2 is one) transformers ignores
    ``tokenizer_class`` and builds a tokenizer with the pattern of that family out of any vocabulary.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise CheckpointError("checking an export needs transformers: pip install 'accel_pretrain[hf]'") from None
    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, split_special_tokens=True)
    except Exception as error:  # anything can come out of there
        raise CheckpointError(f"{folder}: transformers cannot load the tokenizer ({_one_line(error)})") from None
    theirs.model_max_length = 1 << 40  # or else it warns of every long probe
    adds_nothing = not isinstance(tokenizer, HfTokenizer)  # the file of another program may ask for a first token
    decode = theirs.decode if adds_nothing else None
    name = f"{folder}, loaded as {type(theirs).__name__}"
    _compare(tokenizer, lambda text: theirs.encode(text, add_special_tokens=adds_nothing), decode, name)
    if theirs.eos_token_id != tokenizer.eot_id:
        raise CheckpointError(
            f"{folder}: transformers takes {theirs.eos_token_id} for the end of a text, not {tokenizer.eot_id}"
        )


def _compare(
    tokenizer: Tokenizer, encode: Callable[[str], Sequence[int]], decode: Callable[..., str] | None, name: str
) -> None:
    texts = list(probe_texts(_literals(tokenizer)))
    different = first_difference(tokenizer, encode, texts)
    if different is not None:
        ours, theirs = tokenizer.encode(different).tolist()[:8], list(encode(different))[:8]
        raise CheckpointError(f"{name}: the exported tokenizer gives {theirs} where ours gives {ours}, for {different[:40]!r}")
    if decode is None:
        return
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        if decode(ids, skip_special_tokens=False) != tokenizer.decode(ids):
            raise CheckpointError(f"{name}: the exported tokenizer does not give back the text {text[:40]!r}")


def _literals(tokenizer: Tokenizer) -> list[str]:
    """The texts of tokens, evenly from the whole vocabulary, and of all special ones that fit."""
    if isinstance(tokenizer, BpeTokenizer):
        some = itertools.islice(tokenizer.ranks, 0, None, 1 + len(tokenizer.ranks) // PROBED_TOKENS)
        texts = [*itertools.islice(tokenizer.specials, 300), *(token.decode("utf-8", "ignore") for token in some)]
        return [text for text in dict.fromkeys(texts) if text]
    return [END_OF_TEXT]


def _with_end(specials: bytes, eot: str) -> bytes:
    """A ``special_tokens_map.json`` that names ``eot``, which may not be the one that its source had, if it names any."""
    document = _parse(specials, Path(SPECIALS_FILE))
    if "eos_token" not in document or _content(document["eos_token"]) == eot:
        return specials
    return (json.dumps(document | {"eos_token": eot}, indent=2, ensure_ascii=False) + "\n").encode()


def _definition_and_settings(tokenizer: Tokenizer) -> tuple[bytes, dict[str, Any]]:
    if isinstance(tokenizer, HfTokenizer):
        settings = _parse(tokenizer.settings or b"{}", Path(SETTINGS_FILE))
        settings.pop("auto_map", None)  # names code to be executed
        settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        if _content(settings.get("eos_token")) != tokenizer.eot:
            settings["eos_token"] = tokenizer.eot
        return tokenizer.definition, settings
    if isinstance(tokenizer, BpeTokenizer):
        pattern: str | None = tokenizer.pattern
        ranks, specials, eot = tokenizer.ranks, tokenizer.specials, tokenizer.eot
    elif isinstance(tokenizer, ByteTokenizer):
        ranks, pattern = {bytes([byte]): byte for byte in range(256)}, None
        specials, eot = {END_OF_TEXT: tokenizer.eot_id}, END_OF_TEXT
    else:
        raise CheckpointError(f"tokenizer {tokenizer.name}: nothing is known about how to write a {type(tokenizer).__name__}")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eot,
        "eos_token": eot,
        "clean_up_tokenization_spaces": False,
        OURS: {"name": tokenizer.name, "pattern": pattern},
    }
    definition = byte_level_definition(ranks, specials, pattern)
    return (json.dumps(definition, indent=1, ensure_ascii=False) + "\n").encode(), settings


# -------------------------------------------------------------------------------------------------------------------- in


def read_hf_tokenizer(folder: Path, eos: str | int | None = None) -> Tokenizer:
    """The tokenizer in a Hugging Face folder: its ``tokenizer.json``, or the ``vocab.json`` and ``merges.txt`` of GPT-2.

    ``eos`` is the text or the id of the token that ends a text, if the folder does not say so or another one is wanted. Raises
    :class:`DataError` when files are missing or damaged, or when nothing says which token that is.
    """
    path = folder / DEFINITION_FILE
    old = not path.exists()
    definition = _old_definition(folder) if old else _read(path, LARGEST_DEFINITION)
    settings = _read(folder / SETTINGS_FILE, LARGEST_SETTINGS) if (folder / SETTINGS_FILE).exists() else None
    plan, says = _parse(definition, path), _parse(settings or b"{}", folder / SETTINGS_FILE)
    try:
        vocab = plan["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {token: id for id, (token, _) in enumerate(vocab)}
        ids |= {token["content"]: token["id"] for token in plan["added_tokens"]}
        eot = _end_of_text(folder, ids, _content(says.get("eos_token")) if eos is None else eos)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged, or not a tokenizer ({type(error).__name__}: {_one_line(error)})") from None
    extras = {name: _read(folder / name, LARGEST_SETTINGS) for name in EXTRA_FILES if (folder / name).exists()}
    if SPECIALS_FILE in extras:
        _parse(extras[SPECIALS_FILE], folder / SPECIALS_FILE)
    general = HfTokenizer(folder.resolve().name, definition, ids[eot], settings, extras)
    try:
        for text in itertools.islice(probe_texts([eot]), 100):
            general.encode(text)
        if general.backend.num_special_tokens_to_add(is_pair=False):
            return general
        for candidate in _candidates(general.name, plan, says, ids, eot):
            if _same_but_for_unicode_tables(candidate, general):
                return candidate
    except DataError:
        raise
    except Exception as error:  # the library's are bare ones
        raise DataError(f"{path}: cannot encode every text ({_one_line(error)})") from None
    if old:
        raise DataError(f"{folder}: vocab.json and merges.txt are not as GPT-2's, and {_HOW_TO_CONVERT}")
    return general


def _same_but_for_unicode_tables(candidate: Tokenizer, general: HfTokenizer) -> bool:
    """Whether the ids of all probes are equal, leaving out characters of which the two engines know different things."""
    literals = _literals(candidate)
    if first_difference(candidate, general.encode, probe_texts(literals)) is None:
        return True
    leave_out = contested(candidate.pattern) if isinstance(candidate, BpeTokenizer) else frozenset()
    return bool(leave_out) and first_difference(candidate, general.encode, probe_texts(literals, leave_out)) is None


def _candidates(
    name: str, plan: Mapping[str, Any], says: Mapping[str, Any], ids: Mapping[str, int], eot: str
) -> Iterator[BpeTokenizer | ByteTokenizer]:
    """Tokenizers of tiktoken's kind that may be what ``plan`` describes: none if its merges or steps are of another kind."""
    specials = {token["content"]: token["id"] for token in plan["added_tokens"]} | {eot: ids[eot]}
    ranks = ranks_of(plan, ids, specials)
    pattern = split_of(plan.get("pre_tokenizer"))
    if ranks is None or pattern is None:
        return
    if pattern == "":
        if specials == {END_OF_TEXT: 256} and ranks == {bytes([byte]): byte for byte in range(256)}:
            yield ByteTokenizer()
        return
    own = says[OURS] if isinstance(says.get(OURS), dict) else {}
    gpt2s = pattern in (*GPT2_SPELLINGS, to_oniguruma(GPT2_PATTERN))
    for spelling in (own.get("pattern"), GPT2_PATTERN if gpt2s else from_oniguruma(pattern)):
        if isinstance(spelling, str):
            with contextlib.suppress(ValueError):  # tiktoken cannot read it
                yield BpeTokenizer(str(own.get("name", name)), ranks, spelling, specials, eot)


def _end_of_text(folder: Path, ids: Mapping[str, int], wanted: str | int | None) -> str:
    """The text of the token that ends a text: ``wanted``, or the first that one of the model's own files names."""
    for name in ("generation_config.json", "config.json"):
        if wanted is None and (folder / name).exists():
            document = _parse(_read(folder / name, LARGEST_SETTINGS), folder / name)
            wanted = document.get("eos_token_id", (document.get("text_config") or {}).get("eos_token_id"))
            wanted = wanted[0] if isinstance(wanted, list) and wanted else wanted
    if wanted is None and not (folder / DEFINITION_FILE).exists() and END_OF_TEXT in ids:
        wanted = END_OF_TEXT  # GPT-2's old files do not say it
    if wanted is None:
        raise DataError(f"{folder} does not say which token ends a text; name it: --eos TOKEN")
    found = wanted if isinstance(wanted, str) else next((token for token, id in ids.items() if id == wanted), "")
    if found not in ids:
        raise DataError(f"{folder}: no token of the vocabulary is {wanted!r}, which is to end a text; name one: --eos TOKEN")
    return found


def _old_definition(folder: Path) -> bytes:
    """What ``tokenizer.json`` would be for a ``vocab.json`` and a ``merges.txt`` of GPT-2's kind."""
    names = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # the second as OpenAI called them
    found = ((folder / one, folder / other) for one, other in names if (folder / one).exists() and (folder / other).exists())
    vocab_path, merges_path = next(found, (None, None))
    if vocab_path is None or merges_path is None:
        raise DataError(f"{folder} holds no tokenizer.json (nor vocab.json and merges.txt): {_HOW_TO_CONVERT}")
    vocab = _parse(_read(vocab_path, LARGEST_DEFINITION), vocab_path)
    try:
        lines = _read(merges_path, LARGEST_DEFINITION).decode().split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{merges_path}: not UTF-8 text") from None
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    pretokenizer = {**BYTE_LEVEL, "use_regex": True}
    added = [{"id": vocab[END_OF_TEXT], "content": END_OF_TEXT, **SPECIAL}] if END_OF_TEXT in vocab else []
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    plan = {"version": "1.0", "added_tokens": added, "pre_tokenizer": pretokenizer, "decoder": BYTE_LEVEL, "model": model}
    return json.dumps(plan).encode()


# ------------------------------------------------------------------------------------------------------------ small things


def _content(token: object) -> str | None:
    """The text of a token that is written as a string, or as an object with its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read(path: Path, largest: int) -> bytes:
    try:
        if path.stat().st_size > largest:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; more than {largest:,} are not read")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged JSON ({_one_line(error)})") from None
    if not isinstance(document, dict):
        raise DataError(f"{path}: not a JSON object")
    return document


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
