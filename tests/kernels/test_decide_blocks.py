import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.block_state import BlockState
from dbcache.kernels.pruning.decide_blocks import choose_blocks, decide_blocks

# the interpreter computes with NumPy, which warns of what the tests do on purpose
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

IMPLS = ["triton", "reference"]
INF, NAN = math.inf, math.nan


def rule_of(threshold=0.1, relax=0.0, most=0.0, worst=0.0):
    rule = [0.0] * bs.NUM_RULE
    rule[bs.THRESHOLD], rule[bs.RELAX] = threshold, relax
    rule[bs.MAX_RELAXED], rule[bs.WORST_SAMPLE] = most, worst
    return rule


def skipped(measured, growth=None, prunable=None, **rule):
    pairs = choose_blocks(
        measured, growth or [1.0] * len(measured), prunable or [1] * len(measured), rule_of(**rule)
    )
    return "".join("p" if skips else "C" for _, skips in pairs)


def test_traces_worked_out_by_hand():
    assert skipped([0.05, 0.2, 0.09, 0.1]) == "pCpC"
    # a block that runs lets the change grow: 0.09 * 1.2 is not below 0.1
    assert skipped([0.05, 0.2, 0.09], [3.0, 1.2, 3.0]) == "pCC"
    # one that is left out does not
    assert skipped([0.05, 0.09, 0.09], [3.0, 1.2, 3.0]) == "ppp"
    assert skipped([0.05, 0.09, 0.04], [3.0, 3.0, 3.0], [1, 0, 1]) == "pCC"
    assert skipped([0.05, NAN, 0.05], [1.0, NAN, 1.0]) == "pCC"
    assert skipped([0.0, 5.0], threshold=1.0) == "pp"
    assert skipped([NAN, 5.0], threshold=1.0) == "Cp"
    assert skipped([0.0, 0.0], threshold=0.0) == "CC"


def test_rising_thresholds_worked_out_by_hand():
    rising = {"relax": 1.25, "most": 0.2}
    # the first has none before it; then 0.12 * 1.25 = 0.15
    assert skipped([0.12, 0.14, 0.17], **rising) == "CpC"
    # means of 0.17 and less rise to 0.2 or more: the threshold itself holds
    assert skipped([0.17, 0.14], **rising) == "CC"
    # it does not fall below the threshold
    assert skipped([0.02, 0.09], **rising) == "pp"
    # only the first five count: 0.1 * 1.25, whatever comes after
    assert skipped([0.1] * 5 + [0.01] * 5 + [0.12], **rising) == "C" + "p" * 10
    # those of 0 take a place and do not count
    assert skipped([0.0, 0.12, 0.149], **rising) == "pCp"
    # blocks that always run are not compared
    assert skipped([0.02, 0.14, 0.14], prunable=[0, 1, 1], **rising) == "CCp"


def state_of(device, blocks, rule, growth, prunable, parts=1):
    h = torch.zeros(1, 1, device=device)
    state = BlockState.allocate(h, None, prunable, rule)
    state.growth_sums = torch.as_tensor(growth, device=device).reshape(blocks, parts, 2)
    state.decisions.fill_(float("nan"))
    state.changes.fill_(float("nan"))
    return state


NUMBERS = torch.tensor([0.0, 0.03, 0.0999, 0.1, 0.25, 1.0, 7.0, NAN, INF])


@given(
    seed=st.integers(0, 2**16),
    blocks=st.integers(1, 9),
    samples=st.integers(1, 3),
    parts=st.integers(1, 5),
    threshold=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    relax=st.sampled_from([0.0, 1.25]),
    most=st.sampled_from([0.2, 3.0]),
    worst=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_triton_decides_bit_for_bit_as_python(
    seed, blocks, samples, parts, threshold, relax, most, worst
):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        usual = 7 if seed % 2 else len(NUMBERS)  # half of them finite
        return NUMBERS[torch.randint(usual, shape, generator=generator)].to(device)

    partials, growth = draw(blocks, samples, parts, 2), draw(blocks, parts, 2)
    prunable = torch.randint(2, (blocks,), generator=generator).bool().tolist()
    rule, results = rule_of(threshold, relax, most, worst), []
    for impl in IMPLS:
        state = state_of(device, blocks, rule, growth, prunable, parts)
        for _ in range(2):  # the ticket is back at 0
            decide_blocks(partials, state, impl=impl)
        assert state.ticket.item() == 0
        bits = torch.cat([state.decisions, state.changes], 1)
        results.append(torch.where(bits.isnan(), NAN, bits).view(torch.int32))
    assert torch.equal(*results)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_worst_sample_counts_if_asked_to(device, impl):
    partials = torch.tensor([[[[0.1, 1.0]], [[0.9, 3.0]]]], device=device)
    for worst, expected in ((0.0, 0.25), (1.0, 0.3)):
        state = state_of(device, 1, rule_of(worst=worst), [[0.0, 0.0]], [True])
        decide_blocks(partials, state, impl=impl)
        assert state.decisions[0, 0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_many_programs_are_added_in_their_fixed_order(random, device, impl):
    partials = random(2, 1, 700, 2).abs()
    state = state_of(device, 2, rule_of(), random(2, 300, 2).abs(), [True, True], 300)
    decide_blocks(partials, state, impl=impl)
    num, den = partials.double().sum(2)[:, 0].unbind(-1)
    growth = state.growth_sums.double().sum(1)
    expected = torch.stack([num / den, growth[:, 0] / growth[:, 1]], -1)
    torch.testing.assert_close(state.changes.double(), expected, rtol=1e-5, atol=0)


def test_rejects_what_does_not_fit(device):
    state = state_of(device, 2, rule_of(), [[0.0, 0.0]] * 2, [True] * 2)
    for partials in (torch.zeros(3, 1, 1, 2), torch.zeros(2, 1, 2), torch.zeros(2, 1, 1, 4)):
        with pytest.raises(ValueError, match="partials must be"):
            decide_blocks(partials.to(device), state)
    with pytest.raises(ValueError, match="float32"):
        decide_blocks(torch.zeros(2, 1, 1, 2, dtype=torch.float64, device=device), state)


def test_is_registered_with_a_fake(device):
    state = state_of(device, 2, rule_of(), [[1.0, 2.0]] * 2, [True] * 2)
    partials = torch.ones(2, 1, 1, 2, device=device)
    tensors = [getattr(state, field.name) for field in fields(state)]
    for impl in IMPLS:
        op = torch.ops.dbcache.decide_blocks.default
        torch.library.opcheck(op, (partials, *tensors, impl))
