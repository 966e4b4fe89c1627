"""Training on one GPU: tokens per second, their share of the measured GEMM rate, checks of every fast path, nanoGPT in turns.

    python -m benchmarks.gpu                                    at most 8 minutes on one H200
    python -m benchmarks.gpu --nanogpt PATH/TO/nanoGPT          with its loop on the same card, in turns with ours
    python -m benchmarks.gpu --device cpu --tiny                the same program on small models, to see that it works

Parts (``--parts``): ``gemm``, the rate of a large product in bfloat16; ``attention``, what each kernel behind PyTorch's
attention takes, forward and backward; ``checks``, losses and gradients of the fast paths against plain float32; ``sync``, that
an update never waits for the device; ``speed``, real updates (:mod:`accel_pretrain.trial`, each in a process of its own) of
GPT-2 124M and 355M at T=1024 and of a Llama of 1.1 billion parameters at T=2048, compiled, bf16; ``turns``, against nanoGPT.
Exits with 1 if a check fails. nanoGPT is a checkout of https://github.com/karpathy/nanoGPT.

No GPU was at hand when this was written: only the form for a CPU has ever run.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from accel_pretrain.checkpoint import CheckpointConfig, TrainState
from accel_pretrain.config import RunConfig, make_plan
from accel_pretrain.loop import train_step
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.optim import AdamW
from accel_pretrain.probe import timer
from accel_pretrain.run import TrainingRun
from accel_pretrain.runtime import TrainingConfig, build_accelerator
from accel_pretrain.schedule import Constant
from accel_pretrain.trial import build, made_up_tokens, measure
from benchmarks import runs, train_loops

PARTS = ("gemm", "attention", "checks", "sync", "speed", "turns")
GPT2 = {"norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True, "tie_embeddings": True, "d_ff": None}
SHAPES = {  # vocabulary in a multiple of 128, as nanoGPT has it; the batch sizes are those of an H200
    "124m": (ModelConfig(vocab_size=50304, context_length=1024, d_model=768, num_layers=12, num_heads=12, **GPT2), 64),  # type: ignore[arg-type]
    "355m": (ModelConfig(vocab_size=50304, context_length=1024, d_model=1024, num_layers=24, num_heads=16, **GPT2), 32),  # type: ignore[arg-type]
    "1.1b": (
        ModelConfig(
            vocab_size=32000, context_length=2048, d_model=2048, num_layers=22, num_heads=32, num_kv_heads=4, d_ff=5632
        ),
        16,
    ),
}  # fmt: skip


def shape_of(name: str, tiny: bool) -> tuple[ModelConfig, int]:
    """A model and its micro-batch; ``tiny``: the same kind of model, small enough for a CPU."""
    model, batch_size = SHAPES[name]
    if not tiny:
        return model, batch_size
    small = {"vocab_size": 512, "context_length": 64, "d_model": 64, "num_layers": 2, "num_heads": 4}
    grouped = {} if model.num_kv_heads is None else {"num_kv_heads": 2, "d_ff": 128}
    return dataclasses.replace(model, **small, **grouped), 2


def config_of(
    model: ModelConfig, batch_size: int, arguments: argparse.Namespace, folder: Path, **training: object
) -> RunConfig:
    words = {"batch_size": batch_size, "mixed_precision": "bf16", "device": arguments.device, "compile": not arguments.eager}
    return RunConfig(
        model=model, optimizer=AdamW(lr=train_loops.LR), schedule=Constant(warmup_iters=0),
        training=TrainingConfig(**{**words, "max_iters": 1000, **training}),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(checkpoint_dir=folder / "run"),
    )  # fmt: skip


def built(config: RunConfig, folder: Path) -> TrainingRun:
    """A run on made-up tokens, in this process."""
    splits = made_up_tokens(config.model.vocab_size or 0)
    accelerator = build_accelerator(config.training, [], folder)
    return build(config, make_plan(config, splits, 1), splits, accelerator, folder)


# --------------------------------------------------------------------------------------------------------------- products


def gemm_rate(device: torch.device, side: int) -> float:
    """FLOP/s of a product of two square matrices in bfloat16: the median of a second."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times = 10 if device.type == "cuda" else 1
    once = timer(device, lambda: [torch.mm(a, b, out=out) for _ in range(times)], time.perf_counter)
    once()
    found, end = [], time.perf_counter() + (1.0 if device.type == "cuda" else 0.1)
    while time.perf_counter() < end or len(found) < 3:
        found.append(once() / times)
    return 2 * side**3 / statistics.median(found)


