"""Named ranges while `profile` is on, in the right nesting; nothing of them when it is off."""

import threading

import pytest
import tiny
import torch

import dbcache
from dbcache import DBCacheConfig, DBPruneConfig, profiling

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

STEPS = 6
FORCED = {"Fn_compute_blocks": 2, "max_warmup_steps": 3, "residual_diff_threshold": 1.0}


ONE_BRANCH = {"num_inference_steps": STEPS, "enable_separate_cfg": False}


def methods():
    return [cls.__dict__[name] for cls, name, _ in profiling._METHODS]


@pytest.fixture(autouse=True)
def untouched():
    before = methods()
    yield
    assert all(a is b for a, b in zip(methods(), before, strict=True))
    assert profiling._PROFILES == []


def spans(profiler):
    """Return (name, begin, end) of the cache's ranges, and those of linear layers."""
    names = ("dbcache: ", "aten::linear")
    events = [e for e in profiler.events() if e.name.startswith(names)]
    return [
        (e.name.removeprefix("dbcache: "), e.time_range.start, e.time_range.end) for e in events
    ]


def inside(found, inner, outer):
    """Return how many `inner` ranges lie in an `outer` one."""
    outers = [(begin, end) for name, begin, end in found if name == outer]
    return sum(
        any(b <= begin and end <= e for b, e in outers)
        for name, begin, end in found
        if name == inner
    )


def test_the_ranges_of_a_request():
    pipe = dbcache.enable(tiny.pipeline("flux"), DBCacheConfig(**FORCED))
    with torch.profiler.profile() as profiler, dbcache.profile() as found:
        tiny.generate(pipe, STEPS, guided=False)
    expected = {"step": 6, "probe": 6, "decide": 6, "predict": 3, "commit": 3, "middle blocks": 3}
    assert found.counts == expected
    seen = spans(profiler)
    for name, count in expected.items():
        assert sum(span[0] == name for span in seen) == count
        assert inside(seen, name, "step") == count
    linears = inside(seen, "aten::linear", "step")
    assert 0 < inside(seen, "aten::linear", "probe") < inside(seen, "aten::linear", "middle blocks")
    assert inside(seen, "aten::linear", "middle blocks") < linears
    for name in ("decide", "predict", "commit"):
        assert inside(seen, "aten::linear", name) == 0
        assert inside(seen, name, "middle blocks") == inside(seen, name, "probe") == 0


def test_each_step_has_its_time_and_the_next_request_its_own():
    pipe = dbcache.enable(tiny.pipeline("wan"), DBCacheConfig(**FORCED))
    with dbcache.profile():
        for steps in (STEPS, STEPS + 2):
            tiny.generate(pipe, steps)
            for lane in dbcache.summary(pipe, logging=False):
                assert len(lane.seconds) == steps
                assert all(0 < seconds < 60 for seconds in lane.seconds)
    tiny.generate(pipe, STEPS)
    assert all(lane.seconds == [] for lane in dbcache.summary(pipe, logging=False))


def test_on_a_gpu_the_time_of_a_step_is_the_devices(monkeypatch):
    """Events around it, a second apart; that of its end is waited for where a summary is made."""
    made = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.number, self.is_over = len(made), False
            made.append(self)

        def record(self):
            assert not self.is_over

        def synchronize(self):
            self.is_over = True

        def elapsed_time(self, other):
            assert other.is_over, "it waits"
            return 1000.0 * (other.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(profiling, "device_of", lambda *args, **kwargs: torch.device("cuda"))
    family = tiny.FAMILIES["wan"]
    model = dbcache.enable(family.build(), DBCacheConfig(**FORCED), **ONE_BRANCH)
    with dbcache.profile():
        tiny.denoise(model, family, STEPS)
    assert not any(event.is_over for event in made)
    (lane,) = dbcache.summary(model, logging=False)
    assert lane.seconds == [1.0] * STEPS
    assert len(made) == 2 * STEPS


def test_a_transformer_alone_is_timed_from_the_beginning_of_its_image():
    family = tiny.FAMILIES["qwen"]
    model = dbcache.enable(
        family.build(), **FORCED, num_inference_steps=STEPS, enable_separate_cfg=False
    )
    with dbcache.profile():
        for _ in range(2):
            tiny.denoise(model, family, STEPS)
            (lane,) = dbcache.summary(model, logging=False)
            assert len(lane.seconds) == STEPS


def test_outputs_are_the_same_with_and_without():
    for config in (DBCacheConfig(**FORCED), DBPruneConfig(**FORCED | {"Bn_compute_blocks": 1})):
        pipe = dbcache.enable(tiny.pipeline("flux"), config)
        expected = tiny.generate(pipe, STEPS, guided=False)
        with dbcache.profile() as found:
            assert all(map(torch.equal, tiny.generate(pipe, STEPS, guided=False), expected))
        assert found.counts["decide"] == STEPS
        assert found.counts["predict"] > 0
        assert found.counts["commit"] > 0


def test_samples_that_decide_for_themselves_have_ranges_and_times():
    family = tiny.FAMILIES["qwen"]
    model = dbcache.enable(family.build(), **FORCED | ONE_BRANCH, batch_reduce="each")
    with dbcache.profile() as found, torch.no_grad():
        for step in range(STEPS):
            x = tiny.noise(*family.latent_shape, seed=step).expand(2, -1, -1).clone()
            model(**family.arguments(x, 1 - step / STEPS, "cond"))
    assert found.counts["decide"] == found.counts["step"] == STEPS
    assert found.counts["middle blocks"] == 3
    lanes = dbcache.summary(model, logging=False).lanes
    assert [len(lane.seconds) for lane in lanes] == [STEPS] * 2
    assert [lane.other for lane in lanes] == [None, None]


def test_a_step_that_fails_leaves_no_range_open():
    pipe = dbcache.enable(tiny.pipeline("flux"), DBCacheConfig(**FORCED))
    for index in (0, 3):  # in the probe, in the middle
        block = pipe.transformer.transformer_blocks[index]
        hook = block.register_forward_pre_hook(lambda *_: 1 / 0)
        with torch.profiler.profile() as profiler, dbcache.profile():
            with pytest.raises(ZeroDivisionError):
                tiny.generate(pipe, STEPS, guided=False)
            torch.nn.Linear(2, 2)(torch.ones(1, 2))
        hook.remove()
        seen = spans(profiler)
        last = max((span for span in seen if span[0] == "aten::linear"), key=lambda span: span[1])
        assert inside([last, *(s for s in seen if s[0] != "aten::linear")], last[0], "probe") == 0
        assert inside([last, *(s for s in seen if s[0] != "aten::linear")], last[0], "step") == 0


def test_profiles_may_nest_and_overlap_in_threads():
    pipes = [dbcache.enable(tiny.pipeline("flux"), DBCacheConfig(**FORCED)) for _ in range(2)]
    with dbcache.profile() as outer:
        with dbcache.profile() as inner:
            threads = [
                threading.Thread(target=tiny.generate, args=(p, STEPS), kwargs={"guided": False})
                for p in pipes
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        tiny.generate(pipes[0], STEPS, guided=False)
    assert (inner.counts["step"], outer.counts["step"]) == (2 * STEPS, 3 * STEPS)


def test_nvtx_needs_a_device():
    if torch.cuda.is_available():
        with dbcache.profile(nvtx=True) as found:
            assert found.nvtx
        return
    with pytest.raises(RuntimeError, match="needs a CUDA device"), dbcache.profile(nvtx=True):
        pass
    with pytest.raises(TypeError, match="nvtx must be True or False"), dbcache.profile(nvtx="yes"):
        pass
