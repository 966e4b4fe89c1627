"""Many runs of one config, each with other values, and which was best: ``python -m accel_pretrain.sweep --config C.yaml ...``.

Each trial is a real run in a process and a folder of its own below ``checkpoint_dir``. ``sweep.jsonl`` there has a row for
each, and the same command goes on where it was: with the trial that was cut off, then with the next. One that fails is a row.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from accel_pretrain import lock
from accel_pretrain.config import RunConfig, Splits, flat, open_splits, told
from accel_pretrain.errors import ConfigError, LockedError, refuse, reported
from accel_pretrain.preset import load_with
from accel_pretrain.space import Choice, Method, Space, grid_size, parse_parameter, propose
from accel_pretrain.stopping import signals_as_exceptions
from accel_pretrain.sweep_trials import Trial, run_trial
from accel_pretrain.typed_keys import Keys
from accel_pretrain.typed_yaml import CommandLine, Entry, option, parse_command_line, reference, section

USAGE = """\
usage: python -m accel_pretrain.sweep --config FILE --param lr=1e-4..1e-2:log --param batch_size=8,16 [--key VALUE]...
       python -m accel_pretrain.sweep --config FILE --param lr=1e-4..1e-2:log --method tpe --trials 30
       python -m accel_pretrain.sweep --preset depth=N --train_data_path DIR --param lr=1e-3..1e-1:log

  --param KEY=A,B,C        one of these values
  --param KEY=LOW..HIGH    a number between; a whole one if both ends are; LOW..HIGH:log spreads it over powers of ten
  --help                   show this

"""
ROWS = "sweep.jsonl"
OWN = ("checkpoint.checkpoint_dir", "checkpoint.resume_from")  # which the sweep gives each trial


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How to look, and how long."""

    trials: int | None = option(None, "how many runs; null: the whole grid, or 20")
    method: Literal["grid", "random", "tpe"] | None = option(
        None, "grid | random | tpe (where good values were; needs optuna); null: grid if all parameters are lists, else random"
    )
    sweep_seed: int = option(0, "of random and tpe; the runs themselves have training.seed")
    launcher: str | None = option(None, "what starts a trial, as 'accelerate launch --num_processes 8'; null: one process")

    def __post_init__(self) -> None:
        refuse(
            (self.trials is not None and self.trials < 1, f"trials: must be at least 1, got {self.trials}"),
            (self.sweep_seed < 0, f"sweep_seed: must not be negative, got {self.sweep_seed}"),
        )


@dataclass(frozen=True, kw_only=True)
class SweptRun(RunConfig):
    """A run, and how to vary it."""

    sweep: SweepOptions = section(SweepOptions, "How to look (keys of accel_pretrain.sweep only)")


@dataclass(kw_only=True)
class Sweep:
    """A sweep and what is known of it; ``base`` and ``settings`` are the words, and their sense, that its trials share."""

    folder: Path
    space: Space
    method: Method
    seed: int
    wanted: int
    base: list[str]
    settings: dict[str, Any]
    start: list[str]
    anew: list[str]  # settings that a preset chooses for each trial
    trials: list[Trial] = field(default_factory=list)

    @property
    def question(self) -> dict[str, Any]:
        """What must be the same for trials to be compared."""
        space = {name: asdict(own) for name, own in self.space.items()}
        return {"parameters": space, "method": self.method, "seed": self.seed, "settings": self.settings}


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    with reported():
        words, parameters = split_parameters(sys.argv[1:] if argv is None else argv)
        line = parse_command_line(SweptRun, words, flags={"help"}, short={"-h": "help"}, presets=True)
        if "help" in line.flags:
            print(USAGE + reference(SweptRun), end="")
            return 0
        sweep = make_sweep(line, parameters)
        if sweep.anew:
            what = ", ".join(sweep.anew)
            print(f"Notice: --preset {line.preset} chooses for each trial anew: {what}; to compare at equal ones, type them")
        with held(sweep.folder), signals_as_exceptions():
            recall(sweep)
            code = run_trials(sweep)
        print("\n".join(report(sweep)))
        return code or int(all(trial.state != "finished" for trial in sweep.trials))
    return 2


