"""Models whose last blocks take what the first ones made, through a `BlockAdapter`."""

import pytest
import torch

import dbcache

BLOCKS = 8


class Block(torch.nn.Module):
    def __init__(self, takes_skip):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.skip = torch.nn.Linear(16, 8) if takes_skip else None

    def forward(self, hidden_states, skip=None):
        if self.skip is not None:
            hidden_states = self.skip(torch.cat([hidden_states, skip], -1))
        return hidden_states + self.linear(hidden_states).tanh()


class UVit(torch.nn.Module):
    """Block 7 takes what block 0 made, 6 what 1 made, 5 what 2 made."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Block(i > BLOCKS // 2) for i in range(BLOCKS))

    def forward(self, x):
        made = []
        for i, layer in enumerate(self.layers):
            x = layer(x, made.pop()) if i > BLOCKS // 2 else layer(x)
            if i < BLOCKS // 2 - 1:
                made.append(x)
        return x


def enable(model, fn, bn, long_skips):
    adapter = dbcache.BlockAdapter(
        transformer=model,
        blocks=model.layers,
        forward_pattern=dbcache.ForwardPattern.Pattern_3,
        long_skips=long_skips,
    )
    dbcache.enable(
        adapter,
        Fn_compute_blocks=fn,
        Bn_compute_blocks=bn,
        max_warmup_steps=1,
        residual_diff_threshold=1.0,
    )


@pytest.mark.parametrize(("fn", "bn"), [(1, 0), (1, 1), (3, 2), (2, 2)])
@torch.no_grad()
def test_as_many_last_blocks_as_first_ones_are_right(fn, bn):
    model, x = UVit(), torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    plain = model(x)
    enable(model, fn, bn, long_skips=True)
    full, cached = model(x), model(x)
    assert torch.equal(full, plain)
    torch.testing.assert_close(cached, plain)
    assert dbcache.summary(model).lanes[0].cached_steps == [1]


@torch.no_grad()
def test_more_last_blocks_are_refused_since_they_would_be_wrong():
    model, x = UVit(), torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    plain, before = model(x), dict(model.__dict__)
    with pytest.raises(ValueError, match="at most Fn_compute_blocks, got 2 and 1: long skip"):
        enable(model, 1, 2, long_skips=True)
    assert model.__dict__ == before
    enable(model, 1, 2, long_skips=False)
    model(x)
    assert (model(x) - plain).abs().max() > 1e-2


def test_refreshing_refuses_the_same_and_keeps_what_was():
    model = UVit()
    enable(model, 2, 2, long_skips=True)
    with pytest.raises(ValueError, match="got 3 and 2: long skip"):
        dbcache.refresh_context(model, Bn_compute_blocks=3)
    with torch.no_grad():
        model(torch.zeros(1, 4, 8))
    assert dbcache.summary(model).lanes[0].steps == 1


class Silent(Block):
    """Its source does not tell that it returns hidden states."""

    def forward(self, hidden_states, skip=None):
        return super().forward(hidden_states, skip)


@torch.no_grad()
def test_more_last_blocks_are_refused_where_the_first_forward_tells_the_pattern():
    model = UVit()
    model.layers = torch.nn.ModuleList(Silent(i > BLOCKS // 2) for i in range(BLOCKS))
    adapter = dbcache.BlockAdapter(
        transformer=model, blocks=model.layers, auto=True, long_skips=True
    )
    dbcache.enable(adapter, Fn_compute_blocks=1, Bn_compute_blocks=2)
    for _ in range(2):
        with pytest.raises(ValueError, match="got 2 and 1: long skip"):
            model(torch.zeros(1, 4, 8))
    dbcache.refresh_context(model, Bn_compute_blocks=1)
    model(torch.zeros(1, 4, 8))


def test_the_flag_is_a_flag():
    with pytest.raises(TypeError, match=r"long_skips must be True or False, got 'yes'"):
        enable(UVit(), 1, 1, long_skips="yes")
