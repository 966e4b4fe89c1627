"""The whole of the package in some twenty seconds: made-up text becomes tokens, a small model is trained on them, and speaks.

Three programs, as a person would type them, in a folder of their own. The text is of a grammar of a few hundred bytes, so that
a model that learns at all is soon far below the ln 257 = 5.55 nats per byte of one that guesses.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accel_pretrain.metrics import METRICS_FILE, read_metrics
from accel_pretrain.proofs import Failed, Result, run_to_its_end

UPDATES = 80
LEARNT = 2.5  # nats per byte at most; 80 updates come to about 1
MODEL = "--d_model 128 --num_layers 2 --num_heads 4 --d_ff 384 --context_length 128 --batch_size 16 --lr 3e-3"


def smoke(folder: Path, *words: str) -> Result:
    """Prepare, train with ``words`` behind the trainer's own, and sample in ``folder``, which is empty."""
    begin = time.monotonic()
    try:
        passed, seen = True, _everything(folder, words)
    except (Failed, OSError, subprocess.TimeoutExpired) as error:
        passed, seen = False, str(error)
    return Result("text to tokens, to a trained model, to text", passed, seen, time.monotonic() - begin)


def _everything(folder: Path, words: Sequence[str]) -> str:
    text, data, run = folder / "text.txt", folder / "data", folder / "run"
    text.write_text(made_up(4000), encoding="utf-8")
    _run("prep.tokenize", str(text), "-o", str(data), "--tokenizer", "bytes", "--val", "10%")
    amounts = ["--max_iters", str(UPDATES), "--log_interval", str(UPDATES // 4), "--eval_iters", "2", "--compile", "false"]
    _run("accel_pretrain.train", "--train_data_path", str(data), "--checkpoint_dir", str(run), *MODEL.split(), *amounts, *words)
    rows = read_metrics(run / METRICS_FILE)
    speed = [row["train/tokens_per_sec"] for row in rows if "train/tokens_per_sec" in row][-1]
    first, last = rows[0]["train/loss"], rows[-1]["final/val_loss"]
    if not last < LEARNT:
        raise Failed(f"nothing was learnt: {UPDATES} updates came to {last} nats per byte, where guessing has 5.55")
    said = _run("accel_pretrain.sample", "--checkpoint", str(run), "--prompt", "The ", "--max_new_tokens", "30", "--seed", "1")
    line = " ".join(said.split())
    return f"{speed:,.0f} tokens/s; loss {first:.2f} after {UPDATES // 4} updates, {last:.2f} at the end; it says {line[:40]!r}"


def _run(module: str, *words: str) -> str:
    """The standard output of a program of ours, in a process of its own."""
    return run_to_its_end([sys.executable, "-m", module, *words], what=module).stdout


def made_up(sentences: int) -> str:
    """Sentences such as "The big fox sees a small bird", some to a paragraph."""
    draw, adjectives, nouns = random.Random(0), ["big", "small", "red", "quick"], ["fox", "bird", "dog", "river", "child"]

    def thing(article: str) -> str:
        return f"{article} {draw.choice(adjectives)} {draw.choice(nouns)}"

    return "".join(
        f"{thing('The')} {draw.choice(['sees', 'likes', 'follows'])} {thing('a')}." + draw.choice([" ", " ", "\n\n"])
        for _ in range(sentences)
    )
