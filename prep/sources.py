"""Which files a corpus is made of: names, folders and globs, in an order that depends on nothing but their names.

Here is also decided how each file is read: by its suffix, or by ``--format``.
"""

from __future__ import annotations

import atexit
import dataclasses
import glob
import hashlib
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
from prep.folders import fixed_part, matches, own_output, suffixes_of, text_files
from prep.journal import work_folder
from prep.packed_files import MAGIC, Packed
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
    origin: str = ""  # of a stream: what changes when the text behind it does

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
        streamed = config.stream and name.startswith(hub.PREFIX) and files
        sources.append(Source(name, tuple(files), hub.origin_of(files[-1].path) if streamed else ""))
    if problems:
        raise DataError(problems)
    return sources


def refuse_own_output(config: PrepConfig) -> None:
    """Raises :class:`DataError` when the next run would read what this one writes; looks at no file."""
    names = [os.path.expanduser(name) for name in [*config.sources, *config.val_file]]
    if problems := [problem for name in names if (problem := own_output(name, config.out))]:
        raise DataError(problems)


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
        yield _spooled_input(config), None
        return
    if name.startswith(hub.PREFIX) and not os.path.lexists(path):
        yield from _hub_files(name, config)
        return
    if os.path.lexists(path):
        found = [path]
    elif glob.has_magic(path):
        found = matches(path)
        if not found:
            problems.append(f"{name}: no file matches this pattern below {os.path.abspath(fixed_part(path))}")
    else:
        problems.append(f"{name}: {os.path.abspath(path)} does not exist; name a text file, a folder or a quoted glob")
        return
    for match in found:
        if hub.is_saved_dataset(match):
            yield from ((file, "arrow") for file in hub.saved_files(match))
        elif os.path.isdir(match):
            yield from ((file, None) for file in _walk(match, config, problems))
        else:
            yield match, None


def _hub_files(name: str, config: PrepConfig) -> Iterator[tuple[str, str]]:
    parsed, limit = hub.HubName.parse(name), parse_size(config.limit)
    if config.stream and not hub.is_saved_dataset(parsed.path):
        if config.plan:
            folder, limit = Path(_temporary_folder()), min(limit or hub.STREAM_FILE_BYTES, hub.STREAM_FILE_BYTES)
        else:
            assert config.out
            folder = hub.stream_folder(config.out)
        for path in hub.fetch(parsed, config.text_column, folder, limit):
            yield path, "jsonl"
        return
    for path in hub.map_style_files(parsed, config.text_column):
        yield path, "arrow"


def _walk(folder: str, config: PrepConfig, problems: list[str]) -> Iterator[str]:
    """The text files below ``folder``, sorted, and folders in it that cannot be read."""
    if problem := own_output(folder, config.out):
        problems.append(problem)
        return
    if os.path.exists(os.path.join(folder, MANIFEST)):
        problems.append(f"{folder} is a token dataset, not text; name the text that it was made from")
        return
    suffixes = _suffixes_taken(config.format)
    found = False
    for path in text_files(folder, suffixes):
        found = True
        yield path
    if not found:
        problems.append(
            f"{folder}: no file in it has a suffix of text ({' '.join(sorted(suffixes))}); "
            f"name other files by a quoted glob, such as '{folder.rstrip('/')}/**/*.xyz'"
        )


def _suffixes_taken(format: str) -> frozenset[str]:
    """The suffixes that are taken from a folder."""
    if format in ("auto", "text"):
        return TEXT_SUFFIXES | JSONL_SUFFIXES | ({".parquet"} if format == "auto" else frozenset())
    return frozenset(suffix for suffix, kind in KINDS.items() if kind == format)


def _spooled_input(config: PrepConfig) -> str:
    """Standard input as a file: work is cut into ranges, and input cannot go back.

    The file stands beside the dataset, is named after its content and has no time of its own, so that a run that is given the
    same text again goes on where it was. It stays as long as there is unfinished work.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise DataError("-: standard input is closed; pipe a text into it, or name a file")
    if sys.stdin.isatty():
        raise DataError("-: standard input is the keyboard; pipe a text into it, or name a file")
    if config.plan or not config.out:
        folder = Path(_temporary_folder())
    else:
        out = Path(os.path.abspath(config.out))
        folder, work = out.parent / f".{out.name}.stdin", work_folder(out)
        atexit.register(lambda: work.exists() or shutil.rmtree(folder, ignore_errors=True))
    path, digest = folder / f"{os.getpid()}.tmp", hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            while chunk := sys.stdin.buffer.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
        with path.open("rb") as file:
            start = file.read(8)
        suffix = next((suffix for magic, suffix in MAGIC.items() if start.startswith(magic)), "")
        os.utime(path, (0, 0))
        return str(path.rename(folder / f"{digest.hexdigest()[:32]}{suffix}"))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise DataError(f"-: standard input cannot be kept in {folder} ({error.strerror}), which it has to be") from None


def _temporary_folder() -> str:
    """A folder that is deleted when this process ends."""
    folder = tempfile.mkdtemp(prefix="prep-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# ------------------------------------------------------------------------------------------------------------ the files


def _source_file(path: str, kind: str | None, config: PrepConfig, problems: list[str]) -> list[SourceFile]:
    suffix, packing = suffixes_of(path)
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
        if stat.S_ISDIR(found.st_mode):  # one below a folder that was named
            os.listdir(path)
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
