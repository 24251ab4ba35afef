"""What makes recordings of a module void, and what does not."""

import copy

import pytest
import torch

from dbcache.graphs.fingerprint import fingerprint


class Processor:
    scale = 1.0


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))
        self.processor = Processor()
        self.scaling = {"style": 1.0}
        self.drop = torch.nn.Dropout(0.1)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Attention() for _ in range(2))


def replace_weight(part):
    part.linear.weight = torch.nn.Parameter(part.linear.weight * 1)


def move_weight(part):
    part.linear.weight.data = part.linear.weight.data.clone()


def view_weight_as_another_type(part):
    part.linear.weight.data = part.linear.weight.data.view(torch.int32).view(torch.float32)
    part.table.data = part.table.data.view(torch.int32)


def replace_buffer(part):
    part.table = torch.ones(4)


def exchange_module(part):
    part.drop = torch.nn.Dropout(0.1)


def exchange_processor(part):
    part.processor = copy.copy(part.processor)


VOID = {
    "a weight is replaced": replace_weight,
    "a weight lies elsewhere": move_weight,
    "another dtype at the same address": view_weight_as_another_type,
    "a buffer is replaced": replace_buffer,
    "a module is exchanged": exchange_module,
    "a module is added": lambda part: part.add_module("lora", torch.nn.Dropout()),
    "a processor is exchanged": exchange_processor,
    "a processor is set": lambda part: setattr(part.processor, "scale", 0.5),
    "a backend is set": lambda part: setattr(part.processor, "_attention_backend", "native"),
    "an adapter is scaled": lambda part: part.scaling.update(style=0.5),
    "dropout is switched": lambda part: part.drop.train(False),
    "a hook comes": lambda part: part.register_forward_hook(lambda *_: None),
    "a hook before comes": lambda part: part.register_forward_pre_hook(lambda *_: None),
}
HOLD = {
    "weights change in place": lambda part: part.linear.weight.data.mul_(2),
    "buffers change in place": lambda part: part.table.zero_(),
    "another attribute is set": lambda part: setattr(part, "note", "read"),
}


@pytest.mark.parametrize("change", VOID)
def test_recordings_are_void_where(change):
    model = Model()
    before = fingerprint(model)
    VOID[change](model.blocks[1])
    assert fingerprint(model) != before


@pytest.mark.parametrize("change", HOLD)
def test_recordings_hold_where(change):
    model = Model()
    before = fingerprint(model)
    HOLD[change](model.blocks[1])
    assert fingerprint(model) == before
