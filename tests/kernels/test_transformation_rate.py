import pytest
import torch

from dbcache.kernels import lane_state as ls
from dbcache.kernels.lane_state import LaneState
from dbcache.kernels.probe_diff import MAX_PARTIALS, probe_diff
from dbcache.kernels.transformation_rate import transformation_rate

# the interpreter divides with NumPy, which warns of what the tests do on purpose
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in divide:RuntimeWarning")

IMPLS = ["triton", "reference"]


def rate_of(output_partials, input_partials, impl):
    values = LaneState.allocate(1, output_partials.device).values
    assert values[ls.RATE] == -1
    before = values.clone()
    transformation_rate(values, output_partials, input_partials, impl=impl)
    assert torch.equal(values[: ls.RATE], before[: ls.RATE])
    return values[ls.RATE].item()


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


@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (1, 300), (1024, 2)])
@pytest.mark.parametrize("samples", [1, 3])
def test_both_implementations_agree_bit_for_bit(device, sizes, samples):
    generator = torch.Generator().manual_seed(sum(sizes))
    partials = [
        torch.rand(samples, size, 2, generator=generator).mul(1e5).to(device) for size in sizes
    ]
    assert rate_of(*partials, "triton") == rate_of(*partials, "reference")


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
    values, partials = LaneState.allocate(1, "cpu").values, torch.ones(1, 1, 2)
    with pytest.raises(ValueError, match=r"values must be float32 \(19,\), got torch.float32 and"):
        transformation_rate(values[:3], partials, partials)
    for bad in (
        torch.ones(1, 2),
        torch.ones(1, 1, 4),
        torch.ones(1, MAX_PARTIALS + 1, 2),
        partials.double(),
        partials.to("meta"),
    ):
        with pytest.raises(ValueError, match=r"partials must be float32 \(B, T, 2\)"):
            transformation_rate(values, partials, bad)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_op_is_registered_as_it_behaves(device, impl):
    values, partials = LaneState.allocate(1, device).values, torch.rand(2, 3, 2, device=device)
    op = torch.ops.dbcache.transformation_rate.default
    torch.library.opcheck(op, (values, partials, partials.clone(), impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_it_compiles_without_graph_breaks(device, impl):
    values, partials = LaneState.allocate(1, device).values, torch.ones(1, 2, 2, device=device)

    @torch.compile(fullgraph=True, backend="eager")
    def run(values):
        transformation_rate(values, partials, partials, impl=impl)
        return values

    assert run(values)[ls.RATE] == 0.5
