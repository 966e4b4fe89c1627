"""Turning text into token files: ours against the recipes of others, on the same text with the same tokenizer.

    python -m benchmarks.prep                 # everything that is installed
    python -m benchmarks.prep --rounds 5 --only ours-tiktoken nanogpt

**The text**: every .py, .md, .rst and .txt below the folders of this Python (its standard library and packages), each once, as
JSON lines, in an order by hash, up to ``--megabytes``. Where a machine has less, what it has is repeated, with every word of
more than three letters rotated by as many letters as it is the how-manieth repetition, so that no cache knows it already.
**The tokenizer**: gpt2 where tiktoken has its ranks, else 16,384 ids that are learned from this text.

Every contender is a process of its own; its figure is the CPU time of that process and all its children (user and system),
from the start of Python to the file on disk. Contenders run in turns, ``--rounds`` times; the table gives the median. All but
datatrove and the bare loops of gigatoken use two processes or threads. The recipes are re-written here from their
descriptions:

- ``nanogpt``: ``datasets.map`` with one document per call, then a memmap filled in slices (nanoGPT,
  data/openwebtext/prepare.py).
- ``llmc``: a pool that sends arrays back, one document each (llm.c, dev/data/fineweb.py).
- ``megatron``: a pool that sends lists back (Megatron-LM, tools/preprocess_data.py).
- ``litdata``: ``optimize`` into chunks. ``datatrove``: ``DocumentTokenizer``. ``hf``: ``encode_batch`` of tokenizers.
- ``bare-*``: byte ranges of the file, JSON, our tokenizer, one file per process: no split, hash, record, flush or manifest.

The recipes have tiktoken as it comes, and ours (``bare-tiktoken`` too) with the quicker spelling of the same split pattern
(accel_pretrain/split_patterns.py).

What follows the table is about ours alone: what safety costs over the bare loops, memory, temporary disk, a second run, and
learning 10,000 ids from 34 MB.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from accel_pretrain.errors import DataError
from accel_pretrain.tokenizer import BpeTokenizer, byte_alphabet, load_tokenizer

PROCESSES = 2
SUFFIXES = {".py", ".md", ".rst", ".txt"}


# ------------------------------------------------------------------------------------------------------------- the text


def texts(megabytes: float) -> Iterator[str]:
    """Documents that are all different, together about ``megabytes`` long."""
    found: dict[str, str] = {}
    for folder in sorted({sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}):
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and 200 < path.stat().st_size < 400_000:
                with contextlib.suppress(UnicodeDecodeError):
                    text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
                    if "\0" not in text:
                        found[hashlib.sha256(text.encode()).hexdigest()] = text
    left, turn = megabytes * 1e6, 0
    while left > 0:
        for _, text in sorted(found.items()):
            varied = re.sub(rf"(\w{{{turn}}})(\w{{4,}})", r"\2\1", text) if turn else text
            yield varied
            left -= len(varied.encode())
            if left <= 0:
                return
        turn += 1


def make_inputs(folder: Path, megabytes: float) -> None:
    """``text.jsonl`` and ``tokenizer/``, which every contender uses, and ``tokenizer.json`` for those who need that."""
    with (folder / "text.jsonl").open("w") as file:
        for text in texts(megabytes):
            file.write(json.dumps({"text": text}) + "\n")
    try:
        tokenizer = load_tokenizer("gpt2")
    except DataError:
        words = ["--tokenizer", "train:16384", "-o", folder / "learned", "--val", "0"]
        subprocess.run(command(folder, *words), check=True, stdout=subprocess.DEVNULL)
        tokenizer = load_tokenizer(folder / "learned")
    tokenizer.save(folder / "tokenizer")
    assert isinstance(tokenizer, BpeTokenizer)
    write_tokenizer_json(tokenizer, folder / "tokenizer.json")


def write_tokenizer_json(tokenizer: BpeTokenizer, path: Path) -> None:
    """The same byte-pair encoding for the library of Hugging Face: a merge is the last step by which a token comes about."""
    letters = byte_alphabet()
    merges = []
    for token, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [tokenizer.ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append([spelled(part, letters) for part in parts])
    vocabulary = {spelled(token, letters): rank for token, rank in tokenizer.ranks.items()}
    special = {"id": tokenizer.eot_id, "content": "<|endoftext|>", "special": True}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    definition = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary, "merges": merges,
        },
    }  # fmt: skip
    path.write_text(json.dumps(definition))


def spelled(token: bytes, letters: list[str]) -> str:
    return "".join(letters[byte] for byte in token)


# ------------------------------------------------------------------------------------------------------- the contenders


def tiktoken_of(folder: Path) -> Any:
    """tiktoken as it comes, with the pattern as OpenAI spells it: what the recipes use."""
    import tiktoken

    spec = json.loads((folder / "tokenizer" / "spec.json").read_text())
    lines = (line.split() for line in (folder / "tokenizer" / "ranks.tiktoken").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding("recipe", pat_str=spec["pattern"], mergeable_ranks=ranks, special_tokens=spec["special_tokens"])


_state: dict[str, Any] = {}


def _start(folder: Path) -> None:
    _state["encoding"] = tiktoken_of(folder)


def _as_array(line: str) -> np.ndarray:
    encoding = _state["encoding"]
    return np.array([encoding.eot_token, *encoding.encode_ordinary(json.loads(line)["text"])], dtype=np.uint16)


def _as_list(line: str) -> list[int]:
    encoding = _state["encoding"]
    return [*encoding.encode_ordinary(json.loads(line)["text"]), encoding.eot_token]


def nanogpt(folder: Path, out: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    encoding = tiktoken_of(folder)

    def process(example: dict[str, str]) -> dict[str, Any]:
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    dataset = datasets.load_dataset("json", data_files=str(folder / "text.jsonl"), split="train", cache_dir=str(out / "cache"))
    split = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)  # type: ignore[union-attr]
    tokenized = split.map(process, remove_columns=["text"], num_proc=PROCESSES)
    for name, part in tokenized.items():
        array = np.memmap(out / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(int(np.sum(part["len"], dtype=np.uint64)),))
        batches, at = min(1024, len(part)), 0
        for index in range(batches):
            batch = part.shard(num_shards=batches, index=index, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            array[at : at + len(ids)] = ids
            at += len(ids)
        array.flush()


def llmc(folder: Path, out: Path) -> None:
    with multiprocessing.Pool(PROCESSES, _start, (folder,)) as pool, (folder / "text.jsonl").open() as lines:
        with (out / "train.bin").open("wb") as file:
            for ids in pool.imap(_as_array, lines, chunksize=16):
                file.write(ids.tobytes())


def megatron(folder: Path, out: Path) -> None:
    with multiprocessing.Pool(PROCESSES, _start, (folder,)) as pool, (folder / "text.jsonl").open() as lines:
        with (out / "train.bin").open("wb") as file:
            for ids in pool.imap(_as_list, lines, 32):
                file.write(np.array(ids, dtype=np.uint16).tobytes(order="C"))


class _Documents:
    """What litData calls for every input; it reads ranges of lines, since one call per document costs it more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, span: tuple[int, int]) -> Iterator[Any]:
        import torch

        if "encoding" not in _state:
            _start(self.folder)
        with (self.folder / "text.jsonl").open("rb") as file:
            file.seek(span[0])
            while file.tell() < span[1]:
                yield torch.from_numpy(np.array(_as_list(file.readline().decode()), dtype=np.uint16))


