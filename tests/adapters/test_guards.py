"""Guards on toy blocks of every pattern: what is called, what comes back, what is refused."""

import inside
import pytest
import torch

import dbcache
from dbcache import BlockAdapter, DBCacheConfig, ForwardPattern

PATTERNS = [ForwardPattern[f"Pattern_{i}"] for i in range(6)]
STEPS = 12


class Block(torch.nn.Module):
    """A block of any pattern; counts its calls and can misbehave on demand."""

    def __init__(self, pattern, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(8, 8, generator=generator) * 0.1)
        self.pattern, self.calls, self.fail = pattern, 0, False
        self.in_place = False
        self.change_output = None

    def forward(self, hidden_states, encoder_hidden_states=None, *, temb):
        self.calls += 1
        if self.fail:
            raise ZeroDivisionError("block failed")
        added = torch.tanh(hidden_states @ self.weight + temb)
        hidden = hidden_states.add_(added) if self.in_place else hidden_states + added
        encoder = encoder_hidden_states
        if "encoder_hidden_states" not in self.pattern.takes:
            encoder = hidden[:, :3] * 2
        elif encoder is not None and len(self.pattern.returns) == 2:
            encoder = encoder + torch.sin(hidden.mean(1, keepdim=True))
        named = {"hidden_states": hidden, "encoder_hidden_states": encoder}
        output = tuple(named[name] for name in self.pattern.returns)
        output = output[0] if len(output) == 1 else output
        return self.change_output(output) if self.change_output else output


class Model(torch.nn.Module):
    """Runs its blocks in a loop that looks at them, numbers them and adds to what they return."""

    def __init__(self, pattern, blocks=6):
        super().__init__()
        self.pattern = pattern
        self.blocks = torch.nn.ModuleList([Block(pattern, seed) for seed in range(blocks)])
        self.controls = None

    def forward(self, x, encoder, t):
        assert len(self.blocks) == 6
        x = x.clone()
        for index, block in enumerate(self.blocks):
            assert block.weight.shape == (8, 8)
            inputs = {"hidden_states": x, "temb": t}
            if "encoder_hidden_states" in self.pattern.takes:
                inputs["encoder_hidden_states"] = encoder
            output = block(**inputs)
            if len(self.pattern.returns) == 1:
                x = output
            else:
                x = output[self.pattern.returns.index("hidden_states")]
                encoder = output[self.pattern.returns.index("encoder_hidden_states")]
            if self.controls is not None:
                x = x + self.controls[index]
        return x, encoder


def inputs(step, size=5):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, size, 8, generator=generator)
    return x + 0.01 * step, torch.ones(2, 3, 8), torch.tensor(0.02 * step)


def enable(model, **options):
    defaults = {
        "Fn_compute_blocks": 2,
        "Bn_compute_blocks": 1,
        "max_warmup_steps": 2,
        "residual_diff_threshold": 0.5,
        "max_continuous_cached_steps": 2,
    }
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=model.pattern)
    return dbcache.enable(adapter, DBCacheConfig(**{**defaults, **options}))


def reasons(model):
    return dbcache.summary(model).lanes[0].reasons


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_skips_exactly_the_middle_blocks_of_cached_steps(pattern):
    model = Model(pattern)
    enable(model)
    for step in range(STEPS):
        model(*inputs(step))
    cached = len(dbcache.summary(model).lanes[0].cached_steps)
    assert 0 < cached < STEPS
    assert [b.calls for b in model.blocks] == [STEPS] * 2 + [STEPS - cached] * 3 + [STEPS]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
@pytest.mark.parametrize("controls", [None, torch.linspace(-1, 1, 6)], ids=["plain", "controls"])
def test_same_input_gives_the_same_output_full_and_cached(pattern, controls):
    model = Model(pattern)
    model.controls = controls
    plain = model(*inputs(0))
    enable(model, max_warmup_steps=1)
    full, cached = model(*inputs(0)), model(*inputs(0))
    assert reasons(model) == ["warm-up", "below threshold"]
    for want, first, second in zip(plain, full, cached, strict=True):
        assert torch.equal(want, first)
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_blocks_that_write_into_their_input_are_noticed(pattern):
    plain, in_place = Model(pattern), Model(pattern)
    for block in in_place.blocks:
        block.in_place = True
    outputs = {}
    for model in (plain, in_place):
        enable(model, residual_diff_threshold=0.1)
        outputs[model] = [model(*inputs(step)) for step in range(STEPS)]
    mine, theirs = (dbcache.summary(model).lanes[0] for model in (in_place, plain))
    assert mine.reasons == theirs.reasons
    assert mine.diffs == theirs.diffs
    for a, b in zip(outputs[in_place], outputs[plain], strict=True):
        torch.testing.assert_close(a, b)


