"""Where the numbers of a run live on several devices: whole on each of them, or a share on each.

The results are the same in float32, up to the order of sums. Under bf16 they are not quite: the sharded strategies round the
weights of the norms inside blocks to bfloat16 as well, which ddp leaves in float32. With the optimizer galore, moments differ
by up to a thousandth between numbers of processes, and losses agree: see :mod:`accel_pretrain.frugal`.

| strategy | weights | gradients | optimizer state | sent per update |
|---|---|---|---|---|
| ddp | whole | whole | whole | gradients, once |
| zero2 | shares; whole in an update | shares; whole while added up | shares | weights and gradients, once |
| fsdp2 | shares; a block whole while it computes | shares | shares | weights twice, gradients, in every micro-step |

Both sharded strategies are PyTorch's ``fully_shard`` (Zhao et al. 2023, "PyTorch FSDP"; Rajbhandari et al. 2020, "ZeRO"). DDP
with ``ZeroRedundancyOptimizer`` would share out optimizer state alone, send as much, and have checkpoints and clipping of its
own: ``zero2`` saves more, by the code that ``fsdp2`` needs anyway. Accelerate is told by its plugin, and drives both.

A tensor is shared out by rows: n rows over k processes, ceil(n / k) each, so that the last ones may have fewer, or none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from accel_pretrain.models import ModelConfig, Transformer, hollow
from accel_pretrain.rules import WHOLE, is_share, rows_like, settle_in
from accel_pretrain.rules import local as local  # through here for everybody else
from accel_pretrain.typed_yaml import option

State = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """What each of several processes holds. The numbers do not depend on it, but for norms under bf16: see this module."""

    strategy: Literal["ddp", "zero2", "fsdp2"] | None = option(
        None, "ddp: all on each process; zero2, fsdp2: a share each; null: what the launcher asks for, else ddp"
    )
    cpu_offload: bool | None = option(
        None, "with zero2 and fsdp2 on GPUs, keep the shares in host memory, and update there; null: what the launcher asks for"
    )


def build_plugin(strategy: str, precision: str, *, offload: bool) -> FullyShardedDataParallelPlugin | None:
    """What Accelerate is told about ``strategy``; None for ddp. ``precision`` is in Accelerate's words.

    Every field is given, since Accelerate would take the others from the environment. Under bf16, blocks get their weights in
    bfloat16, which is what autocast would make of them (norm weights, which it leaves alone, are rounded too). Gradients are
    added up in float32, and the residual stream is float32: inputs are not cast. fp16 is refused before.
    """
    if strategy == "ddp":
        return None
    from torch.distributed.fsdp import MixedPrecisionPolicy  # takes as long as half of torch

    halves = torch.bfloat16 if precision == "bf16" else None
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=strategy == "fsdp2", cpu_offload=offload, auto_wrap_policy="no_wrap",
        mixed_precision_policy=MixedPrecisionPolicy(halves, reduce_dtype=torch.float32, cast_forward_inputs=False),
        activation_checkpointing=False, cpu_ram_efficient_loading=False,
    )  # fmt: skip


def insist(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Make Accelerate drive FSDP2 on a CPU too, where 1.15 drops the plugin and trains by DDP without a word.

    Its two states are all that it looks at. :func:`prepare` checks what has come of it.
    """
    if not accelerator.is_fsdp2:
        for state in (accelerator.state, PartialState()):
            state.__dict__.update(distributed_type=DistributedType.FSDP)
        accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2, f"Accelerate does not take the FSDP plugin: {accelerator.distributed_type}"


def strategy_of(accelerator: Accelerator) -> str:
    """The strategy that is in force, in the config's words."""
    if not accelerator.is_fsdp2:
        return "ddp"
    return "fsdp2" if _plugin_of(accelerator).reshard_after_forward else "zero2"


def _plugin_of(accelerator: Accelerator) -> Any:
    """The plugin after its making, which has turned its fields into other types than it declares."""
    return accelerator.state.fsdp_plugin


def _offloads(accelerator: Accelerator) -> bool:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return isinstance(_plugin_of(accelerator).cpu_offload, CPUOffloadPolicy)


# ------------------------------------------------------------------------------------------------------------ the model


def build_model(accelerator: Accelerator, config: ModelConfig, vocab_size: int) -> Transformer:
    """The model as this process holds it, without values yet: :func:`fill` gives them. It never is in memory as a whole."""
    module = hollow(config, vocab_size)
    home = accelerator.device
    if accelerator.is_fsdp2:
        _shard(accelerator, module)
        home = torch.device("cpu") if _offloads(accelerator) else home
    module.to_empty(device=home)
    module.make_tables()
    for name, table in module.named_buffers():
        setattr(module, name, table.to(accelerator.device))
    return module


