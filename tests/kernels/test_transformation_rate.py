import pytest
import torch

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import LaneState
from dbcache.kernels.common.sums import MAX_PARTIALS
from dbcache.kernels.decision.probe_diff import probe_diff
from dbcache.kernels.decision.transformation_rate import transformation_rate

# the interpreter divides with NumPy, which warns of what the tests do on purpose
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in divide:RuntimeWarning")

IMPLS = ["triton", "reference"]


def rate_of(output_partials, input_partials, impl, before=ls.ONE_OUTPUT, cached=0):
    """Return the rate after a step, given the one before; nothing else of the state changes."""
    state = LaneState.allocate(1, output_partials.device)
    assert state.values[ls.RATE] == ls.NO_OUTPUT
    state.values[ls.RATE], state.counters[ls.CACHED] = before, cached
    old = state.clone()
    transformation_rate(state, output_partials, input_partials, impl=impl)
    assert torch.equal(state.values[: ls.RATE], old.values[: ls.RATE])
    assert torch.equal(state.counters, old.counters)
    return state.values[ls.RATE].item()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shapes", [((1, 5), (1, 5)), ((2, 17, 96), (2, 3, 5)), ((3, 2049), (3, 7))]
)
def test_is_the_relative_movement_per_movement(random, shapes, impl):
    (v_before, v), (x_before, x) = ([random(*shape) for _ in range(2)] for shape in shapes)
    outputs = probe_diff(None, v_before, v, impl=impl)
    inputs = probe_diff(None, x_before, x, impl=impl)
    moved_out, moved_in = ((a.double() - b).abs().sum() for a, b in ((v, v_before), (x, x_before)))
    expected = moved_out / moved_in / v.double().abs().sum()
    assert rate_of(outputs, inputs, impl) == pytest.approx(expected.item(), rel=2e-6)


@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (1, 300), (MAX_PARTIALS, 2)])
@pytest.mark.parametrize("samples", [1, 3])
def test_both_implementations_agree_bit_for_bit(device, sizes, samples):
    generator = torch.Generator().manual_seed(sum(sizes))
    partials = [
        torch.rand(samples, size, 2, generator=generator).mul(1e5).to(device) for size in sizes
    ]
    assert rate_of(*partials, "triton") == rate_of(*partials, "reference")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("noise", [4.0, 0.0, float("nan"), float("inf")])
def test_the_first_full_step_of_all_has_no_rate(device, noise, impl):
    """What the sums are made of then lay in memory by chance, and must not matter."""
    outputs, inputs = (torch.full((2, 3, 2), noise, device=device) for _ in range(2))
    assert rate_of(outputs, inputs, impl, before=ls.NO_OUTPUT) == ls.ONE_OUTPUT


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("before", [ls.NO_OUTPUT, ls.ONE_OUTPUT, 0.0, 0.25, float("inf")])
def test_a_cached_step_leaves_the_rate_alone(device, before, impl):
    partials = torch.full((1, 2, 2), 3.0, device=device)
    assert rate_of(partials, partials, impl, before=before, cached=1) == before


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("before", [ls.ONE_OUTPUT, 0.0, 0.25, float("inf"), float("nan")])
def test_a_later_full_step_has_a_new_rate_whatever_the_last_one_was(device, before, impl):
    outputs = torch.tensor([[[1.0, 2.0]]], device=device)
    inputs = torch.tensor([[[4.0, 9.0]]], device=device)
    assert rate_of(outputs, inputs, impl, before=before) == 0.125


@pytest.mark.parametrize(
    ("moved_out", "size", "moved_in", "expected"),
    [
        (1.0, 2.0, 0.0, float("inf")),
        (0.0, 2.0, 0.0, None),
        (0.0, 2.0, 4.0, 0.0),
        (1.0, 0.0, 4.0, float("inf")),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_that_moved_is_defined(device, moved_out, size, moved_in, expected, impl):
    outputs = torch.tensor([[[moved_out, size]]], device=device)
    inputs = torch.tensor([[[moved_in, 9.0]]], device=device)
    rate = rate_of(outputs, inputs, impl)
    assert rate != rate if expected is None else rate == expected


def test_rejects_what_does_not_fit():
    state, partials = LaneState.allocate(1, "cpu"), torch.ones(1, 1, 2)
    for bad in (
        torch.ones(1, 2),
        torch.ones(1, 1, 4),
        torch.ones(1, MAX_PARTIALS + 1, 2),
        partials.double(),
        partials.to("meta"),
    ):
        with pytest.raises(ValueError, match=r"partials must be (\(B, T, 2\)|float32 on)"):
            transformation_rate(state, partials, bad)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_op_is_registered_as_it_behaves(device, impl):
    state, partials = LaneState.allocate(1, device), torch.rand(2, 3, 2, device=device)
    op = torch.ops.dbcache.transformation_rate.default
    for _ in range(2):
        torch.library.opcheck(op, (*state.tensors(), partials, partials * 2, impl))
        state.values[ls.RATE] = ls.ONE_OUTPUT


@pytest.mark.parametrize("impl", IMPLS)
def test_it_compiles_without_graph_breaks(device, impl):
    state, partials = LaneState.allocate(1, device), torch.ones(1, 2, 2, device=device)

    @torch.compile(fullgraph=True, backend="eager")
    def run(partials):
        transformation_rate(state, partials, partials, impl=impl)
        return partials + 1

    run(partials)
    assert state.values[ls.RATE] == ls.ONE_OUTPUT
    run(partials)
    assert state.values[ls.RATE] == 0.5
