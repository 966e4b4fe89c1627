"""Which files a corpus is made of: names, folders and globs, in an order that depends on nothing but their names.

Here is also decided how each file is read: by its suffix, or by ``--format``.
"""

from __future__ import annotations

import atexit
import dataclasses
import glob
import os
import shutil
import stat
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from accel_pretrain.errors import DataError
from accel_pretrain.shards import MANIFEST
from prep import hub
from prep.clean import Cleaning, Filters, cleaned
from prep.columns import ArrowRows, BrokenFile, ParquetRows, SeparatedValues, arrow_problem, parquet_problem
from prep.config import PrepConfig, parse_count
from prep.packed_files import MAGIC, SUFFIXES, Packed
from prep.readers import JsonLines, Reader, SeparatedText, TextReader, WholeText

STDIN = "-"
KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
TABLES = frozenset({"parquet", "arrow"})
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
    ".zip": "unpack it first: unzip",
    ".tar": "unpack it first: tar -xf",
    ".tgz": "unpack it first: tar -xf",
    ".7z": "unpack it first: 7z x",
    ".pdf": "extract its text first: pdftotext",
    ".epub": "extract its text first: pandoc -t plain",
    ".docx": "extract its text first: pandoc -t plain",
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
    """The files behind ``names``, each file once; raises one :class:`DataError` with everything that cannot be read.

    With ``on_error`` skip, a file that cannot be read is one bad document instead. Standard input is read here, to its end,
    and so is an ``hf:`` dataset downloaded or fetched.
    """
    problems: list[str] = []
    seen: set[str] = set()
    sources = []
    for name in names:
        files = []
        try:
            for path, kind in _expand(name, config, problems):
                if (real := os.path.realpath(path)) not in seen:
                    seen.add(real)
                    files += _source_file(path, kind, config, problems)
        except DataError as error:
            problems += error.problems
        sources.append(Source(name, tuple(files)))
    if problems:
        raise DataError(problems)
    return sources


def parse_size(text: str | None) -> int | None:
    """``500M`` or ``2_000_000`` as a number of bytes; raises :class:`ConfigError`."""
    return parse_count("limit", text)


def cleaning_of(config: PrepConfig) -> Cleaning:
    """What ``config`` wants done to each document."""
    filters = Filters(*(getattr(config, item.name) for item in dataclasses.fields(Filters)))
    return Cleaning(config.clean, config.unwrap, filters)


# ------------------------------------------------------------------------------------------------------------ the names


def _expand(name: str, config: PrepConfig, problems: list[str]) -> Iterator[tuple[str, str | None]]:
    """Paths, and the kind of the file where the name or the folder says it."""
    path = os.path.expanduser(name)
    if name == STDIN:
        yield _spooled_input(), None
        return
    if name.startswith(hub.PREFIX) and not os.path.lexists(path):
        yield from _hub_files(name, config)
        return
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
        if hub.is_saved_dataset(match):
            yield from ((file, "arrow") for file in hub.saved_files(match))
        elif os.path.isdir(match):
            yield from ((file, None) for file in _walk(match, config, problems))
        else:
            yield match, None


def _hub_files(name: str, config: PrepConfig) -> Iterator[tuple[str, str]]:
    parsed = hub.HubName.parse(name)
    if config.stream and config.out and not hub.is_saved_dataset(parsed.path):
        for path in hub.fetch(parsed, config.text_column, hub.stream_folder(config.out), parse_size(config.limit)):
            yield path, "jsonl"
        return
    for path in hub.map_style_files(parsed, config.text_column):
        yield path, "arrow"


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
    suffixes = _suffixes_of(config.format)
    found = False
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and _suffix(name)[0] in suffixes:
                found = True
                yield os.path.join(parent, name)
    if not found:
        problems.append(
            f"{folder}: no file in it has a suffix of text ({' '.join(sorted(suffixes))}); "
            f"name other files by a quoted glob, such as '{folder.rstrip('/')}/**/*.xyz'"
        )


