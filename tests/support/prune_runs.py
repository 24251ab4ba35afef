"""What tests of DBPrune share: options, counts of calls, and the comparison with the oracle."""

from dataclasses import asdict

import pytest
from prune_oracle import PruneOracle

STEPS = 24


HIDDEN, ENCODER = "hidden_states", "encoder_hidden_states"


def options(rule):
    values = asdict(rule)
    values["non_prune_block_ids"] = list(rule.non_prune_block_ids)
    if rule.steps_computation_mask is not None:
        values["steps_computation_mask"] = list(rule.steps_computation_mask)
    return values


def blocks_of(model, family):
    return [block for name in family.lists for block in getattr(model, name)]


def oracle_of(model, family, rule, **how):
    returns = (HIDDEN,) if family.encoder_first is None else (ENCODER, HIDDEN)
    return PruneOracle(blocks_of(model, family), returns, len(returns) == 2, rule, **how)


def counted(blocks):
    """Count the calls of each block; return the counts and what stops the counting."""
    calls = [0] * len(blocks)

    def count(i):
        calls[i] += 1

    hooks = [b.register_forward_pre_hook(lambda *_, i=i: count(i)) for i, b in enumerate(blocks)]
    return calls, lambda: [hook.remove() for hook in hooks]


def assert_same(lanes, oracle):
    """Check reasons, blocks left out and measured changes of all lanes."""
    assert [lane.branch for lane in lanes] == list(oracle.lanes)
    assert oracle.margin > 1e-5, "a change on the threshold decides nothing: move it"
    for lane, expected in zip(lanes, oracle.lanes.values(), strict=True):
        assert lane.pruned == expected.skipped
        assert lane.reasons == expected.decider.trace.reasons
        smallest = {
            step: min(diffs[i] for i in oracle.prunable)
            for step, diffs in enumerate(expected.diffs)
            if diffs
        }
        assert lane.diffs == pytest.approx(smallest, rel=1e-4)
