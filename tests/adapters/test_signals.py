"""What the policies measure is what the models compute, on a tiny model of each known class."""

import itertools

import inside
import models
import pytest
import torch

import dbcache
from dbcache.adapters.blocks.signature import Call
from dbcache.adapters.signals.measurements import FULL_NOISE, first_tensor
from dbcache.adapters.signals.modulated import MODULATED

pytestmark = pytest.mark.usefixtures("one_thread")

OF_CLASS = {
    "FluxTransformerBlock": "FluxTransformer2DModel",
    "HunyuanVideoTransformerBlock": "HunyuanVideoTransformer3DModel",
    "BriaTransformerBlock": "BriaTransformer2DModel",
    "MochiTransformerBlock": "MochiTransformer3DModel",
    "QwenImageTransformerBlock": "QwenImageTransformer2DModel",
    "CogVideoXBlock": "CogVideoXTransformer3DModel",
    "WanTransformerBlock": "WanTransformer3DModel",
}
TIMES = ("CogVideoXBlock", "WanTransformerBlock")
"""Blocks of which TeaCache takes the embedding of the time."""
ATTENTION = {"MochiTransformerBlock": "attn1"}


def enabled(name, policy):
    """Return a tiny model under a policy, and its first stack."""
    model = models.model(name)
    dbcache.enable(model, policy="easycache", enable_separate_cfg=False)
    names = [stack.name for stack in inside.stacks(model)]
    content = {
        "format": "dbcache calibration 1",
        "policy": "teacache",
        "model": type(model).__name__,
        "stacks": {name: {"coefficients": [0.0, 0.0, 0.0, 1.0, 0.0]} for name in names},
    }
    known = {"calibration": content} if policy == "teacache" else {}
    settings = {"max_warmup_steps": 2, "residual_diff_threshold": 1e9}
    dbcache.enable(model, policy=policy, enable_separate_cfg=False, **known, **settings)
    return model, inside.stacks(model)[0]


def test_every_class_of_blocks_has_a_model_here():
    assert set(OF_CLASS) == set(MODULATED)


@pytest.mark.parametrize("block_class", MODULATED)
def test_the_modulated_input_is_what_the_first_block_computes(block_class):
    model, stack = enabled(OF_CLASS[block_class], "teacache")
    block = models.stacks_of(OF_CLASS[block_class])[0][0]
    assert type(block).__name__ == block_class
    seen, measured = [], []

    def keep(_, args, kwargs):
        seen.append(kwargs["temb"] if "temb" in kwargs else args[2])

    def keep_attended(_, args, kwargs):
        seen.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    if block_class in TIMES:
        hook = block.register_forward_pre_hook(keep, with_kwargs=True)
    else:
        attention = getattr(block, ATTENTION.get(block_class, "attn"))
        hook = attention.register_forward_pre_hook(keep_attended, with_kwargs=True)
    finish = stack.source.finish
    stack.source.finish = lambda *given: (measured.append(stack.source.measured()), finish(*given))
    models.run(OF_CLASS[block_class], 4)
    hook.remove()
    (lane, *_) = dbcache.summary(model).lanes
    dbcache.disable(model)
    assert lane.cached_steps == [2, 3]
    assert len(seen) == 2
    assert len(measured) == 4
    for attended, value in zip(seen, measured, strict=False):
        torch.testing.assert_close(value, attended, rtol=1e-5, atol=1e-6)
    changes = [
        ((b - a).abs().mean() / a.abs().mean()).item() for a, b in itertools.pairwise(measured[1:])
    ]
    assert [lane.diffs[2], lane.diffs[3]] == pytest.approx(changes, rel=1e-4)


@pytest.mark.parametrize("name", FULL_NOISE)
def test_filtered_latents_are_measured_on_every_model_whose_times_are_known(name):
    model, stack = enabled(name, "seacache")
    models.run(name, 4)
    (lane, *_) = dbcache.summary(model).lanes
    dbcache.disable(model)
    assert lane.cached_steps == [2, 3]
    assert all(0 < diff < 10 for diff in lane.diffs.values())
    start = models.CASES[name].start  # a request begins at pure noise
    assert start == FULL_NOISE[name]
    assert stack.source.measured().isfinite().all()


def test_tokens_of_pictures_that_are_given_are_left_out():
    model, stack = enabled("FluxTransformer2DModel", "seacache")
    x = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(20, 3)
    ids[:12, 1], ids[:12, 2] = torch.arange(12) // 4, torch.arange(12) % 4
    ids[12:, 0] = 1  # Kontext: another picture behind the one that is made
    given = {"hidden_states": x, "timestep": torch.tensor([0.5]), "img_ids": ids}
    stack.source.start(Call(model, (), given))
    alone = stack.source.measured()
    assert alone.shape == (1, 3, 4, 4)
    changed = given | {"hidden_states": torch.cat([x[:, :12], x[:, 12:] * 9], 1)}
    stack.source.start(Call(model, (), changed))
    assert torch.equal(stack.source.measured(), alone)
    with pytest.raises(ValueError, match=r"one token per point of their grid, got 8 tokens for a"):
        stack.source.start(Call(model, (), given | {"hidden_states": x[:, :8]}))
    wrong = {r"a tensor of shape \(1, 20\)": torch.ones(1, 20), "float": 0.5, "None": None}
    for got, timestep in wrong.items():
        with pytest.raises(ValueError, match=f"one timestep per sample, got {got}; choose"):
            stack.source.start(Call(model, (), given | {"timestep": timestep}))
    with pytest.raises(ValueError, match="must get img_ids or img_shapes with packed latents"):
        stack.source.start(Call(model, (), {"hidden_states": x, "timestep": torch.tensor([0.5])}))
    dbcache.disable(model)


def test_the_ids_are_read_once_per_request_though_made_anew_at_each_step(monkeypatch):
    model, stack = enabled("FluxTransformer2DModel", "seacache")
    reads, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: reads.append(x.shape) or cpu(x))
    x = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0))

    def measured(rows, columns):
        """Return the shape of what is measured of pictures of this size."""
        ids = torch.tensor([(0.0, row, column) for row in range(rows) for column in range(columns)])
        given = {"hidden_states": x, "timestep": torch.tensor([0.5]), "img_ids": ids}
        stack.source.start(Call(model, (), given))
        return stack.source.measured().shape

    assert [measured(3, 4) for _ in range(3)] == [(1, 3, 4, 4)] * 3
    assert len(reads) == 1
    stack.start_request()
    assert [measured(2, 6) for _ in range(3)] == [(1, 2, 6, 4)] * 3
    assert len(reads) == 2
    dbcache.disable(model)


def test_the_prediction_is_found_in_tuples_lists_and_output_classes():
    x = torch.ones(2, 3)
    for output in (x, (x, None), [x], {0: x}):
        assert torch.equal(first_tensor("blocks", output), x)
    assert first_tensor("blocks", ([x, x],)).shape == (2, 2, 3)
    for output in (None, (None,), ([x, torch.ones(3)],), (x.long(),), ()):
        with pytest.raises(ValueError, match="blocks: the transformer must return its prediction"):
            first_tensor("blocks", output)
