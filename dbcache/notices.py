"""What the user is told beside errors: as a Python warning, and in the log "dbcache".

`NOTHING` has the reasons why a request cached no step, each with what to do about it.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

LOGGER = logging.getLogger("dbcache")

INNER = frozenset(("dbcache", "torch", "diffusers", "accelerate", "contextlib", "functools"))
"""Packages through which the user's code comes here."""

HIDDEN = "l1_hidden_states_diff_threshold"
"""The option that, where it is given, holds the threshold in place of the other one."""

NOTHING = {
    "threshold": (
        "the cache never hit, the smallest change was {least:.3g} and the threshold is "
        "{threshold:g}",
        "raise {option} above {least:.3g} and look at the images, or run more steps",
    ),
    "guard": (
        "each step that the schedule caches changed more than guard={threshold:g} times what it "
        "changed in tuning, and ran in full",
        "raise guard and look at the images, or tune with calls like these",
    ),
    "limit": (
        "max_cached_steps or max_continuous_cached_steps is 0",
        "leave it out (-1 is no limit)",
    ),
    "not a number": (
        "no change was a number, so the cache never hit",
        "try another Fn_compute_blocks or policy, and look for NaN in the model",
    ),
    "nothing stored": (
        "no step found one stored before it that fits: shapes or inputs changed from step to step",
        "keep them alike, or tell branches of guidance apart by cache_context",
    ),
    "one step": ("one step has none before it to reuse", "run more steps"),
    "mask": (
        "all of them were fixed as full by steps_computation_mask",
        "give it a 0 where a step may be cached, or leave it out",
    ),
    "warm-up": (
        "all of them were fixed as full by warm-up",
        "set max_warmup_steps (and retention_ratio) below the {steps} steps, or leave it out and "
        "let a call of the pipeline, or num_inference_steps, tell the number: it then follows that",
    ),
}
"""Why nothing was cached, and the cure; the first one that holds of any lane is said first."""


def say(text: str, *, raises: bool = True) -> None:
    """Warn, at the line of the user's code that led here, and write `text` to the log.

    Args:
        text: what to say.
        raises: where the user's filters make an error of a warning. False: where something ends,
            which must not end halfway.
    """
    if LOGGER.hasHandlers():  # a log that nobody set up would show it twice
        LOGGER.warning("%s", text)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in INNER:
        frame, level = frame.f_back, level + 1
    with nullcontext() if raises else suppress(Warning):
        warnings.warn(text, stacklevel=level)


def _package(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def why_nothing(lane: Any) -> str | None:
    """Return the entry of `NOTHING` that holds of a lane's summary.

    None: it cached a step, has none, follows another lane, or was told to cache none by a
    threshold of 0.
    """
    counts = lane.counts
    if lane.cached_steps or not lane.steps or lane.follows or lane.threshold == 0:
        return None
    if lane.steps == 1:
        return "one step"
    if counts.get("above threshold"):
        return "guard" if lane.options.get("policy") == "guarded_schedule" else "threshold"
    if counts.get("count limit") or counts.get("consecutive limit"):
        return "limit"
    if counts.get("NaN diff"):
        return "not a number"
    if any(reason not in ("warm-up", "mask") for reason in lane.reasons[1:]):
        return "nothing stored"
    return "mask" if lane.reasons[-1] == "mask" else "warm-up"


def nothing_cached(who: str, lanes: Sequence[Any]) -> list[str]:
    """Return one text on lanes that cached nothing; none where another one did, or for none.

    Args:
        who: what the lanes belong to.
        lanes: their summaries.
    """
    kinds = {kind: [x for x in lanes if why_nothing(x) == kind] for kind in NOTHING}
    found = [kind for kind in NOTHING if kinds[kind]]
    if not found or any(lane.cached_steps for lane in lanes):
        return []
    steps = max(lane.steps for lane in lanes)
    counted = "1 step" if steps == 1 else f"{steps} steps"
    parts = []
    for kind in found:
        of_kind = kinds[kind]
        diffs = [diff for lane in of_kind for diff in lane.diffs.values() if abs(diff) < 1e38]
        values = {
            "steps": steps,
            "least": min(diffs, default=float("nan")),
            "threshold": max(lane.threshold for lane in of_kind),
            "option": HIDDEN if of_kind[0].options.get(HIDDEN) else "residual_diff_threshold",
        }
        why, cure = NOTHING[kind]
        parts.append(f"{why.format(**values)}; {cure.format(**values)}")
    return [f"{who}: nothing was cached in {counted}: {'. '.join(parts)}"]
