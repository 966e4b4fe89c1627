"""Continue a sequence of tokens with a model. Knows no text; see :mod:`accel_pretrain.sample` for that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from accel_pretrain.errors import PretrainError, refuse
from accel_pretrain.models import Transformer
from accel_pretrain.typed_yaml import option


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn. Filters apply in this order: temperature, top_k, top_p."""

    max_new_tokens: int = option(200, "tokens to generate per prompt")
    temperature: float = option(0.8, "divides the logits; 0: always the most likely token")
    top_k: int | None = option(None, "draw among the k most likely tokens; null: all")
    top_p: float | None = option(None, "draw among the most likely tokens that together reach this probability; null: all")
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
            (not 0 <= self.seed < 2**63, f"seed: must be at least 0 and below 2^63, got {self.seed}"),
        )


def probabilities(logits_V: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """The distribution that the next token is drawn from, over V, in float64: any temperature and top_p are then exact enough.

    Tokens that tie with the k-th most likely one all stay. Top-p: Holtzman et al. 2020, section 3.1; at a tie, lower ids stay.
    """
    logits_V = logits_V.double()
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), logits_V.numel()).double()
    logits_V = (logits_V - logits_V.max()) / sampling.temperature  # at most 0, so that no temperature overflows
    if sampling.top_k is not None and sampling.top_k < logits_V.numel():
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities_V = logits_V.softmax(dim=0)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered_V, order_V = probabilities_V.sort(descending=True, stable=True)
        before_V = ordered_V.cumsum(dim=0) - ordered_V  # a token stays if those before it do not yet reach top_p
        probabilities_V = probabilities_V.index_fill(0, order_V[before_V >= sampling.top_p], 0.0)
    return probabilities_V / probabilities_V.sum()


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    vocab_size: int | None = None,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield new tokens one by one, until ``stop_id`` (which is not yielded) or ``max_new_tokens``.

    ``prompt`` must not be empty. Ids from ``vocab_size`` on (padding that no tokenizer knows) are never drawn. When the
    context is full, its older half is dropped and the rest is read again. Raises :class:`PretrainError` when the model's logits
    are not finite.
    """
    assert prompt, "the prompt needs at least one token"
    device = model.output_matrix.device
    if generator is None:
        generator = torch.Generator().manual_seed(sampling.seed)
    context = model.config.context_length
    tokens = list(prompt)[-context:]
    cache = model.new_cache()
    unread = tokens
    for _ in range(sampling.max_new_tokens):
        if cache.length + len(unread) > context:
            tokens = unread = tokens[-max(1, context // 2) :]
            cache.reset()
        logits_V = model(torch.tensor([unread], device=device), cache=cache)[0, -1, :vocab_size].cpu()
        if not logits_V.isfinite().all():
            raise PretrainError("the model's logits are not finite: its weights are damaged or have diverged")
        chances_V = probabilities(logits_V, sampling)
        token = int(torch.multinomial(chances_V, 1, generator=generator))
        if token == stop_id:
            return
        yield token
        tokens.append(token)
        unread = [token]