def litdata(folder: Path, out: Path) -> None:
    from litdata import TokensLoader, optimize  # pyright: ignore[reportMissingImports]

    optimize(
        fn=_Documents(folder), inputs=spans(folder / "text.jsonl", 4_000_000), output_dir=str(out / "lit"),
        chunk_bytes="64MB", num_workers=PROCESSES, item_loader=TokensLoader(),
    )  # fmt: skip


def datatrove(folder: Path, out: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.readers import JsonlReader  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.tokens import DocumentTokenizer  # pyright: ignore[reportMissingImports]

    steps = [
        JsonlReader(str(folder), glob_pattern="text.jsonl"),
        DocumentTokenizer(str(out / "ds"), tokenizer_name_or_path=str(folder / "tokenizer.json"), eos_token="<|endoftext|>"),
    ]
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=str(out / "logs")).run()


def hf(folder: Path, out: Path) -> None:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    eot = tokenizer.token_to_id("<|endoftext|>")
    with (folder / "text.jsonl").open() as lines, (out / "train.bin").open("wb") as file:
        batch: list[str] = []
        for line in [*lines, None]:
            if line is not None:
                batch.append(json.loads(line)["text"])
            if line is None or len(batch) == 1000:
                for found in tokenizer.encode_batch(batch, add_special_tokens=False):
                    file.write(np.array([*found.ids, eot], dtype=np.uint16).tobytes())
                batch = []


def spans(path: Path, length: int) -> list[tuple[int, int]]:
    """Ranges of about ``length`` bytes that end with a line."""
    ends, size = [0], path.stat().st_size
    with path.open("rb") as file:
        while ends[-1] < size:
            file.seek(min(size, ends[-1] + length))
            file.readline()
            ends.append(file.tell())
    return list(itertools.pairwise(ends))


