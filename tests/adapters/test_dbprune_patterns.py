"""DBPrune on toy blocks of every pattern, in a loop that does what models do between blocks."""

import inside
import pytest
import torch
from fake_driver import FakeDriver
from prune_oracle import PruneOracle, PruneRule
from prune_runs import ENCODER, HIDDEN, STEPS, assert_same, counted, options
from tape import use_driver

import dbcache
from dbcache import BlockAdapter, DBCacheConfig, DBPruneConfig, ForwardPattern
from dbcache.lanes.block_store import BlockStore

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(torch.nn.Module):
    """A block of any pattern; may write into its input or fail."""

    def __init__(self, pattern, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(8, 8, generator=generator) * 0.3)
        self.pattern, self.in_place, self.fails = pattern, False, False

    def forward(self, hidden_states, encoder_hidden_states=None, *, temb):
        if self.fails:
            raise ZeroDivisionError("block failed")
        added = torch.tanh(hidden_states @ self.weight + temb)
        hidden = hidden_states.add_(added) if self.in_place else hidden_states + added
        encoder = encoder_hidden_states
        if ENCODER not in self.pattern.takes:
            encoder = hidden[:, :3] * 2
        elif len(self.pattern.returns) == 2:
            encoder = encoder + torch.sin(hidden.mean(1, keepdim=True))
        named = {HIDDEN: hidden, ENCODER: encoder}
        output = tuple(named[name] for name in self.pattern.returns)
        return output[0] if len(output) == 1 else output


class Model(torch.nn.Module):
    """Runs blocks of a pattern in a loop of its own, which may add controls between them."""

    def __init__(self, pattern, count=7):
        super().__init__()
        self.pattern = pattern
        self.blocks = torch.nn.ModuleList([Block(pattern, seed) for seed in range(count)])
        self.controls = None

    def forward(self, x, encoder, t):
        x = x.clone()
        for index, block in enumerate(self.blocks):
            given = {HIDDEN: x, "temb": t}
            if ENCODER in self.pattern.takes:
                given[ENCODER] = encoder
            output = block(**given)
            if len(self.pattern.returns) == 1:
                x = output
            else:
                x = output[self.pattern.returns.index(HIDDEN)]
                encoder = output[self.pattern.returns.index(ENCODER)]
            if self.controls is not None:
                x = x + self.controls[index]
        return x, encoder


def inputs(step):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 8, generator=generator)
    drift = torch.randn(2, 5, 8, generator=generator)
    return x + 0.04 * step * drift, torch.ones(2, 3, 8), torch.tensor(0.02 * step)


PATTERNS = [ForwardPattern[f"Pattern_{i}"] for i in range(6)]


patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)


def enable(model, rule, **how):
    """Enable DBPrune by `rule`, or what a config says."""
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=model.pattern)
    config = DBPruneConfig(**options(rule)) if isinstance(rule, PruneRule) else rule
    return dbcache.enable(adapter, config, **how)


def run_pattern(pattern, rule, steps=STEPS, prepare=lambda model: None):
    """Run dbcache and the oracle on a toy model; return it and the oracle."""
    mine, theirs = Model(pattern), Model(pattern)
    prepare(mine)
    prepare(theirs)
    enable(mine, rule)
    oracle = PruneOracle(theirs.blocks, pattern.returns, ENCODER in pattern.takes, rule)
    calls, stop = counted(mine.blocks)
    with oracle():
        for step in range(steps):
            outputs, expected = mine(*inputs(step)), theirs(*inputs(step))
            for output, wanted in zip(outputs, expected, strict=True):
                torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    stop()
    assert_same(dbcache.summary(mine).lanes, oracle)
    assert calls == oracle.block_calls
    return mine, oracle


@patterns
@pytest.mark.parametrize(
    "rule",
    [
        PruneRule(residual_diff_threshold=0.0731),
        PruneRule(Fn_compute_blocks=2, Bn_compute_blocks=1, non_prune_block_ids=(4,)),
        PruneRule(residual_diff_threshold=1.0, max_continuous_cached_steps=1),
    ],
    ids=["F1B0", "F2B1", "always"],
)
def test_every_pattern_equals_the_oracle(pattern, rule):
    _, oracle = run_pattern(pattern, rule)
    assert any(oracle.lanes[None].skipped)


