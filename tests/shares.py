"""What every process of a sharded run checks about its share: ``torch.distributed.run --nproc_per_node 4 -m tests.shares``.

One launch for many checks; the main process prints each one's name, and figures. A failure of any process fails the launch.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from accel_pretrain import guard
from accel_pretrain.guard import Guard, Health
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.optim import SGD, AdamW, Muon
from accel_pretrain.parallel import ParallelConfig, build_model, fill, is_sharded, local, prepare, whole, withheld
from accel_pretrain.runtime import TrainingConfig, build_accelerator, seed_everything
from accel_pretrain.saver import Gathered

# One key/value head: its gate has one row, and most processes have no row of it. 101 is no multiple of anything.
V, T, ROWS = 101, 16, 8
SHAPE = ModelConfig(
    d_model=64, num_layers=2, num_heads=4, num_kv_heads=1, d_ff=192, context_length=T, value_embeddings=True, qk_norm=True,
    tie_embeddings=True,
)  # fmt: skip
PLAIN = SGD(lr=0.1)
MUON = Muon(lr=0.01, eps=1e-2)  # AdamW would make a rounding of a small gradient a large one


def build(accelerator: Accelerator, optimizer: Any = None) -> tuple[Any, Any]:
    """A model and its optimizer, from a seed, in place of what the accelerator held before."""
    accelerator.free_memory()
    seed_everything(1)
    module = build_model(accelerator, SHAPE, V)
    fill(module, module.initial_weights())
    return prepare(accelerator, module, (optimizer or AdamW(lr=0.01)).build)


def alone(optimizer: Any = None) -> tuple[Transformer, torch.optim.Optimizer]:
    """The same as a process alone has it, without Accelerate."""
    seed_everything(1)
    module = Transformer(SHAPE, V)
    return module, (optimizer or AdamW(lr=0.01)).build(module)


def batch(number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(V, (ROWS, T + 1), generator=torch.Generator().manual_seed(number))
    return ids[:, :-1], ids[:, 1:]


def backward(accelerator: Accelerator, model: Any, micro_steps: int = 1, number: int = 0) -> float:
    """The gradient of the mean loss of a batch, each process taking its rows; the norm of it, clipped to 0.5."""
    rows = slice(accelerator.process_index, None, accelerator.num_processes)
    inputs, targets = (ids[rows].chunk(micro_steps) for ids in batch(number))
    weight = accelerator.num_processes / (ROWS * T)
    for micro_step in range(micro_steps):
        nats_B = model(inputs[micro_step], targets[micro_step])
        if micro_step == micro_steps - 1:
            nats_B.backward(torch.full_like(nats_B, weight))
        else:
            with withheld(accelerator, model):
                nats_B.backward(torch.full_like(nats_B, weight))
    norm = accelerator.clip_grad_norm_(list(model.parameters()), 0.5)
    assert norm is not None
    return whole(norm).item()


def reference(steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Norms and weights of a process alone, by :data:`PLAIN`: Adam would make a rounding of a small gradient a large one."""
    module, own = alone(PLAIN)
    norms = []
    for number in range(steps):
        inputs, targets = batch(number)
        (module(inputs, targets).sum() / (ROWS * T)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5).item())
        own.step()
        own.zero_grad()
    return norms, {name: weight.detach() for name, weight in module.named_parameters()}


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: whole(own.detach()) for name, own in model.named_parameters()}


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


# --------------------------------------------------------------------------------------------------------------- checks


def check_weights(accelerator: Accelerator) -> str:
    """A seed gives the bits that it gives a process alone, tables included; another seed does not."""
    model, _ = build(accelerator)
    module, _ = alone()
    assert is_sharded(model)
    assert difference(weights_of(model), dict(module.named_parameters())) == 0
    assert torch.equal(model.rope, module.rope)
    seed_everything(2)
    assert difference(weights_of(model), dict(Transformer(SHAPE, V).named_parameters())) > 0
    return f"{len(list(model.parameters()))} tensors"


def check_memory(accelerator: Accelerator) -> str:
    """Bytes of weights and moments in this process, against those of a process that holds everything."""
    model, optimizer = build(accelerator)
    backward(accelerator, model)
    optimizer.step()
    moments = [value for own in optimizer.state.values() for value in own.values() if value.ndim]
    assert len(moments) == 2 * len(list(model.parameters()))
    here = sum(local(own).numel() for own in (*model.parameters(), *moments))
    gradients = sum(local(own.grad).numel() for own in model.parameters())
    everything = sum(own.numel() for own in alone()[0].parameters())
    share = here / (3 * everything)
    assert share <= 0.35, share
    assert gradients / everything <= 0.35
    return f"{share:.3f}"


