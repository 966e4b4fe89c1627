"""Continue sequences of tokens with a model. Knows no text; see :mod:`accel_pretrain.sample` for that.

:func:`generate` continues one prompt, token by token; :func:`generate_batch` and :func:`streams` several, of any lengths,
together. All are :func:`steps`, in which a row depends on its own prompt and generator only, never on the rows beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from accel_pretrain.errors import PretrainError, refuse
from accel_pretrain.models import Transformer
from accel_pretrain.models.decoding import for_decoding
from accel_pretrain.permutation import key_of
from accel_pretrain.typed_yaml import option


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn. Filters apply in this order: repetition_penalty, temperature, top_k, top_p, min_p."""

    max_new_tokens: int = option(200, "tokens to generate per prompt")
    temperature: float = option(0.8, "divides the logits; 0: always the most likely token")
    top_k: int | None = option(None, "draw among the k most likely tokens; null: all")
    top_p: float | None = option(None, "draw among the most likely tokens that together reach this probability; null: all")
    min_p: float | None = option(None, "draw among tokens at least this times as likely as the most likely one; null: all")
    repetition_penalty: float = option(1.0, "makes tokens less likely that are there already, prompt included; 1: does not")
    seed: int = option(42, "of the draws")

    def __post_init__(self) -> None:
        refuse(
            (self.max_new_tokens < 1, f"max_new_tokens: must be at least 1, got {self.max_new_tokens}"),
            (self.temperature < 0, f"temperature: must not be negative, got {self.temperature}"),
            (self.top_k is not None and self.top_k < 1, f"top_k: must be at least 1 or null, got {self.top_k}"),
            (
                self.top_p is not None and not 0 < self.top_p <= 1,
                f"top_p: must be above 0 and at most 1, or null, got {self.top_p}",
            ),
            (
                self.min_p is not None and not 0 <= self.min_p <= 1,
                f"min_p: must be at least 0 and at most 1, or null, got {self.min_p}",
            ),
            (
                not 0.01 <= self.repetition_penalty <= 100,
                f"repetition_penalty: must be between 0.01 and 100, got {self.repetition_penalty}",
            ),
            (not 0 <= self.seed < 2**63, f"seed: must be at least 0 and below 2^63, got {self.seed}"),
        )


# ------------------------------------------------------------------------------------------------------------ one draw


