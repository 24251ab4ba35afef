"""Lanes by themselves: the verbs of a step, where predictions are written, what lanes share."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dbcache
from dbcache import (
    CalibratorConfig,
    CustomCalibratorConfig,
    DBCacheConfig,
    TaylorSeerCalibratorConfig,
)
from dbcache.config.cache import StackSettings
from dbcache.lanes import lane as lanes
from dbcache.lanes.buffers import layout_of
from dbcache.lanes.lane import Lane

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CONFIG = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.3}
DTYPES = [torch.float32, torch.bfloat16]


def settings(calibrator=None, **options):
    calibrator = calibrator or TaylorSeerCalibratorConfig(taylorseer_order=1)
    return StackSettings(DBCacheConfig(**CONFIG | options), calibrator)


def noise(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def full_step(lane, seed, dtype=torch.float32, tokens=6):
    """Run a full step of a hidden and an encoder stream."""
    h, encoder = (
        noise(2, tokens, 8, seed=seed, dtype=dtype),
        noise(2, 3, 8, seed=-seed, dtype=dtype),
    )
    code = lane.begin(layout_of(h, encoder), CPU)
    if not hasattr(lane.steps, "leader"):
        lane.decide(None)
    assert not lane.settle(code)
    lane.commit(h, 2 * h, 3 * h, encoder, 2 * encoder)


def lane_with_history(dtype, **options):
    lane = Lane(settings(**options), CPU)
    for seed in (1, 2):
        full_step(lane, seed, dtype)
    lane.state.weights[:2] = torch.tensor([2.0, -1.0])
    lane.state.encoder_weights[:2] = torch.tensor([-0.5, 1.5])
    return lane


def apart(h, encoder):
    return torch.empty_like(h), torch.empty_like(encoder)


def in_place(h, encoder):
    return h, encoder


def strided(h, encoder):
    return h.new_empty(2, 8, 6).mT, encoder.new_empty(2, 3, 16)[..., ::2]


def of_another_dtype(h, encoder):
    return h.double(), encoder.double()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["contiguous", "transposed", "with gradients", "no encoder"])
def test_reused_residuals_are_added_as_the_kernel_adds_them(dtype, form):
    lane = Lane(StackSettings(DBCacheConfig(**CONFIG), CalibratorConfig()), CPU)
    full_step(lane, 1, dtype)
    lane.state.weights[0] = lane.state.encoder_weights[0] = 1.0  # as `decide` leaves them
    h, encoder = noise(2, 6, 8, seed=3, dtype=dtype), noise(2, 3, 8, seed=4, dtype=dtype)
    if form == "transposed":
        h = h.mT.contiguous().mT
    elif form == "with gradients":
        h.requires_grad_()
    elif form == "no encoder":
        encoder = None
    with torch.set_grad_enabled(form == "with gradients"):
        made = lane.predict(h, encoder)
    lane.reuses = False
    with torch.no_grad():
        expected = lane.predict(h, encoder)
    for x, y, given in zip(made, expected, (h, encoder), strict=True):
        assert (x is None) == (y is None) == (given is None)
        if x is not None:
            assert x.is_contiguous()
            assert not x.requires_grad
            assert x.dtype is dtype
            assert torch.equal(x, y)
    ring = weakref.ref(lane.history.snapshots)
    full_step(lane, 2, dtype, tokens=5)  # another shape: other residuals
    assert ring() is None, "nothing holds the former ones"
    h = noise(2, 5, 8, seed=5, dtype=dtype)
    again = lane.predict(h, None)[0]
    lane.reuses = True
    with torch.no_grad():
        assert torch.equal(lane.predict(h, None)[0], again)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", ["model", "float32", "fp8"])
@pytest.mark.parametrize(
    "outputs", [apart, in_place, strided, of_another_dtype], ids=lambda f: f.__name__
)
def test_predictions_written_into_a_tensor_are_those_returned(dtype, cache_dtype, outputs):
    lane = lane_with_history(dtype, cache_dtype=cache_dtype)
    h, encoder = noise(2, 6, 8, seed=3, dtype=dtype), noise(2, 3, 8, seed=4, dtype=dtype)
    expected = lane.predict(h, encoder)
    out, encoder_out = outputs(h, encoder)
    written = lane.predict(h, encoder, out=out, encoder_out=encoder_out)
    assert written[0] is out
    assert written[1] is encoder_out
    assert torch.equal(out, expected[0].to(out.dtype))
    assert torch.equal(encoder_out, expected[1].to(out.dtype))


def asked_of_the_kernel(monkeypatch):
    """Return a list that collects the outputs that the kernel is given."""
    given, predict = [], lanes.predict

    def watched(*args, out, encoder_out, **options):
        given.append((out, encoder_out))
        return predict(*args, out=out, encoder_out=encoder_out, **options)

    monkeypatch.setattr(lanes, "predict", watched)
    return given


@pytest.mark.parametrize("outputs", [apart, in_place], ids=lambda f: f.__name__)
def test_the_kernel_writes_where_it_may_without_a_copy(monkeypatch, outputs):
    lane, given = lane_with_history(torch.float32), asked_of_the_kernel(monkeypatch)
    h, encoder = noise(2, 6, 8, seed=3), noise(2, 3, 8, seed=4)
    out, encoder_out = outputs(h, encoder)
    lane.predict(h, encoder, out=out, encoder_out=encoder_out)
    ((kernels_out, kernels_encoder_out),) = given
    assert kernels_out is out
    assert kernels_encoder_out is encoder_out


def test_the_kernel_never_writes_over_what_it_still_reads(monkeypatch):
    """Streams as views of one tensor: the outputs lie over inputs, a few tokens further on."""
    lane, given = lane_with_history(torch.float32), asked_of_the_kernel(monkeypatch)
    memory = noise(400, seed=5)
    h, encoder = memory[48:144].view(2, 6, 8), memory[:48].view(2, 3, 8)
    places = {
        "over its own input, shifted": (memory[56:152], memory[200:248]),
        "over the other input": (memory[40:136], memory[200:248]),
        "the encoder's over the hidden states": (memory[200:296], memory[96:144]),
        "over one another": (memory[200:296], memory[250:298]),
    }
    expected = lane.predict(h, encoder)
    for where, (out, encoder_out) in places.items():
        before, out, encoder_out = memory.clone(), out.view(2, 6, 8), encoder_out.view(2, 3, 8)
        given.clear()
        lane.predict(h, encoder, out=out, encoder_out=encoder_out)
        (kernels,) = given
        assert None in kernels, where
        assert torch.equal(encoder_out, expected[1]), where
        if where != "over one another":
            assert torch.equal(out, expected[0]), where
        memory.copy_(before)


@pytest.mark.parametrize("moment", ["a change of shape", "a step left out"])
def test_a_follower_and_its_leader_predict_from_the_same_steps(moment):
    """Both start anew in the same step, also on the host, which tells a predictor of the user."""
    seen = []

    @dbcache.register_predictor("last of what is seen", snapshots=2)
    def last(steps, step):
        seen.append((steps, step))
        return [1.0]

    given = settings(CustomCalibratorConfig(predictor_name="last of what is seen"))
    leader = Lane(given, CPU)
    follower = Lane(given, CPU, leader=leader)
    changes = moment == "a change of shape"
    for step in range(5):
        full_step(leader, step + 1)
        if changes or step != 2:
            full_step(follower, step + 1, tokens=4 if changes and step >= 3 else 6)
        # step 3 finds no fit here, so that step 4 is the first one of both
    encoder = noise(2, 3, 8, seed=9)
    leader.predict(noise(2, 6, 8, seed=9), encoder)
    follower.predict(noise(2, 4 if changes else 6, 8, seed=9), encoder)
    assert seen == [((4,), 4), ((4,), 4)]


def run(lane, seed):
    """Return decisions and predictions of a few steps on tensors of its own."""
    decisions, predictions = [], []
    h, drift = noise(2, 6, 8, seed=seed), 0.05 * noise(2, 6, 8, seed=seed + 1)
    for step in range(12):
        h_in, h_fn = h + step * drift, (h + step * drift).sin()
        code = lane.begin(layout_of(h_fn, None), CPU)
        lane.measure_and_decide(h_in, h_fn)
        decisions.append(lane.settle(code))
        if decisions[-1]:
            predictions.append(lane.predict(h_fn, None)[0])
        else:
            lane.commit(h_in, h_fn, h_fn.cos(), None, None)
        yield
    yield decisions, predictions


def steps_of(lane, seed):
    return [*run(lane, seed)][-1]


def same(one, other):
    return one[0] == other[0] and all(map(torch.equal, one[1], other[1]))


def test_lanes_of_two_requests_share_nothing():
    """Step by step in turn, and each on a thread of its own, they do what each does alone."""
    alone = [steps_of(Lane(settings(), CPU), seed) for seed in (1, 10)]
    assert all(True in decisions[2:] and False in decisions[2:] for decisions, _ in alone)
    both = [Lane(settings(), CPU) for _ in alone]
    *_, in_turn = zip(run(both[0], 1), run(both[1], 10), strict=True)
    assert all(map(same, in_turn, alone))
    kept = [{x.data_ptr() for x in held(lane)} for lane in both]
    assert not kept[0] & kept[1]
    with ThreadPoolExecutor(2) as pool:
        on_threads = pool.map(steps_of, [Lane(settings(), CPU) for _ in alone], (1, 10))
        assert all(map(same, on_threads, alone))


def held(lane):
    return [x for x in lane.tensors() if x is not None]