def check_updates(accelerator: Accelerator) -> str:
    """Three updates, in one and in two micro-steps, are those of a process alone: norms before clipping, and weights."""
    norms, weights = reference(3)
    worst = 0.0
    for micro_steps in (1, 2):
        model, optimizer = build(accelerator, PLAIN)
        assert all(a is b for a, b in zip(sorted_parameters(optimizer), sorted(model.parameters(), key=id), strict=True))
        for number, norm in enumerate(norms):
            assert math.isclose(backward(accelerator, model, micro_steps, number), norm, rel_tol=1e-5)
            optimizer.step()
            optimizer.zero_grad()
        worst = max(worst, difference(weights_of(model), weights))
    assert worst < 1e-6, worst
    assert difference(reference(2)[1], weights) > 1e-3
    return f"{worst:.1e}"


def sorted_parameters(optimizer: Any) -> list[torch.Tensor]:
    return sorted((own for group in optimizer.param_groups for own in group["params"]), key=id)


def check_muon(accelerator: Accelerator) -> str:
    """Muon makes matrices orthogonal that no process holds; its updates are those of a process alone, as far as sums go."""
    (model, optimizer), (module, other) = build(accelerator, MUON), alone(MUON)
    begun = copy.deepcopy(weights_of(model))
    for number in range(3):
        inputs, targets = batch(number)
        (module(inputs, targets).sum() / (ROWS * T)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        backward(accelerator, model, number=number)
        for own in (optimizer, other):
            own.step()
            own.zero_grad()
    expected = {name: weight.detach() for name, weight in module.named_parameters()}
    far = difference(weights_of(model), expected)
    assert far < 1e-5, far
    assert difference(begun, expected) > 1e-2
    return f"{far:.1e}"


def check_guard(accelerator: Accelerator) -> str:
    """An update that is not finite in one process alone changes no bit anywhere, however it is decided; a good one does."""
    for optimizer, late in (
        (AdamW(lr=0.01), False),
        (AdamW(lr=0.01), True),
        (SGD(lr=0.01), True),
        (Muon(), True),
    ):  # late: as on a GPU
        guard._is_asynchronous = lambda device, late=late: late
        model, own = build(accelerator, optimizer)
        judge, health = Guard(), Health()
        for number, bad in enumerate((True, False)):
            before = copy.deepcopy(weights_of(model))
            norm = backward(accelerator, model, number=number)
            if bad and accelerator.process_index == 0:
                next(iter(model.parameters())).grad.to_local().fill_(math.nan)
            norm = torch.tensor(math.nan if bad else norm)
            judge.step(accelerator, own, health, number + 1, torch.tensor(1.0), norm)
            assert (difference(weights_of(model), before) == 0) == bad
        judge.settle(health)
        assert health.skipped == 1
    return "4 ways"


def check_gathered(accelerator: Accelerator) -> str:
    """What is saved is whole, in the main process alone, and does not change with the next update."""
    model, optimizer = build(accelerator)
    backward(accelerator, model)
    optimizer.step()
    frozen = Gathered(accelerator)
    kept = weights_of(model)
    optimizer.step()
    assert difference(weights_of(model), kept) > 0
    if not accelerator.is_main_process:
        assert not frozen.weights
        return ""
    assert difference(dict(frozen.weights), kept) == 0
    assert frozen.updates == 1
    return f"{len(frozen.weights)} tensors"


def main() -> int:
    strategy = sys.argv[1]
    training = TrainingConfig(device="cpu", cpu_threads=1, mixed_precision="no")
    accelerator = build_accelerator(training, [], Path("unused"), ParallelConfig(strategy=strategy))  # type: ignore[arg-type]
    checks = (check_weights, check_memory, check_updates, check_muon, check_guard, check_gathered)
    for check in checks:
        began = time.monotonic()
        figures = check(accelerator)
        seconds = time.monotonic() - began
        accelerator.print(f"{check.__name__} of {accelerator.num_processes}: {figures} ({seconds:.1f} s)", flush=True)
    accelerator.free_memory()
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
