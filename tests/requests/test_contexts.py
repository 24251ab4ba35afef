"""Tasks, copied contexts and callbacks: a forward belongs to the request that it is called in."""

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
import weakref
from contextlib import nullcontext

import pytest
import tiny
import torch
from together import FLUX, OPTIONS, decisions, euler, flat, in_threads, pattern, same, siblings

import dbcache
from dbcache.adapters.requests.context import suspended

CACHED = OPTIONS | {"residual_diff_threshold": 0.3}
OTHER = CACHED | {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": 1}
STEPS = 7


def draw(pipe, seed=5, steps=STEPS, **more):
    """Return the latents of a FLUX image."""
    arguments = {
        "prompt_embeds": tiny.noise(1, tiny.TEXT_TOKENS, tiny.TEXT_DIM, seed=11),
        "pooled_prompt_embeds": tiny.noise(1, 12, seed=12),
        "height": 64,
        "width": 64,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    with torch.no_grad():
        return pipe(**arguments | more).images


def test_asyncio_to_thread_needs_no_lock():
    pipes = siblings(tiny.pipeline("flux"), 3)
    plain = draw(pipes[2], 2)
    settings = (CACHED, OTHER)
    expected = [draw(dbcache.enable(tiny.pipeline("flux"), **s), i) for i, s in enumerate(settings)]
    for pipe, own in zip(pipes, settings, strict=False):
        dbcache.enable(pipe, **own)

    async def serve():
        for _ in range(2):
            jobs = [asyncio.to_thread(draw, pipe, i) for i, pipe in enumerate(pipes)]
            yield await asyncio.gather(*jobs)

    async def all_of():
        return [images async for images in serve()]

    with pytest.warns(UserWarning, match="outside of a call of the pipeline"):
        rounds = asyncio.run(all_of())
    for images in rounds:
        assert all(map(torch.equal, images, [*expected, plain]))


def test_tasks_take_steps_of_their_own_requests_in_turn():
    model = dbcache.enable(tiny.flux(), **CACHED)

    async def image(seed, steps):
        request = dbcache.start_request(model, num_inference_steps=steps)
        outputs = []
        x = tiny.noise(*FLUX.latent_shape, seed=seed)
        with request:  # stays active while other tasks run
            for step in range(steps):
                await asyncio.sleep(0)
                with torch.no_grad():
                    outputs.append(model(**FLUX.arguments(x, 1 - step / steps, "cond"))[0])
                x = x - outputs[-1] / steps
                await asyncio.sleep(0)
        request.close()
        return outputs, pattern(request.summary())

    async def all_of():
        return await asyncio.gather(*(image(seed, 6 + seed) for seed in range(4)))

    together = asyncio.run(all_of())
    for seed, (outputs, trace) in enumerate(together):
        alone, its_trace = asyncio.run(image(seed, 6 + seed))
        assert "c" in trace[0]
        assert trace == its_trace
        assert same(outputs, alone)


@pytest.mark.parametrize("second", ["enabled", "never enabled"])
def test_a_callback_may_call_a_second_pipeline(second):
    one, two = siblings(tiny.pipeline("flux"), 2)
    inner = draw(two, 3, 5)
    if second == "enabled":
        inner = draw(dbcache.enable(tiny.pipeline("flux"), **OTHER), 3, 5)
        dbcache.enable(two, **OTHER)
    dbcache.enable(one, **CACHED)
    expected, trace = draw(one), decisions(one)
    assert "c" in trace[0]
    seen = []
    warns = pytest.warns(UserWarning, match="outside of a call of the pipeline")
    expected_warnings = {"enabled": nullcontext(), "never enabled": warns}

    def preview(pipe, step, time, tensors):
        if step in (1, 4):
            seen.append(draw(two, 3, 5))
        return {}

    with expected_warnings[second]:
        got = draw(one, callback_on_step_end=preview)
    assert torch.equal(got, expected)
    assert decisions(one) == trace
    assert len(seen) == 2
    assert all(torch.equal(image, inner) for image in seen)


def test_a_hook_inside_a_forward_may_call_the_transformer_plain():
    """What a hook of a block calls is not part of the step under way."""
    one = tiny.pipeline("flux")
    model, seen = one.transformer, []
    arguments = FLUX.arguments(tiny.noise(*FLUX.latent_shape, seed=9), 0.5, "cond")
    with torch.no_grad():
        plain = model(**arguments)[0]
    dbcache.enable(one, **CACHED)
    expected = draw(one)
    is_inside = []

    def nested(*_):
        if not is_inside:
            is_inside.append(1)
            with torch.no_grad():
                thread = contextvars.Context()
                seen.append(thread.run(lambda: model(**arguments)[0]))
                with suspended():
                    seen.append(model(**arguments)[0])
            is_inside.clear()

    hook = model.transformer_blocks[0].register_forward_hook(nested)
    with pytest.warns(UserWarning, match="outside of a call of the pipeline"):
        got = draw(one)
    hook.remove()
    assert torch.equal(got, expected)
    assert len(seen) >= 2 * STEPS
    assert all(torch.equal(x, plain) for x in seen)


def test_a_transformer_enabled_alone_has_a_request_per_thread_and_task():
    model = dbcache.enable(tiny.flux(), **CACHED)
    expected = [flat(euler(model, 8, seed=seed)) for seed in range(4)]
    assert "c" in decisions(model)[0]
    got = in_threads([lambda s=seed: flat(euler(model, 8, seed=s)) for seed in range(4)])
    assert all(map(same, got, expected))

    async def image(seed):
        outputs = []
        for step in euler(model, 8, seed=seed):
            outputs += step
            await asyncio.sleep(0)
        return outputs

    async def all_of():
        return await asyncio.gather(*map(image, range(4)))

    assert all(map(same, asyncio.run(all_of()), expected))


def test_a_copied_context_has_a_request_of_its_own():
    model = dbcache.enable(tiny.flux(), **CACHED)
    expected = [flat(euler(model, 8, seed=seed)) for seed in range(3)]
    loop = euler(model, 8, seed=0)
    begun = next(loop) + next(loop) + next(loop)  # this thread's request is under way
    contexts = [contextvars.copy_context() for _ in range(2)]

    def work(seed):
        return contexts[seed - 1].run(lambda: flat(euler(model, 8, seed=seed)))

    got = in_threads([lambda: work(1), lambda: work(2)])
    assert same(begun + flat(loop), expected[0])
    assert all(map(same, got, expected[1:]))


def test_requests_may_be_active_in_two_threads_at_once():
    """Each thread leaves the request that it entered, whoever leaves first."""
    model = dbcache.enable(tiny.flux(), **CACHED)
    request = dbcache.start_request(model, num_inference_steps=4)
    entered, leave = threading.Event(), threading.Event()

    def other():
        with request:
            entered.set()
            assert leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    with request:
        leave.set()
        thread.join()
        with torch.no_grad():
            model(**FLUX.arguments(tiny.noise(*FLUX.latent_shape, seed=1), 1.0, "cond"))
    assert [lane.steps for lane in request.summary().lanes] == [1]


def test_the_second_image_of_a_transformer_alone_begins_anew():
    pipe = tiny.pipeline("flux")
    dbcache.enable(pipe.transformer, **CACHED)
    first, trace = draw(pipe), decisions(pipe.transformer)
    assert "c" in trace[0]
    assert torch.equal(draw(pipe), first)
    assert decisions(pipe.transformer) == trace


@torch.no_grad()
def test_a_time_that_runs_up_begins_anew_when_it_falls():
    model = dbcache.enable(tiny.flux(), **CACHED)

    def image(count):
        x, outputs = tiny.noise(*FLUX.latent_shape, seed=1), []
        for step in range(count):
            outputs.append(model(**FLUX.arguments(x, (step + 1) / count, "cond"))[0])
            x = x - outputs[-1] / count
        return outputs

    first, trace = image(8), decisions(model)
    assert "c" in trace[0]
    assert same(image(8), first)
    assert decisions(model) == trace


@torch.no_grad()
def test_step_index_and_number_of_steps_are_used_where_they_are_given():
    model = dbcache.enable(tiny.flux(), **CACHED)
    x = tiny.noise(*FLUX.latent_shape, seed=1)
    request = dbcache.start_request(model, steps_computation_mask="slow")
    for step in range(8):  # the time stands still
        for _ in range(2):
            with request.branch("cond", step_index=step, num_inference_steps=8):
                model(**FLUX.arguments(x, 0.5, "cond"))
    lanes = request.summary().lanes
    assert [lane.steps for lane in lanes] == [8, 8]
    assert request._pairs[0][1].clock.num_steps()[0] == 8
    request.close()
    for _ in range(2):
        for step in range(5):
            with model.cache_context("cond", step_index=step, num_inference_steps=5):
                model(**FLUX.arguments(x, 0.5, "cond"))
        assert [len(lane) for lane in decisions(model)] == [5]


def test_pipeline_calls_above_max_requests_wait():
    pipes = siblings(tiny.pipeline("flux"), 4)
    expected = draw(dbcache.enable(tiny.pipeline("flux"), **CACHED))
    for pipe in pipes:
        dbcache.enable(pipe, **CACHED, max_requests=1)
    handle = vars(pipes[0].transformer)["_dbcache"]
    most = []
    hook = pipes[0].transformer.register_forward_pre_hook(lambda *_: most.append(len(handle._open)))
    got = in_threads([lambda p=p: draw(p) for p in pipes])
    hook.remove()
    assert max(most) == 1
    assert all(torch.equal(image, expected) for image in got)


def test_a_dropped_request_takes_its_buffers_and_a_late_disable_along():
    model = tiny.flux()
    names = set(vars(model))
    dbcache.enable(model, **CACHED)
    request = dbcache.start_request(model, num_inference_steps=8)
    next(euler(model, 8, seed=1, inside=lambda _, own=request: own))
    dbcache.disable(model)
    assert not dbcache.is_enabled(model)
    inner = weakref.ref(request._pairs[0][1])
    del request
    gc.collect()
    assert inner() is None
    assert set(vars(model)) == names


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_made_inside_a_forward_are_plain(copied):
    from diffusers import FluxPipeline

    pipe = FluxPipeline(**tiny.pipeline("flux").components)
    pipe.set_progress_bar_config(disable=True)
    plain, own = draw(pipe), set(vars(pipe.transformer))
    dbcache.enable(pipe, **CACHED)
    expected, copies = draw(pipe), []

    def keep(*_):
        if len(copies) < 4:
            hooks = dict(block._forward_hooks)
            block._forward_hooks.clear()  # functions of a test are not pickled
            copies.extend([copied(pipe), copied(pipe.transformer)])
            block._forward_hooks.update(hooks)

    block = pipe.transformer.transformer_blocks[0]
    hook = block.register_forward_hook(keep)
    assert torch.equal(draw(pipe), expected)
    hook.remove()
    twin, model = copies[:2]
    assert type(twin) is FluxPipeline
    for one in (twin.transformer, model):
        assert set(vars(one)) - {"_diffusers_hook"} == own - {"_diffusers_hook"}
    assert torch.equal(draw(twin), plain)
    twin.transformer = model
    assert torch.equal(draw(twin), plain)
