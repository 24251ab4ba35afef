"""The change of a step, measured by one guidance branch and used by the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dbcache.config.cache import DBCacheConfig
from dbcache.config.policies import POLICIES
from dbcache.config.prune import DBPruneConfig
from dbcache.kernels.common.lane_state import Signal
from dbcache.kernels.common.sums import MAX_PARTIALS
from dbcache.kernels.decision.share_change import make_stamps, share_change
from dbcache.lanes.buffers import outside_inference_mode


class SharedChange:
    """The change that the guidance branches of one block stack share.

    With ``cfg_diff_compute_separate=False`` a branch takes over what another one measured on the
    step of the same number, on hidden states of the same shape. Else it measures itself, and that
    is what the next ones take over.

    While steps run eagerly the host knows who has measured, and the others do not measure at all.
    Where steps are recorded it need not know: DBPrune does not measure on a step that a limit
    decides, and only the device counts. Nor does it know whether EasyCache has a rate, without
    which a change says nothing. There every branch measures, and the device decides what of it
    holds, on eager steps in between as well.

    Args:
        config: of the stack.

    Attributes:
        is_on: there is anything to share.
        by_device: every branch measures, and the device takes the change that holds: steps may be
            recorded, or need a rate.
        latest: what was measured last: branch, step, shape and partial sums; None: nothing.
    """

    HOST = ("latest",)
    """What the host keeps of a request."""

    def __init__(self, config: DBCacheConfig) -> None:
        self.is_on = not config.cfg_diff_compute_separate
        self.by_rules = isinstance(config, DBPruneConfig)
        self.by_device = POLICIES[config.policy].signal == Signal.RATE
        self.latest: tuple[str | None, int, torch.Size, torch.Tensor] | None = None
        self._stamps: torch.Tensor | None = None
        self._kept: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._kinds: dict[torch.Size, int] = {}
        self._branches: dict[str | None, int] = {}

    @outside_inference_mode
    def prepare(self, device: torch.device) -> None:
        """Allocate the stamps ahead: replays of a capture would reset them.

        To be called when a lane is made.
        """
        if self.is_on and (self._stamps is None or self._stamps.device != device):
            self._stamps = make_stamps(device)

    def start_request(self) -> None:
        """Forget the last request."""
        self.latest = None
        if self._stamps is not None:
            self._stamps.fill_(-1)

    def __call__(
        self,
        branch: str | None,
        steps: Any,
        of: torch.Tensor,
        measure: Callable[[], torch.Tensor],
        *,
        is_recorded: bool,
    ) -> torch.Tensor:
        """Return the partial sums that decide a step of a branch.

        Args:
            branch: whose step it is.
            steps: those of its lane, before the decision.
            of: what is measured; the shape counts.
            measure: returns the partial sums of the branch's own change.
            is_recorded: what is enqueued now will serve other steps, too.
        """
        if not self.is_on:
            return measure()
        host_knows = not (self.by_device or is_recorded)
        if host_knows and self.latest is not None:
            whose, *others, partials = self.latest
            if whose != branch and others == [steps.step, of.shape]:
                return partials
        own = measure()
        self.prepare(own.device)
        assert self._stamps is not None
        number = self._branches.setdefault(branch, len(self._branches))
        kind, kept = self._kinds.setdefault(of.shape, len(self._kinds)), self._keeper(own)
        # writes another branch's sums over `own` if they hold for this step; also where the host
        # knows, as a graph that the user captures may hold the next branch
        share_change(own, kept, self._stamps, steps.state, number, kind, by_rules=self.by_rules)
        if host_knows:
            self.latest = (branch, steps.step, of.shape, own)
        return own

    @outside_inference_mode
    def _keeper(self, own: torch.Tensor) -> torch.Tensor:
        """Return a tensor like `own` (..., T, sums); one memory for all T, however many shapes."""
        rows = own.numel() // own.shape[-2]
        key = (rows, own.device)
        if key not in self._kept:
            self._kept[key] = own.new_empty(rows * MAX_PARTIALS)
        return self._kept[key][: own.numel()].view(own.shape)

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors on the device, the stamps first; later steps may add some.

        By the stamps, sums that were not there at a time are not looked at when it is gone back to.
        """
        return [] if self._stamps is None else [self._stamps, *self._kept.values()]