def _bare_worker(folder: Path, out: Path, mine: list[tuple[int, int]], engine: str, number: int) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert isinstance(tokenizer, BpeTokenizer)
    encoding, eot = tokenizer.encoding, np.array([tokenizer.eot_id], dtype=np.uint16)
    if engine == "gigatoken":
        import gigatoken

        ranks = folder / "tokenizer" / "ranks.tiktoken"
        encode: Callable[[str], np.ndarray] = gigatoken.Tokenizer.from_tiktoken(ranks, "gpt2", {}).backend.encode  # type: ignore[assignment]
    else:

        def encode(text: str) -> np.ndarray:
            return encoding.encode_to_numpy(text, disallowed_special=())

    with (folder / "text.jsonl").open("rb") as source, (out / f"{number}.bin").open("wb") as file:
        for start, stop in mine:
            source.seek(start)
            parts: list[np.ndarray] = []
            for line in source.read(stop - start).splitlines():
                parts += [encode(json.loads(line)["text"]).astype(np.uint16), eot]
            file.write(np.concatenate(parts).data)


def bare_tiktoken(folder: Path, out: Path) -> None:
    context, ranges = multiprocessing.get_context("spawn"), spans(folder / "text.jsonl", 1_000_000)
    crew = [
        context.Process(target=_bare_worker, args=(folder, out, ranges[number::PROCESSES], "tiktoken", number))
        for number in range(PROCESSES)
    ]
    for process in crew:
        process.start()
    for process in crew:
        process.join()


def bare_gigatoken(folder: Path, out: Path) -> None:
    _bare_worker(folder, out, spans(folder / "text.jsonl", 1_000_000), "gigatoken", 0)


def ours_tiktoken(folder: Path, out: Path) -> None:
    _ours(folder, out, "--engine", "tiktoken", "--workers", str(PROCESSES))


def ours_gigatoken(folder: Path, out: Path) -> None:
    _ours(folder, out, "--engine", "gigatoken")


def _ours(folder: Path, out: Path, *more: str) -> None:
    from prep.tokenize import main

    main([str(folder / "text.jsonl"), "--tokenizer", str(folder / "tokenizer"), "-o", str(out / "ours"), *more])


CONTENDERS: dict[str, tuple[Callable[[Path, Path], None], str | None]] = {
    "nanogpt": (nanogpt, "datasets"),
    "llmc": (llmc, None),
    "megatron": (megatron, None),
    "litdata": (litdata, "litdata"),
    "datatrove": (datatrove, "datatrove"),
    "hf": (hf, "tokenizers"),
    "bare-tiktoken": (bare_tiktoken, None),
    "ours-tiktoken": (ours_tiktoken, None),
    "bare-gigatoken": (bare_gigatoken, "gigatoken"),
    "ours-gigatoken": (ours_gigatoken, "gigatoken"),
}


# ----------------------------------------------------------------------------------------------------------- measuring


def command(folder: Path, *words: object) -> list[str]:
    return [sys.executable, "-m", "prep.tokenize", str(folder / "text.jsonl"), *map(str, words)]


class Watch:
    """Samples a process and its children: the most memory that one of each had, and the most disk below a folder."""

    def __init__(self, pid: int, folder: Path, disk: bool) -> None:
        self.pid, self.folder, self.disk = pid, folder, disk
        self.parent = self.child = self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(0.02):
            self.parent = max(self.parent, peak_of(self.pid))
            for child in children_of(self.pid):
                self.child = max(self.child, peak_of(child))
            if self.disk:
                self.bytes = max(self.bytes, disk_below(self.folder))

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def peak_of(pid: int) -> int:
    with contextlib.suppress(OSError, StopIteration, IndexError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 0


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def disk_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_blocks * 512
    return total


def measure(words: list[str], folder: Path, disk: bool = False) -> tuple[float, float, Watch]:
    """CPU seconds and seconds of a process with all its children, and what was watched meanwhile."""
    begin = time.monotonic()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder), "TOKENIZERS_PARALLELISM": "true"}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    watch = Watch(process.pid, folder, disk)
    assert process.stderr
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    watch.stop()
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{errors.decode()[-1000:]}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - begin, watch


def run_once(name: str, inputs: Path, folder: Path, disk: bool = False) -> tuple[float, float, Watch]:
    out = Path(tempfile.mkdtemp(dir=folder))
    try:
        return measure([sys.executable, "-m", "benchmarks.prep", "--one", name, str(inputs), str(out)], out, disk)
    finally:
        shutil.rmtree(out)


