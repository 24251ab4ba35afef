"""Adapters that users register for models of their own, by the name of the class.

@dbcache.BlockAdapterRegistry.register("MyPipeline")
def my_adapter(pipe, **kwargs):
    return dbcache.BlockAdapter(pipe=pipe, blocks=pipe.transformer.layers, ...)

dbcache.enable(my_pipe)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from dbcache.adapters.blocks.block_adapter import BlockAdapter
from dbcache.config.options import shown

Factory = Callable[..., BlockAdapter]


class BlockAdapterRegistry:
    """Maps class names to functions that describe a pipeline or transformer of that class."""

    _factories: ClassVar[dict[str, Factory]] = {}

    @classmethod
    def register(cls, name: str) -> Callable[[Factory], Factory]:
        """Decorate a function `f(target, **kwargs) -> BlockAdapter`; `enable` then calls it.

        It comes before the table of models that dbcache brings. Registering a name again replaces
        the function.

        Args:
            name: class of the pipeline or transformer, or the beginning of it, as in ``"Flux"`` for
                ``FluxPipeline`` and ``FluxImg2ImgPipeline``. Subclasses count; the longest fits.

        Raises:
            TypeError: `name` is not a string, or what is decorated cannot be called.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"BlockAdapterRegistry.register: name must be that of a class, got {shown(name)}; "
                f'use it as @BlockAdapterRegistry.register("MyPipeline")'
            )

        def decorate(factory: Factory) -> Factory:
            if not callable(factory):
                raise TypeError(
                    f"BlockAdapterRegistry.register: must decorate a function, got {shown(factory)}"
                )
            cls._factories[name] = factory
            return factory

        return decorate

    @classmethod
    def unregister(cls, name: str) -> None:
        """Forget the function of `name`; does nothing where there is none."""
        cls._factories.pop(name, None)

    @classmethod
    def adapter_of(cls, target: object) -> BlockAdapter | None:
        """Return what the function registered for the class of `target` makes of it, or None.

        Raises:
            TypeError: the function returned something else than a `BlockAdapter`.
        """
        for base in type(target).__mro__:
            names = [name for name in cls._factories if base.__name__.startswith(name)]
            if names:
                name = max(names, key=len)
                adapter: Any = cls._factories[name](target)
                if not isinstance(adapter, BlockAdapter):
                    raise TypeError(
                        f"BlockAdapterRegistry: the function registered as {name!r} must return a "
                        f"BlockAdapter, got {shown(adapter)}"
                    )
                return adapter
        return None
