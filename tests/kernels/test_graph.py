"""The ops of one step inside torch.compile, and under fake tensors."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LaneState
from dbcache.kernels.decision.decide import decide
from dbcache.kernels.decision.probe_diff import probe_diff
from dbcache.kernels.prediction.commit import commit
from dbcache.kernels.prediction.predict import predict

IMPLS = ["triton", "reference"]


def step(state, tensors, impl):
    """Run all ops once; return what they return."""
    h_in, h_fn, h_out, p_ref, ring, encoder_fn, encoder_out, encoder_ring = tensors
    partials = probe_diff(h_in, h_fn, p_ref, impl=impl)
    decide(state, partials, impl=impl)
    commit(
        h_in, h_fn, h_out, p_ref, ring, state.counters,
        encoder_fn, encoder_out, encoder_ring, impl=impl,
    )  # fmt: skip
    return partials, *predict(
        h_fn, ring, state.weights, encoder_fn, encoder_ring, state.encoder_weights, impl=impl
    )


def inputs(random):
    hidden, encoder = (2, 5, 3), (2, 4, 3)
    hidden_states = [random(*hidden) for _ in range(4)]
    return [
        *hidden_states, random(2, *hidden),
        random(*encoder), random(*encoder), random(2, *encoder),
    ]  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_compiled_step_is_one_graph_and_does_the_same(random, device, backend, impl, grad):
    state = LaneState.allocate(4, device)
    state.limits.copy_(torch.tensor([-1, -1, 2, 1, 0, 0, 0, 0]))
    state.thresholds[:4].copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensors = inputs(random)
    compiled_state, compiled_tensors = state.clone(), [x.clone() for x in tensors]
    if grad:
        for x in (tensors[0], compiled_tensors[0]):
            x.requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(3):
        expected = step(state, tensors, impl)
        got = compiled(compiled_state, compiled_tensors, impl)
        for x, y in zip((*expected, *tensors), (*got, *compiled_tensors), strict=True):
            assert torch.equal(x, y)
        assert not any(x.requires_grad for x in got)
        for name in ls.TENSORS:
            assert torch.equal(getattr(state, name), getattr(compiled_state, name)), name
    assert state.counters[ls.CACHED_STEPS] == 2


@pytest.mark.parametrize("impl", IMPLS)
def test_fake_tensors_give_fake_tensors(device, impl):
    with FakeTensorMode():
        make = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
        got = step(LaneState.allocate(4, device), inputs(make), impl)
    assert [tuple(x.shape) for x in got] == [(2, 1, 2), (2, 5, 3), (2, 4, 3)]


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_may_be_symbols(random, impl):
    compiled = torch.compile(probe_diff, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 7, 3000):
        args = [random(2, tokens, 3) for _ in range(3)]
        expected = probe_diff(*args, impl=impl)
        assert torch.equal(compiled(*args, impl=impl), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 40 GB that are quick to fill")
def test_offsets_may_pass_2_to_the_31(device):
    size = 2**31 + 4097
    h_in, h_fn, p_ref = (torch.zeros(1, size, dtype=torch.bfloat16, device=device) for _ in "abc")
    h_fn[0, -1] = 2
    p_ref[0, -1] = 1
    assert probe_diff(h_in, h_fn, p_ref, impl="triton").sum((0, 1)).tolist() == [1.0, 1.0]
    state = LaneState.allocate(2, device)
    state.counters[ls.SLOT] = 1
    ring = torch.zeros(2, 1, size, dtype=torch.bfloat16, device=device)
    commit(h_in, h_in, h_fn, p_ref, ring, state.counters, impl="triton")
    assert p_ref[0, -1] == 0
    assert [ring[0].max().item(), ring[1, 0, -1].item()] == [0.0, 2.0]
    state.weights[1] = 3
    out, _ = predict(h_fn, ring, state.weights, impl="triton")
    assert out[0, -1] == 8
