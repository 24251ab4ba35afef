"""What cache-dit's `CacheStats` calls the numbers of a lane.

`cfg_cached_steps` and its like are those of the stack's second guidance branch, which is a lane of
its own here.
"""

from __future__ import annotations

from typing import Any


class CacheStats:
    """Other names of what a `LaneSummary` holds."""

    @property
    def cache_options(self: Any) -> dict[str, Any]:
        """The settings of the stack, by the names of their fields."""
        return self.options

    @property
    def residual_diffs(self: Any) -> dict[str, float]:
        """Change by step; the steps are strings there."""
        return {str(step): diff for step, diff in self.diffs.items()}

    @property
    def pruned_steps(self: Any) -> list[int]:
        """Steps on which blocks were left out; none where whole steps are cached."""
        return self.cached_steps if self.pruned is not None else []

    @property
    def actual_blocks(self: Any) -> list[int]:
        """How many blocks ran, by step; empty where whole steps are cached."""
        return [self.blocks - count for count in self.pruned_blocks]

    @property
    def accumulated_cached_steps(self: Any) -> int:
        """How many steps were cached."""
        return len(self.cached_steps)

    @property
    def accumulated_executed_steps(self: Any) -> int:
        """How many steps the lane has."""
        return int(self.steps)

    @property
    def accumulated_transformer_executed_steps(self: Any) -> int:
        """How often the transformer was called, for both branches."""
        return int(self.steps + (self.other.steps if self.other else 0))

    @property
    def cfg_accumulated_cached_steps(self: Any) -> int:
        """`accumulated_cached_steps` of the second branch."""
        return len(self.cfg_cached_steps)

    @property
    def cfg_cached_steps(self: Any) -> list[int]:
        """`cached_steps` of the second branch."""
        return self.other.cached_steps if self.other else []

    @property
    def cfg_residual_diffs(self: Any) -> dict[str, float]:
        """`residual_diffs` of the second branch."""
        return self.other.residual_diffs if self.other else {}

    @property
    def cfg_pruned_steps(self: Any) -> list[int]:
        """`pruned_steps` of the second branch."""
        return self.other.pruned_steps if self.other else []

    @property
    def cfg_pruned_blocks(self: Any) -> list[int]:
        """`pruned_blocks` of the second branch."""
        return self.other.pruned_blocks if self.other else []

    @property
    def cfg_actual_blocks(self: Any) -> list[int]:
        """`actual_blocks` of the second branch."""
        return self.other.actual_blocks if self.other else []

    @property
    def cfg_pruned_ratio(self: Any) -> float:
        """`pruned_ratio` of the second branch."""
        return self.other.pruned_ratio if self.other else 0.0