def tournament(names: list[str], inputs: Path, folder: Path, rounds: int) -> dict[str, float]:
    cpu: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, tuple[int, int]] = dict.fromkeys(names, (0, 0))
    for _, name in itertools.product(range(rounds), tuple(names)):
        if name in names:
            try:
                seconds, elapsed, watch = run_once(name, inputs, folder)
            except RuntimeError as error:  # a package that is installed, but not all that it needs
                print(f"{name} does not run here: {error}")
                names.remove(name)
                continue
            cpu[name].append(seconds)
            wall[name].append(elapsed)
            memory[name] = max(memory[name][0], watch.parent), max(memory[name][1], watch.child)
    size = (inputs / "text.jsonl").stat().st_size / 1e6
    medians = {name: statistics.median(cpu[name]) for name in names}
    print(f"{'':<16}{'CPU s':>8}{'MB per CPU s':>14}{'best wall s':>13}{'MB parent':>11}{'MB child':>10}", end="")
    print("".join(f"{'x ' + name.removeprefix('ours-'):>12}" for name in medians if name.startswith("ours")))
    for name, value in medians.items():
        parent, child = (number / 1e6 for number in memory[name])
        print(f"{name:<16}{value:>8.2f}{size / value:>14.1f}{min(wall[name]):>13.2f}{parent:>11.0f}{child:>10.0f}", end="")
        print("".join(f"{value / medians[own]:>12.2f}" for own in medians if own.startswith("ours")), flush=True)
    return medians


def about_ours(inputs: Path, folder: Path, medians: dict[str, float]) -> None:
    for engine in ("tiktoken", "gigatoken"):
        own, bare = medians.get(f"ours-{engine}"), medians.get(f"bare-{engine}")
        if own and bare:
            print(f"safety over the bare {engine} loop: {own / bare - 1:+.1%}")
    out = folder / "own"
    words = command(inputs, "--tokenizer", inputs / "tokenizer", "-o", out / "data", "--workers", PROCESSES)
    out.mkdir()
    _, _, watch = measure(words, out, disk=True)
    made = disk_below(out)
    print(f"temporary disk: {watch.bytes / made:.2f} x the dataset at the most ({made / 1e6:.1f} MB)")
    print(f"peak memory: {watch.parent / 1e6:.0f} MB, and {watch.child / 1e6:.0f} MB in the largest worker")
    cpu, wall, _ = measure(words, out)
    size = (inputs / "text.jsonl").stat().st_size / 1e6
    print(f"second run, nothing to do: {wall:.2f} s ({cpu:.2f} CPU s), of which hashing {size:.0f} MB")
    with (inputs / "text.jsonl").open() as lines, (folder / "part.jsonl").open("w") as part:
        while part.tell() < 34_000_000 and (line := lines.readline()):
            part.write(line)
    for name in ("gigatoken", "rustbpe"):
        if importlib.util.find_spec(name):
            words = [sys.executable, "-m", "benchmarks.prep", "--one", f"learn:{name}", str(folder), str(folder)]
            cpu, wall, _ = measure(words, folder)
            print(f"10,000 ids learned from 34 MB by {name}: {wall:.2f} s ({cpu:.2f} CPU s), with the start of Python")


def learn(name: str, folder: Path) -> None:
    from prep import learn

    with (folder / "part.jsonl").open() as lines:
        found = getattr(learn, f"_with_{name}")((json.loads(line)["text"] for line in lines), 9_999)
    assert len(found) == 9_999


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=68.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=CONTENDERS)
    parser.add_argument("--one", nargs=3, metavar=("NAME", "INPUTS", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, inputs, out = arguments.one
        if name.startswith("learn:"):
            learn(name.removeprefix("learn:"), Path(inputs))
        else:
            CONTENDERS[name][0](Path(inputs), Path(out))
        return
    names = [
        name
        for name, (_, needs) in CONTENDERS.items()
        if (not arguments.only or name in arguments.only) and (needs is None or importlib.util.find_spec(needs))
    ]
    with tempfile.TemporaryDirectory() as place:
        inputs, folder = Path(place) / "in", Path(place) / "out"
        inputs.mkdir()
        folder.mkdir()
        make_inputs(inputs, arguments.megabytes)
        size, documents = (inputs / "text.jsonl").stat().st_size / 1e6, sum(1 for _ in (inputs / "text.jsonl").open())
        tokenizer = load_tokenizer(inputs / "tokenizer")
        print(f"{size:.1f} MB of JSON lines, {documents:,} documents; {tokenizer.name}, {tokenizer.vocab_size:,} ids")
        print(f"load of the machine: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores", flush=True)
        medians = tournament(names, inputs, folder, arguments.rounds)
        about_ours(inputs, folder, medians)
        print(f"load of the machine: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
