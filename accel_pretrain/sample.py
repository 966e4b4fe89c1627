"""Text from a trained model: ``python -m accel_pretrain.sample --checkpoint RUN --prompt "Once upon a time"``.

Standard output gets prompts and continuations, and a rule between samples, so that it can be piped; everything that is said
about them goes to standard error. :mod:`accel_pretrain.generate` draws the tokens; this file turns them into text.
"""

from __future__ import annotations

import codecs
import io
import itertools
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from accel_pretrain.checkpoint import read_model, read_tokenizer
from accel_pretrain.commit import resolve
from accel_pretrain.errors import ConfigError, refuse, reported
from accel_pretrain.generate import SamplingConfig, generator_for, streams
from accel_pretrain.models import Transformer
from accel_pretrain.tokenizer import Tokenizer
from accel_pretrain.typed_yaml import CommandLine, load, option, parse_command_line, reference, section

RULE = "-" * 80
USAGE = """\
usage: python -m accel_pretrain.sample --checkpoint RUN [--prompt TEXT]... [--key VALUE | section.key=VALUE]...

  --prompt TEXT    may be given several times; `--prompt -` reads standard input; without any, a new document begins
  --config FILE    the keys below, as YAML or JSON
  --help           show this

"""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which model continues what."""

    checkpoint: Path | None = option(None, "a run directory (its newest), a checkpoint folder, or a run's latest or best")
    prompt: str | None = option(None, "text to continue; -: standard input; null: a new document")
    prompt_file: Path | None = option(None, "a file of text to continue, exactly as it is")
    num_samples: int = option(1, "continuations of every prompt")
    batch_size: int = option(8, "continuations that are generated together; they are still shown one after the other")
    tokenizer: str | None = option(None, "for a run on a bare file of ids; null: the run's own")
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: cuda, else mps, else cpu")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the weights; bfloat16: half the memory, other roundings")

    def __post_init__(self) -> None:
        refuse(
            (self.num_samples < 1, f"num_samples: must be at least 1, got {self.num_samples}"),
            (self.batch_size < 1, f"batch_size: must be at least 1, got {self.batch_size}"),
        )


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Everything that ``accel_pretrain.sample`` can be told."""

    source: SourceConfig = section(SourceConfig, "What to load and what to continue")
    sampling: SamplingConfig = section(SamplingConfig, "How each next token is drawn")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    with reported():
        words = sys.argv[1:] if argv is None else argv
        line = parse_command_line(SampleConfig, words, flags={"help"}, short={"-h": "help"})
        if "help" in line.flags:
            print(USAGE + reference(SampleConfig), end="")
            return 0
        config = load(SampleConfig, line.config, line.overrides)
        return sample(config, collect_prompts(line, config.source))
    return 2


def sample(config: SampleConfig, prompts: Sequence[str]) -> int:
    """Continue every prompt ``num_samples`` times, on standard output; returns the exit code."""
    model, tokenizer = load_for_sampling(config.source)
    device = choose_device(config.source.device)
    if config.source.dtype == "bfloat16":
        model.bfloat16().make_tables()  # the rotary angles stay as they are
    model.to(device)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    wanted = list(itertools.product(prompts, range(config.source.num_samples)))
    tokens, began = 0, time.perf_counter()
    try:
        for begin in range(0, len(wanted), config.source.batch_size):
            write(f"{RULE}\n" if begin else "")
            batch = wanted[begin : begin + config.source.batch_size]
            tokens += write_samples(model, tokenizer, batch, config.sampling)
    except KeyboardInterrupt:
        write("\n")
        return 130
    seconds = time.perf_counter() - began
    print(f"{tokens:,} tokens in {seconds:.2f} s: {tokens / seconds:,.0f} tokens/s on {device}", file=sys.stderr)
    return 0


