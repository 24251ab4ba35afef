"""How many kernels a step launches, through the whole runtime, on a model with two streams."""

import importlib
import pkgutil
from dataclasses import replace

import pytest
import torch
from engines import drive, run_dbcache
from oracle import CACHED, Rule
from tiny import FAMILIES

import dbcache.kernels
from dbcache.kernels.common import select as _select
from dbcache.kernels.common.lane_state import LaneState
from dbcache.lanes.buffers import HostCopy
from dbcache.lanes.lane import Lane

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 10
MASK = (1, 0, 1, 0, 0, 1, 0, 0, 0, 1)
RULES = {
    "reuse": Rule(max_warmup_steps=2, residual_diff_threshold=0.25),
    "order 1": Rule(max_warmup_steps=2, residual_diff_threshold=0.25, order=1),
    "batch": Rule(max_warmup_steps=2, residual_diff_threshold=0.25, batch_reduce="max"),
    "hidden states": Rule(max_warmup_steps=2, l1_hidden_states_diff_threshold=0.1),
    "tokens": Rule(
        max_warmup_steps=2, residual_diff_threshold=0.3, important_condition_threshold=0.1
    ),
    "limits": Rule(max_warmup_steps=2, residual_diff_threshold=1.0, max_cached_steps=4),
    "static": Rule(steps_computation_mask=MASK, steps_computation_policy="static", order=1),
}


class Counted:
    """A Triton kernel that writes down its launches."""

    def __init__(self, kernel, name: str, launches: list[str]) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        self.launches.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch):
    """Return the names of the package's kernels that are launched, in order. "auto" is Triton."""
    monkeypatch.setenv("DBCACHE_KERNELS", "triton")
    _select.reset_environment()
    log: list[str] = []
    for info in pkgutil.walk_packages(dbcache.kernels.__path__, "dbcache.kernels."):
        module = importlib.import_module(info.name)
        for attribute, kernel in list(vars(module).items()):
            if attribute.endswith("_kernel"):
                name = attribute.removeprefix("_").removesuffix("_kernel")
                monkeypatch.setattr(module, attribute, Counted(kernel, name, log))
    yield log
    monkeypatch.undo()
    _select.reset_environment()


def launches_of(reason: str) -> list[str]:
    """Return what a step of this reason launches: one kernel to decide, one for both streams."""
    planned = reason in ("warm-up", "mask", "static", "no reference")
    return [
        "decide" if planned else "probe_and_decide",
        "predict" if reason in CACHED else "commit",
    ]


@pytest.fixture
def by_kernel(monkeypatch):
    """Let lanes predict by the kernel where PyTorch would add a residual that is reused."""
    own = Lane._load

    def load(lane):
        own(lane)
        lane.reuses = False

    monkeypatch.setattr(Lane, "_load", load)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_step_launches_two_kernels(launches, by_kernel, rule):
    family, batch = FAMILIES["flux"], 2 if rule.batch_reduce == "max" else 1
    (lane,) = run_dbcache(family.build(double=2, single=2), family, rule, STEPS, batch=batch).lanes
    assert launches == [name for reason in lane.reasons for name in launches_of(reason)]
    assert 0 < len(lane.cached_steps) < STEPS


def test_a_step_that_reuses_launches_one_kernel(launches):
    (lane,) = run_dbcache(
        FAMILIES["flux"].build(double=2, single=2), FAMILIES["flux"], RULES["reuse"], STEPS
    ).lanes
    expected = [name for reason in lane.reasons for name in launches_of(reason)]
    assert launches == [name for name in expected if name != "predict"]
    assert 0 < len(lane.cached_steps) < STEPS


def test_a_cached_and_a_full_dynamic_step_both_occur(launches):
    family, rule = FAMILIES["flux"], RULES["reuse"]
    (lane,) = run_dbcache(family.build(double=2, single=2), family, rule, STEPS).lanes
    assert {"above threshold", "below threshold"} <= set(lane.reasons)


def test_the_branch_that_takes_the_others_diff_measures_nothing(launches, by_kernel):
    family = FAMILIES["flux"]
    rule = replace(RULES["reuse"], enable_separate_cfg=True, cfg_diff_compute_separate=False)
    run_dbcache(family.build(double=2, single=2), family, rule, STEPS)
    dynamic = STEPS - rule.max_warmup_steps
    assert launches.count("probe_diff") == dynamic
    assert launches.count("share_change") == dynamic  # keeps it for steps that are in a graph
    assert launches.count("decide") == 2 * STEPS
    assert launches.count("commit") + launches.count("predict") == 2 * STEPS
    assert len(launches) == 2 * dynamic + 4 * STEPS


class Event:
    """A `torch.cuda.Event` that writes down when it is recorded, and waited for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self, stream) -> None:
        self.log.append("copy")

    def synchronize(self) -> None:
        self.log.append("wait")


@pytest.fixture
def far_away(launches, monkeypatch):
    """Let the host read decisions as it does on a GPU, and note the copies and the waits."""
    own = LaneState._make_views

    def make_views(state):
        own(state)
        state.host = None

    def held(x):
        return torch.empty_like(x), Event(launches)

    monkeypatch.setattr(LaneState, "_make_views", make_views)
    monkeypatch.setattr(HostCopy, "_make", staticmethod(held))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return launches


AHEAD = {
    "reuse": (True, {}),
    "order 1": (True, {"enable_taylorseer": True, "taylorseer_order": 1}),
    "ring on the host": (False, {"cache_device": "cpu"}),
    "weights of its own": (False, {"calibrator_config": dbcache.DMDCalibratorConfig()}),
}
"""Whether a step hides the wait, and its options."""


def in_order(reason: str, is_ahead: bool) -> list[str]:
    """Return what is launched, copied and waited for in a step of this reason."""
    decided, last = launches_of(reason)
    if decided == "decide":
        return [decided, last]
    if is_ahead:  # a full step throws the prediction away
        return [decided, "copy", "predict", "wait", *[last] * (last == "commit")]
    return [decided, "copy", "wait", last]


@pytest.mark.parametrize(("is_ahead", "options"), AHEAD.values(), ids=AHEAD)
def test_a_prediction_is_launched_before_the_host_waits(
    request, launches, by_kernel, is_ahead, options
):
    family, runs = FAMILIES["flux"], []
    for fixture in ("launches", "far_away"):
        request.getfixturevalue(fixture)
        launches.clear()
        model = family.build(double=2, single=2)
        limits = {"max_warmup_steps": 2, "residual_diff_threshold": 0.25}
        dbcache.enable(model, Fn_compute_blocks=1, **limits, **options)
        outputs = drive(model, family, RULES["reuse"], STEPS)
        runs.append((outputs, dbcache.summary(model, logging=False).lanes[0].reasons))
    (plain, reasons), (outputs, same) = runs
    assert reasons == same
    assert all(map(torch.equal, plain, outputs))
    assert {"above threshold", "below threshold"} <= set(reasons)
    known = {"decide", "probe_and_decide", "copy", "predict", "wait", "commit"}
    expected = [name for reason in reasons for name in in_order(reason, is_ahead)]
    assert [name for name in launches if name in known] == expected
