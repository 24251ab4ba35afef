"""decision_scope="model": the probe of the first stack decides for all stacks of a model."""

from contextlib import ExitStack

import inside
import pytest
import tiny
import torch
from diffusers import AuraFlowTransformer2DModel, Flux2Transformer2DModel
from engines import options
from oracle import FollowingOracle, Oracle, Rule

import dbcache
from dbcache import (
    BlockAdapter,
    DBCacheConfig,
    DMDCalibratorConfig,
    ForwardPattern,
    ParamsModifier,
    TaylorSeerCalibratorConfig,
)

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 16
FLUX_LISTS = ("transformer_blocks", "single_transformer_blocks")
PAIR = (ForwardPattern.Pattern_1, ForwardPattern.Pattern_1)
JOINT_THEN_ONE = (ForwardPattern.Pattern_1, ForwardPattern.Pattern_3)
FORCED = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}


def flux2():
    model = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=4,
        num_single_layers=6,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=tiny.TEXT_DIM,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return tiny.fill(model, 3)


def auraflow():
    model = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=4,
        num_single_dit_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=tiny.TEXT_DIM,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    return tiny.fill(model, 4)


def flux_inputs(x, t):
    return tiny.FAMILIES["flux"].arguments(x, t, "cond")


def flux2_inputs(x, t):
    tokens = torch.cartesian_prod(*[torch.arange(n) for n in (1, 4, 4, 1)])
    return {
        "hidden_states": x,
        "encoder_hidden_states": tiny.noise(1, tiny.TEXT_TOKENS, tiny.TEXT_DIM, seed=11),
        "timestep": torch.tensor([t]),
        "img_ids": tokens,
        "txt_ids": torch.zeros(tiny.TEXT_TOKENS, 4),
        "return_dict": False,
    }


def auraflow_inputs(x, t):
    return {
        "hidden_states": x,
        "encoder_hidden_states": tiny.noise(1, tiny.TEXT_TOKENS, tiny.TEXT_DIM, seed=11),
        "timestep": torch.tensor([t]),
        "return_dict": False,
    }


class Kind:
    """A real model of two stacks, how it is built and called."""

    def __init__(self, build, inputs, latent, lists, patterns):
        self.build, self.inputs, self.latent = build, inputs, latent
        self.lists, self.patterns = lists, patterns

    def adapter(self, model, **fields):
        return BlockAdapter(
            transformer=model,
            blocks=[getattr(model, name) for name in self.lists],
            forward_pattern=list(self.patterns),
            **fields,
        )

    @torch.no_grad()
    def denoise(self, model, steps=STEPS):
        x, outputs = tiny.noise(*self.latent, seed=5), []
        for step in range(steps):
            output = model(**self.inputs(x, 1 - step / steps))[0]
            outputs.append(output)
            x = x - output / steps
        return outputs


JOINT = ("joint_transformer_blocks", "single_transformer_blocks")
KINDS = {
    "flux": Kind(tiny.flux, flux_inputs, (1, 16, 16), FLUX_LISTS, PAIR),
    "flux2": Kind(flux2, flux2_inputs, (1, 16, 16), FLUX_LISTS, JOINT_THEN_ONE),
    "auraflow": Kind(auraflow, auraflow_inputs, (1, 4, 8, 8), JOINT, JOINT_THEN_ONE),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

RULES = {
    "reuse": Rule(residual_diff_threshold=0.25),
    "F2B1, order 2": Rule(
        Fn_compute_blocks=2, Bn_compute_blocks=1, residual_diff_threshold=0.25, order=2
    ),
    "2 in a row, order 1": Rule(
        residual_diff_threshold=0.3, max_continuous_cached_steps=2, order=1
    ),
}


@kinds
def test_never_caching_is_bit_identical(kind):
    model = kind.build()
    plain = kind.denoise(model, 6)
    before = dict(model.__dict__)
    never = {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.0, "decision_scope": "model"}
    dbcache.enable(kind.adapter(model), **never)
    assert all(map(torch.equal, kind.denoise(model, 6), plain))
    assert [lane.cached_steps for lane in dbcache.summary(model).lanes] == [[], []]
    dbcache.disable(model)
    assert model.__dict__ == before
    assert all(map(torch.equal, kind.denoise(model, 6), plain))


@kinds
@pytest.mark.parametrize(("fn", "bn"), [(1, 0), (2, 1)])
def test_later_stacks_run_no_probe(kind, fn, bn):
    model = kind.build()
    dbcache.enable(
        kind.adapter(model),
        **{**FORCED, "Fn_compute_blocks": fn, "Bn_compute_blocks": bn},
        decision_scope="model",
    )
    calls = {}
    for name in kind.lists:
        for i, block in enumerate(getattr(model, name)):
            key = name, i
            calls[key] = 0
            block.register_forward_pre_hook(
                lambda *_, key=key: calls.__setitem__(key, calls[key] + 1)
            )
    outputs = kind.denoise(model, 6)
    expected = {}
    for probe, name in zip((fn, 0), kind.lists, strict=True):
        blocks = len(getattr(model, name))
        for i in range(blocks):
            expected[name, i] = 6 if i < probe or i >= blocks - bn else 2
    assert calls == expected
    assert all(output.isfinite().all() for output in outputs)


@kinds
def test_the_same_input_gives_the_same_output_full_and_cached(kind):
    model, x = kind.build(), tiny.noise(*kind.latent, seed=7)
    with torch.no_grad():
        plain = model(**kind.inputs(x, 0.7))[0]
        dbcache.enable(
            kind.adapter(model), **{**FORCED, "max_warmup_steps": 1}, decision_scope="model"
        )
        full, cached = (model(**kind.inputs(x, 0.7))[0] for _ in range(2))
    assert torch.equal(full, plain)
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)
    assert [lane.cached_steps for lane in dbcache.summary(model).lanes] == [[1], [1]]


