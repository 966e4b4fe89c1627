"""Several datasets read as one: how they are written in a config, and whose turn each sample is. Torch-free.

``[data/web@0.7, data/code@0.3]`` takes seven samples of ten from one and three from the other; without weights, each dataset
gets its share of all tokens. Which dataset sample *i* comes from is a function of *i* alone, as everything about the data is: a
cycle of turns, as long as the weights need it, begins again and again. After any number of samples, each dataset has had its
share of them to within one sample.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from accel_pretrain.errors import ConfigError, DataError
from accel_pretrain.shards import TokenSplit, open_split
from accel_pretrain.token_formats import token_files

LONGEST_CYCLE = 1 << 16
_BY_SIZE = 10_000  # into so many shares the samples are divided where the sizes of the datasets are the weights


# ------------------------------------------------------------------------------------------------------ as it is written


def parse_entry(entry: Path) -> tuple[Path, Fraction | None]:
    """``DIR@0.7`` as the path and the weight; ``DIR`` has none."""
    found = re.fullmatch(r"(.+)@(\d+(?:\.\d*)?|\.\d+)", str(entry), flags=re.DOTALL)
    return (Path(found[1]), Fraction(found[2])) if found else (entry, None)


def paths_of(given: Path | tuple[Path, ...]) -> list[Path]:
    """The paths in what a config names, without weights."""
    return [given] if isinstance(given, Path) else [parse_entry(entry)[0] for entry in given]


def are_there(given: Path | tuple[Path, ...]) -> bool:
    """Whether there are files, or a dataset, for everything that a config names."""
    return all(path.is_dir() or token_files(path) for path in paths_of(given))


def mixture_problems(entries: Sequence[Path], *, weighted: bool) -> list[str]:
    """What is wrong with a list of datasets as it is written."""
    parsed = [parse_entry(entry) for entry in entries]
    given = [weight for _, weight in parsed if weight is not None]
    paths = [path for path, _ in parsed]
    problems = []
    if not entries:
        problems.append("the list is empty; name a dataset")
    if twice := [path for path in dict.fromkeys(paths) if paths.count(path) > 1]:
        problems.append(f"{twice[0]} stands twice; name it once, and add up its weights")
    if given and not weighted:
        problems.append(f"{entries[0]}: every dataset is read once, so a weight has no meaning; leave @ and the numbers out")
    elif given and len(given) < len(parsed):
        without = next(path for path, weight in parsed if weight is None)
        problems.append(f"{without} has no weight and others have; write {without}@0.5, say, or leave all weights out")
    elif any(weight == 0 for weight in given):
        problems.append("a weight of 0 reads nothing of that dataset; leave it out")
    elif given and sum(whole(given)) > LONGEST_CYCLE:
        problems.append(f"weights as fine as these do not come round within {LONGEST_CYCLE:,} samples; use at most four digits")
    return problems


def whole(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportions of ``weights``: 7 and 3 for 0.7 and 0.3."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    numbers = [int(weight * scale) for weight in weights]
    divisor = math.gcd(*numbers)
    return tuple(number // divisor for number in numbers)


def weights_by_size(tokens: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers in the proportions of sizes, rounded to one in ten thousand; none is 0."""
    total = sum(tokens)
    return whole([Fraction(max(1, round(_BY_SIZE * size / total))) for size in tokens])


# ------------------------------------------------------------------------------------------------------------- as it is


def open_data(
    given: Path | tuple[Path, ...], split: str, dtype: str | None = None, *, mixed: bool = False,
    end: Sequence[float] | None = None, end_tokens: int = 0,
) -> TokenSplit:  # fmt: skip
    """Open what a config names: one dataset, or several as one; ``mixed``: with the weights that are written or follow.

    These move to those in ``end`` over the first ``end_tokens``.
    """
    if isinstance(given, Path):
        if not given.exists() and re.search(r"@[\d.]+(,|$)", str(given)):
            raise ConfigError(f"data: {given} does not exist; several datasets with weights are written '[DIR@0.7, DIR@0.3]'")
        return open_split(given, split, dtype)
    entries = [parse_entry(entry) for entry in given]
    parts = [open_split(path, split, dtype) for path, _ in entries]
    if len(parts) == 1:
        return parts[0]
    weights = [weight for _, weight in entries if weight is not None]
    if not mixed:
        return join(parts)
    begin = whole(weights) if weights else weights_by_size([part.tokens for part in parts])
    goal = whole([Fraction(str(weight)) for weight in end]) if end else ()
    return join(parts, begin, goal, end_tokens if end else 0)