def test_output_that_does_not_fit_names_block_expected_and_got():
    model = Model(ForwardPattern.Pattern_0)
    model.blocks[3].change_output = lambda output: (*output, None)
    enable(model)
    with pytest.raises(ValueError, match=r"blocks\[3\] \(Block\).*Pattern_0.*tuple of 3"):
        model(*inputs(0))
    assert isinstance(model.blocks, torch.nn.ModuleList)
    single = Model(ForwardPattern.Pattern_3)
    single.blocks[5].change_output = lambda output: (output, output)
    enable(single)
    with pytest.raises(ValueError, match=r"blocks\[5\].*must return \(hidden_states\)"):
        single(*inputs(0))


def test_last_block_without_encoder_output_is_fine():
    model = Model(ForwardPattern.Pattern_1)
    model.blocks[5].change_output = lambda output: (None, output[1])
    enable(model, Bn_compute_blocks=0, max_warmup_steps=1)
    full, cached = model(*inputs(0)), model(*inputs(0))
    assert full[1] is None
    assert cached[1] is None
    torch.testing.assert_close(full[0], cached[0])


def test_failing_block_leaves_the_guards_clean_and_the_step_unfinished():
    model, twin = Model(ForwardPattern.Pattern_0), Model(ForwardPattern.Pattern_0)
    for m in (model, twin):
        enable(m, max_warmup_steps=4)
    for step in range(3):
        model(*inputs(step))
        twin(*inputs(step))
    before = set(model.__dict__)
    for failing in (0, 3, 5):
        model.blocks[failing].fail = True
        with pytest.raises(ZeroDivisionError):
            model(*inputs(3))
        model.blocks[failing].fail = False
        assert set(model.__dict__) == before
        assert isinstance(model.blocks, torch.nn.ModuleList)
    assert torch.equal(model(*inputs(3))[0], twin(*inputs(3))[0])
    for step in range(4, STEPS):
        torch.testing.assert_close(model(*inputs(step)), twin(*inputs(step)))
    assert reasons(model) == reasons(twin)


def test_failing_cached_step_is_not_counted():
    model = Model(ForwardPattern.Pattern_0)
    enable(model, max_cached_steps=1, max_warmup_steps=1)
    model(*inputs(0))
    model.blocks[5].fail = True
    with pytest.raises(ZeroDivisionError):
        model(*inputs(0))
    model.blocks[5].fail = False
    for _ in range(3):
        model(*inputs(0))
    assert reasons(model) == ["warm-up", "no reference", "below threshold", "count limit"]


def test_changed_shape_restarts_the_lane_and_is_counted():
    model, fresh = Model(ForwardPattern.Pattern_0), Model(ForwardPattern.Pattern_0)
    enable(model, max_warmup_steps=1)
    for _ in range(2):
        model(*inputs(0))
    wider = [value.repeat(1, 2, 1) if value.ndim == 3 else value for value in inputs(0)]
    assert torch.equal(model(*wider)[0], fresh(*wider)[0])
    model(*wider)
    rounded = [value.bfloat16() for value in wider]
    model.bfloat16()
    model(*rounded)
    assert reasons(model) == [
        "warm-up",
        "below threshold",
        "shape changed",
        "below threshold",
        "shape changed",
    ]


def test_exchanged_block_is_taken_up():
    model = Model(ForwardPattern.Pattern_0)
    enable(model)
    model(*inputs(0))
    replacement = Block(ForwardPattern.Pattern_0, seed=99)
    model.blocks[3] = replacement
    model(*inputs(1))
    assert replacement.calls == 1


def test_nan_diff_is_computed_and_counted():
    model = Model(ForwardPattern.Pattern_0)
    for block in model.blocks[:2]:
        block.weight.zero_()
    enable(model, max_warmup_steps=1)
    with torch.no_grad():
        for _ in range(3):
            model(*inputs(0))
    assert reasons(model) == ["warm-up", "NaN diff", "NaN diff"]
    assert "NaN" in dbcache.summary(model).warnings[0]


