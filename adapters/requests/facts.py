"""What ranks that decide together must have in common: settings, blocks, steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from dbcache.adapters.requests.clock import Steps
from dbcache.adapters.requests.setup import Setup
from dbcache.config.cache import StackSettings
from dbcache.config.parallelism import ParallelismConfig
from dbcache.config.prune import DBPruneConfig

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def facts_of(
    setups: Sequence[Setup], parallelism: ParallelismConfig | None = None
) -> dict[str, str]:
    """Return the settings of the transformers of one target, by name."""
    facts = {f"parallelism_config: {name}": repr(value) for name, value in _given(parallelism)}
    if len(setups) == 1:
        return facts | _facts(setups[0])
    return facts | {
        f"transformer {number}: {name}": value
        for number, setup in enumerate(setups, 1)
        for name, value in _facts(setup).items()
    }


def _given(parallelism: ParallelismConfig | None) -> Iterable[tuple[str, Any]]:
    if parallelism is None:
        return ()
    given = parallelism.as_dict()
    extras = parallelism.context.extra_parallel_modules or ()
    kwargs = {**given["parallel_kwargs"]}
    for options in (given, kwargs):
        if options.get("extra_parallel_modules") is not None:  # a module's repr is its whole tree
            options["extra_parallel_modules"] = [_name(extra) for extra in extras]
    return (given | {"parallel_kwargs": kwargs}).items()


def _name(extra: Any) -> str:
    return extra if isinstance(extra, str) else type(extra).__name__


def meet_ranks(setup: Setup, steps: Steps, latents: torch.Tensor | None) -> None:
    """See which ranks decide together as a request begins, and that all begin it alike.

    Args:
        setup: its blocks and settings.
        steps: how many it has, as `Clock.num_steps` tells.
        latents: what the transformer is called with.

    Raises:
        ValueError: they do not.
    """
    if setup.sharding is None:
        return
    device = torch.device("cpu") if latents is None else latents.device
    setup.sharding.meet(lambda: _facts_of_request(setup, steps, latents), device)
    setup.let_vote(setup.stacks)


def _facts_of_request(setup: Setup, steps: Steps, latents: torch.Tensor | None) -> dict[str, str]:
    facts = _facts(setup)
    facts["num_inference_steps"] = str(steps[0] if steps[0] is not None else steps[1])
    if latents is not None and any(_tells_samples_apart(s.settings) for s in setup.stacks):
        facts["batch size"] = str(len(latents))
    return facts


def _facts(setup: Setup) -> dict[str, str]:
    base = _settings(setup.base)
    facts = {"transformer": type(setup.module).__name__, **base}
    facts["cuda_graph"] = str(setup.graphs is not None)
    for stack in setup.stacks:
        facts[f"{stack.name}: blocks"] = str(stack.num_blocks)
        own = _settings(stack.settings)
        facts |= {
            f"{stack.name}: {name}": value for name, value in own.items() if base.get(name) != value
        }
    return facts


def _settings(settings: StackSettings) -> dict[str, str]:
    cache = settings.cache
    values: dict[str, Any] = {
        **cache.as_dict(),
        "max_warmup_steps": "not given" if cache.warmup is None else cache.warmup,
        "calibrator_config": settings.predictor,
        "calibration": settings.calibration,  # what it says, wherever each rank has its file
    }
    return {name: _ADDRESS.sub("", repr(value)) for name, value in values.items()}


def _tells_samples_apart(settings: StackSettings) -> bool:
    cache = settings.cache
    by_block = isinstance(cache, DBPruneConfig) or bool(cache.Bn_compute_blocks_ids)
    return by_block or cache.batch_reduce == "max"