def join(
    parts: Sequence[TokenSplit], weights: tuple[int, ...] = (), end_weights: tuple[int, ...] = (), end_tokens: int = 0
) -> TokenSplit:
    """Several splits as one, whose files are those of all; with ``weights``, a mixture. One tokenizer, or DataError."""
    known = [part for part in parts if part.tokenizer]
    for part in known:
        ours, theirs = known[0].tokenizer or {}, part.tokenizer or {}
        if ours["fingerprint"] != theirs["fingerprint"]:
            raise DataError(
                f"{part.source} was made with tokenizer {theirs['name']}, {known[0].source} with {ours['name']}; make it "
                f"again with the same: python -m prep.tokenize SRC... --tokenizer {known[0].tokenizer_path}"
            )
    prints = [part.fingerprint for part in parts]
    if weights:
        prints = ["mixture", *(f"{weight} {own}" for weight, own in zip(weights, prints, strict=True))]
    if end_weights:
        prints.append(f"to {end_weights} over {end_tokens}")
    ends = [part.document_ends for part in parts]
    return TokenSplit(
        source=", ".join(part.source for part in parts),
        files=tuple(file for part in parts for file in part.files),
        max_id=max(part.max_id for part in parts),
        fingerprint=hashlib.sha256("\n".join(prints).encode()).hexdigest(),
        utf8_bytes=_sum([part.utf8_bytes for part in parts]),
        documents=_sum([part.documents for part in parts]),
        document_ends=None if None in ends else tuple(end for own in ends for end in own or ()),
        tokenizer=known[0].tokenizer if known else None,
        tokenizer_path=known[0].tokenizer_path if known else None,
        parts=tuple(parts) if weights else (),
        weights=weights,
        end_weights=end_weights,
        end_tokens=end_tokens,
    )


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


# -------------------------------------------------------------------------------------------------------- whose turn it is


class Turns:
    """Which part of a mixture each sample comes from, and the how many-th of that part it is."""

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights = np.array(weights, dtype=np.int64)
        self.cycle = cycle(weights)
        self._before = np.empty_like(self.cycle)
        for part in range(len(weights)):
            own = self.cycle == part
            self._before[own] = np.arange(own.sum())

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each sample number its part, and how many samples of that part come before it: int64, of the same shape."""
        rounds, places = np.divmod(numbers, self.cycle.size)
        parts = self.cycle[places]
        return parts, rounds * self.weights[parts] + self._before[places]

    def counts(self, samples: int) -> list[int]:
        """How many of the first ``samples`` each part gives."""
        rounds, rest = divmod(samples, self.cycle.size)
        return (rounds * self.weights + np.bincount(self.cycle[:rest], minlength=self.weights.size)).tolist()


def cycle(weights: Sequence[int]) -> np.ndarray:
    """One round of turns: part *p* has ``weights[p]`` of them, and never strays from its share of a prefix by a whole turn.

    It is the solution of the chairman assignment problem (Tijdeman 1980): of those that are owed enough by now, the one that
    would be first to be owed too much. With k parts nobody strays by more than 1 - 1 / (2k - 2). All of it in whole numbers.
    """
    total, count = sum(weights), len(weights)
    if count == 1:
        return np.zeros(total, dtype=np.int64)
    slack = 2 * count - 2
    common = math.lcm(*weights)
    pace = [common // weight for weight in weights]
    had = [0] * count
    turns = np.empty(total, dtype=np.int64)
    for turn in range(total):
        owed = [slack * (weight * (turn + 1) - total * had[part]) for part, weight in enumerate(weights)]
        due = (part for part in range(count) if owed[part] >= total)
        chosen = min(due, key=lambda part: ((slack - 1) * total - owed[part]) * pace[part])
        had[chosen] += 1
        turns[turn] = chosen
    return turns
