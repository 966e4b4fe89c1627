"""Whatever ends a run of prep, the next one goes on where it was and ends in the same bytes: real processes, real signals.

``python -m tests.test_prep_crash 60`` kills at random until it has done so sixty times.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from accel_pretrain.shards import open_split
from prep.journal import Workshop
from prep.split import TRAIN, VAL
from tests.running import first_and_slow
from tests.test_prep import ROOT, assert_same_files, command, documents_of, manifest_of, stories, visible, write_jsonl

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
RUN_MODULE = "import prep.tokenize; prep.tokenize.main()"
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def expected(corpus: Path) -> Path:
    """What a run makes that nobody disturbs, with one worker."""
    done = run(corpus, corpus.parent / "expected", "--workers", 1)
    assert done.returncode == 0, done.stderr
    return corpus.parent / "expected"


def make_corpus(folder: Path) -> Path:
    return write_jsonl(folder / "in.jsonl", [*stories(16_000), *stories(300)])


def words_for(corpus: Path, out: Path, *more: object) -> list[str]:
    """About 170 units, with a learned tokenizer, in several files, without the repeated documents."""
    options = ["--tokenizer", "train:400", "--unit_bytes", 20_000, "--shards", "100K", "--dedup", "exact", "--val", "3%"]
    return command(corpus, "-o", out, *options, *more)


def run(corpus: Path, out: Path, *more: object, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words_for(corpus, out, *more), cwd=ROOT, capture_output=True, text=True, timeout=60, **how)  # type: ignore[call-overload]


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
    return found


def is_worker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def workers_of(pid: int) -> list[int]:
    return [child for child in children_of(pid) if is_worker(child)]


def until(what: Callable[[], object], process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Wait until something is the case, while ``process`` runs."""
    end = time.monotonic() + seconds
    while not what() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)


@contextlib.contextmanager
def half_done(corpus: Path, out: Path, *more: object) -> Iterator[subprocess.Popen[str]]:
    """A run with two workers, stopped after some units were done."""
    with subprocess.Popen(words_for(corpus, out, "--workers", 2, *more), cwd=ROOT, **PIPES) as process:  # type: ignore[call-overload]
        try:
            until(lambda: len(Workshop(out).journal()) >= 5, process)
            assert process.poll() is None
            process.send_signal(signal.SIGSTOP)
            yield process
        finally:
            process.kill()


def cleaned(out: Path) -> bool:
    return not list(out.parent.glob(f".{out.name}*"))


# --------------------------------------------------------------------------------------------------------------- a death


def test_killed_at_random_it_ends_in_the_same_bytes(corpus: Path, expected: Path, tmp_path: Path) -> None:
    kills = kill_at_random(corpus, tmp_path / "out", kills=12, seed=0)
    assert kills["run"] >= 3
    assert kills["worker"] >= 3
    assert_same_files(expected, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out"]


def kill_at_random(corpus: Path, out: Path, kills: int, seed: int) -> dict[str, int]:
    """Start the run and kill it or one of its workers, again and again; the last run is left alone."""
    source, done = random.Random(seed), {"run": 0, "worker": 0}
    for attempt in range(50 * kills):
        last = sum(done.values()) >= kills
        engine = ("tiktoken", "auto")[attempt % 2]
        words = words_for(corpus, out, "--workers", source.randint(1, 3), "--engine", engine)
        with subprocess.Popen(words, cwd=ROOT, **PIPES) as process:  # type: ignore[call-overload]
            if not last:
                until(lambda: (out.parent / f".{out.name}.work" / "job.json").exists(), process)
                time.sleep(source.uniform(0, 0.7))
                target = source.choice([process.pid, *workers_of(process.pid) * 2])
                if process.poll() is None and not out.exists():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(target, signal.SIGKILL)
                        done["run" if target == process.pid else "worker"] += 1
                if target == process.pid:
                    process.wait(20)
            _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), errors
        if process.returncode == 0 and last:
            return done
        if process.returncode == 0:
            assert out.exists()
            remove(out)
    raise AssertionError("no run was ever left alone")


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()


