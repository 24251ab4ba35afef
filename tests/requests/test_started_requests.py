"""`dbcache.start_request`: requests that take steps in turn, each as if it were alone."""

import gc
import weakref

import pytest
import tiny
import torch
from together import FLUX, OPTIONS, euler, flat, in_threads, pattern, same

import dbcache
from dbcache import (
    DBCacheConfig,
    FoCaCalibratorConfig,
    HermiteCalibratorConfig,
    TaylorSeerCalibratorConfig,
)

TAYLOR = TaylorSeerCalibratorConfig(taylorseer_order=2)
NEWTON = TaylorSeerCalibratorConfig(taylorseer_order=2, exact=True)
HERMITE = HermiteCalibratorConfig(hermite_order=2)
FOCA = FoCaCalibratorConfig()
ENABLED = OPTIONS | {"residual_diff_threshold": 0.3}

# (steps, shape of the latents, predictor, options)
REQUESTS = [
    (9, (1, 16, 16), None, {}),
    (12, (1, 9, 16), NEWTON, {"residual_diff_threshold": 0.2}),
    (7, (1, 16, 16), HERMITE, {"max_warmup_steps": 4}),
    (10, (2, 16, 16), FOCA, {"residual_diff_threshold": 0.5}),
    (8, (1, 25, 16), None, {"max_continuous_cached_steps": 1, "residual_diff_threshold": 1.0}),
    (11, (1, 16, 16), NEWTON, {"steps_computation_mask": [1, 1, 1] + [0, 1] * 4}),
    (6, (1, 4, 16), HERMITE, {"max_cached_steps": 1, "residual_diff_threshold": 1.0}),
    (9, (2, 9, 16), None, {"warmup_interval": 2, "max_warmup_steps": 4}),
]


def enabled():
    return dbcache.enable(tiny.flux(), calibrator_config=TAYLOR, **ENABLED)


def begin(model, number):
    """Return one of the requests, and its loop."""
    steps, shape, predictor, options = REQUESTS[number]
    request = dbcache.start_request(model, None, predictor, num_inference_steps=steps, **options)
    loop = euler(model, steps, seed=number, shape=shape, inside=lambda _: request)
    return request, loop


@pytest.fixture(scope="module")
def alone():
    """Return outputs and decisions of each request on a model of its own."""
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DBCACHE_KERNELS", "reference")
        for number in range(len(REQUESTS)):
            request, loop = begin(enabled(), number)
            outputs = flat(loop)
            runs.append((outputs, pattern(request.summary())))
    assert all("c" in lanes[0] for _, lanes in runs)
    assert len({str(lanes) for _, lanes in runs}) > 5
    return runs


def take_turns(loops, join=lambda: None):
    """Take steps of loops, by name, in turn; return all outputs of each; `join` may add loops."""
    outputs = {name: [] for name in loops}
    while loops:
        join()
        for name, loop in list(loops.items()):
            step = next(loop, None)
            if step is None:
                del loops[name]
            else:
                outputs.setdefault(name, []).extend(step)
    return outputs


def test_eight_different_requests_in_turn_are_each_as_if_alone(alone):
    model = enabled()
    requests, loops = {}, {}
    for number in range(4):
        requests[number], loops[number] = begin(model, number)
    late = iter(range(4, len(REQUESTS)))

    def join():
        number = next(late, None)
        if number is not None:
            requests[number], loops[number] = begin(model, number)

    outputs = take_turns(loops, join)
    assert len(outputs) == len(REQUESTS)
    for number, request in requests.items():
        assert same(outputs[number], alone[number][0])
        assert pattern(request.summary()) == alone[number][1]
        request.close()
        assert pattern(request.summary()) == alone[number][1]
    assert dbcache.summary(model, logging=False).totals["requests"] == len(REQUESTS)


def test_requests_that_follow_one_another_reuse_buffers_and_nothing_else(alone):
    model = enabled()
    for number in [*range(len(REQUESTS)), *range(len(REQUESTS))]:
        request, loop = begin(model, number)
        assert same(flat(loop), alone[number][0])
        assert pattern(request.summary()) == alone[number][1]
        request.close()


