"""The lanes of the samples of a batch, with the verbs of one: one launch per verb for all of them.

A launch serves rows whose lanes are alike: the same settings of what is compared and stored, the
same dtypes, as many snapshots. Rows of other lanes make groups of their own. By itself goes what a
launch for all cannot do: the first full step of a lane, which allocates; a full step behind whose
probe the loop of the model adds to the hidden states (ControlNet); and lanes whose snapshots
lie in host memory.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from dbcache.kernels.by_row.commit_rows import commit_rows
from dbcache.kernels.by_row.decide_rows import decide_rows
from dbcache.kernels.by_row.predict_rows import predict_rows
from dbcache.kernels.by_row.table import Row, Rows
from dbcache.kernels.common.lane_state import PlanCode
from dbcache.kernels.common.select import is_traced
from dbcache.lanes.buffers import Layout, Streams
from dbcache.lanes.forms import widened
from dbcache.lanes.lane import Lane


class _Group(NamedTuple):
    """Rows whose lanes are alike.

    Attributes:
        first: one of the lanes.
        members: places of the rows in the batch.
        rows: for a launch for all of them; None: each goes by itself.
    """

    first: Any
    members: list[int]
    rows: Rows | None


class RowLanes:
    """The lanes of the samples of a batch, with the verbs of one: see `Lane`.

    Attributes:
        lanes: of each sample.
        cached: samples whose step is a cached one, in order; `full` has the others.
    """

    def __init__(self, lanes: list[Any]) -> None:
        self.lanes = lanes
        self.cached: list[int] = []
        self.full: list[int] = []
        self._groups: list[_Group] = []

    @property
    def history(self) -> Any:
        """What one of them stored, which tells the streams of all."""
        return self.lanes[(self.cached or self.full)[0]].history

    def decide_each(self, h_in: torch.Tensor, probe: torch.Tensor, layout: Layout) -> None:
        """Decide for each sample; the host reads once, and only where a decision is open."""
        of_row = tuple((1, *x[1:]) if isinstance(x, torch.Size) else x for x in layout)
        codes = [lane.begin(of_row, probe.device) for lane in self.lanes]
        known = [lane.steps.has_reference for lane in self.lanes]
        is_open = [x == PlanCode.DYNAMIC and y for x, y in zip(codes, known, strict=True)]
        self._groups = self._group(probe)
        decided = None
        for group in self._groups:
            alone = group.members
            if group.rows is not None:
                # the host decides that there is nothing to compare with, and not the device
                alone = [r for r in alone if codes[r] == PlanCode.DYNAMIC and not known[r]]
                measures = any(is_open[row] for row in group.members)
                decided = self._decide(group, alone, h_in, probe, measures)
            for row in alone:
                if is_open[row]:
                    self.lanes[row].measure_and_decide(_row(h_in, row), _row(probe, row))
                else:
                    self.lanes[row].decide(None)
        flags: list[Any] = [None] * len(codes)
        if any(is_open):
            if decided is None or len(self._groups) > 1:
                decided = torch.cat([lane.steps.flag() for lane in self.lanes])
            flags = decided.tolist()
        for row, (lane, code, flag) in enumerate(zip(self.lanes, codes, flags, strict=True)):
            (self.cached if lane.settle(code, bool(flag)) else self.full).append(row)

    def _group(self, probe: torch.Tensor) -> list[_Group]:
        """Return the rows by what a launch for several of them must share."""
        alone = len(self.lanes) == 1 or is_traced(probe)
        found: dict[Hashable, dict[int, Row | None]] = {}
        for index, lane in enumerate(self.lanes):
            if alone or type(lane) is not Lane:
                found[index] = {index: None}
                continue
            kept = lane.history
            row = Row(
                lane.state, kept.p_ref, kept.snapshots, kept.encoder_snapshots,
                kept.scales, kept.encoder_scales,
            )  # fmt: skip
            compared = (lane.compares, lane.by_residual, lane.by_token, lane.replaces)
            key = (row.form(), lane.forms.seen, compared)
            found.setdefault(key, {})[index] = row
        groups = []
        for members in found.values():
            first, rows = self.lanes[min(members)], None
            if None not in members.values():
                every = [members.get(index) for index in range(len(self.lanes))]
                rows = Rows(every, first.tables)
            groups.append(_Group(first, list(members), rows))
        return groups

    def _decide(
        self,
        group: _Group,
        without: list[int],
        h_in: torch.Tensor,
        probe: torch.Tensor,
        measures: bool,
    ) -> torch.Tensor | None:
        """Decide for a group in one launch, but for the rows in `without`; return the decisions."""
        first, _, rows = group
        assert rows is not None
        if without:
            if len(without) == len(group.members):
                return None
            every = [None if index in without else row for index, row in enumerate(rows.rows)]
            rows = Rows(every)
        dtype = first.forms.hidden if first.compares and measures else probe.dtype
        before = h_in.to(dtype) if first.by_residual else None
        return decide_rows(
            before, probe.to(dtype), rows, measures=measures, by_token=first.by_token and measures
        )

    def predict(self, h_fn: torch.Tensor, encoder_fn: torch.Tensor | None) -> Streams:
        """Return the outputs of the middle blocks; of samples that run in full, nothing yet."""
        first = self.lanes[self.cached[0]]
        hidden, encoder = first.forms.returned or (first.forms.hidden, first.forms.encoder)
        out, encoder_out = torch.empty(h_fn.shape, dtype=hidden, device=h_fn.device), None
        if first.history.encoder_snapshots is not None:
            shape = (len(h_fn), *first.history.encoder_snapshots.shape[2:])
            encoder_out = torch.empty(shape, dtype=encoder, device=h_fn.device)
        for group in self._groups:
            members = [row for row in group.members if row in self.cached]
            if members and not self._predict(group, members, h_fn, encoder_fn, out, encoder_out):
                for row in members:
                    given = _row(h_fn, row), _row(encoder_fn, row)
                    self.lanes[row].predict(*given, _row(out, row), _row(encoder_out, row))
        return out, encoder_out

    def _predict(
        self,
        group: _Group,
        members: list[int],
        h_fn: torch.Tensor,
        encoder_fn: torch.Tensor | None,
        out: torch.Tensor,
        encoder_out: torch.Tensor | None,
    ) -> bool:
        """Predict for the cached rows of a group in one launch; say whether that was possible."""
        first, _, rows = group
        forms = first.forms
        fits = out.dtype == forms.hidden
        if first.history.encoder_snapshots is None or encoder_fn is None or encoder_out is None:
            encoder_fn = encoder_out = None
        else:
            encoder_fn = widened(encoder_fn.to(forms.encoder), encoder_out.shape)
            fits &= encoder_out.dtype == forms.encoder and encoder_fn.shape == encoder_out.shape
        if rows is None or not fits:
            return False
        for row in members:
            lane = self.lanes[row]
            if lane.forecaster is not None:
                lane.forecaster.weigh(lane.state, lane.steps.step - 1)
        predict_rows(
            h_fn.to(forms.hidden), rows, out, encoder_fn, encoder_out, replace=first.replaces
        )
        return True

    def commit(
        self,
        h_in: torch.Tensor,
        h_fn: torch.Tensor,
        h_out: torch.Tensor,
        encoder_fn: torch.Tensor | None,
        encoder_out: torch.Tensor | None,
        probe: torch.Tensor | None = None,
    ) -> None:
        """Store what a full step did, of the samples that took one; see `Lane.commit`."""
        streams = h_in, h_fn, h_out, encoder_fn, encoder_out
        for group in self._groups:
            members = [row for row in group.members if row in self.full]
            if members and (probe is not None or not self._commit(group, members, *streams)):
                for row in members:
                    self.lanes[row].commit(*(_row(x, row) for x in (*streams, probe)))

    def _commit(
        self,
        group: _Group,
        members: list[int],
        h_in: torch.Tensor,
        h_fn: torch.Tensor,
        h_out: torch.Tensor,
        encoder_fn: torch.Tensor | None,
        encoder_out: torch.Tensor | None,
    ) -> bool:
        """Store for the full rows of a group in one launch; say whether that was possible."""
        first, _, rows = group
        forms = first.forms
        if encoder_fn is None or encoder_out is None:
            encoder_fn = encoder_out = None
        seen = h_out.dtype, None if encoder_out is None else encoder_out.dtype
        if rows is None or rows.first.ring is None or seen != forms.seen:
            return False
        dtype = forms.hidden
        before = h_in.to(dtype) if first.by_residual else None
        if encoder_fn is not None and encoder_out is not None:
            shape = (len(h_fn), *encoder_out.shape[1:])
            encoder_out = widened(encoder_out.to(forms.encoder), shape)
            encoder_fn = widened(encoder_fn.to(forms.encoder), shape)
        commit_rows(
            before, h_fn.to(dtype), h_out.to(dtype), rows, encoder_fn, encoder_out,
            replace=first.replaces,
        )  # fmt: skip
        for row in members:
            lane = self.lanes[row]
            if lane.forecaster is not None:
                stored = lane.history.snapshots, lane.history.encoder_snapshots
                lane.forecaster.learn(lane.state, stored, lane.steps.step - 1, lane.steps.is_first)
            lane.steps.has_reference = True
        return True

    def abort(self) -> None:
        """Undo a step after an exception: the step counts as never begun."""
        for lane in self.lanes:
            lane.abort()


def _row(x: torch.Tensor | None, row: int) -> Any:
    """Return a row of a stream; what is the same for all samples has one."""
    return x if x is None or len(x) == 1 else x[row : row + 1]