def write(text: str) -> None:
    """Show ``text`` at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_samples(
    model: Transformer, tokenizer: Tokenizer, samples: Sequence[tuple[str, int]], sampling: SamplingConfig
) -> int:
    """Write each prompt and its continuation, piece by piece as it comes; returns how many tokens the continuations have.

    ``samples`` are pairs of a prompt and a number among the samples of that prompt. The draws depend on the seed, the prompt
    and that number: on no other sample.
    """
    prompts = [tokenizer.encode_prompt(prompt) for prompt, _ in samples]
    longest = model.config.context_length
    for ids, (_, repeat) in zip(prompts, samples, strict=True):
        if len(ids) > longest and repeat == 0:
            seen = f"the model sees the last {longest} of its {len(ids):,} tokens"
            print(f"the prompt is longer than the context: {seen}", file=sys.stderr)
    generators = [generator_for(ids, sampling.seed, repeat) for ids, (_, repeat) in zip(prompts, samples, strict=True)]
    continuations = streams(
        model, prompts, sampling, vocab_size=tokenizer.vocab_size, stop_id=tokenizer.eot_id, generators=generators
    )
    tokens = 0
    for number, ((prompt, _), new_ids) in enumerate(zip(samples, continuations, strict=True)):
        write(f"{RULE}\n{prompt}" if number else prompt)
        for text in decode_stream(tokenizer, new_ids):
            write(text)
            tokens += 1
        tokens -= 1  # the last piece comes after the last token
        write("\n")
    return tokens


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ``ids``: one piece per id as it comes, and one at the end. The first bytes of a character wait for its last.

    Together the pieces are ``tokenizer.decode(ids)``: what is not UTF-8 becomes U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for id in ids:
        yield decoder.decode(tokenizer.decode_bytes([id]))
    yield decoder.decode(b"", final=True)


# --------------------------------------------------------------------------------------------------- what was asked for


def collect_prompts(line: CommandLine, source: SourceConfig) -> list[str]:
    """Every ``--prompt`` in its order (else the config file's), then the prompt file; one empty prompt if there is none."""
    given = [str(entry.raw) for key, entry in line.overrides if key == "source.prompt"]
    if not given and source.prompt is not None:
        given = [source.prompt]
    prompts = [_standard_input() if text == "-" else text for text in given]
    if source.prompt_file is not None:
        prompts.append(_prompt_file(source.prompt_file))
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python passes on bytes that are not UTF-8
            raise ConfigError("source.prompt: not UTF-8 text")
    return prompts or [""]


def _standard_input() -> str:
    return _text_of(sys.stdin.buffer.read(), "standard input")


def _prompt_file(path: Path) -> str:
    try:
        return _text_of(path.read_bytes(), f"source.prompt_file: {path}")
    except OSError as error:
        raise ConfigError(f"source.prompt_file: cannot read {path.absolute()} ({error.strerror})") from None


def _text_of(content: bytes, origin: str) -> str:
    if not content:
        raise ConfigError(f"{origin} is empty: to begin a new document, give no prompt")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{origin} is not UTF-8 text") from None


def choose_device(wanted: str) -> torch.device:
    """The device that ``wanted`` means here; raises :class:`ConfigError` when this machine does not have it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, here in available.items() if here)
    refuse((not available[wanted], f"source.device: {wanted} is not available on this machine; type --device auto"))
    return torch.device(wanted)


def load_for_sampling(source: SourceConfig) -> tuple[Transformer, Tokenizer]:
    """The model, and the tokenizer that it was trained with, or the one that was named where none was recorded.

    Raises :class:`CheckpointError` when there is no good checkpoint, no tokenizer, or one that is not the model's.
    """
    if source.checkpoint is None:
        raise ConfigError("source.checkpoint: not given; type --checkpoint RUN, the directory of a run")
    checkpoint = resolve(source.checkpoint)
    return read_model(checkpoint), read_tokenizer(checkpoint, source.tokenizer)


if __name__ == "__main__":
    sys.exit(main())