def test_requests_may_be_stepped_by_any_thread(alone):
    model = enabled()
    requests = [begin(model, number) for number in range(4)]
    got = [[] for _ in requests]

    def work(number):
        step = next(requests[number][1], None)
        if step is not None:
            got[number].extend(step)

    for turn in range(12):
        in_threads([lambda n=n, t=turn: work((n + t) % 4) for n in range(4)])
    for number in range(4):
        assert same(got[number], alone[number][0])


def test_an_abandoned_request_is_freed_and_the_others_go_on(alone):
    model = enabled()
    request, loop = begin(model, 0)
    other, its_loop = begin(model, 1)
    (dropped,) = [weakref.ref(pair[1]) for pair in request._pairs]
    outputs = next(its_loop)
    next(loop), next(loop)
    lane = weakref.ref(next(iter(dropped().lane_set.runs[0].lanes.values())))
    assert lane().nbytes() > 0
    with_both = dbcache.summary(model, logging=False).nbytes
    del request, loop  # no circle holds it
    assert dropped() is None
    assert lane() is None
    assert 0 < dbcache.summary(model, logging=False).nbytes < with_both
    assert same(outputs + flat(its_loop), alone[1][0])
    other.close()


class MishapError(Exception):
    pass


def test_a_request_that_raises_inside_a_forward_disturbs_no_other(alone):
    model = enabled()
    loops = {number: begin(model, number)[1] for number in range(3)}
    outputs = {number: next(loop) + next(loop) for number, loop in loops.items()}
    request, loop = begin(model, 3)
    next(loop)

    def fail(*_):
        raise MishapError

    for block in (model.transformer_blocks[0], model.transformer_blocks[2], model.norm_out):
        hook = block.register_forward_hook(fail)
        arguments = FLUX.arguments(tiny.noise(2, 16, 16, seed=1), 0.9, "cond")
        with pytest.raises(MishapError), torch.no_grad(), request:
            model(**arguments)
        hook.remove()
    assert "transformer_blocks" not in model.__dict__
    for number, loop in loops.items():
        assert same(outputs[number] + flat(loop), alone[number][0])


def test_a_step_that_raised_before_its_decision_may_be_tried_again(alone):
    model = enabled()
    request = dbcache.start_request(model, num_inference_steps=9)
    mishaps = []

    def fail(*_):
        if len(mishaps) % 2 == 0:
            mishaps.append(1)
            raise MishapError
        mishaps.append(0)

    model.transformer_blocks[0].register_forward_hook(fail)
    x, got = tiny.noise(1, 16, 16, seed=0), []
    for step in range(9):
        for _ in range(2):
            try:
                with torch.no_grad(), request:
                    out = model(**FLUX.arguments(x, 1.0 - step / 9, "cond"))[0]
            except MishapError:
                continue
        got.append(out)
        x = x - out / 9
    assert same(got, alone[0][0])


def test_branches_have_lanes_of_their_own():
    model = dbcache.enable(tiny.flux(), **ENABLED)
    plain = flat(euler(tiny.flux(), 8, seed=3, branches=tiny.BRANCHES))
    request = dbcache.start_request(model, num_inference_steps=8)
    other = dbcache.start_request(model, num_inference_steps=8)

    def loop(request, order):
        return euler(model, 8, seed=3, branches=order, inside=request.branch)

    outputs = take_turns({0: loop(request, ("cond", "uncond")), 1: loop(other, ("cond",))})
    lanes = {lane.branch: lane for lane in request.summary().lanes}
    assert lanes.keys() == {"cond", "uncond"}
    assert all(lane.steps == 8 and lane.cached_steps for lane in lanes.values())
    assert [(lane.branch, lane.steps) for lane in other.summary().lanes] == [("cond", 8)]
    assert not same(outputs[0], plain)
    fresh = dbcache.enable(tiny.flux(), **ENABLED)
    one = dbcache.start_request(fresh, num_inference_steps=8)
    alone = euler(fresh, 8, seed=3, branches=("cond", "uncond"), inside=one.branch)
    assert same(outputs[0], flat(alone))


