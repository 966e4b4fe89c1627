"""How good a trained model is: ``python -m accel_pretrain.evaluate --checkpoint RUN`` with ``--data DIR`` or ``--tasks NAMES``.

On tokens, loss with its standard error, perplexity and bits per byte, on the whole split unless told otherwise. ``--xz`` also
compresses the text with a general compressor, as a yardstick: a model that predicts text well needs fewer bits for it. With
``--tasks hellaswag,lambada_openai`` the measures of lm-eval (see :mod:`accel_pretrain.harness`), and those on tokens only if
``--data`` is given too. One process or many (``accelerate launch -m accel_pretrain.evaluate ...``) have the same result.
"""

from __future__ import annotations

import json
import logging
import lzma
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from accelerate import Accelerator

from accel_pretrain.checkpoint import read_model, read_state, read_tokenizer
from accel_pretrain.commit import resolve
from accel_pretrain.data import Windows
from accel_pretrain.errors import ConfigError, DataError, refuse, reported
from accel_pretrain.harness import Scorer, TasksConfig, as_plain, as_tables, find_tasks, run_tasks
from accel_pretrain.heldout import find_data, misfits
from accel_pretrain.launchers import leave_after
from accel_pretrain.mixture import open_data, paths_of
from accel_pretrain.models import Transformer
from accel_pretrain.runtime import TrainingConfig, build_accelerator
from accel_pretrain.shards import TokenSplit, splits_in
from accel_pretrain.tokenizer import load_tokenizer
from accel_pretrain.typed_yaml import load, option, parse_command_line, reference, section
from accel_pretrain.validation import EvalResult, validate

