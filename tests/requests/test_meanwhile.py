"""What other threads, signals and the collector do in the middle of something else."""

import copy
import multiprocessing
import os
import sys
import threading
import time
from contextlib import ExitStack

import inside
import pytest
import tiny
import torch
from together import FLUX, OPTIONS, in_threads, same, siblings

import dbcache
from dbcache.adapters.pipelines import events, switch
from dbcache.adapters.requests.cached_transformer import CachedTransformer

NAMES = ("_dbcache", "forward", "cache_context", "__getstate__")


@torch.no_grad()
def call(model, time):
    return model(**FLUX.arguments(tiny.noise(*FLUX.latent_shape, seed=1), time, "cond"))[0]


def other_block(model, place):
    """Exchange a block, as quantisation does."""
    new = copy.deepcopy(model.transformer_blocks[place])
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.5)
    model.transformer_blocks[place] = new


@pytest.mark.parametrize("place", [0, 1], ids=["probe", "middle"])
def test_blocks_that_are_exchanged_are_used_whatever_the_settings(place):
    model = dbcache.enable(tiny.flux(), Fn_compute_blocks=1, max_warmup_steps=99)
    options = ({}, {"residual_diff_threshold": 0.9}, {"max_cached_steps": 3})
    requests = [dbcache.start_request(model, num_inference_steps=8, **own) for own in options]
    for request in requests:
        with request:
            call(model, 1.0)
    other_block(model, place)
    outputs = []
    for request in requests:
        with request:
            outputs.append(call(model, 0.8))
        request.close()
    dbcache.disable(model)
    assert same(outputs, [call(model, 0.8)] * 3)
    dbcache.enable(model, **OPTIONS)
    call(model, 1.0)
    other_block(model, place)  # no step runs before the next change
    dbcache.enable(model, **OPTIONS | {"residual_diff_threshold": 0.9})
    again = call(model, 0.8)
    other_block(model, place)
    dbcache.refresh_context(model, max_warmup_steps=3)
    refreshed = call(model, 0.8)
    dbcache.disable(model)
    assert torch.equal(refreshed, call(model, 0.8))
    assert not torch.equal(again, refreshed)


def test_pipelines_that_share_a_transformer_are_enabled_and_disabled_at_once(monkeypatch):
    pipes = siblings(tiny.pipeline("flux"), 4)
    change = CachedTransformer.change

    def slowly(self, enabled):
        time.sleep(0.02)
        change(self, enabled)

    monkeypatch.setattr(CachedTransformer, "change", slowly)
    in_threads([lambda p=pipe: dbcache.enable(p, **OPTIONS) for pipe in pipes])
    assert len(inside.handle(pipes[0].transformer).enabled.owners) == 4
    in_threads([lambda p=pipe: dbcache.disable(p) for pipe in pipes[:2]])
    for pipe in pipes[2:]:
        tiny.generate(pipe, 6, guided=False)
        assert dbcache.summary(pipe, logging=False).lanes[0].steps == 6
    in_threads([lambda p=pipe: dbcache.disable(p) for pipe in pipes[2:]])
    assert not [name for name in NAMES if name in vars(pipes[0].transformer)]


def test_what_was_looked_up_before_disable_may_be_called_after():
    """As threads do that are just about to call."""
    pipe = tiny.pipeline("flux")
    model, plain = pipe.transformer, tiny.generate(pipe, 4)
    output = call(model, 0.8)
    dbcache.enable(pipe, **OPTIONS)
    cached, handle = vars(pipe)["_dbcache"], inside.handle(model)
    forward, context = model.forward, model.cache_context
    find_and_run = forward._find_and_run
    dbcache.disable(pipe)
    inputs = FLUX.arguments(tiny.noise(*FLUX.latent_shape, seed=1), 0.8, "cond")
    with torch.no_grad(), context("cond"), handle.cache_context("cond"):
        assert same([forward(**inputs)[0], find_and_run(**inputs)[0]], [output] * 2)
    with pytest.raises(RuntimeError, match=r"switched off meanwhile; call dbcache\.enable"):
        handle.setup  # noqa: B018

    def late():
        return cached.call(lambda: tiny.generate(pipe, 4), (), {})

    assert same(late(), plain)
    assert not [name for name in NAMES if name in vars(model)]
    dbcache.enable(model, **OPTIONS)
    now = inside.handle(model)
    tiny.generate(pipe, 4)
    late()
    assert inside.handle(model) is now
    assert dbcache.summary(model, logging=False).lanes[0].steps == 4