def test_too_many_blocks_are_clamped_with_a_warning_that_says_what_runs():
    model = Model(ForwardPattern.Pattern_0)
    plain = model(*inputs(0))
    with pytest.warns(UserWarning, match="none of the 6 blocks to skip; runs Fn=4, Bn=2"):
        enable(model, Fn_compute_blocks=4, Bn_compute_blocks=8)
    for _ in range(3):
        assert torch.equal(model(*inputs(0))[0], plain[0])
    assert [block.calls for block in model.blocks] == [4] * 6
    assert "all 6 blocks run on every step" in str(dbcache.summary(model))


class Skipping(Model):
    """Leaves out one block, on all steps or from one on."""

    left_out, from_step = 4, 0

    def forward(self, x, encoder, t):
        self.from_step -= 1
        for index, block in enumerate(self.blocks):
            if index != self.left_out or self.from_step >= 0:
                x = block(x, temb=t)
        return x


@pytest.mark.parametrize("left_out", [0, 2, 4], ids=["first", "first middle", "last middle"])
def test_forwards_that_leave_out_a_block_that_the_cache_needs_run_in_full(left_out):
    model = Skipping(ForwardPattern.Pattern_3)
    model.left_out = left_out
    plain = [model(*inputs(step)) for step in range(4)]
    enable(model)
    assert all(torch.equal(model(*inputs(step)), plain[step]) for step in range(4))
    assert dbcache.summary(model).lanes == []
    assert "4 calls left blocks out" in str(dbcache.summary(model))
    model.from_step = 100
    for step in range(STEPS):
        model(*inputs(step))
    assert dbcache.summary(model).lanes[0].cached_steps


def test_forwards_that_always_leave_out_another_block_are_cached():
    model = Skipping(ForwardPattern.Pattern_3)
    model.left_out = 3
    plain = model(*inputs(0))
    enable(model, residual_diff_threshold=1.0, max_warmup_steps=1)
    assert torch.equal(model(*inputs(0)), plain)
    torch.testing.assert_close(model(*inputs(0)), plain)
    assert dbcache.summary(model).lanes[0].cached_steps == [1]


def test_a_cached_step_that_leaves_out_its_last_middle_block_is_refused():
    model = Skipping(ForwardPattern.Pattern_3)
    model.from_step = 1
    enable(model, residual_diff_threshold=1.0, max_warmup_steps=1)
    model(*inputs(0))
    with pytest.raises(RuntimeError, match="did not run its last middle block"):
        model(*inputs(1))


def test_lanes_hold_no_autograd_graph():
    model = Model(ForwardPattern.Pattern_0)
    for block in model.blocks:
        block.weight = torch.nn.Parameter(block.weight.clone())
    enable(model)
    model(*inputs(0))
    lane = inside.stacks(model)[0].lanes[None]
    assert not lane.history.p_ref.requires_grad
    assert not lane.history.snapshots.requires_grad


def test_memory_is_the_reference_and_the_ring():
    model = Model(ForwardPattern.Pattern_0)
    enable(model)
    model(*inputs(0))
    hidden, encoder = 2 * 5 * 8 * 4, 2 * 3 * 8 * 4
    assert dbcache.summary(model).lanes[0].megabytes == (2 * hidden + encoder) / 1e6
    dbcache.enable(
        BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=model.pattern),
        DBCacheConfig(Fn_compute_blocks=2),
        dbcache.TaylorSeerCalibratorConfig(taylorseer_order=2),
    )
    model(*inputs(0))
    assert dbcache.summary(model).lanes[0].megabytes == (4 * hidden + 3 * encoder) / 1e6


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_compiled_models_take_the_same_decisions(whole):
    model, twin = Model(ForwardPattern.Pattern_0), Model(ForwardPattern.Pattern_0)
    run = model
    if whole:
        enable(model)
        run = torch.compile(model, backend="eager")
    else:
        for block in model.blocks:
            block.compile(backend="eager")
        enable(model)
    enable(twin)
    for step in range(STEPS):
        for a, b in zip(run(*inputs(step)), twin(*inputs(step)), strict=True):
            torch.testing.assert_close(a, b)
    assert reasons(model) == reasons(twin)
    assert dbcache.summary(run).lanes[0].cached_steps


def test_lanes_outlive_inference_mode():
    model, twin = Model(ForwardPattern.Pattern_0), Model(ForwardPattern.Pattern_0)
    for m in (model, twin):
        enable(m, num_inference_steps=70)
    modes = [torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad]
    for step in range(140):
        with modes[step // 35]():
            mine = model(*inputs(step % 70))
        with torch.no_grad():
            theirs = twin(*inputs(step % 70))
        assert torch.equal(mine[0], theirs[0])
    assert reasons(model) == reasons(twin)
    dbcache.refresh_context(model)
