"""Is A better than B? ``python -m accel_pretrain.compare A B`` measures both on the same windows of text, with error bars.

Two models are compared window by window: what makes a window hard is hard for both, so that their difference is known far
better than either loss. Whether a *recipe* is better is another question, for several runs with seeds of their own:
``compare A1 A2 A3 --against B1 B2 B3`` compares the means of the runs by Welch's test. Where the checkpoints are gone, what
the runs have recorded is compared.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from accel_pretrain.checkpoint import read_model, read_state
from accel_pretrain.commit import checkpoints, resolve
from accel_pretrain.curves import as_number, read_runs
from accel_pretrain.data import Windows
from accel_pretrain.errorbars import LEVEL, Estimate, mean_of, welch
from accel_pretrain.errors import ConfigError, DataError, refuse, reported
from accel_pretrain.heldout import find_data, misfits, recorded_data
from accel_pretrain.metrics import METRICS_FILE
from accel_pretrain.mixture import open_data
from accel_pretrain.report_facts import settings
from accel_pretrain.runtime import TrainingConfig, build_accelerator
from accel_pretrain.shards import TokenSplit
from accel_pretrain.tokenizer import load_tokenizer
from accel_pretrain.typed_yaml import load, option, parse_command_line, reference, section
from accel_pretrain.validation import nats_per_window

USAGE = """\
usage: python -m accel_pretrain.compare A B [--data DIR] [--key VALUE]...
       python -m accel_pretrain.compare A1 A2 A3 --against B1 B2 B3 [...]      runs with several seeds of two recipes

  A, B             run directories (their newest checkpoint), checkpoints, or a run's latest or best
  --help           show this

"""
# what a run's recorded losses depend on besides the model: two runs with others have measured other windows
_WINDOWS = (
    "evaluation.eval_iters",
    "evaluation.eval_batch_size",
    "model.context_length",
    "data.val_data_path",
    "data.train_data_path",
)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """On what to compare, and how to tell."""

    data: Path | None = option(None, "a dataset folder, or a file of ids; null: the data that the runs were made with")
    split: str = option("val", "which split of the dataset")
    dtype: Literal["uint16", "uint32"] | None = option(None, "of a bare file; null: the dataset's, or uint16")
    context_length: int | None = option(None, "tokens per window; null: the shortest context of the models")
    windows: int | None = option(None, "so many windows, spread over the split; null: the whole split")
    batch_size: int = option(16, "windows at a time")
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: cuda, else mps, else cpu")
    recorded: bool = option(False, "compare what the runs have recorded, and load no checkpoint")
    json: bool = option(False, "print one JSON object instead of lines")

    def __post_init__(self) -> None:
        names = ("context_length", "windows", "batch_size")
        refuse(
            *(((value := getattr(self, name)) is not None and value < 2, f"{name}: at least 2, got {value}") for name in names)
        )


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The one section."""

    compare: CompareConfig = section(CompareConfig, "On what to compare, and how to tell")


@dataclass(frozen=True)
class Member:
    """One run or checkpoint: loss in nats per token with its standard error (NaN: not known), and how far it was trained."""

    path: str
    step: int
    tokens: int
    loss: float
    standard_error: float


@dataclass(frozen=True)
class Comparison:
    """A minus B. ``basis`` says of what the error is: windows, runs, or recorded losses; ``count`` how many of them."""

    a: tuple[Member, ...]
    b: tuple[Member, ...]
    difference: Estimate
    basis: Literal["windows", "runs", "recorded"]
    count: int
    bytes_per_token: float | None

    @property
    def better(self) -> Literal["A", "B"] | None:
        """Which loss is lower beyond doubt, or None. A loss that is not finite is worse than any that is."""
        finite = [all(math.isfinite(own.loss) for own in group) for group in (self.a, self.b)]
        if finite[0] != finite[1]:
            return "A" if finite[0] else "B"
        if not self.difference.is_certain:
            return None
        return "A" if self.difference.value < 0 else "B"

    @property
    def verdict(self) -> str:
        """One sentence."""
        value, error = self.difference.value, self.difference.standard_error
        if self.better and not math.isfinite(value):
            return f"{self.better} is better: the other's loss is not finite."
        if not math.isfinite(value):
            return "Neither is better: no loss is finite."
        if math.isnan(error):
            return f"Nobody can tell: the losses differ by {abs(value):.4f}, and how sure that is was not recorded."
        if self.better is None and error == 0:
            return "A and B are equal: no window shows a difference."
        size = f"{abs(value):.4f} ± {error:.4f} nats per token"
        if self.better:
            return f"{self.better} is better: its loss is lower by {size}."
        return f"No difference can be told: {size}, which chance makes in {self.difference.p:.0%} of such comparisons."


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    with reported():
        words, against = split_groups(list(sys.argv[1:] if argv is None else argv))
        line = parse_command_line(Whole, words, flags={"help"}, short={"-h": "help"}, positionals=True)
        if "help" in line.flags:
            print(USAGE + reference(Whole), end="")
            return 0
        first = [Path(word) for word in line.positionals]
        if against is None:
            refuse((len(first) != 2, f"two runs are compared, got {len(first)}; type: compare A B, or A1 A2 --against B1 B2"))
        groups = (first[:1], first[1:]) if against is None else (first, [Path(word) for word in against])
        small = any(len(group) < 2 for group in groups)
        refuse((against is not None and small, "--against: two runs on either side at least: one has no spread; or type A B"))
        config = load(Whole, line.config, line.overrides).compare
        found = compare(groups[0], groups[1], config)
        print(as_json(found) if config.json else as_text(found))
        return 0
    return 2


