"""What a ``wandb agent`` wants of the run that it starts: settings, a directory of its own, and a report to wandb.

An agent writes the values of a trial, wandb.config's, into a file that ``WANDB_SWEEP_PARAM_PATH`` names. They are merged into
the config here, as the last word: whether the sweep's command also passes them (``${args}``) or not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel_pretrain.config import RunConfig
from accel_pretrain.errors import ConfigError
from accel_pretrain.launchers import sweep_trial
from accel_pretrain.typed_yaml import Entry, entries_of
from accel_pretrain.yaml_files import read_mapping


def wishes() -> list[tuple[str, Entry]]:
    """The overrides of the trial that an agent has started; none for a run that a person has. Refuses keys that are none."""
    trial = sweep_trial()
    if trial is None:
        return []
    values = _values_in(trial.parameters) if trial.parameters is not None else {}
    told = entries_of(RunConfig, values, f"the wandb sweep {trial.sweep}")
    return [("logging.use_wandb", Entry("true", "wandb agent")), *told.items()]


def own_directory(config: RunConfig) -> RunConfig:
    """For a trial of a sweep, the folder below ``checkpoint_dir`` that has the run's id: trials share one command."""
    trial = sweep_trial()
    if trial is None or trial.run is None:
        return config
    folder = config.checkpoint.checkpoint_dir / trial.run
    return replace(config, checkpoint=replace(config.checkpoint, checkpoint_dir=folder))


def _values_in(path: Path) -> Mapping[str, Any]:
    """Names and values, as the agent has written them: ``name: {value: ...}``, and a version."""
    if not path.is_file():
        raise ConfigError(f"WANDB_SWEEP_PARAM_PATH: {os.path.abspath(path)} does not exist; start the agent in this folder")
    found = {key: value for key, value in read_mapping(path).items() if key != "wandb_version"}
    return {key: value["value"] if isinstance(value, dict) and "value" in value else value for key, value in found.items()}