def _shard(accelerator: Accelerator, module: Transformer) -> None:
    """Share out every block by itself, and the rest together. That stays float32: embeddings are no products.

    Here and not in Accelerate's ``prepare``, which cannot tell parameters on "meta" apart, and takes one precision for all.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin = _plugin_of(accelerator)
    shared: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "offload_policy": plugin.cpu_offload,
    }
    for layer in module.layers:
        fully_shard(
            layer, reshard_after_forward=plugin.reshard_after_forward, mp_policy=plugin.mixed_precision_policy, **shared
        )
    fully_shard(module, reshard_after_forward=False, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **shared)
    compute = module.forward

    def in_precision(*args: Any, **kwargs: Any) -> torch.Tensor:
        with accelerator.autocast():
            return compute(*args, **kwargs)

    module.forward = in_precision  # as ``prepare`` does for DDP, but not for FSDP2


@torch.no_grad()
def fill(module: nn.Module, values: Iterable[tuple[str, Any]]) -> None:
    """Give every parameter its value, of which this process keeps its share. KeyError or ValueError where they do not fit.

    A value is a tensor, or whatever gives its rows by slicing and has a ``shape``, such as an open file does.
    """
    empty = dict(module.named_parameters())
    for name, value in values:
        _copy_share(empty.pop(name), value)
    if empty:
        raise KeyError(f"no value for {next(iter(empty))}")


def prepare(
    accelerator: Accelerator, module: Transformer, build: Callable[[nn.Module], torch.optim.Optimizer]
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """``accelerator.prepare`` of a model and its optimizer.

    For a sharded model Accelerate looks up the optimizer's parameters by their addresses. Shares without rows all have the
    address 0, and would be mixed up; so parameters are put back as they were.
    """
    built = build(module)
    settle_in(built, accelerator.mixed_precision, 1 if accelerator.is_fsdp2 else accelerator.num_processes)
    own = [list(group["params"]) for group in built.param_groups]
    model, optimizer = accelerator.prepare(module, built)
    for group, parameters in zip(optimizer.param_groups, own, strict=True):
        group["params"] = parameters
    shares = [is_share(parameter) for parameter in model.parameters()]
    assert (is_sharded(model) and all(shares)) == accelerator.is_fsdp2, "the model is not sharded as the config has it"
    return model, optimizer


# ------------------------------------------------------------------------------------------------------------- training


@contextlib.contextmanager
def withheld(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """A micro-step that is not the last of its update: gradients are added up, to be exchanged in the last one.

    Under zero2 the weights stay whole until then, too. Under fsdp2 all goes on as in the last one: whole gradients would take
    the memory that it is there to save.
    """
    if not is_sharded(model):
        with accelerator.no_sync(model):
            yield
    elif strategy_of(accelerator) == "fsdp2":
        yield
    else:
        sharded: Any = model
        sharded.set_reshard_after_backward(False)
        with accelerator.no_sync(model):
            yield
        sharded.set_reshard_after_backward(True)


def is_sharded(module: nn.Module) -> bool:
    """Whether computing with this model is collective, because each process holds a share of it."""
    return hasattr(module, "reshard")  # as ``fully_shard`` makes it; its class would cost every program a second to import


def forget_gathered(module: nn.Module) -> None:
    """Drop weights that a forward pass without a backward pass has left whole: they would not follow an update."""
    for own in module.modules():
        if is_sharded(own):
            own.reshard()  # type: ignore[operator]


@contextlib.contextmanager
def alike(module: nn.Module) -> Iterator[None]:
    """Let all processes get the main one's outputs: what follows from them is then the same, to the last collective."""

    def take_over(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        output = output.contiguous()
        dist.broadcast(output, src=0)
        return output

    handle = module.register_forward_hook(take_over) if is_sharded(module) else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
            forget_gathered(module)


# --------------------------------------------------------------------------------------------------------------- shares


def whole(tensor: Any) -> torch.Tensor:
    """All of a tensor. Collective, if it is shared out; it may be in host memory."""
    return tensor.to(tensor.device_mesh.device_type).full_tensor() if is_share(tensor) else tensor


def _copy_share(own: Any, value: Any) -> None:
    """Copy a whole value, or the own rows of it, into a parameter or moment."""
    shape = tuple(value.get_shape() if hasattr(value, "get_shape") else value.shape)
    if shape != tuple(own.shape):
        raise ValueError(f"a tensor of shape {shape} where {tuple(own.shape)} is wanted")
    rows = slice(None)
    if is_share(own):
        count, share = own.shape[0], -(-own.shape[0] // own.device_mesh.size())
        begin = min(own.device_mesh.get_local_rank() * share, count)
        rows = slice(begin, min(begin + share, count))
    if (target := local(own.detach())).numel():
        target.copy_(value[rows])


def load_optimizer(optimizer: torch.optim.Optimizer, saved: State) -> None:
    """Load the state, and only that, of an optimizer's ``state_dict`` as a process alone saves it; each takes its share."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    fused = [bool(group.get("fused")) for group in optimizer.param_groups for _ in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if len(numbers) != len(parameters):
        raise ValueError(f"the state of {len(numbers)} parameters, where there are {len(parameters)}")
    optimizer.state.clear()
    for number, parameter, on_device in zip(numbers, parameters, fused, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            if torch.is_tensor(value) and value.ndim == 0:  # a count
                value = value.to(local(parameter).device if on_device else "cpu", copy=True)
            elif name in WHOLE:
                value = value.to(local(parameter).device, copy=True)
            elif torch.is_tensor(value):
                moment = torch.zeros_like(parameter)
                if value.shape != parameter.shape or value.dtype != parameter.dtype:
                    moment = rows_like(parameter, value.shape[1], value.dtype)
                _copy_share(moment, value)
                value = moment.detach()
            optimizer.state[parameter][name] = value


def load_sharded(accelerator: Accelerator, weights: Path, optimizer_file: Path) -> None:
    """What ``accelerator.load_state`` does for a model that is not sharded: every process reads only its share of the files."""
    from safetensors import safe_open

    module, optimizer = accelerator._models[0], accelerator._optimizers[0]
    forget_gathered(module)
    with safe_open(weights, "pt") as file:
        fill(module, ((name, file.get_slice(name)) for name in file.keys()))  # noqa: SIM118  # it is no dict
    load_optimizer(optimizer, torch.load(optimizer_file, weights_only=True, map_location="cpu", mmap=True))