@pytest.mark.parametrize("name", ["flux", "flux2"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_outputs_and_decisions_are_those_of_the_oracle(name, rule):
    kind = KINDS[name]
    model, (first, second) = kind.build(), kind.lists
    leader = Oracle(model, (first,), True, rule)
    follower = FollowingOracle(leader, (second,), True if name == "flux" else None)
    with ExitStack() as stack:
        stack.enter_context(follower)
        stack.enter_context(leader)
        expected = kind.denoise(model)
    (trace,) = leader.lanes.values()
    calibrator = TaylorSeerCalibratorConfig(taylorseer_order=rule.order) if rule.order else None
    config = DBCacheConfig(**options(rule), decision_scope="model")
    dbcache.enable(kind.adapter(model), config, calibrator)
    for output, wanted in zip(kind.denoise(model), expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    deciding, following = dbcache.summary(model).lanes
    assert 2 < len(trace.cached_steps) < STEPS - 2
    assert deciding.reasons == following.reasons == trace.reasons
    assert (deciding.follows, following.follows) == (None, first)
    assert (len(deciding.diffs) > 3, following.diffs) == (True, {})
    text = str(dbcache.summary(model))
    assert f"as {first}: " in text.splitlines()[2]


def test_lanes_share_weights_and_the_later_one_has_no_reference():
    kind = KINDS["flux2"]
    model = kind.build()
    config = DBCacheConfig(**FORCED, decision_scope="model")
    dbcache.enable(
        kind.adapter(model), config, TaylorSeerCalibratorConfig(taylorseer_order=1, exact=True)
    )
    kind.denoise(model, 5)
    lanes = [stack.lanes[None] for stack in inside.stacks(model)]
    assert lanes[0].state is lanes[1].state
    assert lanes[0].state.weights[:2].tolist() == [-3.0, 4.0]  # steps 0 and 1, seen from step 4
    assert lanes[0].history.p_ref is not None
    assert lanes[1].history.p_ref is None
    assert lanes[1].history.snapshots.shape == (2, 1, 16 + tiny.TEXT_TOKENS, 32)


def test_branches_and_requests_go_with_the_first_stack():
    family = tiny.FAMILIES["flux"]
    model = family.build()
    config = DBCacheConfig(
        **FORCED, decision_scope="model", num_inference_steps=4, enable_separate_cfg=True
    )
    dbcache.enable(KINDS["flux"].adapter(model), config)
    runs = [tiny.denoise(model, family, 4, branches=tiny.BRANCHES) for _ in range(2)]
    assert all(map(torch.equal, *runs))
    lanes = dbcache.summary(model).lanes
    assert [(lane.stack, lane.branch) for lane in lanes] == [
        (name, branch) for name in FLUX_LISTS for branch in tiny.BRANCHES
    ]
    assert all(lane.cached_steps == [2, 3] for lane in lanes)


def test_an_exception_in_a_later_stack_undoes_the_step_for_all():
    kind = KINDS["flux2"]
    model = kind.build()
    dbcache.enable(kind.adapter(model), **FORCED, decision_scope="model", max_cached_steps=3)
    x = tiny.noise(*kind.latent, seed=5)

    def fail(*_):
        raise RuntimeError("broken block")

    with torch.no_grad():
        for t in (1.0, 0.9):
            model(**kind.inputs(x, t))
        dbcache.refresh_context(model, max_warmup_steps=3)
        for t in (1.0, 0.9):
            model(**kind.inputs(x, t))
        hook = model.single_transformer_blocks[3].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken block"):
            model(**kind.inputs(x, 0.8))
        hook.remove()
        plain = []
        for t in (0.8, 0.7, 0.6):
            plain.append(model(**kind.inputs(x, t))[0])
    lanes = dbcache.summary(model).lanes
    assert [lane.reasons for lane in lanes] == [
        ["warm-up"] * 3 + ["threshold is 1 or more"] * 2
    ] * 2
    assert all(output.isfinite().all() for output in plain)


class Tokens(torch.nn.Module):
    """A toy of two stacks: on `x`, then on `y`, which may have another number of tokens."""

    def __init__(self, block=torch.nn.Linear, blocks=5):
        super().__init__()
        self.first = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(blocks)])
        self.second = torch.nn.ModuleList([block(4, 4) for _ in range(blocks)])
        self.skips_second = False
        tiny.fill(self, 0)

    def forward(self, x, y):
        for block in self.first:
            x = block(x)
        if not self.skips_second:
            for block in self.second:
                y = block(y)
        return x, y

    def adapter(self, **fields):
        return BlockAdapter(
            transformer=self,
            blocks=[self.first, self.second],
            forward_pattern=ForwardPattern.Pattern_3,
            **fields,
        )


def toy(block=torch.nn.Linear, **more):
    model = Tokens(block)
    options = {**FORCED, "max_warmup_steps": 1, "decision_scope": "model", **more}
    dbcache.enable(model.adapter(), **options)
    return model


def reasons(model):
    return [lane.reasons for lane in dbcache.summary(model).lanes]


@torch.no_grad()
def test_a_later_stack_of_another_shape_is_full_and_starts_all_anew():
    model, x = toy(), torch.ones(1, 3, 4)
    plain = Tokens()
    for tokens in (2, 2, 7, 7, 7):
        y = tiny.noise(1, tokens, 4, seed=tokens)
        torch.testing.assert_close(model(x, y), plain(x, y), rtol=1e-4, atol=1e-5)
    always = "threshold is 1 or more"
    assert reasons(model) == [
        ["warm-up", always, always, "no reference", always],
        ["warm-up", always, "shape changed", "no reference", always],
    ]


@torch.no_grad()
@pytest.mark.parametrize("skipped", [0, 1, 2, 3])
def test_a_later_stack_that_was_left_out_of_a_step_does_not_use_what_it_missed(skipped):
    config = {"max_warmup_steps": 2, "enable_taylorseer": True, "taylorseer_order": 1}
    model, plain = toy(**config), Tokens()
    used, stale = torch.ones(1, 3, 4), torch.full((1, 3, 4), 9.0)
    for step in range(7):
        # only a residual of a step before the one that was left out differs from the others
        x = stale if step < skipped else used
        model.skips_second = plain.skips_second = step == skipped
        output, wanted = model(x, x)[1], plain(x, x)[1]
        if step >= skipped:
            torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)
    first, second = (lane.cached_steps for lane in dbcache.summary(model).lanes)
    assert 6 in set(first) & set(second)


