"""A model of ours under EleutherAI's lm-evaluation-harness: ``python -m accel_pretrain.evaluate --checkpoint RUN --tasks ...``.

:func:`run_tasks` lets the package ``lm-eval`` (extra ``eval``) build its requests and make numbers of the answers;
:class:`Scorer` gives the answers, and knows nothing of that package. Every process holds all requests and answers its share of
the batches, so the batches, and with them the numbers, do not depend on how many processes there are.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from accel_pretrain.errors import ConfigError, DataError, PretrainError, refuse
from accel_pretrain.generate import SamplingConfig, generate
from accel_pretrain.models import Transformer
from accel_pretrain.permutation import key_of
from accel_pretrain.runtime import together
from accel_pretrain.tokenizer import Tokenizer
from accel_pretrain.typed_yaml import option

T = TypeVar("T")
LogLikelihood = tuple[float, bool]

_DEFAULT_NEW_TOKENS = 256  # lm-eval's own, for tasks that do not say
_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": 0.0}  # what a task may say, because it changes nothing
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Which tasks of lm-eval to run, and how."""

    tasks: tuple[str, ...] = option((), "lm-eval tasks, groups or patterns (hellaswag,lambada_openai); empty: none")
    task_path: Path | None = option(None, "a folder with task files of your own, found by their names beside lm-eval's")
    num_fewshot: int | None = option(None, "examples before each question; null: what the task says, else 0")
    limit: float | None = option(None, "questions per task; below 1: that share of them; null: all")
    bootstrap_iters: int = option(100_000, "resamplings for the standard error of metrics that need it; 0: none")

    def __post_init__(self) -> None:
        refuse(
            (
                self.num_fewshot is not None and self.num_fewshot < 0,
                f"num_fewshot: must not be negative, got {self.num_fewshot}",
            ),
            (self.limit is not None and self.limit <= 0, f"limit: must be positive or null, got {self.limit}"),
            (self.bootstrap_iters < 0, f"bootstrap_iters: must not be negative, got {self.bootstrap_iters}"),
        )


# ------------------------------------------------------------------------------------------------------------ answering


