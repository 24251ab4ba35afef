"""Sums in a fixed order: the Triton functions add as the Python ones do, bit for bit."""

from math import inf, isnan, nan

import pytest
import torch
import triton
import triton.language as tl

from dbcache.kernels.common.sums import (
    divide,
    f32,
    lanes_of,
    relative_l1,
    tree_sum,
    tree_sum_lanes,
)


@triton.jit
def _tree_sum_kernel(x_ptr, out_ptr, LOG_LANES: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 1 << LOG_LANES))
    tl.store(out_ptr, tree_sum_lanes(x, LOG_LANES))


@triton.jit
def _lanes_of_kernel(out_ptr, program, per_program, i, LOG_BLOCK: tl.constexpr):
    lanes = lanes_of(program, per_program, i, LOG_BLOCK)
    tl.store(out_ptr + tl.arange(0, 1 << LOG_BLOCK), lanes)


@pytest.mark.parametrize("num_warps", [1, 2, 4, 8])
@pytest.mark.parametrize("log_lanes", [0, 1, 5, 11])
def test_lanes_are_added_as_on_the_host_with_any_number_of_warps(random, log_lanes, num_warps):
    x = random(1 << log_lanes).exp() ** 3
    out = torch.full((1,), nan, device=x.device)
    _tree_sum_kernel[(1,)](x, out, LOG_LANES=log_lanes, num_warps=num_warps)
    assert out.item() == tree_sum(x.tolist())


def test_f32_rounds_as_float32_does():
    for x in (0.1, 1 / 3, 1e-42, 1e300, -1e300, inf, 2.0**-150, 16777217.0):
        assert f32(x) == torch.tensor(x, dtype=torch.float64).float().item()
    assert isnan(f32(nan))


def test_relative_l1_sums_samples_and_partial_sums():
    first, second = [[1.0, 2.0], [2.0, 4.0], [0.0, 1.0]], [[3.0, 5.0], [0.0, 0.0], [0.0, 0.0]]
    assert relative_l1([first, second]) == 0.5


def test_a_tree_adds_neighbours_first():
    big = 2.0**24
    assert tree_sum([big, 1.0, 1.0, 1.0]) == big + 2  # big + 1 rounds to big
    assert tree_sum([1.0, 1.0, big, 1.0, 0.5]) == big + 2  # (2 + big) + 0.5
    assert tree_sum([3.0]) == 3.0


def test_the_change_of_a_batch_is_its_mean_or_its_largest():
    partials = [[[1.0, 2.0], [0.0, 2.0]], [[3.0, 2.0], [0.0, 2.0]], [[0.0, 8.0], [0.0, 0.0]]]
    assert relative_l1(partials) == 0.25
    assert relative_l1(partials, worst=True) == 0.75
    for at in range(3):
        with_nan = [list(sample) for sample in partials]
        with_nan[at] = [[nan, 1.0], [0.0, 1.0]]
        assert isnan(relative_l1(with_nan, worst=True))
    assert relative_l1([[[1.0, 0.0]], [[1.0, 4.0]]], worst=True) == inf
    assert isnan(relative_l1([[[0.0, 0.0]], [[1.0, 4.0]]], worst=True))


def test_important_tokens_count_alone_if_there_are_any():
    all_alike = [[[1.0, 2.0, 0.0, 0.0]], [[3.0, 2.0, 0.0, 0.0]]]
    assert (relative_l1(all_alike), relative_l1(all_alike, worst=True)) == (1.0, 1.5)
    one = [[[1.0, 2.0, 0.5, 0.25]], [[3.0, 2.0, 0.0, 0.0]]]
    assert (relative_l1(one), relative_l1(one, worst=True)) == (2.0, 2.0)
    assert isnan(relative_l1([[[1.0, 2.0, nan, 0.25]], [[3.0, 2.0, 0.0, 0.0]]]))


def test_division_is_that_of_floats():
    assert (divide(1.0, 4.0), divide(1.0, 0.0)) == (0.25, inf)
    assert isnan(divide(0.0, 0.0))
    assert isnan(divide(nan, 0.0))
    assert divide(1.0, 3.0) == torch.tensor(1.0).div(3).item()


@pytest.mark.parametrize("program", [0, 1023])
def test_elements_are_numbered_in_64_bits(device, program):
    """Of 2**35 elements, 16384 blocks of 2048 per program: past 2**31 from program 64 on."""
    out = torch.zeros(2048, dtype=torch.int64, device=device)
    _lanes_of_kernel[(1,)](out, program, 2**14, 2**14 - 1, LOG_BLOCK=11)
    first = (program * 2**14 + 2**14 - 1) * 2048
    assert out.tolist() == list(range(first, first + 2048))
