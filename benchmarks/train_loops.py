"""The training loops that :mod:`benchmarks.train` compares: ours, and those of others as their authors write them.

A loop is a generator. It builds its model with the weights it is given, then does one update each time it is asked, and yields
the mean loss of that update. All have fp32 weights, a fused AdamW with decay on matrices, clipping at norm 1, a constant
learning rate, and the same batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel_pretrain.checkpoint import CheckpointConfig
from accel_pretrain.config import RunConfig
from accel_pretrain.data import Batch, DataConfig
from accel_pretrain.loop import train_step
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.optim import AdamW
from accel_pretrain.runtime import TrainingConfig
from accel_pretrain.schedule import Constant
from benchmarks import runs

LR, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
BATCHES = 8  # different ones, taken in turns


@dataclass(frozen=True)
class Work:
    """What every loop does alike."""

    model: ModelConfig
    batch_size: int
    bf16: bool
    compiled: bool
    nanogpt: Path | None = None
    device: torch.device = torch.device("cpu")

    def batches(self) -> list[torch.Tensor]:
        """Token ids (B, T + 1), with some structure to learn."""
        generator = torch.Generator().manual_seed(0)
        shape = (BATCHES, self.batch_size, self.model.context_length + 1)
        uniform = torch.rand(shape, generator=generator)
        return list((uniform.square() * (self.model.vocab_size or 0)).long())

    def weights(self) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return dict(Transformer(self.model, self.model.vocab_size or 0).state_dict())

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()  # type: ignore[return-value]


class _Given:
    """In place of TokenBatches: the batches of the benchmark."""

    def __init__(self, work: Work) -> None:
        self.batches, self.batch_size = [Batch(ids) for ids in work.batches()], work.batch_size

    def micro_batches(self, first_sample: int) -> list[Batch]:
        return [self.batches[first_sample // self.batch_size % BATCHES]]


def ours(work: Work) -> Iterator[float]:
    """``train_step`` as :mod:`accel_pretrain.train` sets it up."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "train.bin"
        np.zeros(100_000, dtype="<u2").tofile(tokens)
        config = RunConfig(
            data=DataConfig(train_data_path=tokens, val_data_path=tokens),
            model=work.model,
            optimizer=AdamW(lr=LR, beta1=BETAS[0], beta2=BETAS[1], weight_decay=DECAY),
            schedule=Constant(warmup_iters=0),
            training=TrainingConfig(
                batch_size=work.batch_size, grad_clip=CLIP, mixed_precision="bf16" if work.bf16 else "no", device="cpu",
                compile=work.compiled, cpu_threads=torch.get_num_threads(),
            ),
            checkpoint=CheckpointConfig(checkpoint_dir=Path(folder) / "run"),
        )  # fmt: skip
        run, state = runs.assembled(config)
        run.module.load_state_dict(work.weights())
        run = dataclasses.replace(run, batches=_Given(work))  # type: ignore[arg-type]
        while True:
            update = train_step(run, state)
            assert update is not None
            state.step, state.samples = state.step + 1, state.samples + work.batch_size
            yield update.loss.item()


