"""Which files a corpus is made of: names, folders and globs, in an order that depends on nothing but their names."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from accel_pretrain.errors import DataError
from accel_pretrain.shards import MANIFEST
from prep.config import PrepConfig
from prep.readers import JsonLines, Reader, SeparatedText, WholeText

JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
# What is taken from a folder. A file named in full, or matched by a glob, is taken whatever its suffix.
TEXT_SUFFIXES = frozenset(
    (
        *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".html", ".css", ".sql", ".sh"),
        *(".py", ".pyi", ".js", ".ts", ".jsx", ".tsx", ".java", ".kt", ".scala", ".go", ".rs", ".swift"),
        *(".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".rb", ".php", ".hs", ".ml", ".lua", ".jl", ".r"),
    )
)
_CANNOT_READ = {
    ".gz": "unpack it first: gunzip -k",
    ".zst": "unpack it first: zstd -d",
    ".xz": "unpack it first: xz -dk",
    ".bz2": "unpack it first: bunzip2 -k",
    ".zip": "unpack it first: unzip",
    ".tar": "unpack it first: tar -xf",
    ".parquet": "write its text as .jsonl first",
    ".pdf": "extract its text first: pdftotext",
    ".json": "with one object per line add --format jsonl, as plain text add --format text",
}


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus, and how it is read."""

    path: str
    size: int
    reader: Reader


@dataclass(frozen=True)
class Source:
    """One source as it was named, and the files that it stands for."""

    name: str
    files: tuple[SourceFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def find_sources(names: Sequence[str], config: PrepConfig) -> list[Source]:
    """The files behind ``names``, each file once; raises one :class:`DataError` with everything that cannot be read."""
    problems: list[str] = []
    seen: set[str] = set()
    sources = []
    for name in names:
        files = []
        for path in _expand(name, config, problems):
            if (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                files += _source_file(path, config, problems)
        sources.append(Source(name, tuple(files)))
    if problems:
        raise DataError(problems)
    return sources


def _expand(name: str, config: PrepConfig, problems: list[str]) -> Iterator[str]:
    path = os.path.expanduser(name)
    if os.path.lexists(path):
        matches = [path]
    elif glob.has_magic(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            problems.append(f"{name}: no file matches this pattern below {os.path.abspath(_fixed_part(path))}")
    else:
        problems.append(f"{name}: {os.path.abspath(path)} does not exist; name a text file, a folder or a quoted glob")
        return
    for match in matches:
        yield from _walk(match, config, problems) if os.path.isdir(match) else [match]


def _fixed_part(pattern: str) -> str:
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
    return pattern or "."


def _walk(folder: str, config: PrepConfig, problems: list[str]) -> Iterator[str]:
    """The text files below ``folder``, sorted; hidden ones and linked folders are left out."""
    real = Path(folder).resolve()
    if config.out and config.out.resolve().is_relative_to(real):
        problems.append(
            f"-o {config.out}: lies inside the input folder {folder}, so that the next run would read its own output; "
            f"put it elsewhere, for example -o {real}-tokens"
        )
        return
    if os.path.exists(os.path.join(folder, MANIFEST)):
        problems.append(f"{folder} is a token dataset, not text; name the text that it was made from")
        return
    suffixes = JSONL_SUFFIXES if config.format == "jsonl" else TEXT_SUFFIXES | JSONL_SUFFIXES
    found = False
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                found = True
                yield os.path.join(parent, name)
    if not found:
        problems.append(
            f"{folder}: no file in it has a suffix of text ({' '.join(sorted(suffixes))}); "
            f"name other files by a quoted glob, such as '{folder.rstrip('/')}/**/*.xyz'"
        )


def _source_file(path: str, config: PrepConfig, problems: list[str]) -> list[SourceFile]:
    suffix = os.path.splitext(path)[1].lower()
    if config.format == "auto" and suffix in _CANNOT_READ:
        problems.append(f"{path}: {suffix} is not read; {_CANNOT_READ[suffix]}")
        return []
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError(2, "not a regular file")
        with open(path, "rb"):
            size = os.stat(path).st_size
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
        return []
    return [SourceFile(path, size, _reader(suffix, config))]


def _reader(suffix: str, config: PrepConfig) -> Reader:
    if config.format == "jsonl" or (config.format == "auto" and suffix in JSONL_SUFFIXES):
        return JsonLines(config.text_column)
    return SeparatedText(config.separator) if config.separator else WholeText()


def demo_source() -> Source:
    """The Python standard library's own sources, without its tests and installed packages: 10 to 15 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = [path for path in sorted(root.rglob("*.py")) if not left_out.intersection(path.relative_to(root).parts)]
    if not paths:
        raise DataError(f"--demo: there are no .py files in {root}; name a text file of yours instead")
    files = (SourceFile(str(path), path.stat().st_size, WholeText()) for path in paths)
    return Source("python standard library", tuple(files))
