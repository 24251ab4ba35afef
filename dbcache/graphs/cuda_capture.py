"""Segments as CUDA graphs: recorded one after another, on one stream and from one memory pool.

In one pool, what one segment freed the next may use: the two bodies of a branch share their memory,
and what follows takes it over. That holds because segments replay in the order of recording.

The stream belongs to the recordings alone. PyTorch keeps a cuBLAS workspace per stream, which then
comes from the pool. From PyTorch 2.12 on the end of any graph frees the workspace of its stream
(pytorch#193402), so that recordings are only given up together with their stream. Before, it is
never freed (32 MiB on Hopper): there the next recorder goes on with the stream.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from dbcache.graphs.cuda_driver import CudaDriver, find_driver
from dbcache.lanes.decision import Decision

KEEPS_WORKSPACES = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)
"""Whether PyTorch keeps the workspace of a stream for good."""

_idle_streams: defaultdict[torch.device, list[Any]] = defaultdict(list)
"""Streams of recorders that are closed, where workspaces are kept."""

_broken_graphs: list[Any] = []
"""Graphs whose capture failed: the allocator of pinned memory goes on to ask them."""


class CudaSegment:
    """One CUDA graph.

    Args:
        graph: recorded with ``keep_graph=True``.
        driver: tells whether the graph is empty; None without one, and then it is not asked.
    """

    def __init__(self, graph: Any, driver: CudaDriver | None) -> None:
        self.graph = graph
        self.raw: int | None = int(graph.raw_cuda_graph())
        if driver is not None and not driver.node_types(self.raw):
            self.raw = None

    def replay(self) -> None:
        """Launch the graph on the current stream; PyTorch makes it executable the first time."""
        if self.raw is not None:
            self.graph.replay()


class CudaRecorder:
    """Records on a GPU.

    Args:
        device: the GPU.
        driver: None where the driver's own calls are not to be used (ROCm).
    """

    def __init__(self, device: torch.device, driver: CudaDriver | None) -> None:
        self.device = device
        self.driver = driver
        with self.on_device():
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = self._find_stream()
        self._open: Any = None

    def _find_stream(self) -> Any:
        if _idle_streams[self.device]:
            return _idle_streams[self.device].pop()
        if self.driver is None:
            return torch.cuda.Stream(self.device)
        torch.cuda.current_stream(self.device).synchronize()
        return _new_stream(self.driver, self.device)

    def close(self) -> None:
        """Hand the stream on, where its workspace would stay for good; nothing records after."""
        if KEEPS_WORKSPACES:
            _idle_streams[self.device].append(self.stream)

    def on_device(self) -> Any:
        """Make the GPU the current one, which the driver's calls go to."""
        return torch.cuda.device(self.device)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Hold while segments are recorded: the device idle, nothing freed in between."""
        torch.cuda.synchronize(self.device)
        gc.collect()
        # what the trial left in the ordinary pool: a capture takes as much again for its own pool,
        # and while it is under way the allocator gives nothing back
        torch.cuda.empty_cache()
        collects = gc.isenabled()
        gc.disable()  # a finaliser that frees memory of the device would end the capture
        try:
            with torch.cuda.stream(self.stream), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*CUDA Graph is empty.*")
                yield
        finally:
            if collects:
                gc.enable()

    def begin(self) -> None:
        self._open = torch.cuda.CUDAGraph(keep_graph=True)
        self._open.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def end(self) -> CudaSegment:
        graph = self._open
        graph.capture_end()  # where it finds the capture broken, `abort` cleans up
        self._open = None
        return CudaSegment(graph, self.driver)

    def abort(self) -> None:
        graph, self._open = self._open, None
        if graph is None:
            return
        try:
            graph.capture_end()
        except RuntimeError:  # it says again that the capture was broken
            self._clean_up_after(graph)

    def _clean_up_after(self, graph: Any) -> None:
        """Do what PyTorch leaves undone where a capture was broken, as by `.item()`.

        Its `capture_end` then returns at once: allocator and generator of random numbers go on as
        if it were under way, and the next `torch.cuda.empty_cache` or `torch.randn` fails.
        """
        graph.reset()
        _broken_graphs.append(graph)
        index = self.device.index or 0
        with contextlib.suppress(RuntimeError):  # of a version that did it
            # as `torch.cuda.use_mem_pool` does
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
        whole = torch.cuda.CUDAGraph()  # a capture that ends well ends that of the generator, too
        whole.capture_begin(capture_error_mode="thread_local")
        whole.capture_end()

    def current_stream(self) -> int:
        """Return the address of the stream that work is launched on now."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def random_state(self) -> Any:
        """Return what changes when the step draws random numbers."""
        return torch.cuda.default_generators[self.device.index or 0].get_offset()

    def nbytes(self) -> int:
        """Bytes that the pool holds on to."""
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if s.get("segment_pool_id") == self.pool)


class UserCapture:
    """Adds branches to a capture that the user began, with `torch.cuda.graph`.

    A body is a capture of its own, on a stream of its own, into a graph that the driver made. The
    allocator files memory by capture; so bodies need a pool, or their tensors would come from the
    ordinary one and be given to others later. One pool serves all bodies, as they run in the order
    of their capture; it lives as long as this object.

    Args:
        device: the GPU whose current stream is capturing.
    """

    fixed_by_plan = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.driver: Any
        self.driver, self.why = find_driver()
        self._pool: Any = None
        self._stream: Any = None
        self._body = contextlib.ExitStack()
        self._cached: Any = None
        self._name = ""

    def begin_full(self, decision: Decision, name: str) -> None:
        """Put a branch into the user's graph; what follows belongs to its full body.

        Raises:
            RuntimeError: branches are impossible here.
        """
        if self.driver is None:
            raise RuntimeError(
                f"{name}: a step that is decided while it runs must be a branch in the graph, "
                f"which is impossible here: {self.why}. Capture steps that the plan fixes "
                f"(steps_computation_mask with steps_computation_policy='static', and no "
                f"Bn_compute_blocks_ids), or enable with cuda_graph='host' and capture nothing"
            )
        if self._stream is None:
            self._stream = _new_stream(self.driver, self.device)
            self._pool = torch.cuda.MemPool()
        self._name = name
        outer = torch.cuda.current_stream(self.device).cuda_stream
        full, self._cached = self.driver.branch_capture(outer, decision.flag.data_ptr())
        self._begin_body(full)
        decision.count()

    def begin_cached(self) -> None:
        self.end_branch()
        self._begin_body(self._cached)

    def end_branch(self) -> None:
        self._body.close()

    def _begin_body(self, body: Any) -> None:
        with contextlib.ExitStack() as entered:
            entered.enter_context(torch.cuda.stream(self._stream))
            entered.enter_context(torch.cuda.use_mem_pool(self._pool))
            self.driver.begin_body(self._stream.cuda_stream, body)
            entered.callback(self.driver.end_body, self._stream.cuda_stream, self._name)
            self._body = entered.pop_all()

    def abort(self) -> None:
        """Leave off after an exception."""
        with contextlib.suppress(RuntimeError):
            self._body.close()


def _new_stream(driver: CudaDriver, device: torch.device) -> Any:
    """Return a stream that nothing else has: PyTorch hands its 32 ones out in turn."""
    return torch.cuda.ExternalStream(driver.create_stream(), device=device)


RECORDERS: dict[str, Any] = {"cuda": CudaRecorder}
"""What records, by type of device."""
