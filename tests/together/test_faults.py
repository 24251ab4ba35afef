"""What users do to a model beside the cache: exchange, wrap, export, train it."""

import functools
import warnings
from contextlib import nullcontext

import diffusers
import pytest
import tiny
import torch
from oracle import Oracle, Rule
from peft import LoraConfig, get_peft_model
from together import decisions, in_threads, same
from torch.utils.checkpoint import checkpoint

import dbcache

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

FLUX = tiny.FAMILIES["flux"]
OPTIONS = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 2,
    "residual_diff_threshold": 1.0,
    "max_continuous_cached_steps": 2,
}


def said_by(call):
    """Return what is warned of while `call` runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def traces(model):
    """Return what of the cache there is in the attributes of a model's modules."""
    own = [name for module in model.modules() for name in vars(module)]
    return [n for n in own if "dbcache" in n or n in ("forward", "cache_context", "__getstate__")]


def with_adapters(model):
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    torch.manual_seed(3)
    return get_peft_model(model, config)


NEW = {
    "other weights": lambda: tiny.flux(seed=7),
    "other sizes": lambda: tiny.flux(seed=7, double=3, single=0),
    "adapters": lambda: with_adapters(tiny.flux(seed=7)),
}


@pytest.mark.parametrize("kind", NEW)
def test_a_known_transformer_in_place_of_another_is_followed(kind):
    pipe, other = tiny.pipeline("flux"), tiny.pipeline("flux")
    old, new, other.transformer = pipe.transformer, NEW[kind](), NEW[kind]()
    dbcache.enable(pipe, **OPTIONS)
    tiny.generate(pipe, 5, guided=False)
    pipe.register_modules(transformer=new)
    expected = tiny.generate(dbcache.enable(other, **OPTIONS), 5, guided=False)
    got = []
    said = said_by(lambda: got.extend(tiny.generate(pipe, 5, guided=False)))
    assert same(got, expected)
    assert decisions(pipe) == decisions(other) == ["FFccF"]
    notes = [text for text in said if "another one than dbcache was enabled on" in text]
    assert len(notes) == 1
    assert "goes on with it" in notes[0]
    assert notes[0] in str(dbcache.summary(pipe, logging=False))
    assert not traces(old)
    again = said_by(lambda: tiny.generate(pipe, 5, guided=False))
    assert not any("another one" in text for text in again)
    dbcache.disable(pipe)
    assert not traces(new)
    assert not dbcache.is_enabled(pipe)