def split_groups(words: list[str]) -> tuple[list[str], list[str] | None]:
    """The words without ``--against`` and the runs that follow it, and those; None without it."""
    if "--against" not in words:
        return words, None
    begin = end = words.index("--against") + 1
    while end < len(words) and not words[end].startswith("--"):
        end += 1
    return words[: begin - 1] + words[end:], words[begin:end]


def compare(a: Sequence[Path], b: Sequence[Path], config: CompareConfig) -> Comparison:
    """Measure, or read what was recorded; raises ConfigError for what cannot be compared."""
    for group in (a, b):
        twice = [path for path in group if sum(path.resolve() == own.resolve() for own in group) > 1]
        refuse((bool(twice), f"{twice[0] if twice else ''} stands twice on one side, which would make it look certain"))
    gone = [path for path in (*a, *b) if not checkpoints(path) and (path / METRICS_FILE).is_file()]
    if config.recorded or gone:
        if gone and not config.recorded:
            logging.warning("%s holds no checkpoint: recorded losses are compared", gone[0])
        return from_records(a, b)
    with np.errstate(invalid="ignore"):  # a model may be past saving; the verdict says so
        return from_checkpoints(a, b, config)


# ---------------------------------------------------------------------------------------------------------- measured anew


def from_checkpoints(a: Sequence[Path], b: Sequence[Path], config: CompareConfig) -> Comparison:
    """The losses of all models on the same windows."""
    places = [resolve(path) for path in (*a, *b)]
    refuse_other_tokenizers(places)
    split = shared_data(places, config)
    models = [read_model(place) for place in places]  # mapped from their files: what is not used takes no memory
    if problems := [problem for model, place in zip(models, places, strict=True) for problem in misfits(model, place, split)]:
        raise DataError(problems)
    longest = min(model.config.context_length for model in models)
    if (config.context_length or 0) > longest:
        raise ConfigError(f"compare.context_length: {config.context_length} is more than a model's {longest}")
    windows = Windows(split, config.context_length or longest)
    accelerator = build_accelerator(TrainingConfig(device=config.device, mixed_precision="no"), [], places[0])
    refuse((accelerator.num_processes > 1, "compare runs in one process; type: python -m accel_pretrain.compare"))
    losses, members = [], []
    for given, place, model in zip((*a, *b), places, models, strict=True):
        nats = nats_per_window(
            accelerator.device, model.to(accelerator.device), windows, batch_size=config.batch_size, wanted=config.windows
        )
        losses.append(nats / windows.context_length)
        own, state = mean_of(losses[-1]), read_state(place)
        members.append(Member(str(given), state.step, state.tokens, own.value, own.standard_error))
        model.to("meta")  # the next one has its place
    first, second = tuple(members[: len(a)]), tuple(members[len(a) :])
    if len(a) == len(b) == 1:
        return Comparison(first, second, mean_of(losses[0] - losses[1]), "windows", losses[0].size, split.bytes_per_token)
    return between_runs(first, second, split.bytes_per_token)


def between_runs(a: tuple[Member, ...], b: tuple[Member, ...], bytes_per_token: float | None = None) -> Comparison:
    difference = welch(*(np.array([own.loss for own in group]) for group in (a, b)))
    return Comparison(a, b, difference, "runs", len(a) + len(b), bytes_per_token)


def refuse_other_tokenizers(places: Sequence[Path]) -> None:
    """Nats per token of different tokens say nothing about each other."""
    known = [(place, load_tokenizer(place / "tokenizer")) for place in places if (place / "tokenizer").is_dir()]
    for place, tokenizer in known:
        if tokenizer.fingerprint != known[0][1].fingerprint:
            raise ConfigError(
                f"{place} has another tokenizer ({tokenizer.name}) than {known[0][0]} ({known[0][1].name}), so losses per "
                "token say nothing about each other; compare the bits per byte of the same text, tokenized for each: "
                "python -m accel_pretrain.evaluate --checkpoint RUN --data DIR"
            )


