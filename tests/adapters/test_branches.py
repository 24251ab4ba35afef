"""Lanes of guidance branches, on a toy pipeline that calls its transformer in any sequence.

A loop is written as one word per step: "cu" is a step that calls for the prompt and then for the
negative prompt, "c" one without guidance, "cup" one with a third, perturbed call.
"""

import copy
import pickle

import inside
import pytest
import torch

import dbcache
from dbcache import BlockAdapter, ForwardPattern
from dbcache.adapters.pipelines.events import OBSERVERS

FORCED = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 2,
    "residual_diff_threshold": 1.0,
    "max_continuous_cached_steps": 2,
}


class Block(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(8, 8, generator=generator) * 0.2)

    def forward(self, hidden_states, encoder_hidden_states):
        return hidden_states + torch.tanh((hidden_states + encoder_hidden_states) @ self.weight)


class Transformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(seed) for seed in range(4)])

    def forward(self, hidden_states, encoder_hidden_states, control=None, attention_kwargs=None):
        for block in self.blocks:
            hidden_states = block(hidden_states, encoder_hidden_states)
            if control is not None:
                hidden_states = hidden_states + control
        return hidden_states


class Scheduler:
    def set_timesteps(self, steps):
        self.steps = steps

    def step(self, output, sample):
        """Make a step."""
        return sample - output / self.steps


class ControlNet(torch.nn.Module):
    def forward(self, sample, conditioning_scale=1.0):
        scales = (
            conditioning_scale if isinstance(conditioning_scale, list) else [conditioning_scale]
        )
        return sample * sum(scales)


class Pipeline:
    """Calls the transformer as `__call__` is told, and notes the lane of each call."""

    def __init__(self, has_scheduler=True, is_named=False, keeps_conditions=True):
        self.transformer = Transformer()
        if has_scheduler:
            self.scheduler = Scheduler()
        self.is_named = is_named
        self.keeps_conditions = keeps_conditions
        self.steps_told = has_scheduler

    @torch.no_grad()
    def __call__(self, *loops, controls=None, scales=None, lora=None):
        prompts = {name: torch.full((1, 1, 8), float(i)) for i, name in enumerate(("c", "u", "q"))}
        prompts["p"] = prompts["c"]  # perturbed inside: the same prompt
        self.seen = {}
        for words in loops:
            x = torch.linspace(-1, 1, 16).view(1, 2, 8)
            if self.steps_told:
                self.scheduler.set_timesteps(len(words))
            for step, word in enumerate(words):
                options = {}
                if controls is not None:
                    scale = scales[step] if scales else 1.0
                    control = self.controlnet(x, conditioning_scale=scale) if scales else 0.1 * x
                    options["control"] = control if controls[step] else None
                if lora is not None:
                    options["attention_kwargs"] = {"scale": lora[step]}
                outputs = [self.predict(call, x, prompts[call], options) for call in word]
                x = self.advance(sum(outputs) / len(outputs), x)
        return x

    def predict(self, call, x, prompt, options):
        if not self.keeps_conditions:
            prompt = prompt + 0  # as a cast does
        output = self.transformer(x, encoder_hidden_states=prompt, **options)
        if "_dbcache" in self.transformer.__dict__:
            self.seen.setdefault(call, []).append(inside.branch(self.transformer))
        return output

    def advance(self, output, x):
        return self.scheduler.step(output, x) if self.steps_told else x - output / 10


def enable(pipe, **options):
    adapter = BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=pipe.transformer.blocks,
        forward_pattern=ForwardPattern.Pattern_2,
        has_separate_cfg=options.pop("has_separate_cfg", False),
    )
    dbcache.enable(adapter, **{**FORCED, **options})
    return pipe


def decisions(pipe):
    """Return F for full and c for cached, per lane."""
    return {
        lane.branch: "".join("c" if s in lane.cached_steps else "F" for s in range(lane.steps))
        for lane in dbcache.summary(pipe).lanes
    }


