"""`enable`, `refresh_context` and `disable` while another thread is inside of a request."""

import gc
import threading
import warnings

import pytest
import tiny
import torch
from together import FLUX, OPTIONS, decisions, euler, flat, in_threads, pattern, same, siblings

import dbcache
from dbcache import BlockAdapter, ForwardPattern

CACHED = OPTIONS | {"residual_diff_threshold": 0.3}
OTHER = CACHED | {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": 1}
DEEPER = CACHED | {"Fn_compute_blocks": 2, "enable_taylorseer": True, "taylorseer_order": 1}
STEPS = 8

CHANGES = {
    "other threshold": lambda target: dbcache.enable(target, **OTHER),
    "other blocks": lambda target: dbcache.enable(target, **DEEPER),
    "refresh": lambda target: dbcache.refresh_context(target, **OTHER),
    "disable": dbcache.disable,
    "disable and enable": lambda target: dbcache.enable(dbcache.disable(target), **DEEPER),
}
AFTERWARDS = dict(zip(CHANGES, (OTHER, DEEPER, OTHER, None, DEEPER), strict=True))


def names_of(model):
    """Return the names of a model's attributes, without the one that diffusers' pipelines add."""
    return set(vars(model)) - {"_diffusers_hook"}


def draw(pipe, seed=5):
    return tiny.generate(pipe, STEPS, guided=False, seed=seed)


def fresh(settings):
    """Return the image of a pipeline of its own, plain where there are no settings."""
    pipe = tiny.pipeline("flux")
    return draw(pipe if settings is None else dbcache.enable(pipe, **settings))


class Halt:
    """Stops a thread at one forward, before it or at one of its blocks, until told to go on."""

    def __init__(self, model, place, at=4):
        self.reached, self.go, self.at, self.calls = threading.Event(), threading.Event(), at, 0
        self.thread = None
        module = model if place == "between forwards" else model.transformer_blocks[0]
        self.hook = module.register_forward_pre_hook(self)

    def __call__(self, *_):
        if threading.current_thread() is not self.thread:
            return
        self.calls += 1
        if self.calls == self.at:
            self.reached.set()
            assert self.go.wait(60)

    def during(self, job, change):
        """Run `job` in a thread and `change` while that is halted; return the job's result."""
        results = []
        self.thread = threading.Thread(target=lambda: results.append(job()), daemon=True)
        self.thread.start()
        assert self.reached.wait(60)
        change()
        self.go.set()
        self.thread.join(120)
        self.hook.remove()
        (result,) = results
        return result


@pytest.mark.parametrize("place", ["between forwards", "inside a forward"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_pipelines_call_ends_as_it_began_and_the_next_sees_the_change(change, place):
    pipe = tiny.pipeline("flux")
    names, cls = names_of(pipe.transformer), type(pipe)
    dbcache.enable(pipe, **CACHED)
    expected = draw(pipe)
    assert "c" in decisions(pipe)[0]
    got = Halt(pipe.transformer, place).during(lambda: draw(pipe), lambda: CHANGES[change](pipe))
    assert same(got, expected)
    assert same(draw(pipe), fresh(AFTERWARDS[change]))
    dbcache.disable(pipe)
    assert type(pipe) is cls
    assert names_of(pipe.transformer) == names


@pytest.mark.parametrize("place", ["between forwards", "inside a forward"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_started_request_ends_as_it_began(change, place):
    model = tiny.flux()
    names = names_of(model)
    dbcache.enable(model, **CACHED)

    def job():
        request = dbcache.start_request(model, num_inference_steps=STEPS)
        outputs = flat(euler(model, STEPS, seed=1, inside=lambda _: request))
        trace = pattern(request.summary())
        request.close()
        return outputs, trace

    expected, trace = job()
    assert "c" in trace[0]
    got, its_trace = Halt(model, place).during(job, lambda: CHANGES[change](model))
    assert its_trace == trace
    assert same(got, expected)
    plain = tiny.flux()
    if AFTERWARDS[change] is not None:
        dbcache.enable(plain, **AFTERWARDS[change])
    assert same(flat(euler(model, STEPS, seed=1)), flat(euler(plain, STEPS, seed=1)))
    dbcache.disable(model)
    assert names_of(model) == names


@pytest.mark.parametrize("change", ["other blocks", "disable"])
def test_a_forward_of_a_transformer_alone_ends_as_it_began(change):
    """What another thread changes shows at the next forward at the earliest."""
    model = tiny.flux()
    names = names_of(model)
    dbcache.enable(model, **CACHED)

    def job():
        return flat(euler(model, 5, seed=1))

    expected = job()
    got = Halt(model, "inside a forward", at=5).during(job, lambda: CHANGES[change](model))
    assert same(got, expected)
    dbcache.disable(model)
    assert names_of(model) == names


def doubled(transformer):
    """Change what a block does, so that it shows whether the change is on."""
    block = transformer.transformer_blocks[2]
    forward = type(block).forward.__get__(block)

    def twice(hidden_states, encoder_hidden_states, temb, **kwargs):
        encoder, hidden = forward(hidden_states, encoder_hidden_states, temb, **kwargs)
        return encoder, hidden * 1.5

    block.forward = twice


def adapter(pipe):
    model = pipe.transformer
    return BlockAdapter(
        pipe=pipe,
        transformer=model,
        blocks=[model.transformer_blocks, model.single_transformer_blocks],
        forward_pattern=[ForwardPattern.Pattern_1] * 2,
        patch_functor=doubled,
    )


@pytest.mark.parametrize("place", ["between forwards", "inside a forward"])
@pytest.mark.parametrize("change", ["other threshold", "refresh", "disable"])
def test_a_patch_functor_stays_on_for_the_requests_under_way(change, place):
    pipe = tiny.pipeline("flux")
    names = set(vars(pipe.transformer.transformer_blocks[2]))
    plain = draw(pipe)
    target = adapter(pipe)
    dbcache.enable(target, **CACHED)
    expected = draw(pipe)
    got = Halt(pipe.transformer, place).during(lambda: draw(pipe), lambda: CHANGES[change](target))
    assert same(got, expected)
    dbcache.disable(target)
    assert set(vars(pipe.transformer.transformer_blocks[2])) == names
    assert same(draw(pipe), plain)


@pytest.mark.parametrize("rounds", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_changes_again_and_again_under_three_threads(rounds):
    pipes = siblings(tiny.pipeline("flux"), 3)
    names = names_of(pipes[0].transformer)
    settings = [None, CACHED, DEEPER]
    allowed = [fresh(own) for own in settings]
    ends = threading.Event()

    def images(pipe):
        found = []
        while not ends.is_set():
            found.append(draw(pipe))
        return found

    def change():
        try:
            for turn in range(rounds):
                for pipe in pipes:
                    own = settings[turn % 3]
                    if own is None:
                        dbcache.disable(pipe)
                    else:
                        dbcache.enable(pipe, **own)
                threading.Event().wait(0.1)
        finally:
            ends.set()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        *found, _ = in_threads([*(lambda p=p: images(p) for p in pipes), change])
    for own in found:
        assert own
        assert all(any(same(image, one) for one in allowed) for image in own)
    for pipe in pipes:
        dbcache.disable(pipe)
    gc.collect()
    assert names_of(pipes[0].transformer) == names


@torch.no_grad()
def test_a_request_closed_inside_its_own_forward_ends_that_forward():
    model = dbcache.enable(tiny.flux(), **CACHED)
    expected = dbcache.start_request(model, num_inference_steps=4)
    x = tiny.noise(*FLUX.latent_shape, seed=1)
    with expected:
        plain = model(**FLUX.arguments(x, 1.0, "cond"))[0]
    expected.close()
    request = dbcache.start_request(model, num_inference_steps=4)
    other = dbcache.start_request(model, num_inference_steps=4)

    def close(*_):
        request.close()
        with other:
            pass

    hook = model.transformer_blocks[2].register_forward_hook(close)
    with request:
        assert torch.equal(model(**FLUX.arguments(x, 1.0, "cond"))[0], plain)
    hook.remove()
    got = flat(euler(model, 8, seed=2, inside=lambda _: other))
    other.close()
    fresh = dbcache.enable(tiny.flux(), **CACHED)
    alone = dbcache.start_request(fresh, num_inference_steps=4)
    assert same(got, flat(euler(fresh, 8, seed=2, inside=lambda _: alone)))


@pytest.mark.parametrize("with_one", [True, False])
def test_another_patch_functor_is_refused_while_requests_are_under_way(with_one):
    pipe = tiny.pipeline("flux")
    dbcache.enable(adapter(pipe), **CACHED)
    expected = draw(pipe)
    target = pipe
    if with_one:
        target = adapter(pipe)
        target.patch_functor = lambda transformer: None

    def change():
        with pytest.raises(RuntimeError, match="must keep its patch_functor while requests"):
            dbcache.enable(target, **OTHER)

    got = Halt(pipe.transformer, "inside a forward").during(lambda: draw(pipe), change)
    assert same(got, expected)
    assert same(draw(pipe), expected)
