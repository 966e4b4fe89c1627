"""How good a trained model is on a token dataset: ``python -m accel_pretrain.evaluate --checkpoint RUN --data DIR``.

Loss with its standard error, perplexity and bits per byte, on the whole split unless told otherwise; on one process or many
(``accelerate launch -m accel_pretrain.evaluate ...``) with the same result. ``--xz`` also compresses the text with a general
compressor, as a yardstick: a model that predicts text well needs fewer bits for it.
"""

from __future__ import annotations

import json
import logging
import lzma
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

from accel_pretrain.checkpoint import read_model, read_state, resolve
from accel_pretrain.config import RunConfig
from accel_pretrain.data import Windows
from accel_pretrain.errors import ConfigError, DataError, refuse, reported
from accel_pretrain.models import Transformer
from accel_pretrain.runtime import TrainingConfig, build_accelerator
from accel_pretrain.shards import TokenSplit, open_split
from accel_pretrain.tokenizer import load_tokenizer
from accel_pretrain.typed_yaml import load, option, parse_command_line, reference, section
from accel_pretrain.validation import EvalResult, validate

USAGE = """\
usage: python -m accel_pretrain.evaluate --checkpoint RUN [--data DIR] [--key VALUE | section.key=VALUE]...
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


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured on what; ``split`` is None for a bare file, ``xz_bits_per_byte`` where it was not asked for."""

    checkpoint: str
    step: int
    data: str
    split: str | None
    context_length: int
    processes: int
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
    checkpoint = resolve(source.checkpoint)
    path, dtype = find_data(source, checkpoint)
    split, model = open_split(path, source.split, dtype), read_model(checkpoint)
    refuse_misfits(model, checkpoint, split, measure)
    windows = Windows(split, measure.context_length or model.config.context_length)
    training = TrainingConfig(device=measure.device, mixed_precision=measure.mixed_precision)
    accelerator = build_accelerator(training, [], checkpoint)
    try:
        result = run_model(accelerator, model, windows, measure, split.bytes_per_token)
        if accelerator.is_main_process:
            report = Report(
                checkpoint=str(checkpoint), step=read_state(checkpoint).step, data=str(path),
                split=source.split if path.is_dir() else None, context_length=windows.context_length,
                processes=accelerator.num_processes, result=result,
                xz_bits_per_byte=xz_bits_per_byte(split) if measure.xz else None,
            )  # fmt: skip
            print(as_json(report) if measure.json else as_text(report), flush=True)
        return 0
    finally:
        accelerator.end_training()


def run_model(
    accelerator: Accelerator, model: Transformer, windows: Windows, measure: MeasureConfig, bytes_per_token: float | None
) -> EvalResult:
    """The loss on ``windows``, under the precision of the accelerator. Collective."""
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    wanted = None if measure.eval_iters is None else measure.eval_iters * measure.batch_size
    return validate(
        accelerator, prepared, windows, batch_size=measure.batch_size, wanted=wanted, bytes_per_token=bytes_per_token
    )


# ------------------------------------------------------------------------------------------------------------- the data


def find_data(source: SourceConfig, checkpoint: Path) -> tuple[Path, str | None]:
    """Path and dtype of the data that was asked for, or else of what the run's own config names."""
    if source.data is not None:
        return source.data, source.dtype
    recorded = load(RunConfig, checkpoint / "config.yaml").data
    path = recorded.val_data_path if source.split == "val" and recorded.val_data_path else recorded.train_data_path
    if path is None or not path.exists() or (path.is_file() and source.split not in ("train", "val")):
        raise ConfigError(
            f"source.data: the {source.split} split that {checkpoint} was made with ({path}) is not here; type --data DIR"
        )
    return path, recorded.dtype


def refuse_misfits(model: Transformer, checkpoint: Path, split: TokenSplit, measure: MeasureConfig) -> None:
    """Raise one error with every reason why this model's loss on these tokens would not mean anything, or cannot be had."""
    problems = []
    own = checkpoint / "tokenizer"
    if split.tokenizer and own.is_dir() and load_tokenizer(own).fingerprint != split.tokenizer["fingerprint"]:
        problems.append(
            f"source.data: {split.source} was made with another tokenizer ({split.tokenizer['name']}) than the model's; "
            f"tokenize the text again: python -m prep.tokenize SRC... --tokenizer {own}"
        )
    if split.max_id >= model.vocab_size:
        problems.append(
            f"source.data: {split.source} holds token id {split.max_id}, the model knows ids below {model.vocab_size}"
        )
    longest = model.config.context_length
    if (measure.context_length or 0) > longest:
        problems.append(f"measure.context_length: {measure.context_length} is more than the model's {longest}")
    if measure.xz and not split.tokenizer_path:
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


def as_json(report: Report) -> str:
    """One JSON object; losses are in nats per token, and what is not known is null."""
    result = report.result
    facts = {name: getattr(report, name) for name in ("checkpoint", "step", "data", "split", "context_length", "processes")}
    measured = {name: getattr(result, name) for name in ("tokens", "loss", "standard_error", "perplexity", "bits_per_byte")}
    return json.dumps(
        {
            **facts,
            **measured,
            "bits_per_byte_standard_error": report.bits_standard_error,
            "xz_bits_per_byte": report.xz_bits_per_byte,
        }
    )


def as_text(report: Report) -> str:
    """Aligned lines for people."""
    result, split = report.result, f", {report.split} split" if report.split else ""
    rows = [
        ("Checkpoint", f"{report.checkpoint} (iteration {report.step})"),
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
    return "\n".join(f"{name:<16}{value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(main())