def _suffixes_of(format: str) -> frozenset[str]:
    """The suffixes that are taken from a folder."""
    if format in ("auto", "text"):
        return TEXT_SUFFIXES | JSONL_SUFFIXES | ({".parquet"} if format == "auto" else frozenset())
    return frozenset(suffix for suffix, kind in KINDS.items() if kind == format)


def _suffix(path: str) -> tuple[str, str | None]:
    """The suffix that says what a file holds, and the one that says how it is packed."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix not in SUFFIXES:
        return suffix, None
    return os.path.splitext(stem)[1], suffix


def _spooled_input() -> str:
    """Standard input as a file, deleted when this process ends: work is cut into ranges, and input cannot go back."""
    if sys.stdin.isatty():
        raise DataError("-: standard input is the keyboard; pipe a text into it, or name a file")
    folder = tempfile.mkdtemp(prefix="prep-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = os.path.join(folder, "stdin")
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, suffix in MAGIC.items():
        if start.startswith(magic):
            os.rename(path, path + suffix)
            return path + suffix
    return path


# ------------------------------------------------------------------------------------------------------------ the files


def _source_file(path: str, kind: str | None, config: PrepConfig, problems: list[str]) -> list[SourceFile]:
    suffix, packing = _suffix(path)
    if kind is None and config.format == "auto" and suffix in _CANNOT_READ:
        problems.append(f"{path}: {suffix} is not read; {_CANNOT_READ[suffix]}")
        return []
    kind = kind or (KINDS.get(suffix, "text") if config.format == "auto" else config.format)
    found = _size_of(path)
    problem = found if isinstance(found, BrokenFile) else _table_problem(path, kind, config) if kind in TABLES else None
    if isinstance(problem, str) or (problem and config.on_error == "fail"):
        problems.append(problem if isinstance(problem, str) else f"{path}: {problem.reason}")
        return []
    if isinstance(problem, BrokenFile):
        return [SourceFile(path, 1, problem)]
    assert isinstance(found, int)
    return [SourceFile(path, found, cleaned(_reader(kind, packing, config), cleaning_of(config)))]


def _size_of(path: str) -> int | BrokenFile:
    """The size of a file that can be opened, or why it cannot."""
    try:
        found = os.stat(path)
        if stat.S_ISFIFO(found.st_mode):
            return BrokenFile("a pipe, not a file; send its text to standard input, and name - as the source")
        if not stat.S_ISREG(found.st_mode):
            return BrokenFile("cannot be read (not a regular file)")
        with open(path, "rb"):
            return found.st_size
    except OSError as error:
        return BrokenFile(f"cannot be read ({error.strerror})")


def _table_problem(path: str, kind: str, config: PrepConfig) -> str | BrokenFile | None:
    return (parquet_problem if kind == "parquet" else arrow_problem)(path, config.text_column)


def _reader(kind: str, packing: str | None, config: PrepConfig) -> Reader:
    column, largest = config.text_column, config.max_document
    if kind in TABLES:
        return (ParquetRows if kind == "parquet" else ArrowRows)(column, largest)
    text: TextReader
    if kind == "jsonl":
        text = JsonLines(column, largest)
    elif kind in ("csv", "tsv"):
        text = SeparatedValues(column, "\t" if kind == "tsv" else ",", largest)
    elif config.separator:
        text = SeparatedText(config.separator, largest)
    else:
        text = WholeText(largest, keyed=config.dedup != "none")
    return Packed(text, packing, config.max_expansion) if packing else text


def demo_source() -> Source:
    """The Python standard library's own sources, without its tests and installed packages: 10 to 15 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = [path for path in sorted(root.rglob("*.py")) if not left_out.intersection(path.relative_to(root).parts)]
    if not paths:
        raise DataError(f"--demo: there are no .py files in {root}; name a text file of yours instead")
    files = (SourceFile(str(path), path.stat().st_size, WholeText()) for path in paths)
    return Source("python standard library", tuple(files))
