"""A summary as one HTML page: no script, no file or address beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape

from dbcache.results.drawing import COLOURS, OTHER, timelines
from dbcache.results.lane import LaneSummary
from dbcache.results.markup import table
from dbcache.results.replay import estimates
from dbcache.results.summary import Summary

STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.5 system-ui, sans-serif; color: #24282e; background: #fff; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.lead { color: #59616c; margin-top: .2rem; }
table { border-collapse: collapse; margin: .5rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #dde1e6; text-align: left;
  vertical-align: top; white-space: nowrap; }
td:last-child, td:first-child, th:first-child { white-space: normal; overflow-wrap: anywhere; }
th { font-weight: 600; background: #f4f6f8; }
svg { max-width: 100%; height: auto; display: block; }
pre { background: #f4f6f8; padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; }
.warning { background: #fff6e5; border-left: 4px solid #d89c3a; padding: .5rem .8rem;
  margin: .4rem 0; }
.key span { display: inline-block; margin-right: 1rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; }
.note { color: #59616c; font-size: .9rem; }
"""


def page(summary: Summary) -> str:
    """Return the page."""
    name = summary.name or "request"
    cached = f"{summary.cached_fraction:.0%} of the steps cached" if summary.lanes else "no step"
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="lead">dbcache: {escape(cached)} in the last request</p>',
        *(f'<p class="warning">{escape(warning)}</p>' for warning in summary.warnings),
    ]
    if summary.lanes:
        parts += [
            "<h2>Timeline</h2>",
            timelines(summary.lanes),
            _key(summary.lanes),
            "<h2>Lanes</h2>",
            table(*_lanes(summary.lanes)),
            "<h2>Other thresholds</h2>",
            _estimates(summary.lanes),
            "<h2>Time</h2>",
            _times(summary),
        ]
    parts += ["<h2>Memory and totals</h2>", table(*_totals(summary))]
    if summary.config:
        code = f"import dbcache\n\n{summary.config}\n"
        parts += ["<h2>Settings to copy</h2>", f"<pre>{escape(code)}</pre>"]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>dbcache: '
        f"{escape(name)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _key(lanes: Sequence[LaneSummary]) -> str:
    reasons = dict.fromkeys(reason for lane in lanes for reason in lane.reasons)
    entries = [
        f'<span><i style="background:{COLOURS.get(reason, OTHER)}"></i>{escape(reason)}</span>'
        for reason in reasons
    ]
    return (
        f'<p class="key">{"".join(entries)}</p><p class="note">Bars: the change that was compared '
        f"with the threshold. Strip below: filled is a full step, hollow a cached one; where "
        f"single blocks are left out it is filled as far as blocks ran.</p>"
    )


def _lanes(lanes: Sequence[LaneSummary]) -> tuple[list[str], list[list[str]]]:
    head = ["lane", "policy", "steps", "cached", "threshold", "MB", "why (steps)"]
    rows = []
    for lane in lanes:
        cached = str(len(lane.cached_steps))
        if lane.pruned is not None:
            cached += f", {lane.pruned_ratio:.0%} of the blocks left out"
        row = [lane.name, lane.policy, str(lane.steps), cached]
        rows.append([*row, f"{lane.threshold:g}", f"{lane.megabytes:.3g}", lane.why])
    return head, rows


def _estimates(lanes: Sequence[LaneSummary]) -> str:
    parts = []
    for lane in lanes:
        found = estimates(lane)
        if found:
            head = [f"{lane.name}: threshold", *(f"{threshold:g}" for threshold, _ in found)]
            parts.append(table(head, [["steps cached (estimate)", *(str(n) for _, n in found)]]))
    if not parts:
        single = any(lane.pruned is not None for lane in lanes)
        why = "Blocks are left out one by one" if single else "No change was compared"
        return f'<p class="note">{why}: there is nothing to replay.</p>'
    return "".join(parts) + (
        '<p class="note">An estimate: replayed from the changes of this request. Steps that are '
        "cached otherwise would change what later ones are compared with.</p>"
    )


def costs(lane: LaneSummary) -> tuple[float, float] | None:
    """Return the median seconds of a full and of a cached step, None where one is not known."""
    pairs = [pair for pair in enumerate(lane.seconds) if math.isfinite(pair[1])]
    cached = set(lane.cached_steps)
    full = [seconds for step, seconds in pairs if step not in cached and step > 0]
    hit = [seconds for step, seconds in pairs if step in cached]
    if not full or not hit:
        return None
    return statistics.median(full), statistics.median(hit)


def bound(fraction: float, cost: float) -> float:
    """Return the largest speed-up with a fraction of cached steps of that cost; 1 is a full one."""
    return 1 / (1 - fraction + fraction * cost)


def _times(summary: Summary) -> str:
    head = ["lane", "full step", "cached step", "cost of a cached step", "bound of the speed-up"]
    rows = []
    for lane in summary.lanes:
        fraction = len(lane.cached_steps) / lane.steps
        measured, blocks = costs(lane), lane.always / max(lane.blocks, 1)
        if measured is not None:
            full, hit = measured
            cost, how = hit / full, "measured"
            shown = [f"{1e3 * full:.3g} ms", f"{1e3 * hit:.3g} ms"]
        else:
            cost, how, shown = blocks, "by blocks, not measured", ["-", "-"]
            if lane.pruned is not None:
                fraction, cost = lane.pruned_ratio, 0.0
        limit = f"{bound(fraction, cost):.2f}x"
        rows.append([lane.name, *shown, f"{cost:.2f} ({how})", limit])
    call = ""
    if summary.seconds is not None:
        call = f"The whole call of the pipeline took {summary.seconds:.3g} s on the host. "
    if not any(lane.seconds for lane in summary.lanes):
        call += "Run the request inside of `with dbcache.profile():` to have its steps measured. "
    return table(head, rows) + (
        f'<p class="note">{escape(call)}The bound is 1 / (1 - f + f c): f is the share of cached '
        f"steps and c the cost of one over a full one (medians, without the first step), of the "
        f"transformer alone.</p>"
    )


def _totals(summary: Summary) -> tuple[list[str], list[list[str]]]:
    names = ("requests", "requests_without_cached_steps", "steps", "cached_steps")
    rows = [["buffers", f"{summary.nbytes:,} bytes"]]
    rows += [
        [f"all {name.replace('_', ' ')}", str(summary.totals[name])]
        for name in names
        if name in summary.totals
    ]
    return ["", ""], rows
