"""Arguments of blocks and models, found by the names that the signature of their forward has."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

CONDITIONS = (
    "encoder_hidden_states",
    "encoder_hidden_states_t5",
    "cap_feats",
    "text_bth",
    "class_labels",
    "input_ids",
)
"""Parameters of a transformer's forward that tell guidance branches apart, by preference."""

TIMESTEPS = ("timestep", "timesteps", "t", "sigma")
"""Parameters of a transformer's forward that hold the time of the step, by preference."""


def unwrap(module: Any) -> Any:
    """Return the module that `torch.compile` or PEFT's `get_peft_model` wrapped, or both."""
    module = getattr(module, "_orig_mod", module)
    if hasattr(type(module), "get_base_model") and type(module).__module__.startswith("peft."):
        return unwrap(module.get_base_model())
    return module


def forward_of(block: torch.nn.Module) -> Callable[..., Any]:
    """Return a block's forward: that of the instance if it names its parameters, else its class's.

    Hooks put a wrapper there that takes anything; a patch puts a forward with names there.
    """
    block = unwrap(block)
    own = block.__dict__.get("forward")
    if own is not None:
        kinds = {parameter.kind for parameter in inspect.signature(own).parameters.values()}
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            return inspect.unwrap(own)
    return type(block).forward.__get__(block)


def parameter_names(block: torch.nn.Module) -> list[str]:
    """Return the names of the parameters of a block's forward, without `self`."""
    return list(inspect.signature(forward_of(block)).parameters)


@functools.cache
def names_of_class(cls: Any) -> list[str]:
    """Return the names of the parameters of a class's forward, without `self`."""
    return list(inspect.signature(cls.forward).parameters)[1:]


class Call(NamedTuple):
    """A call of a model's forward."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of the forward's parameters."""
        cls: Any = type(self.model)
        return names_of_class(cls)

    def get(self, name: str) -> Any:
        """Return an argument by name; None where it is not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        return dict(zip(self.names, self.args, strict=False)).get(name)


class ArgumentFinder:
    """Finds, in calls of a model, the argument that its forward has of several names.

    Args:
        module: the model.
        names: by preference.
    """

    def __init__(self, module: torch.nn.Module, names: tuple[str, ...]) -> None:
        known = list(inspect.signature(type(module).forward).parameters)[1:]
        self.name = next((name for name in names if name in known), "")
        self.place = known.index(self.name) if self.name else sys.maxsize

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the argument, the first one of a list; None where there is none."""
        value = kwargs.get(self.name)
        if value is None and self.place < len(args):
            value = args[self.place]
        while isinstance(value, list | tuple) and value:
            value = value[0]
        return value
