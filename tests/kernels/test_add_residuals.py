import pytest
import torch

from dbcache.kernels.pruning import add_residuals as module
from dbcache.kernels.pruning.add_residuals import add_residuals
from dbcache.testing import assert_as_accurate, poisoned

IMPLS = ["triton", "reference"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1,), (2, 17, 5), (module.BLOCK - 1,), (module.BLOCK + 1,)]


def stored(random, device, blocks, first, count, shape, dtype):
    """Return residuals of which only those of the run may be read."""
    residuals = poisoned(blocks, *shape, dtype=dtype, device=device)
    residuals[first : first + count] = random(count, *shape, dtype=dtype)
    return residuals


@pytest.mark.covering
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("first", "count"), [(0, 1), (2, 3), (0, 6), (5, 1)])
def test_adds_the_run_in_both_streams(random, device, shape, dtype, first, count, impl):
    streams, plain, exact = [], [], []
    for size in (shape, (3, 7)):
        x = random(*size, dtype=dtype)
        residuals = stored(random, device, 6, first, count, size, dtype)
        streams.append((x, residuals))
        run = residuals[first : first + count]
        exact.append(x.double() + run.double().sum(0))
        total = x
        for added in run:
            total = total + added
        plain.append(total)
    (h, hidden), (encoder, encoders) = streams
    outputs = add_residuals(h, hidden, first, count, encoder, encoders, impl=impl)
    for output, rounded, truth in zip(outputs, plain, exact, strict=True):
        assert output.dtype == dtype
        assert output.is_contiguous()
        assert_as_accurate(output, rounded, truth, tiny=torch.finfo(dtype).eps)
        # rounded once, however many blocks; but the interpreter cuts bfloat16 off
        if dtype != torch.bfloat16 or impl == "reference":
            assert_as_accurate(output, truth.to(dtype), truth, factor=1.01)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_stream_any_strides_and_a_new_tensor(random, device, impl):
    h, residuals = random(5, 9).T, random(2, 9, 5)
    before = h.clone()
    output, encoder = add_residuals(h, residuals, 0, 2, impl=impl)
    torch.testing.assert_close(output, before + residuals[0] + residuals[1])
    assert encoder is None
    assert torch.equal(h, before)


def test_rejects_what_does_not_fit(random):
    h, residuals = random(2, 7), random(3, 2, 7)
    for args, must in (
        ((h, residuals, 0, 0), "at least 1"),
        ((h, residuals, -1, 1), "at least 1"),
        ((h, residuals, 2, 2), "at least 1"),
        ((h, residuals[:, :1], 0, 1), "residuals of h must be"),
        ((h, residuals.half(), 0, 1), "share a dtype"),
        ((h, residuals, 0, 1, h), "come with its residuals"),
        ((h, residuals, 0, 1, h, residuals[:2]), "residuals of encoder must be"),
    ):
        with pytest.raises(ValueError, match=must):
            add_residuals(*args)


def test_is_registered_with_a_fake_and_compiles(random):
    h, residuals = random(2, 7), random(3, 2, 7)
    for impl in IMPLS:
        for streams, stored in (([h], [residuals]), ([h, h.T], [residuals, random(3, 7, 2)])):
            args = (streams, stored, 0, 2, impl)
            torch.library.opcheck(torch.ops.dbcache.add_residuals.default, args)
    compiled = torch.compile(add_residuals, fullgraph=True, backend="eager")
    expected = add_residuals(h, residuals, 1, 2)[0]
    assert torch.equal(compiled(h, residuals, 1, 2)[0], expected)
