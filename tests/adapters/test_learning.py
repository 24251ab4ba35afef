"""BlockAdapter(auto=True) where the source of the blocks is silent: the first forward tells."""

import accelerate
import inside
import pytest
import tiny
import torch

import dbcache
from dbcache import BlockAdapter, DBCacheConfig, ForwardPattern, ParamsModifier

FORCED = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}
ONES = torch.ones(1, 5, 4)
X, Y = tiny.noise(1, 5, 4, seed=1), tiny.noise(1, 3, 4, seed=2)


class Pair(torch.nn.Module):
    """Updates two streams, each from itself and from the mean of the other."""

    def __init__(self):
        super().__init__()
        self.to_a, self.to_b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def update(self, a, b):
        return a + self.to_a(b.mean(1, keepdim=True)).tanh(), b + self.to_b(a.mean(1, keepdim=True))


class AsGiven(Pair):
    def forward(self, left, right):
        return self.update(left, right)


class Crossed(Pair):
    def forward(self, right, left):
        left, right = self.update(left, right)
        return [right, left][::-1]


class HiddenSecond(Pair):
    def forward(self, other, hidden_states):
        result = self.update(hidden_states, other)
        return result


class Single(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, scale, state):
        return (state + scale * self.linear(state).tanh(), None)


class Extra(Single):
    def forward(self, scale, state):
        return state + self.linear(state), state * scale


class Unlike(Single):
    def forward(self, scale, state):
        return self.linear(state).sum()


class Model(torch.nn.Module):
    """A loop that calls its blocks as `call` says and may add to what they return."""

    def __init__(self, block, call, adds=0.0):
        super().__init__()
        self.parts = torch.nn.ModuleList([block() for _ in range(6)])
        self.call, self.adds = call, adds
        tiny.fill(self, 0)

    def forward(self, x, y):
        for part in self.parts:
            x, y = self.call(part, x, y)
            x = x + self.adds if self.adds else x
        return x, y


def second(output, y):
    return output[0], y