@torch.no_grad()
def test_blocks_that_are_exchanged_in_a_later_stack_make_the_next_step_full():
    model, x = toy(), torch.ones(1, 3, 4)
    for _ in range(2):
        model(x, x)
    model.second[2] = tiny.fill(torch.nn.Linear(4, 4), 9)
    model(x, x)
    assert reasons(model)[1] == ["warm-up", "threshold is 1 or more", "no reference"]


class InPlace(torch.nn.Linear):
    def forward(self, hidden_states):
        return hidden_states.add_(super().forward(hidden_states))


@torch.no_grad()
def test_blocks_of_a_later_stack_may_write_into_their_input():
    model, plain = toy(InPlace), Tokens(InPlace)
    x, y = torch.ones(1, 3, 4), tiny.noise(1, 3, 4, seed=2)
    for _ in range(3):
        torch.testing.assert_close(model(x, y.clone()), plain(x, y.clone()), rtol=1e-4, atol=1e-5)


class MakesText(torch.nn.Linear):
    """Takes hidden states alone and returns text as well."""

    def forward(self, hidden_states):
        hidden_states = super().forward(hidden_states)
        return hidden_states, hidden_states[:, :2] * 3


class TwoOutputs(Tokens):
    def forward(self, x, y):
        for block in self.first:
            x = block(x)
        for block in self.second:
            y, text = block(y)
        return x, y, text


