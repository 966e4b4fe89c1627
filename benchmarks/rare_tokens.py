"""What an update costs late in a run on a CPU, when Adam's averages of tokens that do not come again have become tiny.

    python -m benchmarks.rare_tokens

Such an average shrinks by a factor with every update, and after some 750 it is among the numbers below 1.2e-38, where a
processor takes ten to twenty times as long; it stays there, for 0.9 times the smallest numbers is rounded to the same. A run
counts them as 0 (:func:`accel_pretrain.pace.tiny_is_zero`). Here two processes train the same model with an output matrix of
its own on the same tokens, drawn as words are (the n-th most frequent one n times as rare as the first) from GPT-2's 50,257;
one of them without that. In turns, an update each.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from multiprocessing.connection import Connection

import numpy as np
import torch

from accel_pretrain.models import ModelConfig
from accel_pretrain.pace import tiny_is_zero
from benchmarks import runs, train_loops

VOCAB, CONTEXT, BATCH = 50257, 64, 4
SHAPE = ModelConfig(vocab_size=VOCAB, context_length=CONTEXT, d_model=128, num_layers=2, num_heads=4)


class Text(train_loops.Work):
    """As long a text as the run reads."""

    def batches(self) -> list[torch.Tensor]:
        draw, frequency = np.random.default_rng(0), 1 / np.arange(1, VOCAB + 1)
        chosen = draw.choice(VOCAB, (train_loops.BATCHES, BATCH, CONTEXT + 1), p=frequency / frequency.sum())
        return list(torch.from_numpy(chosen))


def child(pipe: Connection, updates: int, threads: int, flushes: bool) -> None:
    """An update for each word from the pipe, answered by its seconds and loss."""
    torch.set_num_threads(threads)
    train_loops.BATCHES = updates
    with tiny_is_zero() if flushes else contextlib.nullcontext():
        loop = train_loops.ours(Text(model=SHAPE, batch_size=BATCH, bf16=False, compiled=False))
        while pipe.recv():
            begin = time.perf_counter()
            loss = next(loop)
            pipe.send((time.perf_counter() - begin, loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    members = {name: (options.updates, options.threads, name == "as it is") for name in ("as it is", "without")}
    answers = runs.in_turns(child, members, options.updates)
    part = max(1, options.updates // 10)
    print(f"milliseconds per update, median of {part}")
    print(f"{'updates':>12}{'as it is':>10}{'without':>10}{'ratio':>8}{'losses':>20}")
    for end in range(part, options.updates + 1, part):
        own, other = (answers[name][end - part : end] for name in ("as it is", "without"))
        a, b = (1000 * statistics.median(seconds for seconds, _ in some) for some in (own, other))
        print(f"{end:>12}{a:>10.1f}{b:>10.1f}{b / a:>8.2f}{own[-1][1]:>10.4f}{other[-1][1]:>10.4f}")


if __name__ == "__main__":
    main()