def one_lane_each(pipe):
    """Say whether all calls of a branch were in one lane, and no two branches shared one."""
    lanes = [set(keys) for keys in pipe.seen.values()]
    return all(len(keys) == 1 for keys in lanes) and len(set().union(*lanes)) == len(lanes)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["c"] * 8, {None: "FFccFccF"}),
        (["cu"] * 8, {"cond": "FFccFccF", "uncond": "FFccFccF"}),
        (["cup"] * 5, {"cond": "FFccF", "uncond": "FFccF", "branch 3": "FFccF"}),
        # an interval that ends, one that begins, and both
        (["cu"] * 3 + ["c"] * 5, {"cond": "FFccFccF", "uncond": "FFc"}),
        (["c"] * 3 + ["cu"] * 5, {"cond": "FFccFccF", "uncond": "FFccF"}),
        (["c", "cu", "cu", "cu", "c", "c"], {"cond": "FFccFc", "uncond": "FFc"}),
        # back after a pause: what the lane knows is old, so the first step is full
        (["cu"] * 4 + ["c"] * 2 + ["cu"] * 2, {"cond": "FFccFccF", "uncond": "FFccFc"}),
        # every other step is a rhythm of its own, and a full step follows where it changes
        (["cu", "c"] * 4, {"cond": "FFccFccF", "uncond": "FFcc"}),
        (["cu"] * 3 + ["c", "cu"] * 3, {"cond": "FFccFccFc", "uncond": "FFcFcc"}),
        # the middle one of three pauses
        (["cup"] * 3 + ["cp"] * 3, {"cond": "FFccFc", "uncond": "FFc", "branch 3": "FFccFc"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_each_branch_has_a_lane_of_its_own(words, wanted):
    pipe = enable(Pipeline())
    for _ in range(2):
        pipe(words)
        assert decisions(pipe) == wanted
        assert one_lane_each(pipe)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["uc"] * 6, {"uncond": "FFccFc", "cond": "FFccFc"}),
        (["uc"] * 3 + ["c"] * 3, {"uncond": "FFc", "cond": "FFccFc"}),
        (["uc", "c", "c", "uc", "c", "uc"], {"uncond": "FFc", "cond": "FFccFc"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_the_unconditional_call_may_come_first(words, wanted):
    pipe = enable(Pipeline(), cfg_compute_first=True)
    pipe(words)
    assert decisions(pipe) == wanted
    assert one_lane_each(pipe)


def test_a_branch_that_comes_back_is_not_taken_for_a_prompt_that_travels():
    pipe = enable(Pipeline())
    pipe(["cu", "cp", "cup", "cup", "cup"])
    assert pipe.seen["u"][1:] == ["branch 3"] * 3
    assert pipe.seen["p"] == ["uncond"] * 4
    assert decisions(pipe) == {"cond": "FFccF", "uncond": "FFccF", "branch 3": "FFc"}


def test_guidance_that_begins_late_with_the_unconditional_call_keeps_lanes_apart():
    pipe = enable(Pipeline())
    pipe(["c"] * 3 + ["uc"] * 4)
    assert one_lane_each(pipe)
    assert decisions(pipe) == {"branch 1": "FFccFcc", "branch 2": "FFcc"}


@pytest.mark.parametrize("words", [["cu"] * 3 + ["c"] * 3, ["c"] * 3 + ["cu"] * 3, ["cup"] * 4])
def test_conditions_made_anew_for_each_call_are_known_by_their_place(words):
    pipe = enable(Pipeline(keeps_conditions=False))
    pipe(words)
    assert one_lane_each(pipe)
    assert decisions(pipe)["cond"] == "FFccFc"[: len(words)]


@pytest.mark.parametrize("words", [["c"] * 9, ["cu"] * 9, ["cu"] * 3 + ["c"] * 6])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "anew"])
def test_without_a_scheduler(words, kept):
    pipe = enable(
        Pipeline(has_scheduler=False, keeps_conditions=kept), has_separate_cfg="u" in words[0]
    )
    pipe(words)
    if kept or words[-1] == words[0]:
        assert one_lane_each(pipe)
        assert next(iter(decisions(pipe).values())) == "FFccFccFc"


@pytest.mark.parametrize("words", [["c"] * 12, ["cu"] * 12])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "anew"])
def test_a_scheduler_that_is_not_asked_for_steps_is_not_waited_for(words, kept):
    pipe = Pipeline(keeps_conditions=kept)
    pipe.steps_told = False
    enable(pipe, has_separate_cfg=words[0] == "cu")
    pipe(words)
    pipe(words)
    assert one_lane_each(pipe)
    assert set(decisions(pipe).values()) == {"FFccFccFccFc"}