def shared_data(places: Sequence[Path], config: CompareConfig) -> TokenSplit:
    """The tokens that were asked for, or those that all runs were made with."""
    if config.data is not None:
        return open_data(config.data, config.split, config.dtype)
    recorded = [recorded_data(place, config.split)[0] for place in places]
    if len(set(map(str, recorded))) > 1:
        raise ConfigError(
            f"the runs were made with different data ({', '.join(sorted(set(map(str, recorded))))}); type --data DIR"
        )
    path, dtype = find_data(places[0], config.split)
    return open_data(path, config.split, dtype)


# ----------------------------------------------------------------------------------------------------------- as recorded


def from_records(a: Sequence[Path], b: Sequence[Path]) -> Comparison:
    """The last validation losses in the runs' metrics: two of them as if independent, which makes the error too large."""
    runs = read_runs([*a, *b])
    configs = [own for run in runs if (own := settings(run))]
    if differing := [key for key in _WINDOWS if len({config.get(key, "") for config in configs}) > 1]:
        what = ", ".join(differing)
        raise ConfigError(f"the runs have measured their losses on different windows ({what}): as recorded they say nothing")
    members, bits = [], []
    for given, run in zip((*a, *b), runs, strict=True):
        series = run.series("eval/val_loss")
        if not series.values.size:
            raise DataError(f"{given} has recorded no validation loss")
        row = run.rows[series.rows[-1]]
        error = run.values_at("eval/val_loss_standard_error", series.rows[-1:])[0]
        bits.append(run.values_at("eval/bits_per_byte", series.rows[-1:])[0])
        members.append(
            Member(
                str(given),
                row["step"],
                int(np.nan_to_num(as_number(row.get("tokens")))),
                float(series.values[-1]),
                float(error),
            )
        )
    per_byte = members[0].loss / math.log(2) / bits[0]
    first, second = tuple(members[: len(a)]), tuple(members[len(a) :])
    if len(a) > 1:
        return between_runs(first, second, per_byte if math.isfinite(per_byte) else None)
    (one,), (other,) = first, second
    difference = Estimate(one.loss - other.loss, math.hypot(one.standard_error, other.standard_error), 1e6)
    return Comparison(first, second, difference, "recorded", 2, per_byte if math.isfinite(per_byte) else None)


# ----------------------------------------------------------------------------------------------------------- the result


def as_text(found: Comparison) -> str:
    """A line for each run, the difference, and the verdict."""
    lines = []
    for letter, group in (("A", found.a), ("B", found.b)):
        for number, own in enumerate(group, start=1):
            name = letter if len(group) == 1 else f"{letter}{number}"
            error = f" ± {own.standard_error:.4f}" if math.isfinite(own.standard_error) else ""
            trained = f"{own.path} (iteration {own.step:,}, {own.tokens:,} tokens)"
            lines.append(f"{name:<16}{own.loss:.4f}{error} nats per token, {trained}")
    low, high = found.difference.interval
    if math.isfinite(low):
        basis = {
            "windows": f"over {found.count:,} windows, pair by pair; another seed may differ",
            "runs": f"over {found.count} runs, by Welch's test",
            "recorded": "of recorded losses, as if of different windows: measured anew, the error would be smaller",
        }[found.basis]  # fmt: skip
        lines.append(f"{'A - B':<16}{found.difference.value:+.4f} ± {found.difference.standard_error:.4f}, {basis}")
        lines.append(f"{f'  {LEVEL:.0%} interval':<16}{low:+.4f} to {high:+.4f}, p {smallest(found.difference.p)}")
        if found.bytes_per_token:
            bits = [value / math.log(2) / found.bytes_per_token for value in (found.difference.value, low, high)]
            lines.append(f"{'  bits per byte':<16}{bits[0]:+.4f} ({bits[1]:+.4f} to {bits[2]:+.4f})")
    seen = [sum(own.tokens for own in group) / len(group) for group in (found.a, found.b)]
    if min(seen) and max(seen) / min(seen) > 1.01:
        lines.append(f"{'Notice':<16}{'AB'[seen[1] > seen[0]]} has seen {max(seen) / min(seen):.2f} times as many tokens")
    return "\n".join([*lines, found.verdict])


def smallest(p: float) -> str:
    """A probability, as far as the numbers under it are exact."""
    return f"= {p:.2g}" if p >= 1e-10 else "< 1e-10"


def as_json(found: Comparison) -> str:
    """One JSON object; losses in nats per token, and null for what is not known or not finite."""
    estimate = found.difference
    document: dict[str, Any] = {
        "a": [asdict(own) for own in found.a], "b": [asdict(own) for own in found.b],
        "basis": found.basis, "count": found.count, "difference": estimate.value, "standard_error": estimate.standard_error,
        "confidence_interval": list(estimate.interval), "confidence": LEVEL, "p": estimate.p,
        "degrees_of_freedom": estimate.freedom, "better": found.better, "verdict": found.verdict,
    }  # fmt: skip
    return json.dumps(_without_nan(document), allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_without_nan(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