def gpt2_weights(work: Work, *, conv1d: bool) -> dict[str, torch.Tensor]:
    """Our weights under the names of GPT-2, which nanoGPT and transformers share; ``conv1d`` stores matrices transposed."""
    own = work.weights()
    theirs = {"wte.weight": own["embed_tokens.weight"], "wpe.weight": own["embed_positions.weight"]}
    table = {
        "ln_1": "input_layernorm", "attn.c_proj": "self_attn.o_proj", "ln_2": "post_attention_layernorm",
        "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
    }  # fmt: skip
    for layer in range(work.model.num_layers):
        for kind in ("weight", "bias"):
            parts = [own[f"layers.{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found = {name: own[f"layers.{layer}.{ours}.{kind}"] for name, ours in table.items()}
            for name, tensor in (found | {"attn.c_attn": torch.cat(parts)}).items():
                theirs[f"h.{layer}.{name}.{kind}"] = tensor.t().contiguous() if conv1d and tensor.ndim == 2 else tensor
    for kind in ("weight", "bias"):
        theirs[f"ln_f.{kind}"] = own[f"norm.{kind}"]
    return {f"transformer.{name}": tensor for name, tensor in theirs.items()}


def nanogpt(work: Work) -> Iterator[float]:
    """The loop of nanoGPT's train.py, under autocast also on a CPU, and with the fused AdamW that it takes on a GPU."""
    assert work.nanogpt is not None
    spec = importlib.util.spec_from_file_location("nanogpt_model", work.nanogpt / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = work.model
    model: Any = module.GPT(
        module.GPTConfig(
            block_size=shape.context_length, vocab_size=shape.vocab_size, n_layer=shape.num_layers, n_head=shape.num_heads,
            n_embd=shape.d_model, dropout=0.0, bias=True,
        )
    )  # fmt: skip
    missing, unexpected = model.load_state_dict(gpt2_weights(work, conv1d=False), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.to(work.device)
    optimizer = model.configure_optimizers(DECAY, LR, BETAS, "cuda")
    if work.compiled:
        model = torch.compile(model)
    for ids_BS in itertools.cycle([ids_BS.to(work.device) for ids_BS in work.batches()]):
        with work.autocast():
            _, loss = model(ids_BS[:, :-1], ids_BS[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def _transformers_model(work: Work) -> Any:
    """GPT-2 of transformers, with attention through the same kernel as everywhere."""
    import transformers

    shape = work.model
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size or 0, n_positions=shape.context_length, n_embd=shape.d_model, n_layer=shape.num_layers,
        n_head=shape.num_heads, n_inner=shape.ff_width, activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, layer_norm_epsilon=shape.norm_eps, use_cache=False, attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    missing, unexpected = model.load_state_dict(gpt2_weights(work, conv1d=True), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model.train()


def accelerate_loop(work: Work) -> Iterator[float]:
    """The loop of Accelerate's documentation around the model of transformers."""
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin

    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if work.bf16 else "no",
        dynamo_plugin=TorchDynamoPlugin(backend="inductor" if work.compiled else "no"),  # type: ignore[arg-type]
    )  # fmt: skip
    model = _transformers_model(work)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True))
    for ids_BS in itertools.cycle(work.batches()):
        inputs_BT, targets_BT = ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous()
        loss = model(input_ids=inputs_BT, labels=targets_BT, shift_labels=targets_BT).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def trainer(work: Work, turn: Callable[[float | None], None]) -> None:
    """The Trainer of transformers. It has its own loop: a callback waits for our turn."""
    import transformers

    class Losses(transformers.Trainer):
        last = 0.0

        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(*arguments, **options)
            self.last = loss.item()  # type: ignore[union-attr]
            return loss

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turn(losses.last if state.global_step else None)

    rows = [row for ids_BS in work.batches() for row in ids_BS]
    data = [{"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=work.batch_size, max_steps=10**6, learning_rate=LR,
            lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=DECAY, max_grad_norm=CLIP,
            bf16=work.bf16, use_cpu=True, torch_compile=work.compiled, optim="adamw_torch_fused", logging_strategy="no",
            save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        losses = Losses(
            model=_transformers_model(work), args=arguments, train_dataset=data,  # type: ignore[arg-type]
            data_collator=lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]},
            callbacks=[Turns()],
        )  # fmt: skip
        losses.train()


def litgpt(work: Work) -> Iterator[float]:
    """The loop of litgpt's pretrain.py, with its model and its loss, in Fabric."""
    import lightning as L  # pyright: ignore[reportMissingImports]
    from litgpt import GPT, Config  # pyright: ignore[reportMissingImports]
    from litgpt.utils import chunked_cross_entropy  # pyright: ignore[reportMissingImports]

    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if work.bf16 else "32-true")
    shape, own = work.model, work.weights()
    config = Config(
        block_size=shape.context_length, vocab_size=shape.vocab_size, padded_vocab_size=shape.vocab_size,
        n_layer=shape.num_layers, n_head=shape.num_heads, n_embd=shape.d_model, rotary_percentage=1.0, parallel_residual=False,
        bias=False, norm_class_name="RMSNorm", norm_eps=shape.norm_eps, mlp_class_name="LLaMAMLP",
        intermediate_size=shape.ff_width,
    )  # fmt: skip
    names = {
        "norm_1": "input_layernorm", "attn.proj": "self_attn.o_proj", "norm_2": "post_attention_layernorm",
        "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    }  # fmt: skip
    ends = {"lm_head": "lm_head", "transformer.wte": "embed_tokens", "transformer.ln_f": "norm"}
    weights = {f"{theirs}.weight": own[f"{ours}.weight"] for theirs, ours in ends.items()}
    for layer in range(shape.num_layers):
        prefix = f"transformer.h.{layer}"
        weights |= {f"{prefix}.{theirs}.weight": own[f"layers.{layer}.{ours}.weight"] for theirs, ours in names.items()}
        weights[f"{prefix}.attn.qkv.weight"] = torch.cat([own[f"layers.{layer}.self_attn.{n}_proj.weight"] for n in "qkv"])
    model = GPT(config)
    model.load_state_dict(weights)
    if work.compiled:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
    )
    for ids_BS in itertools.cycle(work.batches()):
        logits_BTV = model(ids_BS[:, :-1].contiguous())
        loss = chunked_cross_entropy(logits_BTV, ids_BS[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
