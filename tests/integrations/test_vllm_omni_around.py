"""What happens around requests of vLLM-Omni: errors, threads, other sizes, an older engine."""

import logging
import threading

import omni_like
import pytest
import tiny
import torch
from omni_like import OWN, pipeline

import dbcache
from dbcache.adapters.requests.cached_transformer import HANDLE

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")


@pytest.fixture(scope="module")
def omni():
    with omni_like.engine() as engine:
        yield engine


@pytest.fixture
def served(omni):
    """A pipeline with its backend, which is off afterwards without a trace."""
    pipe = pipeline(omni, "qwen")
    own, attributes = set(vars(pipe)), set(vars(pipe.transformer))
    backend = omni.selector.get_cache_backend("dbcache", dict(OWN))
    backend.enable(pipe)
    yield pipe, backend
    for _ in range(2):
        backend.disable(pipe)
    assert (set(vars(pipe)), set(vars(pipe.transformer))) == (own, attributes)


def at_call(number, model, then):
    """Call `then` at a certain call of the first block."""
    calls = []

    def count(*_):
        calls.append(None)
        if len(calls) == number:
            then()

    return model.transformer_blocks[0].register_forward_pre_hook(count)


def test_a_request_that_fails_leaves_nothing_to_the_next_one(served):
    pipe, _ = served
    expected = pipe(10, True)

    def fail():
        raise KeyboardInterrupt

    for number in (1, 12):  # in the first step, and in the second branch of a later one
        hook = at_call(number, pipe.transformer, fail)
        with pytest.raises(KeyboardInterrupt):
            pipe(10, True)
        hook.remove()
        assert not vars(pipe.transformer)[HANDLE].under_way()
        assert torch.equal(pipe(10, True), expected)


def test_requests_in_threads_are_as_alone(served):
    pipe, _ = served
    keys = [(8, True, 5), (11, False, 6), (9, True, 7)]
    expected, images = {key: pipe(*key) for key in keys}, {}

    def serve(key):
        for _ in range(2):
            images[key] = pipe(*key)

    threads = [threading.Thread(target=serve, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(images[key], expected[key]) for key in keys)


def test_switched_off_and_on_while_a_request_runs(omni, served):
    pipe, backend = served
    expected, plain = pipe(10, True), pipeline(omni, "qwen")(10, True)
    hook = at_call(9, pipe.transformer, lambda: backend.disable(pipe))
    assert pipe(10, True).isfinite().all()
    hook.remove()
    assert HANDLE not in vars(pipe.transformer)
    assert torch.equal(pipe(10, True), plain)
    for _ in range(2):
        backend.enable(pipe)
        assert torch.equal(pipe(10, True), expected)


def test_sizes_and_announced_steps_may_change(omni, served, monkeypatch):
    pipe, backend = served
    expected, real = pipe(9, True), tiny.noise
    other = pipeline(omni, "flux")
    beside = omni.selector.get_cache_backend("dbcache", dict(OWN))
    beside.enable(other)  # a second model in the process
    monkeypatch.setattr(tiny, "noise", lambda n, *size, seed=0: real(n + 1, *size, seed=seed))
    two = pipe(9, True)
    assert (len(two), len(expected)) == (2, 1)
    monkeypatch.undo()
    for announced in (9, 9, 50):  # requests that never came, and a wrong number
        omni.refresh(backend, pipe, announced)
    assert torch.equal(pipe(9, True), expected)
    image = other(9, False)
    assert torch.equal(pipe(9, True), expected)
    assert torch.equal(other(9, False), image)
    beside.disable(other)
    assert dbcache.is_enabled(pipe.transformer)


def test_an_engine_without_the_function_works_on_and_says_so(omni, caplog):
    omni.ours.unregister()
    original = omni.selector.get_cache_backend
    del omni.selector.get_cache_backend
    with caplog.at_level(logging.WARNING, logger="vllm_omni"):
        omni.ours.register()
    assert "this vLLM-Omni has no get_cache_backend" in caplog.text
    assert "install vllm-omni 0.30" in caplog.text
    omni.ours.unregister()
    omni.selector.get_cache_backend = original
    omni.ours.register()
    assert omni.selector.get_cache_backend("dbcache", None).is_enabled() is False
