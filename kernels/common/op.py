"""How an op is registered: reference, launch of the kernel, and support for tracing."""

import inspect
from collections.abc import Callable, Iterable, Sequence
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
    op takes `impl` last, and for a state (TENSORS, `tensors`, `from_tensors`) its tensors.

    Args:
        reference: plain PyTorch, the meaning of the op.
        like: the tensor whose device and type decide where the op runs; ``"state.tensor"`` for
            one of a state.
        mutates: names of the tensors that are written.
        fake: result of the registered op for fake tensors; None for ops without a result.

    Returns:
        ``call(impl, *args)``, with `impl` as in `select`. Plain tensors skip the registered op.

    Raises:
        TypeError: the arguments of the launch are not those of the reference.
    """
    kinds = {n: p.annotation for n, p in inspect.signature(reference).parameters.items()}
    states = [hasattr(kind, "TENSORS") for kind in kinds.values()]
    argument, _, attribute = like.partition(".")
    place = list(kinds).index(argument)

    def tensor_of(args: Sequence[Any]) -> Tensor:
        return getattr(args[place], attribute) if attribute else args[place]

    def register(launch: Function) -> Function:
        if list(inspect.signature(launch).parameters) != list(kinds):
            must = f"{launch.__name__}: the arguments must be those of the reference"
            raise TypeError(f"{must}, {', '.join(kinds)}")

        def execute(impl: str, x: Tensor, args: Sequence[Any]) -> Any:
            if select(impl, x) == "reference":
                return reference(*args)
            with torch.cuda.device_of(x):
                return launch(*args)

        def run(*flat: Any) -> Any:
            args = _with_states(kinds.values(), flat[:-1])
            return execute(flat[-1], tensor_of(args), args)

        registered = _registered(launch.__name__, run, reference, kinds, mutates, fake)

        @wraps(launch)
        def call(impl: str, *args: Any) -> Any:
            x = tensor_of(args)
            if not is_traced(x):
                return execute(impl, x, args)
            flat: list[Any] = []
            for arg, is_state in zip(args, states, strict=True):
                flat += arg.tensors() if is_state else (arg,)
            with torch.no_grad():
                return registered(*flat, impl)

        return call

    return register


def writing(reference: Function, *into: str) -> Function:
    """Return `reference` for an op that writes its results, to tensors that it takes first.

    Args:
        reference: returns as many tensors as there are names, None for one that is not written.
        *into: names of these tensors.
    """

    def write(*args: Any) -> None:
        for out, result in zip(args, reference(*args[len(into) :]), strict=False):
            if out is not None:
                out.copy_(result)

    signature, either = inspect.signature(reference), inspect.Parameter.POSITIONAL_OR_KEYWORD
    outputs = [inspect.Parameter(x, either, annotation=Tensor | None) for x in into]
    parameters = [*outputs, *signature.parameters.values()]
    write.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(default=inspect.Parameter.empty) for p in parameters], return_annotation=None
    )
    return write


def _registered(
    name: str,
    run: Function,
    reference: Function,
    kinds: dict[str, Any],
    mutates: Sequence[str],
    fake: Function | None,
) -> Function:
    """Register `run` with tensors in place of states, and `impl` last."""
    flat: dict[str, Any] = {}
    for argument, kind in kinds.items():
        is_state = hasattr(kind, "TENSORS")
        flat |= dict.fromkeys(kind.TENSORS, Tensor) if is_state else {argument: kind}
    flat["impl"] = str
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, either, annotation=kind) for n, kind in flat.items()]
    signature = inspect.signature(reference).replace(parameters=parameters)
    run.__signature__ = signature  # type: ignore[attr-defined]
    op_name = f"dbcache::{name.lstrip('_')}"
    registered = torch.library.custom_op(op_name, run, mutates_args=mutates)
    if fake is not None:
        registered.register_fake(fake)
    return registered


def _with_states(kinds: Iterable[Any], flat: Sequence[Any]) -> list[Any]:
    """Return the reference's arguments from those of the registered op."""
    rest, args = iter(flat), []
    for kind in kinds:
        is_state = hasattr(kind, "TENSORS")
        args.append(kind.from_tensors(*islice(rest, len(kind.TENSORS))) if is_state else next(rest))
    return args
