"""The calls to the CUDA driver, against a fake that keeps the documented rules."""

import ctypes
from contextlib import nullcontext

import pytest
from fake_driver import Body as Work
from fake_driver import CUgraphConditionalNodeType, FakeDriver, Graph, Result

from dbcache.graphs.cuda_driver import CudaDriver


class Flag:
    """An int32 with an address."""

    def __init__(self):
        self.cell = ctypes.c_int32(0)
        self.address = ctypes.addressof(self.cell)


def build(version=13000, bindings=(13, 0), *, full=True, cached=True):
    """Return a driver, a function that launches pre -> branch -> post, and what it did."""
    fake = FakeDriver(version, bindings)
    driver, flag, log = CudaDriver(fake, bindings), Flag(), []
    work = {
        name: fake.register(Work(lambda name=name: log.append(name)))
        for name in ("pre", "full", "cached", "post")
    }
    graph = driver.create_graph()
    after = [driver.add_child(graph, [], work["pre"])]
    bodies = (work["full"] if full else None, work["cached"] if cached else None)
    after = [driver.add_branch(graph, after, flag.address, *bodies)]
    driver.add_child(graph, after, work["post"])
    executable = driver.instantiate(graph)

    def launch(value):
        flag.cell.value = value
        log.clear()
        driver.launch(executable, 0)
        return list(log)

    return fake, launch


@pytest.mark.parametrize(
    ("version", "bindings"), [(13000, (13, 0)), (12080, (12, 8)), (12060, (12, 9))]
)
def test_the_flag_chooses_the_body(version, bindings):
    fake, launch = build(version, bindings)
    for value, name in ((0, "full"), (1, "cached"), (0, "full")):
        assert launch(value) == ["pre", name, "post"]
    names = [name for name, _ in fake.calls]
    conditionals = names.count("cuGraphAddNode")
    assert conditionals == (1 if version >= 12080 else 2)
    assert names.count("cuGraphConditionalHandleCreate") == conditionals
    assert fake.compiled == 1


@pytest.mark.parametrize("version", [12060, 13000])
@pytest.mark.parametrize("value", [0, 1])
def test_a_body_that_writes_over_the_flag_changes_nothing(version, value):
    fake, flag, ran = FakeDriver(version), Flag(), []
    driver = CudaDriver(fake, (13, 0))

    def body(name):
        def run():
            ran.append(name)
            flag.cell.value = 1 - flag.cell.value

        return fake.register(Work(run))

    graph = driver.create_graph()
    driver.add_branch(graph, [], flag.address, body("full"), body("cached"))
    executable = driver.instantiate(graph)
    flag.cell.value = value
    driver.launch(executable, 0)
    assert ran == [("full", "cached")[value]]


@pytest.mark.parametrize("version", [12060, 13000])
def test_no_body_stays_empty(version):
    _, launch = build(version, full=False)
    assert [launch(0), launch(1)] == [["pre", "post"], ["pre", "cached", "post"]]
    _, launch = build(version, cached=False)
    assert [launch(0), launch(1)] == [["pre", "full", "post"], ["pre", "post"]]


def test_a_handle_is_made_before_its_node_and_has_a_default():
    fake, _ = build()
    names = [name for name, _ in fake.calls]
    assert names.index("cuGraphConditionalHandleCreate") < names.index("cuGraphAddKernelNode")
    assert names.index("cuGraphAddKernelNode") < names.index("cuGraphAddNode")
    (handle,) = (args for name, args in fake.calls if name == "cuGraphConditionalHandleCreate")
    assert handle[2:] == (0, 1)  # 0, the full body, at every launch


def test_graphs_with_branches_are_instantiated_once_and_are_no_children():
    fake = FakeDriver()
    driver = CudaDriver(fake, (13, 0))
    graph = driver.create_graph()
    driver.add_branch(graph, [], Flag().address, None, None)
    driver.instantiate(graph)
    with pytest.raises(RuntimeError, match="cuGraphInstantiateWithParams"):
        driver.instantiate(graph)
    with pytest.raises(RuntimeError, match="cuGraphAddChildGraphNode must succeed, got CUDA_ERROR"):
        driver.add_child(driver.create_graph(), [], graph)


