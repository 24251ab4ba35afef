"""The kernel benchmark runs, counts the right bytes, and refuses what is wrong."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

from bench import kernels, timing  # noqa: E402
from bench.kernel_op import Draw  # noqa: E402
from bench.kernel_ops import OPS  # noqa: E402
from bench.shapes import SHAPES, Shape, parse  # noqa: E402
from dbcache.kernels.common.launches import CONFIGS  # noqa: E402
from dbcache.kernels.tuning import Choice  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Shape(name="tiny", hidden=48, encoder=16, width=64, batch=2)
PNG = b"\x89PNG\r\n\x1a\n"


def settings(**changes) -> kernels.Settings:
    return replace(
        kernels.Settings(
            device=torch.device("cpu"), repeats=2, compiled=False, seconds=math.inf
        ),
        **changes,
    )  # fmt: skip


def test_run_by_its_path_from_anywhere_it_writes_table_json_and_plot(tmp_path):
    files = {name: tmp_path / f"kernels.{name}" for name in ("json", "png")}
    command = [sys.executable, ROOT / "bench" / "run.py", "kernels", "--device", "cpu"]
    command += ["--shapes", "48+16x64", "32x64", "--ops", "probe_diff", "commit K=2", "decide"]
    command += ["--repeats", "2", "--json", files["json"], "--plot", files["png"]]
    done = subprocess.run(
        [str(word) for word in command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "CPU: these are the ops' PyTorch references, not the Triton kernels" in done.stdout

    names = ["probe_diff", "decide", "probe_diff+decide", "commit K=2"]
    names += ["probe_diff tokens", "probe_diff block", "decide_rows", "decide_step", "decide_tail"]
    lines = [line for line in done.stdout.splitlines() if line.endswith(tuple("0123456789"))]
    assert [line[:18].strip() for line in lines if "reference" in line] == 2 * names

    content = json.loads(files["json"].read_text())
    assert [row["op"] for row in content["rows"]] == 2 * names
    assert content["about"]["torch"] == torch.__version__
    assert content["copy_gb_per_s"] > 0
    for row in content["rows"]:
        times = row["timings"]["dbcache"]
        assert 0 < times["p20_ms"] <= times["p50_ms"] <= times["p80_ms"]
        assert row["times_eager"] > 0
        assert row["error"] == 0
    assert files["png"].read_bytes().startswith(PNG)


def moved_by(name: str, draw: Draw) -> int:
    """Count the bytes of the tensors that an op must read and write, from a set of its inputs."""
    return moved_of(name, OPS[name].make(TINY, draw), draw)


def moved_of(name: str, x: dict, draw: Draw) -> int:
    """Count the same for a set of inputs."""
    if "_rows" in name:
        lane = {"decide_rows": "probe_and_decide"}.get(name, name.replace("_rows", ""))
        return sum(moved_of(lane, row, draw) for row in x["each"])

    def size(*tensors: torch.Tensor) -> int:
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    scalar = ("decide", "share_change", "block_choice M=4", "decide_step", "decide_tail")
    scalar += ("transformation_rate",)
    if name in scalar or name.endswith("weights"):
        return 0
    if name.startswith("fit_recurrence"):
        return size(x["ring"])
    if name.startswith("block_changes"):
        return size(x["h"], x["state"].inputs)
    if name == "store_block":
        state, streams = x["state"], [x[k] for k in ("h", "h_out", "encoder", "encoder_out")]
        stored = [tensor[1] for tensor in (state.inputs, state.residuals)]
        return size(*streams, *stored, *stored, state.encoder_residuals[1])
    if name.startswith("add_residuals"):
        state, streams = x["state"], (x["h"], x["encoder"])
        return size(*streams, *streams, state.residuals, state.encoder_residuals)
    if name == "probe_diff block":
        return size(x["h_fn"], x["p_ref"])
    if name.startswith("probe"):
        return size(x["h_in"], x["h_fn"], x["p_ref"])
    if name.startswith("predict"):
        rings = [x["h_ring"], x["encoder_ring"]]
        if "fp8" in name:
            rings += [x["h_scales"], x["encoder_scales"]]
        return size(*rings, x["h"], x["h"], x["encoder"], x["encoder"])
    if name.startswith("commit"):
        slots = [x["h_ring"][0], x["encoder_ring"][0]]
        if "fp8" in name:
            slots += [x["h_scales"][0], x["encoder_scales"][0]]
        read = size(x["h_in"], x["h_fn"], x["h_out"], x["encoder_fn"], x["encoder_out"])
        return read + size(x["p_ref"], *slots)
    if name == "merge_attention":
        written = size(x["out_a"], x["lse_a"])
        return size(x["out_a"], x["lse_a"], x["out_b"], x["lse_b"]) + written
    if name == "fp8_pack layout":
        return 2 * size(x["x"])
    if name == "fp8_unpack":
        return size(x["codes"], x["scales"]) + x["codes"].numel() * 2
    assert name == "fp8_pack"
    packed = OPS["fp8_unpack"].make(TINY, draw)
    return size(x["x"], packed["codes"], packed["scales"])


@pytest.mark.parametrize("name", OPS)
def test_bytes_that_must_move_are_those_of_the_tensors(name):
    moved = OPS[name].moved
    counted = moved_by(name, Draw(torch.device("cpu")))
    assert (moved(TINY) if moved else 0) == counted


@pytest.mark.parametrize("shape", [TINY, replace(TINY, encoder=0, batch=1)], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_op_and_its_peers_agree_with_the_reference(shape, dtype):
    for op in OPS.values():
        error, wrong = kernels.check(op, replace(shape, dtype=dtype), settings())
        assert (op.name, wrong) == (op.name, None)
        assert error == 0


@pytest.mark.parametrize("name", OPS)
def test_the_triton_kernels_are_what_is_called_on_a_gpu(name, monkeypatch):
    monkeypatch.setattr(kernels.Settings, "impl", "triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # or the interpreter
    error, wrong = kernels.check(OPS[name], replace(TINY, batch=1), settings(device=device))
    assert (name, wrong) == (name, None), error


@pytest.mark.parametrize("name", ["probe_diff", "predict K=2", "commit K=1", "merge_attention"])
@pytest.mark.parametrize("spoil", ["off by a little", "NaN", "not written"])
def test_a_wrong_op_is_refused_and_not_timed(name, spoil, monkeypatch, capsys):
    op, calls = OPS[name], 0

    def results(x, outputs):
        nonlocal calls
        calls += 1
        good = op.results(x, outputs)
        if calls != 1:  # the reference's turn
            return good
        first = good[0]
        wrong = {
            "off by a little": first * 1.02,
            "NaN": torch.full_like(first, math.nan),
            "not written": torch.empty_like(first).fill_(0),
        }
        return wrong[spoil], *good[1:]

    monkeypatch.setattr(kernels, "measure", lambda *_: pytest.fail("a wrong op was timed"))
    (row,) = kernels.run([replace(op, results=results)], [TINY], settings(), bandwidth=1e9)
    assert "differs from its reference" in row.refused
    assert not row.timings
    assert "REFUSED" in capsys.readouterr().out


def test_a_peers_sequence_that_computes_something_else_is_refused():
    op = OPS["predict K=2"]
    doubled = replace(op, eager=lambda x: tuple(y * 2 for y in op.eager(x)))
    _, wrong = kernels.check(doubled, TINY, settings())
    assert "the peers' sequence differs" in wrong


def test_a_refused_op_fails_the_program(monkeypatch, capsys):
    op = OPS["probe_diff"]
    monkeypatch.setattr(kernels, "OPS", {"op": replace(op, eager=lambda x: (torch.ones(()) * 9,))})
    assert kernels.main(["--device", "cpu", "--shapes", "32x64", "--repeats", "2"]) == 1
    assert "REFUSED" in capsys.readouterr().out


def test_no_line_is_begun_when_the_time_is_over(capsys):
    rows = kernels.run(OPS.values(), [TINY], settings(seconds=-1), bandwidth=1e9)
    assert {row.refused for row in rows} == {"no time left"}
    assert capsys.readouterr().out.count("left out") == len(OPS)


def test_percent_of_floor_is_the_floor_over_the_time():
    op = replace(OPS["probe_diff"], moved=lambda shape: 10**9)
    row = kernels.time_row(op, TINY, settings(), bandwidth=1e12)
    assert row.floor_ms == pytest.approx(1.0)
    assert row.of_floor == pytest.approx(100 / row.timings["dbcache"].p50_ms)
    assert row.gb_per_s == pytest.approx(1e3 / row.timings["dbcache"].p50_ms)


def test_tokens_of_the_models():
    tokens = {name: (shape.hidden, shape.encoder, shape.width) for name, shape in SHAPES.items()}
    assert tokens == {
        "flux-512": (1024, 512, 3072),
        "flux-1024": (4096, 512, 3072),
        "flux-2048": (16384, 512, 3072),
        "qwen-1328": (6889, 512, 3072),
        "wan-480p": (32760, 0, 5120),
        "wan-720p": (75600, 0, 5120),
        "hunyuanvideo-720p": (118800, 256, 3072),
        "few-step-512": (1024, 256, 3072),
    }


def test_shapes_can_be_spelt_out_and_unknown_ones_are_named():
    spelt = parse("100+7x96")
    assert (spelt.hidden, spelt.encoder, spelt.width) == (100, 7, 96)
    assert parse("100x96").encoder == 0
    with pytest.raises(ValueError, match=r"must be one of flux-512, .* got 'flux-4096'"):
        parse("flux-4096")


def test_buffers_are_more_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 50 * 2**20)
    cpu = torch.device("cpu")
    for size in (6 * 2**20, 75 * 2**20, 2**30):
        assert timing.sets_needed(size, cpu) * size >= 4 * 50 * 2**20
    assert timing.sets_needed(2**30, cpu) == 1
    assert timing.sets_needed(1, cpu) == timing.MAX_SETS


def test_variants_take_turns_and_rotate_their_buffers(monkeypatch):
    monkeypatch.setitem(timing.MAX_CALLS, "cpu", 2)
    seen = []
    variants = [
        timing.Variant(name=name, call=lambda i, name=name: seen.append((name, i))) for name in "ab"
    ]
    timing.measure(variants, torch.device("cpu"), repeats=4)
    # after two stretches of 3 calls each to warm up
    turns = [name for name, _ in seen[12::2]]
    assert turns == list("abbaabba")
    assert [i for name, i in seen if name == "a"] == list(range(6 + 2 * 4))


class Gpu:
    """A GPU with a queue, and its host: both take their time, in ms, on one clock.

    Args:
        host_ms: what the host takes to launch a call.
        device_ms: what the device takes to run it.
    """

    CYCLES_PER_MS = 1000

    def __init__(self, host_ms, device_ms):
        self.host_ms, self.device_ms = host_ms, device_ms
        self.now = self.free = 0.0
        self.captured = None

    def enqueue(self, ms):
        self.free = max(self.free, self.now) + ms

    def call(self, number):
        if self.captured is not None:
            self.captured += 1
            return
        self.now += self.host_ms
        self.enqueue(self.device_ms)

    def synchronize(self, *_):
        self.now = max(self.now, self.free)

    @contextlib.contextmanager
    def capture(self, graph):
        self.captured = 0
        yield
        calls, self.captured = self.captured, None
        graph.replay = lambda: self.enqueue(calls * self.device_ms)

    def take_the_place_of_cuda(self, monkeypatch):
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(gpu.free, gpu.now)

            def synchronize(self):
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, other):
                return other.at - self.at

        for name, value in {
            "Event": Event,
            "synchronize": self.synchronize,
            "_sleep": lambda cycles: self.enqueue(cycles / self.CYCLES_PER_MS),
            "CUDAGraph": SimpleNamespace,
            "graph": self.capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        clock = SimpleNamespace(perf_counter=lambda: self.now / 1e3)
        monkeypatch.setattr(timing, "time", clock)


@pytest.mark.parametrize("host_ms", [0.01, 0.08])
def test_on_a_gpu_times_are_the_devices_however_slow_the_host_is(monkeypatch, host_ms):
    """Launches are enqueued behind a sleep; what is short is timed as a graph, too."""
    gpu = Gpu(host_ms, 0.05)
    gpu.take_the_place_of_cuda(monkeypatch)
    device = torch.device("cuda", 0)
    (times,) = timing.measure([timing.Variant(name="a", call=gpu.call)], device, 4).values()
    assert (times.p20_ms, times.p50_ms, times.p80_ms) == pytest.approx((0.05,) * 3)
    assert times.graph_ms == pytest.approx(0.05)
    assert times.host_us == pytest.approx(host_ms * 1e3)


def test_on_a_gpu_what_waits_is_not_held_up_and_no_graph(monkeypatch):
    gpu = Gpu(0.02, 0.05)
    gpu.take_the_place_of_cuda(monkeypatch)

    def wait(number):
        gpu.call(number)
        gpu.synchronize()

    (times,) = timing.measure(
        [timing.Variant(name="a", call=wait, waits=True)], torch.device("cuda", 0), 4
    ).values()
    assert times.p50_ms == pytest.approx(0.02 + 0.05)
    assert times.graph_ms is None


def test_tune_without_a_gpu_says_why_it_cannot(capsys):
    with pytest.raises(SystemExit) as status:
        kernels.main(["--device", "cpu", "--tune"])
    assert status.value.code == 2
    assert "--tune needs a GPU" in capsys.readouterr().err


def test_tune_chooses_once_per_op_slots_and_shape_while_there_is_time(monkeypatch, capsys):
    asked = []

    def tune(op, size, dtype, *, slots, encoder_shape, device):
        asked.append((op, slots, size, encoder_shape, dtype))
        if op == "commit":
            raise torch.OutOfMemoryError("no memory")
        default, best = CONFIGS[op][:2]
        return Choice(best, {default: 2.0, best: 1.0})

    monkeypatch.setattr(kernels, "tune", tune)
    plain = replace(TINY, name="plain", encoder=0)
    cpu = torch.device("cpu")
    rows = [op for op in OPS.values() if op.name.startswith(("predict", "commit", "probe_diff"))]
    kernels.tune_all(rows, (TINY, plain), cpu, math.inf)
    ops = [("probe_diff", 1), *(("predict", slots) for slots in (1, 2, 3)), ("commit", 1)]
    ops.append(("probe_diff tokens", 1))
    states, size = (2, 16, 64), (2, 48, 64)
    expected = [(*op, size, extra, torch.bfloat16) for extra in (states, None) for op in ops]
    assert asked == expected
    assert all(op in CONFIGS for op, _ in ops)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(expected)
    assert sum("out of memory" in line for line in lines) == 2
    assert lines[2].split()[2:] == ["predict", "K=1", "tiny", "2048", "8", "1.0000", "2.000"]

    asked.clear()
    kernels.tune_all(rows, (TINY,), cpu, -1.0)
    assert asked == []
    assert "no time left" in capsys.readouterr().out
