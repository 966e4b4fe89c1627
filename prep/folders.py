"""What stands behind a folder or a pattern that was named as a source."""

from __future__ import annotations

import fnmatch
import glob
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from prep.packed_files import SUFFIXES


def matches(pattern: str) -> list[str]:
    """What a pattern stands for, sorted. As a folder does, ``**`` leaves out what is hidden, and follows no linked folder."""
    fixed, parts = Path(fixed_part(pattern)), Path(pattern).parts
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    wild = parts[len(fixed.parts) :]
    if wild[-1] == "**":
        wild = (*wild, "*")
    found = fixed.glob(os.path.join(*wild))
    if wild[-2:] == ("**", "*"):  # everything, of which the folders are no more than their files
        found = (path for path in found if not path.is_dir())
    shown = any(part.startswith(".") for part in wild)
    below = ((path, path.parts[len(fixed.parts) :]) for path in found)
    return sorted({str(path) for path, names in below if shown or not any(name.startswith(".") for name in names)})


def fixed_part(pattern: str) -> str:
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
    return pattern or "."


def text_files(folder: str, suffixes: Collection[str]) -> Iterator[str]:
    """The files below ``folder`` with one of ``suffixes``, also packed, sorted; then the folders in it that cannot be read.

    What is left out is said on stderr, in a line, unless nothing was found.
    """
    closed: list[str] = []
    left_out: Counter[str] = Counter()
    found = False
    for parent, folders, files in os.walk(folder, onerror=lambda error: closed.append(str(error.filename))):
        hidden = [name for name in [*folders, *files] if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        left_out.update({"hidden": len(hidden), "linked folders": len(linked)})
        for name in sorted(files):
            if name.startswith("."):
                continue
            suffix, _ = suffixes_of(name)
            if suffix in suffixes:
                found = True
                yield os.path.join(parent, name)
            else:
                left_out[suffix or "without a suffix"] += 1
    yield from closed
    if found and +left_out:
        print(_left_out(folder, left_out), file=sys.stderr, flush=True)


def _left_out(folder: str, counts: Counter[str], most: int = 8) -> str:
    """One line about the files of a folder that are not read."""
    named = [f"{count:,} {what}" for what, count in counts.most_common(most) if count]
    named += [f"{len(+counts) - most} more kinds"] if len(+counts) > most else []
    suffixes = [what for what, _ in counts.most_common() if what.startswith(".")]
    example = f", such as '{folder.rstrip('/')}/**/*{suffixes[0]}'" if suffixes else ""
    return f"note: {folder}: left out {', '.join(named)}; to read more, name it, or use a quoted glob{example}"


def suffixes_of(path: str) -> tuple[str, str | None]:
    """The suffix that says what a file holds, and the one that says how it is packed."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix not in SUFFIXES:
        return suffix, None
    return os.path.splitext(stem)[1], suffix


def own_output(name: str, out: Path | None) -> str | None:
    """Why a source, a folder or a pattern, would hold the dataset in ``out``; None if it does not."""
    if out is None:
        return None
    real = os.path.realpath(name)
    if os.path.isdir(name) and Path(os.path.realpath(out)).is_relative_to(real):
        where, example = f"lies inside the input folder {name}", f", for example -o {real}-tokens"
    elif not os.path.lexists(name) and glob.has_magic(name) and fnmatch.fnmatch(os.path.abspath(out), os.path.abspath(name)):
        where, example = f"is one of the files that {name} stands for", ""
    else:
        return None
    return f"-o {out}: {where}, so that the next run would read its own output; put it elsewhere{example}"
