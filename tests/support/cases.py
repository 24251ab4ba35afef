"""Cache options that the oracle, dbcache and cache-dit are compared on, for STEPS steps.

The thresholds are such that steps of the tiny models fall on both sides of them.
"""

from oracle import Rule

STEPS = 24
MASK = (1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0)

SHARED = {
    "F1B0": Rule(residual_diff_threshold=0.1),
    "F1B0 default threshold": Rule(),
    "F1B0 wide threshold": Rule(residual_diff_threshold=0.25),
    "F2B1": Rule(Fn_compute_blocks=2, Bn_compute_blocks=1, residual_diff_threshold=0.12),
    "F1B5": Rule(Bn_compute_blocks=5, residual_diff_threshold=0.12),
    "F5B0": Rule(Fn_compute_blocks=5, residual_diff_threshold=0.09),
    "F4B0 order 1": Rule(Fn_compute_blocks=4, residual_diff_threshold=0.12, order=1),
    "F4B0 order 2": Rule(
        Fn_compute_blocks=4, residual_diff_threshold=0.12, order=2, max_warmup_steps=5
    ),
    "F2B1 order 2": Rule(
        Fn_compute_blocks=2,
        Bn_compute_blocks=1,
        residual_diff_threshold=0.16,
        order=2,
        max_warmup_steps=6,
    ),
    "no warm-up": Rule(max_warmup_steps=0, residual_diff_threshold=0.12),
    "warm-up longer than the request": Rule(max_warmup_steps=STEPS + 5),
    "warm-up interval 2": Rule(max_warmup_steps=8, warmup_interval=2, residual_diff_threshold=0.12),
    "warm-up interval 3 of 7": Rule(
        max_warmup_steps=7, warmup_interval=3, residual_diff_threshold=0.16
    ),
    "at most 5 cached": Rule(max_cached_steps=5, residual_diff_threshold=0.16),
    "none cached": Rule(max_cached_steps=0, residual_diff_threshold=0.16),
    "none in a row": Rule(max_continuous_cached_steps=0, residual_diff_threshold=0.16),
    "1 in a row": Rule(max_continuous_cached_steps=1, residual_diff_threshold=0.25),
    "2 in a row": Rule(max_continuous_cached_steps=2, residual_diff_threshold=0.25),
    "3 in a row, at most 8": Rule(
        max_continuous_cached_steps=3, max_cached_steps=8, residual_diff_threshold=0.3
    ),
    "always, 4 in a row": Rule(residual_diff_threshold=1.0, max_continuous_cached_steps=4),
    "mask, dynamic": Rule(
        steps_computation_mask=MASK, residual_diff_threshold=0.12, max_warmup_steps=8
    ),
    "mask, dynamic, limited": Rule(
        steps_computation_mask=MASK,
        residual_diff_threshold=0.2,
        max_continuous_cached_steps=2,
        max_cached_steps=7,
    ),
    "mask, static": Rule(
        steps_computation_mask=MASK,
        steps_computation_policy="static",
        residual_diff_threshold=0.01,
        max_cached_steps=2,
        max_continuous_cached_steps=1,
    ),
    "mask, static, order 1": Rule(
        steps_computation_mask=MASK, steps_computation_policy="static", order=1
    ),
    "mask shorter than warm-up": Rule(
        steps_computation_mask=(1, 1) + (0, 0, 0, 1) * 5 + (0, 1),
        max_warmup_steps=8,
        residual_diff_threshold=0.12,
    ),
}
"""Options on which cache-dit 1.5.3 has no known defect."""

STATIC = {
    "steps_computation_mask": MASK,
    "steps_computation_policy": "static",
    "static_skip_probe": True,
}

OWN = {
    "static, no probe": Rule(**STATIC),
    "static, no probe, order 2, B2": Rule(**STATIC, order=2, Bn_compute_blocks=2),
    "accumulated 0.2": Rule(
        max_accumulated_residual_diff_threshold=0.2, residual_diff_threshold=0.3
    ),
    "accumulated 0.12, 2 in a row": Rule(
        max_accumulated_residual_diff_threshold=0.12,
        max_continuous_cached_steps=2,
        residual_diff_threshold=0.3,
    ),
    "hidden states": Rule(l1_hidden_states_diff_threshold=0.1, residual_diff_threshold=0.0),
    "hidden states, 2 in a row, order 1": Rule(
        l1_hidden_states_diff_threshold=0.2, max_continuous_cached_steps=2, order=1
    ),
    "order 1 after 2 steps": Rule(max_warmup_steps=2, residual_diff_threshold=0.16, order=1),
    "order 2 after 2 steps": Rule(max_warmup_steps=2, residual_diff_threshold=0.16, order=2),
    "order 2 after 1 step": Rule(max_warmup_steps=1, residual_diff_threshold=0.16, order=2),
    "order 3": Rule(max_warmup_steps=4, residual_diff_threshold=0.16, order=3),
    "order 2, exact": Rule(max_warmup_steps=4, residual_diff_threshold=0.16, order=2, exact=True),
    "order 2, Hermite": Rule(max_warmup_steps=4, residual_diff_threshold=0.16, order=2, sigma=0.5),
    "order 2, interval 3": Rule(
        max_warmup_steps=7, warmup_interval=3, residual_diff_threshold=0.2, order=2
    ),
}
"""Options where cache-dit 1.5.3 differs: its accumulated diff never resets, its ladder is late."""


def on_families(cases: dict[str, Rule]) -> list[tuple[str, str]]:
    """Return (case, family) pairs: every case on FLUX and, in turn, on Qwen-Image or Wan."""
    others = ("qwen", "wan")
    pairs = [(case, ("flux", others[i % 2])) for i, case in enumerate(cases)]
    return [(case, family) for case, families in pairs for family in families]