@patterns
def test_blocks_that_write_into_their_input_are_noticed(pattern):
    def prepare(model):
        for block in model.blocks:
            block.in_place = True

    _, oracle = run_pattern(pattern, PruneRule(residual_diff_threshold=0.1), prepare=prepare)
    assert any(oracle.lanes[None].skipped)


@patterns
def test_what_the_loop_adds_between_blocks_is_kept(pattern):
    """Controls are added behind each block, left out or not, exactly once."""
    plain, mine = Model(pattern), Model(pattern)
    plain.controls = mine.controls = 0.1 * torch.arange(7)
    enable(mine, PruneRule(residual_diff_threshold=1.0, max_warmup_steps=1))
    expected = plain(*inputs(0))
    for _ in range(2):  # full, then all blocks but the first left out
        for output, wanted in zip(mine(*inputs(0)), expected, strict=True):
            torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    mine.controls = 2 * mine.controls
    moved = mine(*inputs(0))[0] - expected[0]
    rest = [1, 2, 3, 4, 5, 6]
    assert dbcache.summary(mine).lanes[0].pruned == [[], rest, rest]
    # a block that is left out does not see them, so they are what differs
    torch.testing.assert_close(moved, torch.full_like(moved, 2.1), rtol=0, atol=1e-4)


@patterns
def test_what_the_loop_begins_to_add_between_blocks_is_kept(pattern):
    """On the step on which it begins, when blocks are left out in one go, and on later ones."""
    model = Model(pattern)
    enable(model, PruneRule(residual_diff_threshold=1.0, max_warmup_steps=1))
    expected = model(*inputs(0))[0]
    model.controls = 0.1 * torch.arange(7)
    for _ in range(3):
        moved = model(*inputs(0))[0] - expected
        torch.testing.assert_close(moved, torch.full_like(moved, 2.1), rtol=0, atol=1e-4)


LAST = DBCacheConfig(
    Fn_compute_blocks=2,
    Bn_compute_blocks=4,
    Bn_compute_blocks_ids=[1],
    max_warmup_steps=2,
    residual_diff_threshold=0.5,
    max_continuous_cached_steps=4,
    non_compute_blocks_diff_threshold=0.15,
)


def left_out_on_last_step(stack):
    """Return whether each block that may be left out was, of single or of last ones."""
    (lane,) = stack.lanes.values()
    return (lane.tail or lane.state).flags.tolist()


@pytest.mark.covering(1)
@patterns
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("mode", ["host", "device"])
@pytest.mark.parametrize("which", ["single blocks", "last blocks"])
def test_every_pattern_is_recorded_bit_for_bit(pattern, in_place, mode, which, monkeypatch):
    """With blocks that write into their inputs, and controls that the loop adds between them."""
    use_driver(monkeypatch, FakeDriver())
    rule = PruneRule(residual_diff_threshold=0.1, non_prune_block_ids=(4,), max_warmup_steps=2)
    runs = []
    for cuda_graph in (False, mode):
        model = Model(pattern)
        model.parameter = torch.nn.Parameter(torch.zeros(1))  # shows where the model lies
        model.controls = 0.01 * torch.arange(7)
        for block in model.blocks:
            block.in_place = in_place
        enable(model, LAST if which == "last blocks" else rule, cuda_graph=cuda_graph)
        (stack,) = inside.stacks(model)
        stack.prepare_recording()
        outputs, flags = [], []
        with torch.no_grad():
            for step in range(14):
                outputs += [output.clone() for output in model(*inputs(step))]
                flags.append(left_out_on_last_step(stack))
        (lane,) = dbcache.summary(model).lanes
        runs.append((outputs, lane.reasons, flags, lane.diffs))
    assert inside.graphs(model).replays == 13
    assert {True, False} == {any(step) for step in flags[2:]}
    assert runs[0][1:] == runs[1][1:]
    assert all(map(torch.equal, runs[0][0], runs[1][0]))


def test_runs_of_blocks_are_left_out_in_one_go(monkeypatch):
    counts = []
    plain = BlockStore.replace

    def replace_(self, first, count, *streams):
        counts.append(count)
        return plain(self, first, count, *streams)

    monkeypatch.setattr(BlockStore, "replace", replace_)
    for controls, expected in ((None, [2, 3]), (torch.ones(7), [1] * 5)):
        model = Model(PATTERNS[0])
        model.controls = controls
        rule = PruneRule(residual_diff_threshold=1.0, max_warmup_steps=1, non_prune_block_ids=(3,))
        enable(model, rule)
        counts.clear()
        for step in range(2):
            model(*inputs(step))
        assert counts == expected


