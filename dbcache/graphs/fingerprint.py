"""What a recording depends on beside its inputs: the weights' addresses and how modules are set."""

from __future__ import annotations

import sys
from typing import Any

import torch

SETTINGS = (
    "training",
    "scaling",
    "merged_adapters",
    "_active_adapter",
    "_disable_adapters",
    "gradient_checkpointing",
    "scale",
    "_attention_backend",
)
"""Attributes of modules and attention processors that a forward reads on the host: PEFT's, those of
IP-Adapters (`scale`) and of diffusers' attention backends."""

OFFLOADING = ("_hf_hook", "_diffusers_hook")
"""Attributes in which Accelerate and diffusers keep hooks that move weights."""

MOVERS = ("AlignDevicesHook", "CpuOffload", "UserCpuOffloadHook", "GroupOffloadingHook",
          "LazyPrefetchGroupOffloadingHook", "LayerwiseCastingHook")  # fmt: skip
"""Those hooks by the names of their classes: weights have another address on each call."""


def fingerprint(module: torch.nn.Module) -> int:
    """Return a number that changes when a recording of `module` is void.

    That is when a weight lies elsewhere or has another dtype, when modules come, go or are set
    otherwise (LoRA adapters, IP-Adapters and their scales, attention processors and backends), or
    with hooks. Weights that change in place keep their address, and a recording reads them anew.
    """
    parts: list[Any] = []
    for part in module.modules():
        parts.append(id(part))
        for tensors in (part._parameters, part._buffers):
            parts += [(x.data_ptr(), x.dtype) for x in tensors.values() if x is not None]
        own = part.__dict__
        processor = own.get("processor")  # one that is a module is among the modules
        parts.append(id(processor))
        for holder in (own, getattr(processor, "__dict__", {})):
            parts += [
                repr(holder[name])
                for name in SETTINGS
                if name in holder and not isinstance(holder[name], torch.Tensor)
            ]
        parts += [len(part._forward_hooks), len(part._forward_pre_hooks)]
    return hash(tuple(parts))


def reason_against(module: torch.nn.Module) -> str | None:
    """Return why `module` cannot be recorded at all, None if nothing is known against it."""
    if any(x.device.type == "meta" for x in module.parameters()):
        return "its weights must lie on the device, some are offloaded (meta)"
    for name, part in module.named_modules():
        where = f"{name or 'the transformer'} ({type(part).__name__})"
        mover = mover_of(part)
        if mover is not None:
            return f"weights must stay where they are, {where} has the hook {mover}"
        if has_own_graphs(part):
            return (
                f"{where} is compiled with CUDA graphs of its own; compile without them, as in "
                f"mode='default' or 'max-autotune-no-cudagraphs'"
            )
    return None


def mover_of(part: torch.nn.Module) -> str | None:
    """Return the class of a hook of a module that moves its weights, None without."""
    for holder in map(part.__dict__.get, OFFLOADING):
        several = getattr(holder, "hooks", ())
        inner = several.values() if isinstance(several, dict) else several
        for hook in (holder, *inner):
            if type(hook).__name__ in MOVERS:
                return type(hook).__name__
    return None


def has_own_graphs(part: torch.nn.Module) -> bool:
    """Whether torch.compile was told to use CUDA graphs for `part`, or for all that it compiles."""
    compiled = part.__dict__.get("_compiled_call_impl") or part
    config = getattr(compiled, "get_compiler_config", None)
    if config is None:
        return False
    triton = getattr(sys.modules.get("torch._inductor.config"), "triton", None)
    return bool((config() or {}).get("triton.cudagraphs", getattr(triton, "cudagraphs", False)))
