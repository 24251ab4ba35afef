"""The few calls of the CUDA driver that put a branch into a CUDA graph, and nothing else.

PyTorch records graphs, but cannot branch in them on all versions that are supported here; so the
branches are made with the driver's conditional nodes, through `cuda-bindings`, which CUDA builds of
PyTorch bring along. One branch is

    kernel: condition := flag  ->  IF/ELSE node { flag: cached body | else: full body }

with IF/ELSE nodes from driver 12.8 on, and with two IF nodes on 12.6 and 12.7. The condition is set
by a kernel of one thread, in PTX that the driver compiles: `cudaGraphSetConditional` is resolved by
the driver itself.

Rules that are kept here (CUDA programming guide, "Conditional graph nodes"; cuda.h): a handle
serves one node and is made before it; its default is assigned at every launch; a graph that has
conditional nodes is never a child, is never cloned, and is instantiated once; bodies hold kernels,
copies, memsets, empty nodes and child graphs only; no body stays empty, on which drivers before
12.8 hang.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

IF_ELSE = 12080
"""Driver version from which an IF node may have an ELSE body."""

IF_ONLY = 12060
"""Driver version from which IF nodes take cooperative kernels in their bodies."""

ALLOWED_IN_BODY = {"KERNEL", "MEMCPY", "MEMSET", "EMPTY", "GRAPH", "CONDITIONAL"}

ASSIGN_DEFAULT = 1  # CU_GRAPH_COND_ASSIGN_DEFAULT
USE_NODE_PRIORITY = 8  # CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
SET_DEPENDENCIES = 1  # CU_STREAM_SET_CAPTURE_DEPENDENCIES
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
CAPTURE_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE

PTX = """
.version 7.0
.target sm_70
.address_size 64

.extern .func cudaGraphSetConditional(.param .b64 handle, .param .b32 value);

