"""What the host reads of a GPU: one copy into memory that is made once."""

import torch

from dbcache.lanes.buffers import HostCopy


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
