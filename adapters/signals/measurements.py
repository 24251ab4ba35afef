"""What the policies without a probe measure: one source per stack, asked before its first block.

A source sees the arguments of each forward, those of the stack's first block, and the output. What
it returns from `measured` is compared with what it returned one step before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dbcache.adapters.blocks.patterns import describe
from dbcache.adapters.blocks.signature import Call, parameter_names, unwrap
from dbcache.adapters.signals.modulated import MODULATED
from dbcache.adapters.signals.sea_filter import sea_filter
from dbcache.lanes.forms import stored_dtype
from dbcache.lanes.lane import Lane

FULL_NOISE = {
    "FluxTransformer2DModel": 1.0,
    "Flux2Transformer2DModel": 1.0,
    "ChromaTransformer2DModel": 1.0,
    "QwenImageTransformer2DModel": 1.0,
    "SD3Transformer2DModel": 1000.0,
    "CogView4Transformer2DModel": 1000.0,
    "WanTransformer3DModel": 1000.0,
    "HunyuanVideoTransformer3DModel": 1000.0,
}
"""The timestep that a transformer is given for pure noise, by class; models of flow matching only,
whose share of noise is the timestep over this."""


class Source:
    """What all sources have in common: they measure a tensor, and learn nothing from the output.

    Args:
        who: name of the stack, for errors.
        model: the transformer, or what holds the stack in it.
        first_block: of the stack.

    Raises:
        ValueError: the policy does not know the class of the block or model.
    """

    is_whole = True
    """Whether every rank that is given all of the latents measures them, so that none needs to
    ask."""

    vote: Callable[..., torch.Tensor] | None = None
    """Gives the sums of all ranks, where they vote."""

    def __init__(self, who: str, model: torch.nn.Module, first_block: torch.nn.Module) -> None:
        self.who = who
        self.value: Any = None

    def start_request(self) -> None:
        """Forget the last request."""

    def kind_of(self, call: Call) -> object:
        """Return what the host reads of a call's tensors; recorded work holds for that alone."""
        return None

    def start(self, call: Call, may_read: bool = True) -> None:
        """Take note of what the transformer is called with.

        `may_read` says whether its tensors may be read on the host: not while it is recorded.
        """

    def at_block(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of what the stack's first block is called with."""

    def measured(self) -> torch.Tensor:
        """Return what is compared, (B, ...)."""
        return self.value.to(stored_dtype(self.value.dtype))

    def finish(self, lane: Lane, output: Any, cached: bool) -> None:
        """Take note of what the transformer returns, on a step that is known to be cached or not.

        In recorded work a step that may be either is not known to be cached.
        """


class Latents(Source):
    """EasyCache: the latents that go in, and how the output follows them."""

    def start(self, call: Call, may_read: bool = True) -> None:
        self.value = _latents(self.who, call)

    def finish(self, lane: Lane, output: Any, cached: bool) -> None:
        if not cached:
            first = first_tensor(self.who, output)
            first = first.to(stored_dtype(first.dtype))
            lane.history.record_output(lane.state, first, self.vote)


class ModulatedInput(Source):
    """TeaCache: what enters the attention of the first block, or the embedding of the time."""

    is_whole = False

    def __init__(self, who: str, model: torch.nn.Module, first_block: torch.nn.Module) -> None:
        super().__init__(who, model, first_block)
        name = type(unwrap(first_block)).__name__
        if name not in MODULATED:
            raise ValueError(
                f"{who}: policy='teacache' must know how the first block modulates its input, got "
                f"a {name}; known are {', '.join(sorted(MODULATED))}; choose another policy"
            )

    def at_block(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(parameter_names(block), args, strict=False)) | kwargs
        plain = unwrap(block)
        made = MODULATED[type(plain).__name__](plain, given["hidden_states"], given["temb"])
        self.value = made.detach()


class Spectrum(Source):
    """SeaCache: the latents that go in, filtered by what is signal at this share of noise."""

    def __init__(self, who: str, model: torch.nn.Module, first_block: torch.nn.Module) -> None:
        super().__init__(who, model, first_block)
        names = (cls.__name__ for cls in type(model).__mro__)
        self.full_noise = next((FULL_NOISE[name] for name in names if name in FULL_NOISE), 0.0)
        if not self.full_noise:
            raise ValueError(
                f"{who}: policy='seacache' must know the timesteps of the model, got "
                f"{type(model).__name__}; known are {', '.join(FULL_NOISE)}; choose another policy"
            )
        self._grids: dict[torch.Size, tuple[int, ...]] = {}
        self._last_read: tuple[torch.Tensor, int | None, tuple[int, ...]] | None = None

    def start_request(self) -> None:
        self._grids.clear()

    def start(self, call: Call, may_read: bool = True) -> None:
        x = _latents(self.who, call)
        timestep = call.get("timestep")
        if not isinstance(timestep, torch.Tensor) or timestep.ndim > 1:
            raise ValueError(
                f"{self.who}: policy='seacache' must get one timestep per sample, got "
                f"{describe(timestep)}; choose another policy"
            )
        sigma = timestep.to(x.device) / self.full_noise
        axes = tuple(range(2, x.ndim))  # (B, C, H, W) or (B, C, frames, H, W)
        if x.ndim <= 3:
            grid = self._grid_of(call, may_read)
            tokens = grid[0] * grid[1]
            if tokens > x.shape[1]:
                raise ValueError(
                    f"{self.who}: the latents must have one token per point of their grid, got "
                    f"{x.shape[1]} tokens for a grid of {grid}"
                )
            # what follows are tokens of pictures that are given, not made
            x, axes = x[:, :tokens].unflatten(1, grid), (1, 2)
        self.value = sea_filter(x, sigma, axes)

    def kind_of(self, call: Call) -> object:
        x = _latents(self.who, call)
        return None if x.ndim > 3 else self._grid_of(call, may_read=True)

    def _grid_of(self, call: Call, may_read: bool) -> tuple[int, ...]:
        """Return (rows, columns) of packed latents, from `img_ids` read once per request.

        They are read once for each of their shapes: some pipelines make them anew at each step
        (FLUX.2, behind given pictures), but the size of what is made does not change in a request.
        """
        shapes = call.get("img_shapes")
        if shapes is not None:
            first = shapes[0]
            _, rows, columns = first[0] if isinstance(first, list) else first
            return rows, columns
        ids = call.get("img_ids")
        if ids is None:
            raise ValueError(
                f"{self.who}: policy='seacache' must get img_ids or img_shapes with packed "
                f"latents, got neither; choose another policy"
            )
        if ids.shape not in self._grids:
            self._grids[ids.shape] = self._read(ids, may_read)
        return self._grids[ids.shape]

    def _read(self, ids: torch.Tensor, may_read: bool) -> tuple[int, ...]:
        """Return (rows, columns); in a capture, what was read of this very tensor before.

        Raises:
            RuntimeError: nothing was.
        """
        version = None if ids.is_inference() else ids._version
        if may_read:
            flat = (ids[0] if ids.ndim == 3 else ids).cpu()
            own = flat[flat[:, 0] == flat[0, 0]]
            rows, columns = (own[:, 1:3].amax(0) - own[:, 1:3].amin(0) + 1).tolist()
            self._last_read = ids, version, (int(rows), int(columns))
        last = self._last_read
        if last is None or last[0] is not ids or last[1] != version:
            raise RuntimeError(
                f"{self.who}: policy='seacache' must know the size of the latents, which is read "
                f"from img_ids on the host, got ids under capture that were not read before; run a "
                f"step with the same tensor as img_ids before the capture"
            )
        return last[2]


SOURCES = {"latents": Latents, "modulated": ModulatedInput, "spectrum": Spectrum}
"""By what a policy measures; there is none for the probe, nor for nothing."""


def _latents(who: str, call: Call) -> torch.Tensor:
    """Return what the transformer denoises: `hidden_states`, or its first parameter."""
    name = "hidden_states" if "hidden_states" in call.names else call.names[0]
    x = _one_tensor(call.get(name))
    if x is None:
        raise ValueError(
            f"{who}: the transformer must be called with its latents, tensors of one shape in "
            f"floating point, as {name}; choose another policy"
        )
    return x


def first_tensor(who: str, output: Any) -> torch.Tensor:
    """Return the prediction that a transformer returns, from a tuple or an output class."""
    first = output[0] if isinstance(output, tuple | list | dict) and len(output) else output
    prediction = _one_tensor(first)
    if prediction is None:
        raise ValueError(
            f"{who}: the transformer must return its prediction as tensors of one shape, got "
            f"{describe(output)}; choose another policy"
        )
    return prediction


def _one_tensor(value: Any) -> torch.Tensor | None:
    """Return a tensor, or a list of them (one per sample) as one; None where there is neither."""
    if isinstance(value, tuple | list) and value:
        shapes = {x.shape if isinstance(x, torch.Tensor) else None for x in value}
        value = torch.stack(list(value)) if len(shapes) == 1 and None not in shapes else None
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach() if is_float else None
