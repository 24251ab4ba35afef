import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.pruning import block_state as bs
from dbcache.kernels.pruning.decide_tail import decide_tail

IMPLS = ["triton", "reference"]
NAN = math.nan
STALE = 77


def run(impl, device, *, cached, step, stored, decisions):
    """Decide on poisoned outputs; return the flags, DUE and STAMP, and check that EVERY stays."""
    counters = torch.full((ls.NUM_COUNTERS,), STALE, dtype=torch.int32, device=device)
    counters[ls.CACHED], counters[ls.STEP] = cached, step + 1
    blocks = 3 if decisions is None else len(decisions)
    flags = torch.full((blocks,), STALE, dtype=torch.int32, device=device)
    store = torch.full((bs.NUM_STORE,), STALE, dtype=torch.int32, device=device)
    store[bs.STAMP] = stored
    before = counters.clone()
    pairs = None if decisions is None else torch.tensor(decisions, device=device)
    decide_tail(counters, pairs, flags, store, impl=impl)
    assert torch.equal(counters, before)
    assert store[bs.EVERY].item() == STALE
    return flags.tolist(), store[bs.DUE].item(), store[bs.STAMP].item()


PAIRS = [(0.05, 1.0), (0.2, 0.0), (NAN, 0.0), (0.01, 1.0)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("cached", "stored", "decisions", "expected"),
    [
        (0, -1, None, ([0, 0, 0], 1, 7)),
        (0, 0, None, ([0, 0, 0], 2, 7)),
        (0, 3, PAIRS, ([0, 0, 0, 0], 2, 7)),
        (1, 3, PAIRS, ([1, 0, 0, 1], 0, 3)),
        (1, 0, PAIRS[:1], ([1], 0, 0)),
        (1, -1, PAIRS, ([0, 0, 0, 0], 0, -1)),
        (1, 3, None, ([0, 0, 0], 0, 3)),
    ],
    ids=["first", "again", "full", "cached", "one block", "nothing stored", "nothing measured"],
)
def test_full_steps_store_and_cached_ones_leave_out(
    device, impl, cached, stored, decisions, expected
):
    got = run(impl, device, cached=cached, step=7, stored=stored, decisions=decisions)
    assert got == expected


@given(
    seed=st.integers(0, 2**16),
    blocks=st.integers(1, 70),
    cached=st.integers(0, 1),
    stored=st.integers(-1, 5),
    measured=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_triton_decides_bit_for_bit_as_python(seed, blocks, cached, stored, measured):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(2, (blocks, 2), generator=generator).float().tolist()
    ours, theirs = (
        run(
            impl,
            device,
            cached=cached,
            step=seed,
            stored=stored,
            decisions=pairs if measured else None,
        )
        for impl in IMPLS
    )
    assert ours == theirs
    assert any(ours[0]) == bool(cached and stored >= 0 and measured and any(x for _, x in pairs))


def fitting(device):
    like = {"dtype": torch.int32, "device": device}
    flags, store = torch.zeros(2, **like), torch.zeros(bs.NUM_STORE, **like)
    return torch.zeros(ls.NUM_COUNTERS, **like), torch.ones(2, 2, device=device), flags, store


def test_rejects_what_does_not_fit(device):
    for position, name, wrong in (
        (0, "counters", torch.zeros(3, dtype=torch.int32)),
        (1, "decisions", torch.zeros(3, 2)),
        (1, "decisions", torch.zeros(2, 2, dtype=torch.float64)),
        (2, "flags", torch.zeros(2)),
        (3, "store", torch.zeros(bs.NUM_STORE)),
    ):
        args = list(fitting(device))
        args[position] = wrong.to(device)
        with pytest.raises(ValueError, match=f"decide_tail: {name} must be"):
            decide_tail(*args)
    counters, decisions, *rest = fitting(device)
    with pytest.raises(ValueError, match=r"decisions must be .* on"):
        decide_tail(counters, decisions.to("meta"), *rest)


def test_is_registered_with_a_fake(device):
    counters, decisions, flags, store = fitting(device)
    for impl in IMPLS:
        for given_decisions in (None, decisions):
            op = torch.ops.dbcache.decide_tail.default
            torch.library.opcheck(op, (counters, given_decisions, flags, store, impl))
