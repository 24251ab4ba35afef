import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.lane_state import BatchReduce, LaneState, PlanCode, Reason
from dbcache.kernels.decision import probe_and_decide as module
from dbcache.kernels.decision.decide import decide
from dbcache.kernels.decision.probe_and_decide import probe_and_decide
from dbcache.kernels.decision.probe_diff import BLOCK, probe_diff

# the interpreter divides with NumPy, which warns of what the tests do on purpose
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in divide:RuntimeWarning")

IMPLS = ["triton", "reference"]
INTERPRETED = not torch.cuda.is_available()


def lane(device, steps=8, threshold=0.5, batch_reduce=BatchReduce.MEAN):
    """Return the state of a lane after its first, full step."""
    state = LaneState.allocate(steps, device)
    state.plan[0] = PlanCode.WARMUP
    state.limits.copy_(torch.tensor([-1, -1, 3, 2, 1, batch_reduce, 0, 0]))
    state.thresholds[:4].copy_(torch.tensor([threshold, 0.0, 0.6, 0.0]))
    decide(state, None)
    return state


def assert_same_bits(a, b):
    for name in ls.TENSORS:
        x, y = (getattr(state, name) for state in (a, b))
        if x.is_floating_point():  # all NaN are one
            x, y = (torch.where(t.isnan(), torch.nan, t).view(torch.int32) for t in (x, y))
        assert torch.equal(x, y), f"{name} differs: {x.tolist()} and {y.tolist()}"


def reasons(state):
    return [Reason(r).name for r in state.trace_reason.tolist() if r >= 0]


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape", [(1,), (2, 17, 5), (1, BLOCK + 1), (3, 2 * BLOCK), (5, 7)], ids=str
)
@pytest.mark.parametrize("batch_reduce", BatchReduce)
def test_does_what_two_launches_do_bit_for_bit(random, device, shape, batch_reduce, impl):
    one, two = (lane(device, batch_reduce=batch_reduce) for _ in range(2))
    p_ref = random(*shape)
    for step in range(1, 8):
        h_in = random(*shape)
        h_fn = h_in + p_ref + (0.3 + 0.2 * (step % 3)) * random(*shape)
        probe_and_decide(h_in, h_fn, p_ref, one, impl=impl)
        decide(two, probe_diff(h_in, h_fn, p_ref, impl=impl), impl=impl)
        assert_same_bits(one, two)
        assert one.counters[ls.TICKET] == 0
    assert one.counters[ls.STEP] == 8


