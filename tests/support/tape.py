"""A recorder for the CPU: tapes of the operators that ran, which behave as CUDA graphs do.

What is recorded is not done: writes to tensors from before the recording are undone at its end. A
replay does the operators again and writes their results into the tensors of the recording. Reading
a value on the host during a recording fails, as it does on a GPU.
"""

import contextlib
import importlib
import pkgutil
from types import SimpleNamespace
from unittest import mock

import torch
from fake_driver import NODE, Body, Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode

from dbcache import kernels
from dbcache.graphs import cuda_capture, graph
from dbcache.graphs.cuda_driver import CudaDriver

OPS = [
    module
    for info in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
    if not info.name.startswith("_")
    and hasattr(module := importlib.import_module(info.name), "is_traced")
]
"""The modules of the kernels that are operators."""

READS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"}


def tensors(values):
    """Return the tensors among an operator's arguments or results, in order.

    They lie in tuples, lists and dicts alone; `tree_flatten` would take most of a capture's time.
    """
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return []
    return [x for value in values for x in tensors(value)]


def storages(values):
    return {x.untyped_storage()._cdata for x in tensors(values)}


class Tape:
    """Operators in the order in which they ran."""

    def __init__(self, driver=None):
        self.entries = []
        self.raw = None
        self.driver = driver
        self.replays = 0

    def replay(self):
        self.replays += 1
        with torch.no_grad():
            for op, args, kwargs, outputs in self.entries:
                results = op(*args, **kwargs)
                for old, new in zip(outputs, tensors(results), strict=True):
                    if old is not None:
                        old.copy_(new)

    def close(self):
        if self.driver is not None and self.entries:
            self.raw = self.driver.cu.register(Body(self.replay))


class TapeMode(TorchDispatchMode):
    """Writes down what runs, into `self.tape`."""

    def __init__(self):
        super().__init__()
        self.tape = None
        self.made = set()
        self.undo = {}

    @classmethod
    def ignore_compile_internals(cls):
        """Let compiled code run as such, and write down what it does."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.tape is None:
            return func(*args, **kwargs)
        if func._schema.name in READS:
            raise RuntimeError(f"{func._schema.name}: operation not permitted while capturing")
        if func._schema.is_mutable:
            self._remember(func, args, kwargs)
        before = storages((args, kwargs))
        results = func(*args, **kwargs)
        fresh = [None if storages(x) & before else x for x in tensors(results)]
        self.made |= storages([x for x in fresh if x is not None])
        if func._schema.is_mutable or any(x is not None for x in fresh):
            self.tape.entries.append((func, args, kwargs, fresh))
        return results

    def _remember(self, func, args, kwargs):
        """Keep what an operator is about to overwrite, if it is older than the recording."""
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for x in tensors(named.get(argument.name)):
                if not storages(x) & self.made:
                    key = (x.data_ptr(), x.shape, x.stride())
                    self.undo.setdefault(key, (x, x.detach().clone()))


@contextlib.contextmanager
def seen_ops():
    """Make the kernels go through their operators, where the mode sees them."""
    own = [module.is_traced for module in OPS]
    try:
        for module in OPS:
            module.is_traced = lambda x: True
        yield
    finally:
        for module, function in zip(OPS, own, strict=True):
            module.is_traced = function


class TapeRecorder:
    """What `CudaRecorder` is on a GPU."""

    def __init__(self, device, driver):
        self.device = device
        self.driver = driver
        self.mode = None
        self.is_closed = False

    @contextlib.contextmanager
    def capturing(self):
        self.mode = TapeMode()
        try:
            with seen_ops(), self.mode:
                yield
        finally:
            for x, old in self.mode.undo.values():
                x.copy_(old)

    def begin(self):
        self.mode.tape = Tape(self.driver)

    def end(self):
        tape, self.mode.tape = self.mode.tape, None
        tape.close()
        return tape

    def abort(self):
        self.mode.tape = None

    def close(self):
        self.is_closed = True

    def on_device(self):
        return contextlib.nullcontext() if self.driver is None else self.driver.cu.on_device()

    def current_stream(self):
        return 0

    def random_state(self):
        return torch.get_rng_state().tolist()

    def nbytes(self):
        return 0


STREAMS = {
    "current_stream": lambda device: SimpleNamespace(cuda_stream=0),
    "ExternalStream": lambda address, device: SimpleNamespace(cuda_stream=address),
    "stream": contextlib.nullcontext,
    "MemPool": object,
    "use_mem_pool": contextlib.nullcontext,
}
"""What `UserCapture` takes from `torch.cuda`, without streams and pools."""


class TapeCapture:
    """What ``torch.cuda.graph`` is on a GPU: captures stream 0 of a fake driver."""

    def __init__(self, driver):
        self.driver = driver
        self.graph = Graph()
        self.address = driver.register(self.graph)

    def __enter__(self):
        self.mode = TapeMode()
        self.mode.tape = Tape()
        self.driver.captures[0] = (self.address, [])
        self.driver.on_launch, self.driver.on_capture = self._flush, self._switch
        self.open = contextlib.ExitStack()
        self.open.enter_context(self.driver.on_device())
        self.open.enter_context(mock.patch.multiple(torch.cuda, **STREAMS))
        self.open.enter_context(seen_ops())
        self.open.enter_context(self.mode)
        return self

    def __exit__(self, *error):
        self.open.close()
        if error[0] is None:
            self._flush()
        self.mode.tape = None
        for x, old in self.mode.undo.values():
            x.copy_(old)
        self.driver.captures.pop(0, None)

    def _flush(self):
        """Put what ran on the stream so far into the graph."""
        tape, self.mode.tape = self.mode.tape, Tape()
        graph, after = self.driver.captures[0]
        if tape.entries:
            node = Node(NODE["KERNEL"], after, tape.replay)
            self.graph.nodes.append(node)
            self.driver.captures[0] = (graph, [node])

    def _switch(self, body):
        """A body begins, or ends where it is None."""
        if body is not None:
            self.body = self.driver.graphs[body]
        elif self.mode.tape.entries:
            self.body.nodes.append(Node(NODE["KERNEL"], [], self.mode.tape.replay))
        self.mode.tape = Tape()

    def replay(self):
        self.driver.conditions = dict(self.graph.handles)
        self.driver.run(self.graph)


def use_driver(monkeypatch, fake):
    """Record on the CPU with `fake`, or without a driver where it is None."""
    if fake is None:
        found = None, "the driver must support CUDA 12.6 or later, got 12040"
    else:
        try:
            found = CudaDriver(fake, fake.bindings), ""
        except RuntimeError as error:
            found = None, str(error)
        fake.is_current = False  # as where models lie on another GPU than the current one
    monkeypatch.setitem(cuda_capture.RECORDERS, "cpu", TapeRecorder)
    monkeypatch.setattr(graph, "find_driver", lambda: found)
    monkeypatch.setattr(cuda_capture, "find_driver", lambda: found)