@pytest.mark.parametrize(
    ("conditions", "wanted"),
    [
        ("aaaabbbb", {"branch 1": "FFcc", "branch 2": "FFcc"}),
        # another at every step: known by the place; the first change might be a branch that is new
        ("abcdefghi", {None: "FFccFccFc"}),
        ("aaabcdefg", {"branch 1": "FFc", "branch 2": "FFccFc"}),
        # another at every second step: full where it changes, once it is known that none comes back
        ("aabbccddee", {"branch 1": "FF", "branch 2": "FFFcFcFc"}),
        # the first one comes again in the step in which another one comes
        (["a", "a", "ba", "ba", "ba"], {"branch 1": "FFccF", "branch 2": "FFc"}),
        # two places, of which the first travels
        (["aU", "bU", "cU", "dU", "eU"], {"cond": "FFccF", "uncond": "FFccF"}),
        (["aA", "bB", "cC", "dD", "eE"], {"cond": "FFccF", "uncond": "FFccF"}),
    ],
)
def test_other_prompts_in_mid_request(conditions, wanted):
    pipe = enable(Pipeline())
    prompts = {name: torch.full((1, 1, 8), float(ord(name))) for name in "".join(conditions)}
    pipe.scheduler.set_timesteps(len(conditions))

    def loop():
        for step in conditions:
            for name in step:
                pipe.transformer(torch.ones(1, 2, 8), prompts[name])
            pipe.scheduler.step(torch.ones(1), torch.ones(1))

    with torch.no_grad():
        pipe._dbcache.call(loop, (), {})
    assert decisions(pipe) == wanted


def test_each_denoising_loop_of_a_call_starts_anew():
    pipe = enable(Pipeline())
    pipe(["cu"] * 5, ["cu"] * 3, ["c"] * 4)
    assert decisions(pipe) == {None: "FFcc"}
    assert "denoised 3 times, the last time is shown" in str(dbcache.summary(pipe))
    pipe(["c"] * 4)
    assert "denoised" not in str(dbcache.summary(pipe))


def test_the_users_flag_wins():
    pipe = enable(Pipeline(), enable_separate_cfg=False)
    pipe(["cu"] * 4)
    assert decisions(pipe) == {None: "FFccFccF"}
    enable(pipe, enable_separate_cfg=True)
    pipe(["c"] * 8)
    assert decisions(pipe) == {"cond": "FFcc", "uncond": "FFcc"}


@pytest.mark.parametrize("separate", [True, False])
def test_a_branch_that_was_found_can_take_the_diff_of_the_other(separate):
    pipe = enable(Pipeline(), cfg_diff_compute_separate=separate)
    pipe(["cu"] * 6)
    cond, uncond = dbcache.summary(pipe).lanes
    assert cond.diffs
    assert (cond.diffs == uncond.diffs) is not separate


def test_schedulers_and_controlnets_are_given_back():
    pipe = enable(Pipeline())
    pipe.controlnet = ControlNet()
    pipe(["c"] * 3)
    assert type(pipe.scheduler) is Scheduler
    assert OBSERVERS not in vars(pipe.scheduler)
    assert not pipe.controlnet._forward_pre_hooks
    pipe.transformer.blocks[0].weight = torch.zeros(3, 3)
    with pytest.raises(RuntimeError):
        pipe(["c"])
    assert type(pipe.scheduler) is Scheduler
    assert not inside.handle(pipe)._open


