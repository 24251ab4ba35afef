"""Configs are chosen when asked for, kept, looked up by launches, and never change a bit."""

import json
import math
import os
import subprocess
import sys
import timeit
import warnings
from pathlib import Path

import pytest
import torch

from dbcache.kernels import tuning
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common import launches
from dbcache.kernels.common.launches import BLOCK, CONFIGS, Launch, configs_of, launch_of
from dbcache.kernels.decision.probe_and_decide import probe_and_decide
from dbcache.kernels.decision.probe_diff import probe_diff
from dbcache.kernels.prediction.commit import commit
from dbcache.kernels.prediction.predict import predict
from dbcache.testing import poisoned

ROOT = Path(__file__).resolve().parents[2]
SHAPE, ENCODER_SHAPE = (2, 45, 96), (2, 7, 96)  # several blocks of each config, none of them full
NOT_DEFAULT = [(op, launch) for op, configs in CONFIGS.items() for launch in configs[1:]]


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """Keep choices in a file of the test's own, and forget them afterwards."""
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv("DBCACHE_TUNING", str(path))
    launches.reset()
    yield path
    launches.reset()


@pytest.fixture
def may_tune(monkeypatch, device):
    """Let `tune` run where Triton does, also in the interpreter."""
    here = torch.device("cuda", 0) if device.type == "cuda" else device
    monkeypatch.setattr(tuning, "check_device", lambda _: here)


class Stopwatch:
    """Says that the config in use takes as long as it is told, and counts how often it is asked."""

    def __init__(self, op, x, times, slots=1):
        self.op, self.x, self.times, self.slots = op, x, times, slots
        self.seen = []

    def __call__(self, call):
        if not self.seen:  # it must run; the interpreter takes its time
            call()
        self.seen.append(launch_of(self.op, self.x, self.slots))
        return self.times.get(self.seen[-1], 9.0)


def tuned(op, device, best, dtype=torch.float32, **options):
    x = torch.empty(SHAPE, dtype=dtype, device=device)
    watch = Stopwatch(op, x, {best: 1.0}, options.get("slots", 1))
    choice = tuning.tune(op, SHAPE, dtype, timer=watch, **options)
    return x, watch, choice


@pytest.mark.parametrize(("op", "best"), NOT_DEFAULT, ids=str)
def test_the_fastest_config_is_chosen_and_used_from_then_on(may_tune, device, op, best):
    x, watch, choice = tuned(op, device, best)
    assert watch.seen == tuning.ROUNDS * list(CONFIGS[op])
    assert choice.launch == best == launch_of(op, x)
    assert choice.gain == 9


