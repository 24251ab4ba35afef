"""`Bn_compute_blocks_ids` recorded, a branch per block, against eager: same decisions, same bits."""

import pytest
import torch
from fake_driver import FakeDriver
from tape import TapeRecorder
from tiny import FAMILIES, denoise, noise

import dbcache
from dbcache import BlockAdapter, DBCacheConfig, ForwardPattern
from dbcache.adapters.cached_transformer import handle_of
from dbcache.pruned_lane import BlockCache

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ("host", "device")
FLUX = FAMILIES["flux"]
SETTINGS = DBCacheConfig(
    Fn_compute_blocks=1,
    Bn_compute_blocks=5,
    Bn_compute_blocks_ids=[1],
    max_warmup_steps=3,
    residual_diff_threshold=0.25,
    non_compute_blocks_diff_threshold=0.06,
)
THRESHOLDS = {"flux": 0.06, "qwen": 0.06, "wan": 0.06}


class Watched:
    """A model of a family, and which of its last blocks each call left out."""

    def __init__(self, family):
        self.family = family
        self.model = family.build()
        self.left_out = []
        self.model.register_forward_hook(self._note)

    def _note(self, *_):
        handle = handle_of(self.model)
        lanes = [stack.lanes[handle.step_branch] for stack in handle.stacks]
        self.left_out.append([lane.tail.flags.tolist() for lane in lanes if lane.tail])

    def enable(self, *args, target=None, **options):
        dbcache.enable(self.model if target is None else target(self.model), *args, **options)
        return self

    def __call__(self, steps, **how):
        """Denoise; return outputs, what was left out, and the reasons and diffs of each lane."""
        self.left_out.clear()
        outputs = denoise(self.model, self.family, steps, **how)
        lanes = dbcache.summary(self.model, logging=False).lanes
        decisions = [(lane.stack, lane.branch, lane.reasons, lane.diffs) for lane in lanes]
        return outputs, list(self.left_out), decisions

    @property
    def graphs(self):
        return handle_of(self.model).graphs

    def branches(self):
        """Return the branches of the only recording."""
        (recording,) = self.graphs.recordings.values()
        return [item for item in recording.replay.program if type(item).__name__ == "Branch"]


def same(got, expected):
    """Say whether two runs agree to the last bit, and check that they show something."""
    for x, y in zip(got[0], expected[0], strict=True):
        assert torch.equal(x, y)
    assert got[1:] == expected[1:]


def both(family, steps, *args, mode, how=None, **options):
    """Run eagerly and recorded; check that they agree; return the recorded one and the run."""
    expected = Watched(family).enable(*args, **options)(steps, **(how or {}))
    recorded = Watched(family).enable(*args, **options, cuda_graph=mode)
    same(recorded(steps, **(how or {})), expected)
    assert not recorded.graphs.reasons
    return recorded, expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_thirty_steps_are_the_same_bit_for_bit(driver, name, mode):
    recorded, (_, left_out, decisions) = both(
        FAMILIES[name],
        30,
        SETTINGS,
        non_compute_blocks_diff_threshold=THRESHOLDS[name],
        enable_separate_cfg=False,
        mode=mode,
    )
    print(left_out, decisions)
    (stack,) = handle_of(recorded.model).stacks
    assert stack.tail.run.prunable == [True, False, True, True, True]
    assert recorded.graphs.replays == 29
    assert len(recorded.branches()) == 1 + 4