def penalized(logits_BV: torch.Tensor, seen_BV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits where those of seen tokens are divided by ``penalty``, or multiplied if negative (Keskar et al. 2019, CTRL)."""
    lower_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, lower_BV, logits_BV)


def probabilities(logits_BV: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """The distributions that next tokens are drawn from, in float64: any temperature and top_p are then exact enough.

    Over the last dimension, after the repetition penalty. Tokens that tie with the k-th most likely one all stay. Top-p:
    Holtzman et al. 2020, section 3.1; at a tie, lower ids stay. Min-p: Nguyen et al. 2024.
    """
    V = logits_BV.shape[-1]
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits_BV.argmax(-1), V).double()
    logits_BV = logits_BV.double()
    # at most 0, so that no temperature overflows
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < V:
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(sampling.top_k).values[..., -1:], -torch.inf)
    chances_BV = logits_BV.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        chances_BV = _nucleus(chances_BV, sampling.top_p)
    if sampling.min_p is not None:
        chances_BV = chances_BV.masked_fill(chances_BV < sampling.min_p * chances_BV.amax(-1, keepdim=True), 0.0)
    return chances_BV / chances_BV.sum(-1, keepdim=True)


def _nucleus(chances_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """``chances_BV`` with zeros outside the fewest tokens that together reach ``top_p``."""
    V = chances_BV.shape[-1]
    # Tokens of at most (1 - top_p) / V reach 1 - top_p together at best: they are outside, and need no sorting. Half of that,
    # so that rounding does not matter.
    likely_N = (chances_BV > (1 - top_p) / (2 * V)).reshape(-1, V).any(0).nonzero().flatten()
    ordered_BN, order_BN = chances_BV[..., likely_N].sort(descending=True, stable=True)
    before_BN = ordered_BN.cumsum(-1) - ordered_BN  # a token stays if those before it do not yet reach top_p
    kept_BN = ordered_BN.masked_fill(before_BN >= top_p, 0.0)
    return torch.zeros_like(chances_BV).scatter(-1, likely_N[order_BN], kept_BN)


def draw(logits_BV: torch.Tensor, sampling: SamplingConfig, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """One token per row: ``tokens_B``, on the device of the logits.

    Each row takes one uniform number from its own generator on the CPU and looks it up in the cumulative distribution, so that
    all devices draw the same.
    """
    if sampling.temperature == 0:
        return logits_BV.max(-1).indices  # the first of the most likely, as argmax, and faster
    if logits_BV.device.type == "mps":  # has no float64
        return draw(logits_BV.cpu(), sampling, generators).to("mps")
    cumulative_BV = probabilities(logits_BV, sampling).cumsum(-1)
    uniform_B1 = torch.stack([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    total_B1 = cumulative_BV[:, -1:]
    wanted_B1 = (uniform_B1.to(logits_BV.device) * total_B1).minimum(total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BV, wanted_B1, right=True).squeeze(1)  # never a token of no chance


# --------------------------------------------------------------------------------------------------------------- texts


class _Batch:
    """Texts that grow together. ``rows`` are the numbers of those that still grow, in the order of the cache.

    The cache holds all of a text but what is unread: the whole prompt at first, then its last token.
    """

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self.model, self.device = model, model.output_matrix.device
        self.context = context = model.config.context_length
        self.rows = list(range(len(prompts)))
        self.texts = [list(prompt)[-context:] for prompt in prompts]
        longest = max(map(len, self.texts))
        padding = [longest - len(text) for text in self.texts]
        self.unread_BT = self._ids([[0] * pad + text for pad, text in zip(padding, self.texts, strict=True)])
        if any(padding):  # then the cache is longer than any text, and moves to the front when it is full
            capacity = min(longest + new_tokens, context + (context + 1) // 2)
            self.cache = model.new_cache(capacity, self._ids(padding))
        else:
            self.cache = model.new_cache(min(longest + new_tokens, context))

    def read(self) -> torch.Tensor:
        """Read what is unread; the logits (B, V) of what comes next."""
        if any(len(text) > self.context for text in self.texts):
            self._drop_older_halves()
        if self.cache.length == self.cache.capacity:
            self.cache.forget_padding()
        return self.model(self.unread_BT, cache=self.cache, last_only=True)[:, -1]

    def append(self, tokens_B: torch.Tensor, tokens: list[int]) -> None:
        """Add a token to each text. Both hold the same, where the model is and here."""
        for text, token in zip(self.texts, tokens, strict=True):
            text.append(token)
        self.unread_BT = tokens_B.unsqueeze(1)

    def keep(self, places: list[int]) -> list[int]:
        """Let only the texts at these places grow on; returns their new order."""
        order = self.cache.keep(places)
        self.rows, self.texts = [self.rows[place] for place in order], [self.texts[place] for place in order]
        self.unread_BT = self.unread_BT[order]
        return order

    def _drop_older_halves(self) -> None:
        """Where a text is longer than the context, keep its newer half and read that again, but for the unread token."""
        full = [place for place, text in enumerate(self.texts) if len(text) > self.context]
        for place in full:
            self.texts[place] = self.texts[place][-max(1, self.context // 2) :]
        again = [self.texts[place][:-1] for place in full]
        cache = self.cache
        if cache.padding_B is None:  # all are equally long
            cache.reset()
        else:
            cache = self.model.new_cache(max(1, len(again[0])))
        if again[0]:
            self.model(self._ids(again), cache=cache, last_only=True)
        if cache is not self.cache:
            self.cache.replace(full, cache)

    def _ids(self, ids: object) -> torch.Tensor:
        return torch.tensor(ids, device=self.device)


def generator_for(prompt: Sequence[int], seed: int, repeat: int = 0) -> torch.Generator:
    """The generator of the ``repeat``-th continuation of a prompt: it depends on nothing else."""
    return torch.Generator().manual_seed(key_of(seed, repeat, *prompt))


def _seen(prompts: Sequence[Sequence[int]], model: Transformer) -> torch.Tensor:
    """Which ids each prompt holds: boolean, (B, V)."""
    seen_BV = torch.zeros(len(prompts), model.vocab_size, dtype=torch.bool, device=model.output_matrix.device)
    for seen_V, prompt in zip(seen_BV, prompts, strict=True):
        seen_V[torch.tensor(prompt, device=seen_V.device)] = True
    return seen_BV


@torch.inference_mode()
def steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    vocab_size: int | None = None,
    stop_id: int | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the new token of every prompt, or None from where ``stop_id`` came; until all have stopped.

    No prompt may be empty. Ids from ``vocab_size`` on (padding that no tokenizer knows) are never drawn. When a row's context
    is full, its older half is dropped and the rest is read again. A row gets the tokens that it would get alone, up to
    rounding: matrix products of other sizes add in another order. Raises :class:`PretrainError` when logits are not finite.
    """
    assert all(prompts), "a prompt needs at least one token"
    if not prompts:
        return
    if generators is None:
        generators = [generator_for(prompt, sampling.seed) for prompt in prompts]
    batch = _Batch(for_decoding(model, len(prompts), sampling.max_new_tokens), prompts, sampling.max_new_tokens)
    seen_BV = _seen(prompts, model) if sampling.repetition_penalty != 1 else None
    for _ in range(sampling.max_new_tokens):
        logits_BV = batch.read()[:, :vocab_size]
        finite = logits_BV.sum(dtype=torch.float32).isfinite()
        if seen_BV is not None:
            logits_BV = penalized(logits_BV, seen_BV[:, :vocab_size], sampling.repetition_penalty)
        tokens_B = draw(logits_BV, sampling, [generators[row] for row in batch.rows])
        tokens = torch.where(finite, tokens_B, -1).tolist()  # the one time that the device is waited for
        if tokens[0] < 0:
            raise PretrainError("the model's logits are not finite: its weights are damaged or have diverged")
        if seen_BV is not None:
            seen_BV.scatter_(1, tokens_B.unsqueeze(1), True)
        drawn: list[int | None] = [None] * len(prompts)
        for row, token in zip(batch.rows, tokens, strict=True):
            drawn[row] = token if token != stop_id else None
        batch.append(tokens_B, tokens)
        going = [place for place, token in enumerate(tokens) if token != stop_id]
        if not going:
            return
        if len(going) < len(tokens):
            order = batch.keep(going)
            seen_BV = None if seen_BV is None else seen_BV[order]
        yield drawn


def streams(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    vocab_size: int | None = None,
    stop_id: int | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> list[Iterator[int]]:
    """One iterator over the new tokens of each prompt, in any order of reading: what others get meanwhile waits for them.

    See :func:`steps`.
    """
    together = steps(model, prompts, sampling, vocab_size=vocab_size, stop_id=stop_id, generators=generators)
    waiting: list[deque[int | None]] = [deque() for _ in prompts]

    def stream(row: int) -> Iterator[int]:
        while True:
            if not waiting[row]:
                for queue, token in zip(waiting, next(together, [None] * len(prompts)), strict=True):
                    queue.append(token)
            if (token := waiting[row].popleft()) is None:
                return
            yield token

    return [stream(row) for row in range(len(prompts))]


def generate(
    model: Transformer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    vocab_size: int | None = None,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield new tokens one by one, until ``stop_id`` (which is not yielded) or ``max_new_tokens``. See :func:`steps`."""
    generators = None if generator is None else [generator]
    return streams(model, [prompt], sampling, vocab_size=vocab_size, stop_id=stop_id, generators=generators)[0]


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    vocab_size: int | None = None,
    stop_id: int | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt. See :func:`steps`."""
    each = streams(model, prompts, sampling, vocab_size=vocab_size, stop_id=stop_id, generators=generators)
    return [list(stream) for stream in each]