CASES = {
    "two, in order": (AsGiven, lambda b, x, y: b(x, y), ForwardPattern.Pattern_0, "left", "right"),
    "two, crossed": (Crossed, lambda b, x, y: b(y, x), ForwardPattern.Pattern_0, "left", "right"),
    "two, by name": (
        HiddenSecond,
        lambda b, x, y: b(other=y, hidden_states=x),
        ForwardPattern.Pattern_0,
        "hidden_states",
        "other",
    ),
    "one, beside a constant of its shape": (
        Single,
        lambda b, x, y: second(b(ONES, x), y),
        ForwardPattern.Pattern_3,
        "state",
        None,
    ),
    "encoder first": (
        Crossed,
        lambda b, x, y: b(x, y)[::-1],
        ForwardPattern.Pattern_1,
        "right",
        "left",
    ),
    "one, second": (
        Single,
        lambda b, x, y: second(b(torch.ones(1), x), y),
        ForwardPattern.Pattern_3,
        "state",
        None,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("adds", [0.0, 0.125], ids=["handed on", "added to"])
@pytest.mark.parametrize("case", CASES)
def test_streams_and_their_order_are_learned_from_the_first_forward(case, adds):
    block, call, pattern, hidden, encoder = CASES[case]
    model = Model(block, call, adds)
    plain = model(X, Y)
    before = dict(model.__dict__)
    dbcache.enable(BlockAdapter(transformer=model, auto=True), **FORCED)
    for step in range(4):
        for output, wanted in zip(model(X, Y), plain, strict=True):
            torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6, msg=f"step {step}")
    (stack,) = inside.stacks(model)
    assert (stack.pattern, stack.streams[0]) == (pattern, hidden)
    assert encoder in (None, stack.streams[1])
    (lane,) = dbcache.summary(model).lanes
    assert lane.reasons == ["warm-up"] * 2 + ["threshold is 1 or more"] * 2
    assert model.parts is model._modules["parts"]
    dbcache.disable(model)
    assert model.__dict__ == before
    assert all(map(torch.equal, model(X, Y), plain))


@torch.no_grad()
def test_of_two_streams_the_larger_is_measured_unless_it_is_named():
    model = Model(AsGiven, lambda b, x, y: b(x, y))
    for small, large, streams, hidden in (
        (Y, X, None, "right"),
        (X, Y, None, "left"),
        (Y, X, "left", "left"),
    ):
        names = {} if streams is None else {"streams": streams}
        dbcache.enable(BlockAdapter(transformer=model, auto=True, **names), **FORCED)
        model(small, large)
        (stack,) = inside.stacks(model)
        assert stack.streams[0] == hidden


@torch.no_grad()
def test_a_stream_that_the_last_block_leaves_out_is_not_the_measured_one():
    """As in ComfyUI's Stable Diffusion 3, where prompt and image may have as many tokens."""

    class Joint(AsGiven):
        def forward(self, left, right):
            left, right = self.update(left, right)
            return (None if self.is_last else left), right

    model = Model(Joint, lambda b, x, y: b(x, y))
    for i, block in enumerate(model.parts):
        block.is_last = i == 5
    plain = model(X, X)[1]
    dbcache.enable(BlockAdapter(transformer=model, auto=True), **FORCED)
    for step in range(6):
        assert torch.allclose(model(X, X)[1], plain, atol=1e-6), step
    (lane,) = dbcache.summary(model, logging=False)
    assert lane.cached_steps == [2, 3, 4, 5]


@torch.no_grad()
def test_the_first_step_counts_and_gives_no_reference():
    model = Model(AsGiven, lambda b, x, y: b(x, y))
    config = {**FORCED, "max_warmup_steps": 0, "steps_computation_mask": [1, 0, 0, 1, 0]}
    dbcache.enable(BlockAdapter(transformer=model, auto=True), **config)
    assert str(dbcache.summary(model)) == "dbcache: no step was run yet"
    for _ in range(5):
        model(X, Y)
    always = "threshold is 1 or more"
    (lane,) = dbcache.summary(model).lanes
    assert lane.reasons == ["mask", "no reference", always, "mask", always]


@torch.no_grad()
def test_weights_that_are_offloaded_do_not_say_where_steps_run():
    """accelerate leaves tensors of "meta" in their places."""
    model = Model(AsGiven, lambda b, x, y: b(x, y))
    plain = model(X, Y)
    accelerate.cpu_offload(model, torch.device("cpu"))
    dbcache.enable(BlockAdapter(transformer=model, auto=True), **FORCED)
    for _ in range(3):
        for output, wanted in zip(model(X, Y), plain, strict=True):
            torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
    assert dbcache.summary(model).lanes[0].cached_steps == [2]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*leaves none of the 6 blocks to skip")
def test_where_all_blocks_run_on_every_step_no_step_is_counted():
    model = Model(AsGiven, lambda b, x, y: b(x, y))
    dbcache.enable(BlockAdapter(transformer=model, auto=True), Fn_compute_blocks=8)
    with dbcache.start_request(model) as request:
        for _ in range(6):
            model(X, Y)
    summary = request.summary()
    assert [lane.steps for lane in summary] == []  # not one, of the forward that was learned from
    assert "all 6 blocks run on every step" in "".join(summary.warnings)


@torch.no_grad()
def test_requests_branches_and_settings_are_those_of_any_other_model():
    model = Model(AsGiven, lambda b, x, y: b(x, y))
    adapter = BlockAdapter(
        transformer=model,
        auto=True,
        has_separate_cfg=True,
        params_modifiers=ParamsModifier(cache_config=DBCacheConfig(Bn_compute_blocks=2)),
    )
    dbcache.enable(adapter, **FORCED, num_inference_steps=3)
    for _ in range(2):
        for _ in range(3):
            model(X, Y), model(X * 2, Y * 2)
        lanes = dbcache.summary(model).lanes
        assert [(lane.branch, lane.cached_steps) for lane in lanes] == [
            ("cond", [2]),
            ("uncond", [2]),
        ]
    assert inside.stacks(model)[0].bn == 2
    dbcache.refresh_context(model, max_warmup_steps=1)
    for _ in range(2):
        model(X, Y), model(X * 2, Y * 2)
    assert [lane.cached_steps for lane in dbcache.summary(model).lanes] == [[1], [1]]


@torch.no_grad()
def test_an_exception_in_the_first_forward_leaves_it_to_the_next_one():
    model = Model(AsGiven, lambda b, x, y: b(x, y))
    dbcache.enable(BlockAdapter(transformer=model, auto=True), **FORCED)
    with pytest.raises(RuntimeError):
        model(X, Y[..., :2])
    assert "parts" not in model.__dict__
    for _ in range(3):
        model(X, Y)
    assert dbcache.summary(model).lanes[0].cached_steps == [2]


@torch.no_grad()
def test_a_model_that_hands_nothing_on_is_refused_with_what_was_seen():
    one = torch.ones(1)

    def drops(block, x, y):
        block(one, x)
        return x, y

    for block, call, text in (
        (
            Unlike,
            drops,
            r"parts: returns a tensor of shape \(\), which the next block does not take",
        ),
        (Extra, lambda b, x, y: second(b(one, x), y), r"of which the next block takes \[0\]"),
    ):
        model = Model(block, call)
        dbcache.enable(BlockAdapter(transformer=model, auto=True), **FORCED)
        with pytest.raises(ValueError, match=text):
            model(X, Y)
        dbcache.disable(model)
        model(X, Y)


class TwoLists(torch.nn.Module):
    """A trunk that tells nothing by names, and a list beside it that only collects."""

    def __init__(self):
        super().__init__()
        self.hints = torch.nn.ModuleList([Extra() for _ in range(3)])
        self.trunk = torch.nn.ModuleList([AsGiven() for _ in range(6)])
        tiny.fill(self, 0)

    def forward(self, x, y):
        hints, h = [], x
        for block in self.hints:
            h, hint = block(torch.ones(1), h)
            hints.append(hint)
        for i, block in enumerate(self.trunk):
            x, y = block(x, y)
            x = x + 0.1 * hints[i % 3]
        return x, y


@torch.no_grad()
def test_a_list_that_is_no_chain_is_left_out_and_said_so():
    model = TwoLists()
    plain = model(X, Y)
    dbcache.enable(BlockAdapter(transformer=model, auto=True), **FORCED)
    with pytest.warns(UserWarning, match=r"hints is not cached: a block returns tuple of 2"):
        model(X, Y)
    for _ in range(3):
        for output, wanted in zip(model(X, Y), plain, strict=True):
            torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
    (lane,) = dbcache.summary(model).lanes
    assert (lane.stack, lane.cached_steps) == ("trunk", [2, 3])


@torch.no_grad()
def test_blocks_that_were_given_without_a_pattern_are_learned_too():
    model = Model(AsGiven, lambda b, x, y: b(x, y))
    adapter = BlockAdapter(transformer=model, blocks=model.parts, auto=True)
    dbcache.enable(adapter, **FORCED, decision_scope="model")
    for _ in range(3):
        model(X, Y)
    assert dbcache.summary(adapter).lanes[0].cached_steps == [2]
