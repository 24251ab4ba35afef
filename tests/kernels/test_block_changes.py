import pytest
import torch

from dbcache.kernels.common.sums import MAX_PARTIALS, partition_of
from dbcache.kernels.pruning import block_changes as module
from dbcache.kernels.pruning.block_changes import block_changes
from dbcache.testing import assert_as_accurate

IMPLS = ["triton", "reference"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1), (2, 17, 5), (1, module.BLOCK - 1), (3, module.BLOCK + 1), (2, 2, 3, 7)]
STAMPS = {"one step": [4, 4, 4, 4], "each another": [1, 4, 2, 3], "a middle one": [4, 4, 2, 4]}


def sums_of(h, inputs, residuals, stamps):
    """Return the sums by the formula, in float64: the estimated input of each block is made."""
    h, inputs, residuals = h.double(), inputs.double(), residuals.double()
    sums = []
    for i, stamp in enumerate(stamps):
        if i == 0:
            expected = h
        elif stamp == stamps[i - 1]:
            expected = expected - inputs[i - 1] + inputs[i]
        else:
            expected = expected + residuals[i - 1]
        pair = [x.abs().flatten(1).sum(1) for x in (expected - inputs[i], inputs[i])]
        sums.append(torch.stack(pair, -1))
    return torch.stack(sums)


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stamps", STAMPS.values(), ids=STAMPS)
def test_sums_are_those_of_the_formula(random, device, shape, dtype, stamps, impl):
    h = random(*shape, dtype=dtype)
    inputs, residuals = random(4, *shape, dtype=dtype), random(4, *shape, dtype=dtype)
    # what need not be read may hold anything: the last residual, and those within one step
    for i in range(4):
        if i == 3 or stamps[i] == stamps[i + 1]:
            residuals[i] = float("nan")
    steps = torch.tensor(stamps, dtype=torch.int32, device=device)
    partials = block_changes(h, inputs, residuals, steps, impl=impl)
    expected = sums_of(h, inputs, residuals, stamps)
    assert partials.dtype == torch.float32
    assert partials.shape[:2] == (4, shape[0])
    assert_as_accurate(partials.sum(2), expected.float(), expected, tiny=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_input_differs_by_exactly_0(random, device, impl):
    shape = (2, 9, 33)
    x, added = random(3, *shape, dtype=torch.bfloat16), random(3, *shape, dtype=torch.bfloat16)
    stamps = torch.zeros(3, dtype=torch.int32, device=device)
    assert block_changes(x[0], x, added, stamps, impl=impl)[..., 0].eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_are_honoured(random, device, impl):
    h = random(2, 5, 9).transpose(1, 2)
    inputs, residuals = random(3, 2, 9, 5), random(3, 2, 9, 5)
    stamps = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    partials = block_changes(h, inputs, residuals, stamps, impl=impl)
    expected = block_changes(h.contiguous(), inputs, residuals, stamps, impl=impl)
    assert torch.equal(partials, expected)


def test_a_program_that_takes_several_parts_adds_them_up(random, device, monkeypatch):
    monkeypatch.setattr("dbcache.kernels.common.sums.MAX_PARTIALS", 2)
    shape = (2, 5 * module.BLOCK + 3)
    h, inputs, residuals = random(*shape), random(3, *shape), random(3, *shape)
    stamps = [1, 1, 2]
    steps = torch.tensor(stamps, dtype=torch.int32, device=device)
    partials = block_changes(h, inputs, residuals, steps, impl="triton")
    assert partials.shape == (3, 2, 2, 2)
    expected = sums_of(h, inputs, residuals, stamps)
    assert_as_accurate(partials.sum(2), expected.float(), expected, tiny=1e-5)


def test_nan_shows_from_its_block_on(random, device):
    h, inputs, residuals = random(1, 7), random(3, 1, 7), random(3, 1, 7)
    inputs[1, 0, 3] = float("nan")
    stamps = torch.arange(3, dtype=torch.int32, device=device)
    for impl in IMPLS:
        nan = block_changes(h, inputs, residuals, stamps, impl=impl).isnan().sum(2) > 0
        assert nan[:, 0].tolist() == [[False, False], [True, True], [True, False]]


def test_rejects_what_does_not_fit(random, device):
    h, inputs = random(2, 7), random(3, 2, 7)
    stamps = torch.zeros(3, dtype=torch.int32, device=device)
    for args, must in (
        ((h[0], inputs, inputs, stamps), "h must be"),
        ((h, inputs[:, :1], inputs, stamps), "inputs must be"),
        ((h, inputs, inputs.half(), stamps), "share a dtype"),
        ((h, inputs, inputs, stamps.long()), "stamps must be int32"),
        ((h, inputs, inputs, stamps[:2]), "stamps must be int32"),
    ):
        with pytest.raises(ValueError, match=must):
            block_changes(*args)


def test_is_registered_with_a_fake(random, device):
    h, inputs, residuals = random(2, 7), random(3, 2, 7), random(3, 2, 7)
    stamps = torch.arange(3, dtype=torch.int32, device=device)
    for impl in IMPLS:
        torch.library.opcheck(
            torch.ops.dbcache.block_changes.default, (h, inputs, residuals, stamps, impl)
        )
    compiled = torch.compile(block_changes, fullgraph=True, backend="eager")
    plain = block_changes(h, inputs, residuals, stamps)
    assert torch.equal(compiled(h, inputs, residuals, stamps), plain)


def test_sums_have_a_size_that_follows_from_the_number_of_elements():
    assert partition_of(1) == (1, 1)
    assert partition_of(module.BLOCK + 1) == (1, 2)
    per_program, programs = partition_of(5000 * module.BLOCK)
    assert programs <= MAX_PARTIALS
    assert per_program * programs >= 5000
