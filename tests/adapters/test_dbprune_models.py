"""DBPrune on a tiny real model of every class in the table."""

from dataclasses import asdict

import diffusers
import models
import pytest
import torch
from prune_oracle import PruneOracle, PruneRule

import dbcache
from dbcache import DBPruneConfig

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "enable_separate_cfg": False}


@pytest.mark.parametrize("name", models.CASES)
def test_the_same_input_gives_the_same_output_with_all_blocks_but_the_first_left_out(name):
    """Also where the loop works on what blocks return, or hands it on to later ones."""
    if not hasattr(diffusers, name):
        pytest.skip(f"absent in diffusers {diffusers.__version__}")
    model = models.model(name)
    before = dict(vars(model))
    plain = models.run(name, 1, seeds=[7])[0]
    config = DBPruneConfig(residual_diff_threshold=1.0, **ALL)
    if name == "LatteTransformer3DModel":
        with pytest.raises(ValueError, match="take turns"):
            dbcache.enable(model, config)
        return
    dbcache.enable(model, config)
    full, pruned, again = models.run(name, 3, seeds=[7, 7, 7])
    lanes = dbcache.summary(model).lanes
    dbcache.disable(model)
    assert torch.equal(full, plain)
    torch.testing.assert_close(pruned, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(pruned, again)
    assert all(lane.pruned_blocks == [0, lane.blocks - 1, lane.blocks - 1] for lane in lanes)
    assert dict(vars(model)) == before


@pytest.mark.parametrize(
    ("name", "returns", "takes_encoder"),
    [
        ("CogVideoXTransformer3DModel", ("hidden_states", "encoder_hidden_states"), True),
        ("SD3Transformer2DModel", ("encoder_hidden_states", "hidden_states"), True),
        ("LTXVideoTransformer3DModel", ("hidden_states",), False),
        ("PixArtTransformer2DModel", ("hidden_states",), False),
        ("HunyuanDiT2DModel", ("hidden_states",), False),
        ("ConsisIDTransformer3DModel", ("hidden_states", "encoder_hidden_states"), True),
    ],
    ids=["pattern 0", "pattern 1", "pattern 2", "pattern 3", "long skips", "faces between blocks"],
)
@pytest.mark.parametrize("level", [0.25, 0.75])
def test_real_models_of_each_pattern_equal_the_oracle(name, returns, takes_encoder, level):
    (blocks,) = models.stacks_of(name)
    rule = PruneRule(residual_diff_threshold=0.0)
    oracle = PruneOracle(blocks, returns, takes_encoder, rule)
    with oracle():
        models.run(name, 20)
    # a threshold among the changes of this model when nothing is left out, away from any
    (lane,) = oracle.lanes.values()
    changes = sorted(d for step in lane.real for d in step.values())
    threshold = changes[int(level * len(changes))] * 1.0007
    rule = PruneRule(residual_diff_threshold=threshold, max_continuous_cached_steps=3)
    oracle = PruneOracle(blocks, returns, takes_encoder, rule)
    with oracle():
        expected = models.run(name, 20)
    options = asdict(rule) | {"non_prune_block_ids": []}
    model = dbcache.enable(models.model(name), DBPruneConfig(**options))
    outputs = models.run(name, 20)
    (mine,) = dbcache.summary(model).lanes
    dbcache.disable(model)
    assert mine.pruned == oracle.lanes[None].skipped
    assert any(mine.pruned)
    assert mine.reasons == oracle.lanes[None].decider.trace.reasons
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
