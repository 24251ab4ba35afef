"""The attention backend of one model, as a change that can be taken back.

diffusers' own `set_attention_backend` also changes the backend of the whole process, which all
models follow that were not told one. Here only the processors of one model are told.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dbcache.adapters.patching.transaction import ABSENT, put
from dbcache.config.attention import ALIASES, backend_name, how_to_install
from dbcache.config.options import shown

NAME = "_attention_backend"
"""Attribute of a processor that holds its backend; None: that of the process."""


def _processors(model: torch.nn.Module) -> Iterator[Any]:
    """Yield the attention processors that can be told a backend."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention, MochiAttention

    for module in model.modules():
        if isinstance(module, Attention | MochiAttention | AttentionModuleMixin):
            processor = module.processor
            if processor is not None and hasattr(processor, NAME):
                yield processor


def find_backend(who: str, name: Any) -> Any:
    """Return diffusers' entry of a backend whose package is there; None for None.

    Raises:
        TypeError: `name` is no string. ValueError: diffusers does not have it.
        ImportError: its package is missing, or too old; the error says how to get it.
        RuntimeError: its kernel cannot be downloaded.
    """
    who = f"{who}: attention_backend"
    name = backend_name(who, getattr(name, "value", name))
    if name is None:
        return None
    from diffusers.models import attention_dispatch as dispatch

    known = {backend.value: backend for backend in dispatch.AttentionBackendName}
    if name not in known:
        names = ", ".join(sorted({*known, *(a for a, of in ALIASES.items() if of in known)}))
        raise ValueError(f"{who} must be one of {names}, got {shown(name)}")
    backend = known[name]
    try:
        dispatch._check_attention_backend_requirements(backend)
    except RuntimeError as error:
        raise ImportError(
            f"{who} must be a backend whose package is installed, got {name!r}: {error} "
            f"To get it: {how_to_install(name)}"
        ) from error
    try:
        dispatch._maybe_download_kernel_for_backend(backend)
    except Exception as error:
        raise RuntimeError(
            f"{who}: the kernel of {name!r} must be at hand or downloadable, got "
            f"{type(error).__name__}: {shown(str(error))}; choose another backend"
        ) from error
    return backend


class ModelAttention:
    """A backend for all attention of one model; nothing is changed until `install`.

    Args:
        model: the transformer.
        backend: what `find_backend` gave.

    Raises:
        ValueError: the model has no attention that can be told a backend.
    """

    def __init__(self, model: torch.nn.Module, backend: Any) -> None:
        self.model = model
        self.backend = backend
        self._before: list[tuple[Any, Any]] = []
        if next(_processors(model), None) is None:
            raise ValueError(
                f"attention_backend must be left out for {type(model).__name__}, got "
                f"{backend.value!r}: its attention calls PyTorch's function and takes no backend"
            )

    @classmethod
    def of(cls, model: torch.nn.Module, backend: Any) -> ModelAttention | None:
        """Return the backend for one model; None for None."""
        return None if backend is None else cls(model, backend)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelAttention) and self.backend is other.backend

    __hash__ = None  # type: ignore[assignment]

    def install(self) -> None:
        """Tell the processors; those of modules that came since, too."""
        known = {id(processor) for processor, _ in self._before}
        for processor in _processors(self.model):
            own = vars(processor)
            if id(processor) not in known:
                known.add(id(processor))
                self._before.append((processor, own.get(NAME, ABSENT)))
                own[NAME] = self.backend

    def remove(self) -> None:
        """Tell them what they were told before, unless others changed it in the meantime."""
        for processor, before in self._before:
            if vars(processor).get(NAME, ABSENT) is self.backend:
                put(vars(processor), NAME, before)
        self._before = []


class AttentionInForce:
    """The backend that a model has as long as its cache is on."""

    def __init__(self) -> None:
        self._now: ModelAttention | None = None

    def fit(self, new: ModelAttention | None) -> None:
        """Put `new` in the place of what there was."""
        if self._now is not None and self._now is not new:
            self._now.remove()
            self._now = None
        if new is not None:
            self._now = new
            new.install()


_SET: weakref.WeakKeyDictionary[torch.nn.Module, ModelAttention] = weakref.WeakKeyDictionary()
"""What `set_backend` has set."""


def set_backend(models: Sequence[torch.nn.Module], name: str | None) -> None:
    """Set the backend of each of `models`, all or none; None takes back what was set so."""
    backend = find_backend("set_attn_backend", name)
    new = [] if backend is None else [ModelAttention(model, backend) for model in models]
    for model in models:
        old = _SET.pop(model, None)
        if old is not None:
            old.remove()
    for attention in new:
        attention.install()
        _SET[attention.model] = attention
