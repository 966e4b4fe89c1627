"""Decoding on a CPU: ``generate_batch`` against the ``generate`` of transformers, for GPT-2 124M with the same random weights.

    python -m benchmarks.generate

Both continue the same prompts of 32 tokens by greedy search, in one process, in turns, with the same dtype and threads. What is
timed is the whole call: reading the prompts, and on our side laying out the weights anew, too. In float32 the tokens must be
equal; in bfloat16 both round differently, and it is said how many rows are.

A new token reads every weight once, so the bandwidth of the memory limits how fast decoding can be. The last column is the time
in which one matrix-vector product streams through as many bytes as the model's matrices hold, with nothing else to do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from accel_pretrain.generate import SamplingConfig, generate_batch
from accel_pretrain.hf.convert import read_theirs
from accel_pretrain.hf.families import FAMILIES
from accel_pretrain.hf.family import names_of
from accel_pretrain.models import ModelConfig, Transformer

PROMPT = 32
SHAPE = ModelConfig(
    vocab_size=50257, context_length=1024, d_model=768, num_layers=12, num_heads=12, d_ff=3072, norm="layernorm",
    activation="gelu_tanh", position="learned", bias=True, tie_embeddings=True,
)  # fmt: skip


def models() -> tuple[Transformer, Any]:
    """Ours with random weights, and theirs with the same."""
    import transformers

    torch.manual_seed(0)
    ours = Transformer(SHAPE, SHAPE.vocab_size or 0).eval()
    family = next(family for family in FAMILIES if family.model_type == "gpt2")
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**family.write_config(SHAPE)))
    shapes, state = names_of(SHAPE), ours.state_dict()
    weights = {link.theirs: read_theirs(link, shapes, state.__getitem__) for link in family.links(SHAPE, list(shapes))}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    return ours, theirs.eval()


def measure(
    runs: dict[str, Callable[[], list[list[int]]]], rounds: int, new_tokens: int
) -> tuple[dict[str, float], dict[str, list[list[int]]]]:
    """The median milliseconds per step of each, and its tokens."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, list[list[int]]] = {}
    for round in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            tokens[name] = run()
            if round:  # the first one warms up
                times[name].append((time.perf_counter() - begin) * 1e3 / new_tokens)
    return {name: statistics.median(values) for name, values in times.items()}, tokens


def milliseconds_to_read(bytes: int, dtype: torch.dtype) -> float:
    """How long a matrix-vector product takes that does nothing but stream through so many bytes; the best of ten."""
    width = 768
    matrix, x = torch.ones(bytes // dtype.itemsize // width, width, dtype=dtype), torch.ones(width, dtype=dtype)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        torch.mv(matrix, x)
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times)


def compare(ours: Transformer, theirs: Any, batch: int, new_tokens: int, rounds: int) -> str:
    """One row of the table."""
    ids_BT = torch.randint(0, ours.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    prompts, dtype = ids_BT.tolist(), ours.output_matrix.dtype
    sampling = SamplingConfig(max_new_tokens=new_tokens, temperature=0)
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    options |= {"eos_token_id": None, "pad_token_id": 0}

    def by_transformers() -> list[list[int]]:
        return theirs.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)[:, PROMPT:].tolist()

    runs = {"theirs": by_transformers, "ours": lambda: generate_batch(ours, prompts, sampling)}
    times, tokens = measure(runs, rounds, new_tokens)
    equal = sum(one == other for one, other in zip(tokens["ours"], tokens["theirs"], strict=True))
    assert equal == batch or dtype != torch.float32, "the tokens differ"
    matrices = [p for p in ours.parameters() if p.ndim == 2 and p.shape[0] != ours.config.context_length]
    reading = milliseconds_to_read(sum(p.numel() for p in matrices) * dtype.itemsize, dtype)
    ratio = times["theirs"] / times["ours"]
    return (
        f"{str(dtype)[6:]:<9} {batch:>5} {times['theirs']:>13.2f} {times['ours']:>7.2f} {ratio:>6.2f}x"
        f" {equal:>4} of {batch} {reading:>18.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours, theirs = models()
    print(f"\nGPT-2 124M, {PROMPT} + {arguments.new_tokens} tokens, {arguments.threads} threads, torch {torch.__version__}")
    print(f"medians of {arguments.rounds}, milliseconds per step; load when it began: {os.getloadavg()[0]:.1f}")
    print("dtype     batch  transformers    ours   ratio   equal  reading of weights")
    for name in arguments.dtypes:
        for model in (ours, theirs):
            model.to(getattr(torch, name))
        for batch in arguments.batches:
            print(compare(ours, theirs, batch, arguments.new_tokens, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
