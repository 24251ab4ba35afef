"""Arguments of calls, taken apart and put together as `torch.utils._pytree` does it."""

from collections import namedtuple

import torch
from torch.utils._pytree import tree_flatten

from dbcache.graphs.arguments import flatten, unflatten

Size = namedtuple("Size", "height width")
CALLS = [
    ((), {}),
    ((torch.ones(2), None), {"scale": 1.0, "names": "a", "flag": True}),
    (
        (torch.nn.Parameter(torch.ones(1)), [torch.zeros(1), (2, {"deep": torch.ones(3)})]),
        {"empty": [], "size": Size(4, torch.ones(2)), "kind": torch.float16, "none": {"x": None}},
    ),
]


def test_leaves_are_pytrees_in_its_order_and_come_back():
    for args, kwargs in CALLS:
        leaves, structure = flatten(args, kwargs)
        assert all(x is y for x, y in zip(leaves, tree_flatten((args, kwargs))[0], strict=True))
        hash(structure)
        others = [f"leaf {i}" for i in range(len(leaves))]
        made = unflatten(others, structure)
        assert tree_flatten(made)[0] == others
        assert tree_flatten(made)[1] == tree_flatten((args, kwargs))[1]


def test_calls_of_other_forms_have_other_structures():
    x = torch.ones(2)
    calls = [
        ((x,), {}), ((), {"x": x}), (([x],), {}), (((x,),), {}), ((x, x), {}), ((x,), {"y": x}),
        (({"a": x},), {}), (({"b": x},), {}), (([x, x],), {}),
    ]  # fmt: skip
    assert len({flatten(*call)[1] for call in calls}) == len(calls)
