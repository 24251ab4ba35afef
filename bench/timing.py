"""Time calls on a GPU or a CPU: warm, interleaved, with medians and spread.

On a GPU, times are those of the device, between two events around several calls. The device is
held up by a sleep while the host enqueues them, so that launch gaps do not count; how long the host
takes per call is reported beside it. `graph` times the same calls as one captured CUDA graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[int], object]

REGION_MS = {"cuda": 2.0, "cpu": 5.0}
"""Time that one measured stretch of calls should take."""
MAX_CALLS = {"cuda": 64, "cpu": 200}
"""Most calls in a stretch; a CUDA stream holds about a thousand launches."""
GRAPH_BELOW_MS = 0.1
"""Only what is this short is also timed as a graph."""
LONGEST_SLEEP_MS = 50.0
CACHE_MULTIPLE = 4
MAX_SETS = 64
"""Most sets of buffers: what is smaller than a cache by so much is in it in real use, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One implementation that takes its turn."""

    name: str
    call: Call
    """Takes the number of the call, by which it chooses among its sets of buffers."""
    waits: bool = False
    """It waits for the device, so it can be neither enqueued ahead nor captured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Times per call."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    host_us: float
    """Time that the host takes to enqueue a call; on a CPU, the whole call."""
    graph_ms: float | None = None
    """Median inside a CUDA graph, where that was measured."""


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache that buffers must not fit in."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 32 * 2**20  # PyTorch does not say; the order of a desktop CPU's


def sets_needed(bytes_per_set: int, device: torch.device) -> int:
    """Return how many sets of buffers to rotate, so that none is in the cache at its next turn."""
    wanted = -(-CACHE_MULTIPLE * cache_bytes(device) // max(1, bytes_per_set))
    return max(1, min(MAX_SETS, wanted))


def copy_bandwidth(device: torch.device) -> float:
    """Return the device's own bandwidth in bytes per second: a large copy, reads plus writes."""
    size = 128 * 2**20
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        size = min(2 * 2**30, free // 8)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = Variant(name="copy", call=lambda _: target.copy_(source))
    timing = measure([copy], device, repeats=20 if device.type == "cuda" else 7)["copy"]
    return 2 * size / (timing.p50_ms * 1e-3)


def measure(variants: list[Variant], device: torch.device, repeats: int) -> dict[str, Timing]:
    """Time the variants in turns and return their times by name."""
    plans = {v.name: _Stretch.plan(v, device) for v in variants}
    samples: dict[str, list[tuple[float, float]]] = {v.name: [] for v in variants}
    for turn in range(repeats):
        first = turn % len(variants)
        for variant in variants[first:] + variants[:first]:
            samples[variant.name].append(plans[variant.name].run())
    timings = {}
    for variant in variants:
        times = [sample for sample, _ in samples[variant.name]]
        p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
        median = statistics.median(times)
        graph = None
        if device.type == "cuda" and not variant.waits and median < GRAPH_BELOW_MS:
            graph = _graph_ms(variant, plans[variant.name].calls, repeats)
        host = statistics.median(host for _, host in samples[variant.name])
        timings[variant.name] = Timing(
            p20_ms=p20, p50_ms=median, p80_ms=p80, host_us=host * 1e3, graph_ms=graph
        )
    return timings


@dataclass(slots=True)
class _Stretch:
    """How many calls are measured together, and where the rotation stands."""

    variant: Variant
    device: torch.device
    calls: int
    sleep_cycles: int
    next_call: int = 0

    @classmethod
    def plan(cls, variant: Variant, device: torch.device) -> _Stretch:
        """Warm up, then choose how many calls make a stretch of REGION_MS."""
        stretch = cls(variant, device, calls=3, sleep_cycles=0)
        stretch.run()
        elapsed, host = stretch.run()
        most = MAX_CALLS[device.type]
        stretch.calls = max(1, min(most, round(REGION_MS[device.type] / max(elapsed, 1e-6))))
        if device.type == "cuda" and not variant.waits:
            # half as long again as the host was seen to need, and a little for the events
            sleep_ms = min(1.5 * host * stretch.calls + 0.1, LONGEST_SLEEP_MS)
            stretch.sleep_cycles = int(sleep_ms * _cycles_per_ms())
        return stretch

    def run(self) -> tuple[float, float]:
        """Make the calls and return device and host time per call, in ms."""
        numbers = range(self.next_call, self.next_call + self.calls)
        self.next_call += self.calls
        if self.device.type != "cuda":
            start = time.perf_counter()
            for number in numbers:
                self.variant.call(number)
            elapsed = (time.perf_counter() - start) * 1e3 / self.calls
            return elapsed, elapsed
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if self.sleep_cycles:
            torch.cuda._sleep(self.sleep_cycles)
        before.record()
        start = time.perf_counter()
        for number in numbers:
            self.variant.call(number)
        host = (time.perf_counter() - start) * 1e3 / self.calls
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / self.calls, host


def _cycles_per_ms() -> float:
    """Return the clock rate by which `torch.cuda._sleep` counts."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 2_000_000
    torch.cuda.synchronize()
    before.record()
    torch.cuda._sleep(cycles)
    after.record()
    after.synchronize()
    return cycles / before.elapsed_time(after)


def _graph_ms(variant: Variant, calls: int, repeats: int) -> float:
    """Return the median time per call of `calls` calls captured together."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            variant.call(number)
    replay = _Stretch(
        Variant(name="replay", call=lambda _: graph.replay()),
        torch.device("cuda"),
        calls=1,
        sleep_cycles=0,
    )
    replay.run()
    return statistics.median(replay.run()[0] for _ in range(repeats)) / calls
