"""Stacks that decide before their first block: a cached step runs no block of theirs but Bn."""

import pytest
import torch
from tiny import FAMILIES, denoise, flux

import dbcache
from dbcache import DBCacheConfig

pytestmark = pytest.mark.usefixtures("one_thread")

MASK = [1, 1, 0, 0, 1, 0, 0, 0]
STATIC = {
    "steps_computation_mask": MASK,
    "steps_computation_policy": "static",
    "static_skip_probe": True,
}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def blocks_of(model, family):
    """Return the blocks of a model in the order in which they run."""
    return [block for name in family.lists for block in getattr(model, name)]


def count_calls(model, family, steps):
    """Return how often each block ran on each step."""
    calls = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, i=i: calls[-1].__setitem__(i, calls[-1][i] + 1))
        for i, block in enumerate(blocks_of(model, family))
    ]
    hooks.append(model.register_forward_pre_hook(lambda *_: calls.append([0] * (len(hooks) - 1))))
    denoise(model, family, steps)
    for hook in hooks:
        hook.remove()
    return calls


@families
@pytest.mark.parametrize("tail", [0, 2])
def test_static_steps_run_the_last_blocks_only(family, tail):
    model = family.build()
    dbcache.enable(model, Bn_compute_blocks=tail, enable_separate_cfg=False, **STATIC)
    calls = count_calls(model, family, len(MASK))
    blocks = len(calls[0])
    cached = [0] * (blocks - tail) + [1] * tail
    assert calls == [[1] * blocks if full else cached for full in MASK]


def test_a_lane_without_probe_keeps_the_ring_alone():
    model, family = flux(), FAMILIES["flux"]
    dbcache.enable(model, Fn_compute_blocks=1, **STATIC)
    denoise(model, family, len(MASK))
    (lane,) = dbcache.summary(model).lanes
    image, text = 16 * 32 * 4, 6 * 32 * 4
    assert lane.megabytes * 1e6 == pytest.approx(image + text)


def test_the_probe_is_skipped_only_where_nothing_is_measured():
    model = flux()
    for options in (
        {"steps_computation_mask": MASK},
        {"steps_computation_policy": "static"},
    ):
        with pytest.raises(ValueError, match=r"static_skip_probe must come with a steps_comput"):
            dbcache.enable(model, static_skip_probe=True, **options)
    assert "forward" not in vars(model)
    with pytest.raises(TypeError, match="static_skip_probe must be True or False, got 1"):
        DBCacheConfig(static_skip_probe=1)


class MakesText(torch.nn.Module):
    """A block that takes hidden states and returns encoder states, too."""

    def forward(self, hidden_states):
        return hidden_states + 1, hidden_states[:, :2] * 2


class TextMaker(torch.nn.Module):
    """A model of such blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([MakesText() for _ in range(4)])

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states, text = block(hidden_states)
        return hidden_states, text


def test_blocks_that_only_return_encoder_states_may_all_be_skipped():
    model = TextMaker()
    adapter = dbcache.BlockAdapter(
        transformer=model,
        blocks=model.blocks,
        forward_pattern=dbcache.ForwardPattern.Pattern_4,
    )
    dbcache.enable(adapter, **STATIC)
    hidden, text = model(torch.ones(1, 3, 4))
    for _ in range(3):
        again, text_again = model(torch.ones(1, 3, 4))
        assert torch.equal(again, hidden)
        assert torch.equal(text_again, text)
    assert dbcache.summary(model).lanes[0].cached_steps == [2, 3]


@families
def test_skipping_the_probe_too_leaves_no_trace(family):
    model = family.build()
    plain = denoise(model, family, 4)
    dbcache.enable(model, enable_separate_cfg=False, **STATIC)
    denoise(model, family, len(MASK))
    dbcache.disable(model)
    assert all(map(torch.equal, denoise(model, family, 4), plain))
