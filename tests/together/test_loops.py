"""Loops of models that change hidden states between two blocks: the probe is measured before."""

import models
import pytest
import tiny
import torch

import dbcache
from dbcache import BlockAdapter, ForwardPattern

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

STEPS = 7
OPTIONS = {
    "max_warmup_steps": 1,
    "residual_diff_threshold": 10.0,
    "max_continuous_cached_steps": 2,
    "num_inference_steps": STEPS,
}


class Probe:
    """Notes what goes into the first block and comes out of the last probe block, per step."""

    def __init__(self, first, last, name):
        self.name = name
        self.given, self.returned = [], []
        first.register_forward_pre_hook(self.before, with_kwargs=True)
        last.register_forward_hook(self.after)

    def before(self, block, args, kwargs):
        self.given.append((kwargs[self.name] if self.name in kwargs else args[0]).clone())

    def after(self, block, args, output):
        outputs = [output] if isinstance(output, torch.Tensor) else output
        fits = [x for x in outputs if x.shape == self.given[-1].shape]
        self.returned.append(fits[0].clone())

    def diffs(self, full):
        """Return the relative change of each step since the last full one, from the second on."""
        found, reference = {}, None
        for step, (h_in, h_out) in enumerate(zip(self.given, self.returned, strict=True)):
            p = h_out - h_in
            if reference is not None:
                found[step] = ((p - reference).abs().sum() / reference.abs().sum()).item()
            if step in full:
                reference = p
        return found


def assert_measured(lane, probe):
    full = set(range(lane.steps)) - set(lane.cached_steps)
    assert lane.cached_steps
    wanted = probe.diffs(full)
    assert lane.diffs == pytest.approx({k: wanted[k] for k in lane.diffs}, rel=1e-3)
    assert len(lane.diffs) >= 3


def add(hidden, step):
    return hidden + step.control


def write(hidden, step):
    hidden[:, 2:] += step.control[:, 2:]
    return hidden


def scale(hidden, step):
    return hidden * 3.0


def append(hidden, step):
    return torch.cat([hidden, step.more], dim=1)


LOOPS = {"adds": add, "writes": write, "scales": scale, "appends": append}


class Model(torch.nn.Module):
    """Six blocks, and a loop that does something to what the second one returns."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.index = 0
        self.blocks = torch.nn.ModuleList(
            [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(6)]
        )
        tiny.fill(self, 1)

    def forward(self, hidden_states, control=None):
        self.control, self.more = control, tiny.noise(1, 3, 8, seed=90 + self.index) * 5
        for i, block in enumerate(self.blocks):
            hidden_states = block(hidden_states)
            if i == 1 and control is not None:
                hidden_states = self.change(hidden_states, self)
        self.index += 1
        return hidden_states[:, :7]


@pytest.mark.parametrize("start", [0, 3, "second request"])
@pytest.mark.parametrize("compares", [False, True], ids=["residual", "hidden states"])
@pytest.mark.parametrize("loop", LOOPS)
def test_what_the_loop_does_between_two_blocks_is_not_measured(loop, compares, start):
    model = Model(LOOPS[loop])
    probe = Probe(model.blocks[0], model.blocks[1], "input")
    adapter = BlockAdapter(
        transformer=model, blocks=model.blocks, forward_pattern=ForwardPattern.Pattern_3
    )
    threshold = "l1_hidden_states_diff_threshold" if compares else "residual_diff_threshold"
    options = OPTIONS | {threshold: 0.9, "Fn_compute_blocks": 2}
    dbcache.enable(adapter, **options)
    starts = [STEPS, 0] if start == "second request" else [start]
    with torch.no_grad():
        for first in starts:
            probe.given, probe.returned, model.index = [], [], 0
            for step in range(STEPS):
                x = tiny.noise(1, 7, 8, seed=3) * (1 + 0.1 * step)
                control = tiny.noise(1, 7, 8, seed=50 + step) * 4
                model(x, control=None if step < first else control)
    (lane,) = dbcache.summary(adapter).lanes
    if compares:
        probe.given = [torch.zeros_like(x) for x in probe.given]
    assert_measured(lane, probe)


def test_hidream_is_measured_without_the_tokens_that_its_loop_exchanges():
    name = "HiDreamImageTransformer2DModel"
    model = models.model(name)
    stacks, names = models.stacks_of(name), models.streams_of(name)
    probes = [Probe(s[1 - 1], s[1 - 1], n[0]) for s, n in zip(stacks, names, strict=True)]
    dbcache.enable(model, Fn_compute_blocks=1, **OPTIONS | {"residual_diff_threshold": 0.99})
    models.run(name, STEPS)
    for lane, probe in zip(dbcache.summary(model).lanes, probes, strict=True):
        assert_measured(lane, probe)
    dbcache.disable(model)
