"""Which steps of a request are always full: `steps_mask`, as counts or by the name of a policy.

The named masks are cache-dit's at every step count that it accepts, so that settings move over;
that project took the idea of non-uniform steps from LeMiCa and EasyCache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from dbcache.config.options import check_choice, check_int, shown

Bins = tuple[tuple[int, ...], tuple[int, ...]]
"""Lengths of the runs of full steps and, between them, of cached ones."""

MASKS = ("slow", "medium", "fast", "ultra")
"""From few cached steps to many."""

_BASE_STEPS = 28
_BASE: dict[str, Bins] = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
_UP_TO_15: dict[str, Bins] = {
    "slow": ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
    "medium": ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
    "fast": ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
    "ultra": ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
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
    computed, cached = (_UP_TO_15 if total_steps < 16 else _BASE)[mask_policy]
    mask = _alternate(*_shrunk(_grown((computed, cached), total_steps), total_steps))
    mask[-1] = 1
    return mask


def check_mask(mask: Sequence[int] | str, *, steps: int | None, static: bool) -> list[int] | str:
    """Return `mask` as a list of 0 and 1, or the name of a policy as it is.

    Raises:
        TypeError: it is neither. ValueError: it is empty, has other values, another length
            than `steps`, or would cache the first step without anything to take it from
            (`static`); an unknown name.
    """
    if isinstance(mask, str):
        check_choice("steps_computation_mask: a policy's name", mask, MASKS)
        return mask
    if not isinstance(mask, Iterable):
        raise TypeError(f"steps_computation_mask must be a list or a name, got {shown(mask)}")
    values = [int(entry) for entry in mask if entry in (0, 1)]
    if not values or len(values) < len(list(mask)):
        raise ValueError(f"steps_computation_mask must hold only 0 and 1, got {shown(mask)}")
    if steps is not None and len(values) != steps:
        raise ValueError(
            f"steps_computation_mask must have one entry per step, got {len(values)} for "
            f"{steps} steps; make it as long as the steps that the transformer runs"
        )
    if static and values[0] == 0:
        raise ValueError(
            "steps_computation_mask must begin with 1 under the static policy, got 0: nothing is "
            "cached yet at the first step"
        )
    return values


def _from_bins(
    computed: Sequence[int] | None, cached: Sequence[int] | None, steps: int | None
) -> list[int]:
    if computed is None or cached is None:
        missing = "compute_bins" if computed is None else "cache_bins"
        raise ValueError(
            f"steps_mask: compute_bins and cache_bins must be given together, got no {missing}; "
            f"leave out both for a mask_policy"
        )
    for name, bins in (("compute_bins", computed), ("cache_bins", cached)):
        for length in bins:
            check_int(f"steps_mask: each of {name}", length, 1)
    if not computed or len(computed) - len(cached) not in (0, 1):
        raise ValueError(
            f"steps_mask: compute_bins and cache_bins must alternate, full steps first (as many of "
            f"both, or one more of compute_bins), got {list(computed)} and {list(cached)}"
        )
    mask = _alternate(computed, cached)
    if steps is not None and len(mask) < steps:
        raise ValueError(
            f"steps_mask: the bins must add up to total_steps or more, got {len(mask)} for "
            f"{steps} steps; add bins or make them longer"
        )
    return mask[:steps]


def _alternate(computed: Sequence[int], cached: Sequence[int]) -> list[int]:
    """Return runs of ones and zeros, a run of ones first."""
    mask: list[int] = []
    for ones, zeros in zip_longest(computed, cached, fillvalue=0):
        mask += [1] * ones + [0] * zeros
    return mask


def _grown(bins: Bins, steps: int) -> Bins:
    """Lengthen `bins` in turn, by half of what is proportional to `steps`, until they reach it.

    A round lengthens each run but the last run of ones, which then gets one step more.
    """
    computed, cached = (list(runs) for runs in bins)
    missing = steps - sum(computed) - sum(cached)
    share = steps / (2 * _BASE_STEPS)  # in floats as there, down to where they round
    while missing > 0:
        turns = [(runs, i) for i in range(len(cached)) for runs in (computed, cached)]
        for runs, i in [*turns, (computed, len(computed) - 1)]:
            base = bins[0] if runs is computed else bins[1]
            more = max(int(base[i] * share), 1) if i < len(cached) else 1
            runs[i] += more
            missing -= more
            if missing <= 0:
                break
    return tuple(computed), tuple(cached)


def _shrunk(bins: Bins, steps: int) -> Bins:
    """Shorten the last run of zeros and the last run of ones in turn, until `steps` are left."""
    computed, cached = (list(runs) for runs in bins)
    excess = sum(computed) + sum(cached) - steps
    turn, other = cached, computed
    for _ in range(excess):
        turn[-1] -= 1
        if turn[-1] == 0:
            turn.pop()
        turn, other = other, turn
    return tuple(computed), tuple(cached)