@pytest.mark.parametrize("kind", ["HOST", "MEM_ALLOC", "WAIT_EVENT"])
def test_bodies_with_forbidden_nodes_are_refused_by_name(kind):
    fake = FakeDriver()
    driver = CudaDriver(fake, (13, 0))
    inner = Work(lambda: None, kind)
    outer = Graph()
    address = fake.register(outer)
    driver.add_child(address, [], fake.register(inner))
    with pytest.raises(RuntimeError, match=f"blocks: a branch .* got {kind} nodes.*'host'"):
        driver.check_body(address, "blocks")


@pytest.mark.parametrize(
    ("version", "bindings", "reason"),
    [
        (12040, (13, 0), "driver must support CUDA 12.6 or later, got 12040"),
        (13000, (12, 6), "cuda-bindings must be 12.8 or later, got 12.6"),
        (12060, (12, 8), None),
    ],
)
def test_says_why_branches_are_impossible(version, bindings, reason):
    with pytest.raises(RuntimeError, match=reason) if reason else nullcontext():
        CudaDriver(FakeDriver(version, bindings), bindings)


def test_the_fake_refuses_what_the_driver_refuses():
    fake = FakeDriver(12060)
    driver = CudaDriver(fake, (13, 0))
    graph = driver.create_graph()
    handle, *_ = driver._handles(graph).values()
    with pytest.raises(RuntimeError, match=Result.CUDA_ERROR_INVALID_VALUE.name):
        driver._add_if(graph, [], handle, bodies=2)  # ELSE is from 12.8 on
    driver._add_if(graph, [], handle, bodies=1)
    with pytest.raises(RuntimeError, match=Result.CUDA_ERROR_INVALID_VALUE.name):
        driver._add_if(graph, [], handle, bodies=1)  # one node per handle
    with pytest.raises(RuntimeError, match="NOT_SUPPORTED"):
        driver.instantiate(graph)  # its body is empty
    assert CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF == 0


def test_destroy_frees_the_graph_and_what_was_made_of_it():
    fake = FakeDriver()
    driver = CudaDriver(fake, (13, 0))
    graph = driver.create_graph()
    driver.add_branch(graph, [], Flag().address, None, None)
    executable = driver.instantiate(graph)
    driver.destroy(graph, executable)
    assert fake.destroyed == [executable, graph]
    driver.destroy(None, None)
    assert fake.destroyed == [executable, graph]


def capturing(version=13000, bindings=(13, 0)):
    """Return a driver whose stream 0 is captured, and the graph that it is captured into."""
    fake = FakeDriver(version, bindings)
    graph = Graph()
    fake.captures[0] = (fake.register(graph), [])
    return CudaDriver(fake, bindings), fake, graph


@pytest.mark.parametrize("version", [12060, 13000])
def test_bodies_in_a_capture_are_not_left_empty_and_come_one_after_the_other(version):
    driver, fake, graph = capturing(version, (12, 9))
    flag = Flag()
    for _ in range(2):
        for body in driver.branch_capture(0, flag.address):
            driver.begin_body(1, body)
            driver.end_body(1, "blocks")
    for value in (0, 1):
        flag.cell.value = value
        fake.conditions = dict(graph.handles)
        fake.run(graph)  # with rules of its own: no empty bodies, nothing at once
    assert len(graph.nodes) == 2 * (2 if version >= 12080 else 4)


@pytest.mark.parametrize("kind", ["HOST", "MEM_ALLOC", "WAIT_EVENT"])
def test_forbidden_nodes_in_a_captured_body_are_refused(kind):
    driver, fake, _ = capturing()
    full, _ = driver.branch_capture(0, Flag().address)
    driver.begin_body(1, full)
    fake.graphs[full].nodes += Work(lambda: None, kind).nodes
    with pytest.raises(RuntimeError, match=f"blocks: a branch .* got {kind} nodes"):
        driver.end_body(1, "blocks")


def test_a_stream_that_is_not_captured_gets_no_branch():
    driver, _, _ = capturing()
    with pytest.raises(RuntimeError, match="the stream must be capturing, got capture status 0"):
        driver.branch_capture(1, Flag().address)


def test_the_mode_of_capturing_is_as_it_was_after_a_stream_was_made_and_a_kernel_loaded():
    driver, fake, _ = capturing()
    for mode in (0, 1):
        fake.mode = mode
        driver.create_stream()
        driver.setter()
        assert fake.mode == mode
    assert fake.compiled == 1