def test_a_killed_worker_is_replaced(corpus: Path, expected: Path, tmp_path: Path) -> None:
    with half_done(corpus, tmp_path / "out") as process:
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert_same_files(expected, tmp_path / "out")


def test_what_was_done_is_not_done_again(corpus: Path, expected: Path, tmp_path: Path) -> None:
    with half_done(corpus, tmp_path / "out") as process:
        kept = Workshop(tmp_path / "out").kept()
    assert visible(tmp_path) == []
    result = run(corpus, tmp_path / "out", "--workers", 1)
    assert result.returncode == 0, result.stderr
    found = re.fullmatch(r"going on: (\d+) of (\d+) units were done before\n", result.stderr)
    assert found
    assert kept <= int(found[1]) < int(found[2])  # a worker may have finished its unit while its parent died
    assert_same_files(expected, tmp_path / "out")
    assert cleaned(tmp_path / "out")
    assert process.returncode != 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_an_interrupted_run_says_how_to_go_on(corpus: Path, expected: Path, tmp_path: Path, number: int, code: int) -> None:
    with half_done(corpus, tmp_path / "out") as process:
        workers = workers_of(process.pid)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (code, "")
    found = re.fullmatch(r"interrupted: \d+ of \d+ units are done and kept; to go on: python (.*)\n", errors)
    assert found, errors
    assert not [pid for pid in workers if is_worker(pid)]
    again = subprocess.run([sys.executable, *shlex.split(found[1])], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert again.stderr.startswith("going on: ")
    assert_same_files(expected, tmp_path / "out")


def test_an_interrupted_replacement_leaves_what_was_there(corpus: Path, tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", stories(20))
    assert run(first, tmp_path / "out").returncode == 0
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with half_done(corpus, tmp_path / "out", "--overwrite"):
        pass
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert len(documents_of(tmp_path / "out", TRAIN) + documents_of(tmp_path / "out", VAL)) == 20


def test_a_run_interrupted_before_anything_is_done_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    words = words_for(corpus, tmp_path / "out", "--workers", 2)
    with subprocess.Popen(words, cwd=ROOT, **PIPES) as process:  # type: ignore[call-overload]
        until(lambda: len(workers_of(process.pid)) == 2, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "interrupted: nothing was done yet\n")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------- documents that kill a process


FATAL = """
import os, signal
import prep.engines
encode, count = prep.engines.ByteEngine.encode, 0

def dying(self, data):
    global count
    count += 1
    if {condition}:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, data)

prep.engines.ByteEngine.encode = dying
"""


def run_fatally(tmp_path: Path, condition: str, *more: object) -> subprocess.CompletedProcess[str]:
    """A run in which encoding kills the process under some condition; every process that Python starts loads this file."""
    (tmp_path / "faults").mkdir(exist_ok=True)
    (tmp_path / "faults" / "sitecustomize.py").write_text(FATAL.format(condition=condition))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'faults'}{os.pathsep}{ROOT}"}
    words = command(tmp_path / "in.jsonl", "-o", tmp_path / "out", "--tokenizer", "bytes", "--val", "0", "--workers", 2, *more)
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_a_document_that_kills_its_process_is_found(tmp_path: Path) -> None:
    texts = stories(300)
    path = write_jsonl(tmp_path / "in.jsonl", [*texts[:137], "fatal one", *texts[137:220], "fatal two", *texts[220:]])
    condition = "b'fatal' in data"
    result = run_fatally(tmp_path, condition, "--unit_bytes", 15_000)
    says = "encoding it kills the process; or leave such documents out with --on_error skip"
    assert result.returncode == 2
    assert result.stderr in (f"error: {path}:{line}: {says}\n" for line in (138, 222))
    result = run_fatally(tmp_path, condition, "--unit_bytes", 15_000, "--on_error", "skip")
    assert result.returncode == 0, result.stderr
    assert manifest_of(tmp_path / "out")["prep"]["counts"] == {"documents": 300, "empty": 0, "bad": 2}
    assert documents_of(tmp_path / "out", TRAIN) == texts


def test_no_document_is_blamed_for_what_is_not_its_fault(tmp_path: Path) -> None:
    """Memory that runs out, say, hits whichever document comes then."""
    write_jsonl(tmp_path / "in.jsonl", stories(300))
    result = run_fatally(tmp_path, "count > 40", "--unit_bytes", 15_000)
    assert result.returncode == 2
    assert result.stderr.startswith("error: a worker process was killed by SIGKILL each time it had ")
    assert "no single document is the cause" in result.stderr
    assert result.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------- the work folder


def test_two_runs_do_not_work_on_the_same_dataset(corpus: Path, expected: Path, tmp_path: Path) -> None:
    with half_done(corpus, tmp_path / "out") as process:
        second = run(corpus, tmp_path / "out", "--workers", 1)
        assert second.returncode == 2
        assert f"another run works on this dataset (process {process.pid} on " in second.stderr
    assert run(corpus, tmp_path / "out", "--workers", 1).returncode == 0, "the lock of a dead process is none"
    assert_same_files(expected, tmp_path / "out")


def test_other_options_do_not_go_on_with_the_work(corpus: Path, tmp_path: Path) -> None:
    with half_done(corpus, tmp_path / "out"):
        pass
    kept = Workshop(tmp_path / "out").kept()
    result = run(corpus, tmp_path / "out", "--val", "5%", "--shards", "90K")
    assert result.returncode == 2
    assert 'val: "3%" there, "5%" here' in result.stderr
    assert 'shards: "100K" there, "90K" here' in result.stderr
    assert "add --fresh" in result.stderr
    assert result.stderr.count("\n") == 1
    assert Workshop(tmp_path / "out").kept() >= kept
    result = run(corpus, tmp_path / "out", "--val", "5%", "--shards", "90K", "--fresh")
    assert (result.returncode, result.stderr) == (0, "")
    assert manifest_of(tmp_path / "out")["prep"]["config"]["val"] == "5%"


def test_text_that_changed_meanwhile_is_read_again(corpus: Path, tmp_path: Path) -> None:
    own = tmp_path / "in.jsonl"
    own.write_bytes(corpus.read_bytes())
    with half_done(own, tmp_path / "out", "--tokenizer", "bytes"):
        pass
    lines = own.read_text().replace("Story 0.3:", "STORY 0.3:")
    own.write_text(lines)
    assert run(own, tmp_path / "out", "--tokenizer", "bytes").returncode == 0
    assert run(own, tmp_path / "fresh", "--tokenizer", "bytes").returncode == 0
    assert_same_files(tmp_path / "fresh", tmp_path / "out")
    documents = [text for split in (TRAIN, VAL) for text in documents_of(tmp_path / "out", split)]
    assert any(text.startswith("STORY 0.3:") for text in documents)


@pytest.mark.slow
def test_what_was_skipped_is_an_error_for_a_run_that_must_not_skip(corpus: Path, tmp_path: Path) -> None:
    own = tmp_path / "in.jsonl"
    own.write_bytes(b"oops\n" + corpus.read_bytes())
    with half_done(own, tmp_path / "out", "--on_error", "skip"):
        pass
    result = run(own, tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {own}:1: not valid JSON (")
    result = run(own, tmp_path / "out", "--on_error", "skip")
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("going on: ")
    assert manifest_of(tmp_path / "out")["prep"]["counts"]["bad"] == 1


def test_a_terminal_sees_a_bar_and_a_log_sees_lines(corpus: Path, tmp_path: Path) -> None:
    slow = f"import prep.progress; prep.progress.SECONDS_BETWEEN_LINES = 0.0; {RUN_MODULE}"
    words = [sys.executable, "-c", slow, *words_for(corpus, tmp_path / "log", "--workers", 1)[3:]]
    log = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60).stderr
    assert re.fullmatch(r"(tokenize: \d+%, [\d.]+ MB/s, [\d.]+ Mtok/s, \d+ s left\n)+", log)
    words = words_for(corpus, tmp_path / "bar", "--workers", 1)
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how the end of a terminal is told
            while data := os.read(ours, 4096):
                shown += data
        os.close(ours)
    assert process.returncode == 0
    assert re.search(rb"tokenize: .*\d+%.*Mtok/s\]", shown)


def damage_journal(work: Path) -> None:
    journal = work / "assembled.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])


def damage_unit(work: Path) -> None:
    for unit in (work / "units").glob("*.unit"):
        data = bytearray(unit.read_bytes())
        data[10] ^= 1
        unit.write_bytes(data)


def damage_files(work: Path) -> None:
    for path in (work / "dataset").glob("train*.bin"):
        os.truncate(path, path.stat().st_size // 2)


def lengthen_files(work: Path) -> None:
    for path in (work / "dataset").glob("*.*"):
        with path.open("ab") as file:
            file.write(b"garbage")


def leave_halves(work: Path) -> None:
    (work / "units" / "0123.4567.tmp").write_bytes(b"half a unit")
    (work / "units" / "0123.unit").write_bytes(b"of another job")


@pytest.mark.parametrize("damage", first_and_slow([damage_journal, damage_unit, damage_files, lengthen_files, leave_halves]))
def test_a_damaged_work_folder_costs_time_only(
    corpus: Path, expected: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with half_done(corpus, tmp_path / "out"):
        pass
    damage(tmp_path / ".out.work")
    result = run(corpus, tmp_path / "out", "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert_same_files(expected, tmp_path / "out")
    assert cleaned(tmp_path / "out")


def test_a_disk_that_is_full_keeps_what_is_done(corpus: Path, expected: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the write fails in the same way."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); {RUN_MODULE}"
    words = [sys.executable, "-c", limited, *words_for(corpus, tmp_path / "out", "--workers", 2)[3:]]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert re.fullmatch(
        rf"error: -o {tmp_path}/out: cannot be written \(File too large\); \d+ of \d+ units are done and kept: "
        r"make room and run the same command again\n",
        result.stderr,
    ), result.stderr
    result = run(corpus, tmp_path / "out", "--workers", 2)
    assert result.stderr.startswith("going on: ")
    assert_same_files(expected, tmp_path / "out")


def test_a_disk_that_is_too_small_is_refused_at_once(corpus: Path, tmp_path: Path) -> None:
    code = (
        f"import collections, shutil; shutil.disk_usage = lambda path: collections.namedtuple('U', 'free')(9999); {RUN_MODULE}"
    )
    words = words_for(corpus, tmp_path / "out")[3:]
    result = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert re.fullmatch(
        rf"error: {tmp_path}: 0.00 GB are free, and about [\d.]+ GB are needed; make room, choose another -o, "
        r"or add --check_disk false\n",
        result.stderr,
    )
    assert os.listdir(tmp_path) == []
    words = [sys.executable, "-c", code, *words, "--check_disk", "false"]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, timeout=60).returncode == 0


def test_the_expected_dataset_is_not_trivial(expected: Path) -> None:
    manifest = manifest_of(expected)
    assert manifest["prep"]["counts"] == {"documents": 16_000, "empty": 0, "bad": 0, "duplicates": 300}
    assert len([info for info in manifest["files"] if info["split"] == TRAIN]) > 3
    assert open_split(expected, VAL).tokens > 1000
    assert json.loads((expected / "manifest.json").read_text())["prep"]["recipe"] >= 2


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text, wanted = make_corpus(Path(folder)), int(sys.argv[1])
        assert run(text, Path(folder) / "expected", "--workers", 1).returncode == 0
        print(kill_at_random(text, Path(folder) / "out", wanted, seed=int(time.time())))
        assert_same_files(Path(folder) / "expected", Path(folder) / "out")
        print("the same bytes")