def test_copies_of_a_scheduler_tell_of_steps_during_the_call_only():
    class Copying(Pipeline):
        def advance(self, output, x):
            assert self.scheduler.step.__doc__ == "Make a step."
            self.own = copy.deepcopy(self.scheduler)
            return self.own.step(output, x)

    pipe = enable(Copying())
    pipe(["cp"] * 4)
    assert decisions(pipe) == {"cond": "FFcc", "uncond": "FFcc"}
    assert pipe.own.step(torch.ones(1), torch.ones(1)) == 0.75
    for plain in (copy.deepcopy(pipe.own), pickle.loads(pickle.dumps(pipe.own))):
        assert type(plain) is Scheduler
        assert vars(plain) == {"steps": 4}


def test_a_call_inside_a_call_keeps_the_shared_scheduler_watched():
    class Nested(Pipeline):
        inner = None

        def advance(self, output, x):
            if self.inner is not None:
                self.inner(["c"] * 3)
            return super().advance(output, x)

    outer, inner = enable(Nested()), enable(Pipeline())
    inner.scheduler = outer.scheduler
    outer.inner = inner
    outer(["c"])
    assert decisions(inner) == {None: "FFc"}
    assert type(outer.scheduler) is Scheduler


def plain_and_cached(words, **how):
    """Return the pipeline after a cached call, and whether threshold 0 was bit-equal."""
    pipe = Pipeline()
    pipe.controlnet = ControlNet()
    plain = pipe(words, **how)
    enable(pipe, residual_diff_threshold=0.0)
    exact = torch.equal(pipe(words, **how), plain)
    enable(pipe, max_continuous_cached_steps=-1)
    pipe(words, **how)
    return pipe, exact


def test_the_scale_of_a_compiled_controlnet_is_seen():
    pipe = enable(Pipeline(), max_continuous_cached_steps=-1)
    pipe.controlnet = torch.compile(ControlNet(), backend="eager")
    pipe(["c"] * 6, controls=[1] * 6, scales=[1.0] * 3 + [0.5] * 3)
    assert decisions(pipe) == {None: "FFcFcc"}


def test_refreshing_within_a_call_goes_on_with_lanes_of_their_own():
    class Refreshing(Pipeline):
        def advance(self, output, x):
            if len(self.seen["u"]) == 4:
                dbcache.refresh_context(self.transformer, max_continuous_cached_steps=1)
            return super().advance(output, x)

    pipe = enable(Refreshing())
    pipe(["cu"] * 9)
    assert decisions(pipe) == {"cond": "FFcFc", "uncond": "FFcFc"}
    assert one_lane_each(pipe)


@pytest.mark.parametrize(
    ("how", "wanted", "why"),
    [
        ({"controls": [1] * 8}, "FFcccccc", None),
        ({"controls": [1] * 5 + [0] * 3}, "FFcccFcc", "(control)"),
        ({"controls": [0] * 5 + [1] * 3}, "FFcccFcc", "(control)"),
        ({"controls": [1] * 8, "scales": [0.5] * 8}, "FFcccccc", None),
        ({"controls": [1] * 8, "scales": [0.5] * 4 + [0.0] * 4}, "FFccFccc", "ControlNet changed"),
        ({"controls": [1] * 8, "scales": [[1, 2]] * 4 + [[1, 3]] * 4}, "FFccFccc", "ControlNet"),
        ({"lora": [0.5] * 8}, "FFcccccc", None),
        ({"lora": [0.5] * 6 + [1.0] * 2}, "FFccccFc", "(the scale of an adapter)"),
    ],
)
def test_a_change_of_what_is_added_makes_the_next_step_a_full_one(how, wanted, why):
    pipe, exact = plain_and_cached(["cu"] * 8, **how)
    assert exact
    assert decisions(pipe) == {"cond": wanted, "uncond": wanted}
    notes = str(dbcache.summary(pipe))
    assert "2 steps were full since" in notes if why else "were full since" not in notes
    assert (why or "") in notes
