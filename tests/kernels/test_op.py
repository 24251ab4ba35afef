"""How ops are registered, and the constants that kernels read."""

import pytest
import torch
import triton.language as tl

from dbcache.kernels.common.constants import Constants
from dbcache.kernels.common.lane_state import LANE, TENSORS, LaneState
from dbcache.kernels.common.op import op


def test_a_launch_must_have_the_arguments_of_its_reference():
    def reference(x: torch.Tensor, scale: float) -> None:
        """Nothing."""

    with pytest.raises(TypeError, match=r"_f: the arguments must be those .*reference, x, scale"):

        @op(reference, like="x")
        def _f(scale, x):
            pass


def test_a_state_is_handed_to_the_registered_op_as_its_tensors():
    seen = []

    def reference(x: torch.Tensor, state: LaneState, n: int) -> None:
        seen.append((x, state.capacity, n))
        state.counters.fill_(n)

    @op(reference, like="state.counters", mutates=("counters",))
    def _test_op_of_a_state(x, state, n):
        raise AssertionError("the reference was asked for")

    x, state = torch.ones(2), LaneState.allocate(5, "cpu")
    _test_op_of_a_state("reference", x, state, 7)
    registered = torch.ops.dbcache.test_op_of_a_state.default
    names = [argument.name for argument in registered._schema.arguments]
    assert names == ["x", *TENSORS, "n", "impl"]
    assert [a.name for a in registered._schema.arguments if a.is_write] == ["counters"]
    registered(x, *state.tensors(), 8, "reference")
    assert [rest for _, *rest in seen] == [[5, 7], [5, 8]]
    assert state.counters.eq(8).all()


def test_constants_are_constexpr_by_name_and_their_values_are_in_the_cache_key():
    one = Constants({"STEP": 3, "SCALE": 0.5, "lower": 7, "NAME": "x"})
    assert isinstance(one.STEP, tl.constexpr)
    assert (one.STEP.value, one.SCALE.value) == (3, 0.5)
    for name in ("lower", "NAME", "MISSING"):
        with pytest.raises(AttributeError, match=name):
            getattr(one, name)
    # Triton's key has str of each global that is a constexpr
    assert str(one) != str(Constants({"STEP": 4, "SCALE": 0.5}))
    assert "TICKET=constexpr[17]" in str(LANE)
