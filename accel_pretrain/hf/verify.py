"""Whether a folder of transformers and a checkpoint of ours are the same function: their logits compared."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from accel_pretrain.checkpoint import read_model
from accel_pretrain.errors import CheckpointError
from accel_pretrain.hf.tensor_map import read_json
from accel_pretrain.models import ModelConfig

TOLERANCE = 2e-5  # of the largest logit: ten times what float32 loses in a deep model
_MAY_FETCH_CODE = ("auto_map", "_attn_implementation", "attn_implementation", "_attn_implementation_internal", "kernel_config")
_LONGEST = 640  # positions: enough to pass the window of Gemma 3


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def compare_with_transformers(ours: Path, theirs: Path, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference between logits of two folders, in float32, on the same made-up tokens.

    ``dtype`` is what ``theirs`` was stored in: our weights are rounded to it first. One model is in memory at a time. Raises
    :class:`CheckpointError` when the difference is more than float32's rounding explains, or transformers cannot load it.
    """
    model = read_model(ours)
    model.document_id = None  # what is compared is one text, also where an end-of-text id is drawn
    with torch.no_grad():
        if dtype != torch.float32:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
        vocab_size = min(model.vocab_size, int(read_json(theirs / "config.json").get("vocab_size", model.vocab_size)))
        prompts = probes(model.config, vocab_size)
        expected = [model(tokens_BT) for tokens_BT in prompts]
    del model
    with _quiet() as transformers:
        try:
            keys = {key: value for key, value in read_json(theirs / "config.json").items() if key not in _MAY_FETCH_CODE}
            other = transformers.AutoModelForCausalLM.from_pretrained(
                theirs, config=transformers.AutoConfig.for_model(**keys), dtype=torch.float32, attn_implementation="eager",
                local_files_only=True, trust_remote_code=False,
            ).eval()  # fmt: skip
        except Exception as error:  # whatever their loading raises, the folder is not good
            raise CheckpointError(f"{theirs}: transformers cannot load it ({str(error).splitlines()[0][:200]})") from None
        with torch.no_grad():
            found = [other(tokens_BT, use_cache=False).logits for tokens_BT in prompts]
    return largest_difference(expected, found, theirs)


def largest_difference(expected: list[torch.Tensor], found: list[torch.Tensor], where: Path) -> float:
    """The largest absolute difference; raises :class:`CheckpointError` if it is above the tolerance, or not a number."""
    width = min(expected[0].shape[-1], found[0].shape[-1])  # a padded vocabulary on one side
    worst = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        ours, theirs = ours[..., :width], theirs[..., :width]
        difference, largest = (ours - theirs).abs().max().item(), ours.abs().max().item()
        if not difference <= TOLERANCE * largest:
            raise CheckpointError(
                f"{where}: its logits differ from those of the checkpoint by {difference:.2e}, so it is refused"
            )
        worst = max(worst, difference)
    return worst


def probes(config: ModelConfig, vocab_size: int) -> list[torch.Tensor]:
    """Token ids (1, T) to compare on: one alone, a few, and more than a window holds."""
    longest = min(config.context_length, _LONGEST, max(64, (config.sliding_window or 0) + 16))
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (1, T), generator=generator) for T in sorted({1, min(9, longest), longest})]


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """transformers without its progress bars and advice."""
    import warnings

    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield transformers
    finally:
        transformers.logging.set_verbosity(level)
