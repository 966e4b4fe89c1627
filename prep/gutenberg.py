"""``--clean gutenberg``: from a file of Project Gutenberg to the books in it.

Two forms of frame are known. Since 2003 or so: ``*** START OF THE PROJECT GUTENBERG EBOOK ... ***`` and ``*** END OF ...``
(also THIS, and ETEXT). Before: a header that ends with ``*END*THE SMALL PRINT! ...*END*``, or small print behind the
text, and ``End of (the) Project Gutenberg Etext of ...``. Inside the frame, the lines that say who produced or transcribed
the text, notes of the transcriber at either end, and notices about other editions are left out too. "Produced by" and the like
may as well begin a sentence of the author's, so that it takes names behind it, or words that only such lines have. In a text
without any mark nothing is left out. A file may hold several books: each comes out by itself.

**A guard** has the last word, because a mark in the wrong place once cut a Shakespeare to a thousandth: where more than
40 % of a text would go, or Project Gutenberg is still named in the first or last twentieth of a book, the file stays as
it was, and says why. The license of the modern form, 19 kB long, is known by its sections and is no part of the 40 %:
else no short story could be cleaned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

MOST_REMOVED = 0.4
_EDGE = 0.05
_FULL_LICENSE = 26_000  # characters: no license is longer
_KIND = r"(?:e-?\s?book|e-?\s?text)"
_NAME = r"project\s+gutenberg(?:['’]s|\s+of\s+\w+)?"

# A mark runs to the end of its paragraph or to its closing stars: long titles take several lines.
_START = rf"\*{{3}}\s*start\s+of\s+(?:the|this)\s+{_NAME}\s+{_KIND}(?:[^*\n]|\n(?!\s*\n))*\**"
_END = rf"\*{{3}}\s*end\s+of\s+(?:the|this)\s+{_NAME}\s+{_KIND}(?:[^*\n]|\n(?!\s*\n))*\**"
_OLD_END = rf"\**\s*(?:this\s+is\s+the\s+)?end\s+of\s+(?:the\s+|this\s+)?{_NAME}(?:\s+(?:edition|{_KIND}))?\b.*"
_SMALL_START = r"\*{2,}\s*start\s*\**\s*the\s+small\s+print.*"
_SMALL_END = r"\**\s*end\s*\**\s*the\s+small\s+print!?.*"
_MARK = re.compile(
    rf"^[ \t]*(?:(?P<start>{_START})|(?P<end>{_END}|{_OLD_END})|(?P<small>{_SMALL_START})|(?P<begin>{_SMALL_END}))[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_WORDS = re.compile(r"gutenberg|small\s+print", re.IGNORECASE)
_LICENSE = re.compile(r"START:? FULL LICENSE|Section 1\.\s+General Terms of Use|THE FULL PROJECT GUTENBERG.{0,3} LICENSE")
_NAMED = re.compile(r"project\s+gutenberg", re.IGNORECASE)
_PARAGRAPH_END = re.compile(r"\n(?:[ \t]*\n)+")
# Paragraphs at the start of a book that are about the file and not of the book: for certain, and if :func:`_names_people`.
_CREDIT = re.compile(
    r"""\s*[\[(*_=~+|-]*\s*(?:
        (?:this\s+)?e-?\s?(?:text|book)\s+(?:was\s+|is\s+)?(?:first\s+)?
            (?:prepared|produced|created|transcribed|scanned|provided|typed|made|converted|compiled)\b
        | (?:updated\s+editions?|character\s+set\s+encoding|release\s+date|credits|last\s+updated|most\s+recently\s+updated)\s*:
        | (?:editor's\s+)?note:?\s+(?:the\s+)?project\s+gutenberg
        | this\s+file\s+(?:was\s+(?:produced|made|first)|should\s+be\s+named)
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_LIKELY_CREDIT = re.compile(
    r"""\s*[\[(*_=~+|-]*\s*(?:
        (?:produced|(?:text\s+)?prepared|scanned|digitized|proof-?read|typed|html\s+version\s+(?:created\s+|prepared\s+)?)
            (?:\s+(?:and|&)\s+\w+)?\s*by\s
        | transcribed\s+(?:by|from\s+the)\s
        | (?:images?|illustrations?)\s+(?:of\s+the\s+original|(?:are|is)\s+(?:available|generously))
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_CREDIT_WORDS = re.compile(
    r"@|https?:|www\.|\.(?:net|org|com)\b|e-?text|e-?book|\bhtml\b|gutenberg|proof-?read|internet\s+archive|google|volunteer|\bscans?\b"
    r"|\bscanned\b|digital\s+librar|online|generously|\bpgdp",
    re.IGNORECASE,
)
# What stands between names, besides capitals, initials and years.
_BETWEEN_NAMES = frozenset(
    (
        "and",
        "of",
        "the",
        "at",
        "for",
        "from",
        "with",
        "in",
        "on",
        "a",
        "an",
        "its",
        "by",
        "edition",
        "editions",
        "copy",
        "press",
    )
) | {"de", "da", "di", "du", "del", "van", "von", "der", "la", "le", "et", "team"}
# A heading, or a note in brackets: "transcriber's note of hand" is neither.
_NOTE = re.compile(
    r"\s*(?:[*_=~+|-]*\s*(?:the\s+)?transcriber['’]?s?['’]?\s+(?:\w+\s+)?notes?[ \t]*(?:[:.\])*_=~+|—–-]|\n|\Z)"
    r"|[\[(][*_=~+|-]*\s*(?:the\s+)?transcriber['’]?s?['’]?\s+(?:\w+\s+)?notes?\b)",
    re.IGNORECASE,
)
_BLANK = re.compile(r"(?:[ \t]*\n)*")
_CREDITS_WITHIN = 12  # paragraphs at the start
_LONGEST_CREDIT, _LONGEST_NOTE = 800, 4000  # characters
_NOTES_WITHIN = 0.1  # of the text, at the end


class Books(NamedTuple):
    """The books of a file; or the file as it was, and why it was ``kept``."""

    texts: list[str]
    kept: str | None = None


def strip_gutenberg(text: str) -> Books:
    """The books in ``text`` (its line ends are ``\\n``), without the frame. Text without marks passes, but for the guard."""
    found = [_without_notes(text[start:stop]) for start, stop in _bodies(text)] if _marks(text) else [text]
    books = [book for book in found if book.strip()]
    total = len(text.strip())
    removed = total - sum(len(book.strip()) for book in books) - _licenses(text)
    if total and removed > MOST_REMOVED * total:
        return Books([text], f"{removed / total:.0%} of it would have been removed")
    for book in books:
        edge = max(1, int(len(book) * _EDGE))
        if _NAMED.search(book[:edge]) or _NAMED.search(book[-edge:]):
            return Books([text], "Project Gutenberg would still be named at its start or end")
    return Books(books)


def _bodies(text: str) -> Iterator[tuple[int, int]]:
    """Where the books begin and end, by the marks. What stands between an end and the next start belongs to no book."""
    marks = _marks(text)
    begin: int | None = None if any(mark.lastgroup in ("start", "begin") for mark in marks) else 0
    found, half = False, len(text) // 2
    for mark in marks:
        kind = mark.lastgroup
        if kind in ("end", "small"):
            if begin is None and not found and (kind == "end" or mark.start() > half):
                begin = 0  # no start was marked, or only that of small print behind the text
            if begin is not None:
                yield begin, mark.start()
                begin, found = None, True
        elif begin is None or mark.start() - begin < _FULL_LICENSE:
            begin = mark.end()  # a second mark soon after the first: the header had two
        else:  # the end of the book before it was not marked
            yield begin, mark.start()
            begin, found = mark.end(), True
    if begin is not None:
        yield begin, len(text)


def _marks(text: str) -> list[re.Match[str]]:
    """The marks in order. Only lines that name what a mark names are looked at closely: most of a book is not."""
    found: list[re.Match[str]] = []
    stop = 0
    for word in _WORDS.finditer(text) if _may_have_marks(text) else ():
        line = text.rfind("\n", 0, word.start()) + 1
        before = text.rfind("\n", 0, max(0, line - 1)) + 1  # a mark may be wrapped before the word
        for start in (before, line):
            if start >= stop and (mark := _MARK.match(text, start)):
                found.append(mark)
                stop = mark.end()
    return found


def _may_have_marks(text: str) -> bool:
    lowered = text.lower()
    return "gutenberg" in lowered or "small" in lowered


def _licenses(text: str) -> int:
    """How many characters of ``text`` are the modern license, where it is there in full."""
    size = stop = 0
    marks = _marks(text)
    for mark in marks:
        if mark.lastgroup == "end" and mark.start() >= stop and _LICENSE.search(text, mark.end(), mark.end() + 4000):
            later = (other.start() for other in marks if other.lastgroup == "start" and other.start() >= mark.end())
            stop = min(next(later, len(text)), mark.start() + _FULL_LICENSE)
            size += stop - mark.start()
    return size


def _without_notes(book: str) -> str:
    """``book`` without the paragraphs at its two ends that are about the file."""
    kept, at = [], _next_paragraph(book, 0)
    for _ in range(_CREDITS_WITHIN):
        stop = _paragraph_stop(book, at)
        if _NOTE.match(book, at, stop) or (stop - at <= _LONGEST_CREDIT and _is_credit(book[at:stop])):
            at = _next_paragraph(book, _note_stop(book, at, stop))
        else:
            following = _next_paragraph(book, stop)
            kept.append(book[at:following])
            at = following
    book = "".join(kept) + book[at:]
    late = int(len(book) * (1 - _NOTES_WITHIN))
    starts = (match.end() for match in _PARAGRAPH_END.finditer(book, late))
    return book[: next((at for at in starts if _NOTE.match(book, at)), len(book))].rstrip()


def _is_credit(paragraph: str) -> bool:
    if _CREDIT.match(paragraph):
        return True
    begin = _LIKELY_CREDIT.match(paragraph)
    return begin is not None and (_CREDIT_WORDS.search(paragraph) is not None or _names_people(paragraph[begin.end() :]))


def _names_people(text: str) -> bool:
    """Whether ``text`` is a list of names, as no sentence is: each word begins with a capital or a digit, or joins names."""
    words = re.findall(r"[^\W_][\w'’-]*", text)
    return bool(words) and all(word in _BETWEEN_NAMES or not word[0].islower() for word in words)


def _next_paragraph(book: str, at: int) -> int:
    match = _BLANK.match(book, at)
    return match.end() if match else at


def _paragraph_stop(book: str, begin: int) -> int:
    match = _PARAGRAPH_END.search(book, begin)
    return match.start() if match else len(book)


def _note_stop(book: str, begin: int, stop: int) -> int:
    """Where the paragraph, or the bracketed note of several paragraphs that begins with it, is over."""
    if book[begin:stop].lstrip()[:1] == "[" and "]" not in book[begin:stop]:
        closing = book.find("]", stop, stop + _LONGEST_NOTE)
        return closing + 1 if closing >= 0 else stop
    return stop