USAGE = """\
usage: python -m accel_pretrain.evaluate --checkpoint RUN [--data DIR] [--key VALUE | section.key=VALUE]...
       python -m accel_pretrain.evaluate --checkpoint RUN --tasks NAME,NAME [--num_fewshot 5] [--limit 100]
       accelerate launch -m accel_pretrain.evaluate --checkpoint RUN [...]      several processes, the same numbers

  --config FILE    the keys below, as YAML or JSON
  --help           show this

"""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which model, on which tokens."""

    checkpoint: Path | None = option(None, "a run directory (its newest), a checkpoint folder, or a run's latest or best")
    data: Path | None = option(None, "a dataset folder, or a file of ids; null: the data that the run was made with")
    split: str = option("val", "which split of the dataset")
    dtype: Literal["uint16", "uint32"] | None = option(None, "of a bare file; null: the dataset's, or uint16")
    tokenizer: str | None = option(None, "for tasks: a name, a .tiktoken file or a folder; null: the model's own")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How to measure, and what to print."""

    context_length: int | None = option(None, "tokens per window; null: the model's context")
    batch_size: int = option(16, "windows per process at a time")
    eval_iters: int | None = option(None, "batches of batch_size windows, spread over the split; null: the whole split")
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: cuda, else mps, else cpu")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "no: float32, the same on every machine; bf16, fp16")
    xz: bool = option(False, "compress the split's text with xz -9e, and compare")
    json: bool = option(False, "print one JSON object instead of lines")

    def __post_init__(self) -> None:
        refuse(
            *(
                ((value := getattr(self, name)) is not None and value < 1, f"{name}: must be at least 1, got {value}")
                for name in ("context_length", "batch_size", "eval_iters")
            ),
            (self.xz and self.eval_iters is not None, "xz: compares on the whole split; leave eval_iters null"),
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything that ``accel_pretrain.evaluate`` can be told."""

    source: SourceConfig = section(SourceConfig, "Which model, on which tokens")
    measure: MeasureConfig = section(MeasureConfig, "How to measure, and what to print")
    harness: TasksConfig = section(TasksConfig, "On which tasks, by the package lm-eval")

    def __post_init__(self) -> None:
        about_tokens = [name for name in ("xz", "eval_iters") if getattr(self.measure, name)]
        refuse((bool(about_tokens) and not self.on_tokens, f"measure.{', '.join(about_tokens)}: about tokens, add --data DIR"))

    @property
    def on_tokens(self) -> bool:
        """Whether to measure on tokens: when told on which, or when there is nothing else to do."""
        return self.source.data is not None or not self.harness.tasks


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured on which tokens; ``split`` is None for a bare file, ``xz_bits_per_byte`` where it was not asked for."""

    data: str
    split: str | None
    context_length: int
    result: EvalResult
    xz_bits_per_byte: float | None

    @property
    def bits_standard_error(self) -> float | None:
        """That of ``bits_per_byte``, which is the loss in another unit."""
        result = self.result
        return result.standard_error / math.log(2) / result.bytes_per_token if result.bytes_per_token else None


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    with reported():
        words = sys.argv[1:] if argv is None else argv
        line = parse_command_line(EvaluateConfig, words, flags={"help"}, short={"-h": "help"})
        if "help" in line.flags:
            print(USAGE + reference(EvaluateConfig), end="")
            return 0
        return evaluate(load(EvaluateConfig, line.config, line.overrides))
    return 2


def evaluate(config: EvaluateConfig) -> int:
    """Measure and print; returns the exit code."""
    source, measure = config.source, config.measure
    if source.checkpoint is None:
        raise ConfigError("source.checkpoint: not given; type --checkpoint RUN, the directory of a run")
    found = find_tasks(config.harness) if config.harness.tasks else None
    checkpoint = resolve(source.checkpoint)
    path, dtype = (source.data, source.dtype) if source.data else (None, None)
    if config.on_tokens and path is None:
        path, dtype = find_data(checkpoint, source.split)
    split = open_data(path, source.split, dtype) if path else None
    model = read_model(checkpoint)
    refuse_misfits(model, checkpoint, split, measure)
    context_length = measure.context_length or model.config.context_length
    windows = Windows(split, context_length) if split else None
    tokenizer = read_tokenizer(checkpoint, source.tokenizer) if found else None
    accelerator = build_accelerator(
        TrainingConfig(device=measure.device, mixed_precision=measure.mixed_precision), [], checkpoint
    )
    try:
        prepared = cast("Transformer", accelerator.prepare_model(model, evaluation_mode=True))
        report = results = None
        if path and split and windows:
            result = run_model(accelerator, prepared, windows, measure, split.bytes_per_token)
            report = Report(
                data=split.source, split=source.split if any(map(splits_in, paths_of(path))) else None,
                context_length=context_length, result=result,
                xz_bits_per_byte=xz_bits_per_byte(split) if measure.xz and accelerator.is_main_process else None,
            )  # fmt: skip
        if found and tokenizer:
            scorer = Scorer(accelerator, prepared, tokenizer, batch_size=measure.batch_size, context_length=context_length)
            results = run_tasks(found, scorer, config.harness)
        if accelerator.is_main_process:
            about = {"checkpoint": str(checkpoint), "step": read_state(checkpoint).step, "processes": accelerator.num_processes}
            print((as_json if measure.json else as_text)(about, report, results), flush=True)
        return 0
    finally:
        accelerator.end_training()


def run_model(
    accelerator: Accelerator, prepared: Transformer, windows: Windows, measure: MeasureConfig, bytes_per_token: float | None
) -> EvalResult:
    """The loss on ``windows``, under the precision of the accelerator. Collective."""
    wanted = None if measure.eval_iters is None else measure.eval_iters * measure.batch_size
    return validate(
        accelerator, prepared, windows, batch_size=measure.batch_size, wanted=wanted, bytes_per_token=bytes_per_token
    )


# ------------------------------------------------------------------------------------------------------------- the data


def refuse_misfits(model: Transformer, checkpoint: Path, split: TokenSplit | None, measure: MeasureConfig) -> None:
    """Raise one error with every reason why this model's numbers would not mean anything, or cannot be had."""
    problems = misfits(model, checkpoint, split) if split else []
    longest = model.config.context_length
    if (measure.context_length or 0) > longest:
        problems.append(f"measure.context_length: {measure.context_length} is more than the model's {longest}")
    if split and measure.xz and not split.tokenizer_path:
        problems.append(f"measure.xz: {split.source} is a bare file of ids, whose text is not known; name a dataset folder")
    if problems:
        raise DataError(problems)


def xz_bits_per_byte(split: TokenSplit) -> float:
    """Bits that ``xz -9e`` needs per byte of the split's text, which is decoded from its ids a piece at a time.

    As close to a fair race as two such different things come: both see the same text once, from the front; xz may look back 64
    MiB, but knows nothing before the first byte; where documents end, which the model has to predict, xz is not asked.
    """
    assert split.tokenizer_path is not None
    tokenizer = load_tokenizer(split.tokenizer_path)
    compressor = lzma.LZMACompressor(lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    text_bytes = compressed_bytes = 0
    for file in split.files:
        for begin in range(0, file.size, 1 << 20):
            text = tokenizer.decode_bytes(file[begin : begin + (1 << 20)].tolist())
            text_bytes += len(text)
            compressed_bytes += len(compressor.compress(text))
    return 8 * (compressed_bytes + len(compressor.flush())) / max(1, text_bytes)


# ----------------------------------------------------------------------------------------------------------- the result


def as_json(about: Mapping[str, Any], report: Report | None, results: Mapping[str, Any] | None) -> str:
    """One JSON object; losses are in nats per token, lm-eval's results are under ``tasks``, and what is not known is null."""
    document = dict(about)
    if report is not None:
        result = report.result
        document |= {name: getattr(report, name) for name in ("data", "split", "context_length")}
        document |= {
            name: getattr(result, name) for name in ("tokens", "loss", "standard_error", "perplexity", "bits_per_byte")
        }
        document["bits_per_byte_standard_error"] = report.bits_standard_error
        document["xz_bits_per_byte"] = report.xz_bits_per_byte
    if results is not None:
        document["tasks"] = as_plain(results)
    return json.dumps(document)


def as_text(about: Mapping[str, Any], report: Report | None, results: Mapping[str, Any] | None) -> str:
    """Aligned lines for people, then lm-eval's own tables."""
    rows = [("Checkpoint", f"{about['checkpoint']} (iteration {about['step']})"), *(rows_of(report) if report else ())]
    lines = [f"{name:<16}{value}" for name, value in rows]
    return "\n".join([*lines, *(("", as_tables(results)) if results else ())])


def rows_of(report: Report) -> list[tuple[str, str]]:
    """Names and values of what was measured on tokens."""
    result, split = report.result, f", {report.split} split" if report.split else ""
    rows = [
        ("Data", f"{report.data}{split}: {result.tokens:,} tokens in windows of {report.context_length}"),
        ("Loss", f"{result.loss:.4f} ± {result.standard_error:.4f} nats per token"),
        ("Perplexity", f"{result.perplexity:.2f}"),
    ]
    bits, xz = result.bits_per_byte, report.xz_bits_per_byte
    if bits is None:
        rows.append(("Bits per byte", "unknown: a bare file of ids does not say how long its text is"))
    else:
        rows.append(("Bits per byte", f"{bits:.4f} ± {report.bits_standard_error:.4f}"))
    if bits is not None and xz is not None:
        smaller, larger = ("the model's", "xz's") if bits < xz else ("xz's", "the model's")
        rows.append(("  of xz -9e", f"{xz:.4f}"))
        rows.append(("", f"{smaller} is smaller, {min(bits, xz) / max(bits, xz):.0%} of {larger}"))
    return rows


if __name__ == "__main__":
    leave_after(main)
