"""Requests that overlap while their steps are recorded as CUDA graphs, on a fake driver."""

import gc

import pytest
import tiny
from fake_driver import FakeDriver
from graph_runs import MODES, graphs, recordings
from tape import use_driver
from together import OPTIONS, euler, flat, in_threads, pattern, same, siblings

import dbcache
from dbcache import GraphOptions

CACHED = OPTIONS | {"residual_diff_threshold": 0.3}
SHAPES = [(1, 16, 16), (1, 16, 16), (1, 9, 16)]
STEPS = (9, 7, 8)


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """Record on the CPU, with a driver that keeps CUDA's rules."""
    fake = FakeDriver()
    use_driver(monkeypatch, fake)
    return fake


def begin(model, number, **options):
    """Return a request and its loop of two branches."""
    request = dbcache.start_request(model, num_inference_steps=STEPS[number], **options)
    loop = euler(
        model,
        STEPS[number],
        seed=number,
        shape=SHAPES[number],
        inside=request.branch,
        branches=tiny.BRANCHES,
    )
    return request, loop


@pytest.fixture(scope="module")
def eager():
    """Return outputs and decisions of each request, alone and without graphs."""
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DBCACHE_KERNELS", "reference")
        for number in range(len(STEPS)):
            model = dbcache.enable(tiny.flux(), **CACHED)
            request, loop = begin(model, number)
            outputs = flat(loop)
            runs.append((outputs, pattern(request.summary())))
            assert "c" in "".join(runs[-1][1])
    return runs


def in_turn(model, numbers, look=lambda: None):
    """Take the steps of several requests in turn; return (outputs, decisions) of each.

    `look` is called before they are closed.
    """
    started = {number: begin(model, number) for number in numbers}
    outputs = {number: [] for number in numbers}
    for _ in range(max(STEPS)):
        for number, (_, loop) in started.items():
            outputs[number].extend(next(loop, []))
    results = [(outputs[n], pattern(request.summary())) for n, (request, _) in started.items()]
    look()
    for request, _ in started.values():
        request.close()
    return results


def agree(results, expected):
    """Say whether outputs and decisions are the same."""
    return all(
        same(own[0], its[0]) and own[1] == its[1]
        for own, its in zip(results, expected, strict=True)
    )


@pytest.mark.parametrize("mode", MODES)
def test_requests_in_turn_have_recordings_of_their_own(eager, mode):
    model = dbcache.enable(tiny.flux(), **CACHED, cuda_graph=mode)
    own = []
    assert agree(in_turn(model, (0, 1, 2), lambda: own.extend(recordings(model))), eager)
    assert len(own) == 3 * len(tiny.BRANCHES)
    tensors = [{x.data_ptr() for x in recording.inputs} for recording in own]
    assert all(not a & b for i, a in enumerate(tensors) for b in tensors[:i])
    lanes = [{home.lane for home in recording.homes} for recording in own]
    assert all(not a & b for i, a in enumerate(lanes) for b in lanes[:i])
    assert graphs(model).replays == 2 * (sum(STEPS) - 3)


@pytest.mark.parametrize("mode", MODES)
def test_a_later_request_replays_what_a_closed_one_recorded(eager, mode):
    model = dbcache.enable(tiny.flux(), **CACHED, cuda_graph=mode)
    (one, its_loop), (two, other) = begin(model, 0), begin(model, 1)
    outputs, others = [], []
    for _ in range(4):
        outputs += next(its_loop)
        others += next(other)
    outputs += flat(its_loop)
    one.close()
    known, replays = set(map(id, recordings(model))), graphs(model).replays
    three, last = begin(model, 0)
    again = []
    for _ in range(3):
        again += next(last)
        others += next(other)
    two.close()
    again += flat(last)
    assert graphs(model).replays == replays + 2 * (STEPS[0] + 3)
    assert set(map(id, recordings(model))) == known
    assert same(outputs, eager[0][0])
    assert same(again, eager[0][0])
    assert pattern(three.summary()) == eager[0][1]
    assert same(others, eager[1][0])


@pytest.mark.parametrize("mode", MODES)
def test_beyond_max_recordings_a_request_runs_eagerly_and_the_summary_says_so(eager, mode):
    options = GraphOptions(mode=mode, max_recordings=2)
    model = dbcache.enable(tiny.flux(), **CACHED, cuda_graph=options)
    assert agree(in_turn(model, (0, 1)), eager[:2])
    assert len(recordings(model)) == 2
    assert graphs(model).replays == 2 * (STEPS[0] - 1)
    assert "requests at the same time have all max_recordings" in str(
        dbcache.summary(model, logging=False)
    )


@pytest.mark.parametrize("mode", MODES)
def test_recordings_of_a_request_that_was_dropped_are_given_up(eager, mode):
    model = dbcache.enable(tiny.flux(), **CACHED, cuda_graph=mode)
    request, loop = begin(model, 0)
    next(loop), next(loop), next(loop)
    assert len(recordings(model)) == 2
    del request, loop
    gc.collect()
    assert agree(in_turn(model, (1, 2)), eager[1:])
    assert len(recordings(model)) == 4


@pytest.mark.parametrize("mode", MODES)
def test_options_of_a_request_hold_in_recorded_steps(mode):
    settings = [{}, {"residual_diff_threshold": 0.0}, {"max_warmup_steps": 5}]

    def run(**graph):
        model = dbcache.enable(tiny.flux(), **CACHED, **graph)
        started = [begin(model, 0, **own) for own in settings]
        outputs = [[] for _ in started]
        for _ in range(STEPS[0]):
            for own, (_, loop) in zip(outputs, started, strict=True):
                own.extend(next(loop))
        return [(own, pattern(r.summary())) for own, (r, _) in zip(outputs, started, strict=True)]

    expected = run()
    assert len({str(trace) for _, trace in expected}) == 3
    assert agree(run(cuda_graph=mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_pipelines_in_threads_take_turns_with_recorded_steps(mode):
    expected = dbcache.enable(tiny.pipeline("flux"), **CACHED)
    images = [tiny.generate(expected, 7, seed=seed) for seed in range(3)]
    pipes = siblings(tiny.pipeline("flux"), 3)
    for pipe in pipes:
        dbcache.enable(pipe, **CACHED, cuda_graph=mode)
    got = in_threads(
        [
            lambda p=p, s=s: [tiny.generate(p, 7, seed=s) for _ in range(2)]
            for s, p in enumerate(pipes)
        ]
    )
    for own, image in zip(got, images, strict=True):
        assert all(same(one, image) for one in own)