def test_an_exception_aborts_the_step_and_the_next_one_is_full():
    model = Model(PATTERNS[0])
    enable(model, PruneRule(residual_diff_threshold=1.0, max_warmup_steps=2))
    for step in range(4):
        model(*inputs(step))
    for failing in (0, 6):  # on a step that prunes the last one does not run: make it run
        model.blocks[failing].fails = True
        if failing:
            dbcache.refresh_context(model)
        with pytest.raises(ZeroDivisionError):
            model(*inputs(4))
        model.blocks[failing].fails = False
        assert "blocks" not in vars(model)
    model(*inputs(4))
    model(*inputs(5))
    model(*inputs(6))
    assert dbcache.summary(model).lanes[0].reasons == ["warm-up"] * 2 + ["threshold is 1 or more"]


def test_an_exception_between_blocks_that_are_left_out_is_undone():
    model = Model(PATTERNS[0])
    enable(model, PruneRule(residual_diff_threshold=1.0, max_warmup_steps=2))
    for step in range(3):
        model(*inputs(step))
    model.controls = [0.0] * 3 + ["not a number"] * 4
    with pytest.raises(TypeError):
        model(*inputs(3))
    model.controls = None
    model(*inputs(3))
    model(*inputs(4))
    lane = dbcache.summary(model).lanes[0]
    always = "threshold is 1 or more"
    assert lane.reasons == ["warm-up", "warm-up", always, "no reference", always]


def test_another_shape_is_a_full_step_that_starts_anew():
    model = Model(PATTERNS[0])
    enable(model, PruneRule(residual_diff_threshold=1.0, max_warmup_steps=2))
    for step, size in enumerate((5, 5, 5, 4, 4, 5)):
        x, encoder, t = inputs(step)
        model(x[:, :size], encoder, t)
    always = "threshold is 1 or more"
    expected = ["warm-up", "warm-up", always, "shape changed", always, "shape changed"]
    assert dbcache.summary(model).lanes[0].reasons == expected


def test_nan_runs_the_block_and_is_counted():
    model = Model(PATTERNS[3])
    enable(model, PruneRule(residual_diff_threshold=1.0, max_warmup_steps=2))
    for step in range(3):
        x, encoder, t = inputs(step)
        model(x * float("nan") if step == 2 else x, encoder, t)
    summary = dbcache.summary(model)
    assert summary.lanes[0].reasons[2] == "NaN diff"
    assert any("NaN" in warning for warning in summary.warnings)


def test_blocks_whose_pattern_is_learned_from_the_first_forward_are_left_out():
    plain, model = Model(PATTERNS[1]), Model(PATTERNS[1])
    adapter = BlockAdapter(transformer=model, blocks=model.blocks, auto=True)
    rule = PruneRule(residual_diff_threshold=1.0, max_warmup_steps=1)
    dbcache.enable(adapter, DBPruneConfig(**options(rule)))
    for _ in range(4):
        for output, wanted in zip(model(*inputs(0)), plain(*inputs(0)), strict=True):
            torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    (lane,) = dbcache.summary(model)
    always = "threshold is 1 or more"
    assert lane.reasons == ["warm-up", "no reference", always, always]
    assert lane.pruned_blocks == [0, 0, 6, 6]


def test_blocks_that_are_exchanged_make_the_next_step_full():
    model = Model(PATTERNS[0])
    enable(model, PruneRule(residual_diff_threshold=1.0, max_warmup_steps=1))
    for step in range(2):
        model(*inputs(step))
    model.blocks[3] = Block(PATTERNS[0], seed=9)
    plain = Model(PATTERNS[0])
    plain.blocks[3] = Block(PATTERNS[0], seed=9)
    assert all(map(torch.equal, model(*inputs(2)), plain(*inputs(2))))
    model(*inputs(3))
    model.blocks.append(Block(PATTERNS[0], seed=10))
    model(*inputs(4))
    (lane,) = dbcache.summary(model)
    assert (lane.blocks, lane.pruned) == (8, [[]])
    model(*inputs(5))
    assert dbcache.summary(model)[0].pruned == [[], [1, 2, 3, 4, 5, 6, 7]]