def test_what_cannot_be_followed_is_said_with_the_reason():
    class Unknown(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.run, self.config, self.dtype = inner.forward, inner.config, torch.float32
            self.device, self.cache_context = torch.device("cpu"), inner.cache_context

        def forward(self, *args, **kwargs):
            return self.run(*args, **kwargs)

    pipe = dbcache.enable(tiny.pipeline("flux"), **OPTIONS)
    old, pipe.transformer = pipe.transformer, Unknown(tiny.flux(seed=7))
    said = said_by(lambda: tiny.generate(pipe, 3, guided=False))
    assert len(said) == 1
    assert "without the cache, since Unknown is not in the table of models" in said[0]
    pipe.transformer = old
    tiny.generate(pipe, 5, guided=False)
    assert decisions(pipe) == ["FFccF"]


def test_one_of_two_transformers_is_exchanged():
    pipe = dbcache.enable(tiny.pipeline("wan2.2"), **OPTIONS, enable_taylorseer=True)
    old, kept = pipe.transformer_2, pipe.transformer
    pipe.transformer_2 = new = tiny.wan(seed=9)
    errors = []

    def run():
        in_threads([lambda: errors.extend(said_by(call)) for _ in range(1)])

    def call():
        tiny.generate(pipe, 8)

    run()
    assert len([text for text in errors if "goes on with it" in text]) == 1
    assert not traces(old)
    assert dbcache.is_enabled(new)
    assert dbcache.is_enabled(kept)
    assert "".join(decisions(pipe)).count("c") > 0
    pipe.transformer, pipe.transformer_2 = new, kept  # each has its place among them
    assert not any("another one" in text for text in said_by(call))
    dbcache.disable(pipe)
    assert not traces(new) + traces(kept)
    plain = tiny.pipeline("wan2.2")
    plain.transformer, plain.transformer_2 = new, kept
    assert same(tiny.generate(pipe, 4), tiny.generate(plain, 4))


def test_enabled_again_after_an_exchange_leaves_the_old_one():
    pipe, other = tiny.pipeline("flux"), tiny.pipeline("flux")
    other.transformer = old = pipe.transformer
    dbcache.enable(pipe, **OPTIONS)
    pipe.transformer = tiny.flux(seed=7)
    dbcache.enable(pipe, **OPTIONS)
    assert not traces(old)
    dbcache.enable(other, **OPTIONS)
    pipe.transformer = old  # which another pipeline has, too
    tiny.generate(pipe, 5, guided=False)
    dbcache.disable(pipe)
    tiny.generate(other, 5, guided=False)
    assert decisions(other) == ["FFccF"]


def test_requests_under_way_go_on_with_the_transformer_they_began_with():
    pipe = dbcache.enable(tiny.pipeline("flux"), **OPTIONS)
    new, outer = tiny.flux(seed=7), []

    def exchange(pipe, step, time, tensors):
        if step == 1 and not outer:
            outer.append(pipe.transformer)
            pipe.transformer = new
        return {}

    text = {"prompt_embeds": tiny.noise(1, 6, 24, seed=11), "height": 64, "width": 64}
    text |= {"pooled_prompt_embeds": tiny.noise(1, 12, seed=12), "num_inference_steps": 5}
    pipe(**text, output_type="latent", callback_on_step_end=exchange)
    said = said_by(lambda: pipe(**text, output_type="latent"))
    assert any("goes on with it" in text for text in said)
    assert decisions(pipe) == ["FFccF"]
    assert not traces(outer[0])


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("target", ["model", "pipeline", "compiled"])
def test_a_model_that_peft_wrapped(name, target):
    family = tiny.FAMILIES[name]
    model = with_adapters(family.build())
    base = model.get_base_model()
    before = traces(model)
    plain = tiny.denoise(model, family, 5, named=True)
    with Oracle(base, family.lists, family.encoder_first, Rule(**OPTIONS)):
        expected = tiny.denoise(model, family, 5, named=True)
    owner = model
    if target == "pipeline":
        owner = tiny.pipeline(name)
        owner.transformer = model
        generated = tiny.generate(owner, 5, guided=False)
    elif target == "compiled":
        owner = torch.compile(model, backend="eager")
    dbcache.enable(owner, **OPTIONS)
    if target == "pipeline":
        tiny.generate(owner, 5, guided=False)
    else:
        for got, want in zip(tiny.denoise(model, family, 5, named=True), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert decisions(owner) == ["FFccF"]
    dbcache.disable(owner)
    assert traces(model) == before
    assert not dbcache.is_enabled(base)
    assert same(tiny.denoise(model, family, 5, named=True), plain)
    if target == "pipeline":
        assert same(tiny.generate(owner, 5, guided=False), generated)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_an_enabled_model_says_what_to_do(strict):
    model = tiny.wan(layers=2).requires_grad_(False)
    call = tiny.FAMILIES["wan"].arguments(tiny.noise(1, 4, 3, 8, 8, seed=1), 1.0, "cond")
    expected = model(**call)[0]
    dbcache.enable(model, **OPTIONS)
    with pytest.raises(Exception, match=r"dbcache\.disable.* first|dbcache\.disable first"):
        torch.export.export(model, (), call, strict=strict)
    dbcache.disable(model)
    if not strict:
        program = torch.export.export(model, (), call, strict=False)
        torch.testing.assert_close(program.module()(**call)[0], expected)


def both(**changes):
    return [dbcache.ParamsModifier(**changes), dbcache.ParamsModifier(**changes)]


def test_equal_modifiers_of_two_lists_are_those_of_their_stack():
    models = [FLUX.build() for _ in range(3)]
    changes = {"max_warmup_steps": 1, "enable_taylorseer": True}
    dbcache.enable(models[0], **OPTIONS, params_modifiers=both(**changes))
    dbcache.enable(models[1], **OPTIONS, params_modifiers=[both(**changes)])
    dbcache.enable(models[2], **{**OPTIONS, **changes})
    runs = [tiny.denoise(model, FLUX, 6) for model in models]
    assert same(runs[0], runs[2])
    assert same(runs[1], runs[2])
    assert [decisions(model) for model in models] == [["FccFcc"]] * 3


@pytest.mark.parametrize("target", ["model", "pipeline"])
def test_differing_modifiers_of_two_lists_split_their_stack(target):
    model = FLUX.build()
    modifiers = [
        dbcache.ParamsModifier(cache_config=dbcache.DBCacheConfig(max_warmup_steps=1)),
        dbcache.ParamsModifier(max_warmup_steps=3, enable_taylorseer=True),
    ]
    adapter = dbcache.BlockAdapter(
        transformer=FLUX.build(),
        blocks=[],
        forward_pattern=dbcache.ForwardPattern.Pattern_1,
    )
    adapter.blocks = [getattr(adapter.transformer, name) for name in FLUX.lists]
    dbcache.enable(adapter, **OPTIONS, params_modifiers=modifiers)
    if target == "pipeline":
        pipe, other = tiny.pipeline("flux"), tiny.pipeline("flux")
        dbcache.enable(pipe, **OPTIONS, params_modifiers=modifiers)
        adapter = dbcache.BlockAdapter(
            pipe=other,
            blocks=[getattr(other.transformer, name) for name in FLUX.lists],
            forward_pattern=dbcache.ForwardPattern.Pattern_1,
        )
        dbcache.enable(adapter, **OPTIONS, params_modifiers=modifiers)
        runs = [tiny.generate(each, 6, guided=False) for each in (pipe, other)]
        model = pipe
    else:
        dbcache.enable(model, **OPTIONS, params_modifiers=modifiers)
        runs = [tiny.denoise(each, FLUX, 6) for each in (model, adapter.transformer)]
    assert same(*runs)
    assert decisions(model) == ["FccFcc", "FFFccF"]
    assert [lane.stack for lane in dbcache.summary(model, logging=False).lanes] == [*FLUX.lists]
    dbcache.disable(model)


@pytest.mark.parametrize("count", [3, 0])
def test_too_many_modifiers_are_an_error(count):
    model = FLUX.build()
    with pytest.raises(ValueError, match="one entry per block stack"):
        dbcache.enable(model, params_modifiers=[dbcache.ParamsModifier() for _ in range(count)])
    assert not dbcache.is_enabled(model)


def test_the_summary_names_both_transformers_of_a_pipeline():
    pipe = dbcache.enable(tiny.pipeline("wan2.2"), **OPTIONS)
    tiny.generate(pipe, 8)
    summary = dbcache.summary(pipe, logging=False)
    assert {lane.part for lane in summary.lanes} == {"transformer", "transformer_2"}
    for text in (str(summary), summary.to_markdown(), summary._repr_html_()):
        assert "transformer.blocks" in text
        assert "transformer_2.blocks" in text
    assert type(summary).from_dict(summary.to_dict()).lanes[-1].part == "transformer_2"
    others = {lane.path: lane.other for lane in summary.lanes if lane.other is not None}
    assert {path: other.path for path, other in others.items()} == {path: path for path in others}
    dbcache.enable(pipe, residual_diff_threshold=1e-6, max_warmup_steps=1, Fn_compute_blocks=1)
    said = said_by(lambda: tiny.generate(pipe, 8))
    told = [text for text in said if "nothing was cached" in text]
    assert all("(transformer)" in text or "(transformer_2)" in text for text in told)
    assert len(dbcache.summary(pipe, logging=False).warnings) == 2
    single = dbcache.enable(tiny.pipeline("wan"), **OPTIONS)
    tiny.generate(single, 4)
    assert "transformer.blocks" not in str(dbcache.summary(single, logging=False))


class Loop:
    """A pipeline of its own that calls its transformer six times per step."""

    def __init__(self, model, *, named=False, tells=True, same_text=False):
        self.transformer, self.scheduler = model, diffusers.FlowMatchEulerDiscreteScheduler()
        self.named, self.tells = named, tells
        seeds = [11] * 6 if same_text else range(11, 17)
        self.texts = [tiny.noise(1, tiny.TEXT_TOKENS, tiny.TEXT_DIM, seed=s) for s in seeds]
        if same_text:
            self.texts = self.texts[:1] * 6

    @torch.inference_mode()
    def __call__(self, steps, calls=6):
        self.scheduler.set_timesteps(steps)
        x, outputs = tiny.noise(1, 16, 16, seed=5), []
        sigmas = self.scheduler.sigmas
        for i, time in enumerate(self.scheduler.timesteps):
            made = []
            for k, text in enumerate(self.texts[:calls]):
                given = FLUX.arguments(x, time.item() / 1000, "cond")
                given["encoder_hidden_states"] = text
                with self.transformer.cache_context(f"b{k}") if self.named else nullcontext():
                    made.append(self.transformer(**given)[0])
            outputs += made
            v = sum(made) / calls
            if self.tells:
                x = self.scheduler.step(v, time, x).prev_sample
            else:
                x = x + (sigmas[i + 1] - sigmas[i]) * v
        return outputs


@pytest.mark.parametrize("same_text", [False, True])
def test_six_unnamed_calls_per_step_have_a_lane_each(same_text):
    model = tiny.flux(double=2, single=2)
    with Oracle(model, FLUX.lists, True, Rule(**OPTIONS)):
        expected = Loop(model, named=True, same_text=same_text)(6)
    pipe = dbcache.enable(Loop(model, same_text=same_text), **OPTIONS)
    for _ in range(2):
        for got, want in zip(pipe(6), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        assert decisions(pipe) == ["FFccFc"] * 6
        assert not dbcache.summary(pipe, logging=False).notes


@pytest.mark.parametrize("named", [False, True])
def test_a_scheduler_that_is_never_asked_gives_no_lane_per_step(named):
    pipe = Loop(tiny.flux(double=2, single=2), tells=False, named=named)
    dbcache.enable(pipe, **OPTIONS)
    for _ in range(2):
        pipe(9, calls=1)
        assert decisions(pipe) == ["FFccFccFc"]


def gradients(model, wrap, *, at_once):
    """Return the gradients of six steps, each with the decision of its forward."""
    x, grads, outputs = tiny.noise(1, 16, 16, seed=1).requires_grad_(), [], []
    for step in range(6):
        given = FLUX.arguments(x, 1 - step / 6, "cond")
        outputs.append(wrap(lambda x, g=given: model(**{**g, "hidden_states": x})[0], x).sum())
        if not at_once:
            outputs.pop().backward()
            grads.append(x.grad)
            x.grad = None
    if at_once:
        sum(outputs).backward()
        grads.append(x.grad)
    return grads


WAYS = {
    "blocks": lambda run, x: run(x),
    "model": functools.partial(checkpoint, use_reentrant=False),
    "model, reentrant": functools.partial(checkpoint, use_reentrant=True),
}


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_runs_again_in_backward_acts_as_in_forward_and_counts_nothing(way, at_once):
    model = dbcache.enable(tiny.flux(double=2, single=2), **OPTIONS)
    expected = gradients(model, WAYS["blocks"], at_once=at_once)
    assert decisions(model) == ["FFccFc"]
    dbcache.refresh_context(model)
    if way == "blocks":
        model.enable_gradient_checkpointing()
    got = gradients(model, WAYS[way], at_once=at_once)
    assert decisions(model) == ["FFccFc"]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    dbcache.disable(model)
    assert not traces(model)


SKIPPING = {
    "F1B0": {},
    "DBPrune": {"cache_type": "DBPrune"},
    "last blocks": {"Bn_compute_blocks": 2, "Bn_compute_blocks_ids": [1]}
    | {"non_compute_blocks_diff_threshold": 1.0},
    "each sample": {"batch_reduce": "each"},
}


def third_output(model, x, wrap=WAYS["blocks"]):
    """Return the sum of what a cached step returns that is given `x`, after two full ones."""
    with torch.no_grad():
        for step in range(2):
            model(**FLUX.arguments(tiny.noise(1, 16, 16, seed=1).double(), 1 - step / 6, "cond"))
    given = FLUX.arguments(x, 1 - 2 / 6, "cond")
    return wrap(lambda x: model(**{**given, "hidden_states": x})[0], x).square().sum()


@pytest.mark.parametrize("way", SKIPPING)
def test_gradients_of_cached_steps_are_those_of_the_prediction(way):
    """By finite differences: what is stored is a constant, what runs is not."""
    model = dbcache.enable(tiny.flux(double=2, single=3).double(), **OPTIONS | SKIPPING[way])
    x, along = (tiny.noise(1, 16, 16, seed=seed).double() for seed in (1, 2))
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            dbcache.refresh_context(model)
            values.append(third_output(model, x + sign * 1e-3 * along))
    expected = (values[0] - values[1]) / 2e-3
    for wrap in (WAYS["blocks"], WAYS["model"]):
        dbcache.refresh_context(model)
        x.requires_grad_()
        said = said_by(lambda wrap=wrap: third_output(model, x, wrap).backward())
        assert decisions(model) == ["FFc"]
        assert len([text for text in said if "gradients are on" in text]) == 1
        torch.testing.assert_close((x.grad * along).sum(), expected, rtol=2e-3, atol=0)
        x.grad = None
        if way != "F1B0":
            return  # a whole model that is checkpointed is refused there


@pytest.mark.parametrize("way", SKIPPING)
def test_checkpoints_that_backward_would_run_otherwise_than_forward_are_refused(way):
    model = dbcache.enable(tiny.flux(double=2, single=3), **OPTIONS | SKIPPING[way])
    model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=True))
    with pytest.raises(RuntimeError, match=r"use_reentrant=False.*dbcache\.disable to train"):
        gradients(model, WAYS["blocks"], at_once=False)
    model.disable_gradient_checkpointing()
    dbcache.refresh_context(model)
    x = tiny.noise(1, 16, 16, seed=1)
    with torch.no_grad():
        model(**FLUX.arguments(x, 1.0, "cond"))
    y = checkpoint(
        lambda x: model(**FLUX.arguments(x, 0.5, "cond"))[0], x.requires_grad_(), use_reentrant=True
    )
    with pytest.raises(RuntimeError, match=r"one that dbcache does not know.*disable to train"):
        y.sum().backward()


def test_gradients_are_not_said_where_no_step_can_be_cached():
    model = dbcache.enable(
        tiny.flux(double=2, single=2), **OPTIONS | {"residual_diff_threshold": 0}
    )
    assert said_by(lambda: gradients(model, WAYS["blocks"], at_once=False)) == []


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, None], ids=["DataParallel", "other"])
def test_a_wrapper_that_spreads_a_model_is_named_with_what_to_pass(wrapper):
    class Spread(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    pipe = tiny.pipeline("flux")
    model, pipe.transformer = pipe.transformer, (wrapper or Spread)(pipe.transformer)
    for target in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match=r"around FluxTransformer2DModel; pass its \.module"):
            dbcache.enable(target, **OPTIONS)
    assert not traces(model)
    dbcache.enable(pipe.transformer.module, **OPTIONS)
    with pytest.raises(RuntimeError, match=r"call its \.module.*docs/parallel"):
        model._replicate_for_data_parallel()  # as nn.DataParallel does on each call
    dbcache.disable(model)
    assert "_replicate_for_data_parallel" not in vars(model)