def attention(device: torch.device, name: str, tiny: bool) -> None:
    """Milliseconds of causal attention, forward and backward, by kernel."""
    model, B = shape_of(name, tiny)
    H, G, T, E = model.num_heads, model.kv_heads, model.context_length, model.head_width
    q, k, v = (torch.randn(B, n, T, E, device=device, dtype=torch.bfloat16, requires_grad=True) for n in (H, G, G))
    out_grad = torch.randn_like(q)

    def work() -> None:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
        torch.autograd.grad(out, (q, k, v), out_grad)

    kernels = {"as chosen": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    shown = []
    for label, kernel in {**kernels, "efficient": SDPBackend.EFFICIENT_ATTENTION}.items():
        try:
            with sdpa_kernel([kernel] if kernel else list(SDPBackend.__members__.values())[1:]):
                once = timer(device, work, time.perf_counter)
                once()
                shown.append(f"{label} {1000 * statistics.median(once() for _ in range(5)):.2f} ms")
        except RuntimeError:
            shown.append(f"{label} -")
    print(f"attention  {name}: {', '.join(shown)}")


# ----------------------------------------------------------------------------------------------------------------- checks


def loss_and_gradients(model: Transformer, ids_BS: torch.Tensor, bf16: bool) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    with torch.autocast(ids_BS.device.type, torch.bfloat16, enabled=bf16):
        nats_B = model(ids_BS[:, :-1], ids_BS[:, 1:])
    nats_B.backward(gradient=torch.full_like(nats_B, 1 / ids_BS.numel()))
    return [nats_B.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The relative error of the losses, or that of all gradients together: the larger of the two."""

    def error(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
        return (difference / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5

    pairs = list(zip(one, other, strict=True))
    return max(error(pairs[:1]), error(pairs[1:]))


def checks(device: torch.device, compiled: bool, tiny: bool) -> bool:
    """Every fast path against the plain one: float32 to 1e-6, bfloat16 within 1.2 times the error of plain bfloat16."""
    model = dataclasses.replace(shape_of("1.1b", True)[0], context_length=256, num_layers=2, vocab_size=1024, qk_norm=True)
    generator = torch.Generator().manual_seed(0)
    B, T = (1, 128) if tiny else (4, 256)
    ids_BS = torch.randint(1024, (B, T + 1), generator=generator).to(device)

    def of(bf16: bool, prepare: Callable[[Transformer], object]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = Transformer(model, 1024).to(device).train()
        prepare(module)
        return loss_and_gradients(module, ids_BS, bf16)

    paths: dict[str, Callable[[Transformer], object]] = {
        "chunked loss": lambda module: setattr(module, "chunked_loss", True),
        "selective checkpointing": lambda module: module.recompute("selective"),
        "full checkpointing": lambda module: module.recompute("full"),
    }
    if compiled:
        paths |= {"compiled": lambda module: module.compile_parts()}
        paths |= {"compiled, selective": lambda module: (module.recompute("selective"), module.compile_parts())}
    exact, low = of(False, lambda module: None), of(True, lambda module: None)
    usual, passed = apart(low, exact), True
    for name, prepare in paths.items():
        fp32, bf16 = apart(of(False, prepare), exact), apart(of(True, prepare), exact)
        good = fp32 <= 1e-6 and bf16 <= 1.2 * usual
        passed &= good
        print(f"check      {name}: fp32 {fp32:.1e}; bf16 {bf16:.1e}, plain bf16 {usual:.1e}{'' if good else '  FAILED'}")
    return passed


def never_waits(device: torch.device, arguments: argparse.Namespace) -> bool:
    """Whether updates run without the processor once waiting for the GPU; with dropout, two micro-steps, clipping."""
    if device.type != "cuda":
        print("sync       a CPU has nothing to wait for")
        return True
    with tempfile.TemporaryDirectory() as folder:
        model = dataclasses.replace(shape_of("124m", True)[0], dropout=0.1)
        run, state = (
            built(config_of(model, 2, arguments, Path(folder), gradient_accumulation_steps=2), Path(folder)),
            TrainState(),
        )

        def updates() -> None:
            for _ in range(4):
                train_step(run, state)
                state.step, state.samples = state.step + 1, state.samples + run.plan.samples_per_step

        updates()
        torch.cuda.set_sync_debug_mode("error")
        try:
            updates()
        except RuntimeError as error:
            print(f"sync       FAILED: {str(error).splitlines()[0]}")
            return False
        finally:
            torch.cuda.set_sync_debug_mode("default")
    print("sync       an update never waits for the device")
    return True


# ------------------------------------------------------------------------------------------------------------------ speed


def speed(name: str, rate: float | None, arguments: argparse.Namespace) -> None:
    """A line for one shape; a micro-batch that does not fit is halved."""
    model, batch_size = shape_of(name, arguments.tiny)
    with torch.device("meta"):
        flops = Transformer(model, model.vocab_size or 0).flops_per_token()
    while True:
        config = config_of(model, batch_size, arguments, Path(tempfile.gettempdir()))
        found = measure(
            config, vocab_size=model.vocab_size or 0, samples=batch_size, updates=1000, seconds=arguments.seconds,
            timeout=240, limit=None,
        )  # fmt: skip
        if found.problem is None or batch_size == 1:
            break
        print(f"speed      {name}: B={batch_size} {found.problem}")
        batch_size //= 2
    if found.problem:
        return
    tokens = batch_size * model.context_length / found.seconds
    share = f", {tokens * flops / rate:.1%} of the GEMM rate" if rate else ""
    print(
        f"speed      {name}: T={model.context_length} B={batch_size}: {tokens:,.0f} tokens/s{share}, "
        f"{found.peak / 1e9:.1f} GB, first update {found.first:.0f} s longer",
        flush=True,
    )


def ours(work: train_loops.Work, arguments: argparse.Namespace) -> Iterator[float]:
    """``train_step`` with the weights and batches that all have."""
    with tempfile.TemporaryDirectory() as folder:
        run = built(config_of(work.model, work.batch_size, arguments, Path(folder)), Path(folder))
        run.module.load_state_dict(work.weights())
        run, state = dataclasses.replace(run, batches=train_loops._Given(work)), TrainState()  # type: ignore[arg-type]
        while True:
            update = train_step(run, state)
            assert update is not None
            state.step, state.samples = state.step + 1, state.samples + work.batch_size
            yield update.loss.item()


def child(pipe: Connection, name: str, arguments: argparse.Namespace) -> None:
    """A loop in a process of its own: for each word from the pipe an update, answered by its loss and its seconds."""
    model, batch_size = shape_of("124m", arguments.tiny)
    batch_size = min(batch_size, 32)  # two of them must fit
    device = torch.device(arguments.device)
    work = train_loops.Work(
        model, batch_size, bf16=True, compiled=not arguments.eager, nanogpt=arguments.nanogpt, device=device
    )
    updates = ours(work, arguments) if name == "ours" else train_loops.nanogpt(work)
    while pipe.recv():
        begin = time.perf_counter()
        loss = next(updates)  # waits for the device
        pipe.send((loss, time.perf_counter() - begin))


def turns(arguments: argparse.Namespace) -> bool:
    """Ours and nanoGPT, both resident, an update of one at a time; whether their losses agree over the first updates."""
    try:
        answers = runs.in_turns(child, {name: (name, arguments) for name in ("ours", "nanogpt")}, 4 + arguments.rounds)
    except EOFError as error:
        print(f"turns      FAILED: {error} has ended, for the reason above")
        return False
    median = {name: statistics.median(seconds for _, seconds in found[4:]) for name, found in answers.items()}
    pairs = list(zip(answers["ours"][:4], answers["nanogpt"][:4], strict=True))
    agree = all(abs(a - b) <= 2e-3 * b for (a, _), (b, _) in pairs)
    model, batch_size = shape_of("124m", arguments.tiny)
    tokens = {name: min(batch_size, 32) * model.context_length / seconds for name, seconds in median.items()}
    ratio, parted = tokens["ours"] / tokens["nanogpt"], ", ".join(f"{a:.4f} / {b:.4f}" for (a, _), (b, _) in pairs)
    print(
        f"turns      ours {tokens['ours']:,.0f} tokens/s, nanoGPT {tokens['nanogpt']:,.0f}: {ratio:.2f}x; "
        f"losses {'agree' if agree else f'PART: {parted}'}"
    )
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, not compiled")
    parser.add_argument("--eager", action="store_true", help="nothing is compiled")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; without it, that part is left out")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timed updates per shape")
    parser.add_argument("--rounds", type=int, default=20, help="timed updates of each in turns")
    arguments = parser.parse_args()
    arguments.eager |= arguments.tiny
    device, begin, passed, rate = torch.device(arguments.device), time.perf_counter(), True, None
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {'eager' if arguments.eager else 'compiled'}, bf16")
    if "gemm" in arguments.parts:
        rate = gemm_rate(device, 512 if arguments.tiny else 8192)
        print(f"gemm       {rate / 1e12:,.3g} TFLOP/s")
    if "attention" in arguments.parts:
        for shape in arguments.shapes:
            attention(device, shape, arguments.tiny)
    if "checks" in arguments.parts:
        passed &= checks(device, not arguments.eager, arguments.tiny)
    if "sync" in arguments.parts:
        passed &= never_waits(device, arguments)
    if "speed" in arguments.parts:
        for shape in arguments.shapes:
            speed(shape, rate, arguments)
    if "turns" in arguments.parts and arguments.nanogpt:
        passed &= turns(arguments)
    print(f"{time.perf_counter() - begin:.0f} s in all")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
