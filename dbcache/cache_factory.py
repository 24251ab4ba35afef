"""The names of cache-dit 0.2, for code that was written for it.

from dbcache.cache_factory import CacheType, apply_cache_on_pipe

options = CacheType.default_options(CacheType.DBCache)
apply_cache_on_pipe(pipe, **options | {"residual_diff_threshold": 0.12})
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from dbcache.api import enable
from dbcache.config.options import check_choice, check_int, check_type, reject_unknown
from dbcache.config.renamed import also_called

Pipeline = TypeVar("Pipeline")

_NEW_NAMES = {
    "warmup_steps": "max_warmup_steps",
    "non_prune_blocks_ids": "non_prune_block_ids",
    "do_separate_classifier_free_guidance": "enable_separate_cfg",
}
_OF_NAMED = {
    "max_warmup_steps": 0,
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 0,
    "residual_diff_threshold": 0.05,
}
"""What options that are left out are where `cache_type` is given; the limits are off."""

_TAYLOR_ORDER = 2
"""Where `taylorseer_kwargs` does not say."""


_SHORT = {"DB": "DBCACHE", "DBP": "DBPRUNE", "FB": "FBCACHE", "NC": "NONE", "NOCACHE": "NONE"}
_SHORT |= {"DUALBLOCKCACHE": "DBCACHE", "DYNAMICBLOCKPRUNE": "DBPRUNE"}
"""Other names of the methods, in capitals and without underscores."""


@also_called("type_hint")
def cache_type(name: CacheType | str | None) -> CacheType:
    """Return the method of a name, in any case, with or without underscores; None is `NONE`.

    Raises:
        ValueError: there is none of that name.
    """
    kinds = {kind.value.upper(): kind for kind in CacheType}
    plain = str(getattr(name, "value", "NONE" if name is None else name)).upper().replace("_", "")
    found = kinds.get(_SHORT.get(plain, plain))
    if found is None:
        check_choice("cache_type", name, tuple(kind.value for kind in CacheType))
    return CacheType(found)


def block_range(start: int, end: int, step: int = 1) -> list[int]:
    """Return every `step`-th block number from `start` on, with the first and the last of `end`.

    That is 0, ``start``, ``start + step``, ... and ``end - 1``; nothing if `start` is above `end`,
    if `end` is 0, or if `step` is 1 or less. As in cache-dit, for `Bn_compute_blocks_ids` and
    `non_prune_block_ids`.

    Raises:
        TypeError, ValueError: `start` or `end` is no integer of at least 0.
    """
    check_int("block_range: start", start, 0)
    check_int("block_range: end", end, 0)
    if start > end or end == 0 or step <= 1:
        return []
    return sorted({0, *range(start, end, step), end - 1})


class CacheType(str, Enum):
    """The methods: of whole steps (FBCache: with one probe block), of single blocks, and none."""

    NONE = "NONE"
    DBCache = "DBCache"
    DBPrune = "DBPrune"
    FBCache = "FBCache"

    def __str__(self) -> str:
        return self.value

    @staticmethod
    def default_options(kind: CacheType) -> dict[str, Any]:
        """Return the options that cache-dit 0.2 had for a method when none were given.

        Raises:
            ValueError: an unknown method.
        """
        kind = cache_type(kind)
        if kind is CacheType.NONE:
            return {"cache_type": kind}
        is_first_block = kind is CacheType.FBCache
        return {
            "cache_type": kind,
            "warmup_steps": 8,
            "max_cached_steps": 8 if is_first_block else -1,
            "Fn_compute_blocks": 1 if is_first_block else 8,
            "Bn_compute_blocks": 0 if is_first_block else 8,
            "residual_diff_threshold": 0.12 if kind is CacheType.DBCache else 0.08,
        }

    type = staticmethod(cache_type)
    range = staticmethod(block_range)


NONE, DBCache, DBPrune = CacheType.NONE, CacheType.DBCache, CacheType.DBPrune


def _renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    return {_NEW_NAMES.get(name, name): value for name, value in options.items()}


def apply_cache_on_pipe(pipe: Pipeline, **options: Any) -> Pipeline:
    """Do what `dbcache.enable` does, with options as cache-dit 0.2 named them.

    With a `cache_type` options that are left out are those of its bare method: F1B0, no warm-up,
    threshold 0.05. Without one they are `CacheType.default_options` of DBCache.

    Args:
        pipe: as for `enable`.
        **options: `cache_type` (`CacheType.NONE` does nothing), and those of `enable`, or
            `warmup_steps` (-1: none), `non_prune_blocks_ids`,
            `do_separate_classifier_free_guidance`, and ``taylorseer_kwargs={"n_derivatives": 2}``
            (that is its default), which counts with `enable_taylorseer` only.

    Raises:
        TypeError, ValueError: as `enable`.
    """
    defaults = _OF_NAMED if "cache_type" in options else CacheType.default_options(DBCache)
    options = _renamed(defaults) | _renamed(options)
    kind = cache_type(options.pop("cache_type"))
    if kind is CacheType.NONE:
        return pipe
    if options["max_warmup_steps"] == -1:
        options["max_warmup_steps"] = 0
    taylorseer = options.pop("taylorseer_kwargs", None)
    check_type("apply_cache_on_pipe: taylorseer_kwargs", taylorseer, Mapping)
    reject_unknown("apply_cache_on_pipe: taylorseer_kwargs", taylorseer or {}, ("n_derivatives",))
    if options.get("enable_taylorseer") or options.get("enable_encoder_taylorseer"):
        order = (taylorseer or {}).get("n_derivatives", _TAYLOR_ORDER)
        options.setdefault("taylorseer_order", order)
    options["cache_type"] = "DBPrune" if kind is CacheType.DBPrune else "DBCache"
    return enable(pipe, **options)
