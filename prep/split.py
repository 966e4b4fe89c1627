"""Which documents are held out for validation.

A document belongs to the val split when the hash of its content is below a threshold. Equal documents therefore never
end up on both sides, and documents that are added later move no old one. Where that cannot give both splits, because
the corpus is too small, :func:`choose_split` adds the fewest exceptions that do.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from accel_pretrain.errors import DataError
from prep.documents import BadDocument, Document, digest_of
from prep.units import Unit, pack

TRAIN, VAL = "train", "val"
_WINDOW = 1 << 20


@dataclass(frozen=True)
class SplitRule:
    """Below ``threshold`` (of 2**64) is val, but for single digests; ``tail`` cuts that share off an only document."""

    threshold: int = 0
    to_val: frozenset[int] = frozenset()
    to_train: frozenset[int] = frozenset()
    tail: float | None = None

    def place(self, document: Document) -> Iterator[tuple[str, Document]]:
        """The document with its split, or its two halves with theirs."""
        if self.tail is None:
            yield self.split_of(document.digest), document
            return
        cut = cut_tail(document.data, len(document.data) - max(1, round(len(document.data) * self.tail)))
        for split, part in ((TRAIN, document.data[:cut]), (VAL, document.data[cut:])):
            yield split, Document(part, digest_of(part))

    def split_of(self, digest: int) -> str:
        below = digest < self.threshold and digest not in self.to_train
        return VAL if below or digest in self.to_val else TRAIN

    def key(self) -> str:
        """A text that is the same for equal rules, in every process."""
        return f"{self.threshold} {sorted(self.to_val)} {sorted(self.to_train)} {self.tail}"

    def describe(self) -> str:
        if self.tail is not None:
            return f"the only document, cut at a paragraph {self.tail:.2%} before its end"
        exceptions = len(self.to_val) + len(self.to_train)
        why = f", with {exceptions} exceptions so that neither split is empty" if exceptions else ""
        return "blake2b-64 of the content" + why


def choose_split(units: Sequence[Unit], share: float) -> tuple[SplitRule, list[Unit]]:
    """The rule that gives both splits, and the units as it wants them cut.

    Reads documents until one of each split is found; raises :class:`DataError` when there are none, or no two that
    differ. Documents that are not valid text are passed over here: the workers report them.
    """
    if share == 0:
        return SplitRule(), list(units)
    rule = SplitRule(threshold=int(share * 2**64))
    sizes: dict[int, int] = {}
    documents, found = 0, set[str]()
    for digest, size, begins in _survey(units):
        sizes[digest] = sizes.get(digest, 0) + size
        documents += begins
        found.add(rule.split_of(digest))
        if len(found) == 2:
            return rule, list(units)
    if documents == 0:
        raise DataError(_first_problem(units) or "no text: every file is empty")
    if documents == 1:
        return _cut_only_document(units, share)
    if len(sizes) == 1:
        raise DataError("all documents are the same text, so none can be held out; use --val_file FILE or --val 0")
    return (_with_val(rule, sizes, share) if VAL not in found else _with_train(rule, sizes)), list(units)


def _survey(units: Sequence[Unit]) -> Iterator[tuple[int, int, bool]]:
    """Digest and size of every document, or part of one, and whether it is a whole one or the last part."""
    for unit in units:
        for piece in unit.pieces:
            if piece.digest is not None:
                yield piece.digest, piece.size, piece.ends
                continue
            for document in piece.documents():
                if isinstance(document, Document) and not document.is_empty:
                    yield document.digest, len(document.data), True


def _with_val(rule: SplitRule, sizes: dict[int, int], share: float) -> SplitRule:
    """The documents of lowest hash that together make the share, leaving out what is half of the corpus or more."""
    total, taken, chosen = sum(sizes.values()), 0, set[int]()
    for digest in sorted(sizes):
        if taken < share * total and taken + sizes[digest] <= total / 2:
            chosen.add(digest)
            taken += sizes[digest]
    smallest = min(sizes, key=lambda digest: (sizes[digest], digest))
    return dataclasses.replace(rule, to_val=frozenset(chosen or {smallest}))


def _with_train(rule: SplitRule, sizes: dict[int, int]) -> SplitRule:
    largest = max(sizes, key=lambda digest: (sizes[digest], digest))
    return dataclasses.replace(rule, to_train=frozenset({largest}))


# --------------------------------------------------------------------------------------------------- an only document


def cut_tail(data: bytes, target: int) -> int:
    """A place near ``target`` where ``data`` can be cut in two: after a paragraph, else a line, a word, a character."""
    target = min(target, len(data.rstrip()) - 1)
    reach = max(1, min(target, len(data) - target) // 2)
    for boundary in (b"\n\n", b"\n", b" "):
        before = data.rfind(boundary, max(0, target - reach - len(boundary)), target)
        for at in (data.find(boundary, target, target + reach), before):
            cut = at + len(boundary)
            if at >= 0 and data[:cut].strip() and data[cut:].strip():
                return cut
    cut = target
    while cut > 0 and data[cut] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    if not data[:cut].strip():
        raise DataError(f"the only document has {len(data)} bytes, too few for two splits; add text, or use --val 0")
    return cut


def _cut_only_document(units: Sequence[Unit], share: float) -> tuple[SplitRule, list[Unit]]:
    pieces = [piece for unit in units for piece in unit.pieces if piece.digest is not None]
    if not pieces:
        return SplitRule(tail=share), list(units)
    begin, end = pieces[0].start, pieces[-1].stop
    target = end - max(1, round((end - begin) * share))
    low, high = max(begin, target - _WINDOW), min(end, target + _WINDOW)
    cut = low + cut_tail(pieces[0]._replace(start=low, stop=high).read(), target - low)
    largest = max(unit.size for unit in units)
    train = [piece._replace(stop=min(piece.stop, cut), ends=piece.stop >= cut) for piece in pieces if piece.start < cut]
    # The two halves are two documents: with one key, the second would be a repetition of the first.
    key = hashlib.blake2b(pieces[0].key, digest_size=len(pieces[0].key)).digest() if pieces[0].key else None
    val = [piece._replace(start=max(piece.start, cut), key=key) for piece in pieces if piece.stop > cut]
    others = [piece for unit in units for piece in unit.pieces if piece.digest is None]  # empty files, for the count
    return SplitRule(tail=share), [*pack([*train, *others], largest, TRAIN), *pack(val, largest, VAL)]


def _first_problem(units: Sequence[Unit]) -> str | None:
    """The first document that is not valid text, in a corpus in which nothing else was found."""
    for unit in units:
        for document in unit.documents():
            if isinstance(document, BadDocument):
                return document.problem
    return None