@torch.no_grad()
def test_text_that_only_later_blocks_make_is_predicted_as_a_whole():
    model, plain = TwoOutputs(MakesText), TwoOutputs(MakesText)
    patterns = [ForwardPattern.Pattern_3, ForwardPattern.Pattern_4]
    adapter = BlockAdapter(
        transformer=model, blocks=[model.first, model.second], forward_pattern=patterns
    )
    dbcache.enable(adapter, **{**FORCED, "max_warmup_steps": 1}, decision_scope="model")
    x, y = torch.ones(1, 3, 4), tiny.noise(1, 5, 4, seed=2)
    for _ in range(3):
        for output, wanted in zip(model(x, y), plain(x, y), strict=True):
            torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    assert [lane.cached_steps for lane in dbcache.summary(model).lanes] == [[1, 2], [1, 2]]


def test_a_probe_that_fills_the_first_stack_leaves_one_block_to_decide_at():
    model, x = Tokens(), torch.ones(1, 3, 4)
    with pytest.warns(UserWarning, match=r"first: Fn_compute_blocks=8 .* 5 blocks .* runs Fn=4"):
        dbcache.enable(
            model.adapter(), max_warmup_steps=1, residual_diff_threshold=1.0, decision_scope="model"
        )
    model(x, x), model(x, x)
    assert [lane.cached_steps for lane in dbcache.summary(model).lanes] == [[1], [1]]
    with pytest.raises(ValueError, match="must have a probe block and a block to skip, got 5"):
        dbcache.enable(model.adapter(), Bn_compute_blocks=4, decision_scope="model")


def test_a_later_stack_may_differ_in_its_last_blocks_and_its_dtype_alone():
    model = Tokens()
    own = ParamsModifier(cache_config=DBCacheConfig(Bn_compute_blocks=2, cache_dtype="float32"))
    dbcache.enable(
        model.adapter(params_modifiers=[ParamsModifier(), own]), **FORCED, decision_scope="model"
    )
    first, second = inside.stacks(model)
    assert (first.fn, first.bn, second.fn, second.bn) == (1, 0, 0, 2)
    setup = inside.handle(model).setup
    other = ParamsModifier(
        cache_config=DBCacheConfig(max_warmup_steps=4),
        calibrator_config=TaylorSeerCalibratorConfig(),
    )
    with pytest.raises(
        ValueError, match=r"second must have the rule of first, .*max_warmup_steps, c"
    ):
        dbcache.enable(
            model.adapter(params_modifiers=[ParamsModifier(), other]),
            **FORCED,
            decision_scope="model",
        )
    assert inside.handle(model).setup is setup


def test_stacks_in_another_order_than_they_run_are_refused():
    model, x = Tokens(), torch.ones(1, 3, 4)
    adapter = BlockAdapter(
        transformer=model,
        blocks=[model.second, model.first],
        forward_pattern=ForwardPattern.Pattern_3,
    )
    dbcache.enable(adapter, **FORCED, decision_scope="model")
    with pytest.raises(RuntimeError, match=r"first: .* got a forward in which second has not"):
        model(x, x)


def test_the_scope_is_one_of_two():
    with pytest.raises(ValueError, match=r"decision_scope must be one of \('stack', 'model'\)"):
        DBCacheConfig(decision_scope="pipeline")
    assert "DSmodel" in DBCacheConfig(decision_scope="model").strify()
    given = dbcache.load_configs({"cache_config": {"decision_scope": "model"}})
    assert given["cache_config"].decision_scope == "model"


def test_one_stack_is_its_own_model():
    model, family = tiny.flux(), tiny.FAMILIES["flux"]
    outputs = []
    for scope in ("stack", "model"):
        dbcache.enable(model, **FORCED, decision_scope=scope)
        outputs.append(tiny.denoise(model, family, 5))
    assert all(map(torch.equal, *outputs))


def test_what_a_follower_keeps_moves_along_with_the_model():
    model = tiny.FAMILIES["flux"].build()
    adapter = BlockAdapter(
        transformer=model,
        blocks=[getattr(model, name) for name in FLUX_LISTS],
        forward_pattern=PAIR,
    )
    kept = {"Bn_compute_blocks": 2, "Bn_compute_blocks_ids": [0], "decision_scope": "model"}
    dbcache.enable(adapter, **FORCED | kept, calibrator_config=DMDCalibratorConfig())
    tiny.denoise(model, tiny.FAMILIES["flux"], 4)
    leader, follower = (stack.lanes[None] for stack in inside.stacks(model))

    def tensors(lane):
        return [x for x in (*lane.tensors(), lane.tail.flags) if x is not None]

    elsewhere = torch.device("meta")  # stands for another GPU
    for lane in (leader, follower):
        assert {x.device.type for x in tensors(lane)} == {"cpu"}
    leader.begin(("another layout",), elsewhere)
    follower.begin(("another layout",), elsewhere)
    for lane in (leader, follower):
        assert {x.device for x in tensors(lane)} == {elsewhere}
    assert follower.state is leader.state
