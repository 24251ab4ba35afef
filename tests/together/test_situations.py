"""Situations from public bug reports about caches: each with what a user does, and what counts."""

import ast
import asyncio
import contextvars
import gc
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import tiny
import torch
from together import decisions, same

import dbcache

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

OPTIONS = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 2,
    "residual_diff_threshold": 1.0,
    "max_continuous_cached_steps": 2,
}
FLUX = tiny.FAMILIES["flux"]


@pytest.mark.parametrize("ends", ["disabled", "left on"])
def test_a_pipeline_of_diffusers_is_freed_after_a_call(ends):
    pipe = dbcache.enable(tiny.pipeline("flux"), **OPTIONS)
    tiny.generate(pipe, 4)
    if ends == "disabled":
        dbcache.disable(pipe)
    transformer = weakref.ref(pipe.transformer)
    del pipe
    for _ in range(3):
        gc.collect()
    assert transformer() is None


def test_tracing_with_the_cache_on_says_to_disable_first():
    model = dbcache.enable(tiny.flux(double=1, single=3), **OPTIONS)
    inputs = FLUX.arguments(tiny.noise(1, 16, 16, seed=1), 1.0, "cond")
    del inputs["return_dict"]
    with pytest.raises(RuntimeError, match=r"call dbcache\.disable on it first"):
        torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_transforms_of_a_model_with_the_cache_on_say_to_disable_first(transform):
    model = dbcache.enable(tiny.flux(double=1, single=3), **OPTIONS)
    inputs = FLUX.arguments(tiny.noise(1, 16, 16, seed=1), 1.0, "cond")
    x = inputs.pop("hidden_states")
    with pytest.raises(RuntimeError, match=r"torch\.func: Flux.*call dbcache\.disable on it first"):
        transform(lambda x: model(hidden_states=x, **inputs)[0].sum())(x[None])
    with torch.no_grad():
        model(hidden_states=x, **inputs)
    assert decisions(model) == ["F"]


def streaming(pipe, how):
    """Return a pipeline with the parts of `pipe` that yields, or awaits, after every step."""

    class Streams(type(pipe)):
        def __call__(self, *, steps, seed):
            x = tiny.noise(1, 16, 16, seed=seed)
            self.scheduler.set_timesteps(steps)
            for time in self.scheduler.timesteps:
                inputs = FLUX.arguments(x, float(time) / 1000, "cond")
                with torch.no_grad(), self.transformer.cache_context("cond"):
                    x = self.scheduler.step(self.transformer(**inputs)[0], time, x)[0]
                yield x

    class Awaits(type(pipe)):
        async def __call__(self, *, steps, seed):
            outputs = []
            for x in Streams.__call__(self, steps=steps, seed=seed):
                outputs.append(x)
                await asyncio.sleep(0)
            return outputs[-1]

    class StreamsToTasks(type(pipe)):
        async def __call__(self, *, steps, seed):
            for x in Streams.__call__(self, steps=steps, seed=seed):
                await asyncio.sleep(0)
                yield x

    return {"yields": Streams, "awaits": Awaits, "yields to tasks": StreamsToTasks}[how](
        scheduler=type(pipe.scheduler)(),
        **{k: v for k, v in pipe.components.items() if k != "scheduler"},
    )