def split_parameters(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without ``--param X``, and every X."""
    rest, found, left = list[str](), list[str](), list(words)
    while left:
        word = left.pop(0)
        if word == "--param" and left:
            found.append(left.pop(0))
        elif word.startswith("--param="):
            found.append(word.removeprefix("--param="))
        else:
            rest.append(word)
    return rest, found


def make_sweep(line: CommandLine, parameters: Sequence[str]) -> Sweep:
    """The sweep that was asked for; refuses what every trial would trip over."""
    try:
        config = load_with(SweptRun, line.preset, line.config, line.overrides)
    except ConfigError:
        if line.preset is None or not parameters:
            raise
        config = None  # what is swept may be what is missing
    space, tried = space_of(parameters, line)
    if config is None:
        first = tuple((name, Entry(own.samples[0], "--param")) for name, own in space.items())
        config = load_with(SweptRun, line.preset, line.config, (*line.overrides, *first))
    size, options = grid_size(space), config.sweep
    method: Method = options.method or ("grid" if size is not None else "random")
    ranges = ", ".join(name for name, own in space.items() if not isinstance(own, Choice))
    refuse(
        (method == "grid" and size is None, f"sweep.method: a grid needs lists, and {ranges} is a range; type --method random"),
        (
            config.checkpoint.resume_from != "auto",
            f"checkpoint.resume_from: a sweep goes on with each trial by itself, got {config.checkpoint.resume_from}; "
            "leave it out, or type --resume_from auto",
        ),
    )
    splits = open_splits(config.data)
    beneath = ["--preset", line.preset] if line.preset else []
    beneath += ["--config", str(line.config)] if line.config else []
    own = (*OWN, *space)
    typed = ((key, entry) for key, entry in line.overrides if key not in own and not key.startswith("sweep."))
    base = [*beneath, *(f"--{key}={entry.raw}" for key, entry in typed)]
    start, known = launcher_of(options.launcher), settings_of(config, splits, space)
    others = [settings_of(own, splits, space) for own in tried] if line.preset else []
    settings = {key: value for key, value in known.items() if all(own.get(key) == value for own in others)}
    wanted = options.trials or (size if method == "grid" and size is not None else 20)
    if method == "tpe":
        propose(space, method, options.sweep_seed, [])  # refuses if optuna is not there
    return Sweep(
        folder=config.checkpoint.checkpoint_dir, space=space, method=method, seed=options.sweep_seed, wanted=wanted,
        base=base, settings=settings, start=start, anew=[key for key in known if key not in settings],
    )  # fmt: skip


def launcher_of(text: str | None) -> list[str]:
    """The words that start a module of Python; refuses a program that is not there."""
    if not text or text.isspace():
        return [sys.executable]
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"sweep.launcher: {text!r} cannot be split into words ({error})") from None
    if shutil.which(words[0]) is None:
        example = "type --launcher 'accelerate launch --num_processes 8', or leave it out"
        raise ConfigError(f"sweep.launcher: there is no program {words[0]!r} to run; {example}")
    return words


def settings_of(config: SweptRun, splits: Splits, space: Space) -> dict[str, Any]:
    """What decides the losses of all trials: the settings by their keys but those in ``space``, and the tokens."""
    counted = ("checkpoint.init_from", "debug.overfit_one_batch")
    free = ("logging.", "checkpoint.", "debug.", "sweep.", "the version", "the precision")
    free += ("training.hang_timeout", "training.requeue")
    known = told(config, splits, "") | {key: value for key, value in flat(config).items() if key in counted}
    swept = {*space, *(f"the tokens of {key}" for key in space)}
    return {key: value for key, value in known.items() if key not in swept and (key in counted or not key.startswith(free))}


def space_of(parameters: Sequence[str], line: CommandLine) -> tuple[Space, list[SweptRun]]:
    """The parameters by their dotted keys, each value checked for its type; the configs of those that need no other one."""
    refuse((not parameters, "nothing to vary; type --param lr=1e-4..1e-2:log, or --param batch_size=8,16"))
    keys, space, tried, problems = Keys(RunConfig), dict[str, Any](), list[SweptRun](), list[str]()
    for word in parameters:
        name, values = parse_parameter(word)
        leaf = keys.find(name, values.samples[0])
        if isinstance(leaf, str):
            problems.append(f"--param {word}: {leaf}")
        elif leaf.path in (*OWN, *space):
            problems.append(f"--param {word}: {leaf.path} is given twice, or is the sweep's own")
        else:
            space[leaf.path] = values
            for sample in values.samples:
                try:
                    words = (*line.overrides, (leaf.path, Entry(sample, f"--param {word}")))
                    tried.append(load_with(SweptRun, line.preset, line.config, words))
                except ConfigError as error:  # others may be the trial's own, of values that do not go together
                    problems += [problem for problem in error.problems if f"{leaf.path}: expected" in problem]
    if problems:
        raise ConfigError(problems)
    return space, tried


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """One sweep at a time in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = lock.take(folder / ".sweep_lock")
    except lock.Taken as taken:
        raise LockedError(f"checkpoint.checkpoint_dir: {taken} sweeps in {folder}; type another --checkpoint_dir") from None
    try:
        yield
    finally:
        lock.release(file)


# -------------------------------------------------------------------------------------------------------------- trials


def run_trials(sweep: Sweep) -> int:
    """All that are wanted, the one that was cut off first; the exit code, which is not 0 if somebody has stopped it."""
    told = [(trial.parameters, trial.val_loss) for trial in sweep.trials if trial.state != "running"]
    unfinished = [trial for trial in sweep.trials if trial.state == "running"]
    while unfinished or len(told) < sweep.wanted:
        if unfinished:
            trial = unfinished.pop(0)
        else:
            values = propose(sweep.space, sweep.method, sweep.seed, told)
            if values is None:
                break
            trial = Trial(trial=len(sweep.trials), parameters=values)
            sweep.trials.append(trial)
            write(sweep, asdict(trial))
        print(f"{trial.folder} of {sweep.wanted}: {trial.words}", flush=True)
        if code := run_trial(trial, sweep.folder, sweep.start, sweep.base):
            return code
        write(sweep, asdict(trial))
        print(f"  {outcome(trial)}", flush=True)
        told.append((trial.parameters, trial.val_loss))
    return 0


# ------------------------------------------------------------------------------------------------- what is remembered


def write(sweep: Sweep, row: dict[str, Any]) -> None:
    with (sweep.folder / ROWS).open("ab") as file:
        file.write(f"{json.dumps(row)}\n".encode())


def recall(sweep: Sweep) -> None:
    """The trials of an earlier start of this sweep; refuses a folder that another sweep has begun in."""
    path, question = sweep.folder / ROWS, None
    found: dict[int, Trial] = {}
    written = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if written and not written.endswith("\n"):  # it was cut off in a row
        with path.open("ab") as file:
            file.write(b"\n")
    for text in written.splitlines():
        with contextlib.suppress(ValueError, TypeError):  # a torn line
            row = json.loads(text)
            if "trial" in row:
                found[row["trial"]] = Trial(**row)
            else:
                question = row
    asked = json.loads(json.dumps(sweep.question))
    if question is None:
        write(sweep, sweep.question)
    elif differs := differences(question, asked):
        raise ConfigError(f"checkpoint.checkpoint_dir: {path} is of another sweep ({differs}): type another --checkpoint_dir")
    sweep.trials = [found[number] for number in sorted(found)]


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Where two questions differ, in words; empty if they are the same."""
    words = [f"its {key} differ" for key in now if key != "settings" and before.get(key) != now[key]]
    if words:
        return ", ".join(words)  # other parameters are other settings too
    had, has = before.get("settings", {}), now["settings"]
    keys = [key for key in {**had, **has} if had.get(key) != has.get(key)]
    words = [f"{key} was {had.get(key)}, is {has.get(key)}" for key in keys[:5] if not key.startswith("the ")]
    words += [f"{key} have changed" for key in keys[:5] if key.startswith("the ")]
    return ", ".join([*words, *([f"and {len(keys) - 5} more"] if len(keys) > 5 else [])])


def outcome(trial: Trial) -> str:
    if trial.val_loss is None:
        return trial.reason or trial.state
    error = f" ± {trial.standard_error:.4f}" if trial.standard_error is not None else ""
    return f"{trial.val_loss:.4f}{error}"


def report(sweep: Sweep) -> list[str]:
    """The trials as a table, best first, and what to type for the best."""
    finished = sorted((trial for trial in sweep.trials if trial.val_loss is not None), key=lambda trial: trial.val_loss or 0.0)
    rest = [trial for trial in sweep.trials if trial.val_loss is None]
    lines = ["", f"{'val loss':<20}{'seconds':>9}  trial"]
    for trial in (*finished, *rest):
        seconds = "" if trial.seconds is None else f"{trial.seconds:.1f}"
        shown = outcome(trial) if trial.val_loss is not None else trial.state
        lines.append(f"{shown:<20}{seconds:>9}  {trial.folder}  {trial.words}")
    lines += [f"{trial.folder}: {trial.reason}" for trial in rest if trial.reason]
    if finished:
        words = shlex.join(sweep.base)
        lines += ["", f"Best: python -m accel_pretrain.train {words} {finished[0].words} --checkpoint_dir DIR"]
    if len(finished) > 1:
        first, second = (sweep.folder / trial.folder for trial in finished[:2])
        lines.append(f"Whether it is better than the next: python -m accel_pretrain.compare {first} {second}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