.visible .entry set_condition(.param .u64 p_handle, .param .u64 p_flag, .param .u32 p_equal)
{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [p_handle];
    ld.param.u64 %rd2, [p_flag];
    ld.param.u32 %r2, [p_equal];
    cvta.to.global.u64 %rd3, %rd2;
    ld.volatile.global.u32 %r1, [%rd3];
    setp.eq.u32 %p1, %r1, %r2;
    selp.u32 %r3, 1, 0, %p1;
    {
    .param .b64 a0;
    .param .b32 a1;
    st.param.b64 [a0+0], %rd1;
    st.param.b32 [a1+0], %r3;
    call.uni cudaGraphSetConditional, (a0, a1);
    }
    ret;
}
"""
"""set_condition(handle, flag, equal): the condition becomes ``*flag == equal``."""


class CudaDriver:
    """Conditional nodes through `cuda.bindings.driver`.

    Args:
        bindings: the module `cuda.bindings.driver`, or one that behaves like it.
        version: version of the package `cuda-bindings`, as in ``(13, 0)``.

    Raises:
        RuntimeError: branches are impossible here; the error says why.
    """

    def __init__(self, bindings: Any, version: tuple[int, int]) -> None:
        self.cu = bindings
        self.version = version
        self.driver_version = int(self.call("cuDriverGetVersion"))
        self._setters: dict[int, Any] = {}
        if version < (12, 8):
            found = ".".join(map(str, version))
            raise RuntimeError(f"cuda-bindings must be 12.8 or later, got {found}")
        if self.driver_version < IF_ONLY:
            raise RuntimeError(
                f"the driver must support CUDA 12.6 or later, got {self.driver_version}"
            )

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the driver.

        Raises:
            RuntimeError: it failed; the error names the function and what the driver said, or
                that this version of cuda-bindings has no such function or takes other arguments.
        """
        try:
            error, *results = getattr(self.cu, name)(*args)
        except (AttributeError, TypeError) as unknown:
            version = ".".join(map(str, self.version))
            raise RuntimeError(
                f"{name} must be a function of cuda-bindings with these arguments, got version "
                f"{version}, which says: {unknown}"
            ) from unknown
        if int(error) != 0:
            raise RuntimeError(f"{name} must succeed, got {getattr(error, 'name', error)}")
        return results[0] if len(results) == 1 else tuple(results)

    # graphs

    def create_graph(self) -> Any:
        """Return a new, empty graph."""
        return self.call("cuGraphCreate", 0)

    def add_child(self, graph: Any, after: list[Any], child: int) -> Any:
        """Append a copy of the graph at address `child` (a `cudaGraph_t`); return its node."""
        child = self.cu.CUgraph(child)
        return self.call("cuGraphAddChildGraphNode", graph, after, len(after), child)

    def add_branch(
        self, graph: Any, after: list[Any], flag: int, full: int | None, cached: int | None
    ) -> Any:
        """Append ``cached if *flag else full``; return the last node.

        Args:
            graph: the graph to append to.
            after: the nodes that come before.
            flag: address of the flag, an int32 of 0 or 1 on the device.
            full: address of the graph to run where the flag is 0; None for nothing.
            cached: the same for 1.
        """
        handles = self._handles(graph)
        for equal, handle in handles.items():
            after = [self._add_setter(graph, after, handle, flag, equal=equal)]
        node, bodies = self._add_ifs(graph, after, handles)
        for body, child in zip(bodies, (full, cached), strict=True):
            if child is None:
                self.call("cuGraphAddEmptyNode", body, [], 0)
            else:
                self.add_child(body, [], child)
        return node

    def _handles(self, graph: Any) -> dict[int, Any]:
        """Return new conditions, by the flag that sets them: one for an IF/ELSE node, else two.

        Both of two are set before the first body, which writes where the next decision will be.
        """
        context = self.call("cuCtxGetCurrent")
        new = ("cuGraphConditionalHandleCreate", graph, context, 0, ASSIGN_DEFAULT)
        flags = (1,) if self.driver_version >= IF_ELSE else (0, 1)
        return {equal: self.call(*new) for equal in flags}

    def _add_ifs(
        self, graph: Any, after: list[Any], handles: dict[int, Any]
    ) -> tuple[Any, tuple[Any, Any]]:
        """Append one IF/ELSE node or two IF nodes; return the last and (full, cached)."""
        if len(handles) == 1:
            node, (cached, full) = self._add_if(graph, after, handles[1], bodies=2)
        else:
            node, (full,) = self._add_if(graph, after, handles[0], bodies=1)
            node, (cached,) = self._add_if(graph, [node], handles[1], bodies=1)
        return node, (full, cached)

    def _add_setter(self, graph: Any, after: list[Any], handle: Any, flag: int, equal: int) -> Any:
        arguments = _Arguments(handle, flag, equal)
        params = self.cu.CUDA_KERNEL_NODE_PARAMS()
        params.func = self.setter()
        params.gridDimX = params.gridDimY = params.gridDimZ = 1
        params.blockDimX = params.blockDimY = params.blockDimZ = 1
        params.sharedMemBytes = 0
        params.kernelParams = arguments.address
        # the driver copies the arguments before it returns
        return self.call("cuGraphAddKernelNode", graph, after, len(after), params)

    def _add_if(
        self, graph: Any, after: list[Any], handle: Any, bodies: int
    ) -> tuple[Any, list[Any]]:
        params = self.cu.CUgraphNodeParams()
        params.type = self.cu.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        params.conditional.handle = handle
        params.conditional.type = self.cu.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF
        params.conditional.size = bodies
        params.conditional.ctx = self.call("cuCtxGetCurrent")
        # bindings 13 takes the data of the edges, too
        edges = [None] if self.version >= (13, 0) else []
        node = self.call("cuGraphAddNode", graph, after, *edges, len(after), params)
        return node, [self.cu.CUgraph(int(g)) for g in params.conditional.phGraph_out[:bodies]]

    def setter(self) -> Any:
        """Return the kernel that sets a condition, compiled for the current context."""
        context = int(self.call("cuCtxGetCurrent"))
        if context not in self._setters:
            source = ctypes.create_string_buffer(PTX.encode())
            with self._relaxed():
                module = self.call("cuModuleLoadData", ctypes.addressof(source))
            self._setters[context] = self.call("cuModuleGetFunction", module, b"set_condition")
        return self._setters[context]

    def instantiate(self, graph: Any) -> Any:
        """Return the graph made executable. Once per graph."""
        params = self.cu.CUDA_GRAPH_INSTANTIATE_PARAMS()
        params.flags = USE_NODE_PRIORITY
        return self.call("cuGraphInstantiateWithParams", graph, params)

    def launch(self, executable: Any, stream: int) -> None:
        """Run an executable graph on the stream at address `stream`."""
        self.call("cuGraphLaunch", executable, self.cu.CUstream(stream))

    def destroy(self, graph: Any, executable: Any) -> None:
        """Free a graph and what was made of it; None for what does not exist."""
        if executable is not None:
            self.call("cuGraphExecDestroy", executable)
        if graph is not None:
            self.call("cuGraphDestroy", graph)

    def node_types(self, address: int) -> set[str]:
        """Return the types of a graph's nodes, and of its children's, as in ``{"KERNEL"}``."""
        graph, found = self.cu.CUgraph(address), set()
        _, count = self.call("cuGraphGetNodes", graph, 0)
        nodes = self.call("cuGraphGetNodes", graph, count)[0][:count] if count else []
        for node in nodes:
            kind = self.call("cuGraphNodeGetType", node).name.removeprefix("CU_GRAPH_NODE_TYPE_")
            found.add(kind)
            if kind == "GRAPH":
                found |= self.node_types(int(self.call("cuGraphChildGraphNodeGetGraph", node)))
        return found

    def check_body(self, address: int, who: str) -> bool:
        """Say whether a graph has any nodes at all.

        Raises:
            RuntimeError: it has some that may not be in a body.
        """
        types = self.node_types(address)
        forbidden = sorted(types - ALLOWED_IN_BODY)
        if forbidden:
            raise RuntimeError(
                f"{who}: a branch of a CUDA graph must consist of kernels, copies and memsets, got "
                f"{', '.join(forbidden)} nodes (HOST: a host callback; MEM_ALLOC: cudaMallocAsync; "
                f"WAIT_EVENT: NCCL); choose cuda_graph='host'"
            )
        return bool(types)

    # branches inside a capture that is under way

    def branch_capture(self, stream: int, flag: int) -> tuple[Any, Any]:
        """Append the nodes of a branch to what `stream` captures; return bodies (full, cached).

        Raises:
            RuntimeError: the stream is not capturing.
        """
        captured = self.cu.CUstream(stream)
        sizes = (1, 1, 1, 1, 1, 1, 0)  # of grid, block and shared memory
        handles = self._handles(self._captured(captured)[0])
        for equal, handle in handles.items():
            # a captured launch comes after all that was captured so far
            given = _Arguments(handle, flag, equal)
            self.call("cuLaunchKernel", self.setter(), *sizes, captured, given.address, 0)
        graph, after = self._captured(captured)
        node, bodies = self._add_ifs(graph, after, handles)
        update = "cuStreamUpdateCaptureDependencies" + ("" if self.version >= (13, 0) else "_v2")
        self.call(update, captured, [node], None, 1, SET_DEPENDENCIES)
        return bodies

    def _captured(self, stream: Any) -> tuple[Any, list[Any]]:
        """Return the graph that `stream` captures and the nodes that come before the next one."""
        name = "cuStreamGetCaptureInfo" + ("" if self.version >= (13, 0) else "_v3")
        status, _, graph, after, *_ = self.call(name, stream)
        if int(status) != CAPTURE_ACTIVE:
            raise RuntimeError(f"the stream must be capturing, got capture status {status}")
        return graph, list(after)

    def begin_body(self, stream: int, body: Any) -> None:
        """Capture what comes on `stream` into a body."""
        stream, mode = self.cu.CUstream(stream), self.cu.CUstreamCaptureMode(THREAD_LOCAL)
        self.call("cuStreamBeginCaptureToGraph", stream, body, None, None, 0, mode)

    def end_body(self, stream: int, who: str) -> None:
        """End the capture into a body.

        Raises:
            RuntimeError: the body holds nodes that may not be in one.
        """
        body = self.call("cuStreamEndCapture", self.cu.CUstream(stream))
        if not self.check_body(int(body), who):
            self.call("cuGraphAddEmptyNode", body, [], 0)

    def create_stream(self) -> int:
        """Return the address of a new stream that does not wait for the default stream."""
        with self._relaxed():
            return int(self.call("cuStreamCreate", NON_BLOCKING))

    @contextmanager
    def _relaxed(self) -> Iterator[None]:
        """Allow what allocates memory, which while capturing would break the capture."""
        mode = self.cu.CUstreamCaptureMode(RELAXED)
        before = self.call("cuThreadExchangeStreamCaptureMode", mode)
        try:
            yield
        finally:
            self.call("cuThreadExchangeStreamCaptureMode", before)


class _Arguments:
    """Arguments of the setter, as the driver wants them: an array of pointers to values."""

    def __init__(self, handle: Any, flag: int, equal: int) -> None:
        self.values = (ctypes.c_uint64(int(handle)), ctypes.c_uint64(flag), ctypes.c_uint32(equal))
        self.pointers = (ctypes.c_void_p * 3)(*map(ctypes.addressof, self.values))
        self.address = ctypes.addressof(self.pointers)


@functools.cache  # its kernel is compiled once per device, and never unloaded
def find_driver() -> tuple[CudaDriver | None, str]:
    """Return the driver of this machine, or None and why branches in graphs are impossible."""
    try:
        from cuda.bindings import __version__, driver
    except ImportError as error:
        return None, f"cuda-bindings must be installed (pip install cuda-bindings), got: {error}"
    major, minor, *_ = __version__.split(".")
    try:
        return CudaDriver(driver, (int(major), int(minor))), ""
    except RuntimeError as error:
        return None, str(error)
