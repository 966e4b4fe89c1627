"""Where a run reports: the terminal and ``metrics.jsonl`` always, wandb and others through Accelerate's trackers.

A tracker that is missing, not logged in, broken or slow costs one warning and never the run: each has a thread of its own
(:mod:`accel_pretrain.outbox`).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tqdm import tqdm

from accel_pretrain.errors import refuse
from accel_pretrain.histograms import DRAWN_BY, Histogram, track_histograms
from accel_pretrain.metrics import MetricsFile, RowsFile
from accel_pretrain.outbox import START, Outbox, quieten_threads
from accel_pretrain.redaction import redact
from accel_pretrain.runtime import wandb_knows_me
from accel_pretrain.typed_yaml import option

SAMPLES_FILE = "samples.jsonl"
_TAKE_TEXT = ("tensorboard", "comet_ml", "trackio")  # what Accelerate's log does with a text there: keep it
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What to report, how often, and to whom."""

    log_interval: int = option(100, "updates between metrics")
    trackers: tuple[str, ...] = option((), "Accelerate trackers by name: wandb, tensorboard, trackio, mlflow, ...")
    use_wandb: bool = option(False, "the same as naming wandb in trackers")
    wandb_project: str = option("transformer-lm", "project, for trackers that have projects")
    wandb_run_name: str | None = option(None, "run name in wandb, trackio and mlflow; null: they choose")
    sample_interval: int | None = option(None, "updates between generated samples; null: none")
    sample_prompt: str = option("", "what the samples continue; empty: a new document")
    sample_prompts: tuple[str, ...] = option((), "several of them, in place of sample_prompt")
    sample_tokens: int = option(64, "tokens per sample")
    sample_temperature: float = option(0.8, "divides the logits of samples; 0: always the most likely token")

    def __post_init__(self) -> None:
        known = ["all", *LOGGER_TYPE_TO_CLASS]
        unknown = [name for name in self.trackers if name not in known]
        refuse(
            (bool(unknown), f"trackers: {', '.join(unknown)}: not among {', '.join(known)}"),
            (self.log_interval < 1, f"log_interval: must be at least 1, got {self.log_interval}"),
            (
                self.sample_interval is not None and self.sample_interval < 1,
                f"sample_interval: must be at least 1 or null, got {self.sample_interval}",
            ),
            (self.sample_tokens < 1, f"sample_tokens: must be at least 1, got {self.sample_tokens}"),
            (self.sample_temperature < 0, f"sample_temperature: must not be negative, got {self.sample_temperature}"),
            (bool(self.sample_prompt and self.sample_prompts), "sample_prompts: give it or sample_prompt, not both"),
        )

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the samples continue, one each."""
        return self.sample_prompts or (self.sample_prompt,)

    @property
    def tracker_names(self) -> list[str]:
        """The trackers that can be imported here; a warning names those that cannot."""
        wanted = dict.fromkeys((*self.trackers, *(("wandb",) if self.use_wandb else ())))
        missing = [name for name in wanted if name != "all" and importlib.util.find_spec(_module(name)) is None]
        for name in missing:
            _log.warning("%s is not installed, so it gets no metrics (pip install 'accel_pretrain[track]')", name)
        return [name for name in wanted if name not in missing]


def _module(tracker: str) -> str:
    return {"comet_ml": "comet_ml", "tensorboard": "tensorboard", "dvclive": "dvclive"}.get(tracker, tracker)


class RunLog:
    """The terminal, the metrics file and the trackers of one run. Only the main process writes."""

    def __init__(self, accelerator: Accelerator, run_dir: Path, *, step: int, total: int) -> None:
        self._accelerator, self._run_dir = accelerator, run_dir
        self._outboxes: list[Outbox] = []
        self._hook: Callable[[threading.ExceptHookArgs], object] | None = None
        main = accelerator.is_main_process
        self._file = MetricsFile(run_dir, step) if main else None
        self._samples = RowsFile(run_dir / SAMPLES_FILE, step) if main else None
        self._bar = tqdm(
            total=total, initial=step, unit="it", dynamic_ncols=True, smoothing=0.05,
            disable=not (main and sys.stderr.isatty()),
        )  # fmt: skip

    def start_trackers(self, config: LoggingConfig, settings: Mapping[str, Any]) -> None:
        """Begin reporting to the trackers that the Accelerator was built with; ``settings`` is what they are told of the run.

        Each is made and started as :meth:`Accelerator.init_trackers` would, but by itself.
        """
        if not (self._accelerator.log_with and self._accelerator.is_main_process):
            return
        flat = _flat(settings)
        self._hook = quieten_threads([_module(str(name)) for name in self._accelerator.log_with])
        self._outboxes = [Outbox(name, make) for name, make in self._makers(config, flat)]
        for outbox in self._outboxes:
            outbox.wait_for_start(self.line)

    def _makers(self, config: LoggingConfig, settings: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], GeneralTracker]]]:
        """For each tracker its name, and what makes it, starts it and tells it the ``settings``."""
        options: dict[str, dict[str, Any]] = {
            "trackio": {"name": config.wandb_run_name},
            "mlflow": {"run_name": config.wandb_run_name},
            "dvclive": {
                "dir": str(self._run_dir / "dvclive"),
                "save_dvc_exp": False,
            },  # no commit of its own; else both would write into the current folder
            "swanlab": {"logdir": str(self._run_dir / "swanlog")},
        }
        if "wandb" in map(str, self._accelerator.log_with):
            options["wandb"] = self._wandb_options(config)
        for wanted in self._accelerator.log_with:

            def make(wanted: Any = wanted) -> GeneralTracker:
                tracker = wanted
                if not isinstance(wanted, GeneralTracker):
                    kind = LOGGER_TYPE_TO_CLASS[str(wanted)]
                    place = (self._accelerator.logging_dir,) if kind.requires_logging_directory else ()
                    tracker = kind(config.wandb_project, *place, **options.get(str(wanted), {}))
                tracker.start()
                tracker.store_init_configuration(dict(settings))
                return tracker

            yield getattr(wanted, "name", str(wanted)) if isinstance(wanted, GeneralTracker) else str(wanted), make

    def _wandb_options(self, config: LoggingConfig) -> dict[str, Any]:
        """For ``wandb.init``: it must not wait long for a network that is not there, and never for a person to type a key."""
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # wandb's own reports to its makers
        options = {"name": config.wandb_run_name, "dir": str(self._run_dir), "settings": {"init_timeout": START / 2}}
        if not wandb_knows_me():
            sync = f"wandb login; wandb sync {self._run_dir / 'wandb'}/offline-run-*"
            _log.warning("wandb knows no key on this machine, so the run is recorded here; to send it: %s", sync)
            options["mode"] = "offline"
        return options

    def line(self, text: str) -> None:
        """One line for people, above the progress bar if there is one."""
        if self._accelerator.is_main_process:
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # of a terminal that may not know every character
            try:
                self._bar.write(redact(text).encode(encoding, errors="replace").decode(encoding), file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # nobody reads any more: Ctrl+C ended the `tee` behind us too. The run must still be saved
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            except OSError:  # the disk behind it is full
                pass

    def advance(self, updates: int = 1) -> None:
        self._bar.update(updates)

    def metrics(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """One row, to the file and to every tracker."""
        if self._file is None:
            return
        self._file.append(step, tokens, metrics)
        if shown := _postfix(metrics):
            self._bar.set_postfix_str(shown, refresh=False)
        if self._outboxes:
            row = {**metrics, "tokens": tokens}
            self.tell(lambda tracker: tracker.log(row, step=step))

    def rewind(self, step: int) -> None:
        """Take back what was reported of later updates, which are about to happen again; trackers keep what they have."""
        if self._file is not None:
            self._file.close()
            self._file, self._samples = MetricsFile(self._run_dir, step), RowsFile(self._run_dir / SAMPLES_FILE, step)
        self._bar.n = step
        self._bar.refresh()

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Prompts and what was generated after them: a line each in the terminal, whole in ``samples.jsonl`` and trackers."""
        if self._samples is None:
            return
        for prompt, text in texts:
            self.line(f"Sample at iteration {step}: {_on_one_line(prompt + text)}")
            self._samples.write({"step": step, "prompt": prompt, "text": text})
        self.tell(lambda tracker: _track_samples(tracker, step, texts))

    @property
    def takes_histograms(self) -> bool:
        """Whether any tracker draws them. The answer of the main process is everybody's: trackers are named in the config."""
        names = [getattr(tracker, "value", getattr(tracker, "name", "")) for tracker in self._accelerator.log_with]
        return any(name in DRAWN_BY for name in names)

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """To every tracker that draws them."""
        self.tell(lambda tracker: track_histograms(tracker, step, histograms))

    def tell(self, call: Callable[[GeneralTracker], object]) -> None:
        """Let ``call`` be made with each tracker, later and by another thread: what it uses must not change any more."""
        for outbox in self._outboxes:
            outbox.send(call)

    def close(self, patience: float = 60.0, leave: Callable[[], bool] = lambda: False) -> None:
        """Make the files durable, and let the trackers finish within so many seconds, or until it is time to ``leave``."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
            self._file = self._samples = None
        until = time.monotonic() + patience
        for outbox in self._outboxes:
            outbox.finish()
        for outbox in self._outboxes:
            outbox.join(until, say=self.line, leave=leave)
        self._outboxes = []
        if self._hook is not None:
            threading.excepthook, self._hook = self._hook, None


def _postfix(metrics: Mapping[str, float]) -> str:
    """What the progress bar shows of a row, if it is one of training; the bar itself knows how long it will take."""
    if "train/loss" not in metrics:
        return ""
    mfu = f"{metrics['train/mfu']:.0%}" if "train/mfu" in metrics else "n/a"
    speed = tqdm.format_sizeof(metrics["train/tokens_per_sec"])
    return f"loss {metrics['train/loss']:.3f}, LR {metrics['train/learning_rate']:.1e}, {speed} tokens/s, MFU {mfu}"


def _on_one_line(text: str) -> str:
    """``text`` with a space for what is no printable character: a young model also writes those that command a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _track_samples(tracker: GeneralTracker, step: int, texts: Sequence[tuple[str, str]]) -> None:
    """A table for trackers that have tables (wandb, ClearML), else a text per prompt for those that have texts.

    The others (MLflow, Aim, DVCLive, SwanLab) take only numbers, by Accelerate's methods, and get nothing.
    """
    if hasattr(tracker, "log_table"):
        data = [[step, prompt, text] for prompt, text in texts]
        tracker.log_table("samples", columns=["step", "prompt", "text"], data=data, step=step)  # type: ignore[attr-defined]
    elif getattr(tracker, "name", "") in _TAKE_TEXT:
        shown = [(prompt + text).replace("\n", "\n    ") for prompt, text in texts]  # indented: Markdown leaves it as it is
        tracker.log({f"samples/{number}": f"    {text}" for number, text in enumerate(shown)}, step=step)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys with values that every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            value = "null" if value is None else value
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