async def last_of(stream):
    return [x async for x in stream][-1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", ["yields", "awaits", "yields to tasks"])
def test_calls_that_yield_or_are_awaited_are_requests_that_may_interleave(how):
    first = streaming(tiny.pipeline("flux"), how)
    pipes = [dbcache.enable(x, **OPTIONS) for x in (first, streaming(first, how))]

    def run(*pipes):
        calls = [pipe(steps=8, seed=seed) for seed, pipe in enumerate(pipes, 3)]
        if how == "yields":
            return list(zip(*calls, strict=True))[-1]

        async def together():
            return await asyncio.gather(*(map(last_of, calls) if "yields" in how else calls))

        return asyncio.run(together())

    alone = run(pipes[0])[0]
    assert decisions(pipes[0]) == ["FFccFccF"]
    both = run(*pipes)
    assert torch.equal(both[0], alone)
    assert [decisions(pipe) for pipe in pipes] == [["FFccFccF"]] * 2
    if how == "yields":  # one that is given up ends its request, one that never began has none
        given_up = pipes[0](steps=8, seed=3)
        next(given_up)
        given_up.close()
        pipes[0](steps=8, seed=3)
    assert torch.equal(run(pipes[0])[0], alone)
    if how != "yields":
        dbcache.enable(pipes[0], **OPTIONS, max_requests=1)
        assert torch.equal(asyncio.run(that_wait(pipes[0], how))[1], alone)
    dbcache.disable(pipes[0])
    dbcache.disable(pipes[1])
    assert "forward" not in vars(first.transformer)


async def that_wait(pipe, how):
    """Return two images, of which one waits for the other, and leave a third one to the loop."""

    async def draw(seed):
        call = pipe(steps=8, seed=seed)
        return await (last_of(call) if "yields" in how else call)

    tasks = []
    for seed in (2, 3, 4):
        tasks.append(asyncio.create_task(draw(seed)))
        await asyncio.sleep(0.005)
    images = await asyncio.wait_for(asyncio.gather(*tasks[:2]), 60)
    tasks[2].cancel()
    return images


@pytest.mark.filterwarnings("error")  # pytest tells of errors that nobody could catch as warnings
def test_calls_that_nobody_ends_leave_no_request_behind():
    """Of generators the first one holds the only place there is; coroutines end elsewhere."""
    pipe = streaming(tiny.pipeline("flux"), "yields")
    dbcache.enable(pipe, **OPTIONS, max_requests=1)
    first = pipe(steps=8, seed=3)
    next(first)
    with pytest.raises(RuntimeError, match=r"may have 1 requests open.*generator.*max_requests"):
        next(pipe(steps=8, seed=3))
    first.close()
    list(pipe(steps=8, seed=3))
    pipe = dbcache.enable(streaming(tiny.pipeline("flux"), "awaits"), **OPTIONS)
    request = dbcache.start_request(pipe.transformer)

    def active():
        with request.branch("cond"):
            yield

    for call in (pipe(steps=8, seed=3), active()):
        contextvars.copy_context().run(call.send, None)
        call.close()
    request.close()
    assert len(vars(pipe.transformer)["_dbcache"]._open) == 0


def test_generators_that_keep_a_request_active_over_a_yield_are_told():
    model = dbcache.enable(tiny.flux(double=1, single=3), **OPTIONS)

    def run():
        with dbcache.start_request(model, num_inference_steps=2):
            yield
            yield

    first, second = run(), run()
    next(first), next(second)
    with pytest.raises(RuntimeError, match="before each yield"):
        list(first)
    list(second)
    with dbcache.start_request(model) as request, request, request.branch("cond"):
        pass  # in order
    request.close()


@pytest.mark.filterwarnings("error")
def test_a_call_that_was_cut_short_is_not_said_to_have_cached_nothing(caplog):
    pipe = dbcache.enable(tiny.pipeline("wan2.2"), **OPTIONS)
    tiny.generate(pipe, 8)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = pipe.transformer_2.blocks[3].register_forward_pre_hook(interrupt)
    for steps in (8, 3):
        with pytest.raises(KeyboardInterrupt):
            tiny.generate(pipe, steps)
    hook.remove()
    assert not caplog.messages
    tiny.generate(pipe, 2)
    assert any("nothing was cached" in text for text in caplog.messages)


MAKES = {
    "tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "linspace",
    "randn",
    "rand",
    "randperm",
}
PACKAGE = Path(__file__).resolve().parents[2]


def test_every_tensor_of_the_package_is_made_on_a_device_and_in_a_dtype_that_are_named():
    """``torch.set_default_device`` must not move what the host reads, nor a default dtype round."""
    found = []
    for folder in ("adapters", "dbcache", "kernels", "parallel"):
        for file in (PACKAGE / folder).rglob("*.py"):
            if {"demo", "metrics", "cli"} & set(file.parts):
                continue
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if name.startswith("torch.") and name.removeprefix("torch.") in MAKES:
                    keywords = {keyword.arg for keyword in node.keywords}
                    if None not in keywords and not keywords >= {"device", "dtype"}:
                        found.append(f"{file}:{node.lineno}")
    assert found == []


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


DEFAULTS = {
    "none": nullcontext,
    "device": lambda: torch.device("meta"),  # whose tensors have no values: any that is read raises
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_type": "DBPrune"}, {"enable_spectrum": True}, {"batch_reduce": "each"}],
    ids=lambda options: next(iter(options), "DBCache"),
)
def test_other_defaults_of_torch_change_nothing(options):
    steps = [FLUX.arguments(tiny.noise(1, 16, 16, seed=i), 1 - i / 6, "cond") for i in range(6)]
    outputs = {}
    for name, default in DEFAULTS.items():
        model = tiny.flux(double=1, single=3)
        with default(), torch.no_grad():
            dbcache.enable(model, num_inference_steps=6, **OPTIONS | options)
            outputs[name] = [model(**step)[0] for step in steps]
        assert decisions(model) == ["FFccFc"]
        assert same(outputs[name], outputs["none"]), name


@pytest.mark.parametrize("name", ["flux", "qwen", "wan2.2"])
def test_calls_under_inference_mode_and_under_no_grad_take_turns(name):
    """Their tensors do not tell whether they were written into."""
    pipe = dbcache.enable(tiny.pipeline(name), **OPTIONS)
    want, lanes = tiny.generate(pipe, 8), decisions(pipe)
    assert "c" in "".join(lanes)
    for inside in (torch.inference_mode, nullcontext, torch.inference_mode):
        with inside():
            assert same(tiny.generate(pipe, 8), want)
        assert decisions(pipe) == lanes
