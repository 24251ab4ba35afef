"""`Bn_compute_blocks_ids` recorded, a branch per block, against eager: the same to the last bit."""

import inside
import pytest
import torch
from fake_driver import FakeDriver
from graph_runs import (
    FLUX,
    MODES,
    branches,
    graphs,
    recordings,
    same,
    start,
    traces,
    two_stacks,
)
from tape import TapeRecorder
from tiny import BRANCHES, FAMILIES, denoise, noise

import dbcache
from dbcache import DBCacheConfig
from dbcache.kernels.common.lane_state import CACHED as CACHED_FLAG
from dbcache.lanes.block_store import BlockStore
from dbcache.results.lane import CACHED

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = DBCacheConfig(
    Fn_compute_blocks=1,
    Bn_compute_blocks=5,
    Bn_compute_blocks_ids=[1],
    max_warmup_steps=3,
    residual_diff_threshold=0.25,
    non_compute_blocks_diff_threshold=0.08,
)


class Watched:
    """A model of a family, and what each call estimated and left out of its last blocks."""

    def __init__(self, family):
        self.family = family
        self.model = family.build()
        self.left_out, self.changes = [], []
        self.model.register_forward_hook(self._note)

    def _note(self, *_):
        lanes = inside.request(self.model).lanes()
        self.left_out.append([lane.tail.flags.tolist() for lane in lanes])
        self.changes.append([self._changes(lane) for lane in lanes])

    @staticmethod
    def _changes(lane):
        """Return the changes that were compared with the threshold; None on a full step."""
        if not lane.state.counters[CACHED_FLAG]:
            return None
        return lane.tail.blocks.state.decisions.tolist()

    def enable(self, *args, target=None, **options):
        dbcache.enable(self.model if target is None else target(self.model), *args, **options)
        return self

    def denoise(self, steps, **how):
        return denoise(self.model, self.family, steps, **how)

    def run(self, steps, **how):
        """Denoise; return the outputs and `notes`."""
        self.forget()
        return self.denoise(steps, **how), *self.notes()

    def forget(self):
        self.left_out.clear()
        self.changes.clear()

    def notes(self):
        """Return what was left out, the reasons and diffs of each lane, and all changes."""
        return list(self.left_out), traces(self.model), list(self.changes)


def assert_same(got, expected):
    """Check that two runs agree to the last bit."""
    assert same(got[0], expected[0])
    assert got[1:] == expected[1:]


def eagerly(steps, *args, how=None, **options):
    return Watched(FLUX).enable(*args, **options).run(steps, **(how or {}))


def both(run, *args, mode, family=FLUX, target=None, **options):
    """Run eagerly and recorded; check that they agree; return the recorded model and the run.

    `run` is given a `Watched` and returns the outputs.
    """
    runs = []
    for how in ({}, {"cuda_graph": mode}):
        watched = Watched(family).enable(*args, target=target, **options, **how)
        runs.append((run(watched), *watched.notes()))
    assert_same(runs[1], runs[0])
    assert not graphs(watched.model).reasons
    return watched.model, runs[0]