@given(
    batch=st.integers(1, 5),
    size=st.integers(1, 5000),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    scale=st.sampled_from([0.0, 0.1, 0.4, 1.0, float("nan"), float("inf")]),
    hidden=st.booleans(),
    by_token=st.booleans(),
    batch_reduce=st.sampled_from(BatchReduce),
)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_any_shape_decides_as_two_launches_do(
    batch, size, dtype, scale, hidden, by_token, batch_reduce
):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(size)
    h_in, p_ref, noise = (
        torch.randn(batch, *((5, size // 5 + 1) if by_token else (size,)), generator=generator).to(
            device, dtype
        )
        for _ in range(3)
    )
    h_fn = h_in + p_ref
    h_fn[-1] += scale * noise[-1]
    start = None if hidden else h_in
    one, two = (lane(device, batch_reduce=batch_reduce) for _ in range(2))
    probe_and_decide(start, h_fn, p_ref, one, by_token=by_token, impl="triton")
    thresholds = two.thresholds if by_token else None
    decide(two, probe_diff(start, h_fn, p_ref, thresholds, impl="triton"), impl="triton")
    assert_same_bits(one, two)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_threshold_set_on_the_device_counts_from_the_next_step(random, device, impl):
    state = lane(device, threshold=0.5)
    h_in, p_ref = random(2, 9, 5), random(2, 9, 5)
    h_fn = h_in + 1.3 * p_ref
    probe_and_decide(h_in, h_fn, p_ref, state, impl=impl)
    state.thresholds[ls.THRESHOLD] = 0.2
    probe_and_decide(h_in, h_fn, p_ref, state, impl=impl)
    assert reasons(state) == ["WARMUP", "BELOW_THRESHOLD", "ABOVE_THRESHOLD"]
    assert state.trace_diff[1:3].tolist() == pytest.approx([0.3, 0.3], rel=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_worst_sample_decides_if_asked_to(random, device, impl):
    h_in, p_ref = random(3, 9, 5), random(3, 9, 5)
    h_fn = h_in + p_ref
    h_fn[1] += p_ref[1]
    for batch_reduce, reason in zip(BatchReduce, ("BELOW", "ABOVE"), strict=True):
        state = lane(device, threshold=0.6, batch_reduce=batch_reduce)
        probe_and_decide(h_in, h_fn, p_ref, state, impl=impl)
        assert reasons(state)[1] == f"{reason}_THRESHOLD"
    assert state.trace_diff[1].item() == pytest.approx(1.0, rel=1e-5)
    h_fn[0, 0, 0] = float("nan")
    probe_and_decide(h_in, h_fn, p_ref, state, impl=impl)
    assert reasons(state)[2] == "NAN"


@pytest.mark.parametrize("impl", IMPLS)
def test_important_tokens_decide_alone(random, device, impl):
    p_ref = random(2, 9, 5)
    h_fn = 1.1 * p_ref
    h_fn[1, 4] = 2 * p_ref[1, 4]
    state = lane(device)
    probe_and_decide(None, h_fn, p_ref, state, by_token=True, impl=impl)
    state.thresholds[ls.IMPORTANT] = 1.5
    probe_and_decide(None, h_fn, p_ref, state, by_token=True, impl=impl)
    assert reasons(state) == ["WARMUP", "ABOVE_THRESHOLD", "BELOW_THRESHOLD"]
    assert state.trace_diff[1].item() == pytest.approx(1.0, rel=1e-5)
    assert 0.1 < state.trace_diff[2] < 0.3


def test_steps_that_the_plan_fixes_do_not_look_at_the_measurement(random, device):
    h_in, h_fn, p_ref = (random(2, 9, 5) for _ in range(3))
    for impl in IMPLS:
        state = lane(device)
        state.plan[1], state.plan[2] = PlanCode.STATIC, PlanCode.MASK
        for _ in range(2):
            probe_and_decide(h_in, h_fn, p_ref, state, impl=impl)
        assert reasons(state) == ["WARMUP", "STATIC", "MASK"]
        assert state.trace_diff.tolist() == [-1.0] * 8


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter lets a test choose the order")
def test_the_order_in_which_programs_finish_changes_no_bit(random, device, monkeypatch):
    builder = triton.runtime.interpreter.interpreter_builder
    plain = builder.set_grid_idx
    monkeypatch.setattr(module, "BLOCK", 32)
    monkeypatch.setattr("dbcache.kernels.common.sums.BLOCK", 32)
    h_in, p_ref = random(3, 7, 23), random(3, 7, 23)
    h_fn = h_in + p_ref + 0.5 * random(3, 7, 23)
    orders = {
        "as launched": lambda x, y, width, height: (x, y),
        "backwards": lambda x, y, width, height: (width - 1 - x, height - 1 - y),
        "scattered": lambda x, y, width, height: ((5 * x + 2) % width, (y + x) % height),
    }
    states = []
    for order in orders.values():

        def permuted(x, y, z, order=order):
            width, height, _ = builder.grid_dim
            plain(*order(x, y, width, height), z)

        state = lane(device)
        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", permuted)
            probe_and_decide(h_in, h_fn, p_ref, state, impl="triton")
        assert builder.grid_dim[:2] == (6, 3)
        states.append(state)
    for state in states[1:]:
        assert_same_bits(states[0], state)
    assert states[0].values[ls.DIFF] > 0


def test_repeated_runs_give_the_same_bits(random, device):
    h_in, h_fn, p_ref = (random(2, 3, 3001) for _ in range(3))
    first = lane(device)
    probe_and_decide(h_in, h_fn, p_ref, first, impl="triton")
    for _ in range(5 if INTERPRETED else 200):
        again = lane(device)
        probe_and_decide(h_in, h_fn, p_ref, again, impl="triton")
        assert_same_bits(first, again)


def test_dbprune_takes_one_launch_per_block(random, device, monkeypatch):
    """Block input against the block input at its last computed step, each block with a lane."""
    launches = []
    plain = module._probe_and_decide_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return plain[grid]

    monkeypatch.setattr(module, "_probe_and_decide_kernel", Counted())
    blocks, threshold = 3, 0.1
    weights = [random(8, 8) * 0.05 for _ in range(blocks)]
    lanes = [LaneState.allocate(6, device) for _ in range(blocks)]
    for state in lanes:
        state.thresholds[ls.THRESHOLD] = threshold
    inputs = [torch.empty(2, 5, 8, device=device) for _ in range(blocks)]
    residuals: list[torch.Tensor] = [torch.empty(0)] * blocks
    x, computed, expected = random(2, 5, 8), [], []
    for step in range(6):
        h = x + 0.03 * step * x.flip(0)
        for index in range(blocks):
            if step:
                change = (h - inputs[index]).abs().sum() / inputs[index].abs().sum()
                expected.append(bool(change >= threshold))
            else:
                expected.append(True)
            probe_and_decide(None, h, inputs[index], lanes[index], impl="triton")
            computed.append(lanes[index].counters[ls.CACHED].item() == 0)
            if computed[-1]:
                inputs[index].copy_(h)
                residuals[index] = h @ weights[index]
            h = h + residuals[index]
    assert computed == expected
    assert 0 < sum(computed[blocks:]) < len(computed) - blocks
    assert len(launches) == 6 * blocks


def test_inputs_may_have_any_strides_and_offsets(random, device):
    h_in, h_fn = random(5, 17, 3).permute(2, 1, 0), random(3, 17, 10)[..., ::2]
    p_ref = random(1, 1, 5).expand(3, 17, 5)
    one, two = lane(device), lane(device)
    probe_and_decide(h_in, h_fn, p_ref, one, impl="triton")
    probe_and_decide(
        h_in.contiguous(), h_fn.contiguous(), p_ref.contiguous(), two, impl="triton"
    )  # fmt: skip
    assert_same_bits(one, two)


def test_rejects_what_does_not_fit():
    x, state = torch.zeros(2, 3), LaneState.allocate(1, "cpu")
    with pytest.raises(ValueError, match=r"probe_and_decide: .*share a shape, .* and \(3,\)"):
        probe_and_decide(x, x, torch.zeros(3), state)
    with pytest.raises(ValueError, match=r"got torch.float32 and torch.float16"):
        probe_and_decide(x, x.half(), x, state)
    with pytest.raises(ValueError, match="h_fn and state must be on one device, got meta and cpu"):
        probe_and_decide(None, x.to("meta"), x.to("meta"), state)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("hidden", [False, True])
def test_the_op_is_registered_as_it_behaves(random, device, hidden, impl):
    state = lane(device)
    h_in, h_fn, p_ref = (random(2, 3, 5) for _ in range(3))
    args = (None if hidden else h_in, h_fn, p_ref, *state.tensors(), hidden, impl)
    torch.library.opcheck(torch.ops.dbcache.probe_and_decide.default, args)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(random, device, backend, impl):
    h_in, p_ref = random(2, 3, 5), random(2, 3, 5)
    h_fn = h_in + 1.2 * p_ref
    plain, compiled = lane(device), lane(device)

    def step(state):
        probe_and_decide(h_in, h_fn, p_ref, state, impl=impl)
        return state.weights * 2

    torch.compiler.reset()
    run = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(3):
        assert torch.equal(step(plain), run(compiled))
        assert_same_bits(plain, compiled)
    assert plain.counters[ls.CACHED_STEPS] == 3
