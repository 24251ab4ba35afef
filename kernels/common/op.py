"""How an op is registered: reference, launch of the kernel, and support for tracing."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import wraps
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dbcache.kernels.common.select import is_traced, select

Function = Callable[..., Any]


def op(
    reference: Function, *, like: str, mutates: Sequence[str] = (), fake: Function | None = None
) -> Callable[[Function], Function]:
    """Register the decorated launch of a Triton kernel as ``torch.ops.dbcache.<its name>``.

    The launch has the arguments of the reference, whose annotations make the schema. The registered
    op takes `impl` last, and for a state, a dataclass of tensors, the tensors that it is made of.

    Args:
        reference: plain PyTorch, the meaning of the op.
        like: the tensor whose device and type decide where the op runs; ``"state.tensor"`` for
            one of a state. Of a list of tensors, the first.
        mutates: names of the tensors that are written.
        fake: result of the registered op for fake tensors; None for ops without a result.

    Returns:
        ``call(impl, *args)``, with `impl` as in `select`. Plain tensors skip the registered op.

    Raises:
        TypeError: the arguments of the launch are not those of the reference.
    """
    kinds = {n: p.annotation for n, p in inspect.signature(reference).parameters.items()}
    tensors = [_tensors_of(kind) for kind in kinds.values()]  # not once more: slow, untraceable
    argument, _, attribute = like.partition(".")
    place = list(kinds).index(argument)

    def tensor_of(args: Sequence[Any]) -> Tensor:
        given = getattr(args[place], attribute) if attribute else args[place]
        return given[0] if isinstance(given, list) else given

    def register(launch: Function) -> Function:
        def execute(impl: str, x: Tensor, args: Sequence[Any]) -> Any:
            if select(impl, x) == "reference":
                return reference(*args)
            with torch.cuda.device_of(x):
                return launch(*args)

        def run(*flat: Any) -> Any:
            rest, args = iter(flat), []
            for kind, its in zip(kinds.values(), tensors, strict=True):
                args.append(kind(*islice(rest, len(its))) if its else next(rest))
            return execute(next(rest), tensor_of(args), args)

        registered = _registered(launch, run, reference, mutates, fake)

        @wraps(launch)
        def call(impl: str, *args: Any) -> Any:
            x = tensor_of(args)
            if not is_traced(x):
                return execute(impl, x, args)
            flat: list[Any] = []
            for its, arg in zip(tensors, args, strict=True):
                flat += [getattr(arg, name) for name in its] or [arg]
            with torch.no_grad():
                return registered(*flat, impl)

        return call

    return register


def _tensors_of(kind: Any) -> dict[str, Any]:
    """Return the kinds of a state's tensors, by name; none of another argument."""
    return {x.name: x.type for x in fields(kind) if x.init} if is_dataclass(kind) else {}


def _registered(
    launch: Function, run: Function, reference: Function, mutates: Sequence[str], fake: Any
) -> Function:
    """Register `run` under the name of `launch`, with tensors in place of states, and `impl`."""
    signature = inspect.signature(reference)
    if list(inspect.signature(launch).parameters) != list(signature.parameters):
        must = f"{launch.__name__}: the arguments must be those of the reference"
        raise TypeError(f"{must}, {', '.join(signature.parameters)}")
    flat: dict[str, Any] = {}
    for argument, parameter in signature.parameters.items():
        flat |= _tensors_of(parameter.annotation) or {argument: parameter.annotation}
    flat["impl"] = str
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, either, annotation=kind) for n, kind in flat.items()]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    name = f"dbcache::{launch.__name__.lstrip('_')}"
    registered = torch.library.custom_op(name, run, mutates_args=mutates)
    if fake is not None:
        registered.register_fake(fake)
    return registered
