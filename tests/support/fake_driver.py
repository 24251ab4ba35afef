"""A CUDA driver that keeps the documented rules of conditional nodes, and runs on the CPU.

It stands in for the module `cuda.bindings.driver`. A graph that PyTorch would have recorded is a
`Body`, registered under an address. Rules from the CUDA programming guide ("Conditional graph
nodes") and cuda.h; whatever breaks one gets the error that the driver would give.
"""

import contextlib
import ctypes
from enum import IntEnum
from types import SimpleNamespace


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


class CUgraphNodeType(IntEnum):
    CU_GRAPH_NODE_TYPE_KERNEL = 0
    CU_GRAPH_NODE_TYPE_MEMCPY = 1
    CU_GRAPH_NODE_TYPE_MEMSET = 2
    CU_GRAPH_NODE_TYPE_HOST = 3
    CU_GRAPH_NODE_TYPE_GRAPH = 4
    CU_GRAPH_NODE_TYPE_EMPTY = 5
    CU_GRAPH_NODE_TYPE_WAIT_EVENT = 6
    CU_GRAPH_NODE_TYPE_MEM_ALLOC = 10
    CU_GRAPH_NODE_TYPE_CONDITIONAL = 13


GLOBAL, THREAD_LOCAL, RELAXED = range(3)  # modes of capturing
NODE = {kind.name.removeprefix("CU_GRAPH_NODE_TYPE_"): kind for kind in CUgraphNodeType}


class CUgraphConditionalNodeType(IntEnum):
    CU_GRAPH_COND_TYPE_IF = 0
    CU_GRAPH_COND_TYPE_WHILE = 1
    CU_GRAPH_COND_TYPE_SWITCH = 2


class Node:
    def __init__(self, kind, after, run=None, child=None, handle=None):
        self.kind, self.after, self.run, self.child, self.handle = kind, after, run, child, handle
        self.bodies = []


class Graph:
    """A graph: its nodes in the order in which they were added."""

    def __init__(self, owner=None):
        self.nodes = []
        self.handles = {}
        self.instantiated = False
        self.is_body = owner is not None
        self.owner = owner or self

    def types(self):
        found = set()
        for node in self.nodes:
            found.add(node.kind.name.removeprefix("CU_GRAPH_NODE_TYPE_"))
            for graph in [*node.bodies, *([node.child] if node.child else [])]:
                found |= graph.types()
        return found


class Body(Graph):
    """A graph that PyTorch recorded: `run` does its work, which has nodes of type `kind`."""

    def __init__(self, run, kind="KERNEL"):
        super().__init__()
        self.nodes.append(Node(NODE[kind], [], run))


class Fields(SimpleNamespace):
    """A struct of the driver."""


