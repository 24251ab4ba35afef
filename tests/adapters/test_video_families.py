"""What single video families do beside running their blocks one after the other."""

import diffusers
import models
import models_streaming
import pytest
import tiny
import torch

import dbcache

ONE_BRANCH = {"enable_separate_cfg": False}
FORCED = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 1.0}


@pytest.fixture
def kandinsky():
    name = "Kandinsky6Transformer3DModel"
    if not hasattr(diffusers, name):
        pytest.skip(f"absent in diffusers {diffusers.__version__}")
    yield models.model(name)
    dbcache.disable(models.model(name))


def with_and_without_audio(model, audio):
    """Return what the model makes of steps with or without audio; two in a row are the same."""
    case = models.CASES["Kandinsky6Transformer3DModel"]
    outputs = []
    for step, has_audio in enumerate(audio):
        x = tiny.noise(*case.latent, seed=step // 2)
        call = case.call_arguments(x, torch.tensor([500.0]))
        if not has_audio:
            del call["audio_hidden_states"]
        with torch.no_grad():
            outputs.append(model(**call, return_dict=False))
    return outputs


@pytest.mark.parametrize("audio", [(True, True, False, False, True), (False, False, True, True)])
def test_audio_may_come_and_go(kandinsky, audio):
    plain = with_and_without_audio(kandinsky, audio)
    dbcache.enable(kandinsky, **FORCED, **ONE_BRANCH)
    outputs = with_and_without_audio(kandinsky, audio)
    assert dbcache.summary(kandinsky).lanes[0].cached_steps == [1, 3]
    for output, expected in zip(outputs, plain, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


class Animate:
    """Wan-Animate 2 with twelve blocks, whose unconditional calls leave block 9 out."""

    def __init__(self):
        wan = models_streaming.module("wan_animate_2")
        self.blocks = 12
        config = models_streaming.ANIMATE | {"num_layers": self.blocks}
        self.model = tiny.fill(wan.WanAnimate2Transformer3DModel(**config), seed=3)
        self.model.block_masks = models.model("WanAnimate2Transformer3DModel").block_masks
        self.cache = wan.WanAnimate2KVCache(self.blocks)
        for i in range(self.blocks):
            self.cache.get(i).store(*tiny.noise(2, 1, 8, 2, 12, seed=i))

    def __call__(self, seed, is_uncond):
        case = models.CASES["WanAnimate2Transformer3DModel"]
        call = case.call_arguments(tiny.noise(*case.latent, seed=seed), torch.tensor([500.0]))
        call |= {"kv_cache": self.cache, "is_uncondtion": is_uncond}
        with torch.no_grad():
            return self.model(**call).sample[0]


@pytest.fixture
def animate():
    if not hasattr(diffusers, "WanAnimate2Transformer3DModel"):
        pytest.skip(f"absent in diffusers {diffusers.__version__}")
    return Animate()


@pytest.mark.parametrize("bn", [0, 1, 3])
def test_a_block_that_one_branch_always_leaves_out_stays_out(animate, bn):
    """With Bn=3 it is a tail block, else a middle one."""
    plain = [animate(0, is_uncond) for is_uncond in (False, True)]
    dbcache.enable(animate.model, **FORCED, Bn_compute_blocks=bn)
    calls = []
    for i, block in enumerate(animate.model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    steps = [[animate(0, is_uncond) for is_uncond in (False, True)] for _ in range(2)]
    for step in steps:
        torch.testing.assert_close(step, plain, rtol=1e-4, atol=1e-5)
    lanes = dbcache.summary(animate.model).lanes
    assert [(lane.branch, lane.cached_steps) for lane in lanes] == [("cond", [1]), ("uncond", [1])]
    assert [calls.count(i) for i in range(12)] == [
        (1 if i == 9 else 2) * (1 if 1 <= i < 12 - bn else 2) for i in range(12)
    ]


def test_a_branch_that_leaves_out_the_block_where_steps_are_decided_runs_uncached(animate):
    plain = [animate(0, is_uncond) for is_uncond in (False, True)]
    dbcache.enable(animate.model, **FORCED | {"Fn_compute_blocks": 9})
    for _ in range(3):
        outputs = [animate(0, is_uncond) for is_uncond in (False, True)]
        assert torch.equal(outputs[1], plain[1])
    torch.testing.assert_close(outputs[0], plain[0], rtol=1e-4, atol=1e-5)
    summary = dbcache.summary(animate.model)
    assert [(lane.branch, lane.cached_steps) for lane in summary.lanes] == [("cond", [1, 2])]
    assert any("3 calls left blocks out" in note for note in summary.notes)