def test_a_request_that_is_dropped_while_the_lock_is_taken_ends_a_late_disable():
    model = dbcache.enable(tiny.flux(), **OPTIONS)
    request, other = dbcache.start_request(model), dbcache.start_request(model)
    handle = inside.handle(model)
    dbcache.disable(model)
    with handle._open.locked():
        other.close()
        dropped = [request]
        del request
        in_threads([dropped.clear])
        assert vars(model)["_dbcache"] is handle
    assert not [name for name in NAMES if name in vars(model)]


class Asks:
    """Asks for all at every few lines that work under a lock, as a signal's handler may.

    Requests are dropped there, too, as the collector may do.
    """

    FILES = ("requests/record", "requests/lane_pool", "requests/reruns", "requests/open_requests")

    def __init__(self, model, every):
        self.model, self.every = model, every
        self.lines = self.times = 0

    def trace(self, frame, event, _):
        if not any(name in frame.f_code.co_filename for name in self.FILES):
            return None
        if event == "line":
            self.lines += 1
            if self.lines % self.every == 0:
                sys.settrace(None)
                self.ask()
                sys.settrace(self.trace)
        return self.trace

    def ask(self):
        self.times += 1
        dbcache.counters()
        dbcache.summary(self.model, logging=False)
        if self.times % 5 == 0:
            closed, _ = [dbcache.start_request(self.model) for _ in range(2)]
            closed.close()


def test_a_signal_may_ask_and_end_requests_at_any_line():
    pipe = dbcache.enable(tiny.pipeline("flux"), **OPTIONS)
    expected = tiny.generate(pipe, 4)
    asks = Asks(pipe.transformer, every=3)
    images = []

    def draw():
        sys.settrace(asks.trace)
        try:
            images.extend(tiny.generate(pipe, 4) for _ in range(2))
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for itself"
    assert len(images) == 2
    assert all(same(image, expected) for image in images)
    assert asks.times > 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_child_of_a_fork_does_not_wait_for_threads_that_it_does_not_have():
    pipe = dbcache.enable(tiny.pipeline("flux"), **OPTIONS)
    tiny.generate(pipe, 4)
    handle = inside.handle(pipe.transformer)
    is_locked, go = threading.Event(), threading.Event()

    def hold():
        with (
            switch._SWITCHING,
            handle._open.locked(),
            handle.totals._lock,
            handle.setup.lanes._lock,
        ):
            is_locked.set()
            assert go.wait(60)

    def serve():
        dbcache.counters()
        dbcache.start_request(pipe.transformer).close()
        dbcache.summary(pipe, logging=False)
        dbcache.disable(pipe)
        os._exit(7)

    thread = threading.Thread(target=hold)
    thread.start()
    assert is_locked.wait(60)
    child = multiprocessing.get_context("fork").Process(target=serve)
    child.start()
    child.join(30)
    go.set()
    thread.join()
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 7


def test_what_watches_a_call_may_be_taken_away_while_another_call_is_there():
    """Calls in two threads share a ControlNet, or a scheduler; one of them ends first."""
    pipe = tiny.pipeline("flux")
    module, calls = torch.nn.Linear(2, 2), ExitStack()
    module.register_forward_pre_hook(lambda *_: calls.close())
    calls.enter_context(events._watched_control(module, None))
    module(torch.ones(2))
    calls.enter_context(events._watched_scheduler(pipe.scheduler, None))
    set_timesteps = pipe.scheduler.set_timesteps
    calls.close()
    set_timesteps(4)
    assert len(pipe.scheduler.timesteps) == 4
