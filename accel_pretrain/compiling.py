"""Whether a run is compiled: where it pays, and where a compiler works."""

from __future__ import annotations

import math

import torch

from accel_pretrain.runtime import TrainingConfig

# Floating-point operations of a process from which compiling pays: about ten minutes of two cores, or of one GPU.
_COMPILE_FROM_FLOPS = {"cpu": 1e15, "cuda": 1e17}


def wants_compile(training: TrainingConfig, flops: float, kind: str) -> bool:
    """Whether a process that computes so much, on a device of this kind, is to compile; a compiler may still be missing."""
    return training.compile if training.compile is not None else flops >= _COMPILE_FROM_FLOPS.get(kind, math.inf)


def resolve_compile(training: TrainingConfig, flops: float, device: torch.device) -> tuple[bool, str | None]:
    """Whether to compile, and a notice about it. A function of the config, not of the clock: a resumed run does the same."""
    if not wants_compile(training, flops, device.type):
        return False, None
    if (problem := _compiler_problem(device)) is not None:
        return False, f"not compiled: {problem}"
    return True, "the first update compiles the model's blocks; --compile false leaves that out"


def _compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile does not work here: a compiler may be missing, or the headers that it needs."""
    from torch._inductor import cpp_builder, exc  # takes seconds

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):  # the second on Windows
        return "torch.compile needs a C++ compiler, such as g++, and found none"
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(64, device=device))
    except Exception as error:  # whatever a compiler may say
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.compile fails here ({next((line for line in said if 'error:' in line), said[0]).strip()[:200]})"
    return None
