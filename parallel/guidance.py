"""Guidance over ranks: one runs the conditional calls of the transformer, one the unconditional.

    step 0:     both ranks run both calls, and see that there are two, and what they return
    later:      rank 0 runs the first and rank 1 the second; after the second both have both

The pipeline gets the output of a call that another rank runs before that rank has finished it: as a
tensor that is filled when the second call of the step returns. So a pipeline must do nothing with
the first output before the second call but take views of it, which is what those in `PIPELINES` do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dbcache.parallel.mesh import Axis, all_gather_single

PIPELINES = (
    "CogView4Pipeline",
    "FluxPipeline",
    "HunyuanVideoPipeline",
    "QwenImagePipeline",
    "WanPipeline",
)
"""Pipelines that call the transformer twice per step, under names, and combine afterwards."""


class GuidanceSplit:
    """The calls of one transformer, shared among the two ranks of the `cfg` axis.

    Args:
        axis: the two ranks.
        who: the model's name, for errors.
    """

    def __init__(self, axis: Axis, who: str) -> None:
        self.axis = axis
        self.who = who
        self.start_request()

    def start_request(self) -> None:
        """Forget the last request: the next step shows whether there is guidance."""
        self._order: list[str] = []
        self._is_off = False
        self._next = 0
        self._first: Any = None
        self._form: Any = None

    def __call__(self, branch: str | None, run: Callable[[], Any]) -> Any:
        """Return the output of a call of the transformer, which may be filled later.

        Args:
            branch: the pipeline's name of the call.
            run: runs it.

        Raises:
            RuntimeError: the calls have no names, or do not alternate as in the first step.
        """
        if branch is None:
            raise RuntimeError(
                f"{self.who}: cfg_size=2 needs a pipeline that names its calls by cache_context, "
                f"got a call without a name; leave out cfg_size"
            )
        if self._is_off:
            return run()
        if len(self._order) < 2:
            return self._look_on(branch, run)
        if branch != self._order[self._next]:
            raise RuntimeError(
                f"{self.who}: with cfg_size=2 the calls must alternate as in the first step, "
                f"{' and '.join(self._order)}, got {branch} in place of {self._order[self._next]}; "
                f"leave out cfg_size where guidance is switched off during a request"
            )
        self._next = 1 - self._next
        if self._next == 1:
            self._first = run() if self.axis.rank == 0 else self._to_be_filled()
            return self._first
        return self._second(run)

    def _look_on(self, branch: str, run: Callable[[], Any]) -> Any:
        """Run a call of the first step on both ranks."""
        if branch in self._order:
            self._is_off = True  # no guidance: one call per step
            return run()
        output = run()
        if not self._order:
            leaves, structure = pytree.tree_flatten(output)
            self._form = ([(x.shape, x.dtype, x.device) for x in leaves], structure)
        self._order.append(branch)
        return output

    def _to_be_filled(self) -> Any:
        """Return an output like that of the first step, NaN until the other rank's arrives."""
        leaves, structure = self._form
        empty = [
            torch.full(shape, torch.nan, dtype=dtype, device=device)
            for shape, dtype, device in leaves
        ]
        return pytree.tree_unflatten(empty, structure)

    def _second(self, run: Callable[[], Any]) -> Any:
        """Run the second call on one rank; then both ranks have both outputs."""
        own = run() if self.axis.rank == 1 else self._first
        leaves, structure = pytree.tree_flatten(own)
        both = [x.new_empty((2, *x.shape)) for x in leaves]
        for out, x in zip(both, leaves, strict=True):
            all_gather_single(out.flatten(0, 1), x.detach().contiguous(), self.axis.group)
        if self.axis.rank == 0:
            return pytree.tree_unflatten([out[1] for out in both], structure)
        for target, out in zip(pytree.tree_leaves(self._first), both, strict=True):
            target.copy_(out[0])
        return own
