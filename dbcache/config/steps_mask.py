"""Which steps of a request are always full: `steps_mask`, as counts or by the name of a policy.

The named masks are cache-dit's at every step count that it accepts, so that settings move over;
that project took the idea of non-uniform steps from LeMiCa and EasyCache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, zip_longest
from typing import Any

from dbcache.config.options import check_choice, check_int, shown

MASKS = ("slow", "medium", "fast", "ultra")
"""From few cached steps to many."""

_BASE_STEPS = 28
_BASE = {
    "slow": (8, 1, 3, 2, 3, 2, 2, 2, 1, 3, 1),
    "medium": (6, 1, 2, 3, 2, 3, 2, 3, 2, 3, 1),
    "fast": (6, 1, 1, 3, 1, 4, 1, 5, 1, 4, 1),
    "ultra": (4, 2, 1, 5, 1, 6, 1, 7, 1),
}
"""Lengths of the runs of full steps and of cached ones, in turn."""

_UP_TO_15 = {
    "slow": (4, 1, 2, 1, 2, 1, 2, 1, 1),
    "medium": (4, 1, 2, 1, 1, 2, 1, 2, 1),
    "fast": (3, 1, 1, 2, 1, 2, 1, 3, 1),
    "ultra": (2, 1, 1, 2, 1, 3, 1, 3, 1),
}
_FEW = {
    steps: dict.fromkeys(MASKS, mask)
    for steps, mask in enumerate(("1", "11", "111", "1101", "11101", "111001", "1110101"), 1)
} | {
    8: {"slow": "11111011", "medium": "11110101", "fast": "11101001", "ultra": "11001001"},
    9: {"slow": "111110111", "medium": "111110101", "fast": "111101001", "ultra": "111001001"},
}
"""Masks of short requests."""


def steps_mask(
    compute_bins: Sequence[int] | None = None,
    cache_bins: Sequence[int] | None = None,
    total_steps: int | None = None,
    mask_policy: str = "medium",
) -> list[int]:
    """Return one entry per step: 1 full, 0 cached, for `DBCacheConfig.steps_computation_mask`.

    Args:
        compute_bins: lengths of the runs of full steps; with `cache_bins`, instead of a policy.
        cache_bins: lengths of the runs of cached steps that follow them; as many, or one fewer.
        total_steps: length of the mask. A policy needs it; bins are cut off there.
        mask_policy: "slow", "medium", "fast" or "ultra". The first and the last step are full,
            and up to 3 steps all are.

    Raises:
        TypeError: a length that is no integer.
        ValueError: only one kind of bins, bins that do not alternate or do not reach
            `total_steps`, an unknown policy, or a policy without `total_steps`.
    """
    if total_steps is not None:
        check_int("steps_mask: total_steps", total_steps, 1)
    if compute_bins is not None or cache_bins is not None:
        return _from_bins(compute_bins, cache_bins, total_steps)
    check_choice("steps_mask: mask_policy", mask_policy, MASKS)
    if total_steps is None:
        raise ValueError(
            f"steps_mask: total_steps must be given with mask_policy={mask_policy!r}, got None"
        )
    if total_steps in _FEW:
        return [int(entry) for entry in _FEW[total_steps][mask_policy]]
    return _fitted((_UP_TO_15 if total_steps < 16 else _BASE)[mask_policy], total_steps)


def check_mask(who: str, mask: Any, steps: int | None = None, static: bool = False) -> Any:
    """Return `mask` as a list of 0 and 1; the name of a policy, or None, as it is.

    Raises:
        TypeError: it is neither. ValueError: it is empty, has other values, another length
            than `steps`, or would cache the first step without anything to take it from
            (`static`); an unknown name.
    """
    if mask is None:
        return None
    if isinstance(mask, str):
        return check_choice(f"{who}: a policy's name", mask, MASKS)
    if not isinstance(mask, Iterable):
        raise TypeError(f"{who} must be a list or a name, got {shown(mask)}")
    entries = list(mask)
    if not entries or any(entry not in (0, 1) for entry in entries):
        raise ValueError(f"{who} must hold only 0 and 1, got {shown(entries)}")
    values = [int(entry) for entry in entries]
    if steps is not None and len(values) != steps:
        raise ValueError(
            f"{who} must have one entry per step, got {len(values)} for {steps} steps; make it as "
            f"long as the steps that the transformer runs"
        )
    if static and values[0] == 0:
        raise ValueError(
            f"{who} must begin with 1 under the static policy, got 0: nothing is cached yet at "
            f"the first step"
        )
    return values


def _from_bins(computed: Any, cached: Any, steps: int | None) -> list[int]:
    for name, bins in (("compute_bins", computed), ("cache_bins", cached)):
        if bins is None:
            raise ValueError(
                f"steps_mask: compute_bins and cache_bins must be given together, got no {name}; "
                f"leave out both for a mask_policy"
            )
        for length in bins:
            check_int(f"steps_mask: each of {name}", length, 1)
    if not computed or len(computed) - len(cached) not in (0, 1):
        raise ValueError(
            f"steps_mask: compute_bins and cache_bins must alternate, full steps first (as many of "
            f"both, or one more of compute_bins), got {list(computed)} and {list(cached)}"
        )
    pairs = zip_longest(computed, cached, fillvalue=0)
    mask = _alternate([length for pair in pairs for length in pair])
    if steps is not None and len(mask) < steps:
        raise ValueError(
            f"steps_mask: the bins must add up to total_steps or more, got {len(mask)} for "
            f"{steps} steps; add bins or make them longer"
        )
    return mask[:steps]


def _alternate(runs: Sequence[int]) -> list[int]:
    """Return runs of ones and zeros, a run of ones first."""
    return [1 - i % 2 for i, length in enumerate(runs) for _ in range(length)]


def _fitted(base: Sequence[int], steps: int) -> list[int]:
    """Return runs made as long as `steps`, with a full step at the end.

    Each in turn grows by half of what is proportional to `steps`, the last one by one step, until
    they reach `steps`. What is too much goes in turn from the last run of zeros and of ones.
    """
    runs = list(base)
    share = steps / (2 * _BASE_STEPS)  # in floats as there, down to where they round
    turns = cycle(range(len(base)))
    while sum(runs) < steps:
        i = next(turns)
        runs[i] += 1 if i == len(base) - 1 else max(int(base[i] * share), 1)
    mask = _alternate(runs)
    for turn in range(len(mask) - steps):
        del mask[len(mask) - 1 - mask[::-1].index(turn % 2)]
    mask[-1] = 1
    return mask
