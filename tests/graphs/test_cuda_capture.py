"""What records on a GPU, with PyTorch's captures replaced by ones that keep its rules."""

import contextlib
import ctypes
import gc
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from fake_driver import Body, FakeDriver, Graph

from dbcache.graphs import cuda_capture
from dbcache.graphs.cuda_capture import CudaRecorder, UserCapture
from dbcache.graphs.cuda_driver import CudaDriver

DEVICE = torch.device("cuda", 1)


class FakeTorch:
    """`torch.cuda` as far as captures go: what is underway, and what a broken capture leaves."""

    def __init__(self, driver):
        self.driver = driver
        self.streams = ["default"]
        self.underway = []  # pools that the allocator files by
        self.uses = {}
        self.draws = False  # the generator believes that it is captured
        self.is_broken = False
        self.graphs = []
        self.cached = 0  # bytes that the allocator holds on to for nobody

    def empty_cache(self):
        assert not self.underway, "captures_underway.empty()"
        self.cached = 0

    def stream(self, stream):
        return self._within(stream)

    @contextlib.contextmanager
    def _within(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def use(self, pool):
        self.uses[pool] = self.uses.get(pool, 0) + 1

    def end_allocate(self, device, pool):
        assert device == DEVICE.index
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device, pool):
        self.uses[pool] -= 1


def graph_class(fake):
    class CUDAGraph:
        def __init__(self, keep_graph=False):
            self.keeps, self.is_whole, self.launches = keep_graph, False, []
            self.is_over = False
            fake.graphs.append(self)

        def capture_begin(self, pool=None, capture_error_mode="global"):
            assert fake.streams[-1] != "default"
            assert capture_error_mode == "thread_local"
            self.pool = pool or (len(fake.graphs), 0)
            assert self.pool not in fake.underway, "already recording to mempool_id"
            self.stream = fake.streams[-1]
            fake.underway.append(self.pool)
            fake.use(self.pool)
            fake.draws = True

        def capture_end(self):
            assert fake.streams[-1] == self.stream
            if self.is_over:
                raise RuntimeError("the stream is not capturing")
            self.is_over = True
            if fake.is_broken:
                fake.is_broken = False
                raise RuntimeError("operation failed due to a previous error during capture")
            fake.end_allocate(DEVICE.index, self.pool)
            fake.draws = False
            self.is_whole = True
            warnings.warn("The CUDA Graph is empty.", stacklevel=2)

        def raw_cuda_graph(self):
            assert self.keeps
            assert self.is_whole
            return fake.driver.register(Body(lambda: None))

        def replay(self):
            self.launches.append("replay")

        def reset(self):
            self.launches.append("reset")

    return CUDAGraph


@pytest.fixture
def fake(monkeypatch):
    fake = FakeTorch(FakeDriver())
    current = SimpleNamespace(synchronize=lambda: None, cuda_stream=5)
    for name, value in {
        "CUDAGraph": graph_class(fake),
        "stream": fake.stream,
        "device": lambda device: fake.driver.on_device(),
        "synchronize": lambda device: None,
        "empty_cache": fake.empty_cache,
        "graph_pool_handle": lambda: (0, 7),
        "current_stream": lambda device: current,
        "ExternalStream": lambda address, device: SimpleNamespace(cuda_stream=address),
        "Stream": lambda device: f"stream of {device}",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", fake.release, raising=False)
    monkeypatch.setattr(cuda_capture, "_idle_streams", defaultdict(list))
    monkeypatch.setattr(cuda_capture, "_broken_graphs", [])
    return fake


def recorder_of(fake):
    return CudaRecorder(DEVICE, CudaDriver(fake.driver, (13, 0)))


def test_segments_share_a_pool_and_a_stream_of_their_own(fake):
    recorder = recorder_of(fake)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with recorder.capturing():
            assert not gc.isenabled()
            for _ in range(3):
                recorder.begin()
                recorder.end()
    assert gc.isenabled()
    assert {graph.pool for graph in fake.graphs} == {(0, 7)}
    assert all(graph.stream is recorder.stream for graph in fake.graphs)
    assert fake.streams == ["default"]


def test_what_eager_steps_left_in_memory_is_given_back_before_a_capture(fake):
    """It would be held twice: a capture allocates from a pool of its own."""

    class Cycle:
        def __init__(self):
            self.me = self

        def __del__(self):
            fake.cached += 2**20  # a tensor that only the garbage collector frees
            freed.append(self)

    recorder, freed = recorder_of(fake), []
    fake.cached = 2**30
    Cycle()
    with recorder.capturing():
        assert freed
        assert fake.cached == 0
        recorder.begin()
        recorder.end()


def test_collecting_garbage_stays_off_where_it_was_off(fake):
    gc.disable()
    try:
        with recorder_of(fake).capturing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_segment_is_launched_and_an_empty_one_never(fake):
    recorder = recorder_of(fake)
    with recorder.capturing():
        recorder.begin()
        segment = recorder.end()
    segment.replay()
    segment.replay()
    assert segment.graph.launches == ["replay", "replay"]
    fake.driver.graphs[segment.raw].nodes.clear()
    empty = cuda_capture.CudaSegment(
        SimpleNamespace(raw_cuda_graph=lambda: segment.raw), recorder.driver
    )
    assert empty.raw is None
    empty.replay()


@pytest.mark.parametrize(
    ("is_broken", "is_found_at_the_end"), [(False, False), (True, False), (True, True)]
)
def test_a_capture_that_is_left_off_leaves_nothing_underway(fake, is_broken, is_found_at_the_end):
    """A broken one, as by `.item()`, is ended by nobody but PyTorch's allocator and generator."""
    recorder = recorder_of(fake)
    with recorder.capturing():
        recorder.begin()
        recorder.end()
        recorder.begin()
        fake.is_broken = is_broken
        if is_found_at_the_end:
            with pytest.raises(RuntimeError, match="previous error during capture"):
                recorder.end()
        recorder.abort()
        recorder.abort()
    assert fake.underway == []  # else `torch.cuda.empty_cache` fails
    assert not fake.draws  # else `torch.randn` does
    assert fake.uses[0, 7] == (1 if is_broken else 2)  # whole graphs release it with themselves
    assert len(cuda_capture._broken_graphs) == is_broken
    assert gc.isenabled()


@pytest.mark.parametrize("keeps", [False, True])
def test_streams_serve_again_where_their_workspaces_stay(fake, monkeypatch, keeps):
    monkeypatch.setattr(cuda_capture, "KEEPS_WORKSPACES", keeps)
    first, second = recorder_of(fake), recorder_of(fake)
    assert first.stream is not second.stream
    first.close()
    third = recorder_of(fake)
    assert (third.stream is first.stream) is keeps
    assert recorder_of(fake).stream not in (second.stream, third.stream)


def test_memory_and_random_numbers_are_those_of_its_own_pool_and_device(fake, monkeypatch):
    sizes = [((0, 7), 3), ((0, 0), 5), ((0, 7), 4)]
    segments = [{"segment_pool_id": pool, "total_size": size} for pool, size in sizes]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [*segments, {"total_size": 9}])
    generators = [SimpleNamespace(get_offset=lambda n=n: n) for n in (20, 21)]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    recorder = recorder_of(fake)
    assert recorder.nbytes() == 3 + 4
    assert recorder.random_state() == 21


