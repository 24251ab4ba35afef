"""DBPrune on a tiny real model of every class in the table."""

import diffusers
import models
import pytest
import torch

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
