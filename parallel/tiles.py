"""The tiles of a VAE, each computed by one of the ranks that share it.

A tiled pass of diffusers (`tiled_decode`, `_tiled_encode`) cuts its input, calls the decoder or
encoder per tile, and blends what comes back. It runs twice here, unchanged:

    record   each call is noted, and answered with zeros
    share    each rank computes the calls of its tiles; every output goes to all ranks
    replay   each call is answered with its output

So the result has the bits of the VAE's own tiled pass. Calls that hand on one `feat_cache` are the
frames of one tile, and one rank computes them in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist

from dbcache.parallel.mesh import Axis

TILED = {
    "tiled_decode": "decoder",
    "tiled_encode": "encoder",
    "_tiled_encode": "encoder",
}
"""Tiled passes, and the part of the VAE that each calls per tile."""

VAES = (
    "AutoencoderDC",
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLLTX2Video",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan",
)
"""Classes whose tiles are independent of each other, each compared with its own tiled pass."""

_Pass = Callable[[tuple[Any, ...], dict[str, Any]], torch.Tensor]
_PASS: ContextVar[tuple[Any, _Pass] | None] = ContextVar("tiles", default=None)
"""The part that is called per tile in this thread, and what answers in its place."""


class SplitTiles:
    """A VAE whose tiled passes are shared; tiling is switched on while they are.

    Args:
        vae: of one of `VAES`.

    Raises:
        ValueError: another class, or a VAE that is spread already.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.who = type(vae).__name__
        if self.who not in VAES:
            raise ValueError(
                f"{self.who}: its tiles cannot be told apart; leave it out of "
                f"extra_parallel_modules, and save memory with pipe.vae.enable_tiling(); known: "
                f"{', '.join(VAES)}"
            )
        if isinstance(vae.__dict__.get("tiled_decode"), _Shared):
            raise ValueError(f"{self.who}: must not be spread already; disable its pipeline first")
        self._replaced: list[tuple[Any, str, Any]] = []
        self._tiled_before = False

    def install(self, axis: Axis) -> None:
        """Share the tiled passes among the ranks of `axis`."""
        self._tiled_before = self.vae.use_tiling
        self.vae.use_tiling = True
        for name, part in TILED.items():
            plain = getattr(self.vae, name, None)
            if plain is not None:
                shared = _Shared(plain, getattr(self.vae, part), axis, f"{self.who}.{name}")
                self._replace(self.vae, name, shared)
        for part in dict.fromkeys(TILED.values()):
            module = getattr(self.vae, part)
            self._replace(module, "forward", _Part(module, module.forward))

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        self._replaced.append((owner, name, owner.__dict__.get(name)))
        owner.__dict__[name] = new

    def remove(self) -> None:
        """Put back what was there."""
        for owner, name, old in reversed(self._replaced):
            if old is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = old
        if self._replaced:
            self.vae.use_tiling = self._tiled_before
        self._replaced = []


class _Part:
    """Stands in for the `forward` of an encoder or decoder."""

    def __init__(self, module: torch.nn.Module, plain: Any) -> None:
        self.module = module
        self.plain = plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = _PASS.get()
        if current is None or current[0] is not self.module:
            return self.plain(*args, **kwargs)
        return current[1](args, kwargs)


class _Shared:
    """Stands in for a tiled pass."""

    def __init__(self, plain: Any, part: Any, axis: Axis, who: str) -> None:
        self.plain = plain
        self.part = part
        self.axis = axis
        self.who = who

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _PASS.get() is not None:  # a tiled pass that calls another one
            return self.plain(*args, **kwargs)
        x: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
        calls: list[tuple[Any, Any]] = []

        def record(inputs: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
            calls.append((inputs, named))
            return self._zeros(inputs[0])

        with _answered_by(self.part, record):
            self.plain(*args, **kwargs)
        outputs = iter(self._share(calls, x))
        with _answered_by(self.part, lambda inputs, named: next(outputs)):
            return self.plain(*args, **kwargs)

    def _zeros(self, tile: torch.Tensor) -> torch.Tensor:
        """Return what the code after the tiles can work with: the channels of the last layer."""
        last = [
            layer
            for layer in self.part.modules()
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d)
        ][-1]
        return tile.new_zeros((tile.shape[0], last.out_channels, *tile.shape[2:]))

    def _share(self, calls: list[tuple[Any, Any]], x: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs of all calls, of which this rank computes those of its tiles."""
        tiles: dict[int, int] = {}
        owners = []
        for number, (_, named) in enumerate(calls):
            cache = named.get("feat_cache")
            tile = tiles.setdefault(number if cache is None else -id(cache), len(tiles))
            owners.append(tile % self.axis.size)
        own: dict[int, torch.Tensor] = {}
        error: Exception | None = None
        try:
            plain = self.part.forward.plain
            for number, (inputs, named) in enumerate(calls):
                if owners[number] == self.axis.rank:
                    own[number] = plain(*inputs, **named).contiguous()
        except Exception as caught:
            error = caught
        layouts = self._layouts(own, x, error)
        outputs = []
        for number, owner in enumerate(owners):
            out = own.get(number)
            if out is None:
                shape, dtype = layouts[owner][number]
                out = torch.empty(shape, dtype=dtype, device=x.device)
            dist.broadcast(out, self.axis.ranks[owner], group=self.axis.group)
            outputs.append(out)
        return outputs

    def _layouts(
        self, own: dict[int, torch.Tensor], x: torch.Tensor, error: Exception | None
    ) -> list[dict[int, Any]]:
        """Return shapes and dtypes of what each rank computed; raise where one of them failed."""
        text = None if error is None else f"{type(error).__name__}: {error}"
        layouts = {number: (tuple(out.shape), out.dtype) for number, out in own.items()}
        told: list[Any] = [None] * self.axis.size
        dist.all_gather_object(told, (text, tuple(x.shape), layouts), group=self.axis.group)
        if error is not None:
            raise error
        for rank, (failed, shape, _) in zip(self.axis.ranks, told, strict=True):
            if failed is not None:
                raise RuntimeError(f"{self.who}: all ranks must succeed, but rank {rank}: {failed}")
            if shape != tuple(x.shape):
                raise ValueError(
                    f"{self.who}: all ranks must be given the same shape, got {tuple(x.shape)} "
                    f"here and {shape} on rank {rank}"
                )
        return [layout for _, _, layout in told]


@contextmanager
def _answered_by(part: Any, answer: _Pass) -> Iterator[None]:
    token = _PASS.set((part, answer))
    try:
        yield
    finally:
        _PASS.reset(token)