@torch.no_grad()
def test_a_name_that_comes_again_within_a_step_has_a_lane_of_its_own():
    """Tiles: each is named "cond" every time; each is cached as an image of its own would be."""
    tiles = 3
    fresh = [dbcache.enable(tiny.flux(), **ENABLED) for _ in range(tiles)]
    expected = []
    for seed, model in enumerate(fresh):
        request = dbcache.start_request(model, num_inference_steps=8)
        expected.append(flat(euler(model, 8, seed=seed, inside=request.branch)))
        assert "c" in pattern(request.summary())[0]
    model = dbcache.enable(tiny.flux(), **ENABLED)
    request = dbcache.start_request(model, num_inference_steps=8)
    loops = [euler(model, 8, seed=seed, inside=request.branch) for seed in range(tiles)]
    got = [[] for _ in loops]
    for _ in range(8):
        for own, loop in zip(got, loops, strict=True):
            own.extend(next(loop))
    assert [lane.steps for lane in request.summary().lanes] == [8] * tiles
    for own, its in zip(got, expected, strict=True):
        assert same(own, its)


def test_branches_without_names_are_told_by_their_place_in_the_step():
    model = dbcache.enable(tiny.flux(), **ENABLED)
    named = dbcache.start_request(model, num_inference_steps=8)
    expected = flat(euler(model, 8, seed=3, branches=tiny.BRANCHES, inside=named.branch))
    request = dbcache.start_request(model, num_inference_steps=8)
    got = flat(euler(model, 8, seed=3, branches=tiny.BRANCHES, inside=lambda _: request))
    assert pattern(request.summary()) == pattern(named.summary())
    assert same(got, expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"Fn_compute_blocks": 2}, "leave the blocks as they are, got Fn=2"),
        ({"Bn_compute_blocks": 1}, "leave the blocks as they are, got .*Bn=1"),
        ({"policy": "easycache"}, "another policy|leave the blocks"),
        ({"cache_dtype": "float8_e4m3fn"}, "cache_dtype"),
        ({"l1_hidden_states_diff_threshold": 0.1}, "way to compare"),
        ({"enable_taylorseer": True, "taylorseer_order": 1}, "number of snapshots"),
    ],
    ids=str,
)
def test_options_that_need_other_blocks_or_buffers_are_refused(options, reason):
    model = enabled()
    with pytest.raises(ValueError, match=reason):
        dbcache.start_request(model, **options)
    with pytest.raises(TypeError, match="residual_diff_threshhold"):
        dbcache.start_request(model, residual_diff_threshhold=0.1)
    assert inside_open(model) == 0


def inside_open(model):
    gc.collect()
    return len(vars(model)["_dbcache"]._open)


def test_options_of_one_request_leave_the_others_and_enable_alone():
    model = enabled()
    config = DBCacheConfig(residual_diff_threshold=0.0)
    one = dbcache.start_request(model, config, num_inference_steps=8)
    two = dbcache.start_request(model, num_inference_steps=8)
    for request in (one, two):
        flat(euler(model, 8, seed=0, inside=lambda _, r=request: r))
    assert pattern(one.summary()) == ["F" * 8]
    assert "c" in pattern(two.summary())[0]
    assert one.summary().lanes[0].threshold == 0.0
    assert two.summary().lanes[0].threshold == 0.3


def test_what_is_not_enabled_or_closed_or_too_much_is_an_error():
    model = tiny.flux()
    with pytest.raises(RuntimeError, match="start_request: the cache must be enabled"):
        dbcache.start_request(model)
    dbcache.enable(model, max_requests=2, **ENABLED)
    one, two = dbcache.start_request(model), dbcache.start_request(model)
    with pytest.raises(RuntimeError, match=r"2 requests open at once.*max_requests"):
        dbcache.start_request(model)
    one.close()
    one.close()
    for use in (one.__enter__, one.branch("cond").__enter__):
        with pytest.raises(RuntimeError, match="got one that was closed"):
            use()
    assert one.is_closed
    assert one.nbytes == 0
    three = dbcache.start_request(model)
    del two  # one that was dropped does not count
    four = dbcache.start_request(model)
    three.close()
    four.close()
    for wrong in (0, -1, 1.5, "many"):
        with pytest.raises((TypeError, ValueError), match="max_requests"):
            dbcache.enable(model, max_requests=wrong, **ENABLED)
