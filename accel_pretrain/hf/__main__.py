"""``python -m accel_pretrain.hf import SOURCE -o RUN`` and ``python -m accel_pretrain.hf export --checkpoint RUN -o DIR``."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence

from accel_pretrain.errors import ConfigError, reported
from accel_pretrain.hf.exporting import ExportConfig, export
from accel_pretrain.hf.importing import ImportConfig, import_weights
from accel_pretrain.typed_yaml import load, parse_command_line, reference

USAGE = """\
usage: python -m accel_pretrain.hf import SOURCE -o RUN [--key VALUE]...
       python -m accel_pretrain.hf export --checkpoint RUN -o DIR [--key VALUE]...

  SOURCE           a Hugging Face folder or hub id; a nanoGPT ckpt.pt; a litgpt folder; OpenAI's TensorFlow GPT-2
  --config FILE    the keys below, as YAML or JSON
  --help           show this

"""


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    with reported():
        words = list(sys.argv[1:] if argv is None else argv)
        command = words[0] if words else "--help"
        if command in ("-h", "--help"):
            print(f"{USAGE}import:\n{reference(ImportConfig)}\nexport:\n{reference(ExportConfig)}", end="")
            return 0 if words else 2
        if command == "import":
            return run_import(words[1:])
        if command == "export":
            return run_export(words[1:])
        raise ConfigError(f"{command}: type import or export")
    return 2


def run_import(words: Sequence[str]) -> int:
    short = {"-o": "out", "-h": "help"}
    line = parse_command_line(ImportConfig, words, flags={"help"}, short=short, positionals=True)
    if "help" in line.flags:
        print(USAGE + reference(ImportConfig), end="")
        return 0
    if len(line.positionals) > 1:
        raise ConfigError(f"one source at a time, got {', '.join(line.positionals)}")
    config = load(ImportConfig, line.config, line.overrides)
    if line.positionals:
        config = dataclasses.replace(config, source=line.positionals[0])
    checkpoint = import_weights(config, print)
    print(f"Imported to {checkpoint}")
    print(f"To train on:  python -m accel_pretrain.train --init_from {config.out} --train_data_path DATA --checkpoint_dir NEW")
    return 0


def run_export(words: Sequence[str]) -> int:
    line = parse_command_line(ExportConfig, words, flags={"help"}, short={"-o": "out", "-h": "help"})
    if "help" in line.flags:
        print(USAGE + reference(ExportConfig), end="")
        return 0
    export(load(ExportConfig, line.config, line.overrides), print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