def prunable(model):
    return [stack.prunable for stack in inside.stacks(model)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_thirty_steps_are_the_same_bit_for_bit(driver, name, mode):
    model, (_, left_out, ((_, _, reasons, *_),), _) = both(
        lambda w: w.denoise(30),
        SETTINGS,
        family=FAMILIES[name],
        enable_separate_cfg=False,
        mode=mode,
    )
    assert prunable(model) == [[True, False, True, True, True]]
    assert graphs(model).replays == 29
    (recording,) = recordings(model)
    assert len(branches(recording)) == 1 + 4
    cached = [flags for (flags,), r in zip(left_out, reasons, strict=True) if r in CACHED]
    counts = {sum(flags) for flags in cached}
    assert {0, 4} < counts, "none, all, and some of those that may be left out were"
    assert not any(flags[1] for flags in cached)
    full = [flags for (flags,), r in zip(left_out, reasons, strict=True) if r not in CACHED]
    assert len(full) > 3
    assert not any(map(any, full))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scope", ["stack", "model"])
def test_two_stacks_each_have_last_blocks(driver, scope, mode):
    options = {
        "Bn_compute_blocks": 2,
        "Bn_compute_blocks_ids": [1],
        "non_compute_blocks_diff_threshold": 0.07,
        "decision_scope": scope,
        "enable_taylorseer": True,
    }
    model, (_, left_out, *_) = both(
        lambda w: w.denoise(30), SETTINGS, mode=mode, target=two_stacks, **options
    )
    assert prunable(model) == [[True], [True]]
    (recording,) = recordings(model)
    assert len(branches(recording)) == 2 + 2
    seen = {(first[0], second[0]) for first, second in left_out}
    assert {(0, 0), (1, 1)} < seen, "the stacks must decide apart"


@pytest.mark.parametrize("mode", MODES)
def test_each_guidance_branch_has_last_blocks_of_its_own(driver, mode):
    model, (_, left_out, decisions, _) = both(
        lambda w: w.denoise(16, branches=BRANCHES, named=True),
        SETTINGS,
        family=FAMILIES["qwen"],
        mode=mode,
    )
    assert [branch for _, branch, *_ in decisions] == list(BRANCHES)
    assert left_out[::2] != left_out[1::2]
    assert any(any(flags) for (flags,) in left_out)
    assert graphs(model).replays == 2 * 15


@pytest.mark.parametrize("mode", MODES)
def test_numbers_change_without_a_new_recording_and_blocks_do_not(driver, mode):
    watched = Watched(FLUX).enable(SETTINGS, cuda_graph=mode, num_inference_steps=12)
    watched.run(12)
    (recorded,) = recordings(watched.model)
    given, seen = {}, []
    for changes in (
        {},
        {"non_compute_blocks_diff_threshold": 0.12},
        {"non_compute_blocks_diff_threshold": 0.0},
        {"residual_diff_threshold": 0.15, "non_compute_blocks_diff_threshold": 0.07},
        {"Bn_compute_blocks": 5, "Bn_compute_blocks_ids": [1, 2]},
    ):
        given |= changes
        dbcache.refresh_context(watched.model, **changes)
        got = watched.run(12)
        assert_same(got, eagerly(12, SETTINGS, **given))
        (now,) = recordings(watched.model)
        assert (now is recorded) == ("Bn_compute_blocks_ids" not in changes)
        seen.append(sum(sum(flags) for (flags,) in got[1]))
    assert 0 == seen[2] < seen[0] < seen[1]


@pytest.mark.parametrize("mode", MODES)
def test_other_shapes_come_and_go(driver, mode):
    watched = Watched(FLUX).enable(SETTINGS, cuda_graph=mode, num_inference_steps=10)
    for threshold, batch in ((0.08, 1), (0.08, 2), (0.12, 2), (0.12, 1)):
        changes = {"non_compute_blocks_diff_threshold": threshold}
        dbcache.refresh_context(watched.model, **changes)
        got = watched.run(10, batch=batch)
        assert_same(got, eagerly(10, SETTINGS, how={"batch": batch}, **changes))
        assert any(any(flags) for (flags,) in got[1])
    assert len(recordings(watched.model)) == 2


@torch.no_grad()
def call(model, step, *, batch=1, **how):
    """Call at `step` of 20, on inputs that drift."""
    x = noise(batch, *FLUX.latent_shape[1:], seed=1) + 0.02 * step
    return model(**FLUX.arguments(x, 1 - step / 20, "cond") | how)[0]


@pytest.mark.parametrize("mode", MODES)
def test_shapes_change_within_a_request(driver, mode):
    """What was stored of another shape is void, whether the host has seen the steps or not."""
    batches = [1] * 6 + [2] * 6 + [1] * 6 + [2] * 4
    model, (_, left_out, ((_, _, reasons, *_),), _) = both(
        lambda w: [call(w.model, i, batch=n) for i, n in enumerate(batches)],
        SETTINGS,
        max_warmup_steps=1,
        mode=mode,
    )
    assert reasons.count("shape changed") == 3
    assert any(any(flags) for (flags,) in left_out)
    assert len(recordings(model)) == 2


@pytest.mark.parametrize("fails_at", [2, 6])
def test_a_failed_launch_counts_as_never_begun(driver, monkeypatch, fails_at):
    """As after an exception of an eager step: nothing that was stored counts."""

    def fail(*_):
        raise RuntimeError("lost the GPU")

    def run(watched):
        outputs = []
        call(watched.model, 0)
        call(watched.model, 1)
        dbcache.refresh_context(watched.model)
        watched.forget()
        for step in range(16):
            if step == fails_at:
                with monkeypatch.context() as patch:
                    patch.setattr(FakeDriver, "do_cuGraphLaunch", fail)
                    handle = watched.model.proj_out.register_forward_hook(fail)
                    with pytest.raises(RuntimeError, match="lost the GPU"):
                        call(watched.model, step)
                    handle.remove()
            outputs.append(call(watched.model, step))
        return outputs

    _, (_, left_out, ((_, _, reasons, *_),), _) = both(run, SETTINGS, mode="device")
    assert reasons[fails_at] == ("no reference" if fails_at > 3 else "warm-up")
    assert any(any(flags) for (flags,) in left_out[fails_at:])


@pytest.mark.parametrize("mode", MODES)
def test_eager_steps_between_replayed_ones_leave_out_the_same(driver, mode):
    # the first call of a kind is an eager one: it comes where blocks are left out
    model, (_, left_out, *_) = both(
        lambda w: [call(w.model, step, return_dict=step == 5) for step in range(12)],
        SETTINGS,
        mode=mode,
    )
    assert graphs(model).replays == 12 - 2
    assert any(left_out[5][0])


@pytest.mark.parametrize("mode", MODES)
def test_recorded_on_a_first_step_nothing_is_stored_yet(driver, mode):
    """What the trial of the recording stored must not count as the request's."""

    def run(watched):
        call(watched.model, 9)
        dbcache.refresh_context(watched.model)
        watched.forget()
        return [call(watched.model, step) for step in range(8)]

    model, _ = both(run, SETTINGS, max_warmup_steps=1, mode=mode)
    assert graphs(model).replays == 8


def test_the_host_reads_on_cached_steps_alone_and_in_device_mode_on_none(driver, monkeypatch):
    reads, read = [], BlockStore.read
    monkeypatch.setattr(BlockStore, "read", lambda cache, x: reads.append(0) or read(cache, x))
    watched = Watched(FLUX)
    for options in ({}, {"cuda_graph": "host"}, {"cuda_graph": "device"}):
        watched.enable(SETTINGS, num_inference_steps=14, **options)
        watched.run(14)
        reads.clear()
        before = driver.launches
        _, _, ((_, _, reasons, *_),), _ = watched.run(14)
        cached = sum(reason in CACHED for reason in reasons)
        assert 5 < cached < 11
        device = options.get("cuda_graph") == "device"
        assert len(reads) == (0 if device else cached)
        assert driver.launches == before + (14 if device else 0)


def test_every_kernel_of_a_recording_has_run_before_it(driver, monkeypatch):
    """Also of blocks that the threshold would not let the trial leave out."""
    replaced, before = [], None
    replace, capturing = BlockStore.replace, TapeRecorder.capturing

    def note(cache, first, count, *streams):
        replaced.append((first, count))
        return replace(cache, first, count, *streams)

    def begin(recorder):
        nonlocal before
        before = set(replaced)
        return capturing(recorder)

    monkeypatch.setattr(BlockStore, "replace", note)
    monkeypatch.setattr(TapeRecorder, "capturing", begin)
    watched = Watched(FLUX).enable(
        SETTINGS, cuda_graph="device", non_compute_blocks_diff_threshold=1e-6
    )
    assert not any(any(flags) for (flags,) in watched.run(8)[1])
    assert before == {(0, 1), (2, 1), (3, 1), (4, 1)}


@pytest.mark.parametrize("mode", MODES)
def test_captured_ahead_of_the_first_request(driver, mode):
    watched = Watched(FLUX).enable(SETTINGS, num_inference_steps=14, cuda_graph=mode)
    (recording,) = dbcache.capture(watched.model, **FLUX.arguments(start(1), 1.0, "cond"))
    before = graphs(watched.model).replays
    expected = eagerly(14, SETTINGS)
    for _ in range(2):
        assert_same(watched.run(14), expected)
    assert graphs(watched.model).replays == before + 28
    assert recordings(watched.model) == [recording]
