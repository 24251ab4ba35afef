"""What the host reads of a GPU: one copy into memory that is made once, in any mode."""

import threading

import torch

from dbcache.lanes.buffers import HostCopy, outside_inference_mode


class Event:
    """A `torch.cuda.Event` that says what was asked of it."""

    def __init__(self):
        self.calls = []

    def record(self, stream):
        self.calls.append(stream)

    def synchronize(self):
        self.calls.append("synchronize")


def test_memory_made_in_inference_mode_is_written_to_outside_of_it(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **how: empty(*shape, **how))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    copy, flags = HostCopy(), torch.tensor([1, 0, 1], dtype=torch.int32)
    with torch.inference_mode():
        first = copy.read(flags)
    assert first.tolist() == [1, 0, 1]
    flags[1] = 1
    with torch.no_grad():
        assert copy.read(flags) is first
    assert first.tolist() == [1, 1, 1]
    _, event = copy._held
    assert event.calls == ["stream of cpu", "synchronize"] * 2


@outside_inference_mode
def made_inside(then=lambda: None):
    """Return whether tensors are normal ones, before and after `then`."""
    return [not torch.empty(1).is_inference(), then(), not torch.empty(1).is_inference()]


def test_functions_outside_inference_mode_may_nest():
    with torch.inference_mode():
        assert made_inside(made_inside) == [True, [True, None, True], True]
        assert torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled()
    assert made_inside(made_inside) == [True, [True, None, True], True]


def test_functions_outside_inference_mode_leave_other_threads_alone():
    """Two threads are inside at once, and the first to enter leaves first."""
    entered, left, after = threading.Event(), threading.Event(), {}

    def second():
        with torch.no_grad():
            made_inside(lambda: (entered.set(), left.wait(60)))
            after["second"] = torch.is_inference_mode_enabled()

    thread = threading.Thread(target=second)
    with torch.inference_mode():
        made_inside(lambda: (thread.start(), entered.wait(60)))
        after["first"] = torch.is_inference_mode_enabled()
        left.set()
        thread.join()
    assert after == {"first": True, "second": False}


def test_outside_inference_mode_is_no_context_that_calls_would_share():
    assert not hasattr(outside_inference_mode, "__enter__")
