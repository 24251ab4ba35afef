"""Models that `torch.compile` compiled as a whole: while the cache is on, their blocks are instead.

A graph of the whole forward would hold one of the ways that a step may go, full or cached. So the
compiled call is put aside, and each block is compiled with the options that the user gave. Where
the model is compiled once the cache is on, its first call finds out from which compiled call it
comes.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from dbcache.adapters.patching.hook_chain import innermost
from dbcache.adapters.patching.instance_method import InstanceMethod
from dbcache.adapters.patching.transaction import ABSENT, put

COMPILED = "_compiled_call_impl"
"""Name of the attribute in which `nn.Module.compile` keeps the compiled call."""

INSTEAD = (
    "compile its blocks, as in dbcache.compile(pipe) or "
    "transformer.compile_repeated_blocks(fullgraph=True), or call dbcache.disable first"
)

_LOGGER = logging.getLogger("dbcache")


class _Plain:
    """Stands for a compiled forward of a whole model: calls the model."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class WholeCompile:
    """What `torch.compile` made of a whole model, put aside for its blocks.

    Args:
        module: the model.
        lists: returns its lists of blocks.
    """

    def __init__(self, module: torch.nn.Module, lists: Callable[[], Iterable[Any]]) -> None:
        self.module = module
        self.context: Any = None
        self._lists = lists
        self._lock = threading.RLock()
        self._aside: dict[tuple[int, str], tuple[dict[str, Any], Any, Any]] = {}
        self._blocks: list[tuple[torch.nn.Module, Any]] = []

    def check(self, wrappers: Sequence[Any]) -> None:
        """Raise if the model is compiled as one graph.

        Args:
            wrappers: `OptimizedModule`s, of this model or of others.

        Raises:
            ValueError: a compiled call of it has ``fullgraph=True``.
        """
        found = [compiled for _, _, compiled in self._found(wrappers)]
        for compiled in (*found, self._own_forward()):
            if getattr(_context_of(compiled), "fullgraph", False):
                raise ValueError(
                    f"dbcache.enable: {type(self.module).__name__} must not be compiled as one "
                    f"graph, since each step decides which blocks run, got torch.compile with "
                    f"fullgraph=True; {INSTEAD}"
                )

    def move(self, wrappers: Sequence[Any] = (), context: Any = None) -> None:
        """Put aside what is compiled as a whole, and compile the blocks, but those that are.

        Doing this twice is the same as once; blocks that have come since are compiled, too.

        Args:
            wrappers: `OptimizedModule`s, of this model or of others.
            context: options of compiled code that calls the model.
        """
        with self._lock:
            for own, name, compiled in list(self._found(wrappers)):
                found = _context_of(compiled)
                self._put_aside(own, name, compiled)
                if found is None:
                    _warn(self.module)
                context = context or found
            context = context or _context_of(self._own_forward())
            if context is not None and context is not self.context:
                self._clear_blocks()
                self.context = context
            if self.context is not None:
                self._compile()

    def follow_caller(self) -> None:
        """Do the same for the compiled call that the running code comes from."""
        context, wrappers = _caller(self.module)
        self.move(wrappers, context)

    def undo(self) -> None:
        """Let the model be compiled as it was, and its blocks not."""
        with self._lock:
            self._clear_blocks()
            for own, theirs, ours in self._aside.values():
                name = "forward" if isinstance(ours, _Plain) else COMPILED
                if own.get(name, ABSENT) is ours:
                    put(own, name, theirs)
            self._aside.clear()
            self.context = None

    def _found(self, wrappers: Sequence[Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """Yield (attributes, name, compiled call) of what runs the model compiled as a whole."""
        own = self.module.__dict__
        if own.get(COMPILED) is not None:
            yield own, COMPILED, own[COMPILED]
        for wrapper in wrappers:
            own = wrapper.__dict__
            if wrapper._orig_mod is self.module and not isinstance(own.get("forward"), _Plain):
                yield own, "forward", own["forward"]

    def _own_forward(self) -> Any:
        """Return the model's forward beneath all hooks, which users may have compiled."""
        found = innermost(self.module.__dict__, "forward").get()
        return found.original if isinstance(found, InstanceMethod) else found

    def _put_aside(self, own: dict[str, Any], name: str, compiled: Any) -> None:
        ours = _Plain(self.module) if name == "forward" else ABSENT
        self._aside[id(own), name] = own, compiled, ours
        put(own, name, ours)

    def _compile(self) -> None:
        before = len(self._blocks)
        for block in regions(self.module, self._lists()):
            if is_plain(block):
                compiled = self.context(block._call_impl)
                self._blocks.append((block, compiled))
                block.__dict__[COMPILED] = compiled
        if not before and self._blocks:
            _LOGGER.info(
                "%s was compiled as a whole: while the cache is on its blocks are compiled "
                "instead, with the same options",
                type(self.module).__name__,
            )

    def _clear_blocks(self) -> None:
        for block, compiled in self._blocks:
            if block.__dict__.get(COMPILED) is compiled:
                del block.__dict__[COMPILED]
        self._blocks.clear()


def wrappers_in(parts: Iterable[object]) -> list[Any]:
    """Return those of `parts` that `torch.compile` made of modules."""
    kind = _dynamo("OptimizedModule")
    return [] if kind is None else [part for part in parts if isinstance(part, kind)]


def regions(module: torch.nn.Module, lists: Iterable[Any]) -> Iterator[torch.nn.Module]:
    """Yield what is worth a graph of its own: the blocks of `lists`, then what else repeats.

    Args:
        module: the model. diffusers' models say of which classes they repeat modules; those count
            that hold none of the lists, since what runs in place of their blocks is no graph.
        lists: `BlockList`s.
    """
    owners = set()
    for block_list in lists:
        owners.add(id(block_list.owner))
        yield from block_list.blocks
    names = set(getattr(module, "_repeated_blocks", None) or ())
    waiting = list(module.children()) if names else []
    while waiting:
        part = waiting.pop()
        if type(part).__name__ in names and not owners & {id(m) for m in part.modules()}:
            yield part
        else:
            waiting += part.children()


def is_plain(block: torch.nn.Module) -> bool:
    """Whether a block is not compiled."""
    return block.__dict__.get(COMPILED) is None and not wrappers_in([block])


def uncompiled(forward: Any) -> Any:
    """Return what `torch.compile` made a forward from; itself where it made none."""
    return forward if _context_of(forward) is None else forward._torchdynamo_orig_callable


def _dynamo(name: str) -> Any:
    """Return a class of Dynamo; None as long as nothing was compiled, and it is not loaded."""
    return getattr(sys.modules.get("torch._dynamo.eval_frame"), name, None)


def _context_of(compiled: Any) -> Any:
    """Return what holds the options of a compiled function; None where that is not to be found."""
    kind = _dynamo("OptimizeContext")
    for cell in getattr(compiled, "__closure__", None) or ():
        if kind is not None and isinstance(cell.cell_contents, kind):
            return cell.cell_contents
    return None


def _caller(module: torch.nn.Module) -> tuple[Any, list[Any]]:
    """Return the options of the compiled call that the running code is in, and its wrappers."""
    file, kind = _dynamo("__file__"), _dynamo("OptimizeContext")
    context, wrappers = None, []
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == file:
            own = frame.f_locals.get("self")
            if context is None and isinstance(own, kind):
                context = own
            wrappers += wrappers_in([own])
        frame = frame.f_back
    return context, [wrapper for wrapper in wrappers if wrapper._orig_mod is module]


def _warn(module: torch.nn.Module) -> None:
    text = (
        f"{type(module).__name__}: what torch.compile made of it as a whole is not used while the "
        f"cache is on, and its options could not be read; {INSTEAD.split(', or')[0]}"
    )
    _LOGGER.warning(text)
    warnings.warn(text, stacklevel=5)
