from dataclasses import fields

import pytest
import torch

from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning import store_block as module
from dbcache.kernels.pruning.block_state import BlockState
from dbcache.kernels.pruning.store_block import store_block

IMPLS = ["triton", "reference"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1), (2, 17, 5), (1, module.BLOCK - 1), (2, module.BLOCK + 1)]


def poison(h, encoder, blocks, impl):
    state = BlockState.allocate(h, encoder, [True] * blocks, [0.0] * 4, impl=impl)
    for tensor in (state.inputs, state.residuals, state.growth_sums):
        tensor.fill_(float("nan"))
    state.stamps.fill_(-7)
    return state


def due_of(h, step, due):
    """Return what the step's decision leaves: `due` is 0 for not, 1 for the first time, else 2."""
    store = torch.full((bs.NUM_STORE,), 9, dtype=torch.int32, device=h.device)
    store[bs.DUE], store[bs.STAMP] = due, step
    return store


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stores_exact_differences_of_one_block_and_its_growth(integers, shape, dtype, impl):
    h, encoder = integers(*shape, dtype=dtype), integers(3, 5, dtype=dtype)
    state = poison(h, encoder, 3, impl)
    older = [integers(*shape, dtype=dtype) for _ in range(2)]
    newer = [integers(*shape, dtype=dtype) for _ in range(2)]
    added = [integers(3, 5, dtype=dtype) for _ in range(2)]
    store_block(state, due_of(h, 4, 1), 1, *older, encoder, added[0], impl=impl)
    assert state.growth_sums[1].sum(0).tolist() == [0.0, 0.0]
    store_block(state, due_of(h, 6, 2), 1, *newer, encoder, added[1], impl=impl)
    store_block(state, due_of(h, 7, 0), 1, *older, encoder, added[0], impl=impl)  # not due
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
    store_block(state, due_of(new[0], 0, 1), 0, *old, impl=impl)
    store_block(state, due_of(new[0], 1, 2), 0, *new, impl=impl)
    moved = [(b.double() - a.double()).abs().sum().item() for a, b in zip(old, new, strict=True)]
    sums = state.growth_sums[0].sum(0).tolist()
    assert sums == pytest.approx(moved[::-1], rel=1e-5)


def test_a_program_that_takes_several_parts_adds_them_up(integers, monkeypatch):
    monkeypatch.setattr("dbcache.kernels.common.sums.MAX_PARTIALS", 2)
    old, new = ([integers(2, 2 * module.BLOCK + 9) for _ in range(2)] for _ in range(2))
    state = poison(new[0], None, 2, "triton")
    assert state.growth_sums.shape == (2, 2, 2)
    store_block(state, due_of(new[0], 0, 1), 1, *old, impl="triton")
    store_block(state, due_of(new[0], 1, 2), 1, *new, impl="triton")
    moved = [(b.double() - a.double()).abs().sum().item() for a, b in zip(old, new, strict=True)]
    assert state.growth_sums[1].sum(0).tolist() == moved[::-1]
    assert torch.equal(state.inputs[1], new[0])
    assert torch.equal(state.residuals[1], new[1] - new[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_are_honoured_and_a_missing_encoder_is_left_alone(random, impl):
    h_in, h_out = random(2, 5, 9).transpose(1, 2), random(2, 9, 5)
    state = poison(h_in.contiguous(), random(2, 3), 2, impl)
    store_block(state, due_of(h_in, 3, 1), 0, h_in, h_out, impl=impl)
    assert torch.equal(state.inputs[0], h_in)
    assert torch.equal(state.residuals[0], h_out - h_in)
    assert state.encoder_residuals.eq(0).all()


def test_rejects_what_does_not_fit(random):
    h, encoder = random(2, 7), random(2, 3)
    state = poison(h, encoder, 2, "reference")
    bare = poison(h, None, 2, "reference")
    store = due_of(h, 0, 1)
    for owner, args, must in (
        (state, (store, 2, h, h), "index must be from 0 to 1"),
        (state, (store, 0, h, random(2, 8)), r"h_out must be float32 \(2, 7\)"),
        (state, (store, 0, h, h.half()), "share a dtype"),
        (state, (store, 0, h, h, encoder, None), "must come together"),
        (state, (store, 0, h, h, encoder, random(2, 4)), "encoder_out must be float32"),
        (bare, (store, 0, h, h, encoder, encoder), "allocated with encoder states"),
        (state, (store.float(), 0, h, h), "store must be int32"),
        (state, (store[:2], 0, h, h), "store must be int32"),
    ):
        with pytest.raises(ValueError, match=must):
            store_block(owner, *args)


def test_is_registered_with_a_fake(random):
    h, encoder = random(2, 7), random(2, 3)
    for impl in IMPLS:
        state = poison(h, encoder, 2, impl)
        tensors = (getattr(state, field.name) for field in fields(state))
        args = (*tensors, due_of(h, 3, 1), 0, [h, encoder], [h, encoder], impl)
        torch.library.opcheck(torch.ops.dbcache.store_block.default, args)
