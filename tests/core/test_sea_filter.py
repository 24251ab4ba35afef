"""SeaCache's filter against NumPy in float64, sample by sample."""

import pytest
import torch
from policy_oracle import filtered
from tiny import noise

from dbcache.adapters.signals.sea_filter import sea_filter


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 3, 8, 6), (2, 3)),
        ((2, 7, 5, 3), (1, 2)),
        ((3, 2, 3, 4, 7), (2, 3, 4)),
        ((1, 1, 1, 1), (2, 3)),
        ((2, 4, 1, 9), (2, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("sigma", [0.0, 1e-3, 0.3, 0.97, 1.0])
def test_is_the_gain_of_the_formula(shape, axes, sigma):
    x = noise(*shape, seed=3)
    actual = sea_filter(x, torch.full(shape[:1], sigma), axes)
    assert actual.dtype == torch.float32
    inner = tuple(axis - 1 for axis in axes)
    for sample, out in zip(x, actual, strict=True):
        expected = filtered(sample, sigma, inner)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_each_sample_has_its_own_share_of_noise_and_any_dtype():
    x, sigma = noise(3, 4, 6, 2, seed=4), torch.tensor([0.9, 0.5, 0.1])
    together = sea_filter(x, sigma, (1, 2))
    for i in range(3):
        alone = sea_filter(x[i : i + 1], sigma[i], (1, 2))
        torch.testing.assert_close(together[i : i + 1], alone)
    half = sea_filter(x.bfloat16(), sigma.bfloat16(), (1, 2))
    torch.testing.assert_close(half, together, rtol=0.1, atol=0.1)


def test_much_noise_leaves_the_coarse_structure_and_little_noise_all_of_it():
    x = torch.zeros(1, 16, 16, 1)
    x[0, ::2] = 1.0  # finest stripes on a grey ground
    for sigma, lowest, highest in ((0.98, 0.0, 0.01), (0.02, 0.5, 1.5)):
        out = sea_filter(x, torch.tensor([sigma]), (1, 2))
        stripes = (out[0, 0] - out[0, 1]).abs().mean() / out.mean()
        assert lowest <= stripes / 2 <= highest
