"""`torch.compile` beside a cache: the blocks are compiled, each as a graph of its own.

Which blocks run is decided on each step, so that a graph of the whole model would hold one of the
ways that a step may go. Blocks of one class share a graph: they are compiled once, which also is
several times as fast as compiling the model (pytorch.org, recipe "regional compilation").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dbcache.adapters.blocks.signature import unwrap
from dbcache.adapters.models.lookup import find_specs, row_of
from dbcache.adapters.patching.whole_compile import regions, wrappers_in
from dbcache.config.options import check_flag, reject_unknown
from dbcache.targets import resolve

Target = TypeVar("Target")

RECOMPILE_LIMIT = 64
ACCUMULATED_RECOMPILE_LIMIT = 1024
"""Of Dynamo; by default 8 and 256, above which it runs a block uncompiled. LoRA adapters, dtypes,
guidance and resolutions that differ take one graph each."""


def compile(
    target: Target,
    *,
    dynamic: bool | None = True,
    fullgraph: bool = False,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Target:
    """Compile the blocks of a model in place, as it goes well with a cache.

    Before or after `enable`, after LoRA adapters are loaded and after `quantize`. Also what
    diffusers says a model repeats is compiled (text refiners, say). Dynamo's limits are raised for
    the process, never lowered.

    Args:
        target: a pipeline (all its known transformers), a transformer of a supported class, a model
            of diffusers that says what it repeats (`_repeated_blocks`), or a `BlockAdapter`.
        dynamic: as in `torch.compile`; True: one graph serves all resolutions, None: a second one
            is compiled at the second resolution, False: one for each.
        fullgraph: each block must be one graph; an error at the first call where one is not.
        backend, mode, options: as in `torch.compile`. Where blocks have CUDA graphs of their own
            ("reduce-overhead", "max-autotune"), `enable` has none to offer (`cuda_graph`).

    Returns:
        `target`.

    Raises:
        ValueError, TypeError: no blocks are known of it.
    """
    check_flag("compile: fullgraph", fullgraph)
    blocks = [block for block in blocks_of(target) if not wrappers_in([block])]
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    config.accumulated_recompile_limit = max(
        config.accumulated_recompile_limit, ACCUMULATED_RECOMPILE_LIMIT
    )
    for block in blocks:
        block.compile(
            dynamic=dynamic, fullgraph=fullgraph, backend=backend, mode=mode, options=options
        )
    return target


def blocks_of(target: Any) -> list[torch.nn.Module]:
    """Return the blocks of a pipeline's transformers, of a model or a `BlockAdapter`, each once.

    Raises:
        ValueError, TypeError: no blocks are known of it.
    """
    module = unwrap(target)
    is_model = isinstance(module, torch.nn.Module)
    _, adapter = resolve(module)
    if is_model and adapter is None and row_of(module) is None:
        found = list(regions(module, ()))
        if found:
            return found
    specs = adapter.specs() if adapter is not None else find_specs(module)
    pairs = [
        (spec.transformer, [block_list for stack in spec.stacks for block_list in stack.lists])
        for spec in specs
    ]
    each = [block for model, lists in pairs for block in regions(model, lists)]
    return list({id(block): block for block in each}.values())


def set_compile_configs(
    descent_tuning: bool = True,
    cuda_graphs: bool = False,
    force_disable_compile_caches: bool = False,
    fx_graph_cache: bool = True,
    fx_graph_remote_cache: bool = False,
    autotune_local_cache: bool = False,
    use_fast_math: bool = False,
    compute_comm_overlap: bool = True,
    ulysses_anything: bool = False,
    capture_scalar_outputs: bool | None = None,
    capture_dynamic_output_shape_ops: bool | None = None,
    cutedsl_enable_autotuning: bool | None = None,
    **options: Any,
) -> None:
    """Set Dynamo's and Inductor's options for the whole process, as serving engines ask for it.

    Name, arguments and values are those of cache-dit's function. Options that the installed torch
    does not have are left out. Compile times are longer with `descent_tuning`.

    Args:
        descent_tuning: Inductor looks for the best tiles by coordinate descent, and fuses nothing
            into matrix products (but with ``epilogue_prologue_fusion=True``).
        cuda_graphs: Inductor makes CUDA graphs of what it compiles.
        force_disable_compile_caches: keep nothing of earlier compilations.
        fx_graph_cache, fx_graph_remote_cache, autotune_local_cache, use_fast_math: of Inductor.
        compute_comm_overlap: reorder communication, where `torch.distributed` is initialised.
        ulysses_anything: sequences may be uneven: graphs hold what reads their lengths.
        capture_scalar_outputs, capture_dynamic_output_shape_ops, cutedsl_enable_autotuning: of
            Dynamo and Inductor; None leaves them.

    Raises:
        TypeError: another option.
    """
    reject_unknown("set_compile_configs", options, ("epilogue_prologue_fusion",))
    _set(
        torch._dynamo.config,
        recompile_limit=1024,
        accumulated_recompile_limit=8192,
        capture_scalar_outputs=True if ulysses_anything else capture_scalar_outputs,
        capture_dynamic_output_shape_ops=capture_dynamic_output_shape_ops,
    )
    import torch._inductor.config as inductor

    keeps = not force_disable_compile_caches
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    _set(
        inductor,
        fx_graph_cache=fx_graph_cache and keeps,
        fx_graph_remote_cache=fx_graph_remote_cache and keeps,
        autotune_local_cache=autotune_local_cache and keeps,
        force_disable_caches=None if keeps else True,
        reorder_for_compute_comm_overlap=compute_comm_overlap if distributed else None,
        cutedsl_enable_autotuning=cutedsl_enable_autotuning,
        use_fast_math=use_fast_math,
    )
    _set(inductor.triton, cudagraphs=cuda_graphs)
    _set(inductor.cuda, use_fast_math=use_fast_math)
    if descent_tuning:
        _tune(inductor, fuses=options.get("epilogue_prologue_fusion", False))


def _tune(inductor: Any, *, fuses: bool) -> None:
    """Let Inductor look for the best tiles."""
    _set(
        inductor,
        max_fusion_size=64,
        max_pointwise_cat_inputs=8,
        conv_1x1_as_mm=True,
        coordinate_descent_tuning=True,
        coordinate_descent_check_all_directions=True,
        epilogue_fusion=fuses,
        prologue_fusion=fuses or None,
        epilogue_fusion_first=fuses or None,
        dce=True,
    )
    _set(inductor.triton, use_block_ptr=False, codegen_upcast_to_fp32=True)


def _set(config: Any, **values: Any) -> None:
    """Set options that there are; None leaves one as it is."""
    for name, value in values.items():
        if value is not None and hasattr(config, name):
            setattr(config, name, value)