def test_without_a_driver_the_stream_is_one_of_pytorchs(fake):
    recorder = CudaRecorder(DEVICE, None)
    assert recorder.stream == "stream of cuda:1"
    with recorder.capturing():
        recorder.begin()
        assert recorder.end().raw is not None


def test_bodies_of_a_users_capture_have_a_stream_and_a_pool_that_all_share(fake, monkeypatch):
    """Another capture's tensors would come from the ordinary pool, and be given to others."""
    pools = []

    @contextlib.contextmanager
    def within(pool):
        pools.append(pool)
        yield
        pools.append(None)

    monkeypatch.setattr(torch.cuda, "MemPool", lambda: f"pool {len(pools)}")
    monkeypatch.setattr(torch.cuda, "use_mem_pool", within)
    driver = CudaDriver(fake.driver, (13, 0))
    graph = Graph()
    fake.driver.captures[5] = (fake.driver.register(graph), [])
    flag = SimpleNamespace(data_ptr=lambda: ctypes.addressof(cell))
    cell, counted, where = ctypes.c_int32(0), [], []
    decision = SimpleNamespace(flag=flag, count=lambda: counted.append(1))
    fake.driver.on_capture = lambda body: where.append((fake.streams[-1], [*pools][-1]))
    monkeypatch.setattr(cuda_capture, "find_driver", lambda: (driver, ""))
    capture = UserCapture(DEVICE)
    for _ in range(2):
        capture.begin_full(decision, "blocks")
        capture.begin_cached()
        capture.end_branch()
    assert counted == [1, 1]
    assert fake.streams == ["default"]
    assert pools == ["pool 0", None] * 4
    assert where == [(capture._stream, "pool 0")] * 8  # each body begins and ends there
    assert [node.kind.name.rpartition("_")[2] for node in graph.nodes] == [
        "KERNEL", "CONDITIONAL", "KERNEL", "CONDITIONAL",
    ]  # fmt: skip


def test_a_body_that_is_left_off_ends_its_capture(fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "MemPool", object)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda pool: contextlib.nullcontext())
    fake.driver.captures[5] = (fake.driver.register(Graph()), [])
    cell = ctypes.c_int32(0)
    flag = SimpleNamespace(data_ptr=lambda: ctypes.addressof(cell))
    driver = CudaDriver(fake.driver, (13, 0))
    monkeypatch.setattr(cuda_capture, "find_driver", lambda: (driver, ""))
    capture = UserCapture(DEVICE)
    capture.begin_full(SimpleNamespace(flag=flag, count=lambda: None), "blocks")
    assert len(fake.driver.captures) == 2
    capture.abort()
    capture.abort()
    assert list(fake.driver.captures) == [5]
    assert fake.streams == ["default"]
