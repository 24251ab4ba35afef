"""`DBPruneConfig`: leave single blocks out rather than whole steps.

Names and defaults are cache-dit's, so that its users can switch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from dbcache.config.cache import UNLIMITED, DBCacheConfig
from dbcache.config.options import check_method, option
from dbcache.kernels.pruning import block_state as bs

_WITHOUT_MEANING = (
    "Bn_compute_blocks_ids",
    "important_condition_threshold",
    "l1_hidden_states_diff_threshold",
    "max_accumulated_residual_diff_threshold",
    "cache_dtype",
    "cache_device",
    "decision_scope",
    "policy",
    "calibration",
    "static_skip_probe",
)


@dataclass(kw_only=True)
class DBPruneConfig(DBCacheConfig):
    """When a block is left out: its input has hardly changed since it last ran (DBPrune).

    A step on which at least one block is left out counts as a cached one for the limits. What
    `DBCacheConfig` says of a step that is full by warm-up, mask or limit holds here, too.

    Raises:
        TypeError: an unknown option (the error names the nearest one).
        ValueError: a value outside its range, or an option of `DBCacheConfig` that has no meaning
            here, at another value than its default.
    """

    enable_dynamic_prune_threshold: bool = False
    """Let the threshold of a block rise to `dynamic_prune_threshold_relax_ratio` times the mean
    change of the blocks before it (of the first five of the step)."""

    max_dynamic_prune_threshold: float | None = option(None, positive=True)
    """Where it would rise to this or more, `residual_diff_threshold` holds. None: twice that."""

    dynamic_prune_threshold_relax_ratio: float = option(1.25, positive=True)
    """See `enable_dynamic_prune_threshold`."""

    non_prune_block_ids: list[int] = field(default_factory=list)
    """Blocks that always run, besides the first Fn and the last Bn: numbers in the stack."""

    max_pruned_steps: int = option(UNLIMITED, low=UNLIMITED)
    """Another name of `max_cached_steps`."""

    residual_cache_update_interval: int = option(1, low=1)
    """What blocks add is stored on steps 0, i, 2i, ... only (and when nothing is stored yet)."""

    cache_type: str = option("DBPrune", check=partial(check_method, allowed=("DBPrune",)))
    """The method, as serving engines name it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        who = type(self).__name__
        limits = (self.max_cached_steps, self.max_pruned_steps)
        if UNLIMITED not in limits and limits[0] != limits[1]:
            raise ValueError(
                f"{who}: max_cached_steps and max_pruned_steps must not differ, got {limits[0]} "
                f"and {limits[1]}; set one of them"
            )
        if self.batch_reduce == "each":
            raise ValueError(
                f"{who}.batch_reduce must be 'mean' or 'max', as blocks are left out for the batch "
                f"as a whole, got 'each'; with DBCacheConfig samples decide for themselves"
            )
        refused = dict.fromkeys(_WITHOUT_MEANING, "it has no meaning here")
        self.require_defaults(refused, "where single blocks are left out", "remove it")

    @property
    def max_steps(self) -> int:
        return max(self.max_cached_steps, self.max_pruned_steps)

    @property
    def rule(self) -> list[float]:
        """The numbers that `decide_blocks` goes by."""
        rule = [0.0] * bs.NUM_RULE
        rule[bs.THRESHOLD] = self.threshold
        if self.enable_dynamic_prune_threshold:
            most = self.max_dynamic_prune_threshold
            rule[bs.RELAX] = self.dynamic_prune_threshold_relax_ratio
            rule[bs.MAX_RELAXED] = 2 * self.threshold if most is None else most
        rule[bs.WORST_SAMPLE] = float(self.batch_reduce == "max")
        return rule

    def strify(self) -> str:
        """Return a short name of these settings, for file names and tables."""
        parts = [super().strify()]
        if self.enable_dynamic_prune_threshold:
            parts.append(f"DT{self.dynamic_prune_threshold_relax_ratio:g}")
        if self.non_prune_block_ids:
            parts.append(f"NP{len(self.non_prune_block_ids)}")
        if self.residual_cache_update_interval > 1:
            parts.append(f"U{self.residual_cache_update_interval}")
        return "_".join(parts)