def windows(context: Sequence[int], continuation: Sequence[int], length: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """What a model reads to predict ``continuation`` after ``context``: ids, and how many of the last ones are predicted.

    A window predicts up to ``length`` ids, from up to ``length`` ids before the last; what is too long loses its beginning. A
    continuation that does not fit is predicted in several windows: each id once, and the last window as full as the others.
    """
    ids, done = (*context, *continuation), len(context)
    while done < len(ids):
        end = min(done + length, len(ids))
        yield ids[max(0, end - length - 1) : end], end - done
        done = end


class Scorer:
    """Log-likelihoods and continuations of texts. The three methods are collective, and give every process all answers.

    ``model`` is the unwrapped module in evaluation mode, on the device of ``accelerator``; ``batch_size`` is per process.
    """

    def __init__(
        self, accelerator: Accelerator, model: Transformer, tokenizer: Tokenizer, *, batch_size: int, context_length: int
    ) -> None:
        self.accelerator, self.model, self.tokenizer = accelerator, model, tokenizer
        self.batch_size, self.context_length = batch_size, context_length
        self.prefix_id = tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id  # as lm-eval's own adapter does
        self._has_warned = False

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """For each (context, continuation): ln p(continuation | context), and whether each of its ids was the likeliest."""
        return self._score([self.encode_pair(*pair) for pair in pairs])

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """ln p(text) of whole texts that each begin a document."""
        answers = self._score([([self.prefix_id], self._encode(text)) for text in texts])
        return [nats for nats, _ in answers]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """For each (context, generation_kwargs of a task): the continuation up to the first of its stop strings."""
        return self._share(requests, lambda number: self._continue(number, *requests[number]), "Generating")

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of both, cut as lm-eval cuts them: white space that ends the context begins the continuation."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if not kept:
            return [self.prefix_id], self._encode(continuation)
        context_ids, whole = self._encode(kept), self._encode(kept + continuation)
        return context_ids, whole[len(context_ids) :] or self._encode(continuation)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()

    def _share(self, work: Sequence[Any], answer: Callable[[int], T], doing: str) -> list[T]:
        """``answer(number)`` for every piece of ``work``, in order; process r does pieces r, r + processes, ... Collective."""
        accelerator = self.accelerator
        numbers = range(accelerator.process_index, len(work), accelerator.num_processes)
        hidden = not (accelerator.is_main_process and sys.stderr.isatty())
        with together(accelerator, PretrainError):
            own = [(number, answer(number)) for number in tqdm(numbers, desc=doing, disable=hidden)]
        answers = dict(gather_object(own) if accelerator.num_processes > 1 else own)
        return [answers[number] for number in range(len(work))]

    def _score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[LogLikelihood]:
        """Both answers for each pair of context and continuation. What is read alike (choices of one token) is read once."""
        readers: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
        for number, pair in enumerate(pairs):
            for ids, predicted in windows(*pair, self.context_length):
                readers.setdefault(ids[:-1], []).append((number, ids[-predicted:]))
        inputs = sorted(
            readers, key=lambda ids: (-len(ids), ids)
        )  # the longest first, so that memory runs out at once if at all
        batches = [inputs[begin : begin + self.batch_size] for begin in range(0, len(inputs), self.batch_size)]

        def answer(batch: int) -> list[tuple[int, float, bool]]:
            return self._score_batch([(ids, readers[ids]) for ids in batches[batch]])

        nats, greedy = [0.0] * len(pairs), [True] * len(pairs)
        for found in self._share(batches, answer, "Scoring"):
            for number, own_nats, own_greedy in found:
                nats[number] += own_nats
                greedy[number] &= own_greedy
        return list(zip(nats, greedy, strict=True))

    @torch.no_grad()
    def _score_batch(
        self, batch: Sequence[tuple[tuple[int, ...], Sequence[tuple[int, tuple[int, ...]]]]]
    ) -> list[tuple[int, float, bool]]:
        """(request, nats, greedy) of every reader of every row; a row is as long as the first, and its end is no one's."""
        device = self.accelerator.device
        ids_BT = torch.zeros(len(batch), len(batch[0][0]), dtype=torch.int64)
        for row, (ids, _) in enumerate(batch):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
        logits_BTV = self.model(ids_BT.to(device))
        requests: list[int] = []
        results: list[torch.Tensor] = []
        for row, (ids, readers) in enumerate(batch):
            for request, targets in readers:
                logits_NV = logits_BTV[row, len(ids) - len(targets) : len(ids)].float()
                targets_N = torch.tensor(targets, device=device)
                nats_N = logits_NV.gather(1, targets_N[:, None])[:, 0] - logits_NV.logsumexp(dim=1)
                requests.append(request)
                results.append(torch.stack((nats_N.sum(), (logits_NV.argmax(dim=1) == targets_N).all().float())))
        answers = torch.stack(results).cpu()
        if not answers.isfinite().all():
            raise PretrainError("the model's logits are not finite: its weights are damaged or have diverged")
        return [(request, nats, bool(greedy)) for request, (nats, greedy) in zip(requests, answers.tolist(), strict=True)]

    def _continue(self, number: int, context: str, wishes: Mapping[str, Any]) -> str:
        sampling, stops = read_wishes(wishes, number)
        room = self.context_length - sampling.max_new_tokens
        if room < 1:
            room = max(1, self.context_length // 2)
            self._warn(f"a task wants {sampling.max_new_tokens} new tokens of a model with a context of {self.context_length}: "
                       f"it sees the last {room} of a prompt, and less of it as it writes")  # fmt: skip
        prompt = (self._encode(context) or [self.prefix_id])[-room:]
        new_ids = generate(self.model, prompt, sampling, vocab_size=self.tokenizer.vocab_size, stop_id=self.tokenizer.eot_id)
        decoder, written = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
        for id in new_ids:
            piece = decoder.decode(self.tokenizer.decode_bytes([id]))
            written += piece
            if any(written.find(stop, max(0, len(written) - len(piece) - len(stop))) >= 0 for stop in stops):
                break
        written += decoder.decode(b"", final=True)
        return written[: min((end for stop in stops if (end := written.find(stop)) >= 0), default=None)]

    def _warn(self, message: str) -> None:
        if not self._has_warned and self.accelerator.is_main_process:
            _log.warning(message)
        self._has_warned = True


def read_wishes(wishes: Mapping[str, Any], number: int) -> tuple[SamplingConfig, list[str]]:
    """How the answer to request ``number`` is drawn, and the stop strings, from a task's ``generation_kwargs``.

    Raises :class:`DataError` when a task asks for what :mod:`accel_pretrain.generate` does not do.
    """
    left = {key: value for key, value in wishes.items() if value is not None and _NEUTRAL.get(key) != value}
    until = left.pop("until", [])
    limits = [left.pop(name) for name in _TOKEN_LIMITS if name in left]
    temperature, drawn = left.pop("temperature", None), left.pop("do_sample", None)
    if drawn is None:
        drawn = bool(temperature)
    chosen = {name: left.pop(name) for name in ("top_k", "top_p") if name in left}
    if left:
        raise DataError(
            f"a task asks for generation_kwargs that are not known here: {', '.join(left)}; leave it out of --tasks"
        )
    sampling = SamplingConfig(
        max_new_tokens=int(limits[0]) if limits else _DEFAULT_NEW_TOKENS,
        temperature=float(1.0 if temperature is None else temperature) if drawn else 0.0,
        top_k=int(chosen["top_k"]) if chosen.get("top_k") else None,
        top_p=float(chosen["top_p"]) if chosen.get("top_p") else None,
        seed=key_of(number) % 2**63,
    )
    return sampling, [stop for stop in ([until] if isinstance(until, str) else until) if stop]


# ------------------------------------------------------------------------------------------------- the harness around it


@dataclass(frozen=True)
class FoundTasks:
    """lm-eval's TaskManager, and the names in it that were asked for."""

    manager: Any
    names: list[Any]


def find_tasks(config: TasksConfig) -> FoundTasks:
    """Look the names up among lm-eval's tasks and those in ``task_path``: :class:`ConfigError` names what is not there."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"harness.tasks: {error.name or 'lm-eval'} is not installed; type: pip install 'accel_pretrain[eval]'"
        ) from None
    folder = config.task_path
    refuse((folder is not None and not folder.is_dir(), f"harness.task_path: {folder} is not a folder"))

    class Tasks(TaskManager):
        """The same, with one line where a task cannot be loaded."""

        def load(self, task_list: Any) -> Any:
            try:
                return super().load(task_list)
            except Exception as error:  # whatever a data set's own code, the hub's client or a broken file may raise
                raise DataError(f"harness.tasks: {', '.join(config.tasks)} cannot be loaded: {_first_line(error)}") from None

    manager = Tasks(include_path=str(folder), include_defaults=False) if folder else None
    if manager is None or not set(config.tasks) <= set(manager.all_subtasks):  # lm-eval's own are ten thousand files to read
        manager = Tasks(include_path=str(folder) if folder else None)
    names: list[str] = []
    problems = []
    for name in config.tasks:
        matching = [name] if Path(name).is_file() else manager.match_tasks([name])
        names += (match for match in matching if match not in names)
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; type lm-eval ls tasks for a list"
            problems.append(f"harness.tasks: there is no task {name}{hint}")
    if problems:
        raise ConfigError(problems)
    return FoundTasks(manager, names)


def run_tasks(found: FoundTasks, scorer: Scorer, config: TasksConfig) -> dict[str, Any] | None:
    """lm-eval's results; on processes other than the main one perhaps None. Collective."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate

    class Model(LM):
        """To lm-eval every process is the only one: sharing the work is the scorer's."""

        def loglikelihood(self, requests: list[Instance]) -> list[LogLikelihood]:
            return scorer.loglikelihood([request.args for request in requests])  # type: ignore[misc]

        def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
            return scorer.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Instance]) -> list[str]:
            return scorer.generate_until([request.args for request in requests])  # type: ignore[misc]

    if not scorer.accelerator.is_main_process:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings once are enough
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it tells of its bootstrapping
            return simple_evaluate(  # type: ignore[return-value]
                model=Model(), tasks=found.names, task_manager=found.manager, log_samples=False,
                num_fewshot=config.num_fewshot, limit=config.limit,
                bootstrap_iters=config.bootstrap_iters if scorer.accelerator.is_main_process else 0,
            )  # fmt: skip
    except (ValueError, ImportError, OSError) as error:  # a task that runs unsafe code, or lacks a package, or a hub
        raise DataError(f"lm-eval cannot run {', '.join(found.names)}: {_first_line(error)}") from None


def as_tables(results: Mapping[str, Any]) -> str:
    """Results as lm-eval prints them."""
    from lm_eval.utils import make_table

    return "\n".join(make_table(results, kind) for kind in ("results", "groups") if results.get(kind))


def as_plain(results: Mapping[str, Any]) -> dict[str, Any]:
    """The part of results that says something about the model, by lm-eval's own names; a number that is not finite is None."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(own) for key, own in value.items()}
        value = value.item() if hasattr(value, "item") else value  # NumPy's
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value if value is None or isinstance(value, bool | int | float | str) else str(value)

    kinds = ("results", "groups", "n-samples", "n-shot", "versions", "higher_is_better")
    return {kind: plain(results[kind]) for kind in kinds if results.get(kind)}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:300]}"
