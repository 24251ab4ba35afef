"""Lanes for a summary: made of plain data, and the guidance branches of a stack in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from dbcache.results.lane import LaneSummary


def lanes_from(entries: Sequence[Mapping[str, Any]]) -> list[LaneSummary]:
    """Return the lanes of which `LaneSummary.to_dict` or its JSON was made."""
    names = {one.name for one in fields(LaneSummary)} - {"other"}
    lanes = []
    for entry in entries:
        own = {name: value for name, value in entry.items() if name in names}
        diffs = {int(step): math.nan if x is None else x for step, x in own["diffs"].items()}
        lanes.append(LaneSummary(**own | {"diffs": diffs}))
    return paired(lanes)


def paired(lanes: Sequence[LaneSummary]) -> list[LaneSummary]:
    """Return the lanes, where the first branch of each stack knows the second one."""
    stacks: dict[tuple[str, ...], list[LaneSummary]] = {}
    for lane in lanes:
        _, bracket, row = (lane.branch or "").partition("[")  # "cond[1]": of the second sample
        stacks.setdefault((lane.owner, lane.stack, bracket, row), []).append(lane)
    others = {}
    for branches in stacks.values():
        named = (lane for lane in branches if (lane.branch or "").partition("[")[0] == "cond")
        first = next(named, branches[0])
        others[id(first)] = next((lane for lane in branches if lane is not first), None)
    return [replace(lane, other=others.get(id(lane))) for lane in lanes]
