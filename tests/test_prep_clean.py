"""Cleaning and filters: what goes, what must stay, and the guard that rather leaves a book as it was."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prep.clean import Cleaning, Filters, clean_code, clean_web, normalise, report_lines, summary_of, unwrap
from prep.documents import Document, Tally
from prep.gutenberg import _marks, strip_gutenberg
from prep.sources import find_sources
from prep.split import TRAIN
from tests.test_prep import Result, documents_of, manifest_of, prep, stories, write_folder, write_jsonl  # noqa: F401

Prep = Callable[..., Result]
SUBJECTS = ["the keeper", "a grey heron", "my brother", "the whole village", "nobody", "an old clock", "rain", "the ferry"]
VERBS = ["waited for", "remembered", "never saw", "walked towards", "was afraid of", "sang about", "had forgotten"]


def book(seed: int, paragraphs: int = 120) -> str:
    """A made-up book, wrapped at 70 characters as typists do."""
    source = random.Random(seed)
    parts = [f"THE LAMP OF NUMBER {seed}", "by A. N. Author"]
    for number in range(paragraphs):
        if number % 20 == 0:
            parts.append(f"\nCHAPTER {number // 20 + 1}")
        sentences = (f"{source.choice(SUBJECTS)} {source.choice(VERBS)} {source.choice(SUBJECTS)}" for _ in range(9))
        parts.append(wrapped(". ".join(sentence.capitalize() for sentence in sentences) + "."))
    return "\n\n".join(parts)


def wrapped(text: str, width: int = 70) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


# Frames in the forms that the library has used; the sentences in them are made up, but for the marks.
HEADER = (
    "The Project Gutenberg EBook of The Lamp, by A. N. Author\n\nThis book may be copied by anyone, anywhere.\n\n"
    "Title: The Lamp\n\nRelease Date: May, 2004 [EBook #99999]\n\nLanguage: English\n\n"
)
TERMS = "\n\n".join(wrapped(f"1.{letter}. Terms of this work that no reader reads. " * 12) for letter in "ABCDEFGH")
LICENSE = f"\n\nSTART: FULL LICENSE\n\nSection 1.  General Terms of Use\n\n{TERMS}\n\nVisit Project Gutenberg for more.\n"
OLD_HEADER = (
    "**The Project Gutenberg Etext of The Lamp, by A. N. Author**\n\nCopyright laws are changing.\n\n"
    "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nWhy is this small print here? You know: lawyers.\n\n"
    f"{TERMS}\n\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n\n"
)
START, END = "*** START OF THE PROJECT GUTENBERG EBOOK THE LAMP ***", "*** END OF THE PROJECT GUTENBERG EBOOK THE LAMP ***"
FRAMES = {
    "modern": (HEADER + START + "\n\n\n", f"\n\n\n{END}\n{LICENSE}"),
    "this": (
        HEADER + "***START OF THIS PROJECT GUTENBERG EBOOK THE LAMP***\n\n\n",
        f"\n\n\nEnd of the Project Gutenberg EBook of The Lamp, by A. N. Author\n\n"
        f"*** END OF THIS PROJECT GUTENBERG EBOOK THE LAMP ***\n\n***** This file should be named lamp.txt *****\n{LICENSE}",
    ),
    "title of two lines": (
        HEADER + "*** START OF THE PROJECT GUTENBERG EBOOK THE LAMP: A TALE IN\nWHICH NOTHING IS LIT ***\n\n\n",
        f"\n\n\n*** END OF THE PROJECT GUTENBERG EBOOK THE LAMP: A TALE IN\nWHICH NOTHING IS LIT ***\n{LICENSE}",
    ),
    "without a closing mark": (HEADER + START + "\n\n\n", ""),
    "without an opening mark": ("", f"\n\n\n{END}\n{LICENSE}"),
    "small print": (OLD_HEADER, "\n\n\nEnd of The Project Gutenberg Etext of The Lamp, by A. N. Author\n"),
    "small print, plain end": (OLD_HEADER, "\n\n\nEnd of Project Gutenberg's The Lamp, by A. N. Author\n\n"),
    "small print in another form": (
        OLD_HEADER.replace(
            "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*", "*END THE SMALL PRINT! FOR E-TEXTS*"
        ),
        "\n\n\n",
    ),
    "small print behind the text": ("", f"\n\n\n{OLD_HEADER.partition('***START')[1]}{OLD_HEADER.partition('***START')[2]}"),
    "two opening marks": (OLD_HEADER + START + "\n\n\n", f"\n\n\n{END}\n{LICENSE}"),
    "Windows line ends": (HEADER.replace("\n", "\r\n") + START + "\r\n\r\n\r\n", f"\r\n\r\n{END}\r\n{LICENSE}"),
}
CREDITS = [
    "Produced by Jane Typist and the Online Distributed\nProofreading Team",
    "E-text prepared by Jane Typist",
    "This etext was produced by Jane Typist <jane@example.org>",
    "Transcribed from the 1899 Example & Co. edition by Jane Typist",
    "[Transcriber's Note: Italics are marked.\n\nSpelling is as in the original, also\nwhere it is odd.]",
    "Note: Project Gutenberg also has an HTML version of this\n      file. See 99999-h.htm",
]


@pytest.mark.parametrize("name", FRAMES)
def test_the_frame_goes_and_the_book_stays(name: str) -> None:
    before, after = FRAMES[name]
    text = book(1)
    (found,), kept = Cleaning("gutenberg").texts(before + text + after)
    assert kept is None
    assert found == text
    assert Cleaning("web").texts(before + text + after)[0] != [clean_web(text)], "it is the frame that went"


@pytest.mark.parametrize("credit", CREDITS, ids=[credit[:20] for credit in CREDITS])
def test_credits_and_notes_go(credit: str) -> None:
    before, after = FRAMES["modern"]
    text = book(2)
    (found,), _ = Cleaning("gutenberg").texts(f"{before}{credit}\n\n\n\n\n{text}{after}")
    assert found == text
    (found,), _ = Cleaning("gutenberg").texts(before + text.replace("CHAPTER 1", f"{credit}\n\nCHAPTER 1") + after)
    assert found.split() == text.split(), "also behind the title"
    late = text.replace("CHAPTER 3", f"CHAPTER 3\n\n{credit}")
    assert Cleaning("gutenberg").texts(before + late + after)[0] == [late], "what stands in the middle is the book's"


def test_a_note_at_the_end_goes() -> None:
    before, after = FRAMES["modern"]
    text = book(3)
    note = "\n\n\nTRANSCRIBER'S NOTES\n\nPage 7: a comma was added.\n\nPage 12: a full stop."
    assert Cleaning("gutenberg").texts(before + text + note + after)[0] == [text]


def test_several_books_in_one_file() -> None:
    books = [book(seed, 40 + seed) for seed in range(5)]
    names = ["modern", "this", "small print", "modern", "title of two lines"]
    text = "\n\n\n".join(FRAMES[name][0] + body + FRAMES[name][1] for name, body in zip(names, books, strict=True))
    assert Cleaning("gutenberg").texts(text) == (books, None)


def test_a_short_story_survives_its_long_license() -> None:
    before, after = FRAMES["modern"]
    text = book(4, 6)
    whole = before + text + after
    assert len(text) < 0.5 * len(whole)
    assert Cleaning("gutenberg").texts(whole) == ([text], None)


def test_a_text_of_another_origin_passes() -> None:
    text = book(5) + "\n\nShe closed the book. THE END"
    assert Cleaning("gutenberg").texts(text) == ([text], None)
    assert _marks("He said it was the end of the Project\nGutenberg press, and the small print was small.") == []


OVERCUT = {
    # The mark stands behind most of the text: what follows it is a tenth.
    "a mark in the wrong place": (f"{book(6, 100)}\n\n{START}\n\n{book(7, 10)}\n\n{END}\n", "% of it would have been removed"),
    "an end too early": (f"{START}\n\n{book(6, 10)}\n\n{END}\n\n{book(7, 100)}", "% of it would have been removed"),
    "a header without a mark": (HEADER + book(6), "Project Gutenberg would still be named at its start or end"),
    "a notice at the end": (
        f"{HEADER}{START}\n\n{book(6)}\n\nThanks to Project Gutenberg.\n\n{END}",
        "Project Gutenberg would still be named at its start or end",
    ),
}


@pytest.mark.parametrize("name", OVERCUT)
def test_the_guard_keeps_the_original(name: str) -> None:
    text, why = OVERCUT[name]
    found = strip_gutenberg(text)
    assert found.texts == [text]
    assert found.kept
    assert found.kept.endswith(why)
    assert strip_gutenberg(FRAMES["modern"][0] + book(6) + FRAMES["modern"][1]).kept is None, "it lets a good one pass"


def test_books_on_the_command_line(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    """Files and their report: before and after, and the ones that were left as they were."""
    books = [book(seed) for seed in range(4)]
    texts = [FRAMES["modern"][0] + books[0] + FRAMES["modern"][1], FRAMES["small print"][0] + books[1], books[2]]
    folder = write_folder(tmp_path / "in", [*texts, OVERCUT["an end too early"][0]])
    words = (folder, "-o", tmp_path / "out", "--val", "0")
    result = prep(*words, "--clean", "gutenberg", "--unit_bytes", "2000")
    assert result.code == 0, result.err
    assert documents_of(tmp_path / "out", TRAIN) == [*books[:3], OVERCUT["an end too early"][0]]
    lines = [line.strip() for line in result.out.splitlines()]
    before, after = sum(map(len, texts)) + len(OVERCUT["an end too early"][0]), 0
    after = sum(map(len, books[:3])) + len(OVERCUT["an end too early"][0])
    assert f"cleaned 4 files: {before / 1e6:.2f} MB before, {after / 1e6:.2f} MB after, {1 - after / before:.1%} less" in lines
    assert any(line.startswith(f"left as it was: {folder}/0003.txt: 9") for line in lines)
    assert f"{len(texts[0]):,} -> {len(books[0]):>12,} bytes  {folder}/0000.txt" in lines
    assert not any("0002.txt" in line for line in lines), "nothing changed in it"
    other = prep(*words, "--overwrite")
    assert "cleaned" not in other.out
    assert documents_of(tmp_path / "out", TRAIN) != [*books[:3], OVERCUT["an end too early"][0]]


# ------------------------------------------------------------------------------------------------- Unicode, white space


@pytest.mark.parametrize(
    ("text", "web", "code"),
    [
        ("a\r\nb\rc\x0bd\x0ce\x85f\u2028g\u2029h", "a\nb\nc\nd\ne\nf\ng\nh", "a\nb\nc\x0bd\x0ce\x85f\u2028g\u2029h"),
        ("cafe\u0301", "caf\u00e9", "cafe\u0301"),
        ("so\u00adft ze\u200bro\ufeff w\u2060j", "soft zero wj", "so\u00adft ze\u200bro\ufeff w\u2060j"),
        ("a\u00a0b\u2009c\u202fd", "a b c d", "a\u00a0b\u2009c\u202fd"),
        ("\u3000段落\u3000と", "\u3000段落\u3000と", "\u3000段落\u3000と"),
        (
            "नमस्\u200dते \U0001f468\u200d\U0001f469",
            "नमस्\u200dते \U0001f468\u200d\U0001f469",
            "नमस्\u200dते \U0001f468\u200d\U0001f469",
        ),
        ("bell\x07 esc\x1b[0m del\x7f", "bell esc[0m del", "bell\x07 esc\x1b[0m del\x7f"),
        ("  a \t  b  \n\tc\t", "a b\nc", "  a \t  b\n\tc"),
        ("a\n\n\n\n\n\nb\n\n\n", "a\n\nb", "a\n\n\nb"),
        ("\n\n  a\n \n \n \nb", "a\n\nb", "  a\n\n\nb"),
    ],
)
def test_forms(text: str, web: str, code: str) -> None:
    assert clean_web(text) == web
    assert clean_code(text) == code


def test_verse_keeps_its_indentation() -> None:
    text = "A line\n    and  another\tone\n\n\n\n\n  third"
    assert Cleaning("gutenberg").texts(text)[0] == ["A line\n    and another one\n\n\n  third"]


SPECIAL = [*"a \t\n\r\x0b\x0c\x85\u2028\u00a0\u3000\u00ad\u200b\ufeff\u0301\u1100\u1161\u212b", "e", "\r\n", "\n\n\n"]


@settings(deadline=None)
@given(st.lists(st.one_of(st.sampled_from(SPECIAL), st.characters(exclude_categories=["Cs"])), max_size=30).map("".join))
@example("a\x1f\u0301")  # what is left out must not keep apart what Unicode joins
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    for clean in (clean_web, clean_code, normalise):
        once = clean(text)
        assert clean(once) == once
    assert "".join(filter(str.isalnum, clean_code(text))) == "".join(filter(str.isalnum, text)), "no letter is lost"


def test_unwrap() -> None:
    prose = (
        "It was a dark night, and the lamp of the harbour had been put out by a man of whom it was said that he was no-\none."
    )
    lines = wrapped("The keeper of the light waited for the ferry until it was late, and then he went home. " * 4)
    verse = "A line of verse\nis short\nand ragged, as you see, but may be long enough to mislead"
    table = "name      one  two\nfirst      11   12\nsecond     21   22\nthird, the last one of them all   31"
    indented = "    " + lines.replace("\n", "\n    ")
    text = "\n\n".join([lines, verse, table, indented, "CHAPTER 1\n", lines])
    found = unwrap(text).split("\n\n")
    assert found[0] == " ".join(lines.split("\n"))
    assert found[1:4] == [verse, table, indented]
    assert unwrap(prose) == prose, "a line of more than a hundred characters was not wrapped"
    assert unwrap(lines.replace(" ", "-")).count("- ") == 0
    whole, _ = Cleaning("gutenberg", unwrap=True).texts(FRAMES["modern"][0] + book(1, 40) + FRAMES["modern"][1])
    assert whole[0].split() == book(1, 40).split()
    assert whole[0].count("\n") < book(1, 40).count("\n") / 2


VERSES = [
    "Shall I walk with thee through fields of May?\nThe road is longer than it was before:\n"
    "And we have little left of all of this day,\nBut what is left of it is a little more;",
    "I followed once the river as it ran and ran\nTo where the hills are high, and all around\n"
    "I heard a crow, and then another black crow",
]


@pytest.mark.parametrize("verse", VERSES)
def test_verse_of_even_lines_is_not_joined(verse: str) -> None:
    assert Cleaning("gutenberg", unwrap=True).texts(verse) == ([verse], None)
    prose = verse[0] + verse[1:].lower()
    assert Cleaning("gutenberg", unwrap=True).texts(prose)[0] == [prose.replace("\n", " ")], "it is the capitals that tell"


SENTENCES = [
    "Produced by the labour of many hands, the wall of the city rose day by day.",
    "Transcribed by the clerk of the court, the words of the prisoner fill forty pages.",
    "Prepared by years of study, she set out.",
    "Illustrations of the original manuscript hung on every wall.",
    "Transcriber's note of hand was found in the drawer, and nobody could read it.",
]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences_that_begin_like_a_credit_stay(sentence: str) -> None:
    before, after = FRAMES["modern"]
    text = f"{sentence}\n\n{book(4)}\n\n{sentence}\n\nIt was over."
    assert Cleaning("gutenberg").texts(before + text + after)[0] == [text]


def test_a_text_without_a_mark_keeps_all_of_its_paragraphs() -> None:
    text = "\n\n".join(
        ["Produced by Jane Typist", "Transcriber's Note: a play", book(5, 20), "TRANSCRIBER'S NOTES\n\nThe end."]
    )
    assert Cleaning("gutenberg").texts(text) == ([text], None)
    before, after = FRAMES["modern"]
    assert len(Cleaning("gutenberg").texts(before + text + after)[0][0]) < len(text) - 60, "the mark makes them credits"


LITERALS = [
    "s = '\u2028'\nt = '\x0c' + '\x0b' + '\x85'",
    's = """a  \n\n\n\n\n  b\t\n"""',
    "cat <<END\n  a  \n\n\n\n\nEND\necho  ",
    'let s = "say \\"hello  \n  world";',
    "x = `a  \n${b}  \n`",
    "t = [[ a  \n b  \n]]",
]


@pytest.mark.parametrize("code", LITERALS)
def test_code_keeps_its_literals(code: str) -> None:
    assert clean_code(code) == code
    around = f"\n\na = 1  \n\n\n\n\n{code}\n"
    assert clean_code(around).startswith(f"a = 1\n\n\n{code.rstrip()}"), "and what is around it is cleaned"
    assert clean_code(clean_code(around)) == clean_code(around)


# --------------------------------------------------------------------------------------------------------------- filters

ODD = {
    "min_chars": (20, "short"),
    "max_chars": (600, "long enough " * 60),
    "min_letters": (0.5, "12 34 -- 56 ++ 78 := 90 a bc " * 3),
    "max_line": (200, "one line of words " * 20),
    "max_repeated": (0.5, "the same line again\n" * 10),
}


@pytest.mark.parametrize("name", ODD)
def test_filters(prep: Prep, tmp_path: Path, name: str) -> None:  # noqa: F811
    limit, odd = ODD[name]
    good = [f"{n}: a document of words\nand of more words, {n} of them" for n in range(10)]
    path = write_jsonl(tmp_path / "in.jsonl", [*good[:5], odd, *good[5:], odd])
    words = (path, "-o", tmp_path / "out", "--val", "0", "--overwrite")
    result = prep(*words, f"--{name}", limit)
    assert result.code == 0, result.err
    assert documents_of(tmp_path / "out", TRAIN) == good
    assert f"left out: 2 by --{name}" in result.out
    assert manifest_of(tmp_path / "out")["prep"]["left_out"] == {name: 2}
    result = prep(*words)
    assert "left out" not in result.out
    assert len(documents_of(tmp_path / "out", TRAIN)) == 12


def test_filters_see_the_clean_text_and_the_whole_document(prep: Prep, tmp_path: Path) -> None:  # noqa: F811
    write_jsonl(tmp_path / "in.jsonl", ["a" + " " * 100 + "b", "a" * 50])
    words = ("-o", tmp_path / "out", "--val", "0", "--overwrite", "--min_chars", 40)
    assert prep(tmp_path / "in.jsonl", *words, "--clean", "web").code == 0
    assert documents_of(tmp_path / "out", TRAIN) == ["a" * 50]
    (tmp_path / "long.txt").write_text("\n".join(stories(100)))
    assert prep(tmp_path / "long.txt", *words, "--unit_bytes", "100").code == 0
    assert documents_of(tmp_path / "out", TRAIN) == ["\n".join(stories(100))]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--min_letters", "50"], "min_letters: a share from 0 to 1, got 50"),
        (["--unwrap"], "unwrap: goes with --clean gutenberg only"),
        (["--clean", "all"], "clean: expected none | web | code | gutenberg, got 'all'"),
        (["--max_expansion", "0"], "max_expansion: at least 1, got 0"),
    ],
)
def test_impossible_wishes(prep: Prep, tmp_path: Path, words: list[str], says: str) -> None:  # noqa: F811
    path = write_jsonl(tmp_path / "in.jsonl", stories(5))
    result = prep(path, "-o", tmp_path / "out", *words)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"error: {says}")


def test_filters_measure_characters_not_bytes() -> None:
    assert Filters(max_chars=3, max_line=3).reason("éé中") is None
    assert Filters(max_chars=2).reason("éé中") == "max_chars"
    assert Filters(min_letters=1.0).reason("é 中\nд") is None


# ---------------------------------------------------------------------------------------------------------------- tally


def test_tallies_add_up_through_json(tmp_path: Path) -> None:
    from prep.config import PrepConfig

    folder = write_folder(tmp_path / "in", [FRAMES["modern"][0] + book(1) + FRAMES["modern"][1], HEADER + book(2), "x"])
    (source,) = find_sources([str(folder)], PrepConfig(clean="gutenberg", min_chars=5))
    total, single = Tally(), Tally()
    for file in source.files:
        for piece in file.reader.pieces(file.path, file.size, 1000):
            tally = Tally()
            assert all(isinstance(document, Document) for document in piece.documents(tally))
            total.add(json.loads(json.dumps(tally.plain())))
            list(piece.documents(single))
    assert total.plain() == single.plain()
    assert report_lines(total) == report_lines(total.plain())
    assert total.left_out == {"min_chars": 1}
    assert [change.kept for change in total.files.values()] == [0, 1, 0]
    summary = summary_of(total)
    assert (summary["files"], summary["left_as_they_were"]) == (3, [f"{folder}/0001.txt"])
    assert summary["bytes_after"] == len(book(1)) + len(HEADER + book(2)) < summary["bytes_before"]