def test_a_choice_is_found_again_after_a_reset_and_in_another_process(may_tune, device, file):
    best = Launch(4096, 8)
    x, *_ = tuned("predict", device, best, slots=3, encoder_shape=ENCODER_SHAPE)
    launches.reset()
    assert launch_of("predict", x, 3) == best
    code = f"""
import torch
from dbcache.kernels.common.launches import launch_of
print(*launch_of("predict", torch.empty({SHAPE}, device={device.type!r}), 3))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["4096", "8"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no temporary file


def test_choices_add_up_and_those_of_another_device_stay(may_tune, device, file):
    other = {("commit", 20, 2, 1): Launch(BLOCK, 8)}
    launches.write(file, "another GPU, 9.0, triton 3.5.0", other)
    tuned("commit", device, Launch(1024, 2))
    tuned("commit", device, Launch(4096, 8), dtype=torch.bfloat16)
    devices = launches.read(file)
    assert devices.pop("another GPU, 9.0, triton 3.5.0") == other
    ((name, table),) = devices.items()
    assert name == launches.device_id(-1 if device.type == "cpu" else 0)
    size = int(math.log2(math.prod(SHAPE)))
    expected = {("commit", size, 4, 1): Launch(1024, 2), ("commit", size, 2, 1): Launch(4096, 8)}
    assert table == expected


@pytest.mark.parametrize("op", CONFIGS)
def test_what_was_never_tuned_takes_the_default(may_tune, device, op):
    tuned("commit", device, Launch(BLOCK, 8))
    rows = {"fewer": SHAPE[1] // 2, "more": 2 * SHAPE[1], "tuned": SHAPE[1]}
    for name, tokens in rows.items():
        x = torch.empty(SHAPE[0], tokens, SHAPE[2], device=device)
        if (op, name) == ("commit", "tuned"):
            assert launch_of(op, x) == Launch(BLOCK, 8)
            assert launch_of(op, x.half()) == configs_of(op)[0]
        else:
            assert launch_of(op, x) == CONFIGS[op][0]


def test_the_default_stays_unless_another_is_faster_by_more_than_noise():
    times = dict(zip(CONFIGS["predict"], (1.0, 0.995, 1.1, 0.991), strict=True))
    assert tuning.fastest(times).launch == configs_of("predict")[0]
    times[Launch(4096, 8)] = 0.98
    assert tuning.fastest(times).launch == Launch(4096, 8)


def test_a_measurement_that_fails_leaves_the_choice_before(may_tune, device, file):
    x, *_ = tuned("predict", device, Launch(BLOCK, 8))

    def fail(call):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        tuning.tune("predict", SHAPE, torch.float32, timer=fail)
    assert launch_of("predict", x) == Launch(BLOCK, 8)
    with pytest.raises(torch.OutOfMemoryError):
        tuning.tune("commit", SHAPE, torch.float32, timer=fail)
    assert launch_of("commit", x) == configs_of("commit")[0]
    assert len(json.loads(file.read_text())["devices"].popitem()[1]) == 1


DAMAGED = {
    "empty": "",
    "cut": '{"format": "dbcache tuning 1", "devices": {"a": [["pre',
    "binary": "\0\x7f",
    "list": "[]",
    "foreign": '{"format": "something else", "devices": {}}',
    "devices": '{"format": "dbcache tuning 1", "devices": [1]}',
    "entry": '{"format": "dbcache tuning 1", "devices": {"a": [["predict", 1]]}}',
    "op": '{"format": "dbcache tuning 1", "devices": {"a": [["x", 1, 2, 1, 2048, 4]]}}',
    "config": '{"format": "dbcache tuning 1", "devices": {"a": [["predict", 1, 2, 1, 7, 3]]}}',
    "type": '{"format": "dbcache tuning 1", "devices": {"a": [["predict", "1", 2, 1, 2048, 4]]}}',
    "deep": "[" * 200_000,
    "latin-1": '{"format": "\N{LATIN SMALL LETTER E WITH ACUTE}"}'.encode("latin-1"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_ignored_with_one_warning_and_never_overwritten(
    may_tune, device, file, content
):
    content = content if isinstance(content, bytes) else content.encode()
    file.parent.mkdir()
    file.write_bytes(content)
    x = torch.empty(SHAPE, device=device)
    with pytest.warns(UserWarning, match="tuned choices are ignored.*DBCACHE_TUNING") as warned:
        assert launch_of("predict", x) == configs_of("predict")[0]
    assert len(str(warned[0].message)) < 600
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch_of("commit", x) == configs_of("commit")[0]

    def unused(call):
        pytest.fail("measured before the file was looked at")

    with pytest.raises(ValueError, match="delete it"):
        tuning.tune("predict", SHAPE, torch.float32, timer=unused)
    assert file.read_bytes() == content


REFUSALS = {
    "traced": (torch.compiler, "is_compiling", "torch.compile traces"),
    "captured": (torch.cuda, "is_current_stream_capturing", "graph is captured"),
}


@pytest.mark.parametrize("why", [*REFUSALS, "interpreted", "no GPU"])
def test_tune_refuses_where_it_cannot_measure(monkeypatch, file, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: why != "no GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if why == "interpreted" else "0")
    said = {"interpreted": "TRITON_INTERPRET=1", "no GPU": "run on a GPU"}
    if why in REFUSALS:
        module, name, said[why] = REFUSALS[why]
        monkeypatch.setattr(module, name, lambda: True)
    with pytest.raises(RuntimeError, match=f"tune: must .*{said[why]}"):
        tuning.tune("predict", SHAPE, torch.float32)
    assert not file.exists()


@pytest.mark.gpu
def test_tune_refuses_under_a_real_capture_and_launches_only_look_up(file):
    x = torch.randn(SHAPE, device="cuda")
    ring, weights = torch.randn(1, *SHAPE, device="cuda"), torch.ones(ls.MAX_SLOTS, device="cuda")
    choice = tuning.tune("predict", SHAPE, torch.float32)
    assert 0 < choice.times[choice.launch] <= choice.times[configs_of("predict")[0]]
    expected, _ = predict(x, ring, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = predict(x, ring, weights)
        with pytest.raises(RuntimeError, match="captured"):
            tuning.tune("predict", SHAPE, torch.float32)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("arguments", "must"),
    [
        (("decide", SHAPE, torch.float32), "op must be one of predict, commit"),
        (("predict", (4, 96), torch.float32), "shape must be"),
        (("predict", (2, 0, 96), torch.float32), "shape must be"),
        (("predict", SHAPE, torch.float64), "dtype must be"),
        (("predict", SHAPE, torch.float32, 9), "slots must be"),
        (("commit", SHAPE, torch.float32, 2), "slots must be"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_tune_rejects_what_no_op_takes(arguments, must):
    *arguments, slots = (*arguments, 1) if len(arguments) == 3 else arguments
    with pytest.raises(ValueError, match=must):
        tuning.tune(*arguments, slots=slots)


def outputs(op, random, device):
    """Run an op on random tensors and return everything that it wrote."""
    streams = (SHAPE, ENCODER_SHAPE)
    h_in, h_fn, h_out = (random(*SHAPE, dtype=torch.bfloat16) for _ in range(3))
    fn, out = (random(*ENCODER_SHAPE, dtype=torch.bfloat16) for _ in range(2))
    if op == "predict":
        weights = random(ls.MAX_SLOTS)
        rings = [random(3, *shape, dtype=torch.bfloat16) for shape in streams]
        return predict(h_in, rings[0], weights, fn, rings[1], weights, impl="triton")
    p_ref = random(*SHAPE, dtype=torch.bfloat16)
    state = ls.LaneState.allocate(8, device)
    state.thresholds[ls.THRESHOLD] = state.thresholds[ls.IMPORTANT] = 1.5
    state.counters[ls.REFERENCE] = 1
    if op == "commit":
        rings = [poisoned(2, *shape, dtype=torch.bfloat16, device=device) for shape in streams]
        args = (h_in, h_fn, h_out, p_ref, rings[0], state.counters, fn, out, rings[1])
        commit(*args, impl="triton")
        return p_ref, rings[0][0], rings[1][0]
    by_token = op.endswith("tokens")
    if op.startswith("probe_diff"):
        thresholds = state.thresholds if by_token else None
        return (probe_diff(h_in, h_fn, p_ref, thresholds, impl="triton"),)
    probe_and_decide(h_in, h_fn, p_ref, state, by_token=by_token, impl="triton")
    assert state.trace_diff[0] > 0
    return state.trace_diff, state.trace_reason, state.counters, state.values


@pytest.mark.parametrize(("op", "launch"), NOT_DEFAULT, ids=str)
def test_every_config_gives_the_same_bits(request, device, op, launch):
    def run():
        generator = torch.Generator().manual_seed(0)

        def random(*shape, dtype=torch.float32):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        return outputs(op, random, device)

    expected = run()
    x = torch.empty(SHAPE, dtype=torch.bfloat16, device=device)
    slots = 3 if op == "predict" else 1
    table = launches.table_of(x.get_device())
    table[launches.key_of(op, x.numel(), x.itemsize, slots)] = launch
    assert launch_of(op, x, slots) == launch != configs_of(op)[0]
    for mine, theirs in zip(run(), expected, strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def test_the_probes_never_change_their_blocks():
    for op, configs in CONFIGS.items():
        assert len(set(configs)) == len(configs), op
        if op.startswith("probe"):
            assert {launch.block for launch in configs} == {BLOCK}, op


def test_looking_up_in_an_empty_table_costs_less_than_a_microsecond(device):
    x = torch.empty(SHAPE, device=device)
    best = min(timeit.repeat(lambda: launch_of("predict", x, 3), number=2000, repeat=9))
    assert best / 2000 < 1e-6
