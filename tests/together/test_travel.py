"""Prompts that travel: other embeddings at every step, in calls that have no names."""

import pipelines
import pytest
import torch
from pipelines import decisions

import dbcache

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

FORCED = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 2,
    "residual_diff_threshold": 1.0,
    "max_continuous_cached_steps": 2,
}


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("name", ["Stable Diffusion 3", "Chroma", "Lumina 2", "Sana", "FLUX.1"])
def test_embeddings_that_are_other_tensors_at_every_step_stay_in_their_lanes(name, guided):
    """Their values are the same, so that the pictures must be, to the last bit."""
    pipe, kept = pipelines.build(name), []
    names = [key for key in pipe._callback_tensor_inputs if "prompt_embeds" in key]

    def travel(pipe, step, time, tensors):
        kept.append(tensors)  # the old ones are still there
        return {key: None if x is None else x.clone() for key, x in tensors.items()}

    dbcache.enable(pipe, **FORCED)
    want, lanes = pipelines.draw(pipe, name, guided=guided), decisions(pipe)
    assert {steps for _, steps in lanes} == {"FFccFc"}
    more = {"callback_on_step_end": travel, "callback_on_step_end_tensor_inputs": names}
    assert torch.equal(pipelines.draw(pipe, name, guided=guided, **more), want)
    assert decisions(pipe) == lanes
    assert kept[0][names[0]] is not kept[1][names[0]]
    dbcache.disable(pipe)
