"""What is spread over ranks beside the transformers: `extra_parallel_modules`.

| kind | how | ranks |
| text encoder | its weights (`text_encoders.py`) | all that work on one request |
| VAE | its tiles (`tiles.py`) | all that work on one request |
| ControlNet | as its transformer (`controlnets.py`) | those of the transformer |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from dbcache.config.options import shown
from dbcache.config.parallelism import ParallelismConfig
from dbcache.parallel.controlnets import CONTROLNETS
from dbcache.parallel.mesh import Axis, device_of
from dbcache.parallel.text_encoders import SplitEncoder
from dbcache.parallel.tiles import SplitTiles

WHO = "ParallelismConfig: extra_parallel_modules"


class Extra(Protocol):
    """A module that is spread beside the transformers; all ranks call its methods alike."""

    def install(self, axis: Axis) -> None:
        """Spread it over the ranks that work on one request."""

    def remove(self) -> None:
        """Undo it."""


class _SplitControlNet:
    """A ControlNet, spread as `Parallelized` spreads a transformer, which takes no axis."""

    def __init__(self, spread: Any) -> None:
        self.spread = spread

    def install(self, axis: Axis) -> None:
        self.spread.install()

    def remove(self) -> None:
        self.spread.remove()


def extras_of(
    config: ParallelismConfig,
    pipe: object,
    transformers: Sequence[torch.nn.Module],
    spread: Callable[..., Any],
    size: int,
) -> list[Extra]:
    """Check the extra modules of a config, and return what spreads each. No communication.

    Args:
        config: whose `extra_parallel_modules` are modules, or names of components of `pipe`.
        pipe: the pipeline; None where there is none.
        transformers: what is spread anyway.
        spread: `Parallelized`, which is given a ControlNet, a config and its row.
        size: number of ranks that work on one request.

    Raises:
        ValueError: a module that cannot be spread, or a name that is no component.
    """
    found: dict[torch.nn.Module, Extra] = {}
    for module in _modules(config.context.extra_parallel_modules or (), pipe):
        name = type(module).__name__
        if any(module is transformer for transformer in transformers):
            raise ValueError(f"{WHO}: {name} is the transformer, spread anyway; leave it out")
        if module in found:
            continue
        if name.endswith("ControlNetModel"):
            found[module] = _controlnet(module, config, spread)
        elif hasattr(module, "use_tiling") or name.startswith("Autoencoder"):
            found[module] = SplitTiles(module)
        else:
            found[module] = SplitEncoder(module, size, device_of(transformers[0]).type)
    return list(found.values())


def _controlnet(module: Any, config: ParallelismConfig, spread: Callable[..., Any]) -> Extra:
    name = type(module).__name__
    row = CONTROLNETS.get(name)
    if row is None:
        raise ValueError(
            f"{WHO}: {name} has no plan; leave it out: it runs whole on each rank, and its "
            f"residuals are split with the tokens; known: {', '.join(CONTROLNETS)}"
        )
    splits_sequence = any(
        getattr(config, f"{axis}_size") not in (None, 1) for axis in ("ring", "ulysses")
    )
    if splits_sequence and getattr(module, "union", False):
        raise ValueError(
            f"{WHO}: a {name} with num_mode puts a token of its mode in front of the text, which "
            f"cannot be split along the sequence; leave it out, or use tp_size"
        )
    own = ("cp_plan", "extra_parallel_modules")
    options = {name: v for name, v in config.context.given.items() if name not in own}
    same = ("backend", "timeout")
    sizes = {n: v for n, v in config.given.items() if n.endswith("_size") or n in same}
    own_config = ParallelismConfig(**sizes, parallel_kwargs=options)
    return _SplitControlNet(spread(module, own_config, row=row))


def _modules(given: Sequence[Any], pipe: object) -> Iterator[torch.nn.Module]:
    """Yield the modules that are meant; of several ControlNets in one, each."""
    for one in given:
        module = _named(one, pipe) if isinstance(one, str) else one
        if type(module).__name__.endswith("MultiControlNetModel"):
            yield from module.nets
        else:
            yield module


def _named(name: str, pipe: object) -> Any:
    """Return a component of a pipeline; "text_encoder" is the largest, as in cache-dit."""
    components = getattr(pipe, "components", {})
    own = {key: part for key, part in components.items() if isinstance(part, torch.nn.Module)}
    if not own:
        raise ValueError(f"{WHO}: names need a pipeline, got {shown(name)}; pass the module itself")
    if name not in own:
        raise ValueError(
            f"{WHO}: must name modules of the pipeline, got {shown(name)}; there are "
            f"{', '.join(sorted(own))}"
        )
    if name == "text_encoder":
        return max((own[key] for key in own if key.startswith(name)), key=_size)
    return own[name]


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