class FakeDriver:
    """The functions that `CudaDriver` calls.

    Args:
        version: of the driver, as in 12080.
        bindings: version of cuda-bindings, which decides about names and arguments.
    """

    CUgraphNodeType = CUgraphNodeType
    CUgraphConditionalNodeType = CUgraphConditionalNodeType

    def __init__(self, version=13000, bindings=(13, 0)):
        self.version = version
        self.bindings = bindings
        self.graphs = {}
        self.calls = []
        self.conditions = {}
        self.launches = 0
        self.captures = {}
        self.destroyed = []
        self.compiled = 0
        self.on_capture = lambda graph: None
        self.on_launch = lambda: None
        self.is_current = True
        self.mode = GLOBAL
        self._next = 100

    @contextlib.contextmanager
    def on_device(self):
        """Make the GPU the current one."""
        before, self.is_current = self.is_current, True
        try:
            yield
        finally:
            self.is_current = before

    def register(self, graph):
        """Give a graph an address."""
        self._next += 1
        self.graphs[self._next] = graph
        return self._next

    # types

    def CUgraph(self, address):
        return address

    def CUstream(self, address):
        return address

    def CUstreamCaptureMode(self, value):
        return value

    def CUDA_KERNEL_NODE_PARAMS(self):
        return Fields()

    def CUDA_GRAPH_INSTANTIATE_PARAMS(self):
        return Fields(flags=0)

    def CUgraphNodeParams(self):
        return Fields(type=None, conditional=Fields())

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)
        method = getattr(type(self), f"do_{name}", None)
        if method is None:
            raise AttributeError(f"{name} is not a function of this driver")

        def call(*args):
            self.calls.append((name, args))
            result = method(self, *args)
            if isinstance(result, Result):
                return (result,)
            result = result if isinstance(result, tuple) else (result,)
            return (Result.CUDA_SUCCESS, *result)

        return call

    # graphs

    def do_cuDriverGetVersion(self):
        return self.version

    def do_cuCtxGetCurrent(self):
        assert self.is_current, "another GPU is the current one: its context would be returned"
        return 7

    def do_cuGraphCreate(self, flags):
        return self.register(Graph())

    def do_cuGraphAddChildGraphNode(self, graph, after, count, child):
        child = self.graphs[child]
        if "CONDITIONAL" in child.types():
            return Result.CUDA_ERROR_NOT_SUPPORTED
        return self._add(graph, after, count, Node(NODE["GRAPH"], after, child=child))

    def do_cuGraphAddEmptyNode(self, graph, after, count):
        return self._add(graph, after, count, Node(NODE["EMPTY"], after, lambda: None))

    def do_cuGraphAddKernelNode(self, graph, after, count, params):
        sizes = (params.gridDimX, params.gridDimY, params.gridDimZ,
                 params.blockDimX, params.blockDimY, params.blockDimZ)  # fmt: skip
        if sizes != (1,) * 6 or params.func != "set_condition":
            return Result.CUDA_ERROR_INVALID_VALUE
        run = self._setter(params.kernelParams)
        return self._add(graph, after, count, Node(NODE["KERNEL"], after, run))

    def do_cuGraphConditionalHandleCreate(self, graph, context, default, flags):
        owner = self.graphs[graph].owner
        self._next += 1
        # without the flag the value is undefined at launch
        owner.handles[self._next] = default if flags == 1 else None
        return self._next

    def do_cuGraphAddNode(self, graph, after, *rest):
        edges, (count, params) = rest[:-2], rest[-2:]
        if len(edges) != (1 if self.bindings >= (13, 0) else 0):
            raise TypeError("cuGraphAddNode takes the data of edges from bindings 13 on")
        spec = params.conditional
        owner = self.graphs[graph].owner
        used = {n.handle for g in self.graphs.values() for n in g.nodes}
        if spec.handle not in owner.handles or spec.handle in used:
            return Result.CUDA_ERROR_INVALID_VALUE
        most = 2 if self.version >= 12080 else 1
        if spec.type != 0 or not 1 <= spec.size <= most:
            return Result.CUDA_ERROR_INVALID_VALUE
        node = Node(NODE["CONDITIONAL"], after, handle=spec.handle)
        node.bodies = [Graph(owner) for _ in range(spec.size)]
        spec.phGraph_out = [self.register(body) for body in node.bodies]
        return self._add(graph, after, count, node)

    def _add(self, graph, after, count, node):
        graph = self.graphs[graph]
        if count != len(after) or any(n not in graph.nodes for n in after):
            return Result.CUDA_ERROR_INVALID_VALUE
        if graph.owner.instantiated:
            return Result.CUDA_ERROR_NOT_SUPPORTED
        graph.nodes.append(node)
        return node

    def do_cuGraphGetNodes(self, graph, count):
        nodes = self.graphs[graph].nodes
        return (nodes[:count], len(nodes))

    def do_cuGraphNodeGetType(self, node):
        return node.kind

    def do_cuGraphChildGraphNodeGetGraph(self, node):
        return self.register(node.child)

    def do_cuGraphInstantiateWithParams(self, graph, params):
        graph = self.graphs[graph]
        handles = {n.handle for g in self._inside(graph) for n in g.nodes if n.handle}
        if graph.instantiated or handles != set(graph.handles):
            return Result.CUDA_ERROR_NOT_SUPPORTED
        for part in self._inside(graph):
            for node in part.nodes:
                for body in node.bodies:
                    allowed = {"KERNEL", "MEMCPY", "MEMSET", "EMPTY", "GRAPH", "CONDITIONAL"}
                    if not body.nodes or body.types() - allowed:
                        return Result.CUDA_ERROR_NOT_SUPPORTED
        graph.instantiated = True
        return self.register(Graph(graph))

    def _inside(self, graph):
        yield graph
        for node in graph.nodes:
            for body in node.bodies:
                yield from self._inside(body)

    def do_cuGraphLaunch(self, executable, stream):
        if not self.is_current:
            return Result.CUDA_ERROR_INVALID_VALUE
        self.launches += 1
        graph = self.graphs[executable].owner
        self.conditions = dict(graph.handles)
        self.run(graph)
        return ()

    def do_cuGraphExecDestroy(self, executable):
        self.destroyed.append(executable)
        return ()

    do_cuGraphDestroy = do_cuGraphExecDestroy

    def run(self, graph):
        """Do the work of a graph: nodes after those that they name, which came before."""
        done = []
        for node in graph.nodes:
            assert all(n in done for n in node.after)
            assert set(node.after) == set(done[-1:]), "nodes that do not wait run at once"
            if node.kind == NODE["CONDITIONAL"]:
                value = self.conditions[node.handle]
                assert value is not None, "the condition was never set and has no default"
                assert all(body.nodes for body in node.bodies), "drivers hang at an empty body"
                if value:
                    self.run(node.bodies[0])
                elif len(node.bodies) == 2:
                    self.run(node.bodies[1])
            elif node.child is not None:
                self.run(node.child)
            else:
                node.run()
            done.append(node)

    # kernels

    def do_cuModuleLoadData(self, address):
        if self.captures and self.mode != RELAXED:
            return Result.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        self.compiled += 1
        assert b"cudaGraphSetConditional" in ctypes.string_at(address)
        return "module"

    def do_cuModuleGetFunction(self, module, name):
        return name.decode()

    def _setter(self, address):
        """Return what the kernel does; the arguments are read now, as the driver does."""
        pointers = (ctypes.c_void_p * 3).from_address(address)
        handle = ctypes.c_uint64.from_address(pointers[0]).value
        flag = ctypes.c_uint64.from_address(pointers[1]).value
        equal = ctypes.c_uint32.from_address(pointers[2]).value

        def run():
            value = ctypes.c_int32.from_address(flag).value
            self.conditions[handle] = int(value == equal)

        return run

    # captures

    def do_cuThreadExchangeStreamCaptureMode(self, mode):
        before, self.mode = self.mode, mode
        return before

    def do_cuStreamCreate(self, flags):
        if self.captures and self.mode != RELAXED:
            return Result.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        self._next += 1
        return self._next

    def do_cuStreamGetCaptureInfo(self, stream):
        if stream not in self.captures:
            return (0, 0, None, [], [], 0)
        graph, after = self.captures[stream]
        return (1, 1, graph, after, [], len(after))

    def do_cuStreamGetCaptureInfo_v3(self, stream):
        self._check_has_older_names()
        return self.do_cuStreamGetCaptureInfo(stream)

    def _check_has_older_names(self):
        if self.bindings >= (13, 0):
            raise AttributeError("bindings have one name per function from 13 on")

    def do_cuLaunchKernel(self, kernel, *rest):
        stream, arguments, _ = rest[-3:]
        self.on_launch()
        graph, after = self.captures[stream]
        node = Node(NODE["KERNEL"], after, self._setter(arguments))
        self._add(graph, after, len(after), node)
        self.captures[stream] = (graph, [node])
        return ()

    def do_cuStreamUpdateCaptureDependencies(self, stream, nodes, *rest):
        if len(rest) != (3 if self.bindings >= (13, 0) else 2):  # edges, count, flag
            raise TypeError("takes the data of edges from bindings 13 on")
        return self._go_on_after(stream, nodes)

    def do_cuStreamUpdateCaptureDependencies_v2(self, stream, nodes, edges, count, flag):
        self._check_has_older_names()
        return self._go_on_after(stream, nodes)

    def _go_on_after(self, stream, nodes):
        graph, _ = self.captures[stream]
        self.captures[stream] = (graph, list(nodes))
        return ()

    def do_cuStreamBeginCaptureToGraph(self, stream, graph, after, edges, count, mode):
        if stream in self.captures:
            return Result.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        self.captures[stream] = (graph, [])
        self.on_capture(graph)
        return ()

    def do_cuStreamEndCapture(self, stream):
        graph, _ = self.captures.pop(stream)
        self.on_capture(None)
        return graph
