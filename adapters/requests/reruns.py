"""Forwards that autograd runs again in backward, as gradient checkpointing of a whole model does.

They act as they did the first time, full or cached, and count as no step. Which forward is meant
is known by the memory of the tensors that it was called with, which autograd keeps until then.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dbcache.adapters.blocks.views import run_seeing
from dbcache.adapters.stacks.gradients import followed
from dbcache.adapters.stacks.step import Step

UNKNOWN = (
    "{who}: a forward that runs again in backward must do what it did the first time, got one "
    "that dbcache does not know; call dbcache.disable to train, or checkpoint single blocks, with "
    "use_reentrant=False"
)


REENTRANT = (
    "{who}: gradient checkpointing of single blocks must not be reentrant where some are skipped, "
    "since backward would run blocks that forward left out, got use_reentrant=True; pass "
    "use_reentrant=False, as transformer.enable_gradient_checkpointing() does, or call "
    "dbcache.disable to train"
)


class StepAgain:
    """Stands for a step that was taken before."""

    awaits_end = False

    def __init__(self, step: Any) -> None:
        self.cached = step.cached
        self.stack = step.stack
        self.made = step.made
        self.run: Any = self
        self.source = self.probe = self.encoder_fn = None
        self.given: tuple[Any, Any] = None, None

    def begin(self, h_in: torch.Tensor) -> None:
        """Measure nothing."""

    def decide(self, *given: Any) -> None:
        """Keep what a prediction goes on from."""
        self.given = given

    def finish_full(self, *_: Any) -> None:
        """Store nothing."""

    def finish_cached(self) -> Any:
        """Return what was predicted."""
        hidden, encoder = self.given
        if self.stack.has_own_encoder:
            encoder = self.encoder_fn
        return followed(self, (hidden, encoder), self.made)


class ForwardAgain:
    """Stands for a forward that was run before."""

    cutter = members = None
    inputs: frozenset[str] = frozenset()

    def __init__(self, setup: Any, shown: Any, steps: list[Any]) -> None:
        self.setup, self.shown, self.rows = setup, shown, shown.rows
        self.steps: list[Any] = [StepAgain(step) for step in steps]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model with the decisions of then."""
        views, original = self.setup.views, self.setup.original
        return run_seeing(views, self, self.shown, lambda: original(*args, **kwargs))


class Reruns:
    """The forwards of one model that may be run again, for as long as their inputs live."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], list[tuple[list[Any], Any]]] = {}
        self._lock = threading.RLock()  # the collector may end a request at any time

    def keep(self, setup: Any, steps: list[Any], args: Any, kwargs: Any) -> None:
        """Keep what the steps of a forward did; None where steps of their kind cannot be.

        Raises:
            RuntimeError: backward would run blocks that the forward left out.
        """
        if torch.is_grad_enabled() and any(map(_hides_gradients, steps)):
            raise RuntimeError(REENTRANT.format(who=type(setup.module).__name__))
        fits = all(type(step) is Step and step.single_blocks is None for step in steps)
        forward = ForwardAgain(setup, setup.shown, steps) if fits else None
        tensors = _tensors(args, kwargs)
        alive = [StorageWeakRef(x.untyped_storage()) for x in tensors]
        self.clean()
        with self._lock:
            key = _key(tensors)
            self.known[key] = [*self.known.get(key, ()), (alive, forward)]

    def clean(self) -> None:
        """Forget the forwards whose inputs are gone, and what they predicted."""
        with self._lock:
            for key, entries in list(self.known.items()):
                entries[:] = [e for e in entries if not any(ref.expired() for ref in e[0])]
                if not entries:
                    self.known.pop(key, None)

    def run(self, who: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward again.

        Raises:
            RuntimeError: it is not known.
        """
        with self._lock:
            entries = self.known.get(_key(_tensors(args, kwargs)), [])
            forward = entries[-1][1] if entries else None
            entries[:] = entries[-1:] + entries[:-1]  # backward comes in reverse order
        if forward is None:
            raise RuntimeError(UNKNOWN.format(who=who))
        return forward.run(args, kwargs)


def _hides_gradients(step: Any) -> bool:
    return step.hides_gradients or getattr(step.single_blocks, "hides_gradients", False)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]


def _key(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    return tuple(x.data_ptr() for x in tensors)
