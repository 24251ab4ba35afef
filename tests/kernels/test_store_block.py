import pytest
import torch

from dbcache.kernels import store_block as module
from dbcache.kernels.block_state import BlockState
from dbcache.kernels.store_block import store_block

IMPLS = ["triton", "reference"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1), (2, 17, 5), (1, module.BLOCK - 1), (2, module.BLOCK + 1)]


def poison(h, encoder, blocks, impl):
    state = BlockState.allocate(h, encoder, [True] * blocks, [0.0] * 4, impl=impl)
    for tensor in (state.inputs, state.residuals, state.growth_sums):
        tensor.fill_(float("nan"))
    state.stamps.fill_(-7)
    return state


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stores_exact_differences_of_one_block_and_its_growth(integers, shape, dtype, impl):
    h, encoder = integers(*shape, dtype=dtype), integers(3, 5, dtype=dtype)
    state = poison(h, encoder, 3, impl)
    older = [integers(*shape, dtype=dtype) for _ in range(2)]
    newer = [integers(*shape, dtype=dtype) for _ in range(2)]
    added = [integers(3, 5, dtype=dtype) for _ in range(2)]
    store_block(state, 1, 4, *older, encoder, added[0], first=True, impl=impl)
    assert state.growth_sums[1].sum(0).tolist() == [0.0, 0.0]
    store_block(state, 1, 6, *newer, encoder, added[1], first=False, impl=impl)
    assert torch.equal(state.inputs[1], newer[0])
    assert torch.equal(state.residuals[1], newer[1] - newer[0])
    assert torch.equal(state.encoder_residuals[1], added[1] - encoder)
    assert state.stamps.tolist() == [-7, 6, -7]
    grown = [
        (new.double() - old.double()).abs().sum().item()
        for old, new in zip(older, newer, strict=True)
    ]
    assert state.growth_sums[1].sum(0).tolist() == grown[::-1]
    for tensor in (state.inputs, state.residuals, state.growth_sums):
        assert tensor[[0, 2]].isnan().all()
    assert state.encoder_residuals[[0, 2]].eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_growth_is_close_to_float64(random, impl):
    shape = (2, 40, 65)
    state = poison(random(*shape), None, 1, impl)
    old, new = ([random(*shape) for _ in range(2)] for _ in range(2))
    store_block(state, 0, 0, *old, first=True, impl=impl)
    store_block(state, 0, 1, *new, first=False, impl=impl)
    moved = [(b.double() - a.double()).abs().sum().item() for a, b in zip(old, new, strict=True)]
    sums = state.growth_sums[0].sum(0).tolist()
    assert sums == pytest.approx(moved[::-1], rel=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_are_honoured_and_a_missing_encoder_is_left_alone(random, impl):
    h_in, h_out = random(2, 5, 9).transpose(1, 2), random(2, 9, 5)
    state = poison(h_in.contiguous(), random(2, 3), 2, impl)
    store_block(state, 0, 3, h_in, h_out, first=True, impl=impl)
    assert torch.equal(state.inputs[0], h_in)
    assert torch.equal(state.residuals[0], h_out - h_in)
    assert state.encoder_residuals.eq(0).all()


def test_rejects_what_does_not_fit(random):
    h, encoder = random(2, 7), random(2, 3)
    state = poison(h, encoder, 2, "reference")
    bare = poison(h, None, 2, "reference")
    for owner, args, must in (
        (state, (2, 0, h, h), "index must be from 0 to 1"),
        (state, (0, 0, h, random(2, 8)), "h_in and h_out must have the shape"),
        (state, (0, 0, h, h.half()), "must be torch.float32"),
        (state, (0, 0, h, h, encoder, None), "must come together"),
        (state, (0, 0, h, h, encoder, random(2, 4)), "encoder_in and encoder_out must have"),
        (bare, (0, 0, h, h, encoder, encoder), "allocated with encoder states"),
    ):
        with pytest.raises(ValueError, match=must):
            store_block(owner, *args, first=True)


def test_is_registered_with_a_fake(random):
    h, encoder = random(2, 7), random(2, 3)
    for impl in IMPLS:
        state = poison(h, encoder, 2, impl)
        stored = (state.inputs, state.residuals, state.encoder_residuals)
        args = (*stored, state.stamps, state.growth_sums, 0, 3, h, h, encoder, encoder, True, impl)
        torch.library.opcheck(torch.ops.dbcache.store_block.default, args)
