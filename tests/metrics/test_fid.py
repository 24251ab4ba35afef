"""FID: its arithmetic against closed forms and SciPy, its network against pytorch-fid."""

import numpy as np
import pytest
import scipy.linalg
import torch
from made_weights import made_image

from dbcache.metrics import (
    FrechetInceptionDistance,
    WeightsError,
    compute_fid,
    frechet_distance,
)
from dbcache.metrics.inputs import MetricWarning
from dbcache.metrics.weights import INCEPTION

pytestmark = pytest.mark.usefixtures("one_thread")


def features_with(mean: list[float], variances: list[float], count: int = 40) -> torch.Tensor:
    """Return features whose sample mean and sample covariance, diagonal, are exactly these."""
    generator = torch.Generator().manual_seed(len(mean))
    x = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(0)).Q * (count - 1) ** 0.5
    return x * torch.tensor(variances).double().sqrt() + torch.tensor(mean).double()


def scipy_fid(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, with the root of a matrix."""
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(sx @ sy)
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(sx + sy - 2 * np.real(root))


def test_diagonal_covariances_have_a_closed_form():
    a, b = features_with([0, 1, 2], [1, 4, 9]), features_with([1, 1, 0], [4, 1, 0.25])
    # |m1 - m2|^2 + sum of (s1 - s2)^2
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 1 + 2.5**2, rel=1e-10)


def test_of_one_feature_it_is_a_distance_of_bells():
    a, b = torch.tensor([[1.0], [3.0]]), torch.tensor([[6.0], [6.0], [12.0]])
    expected = (2 - 8) ** 2 + (2**0.5 - 12**0.5) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "m"), [(60, 80), (60, 7), (5, 4)])
def test_it_is_the_definition_with_the_root_of_a_matrix(n, m):
    # more and fewer images than features: covariances of full rank and singular ones
    random = np.random.RandomState(0)
    x = random.randn(n, 12) @ random.randn(12, 12)
    y = random.randn(m, 12) @ random.randn(12, 12) + 1
    distance = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert distance == pytest.approx(scipy_fid(x, y), rel=1e-5)


def test_equal_sets_are_at_no_distance():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(x, x + 3) == pytest.approx(8 * 9, rel=1e-6)


def test_other_shapes_are_refused():
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(4, 2\)"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="2 images a side or more, got 4 and 1"):
        frechet_distance(x, x[:1])


FEATURES = {
    64: ([0.014528579078614712, 0.040068987756967545, 0.4253406226634979], 0.356989347754018),
    192: ([1.2072997093200684, 0.2715102434158325, 0.8082377314567566], 0.5994469882762083),
    768: ([2.846858263015747, 0.06986282765865326, 0.04960518330335617], 1.3000385339420557),
    2048: ([0.011623174883425236, 2.6903157234191895, 2.0255370140075684], 2.605205589106454),
}
"""First features of the first image, and mean over all, by pytorch-fid 0.3.0 on torchvision 0.28.0
with the weights of the fixture."""


@pytest.mark.parametrize("dims", [64, 192, 768, 2048])
def test_features_are_those_of_pytorch_fid(dims, weights):
    fid = FrechetInceptionDistance("cpu", dims=dims, weights=weights)
    found = fid.image_features([made_image(0, 80, 120), made_image(1, 80, 120)])
    first, mean = FEATURES[dims]
    assert found.shape == (2, dims)
    assert found[0, :3].tolist() == pytest.approx(first, rel=1e-3, abs=1e-4)
    assert found.double().mean().item() == pytest.approx(mean, rel=1e-4)


def test_distance_of_folders_is_that_of_pytorch_fid(images, weights):
    true = images("true", *(f"{i}.png" for i in range(6)))
    test = images("test", *(f"other{i}.png" for i in range(5)), seed=100)
    fid = FrechetInceptionDistance("cpu", dims=64, batch_size=4, weights=weights / INCEPTION.name)
    with pytest.warns(MetricWarning, match="FID: 5 images are fewer than the 64 features"):
        value, count = fid.compute_fid(true, test)
    # pytorch-fid adds 1e-6 to singular covariances and takes a root
    assert (value, count) == (pytest.approx(0.12251600337573071, rel=1e-3), 5)


def test_pictures_of_different_sizes_are_one_set(weights):
    fid = FrechetInceptionDistance("cpu", dims=64, weights=weights)
    pictures = [made_image(0, 64, 64), made_image(1, 40, 90)]
    alone = torch.cat([fid.image_features(picture) for picture in pictures])
    torch.testing.assert_close(fid.image_features(pictures), alone)


def test_compute_fid_is_that_of_2048_features(weights):
    with pytest.warns(MetricWarning, match="2048 features"):
        value, count = compute_fid(
            [made_image(0), made_image(1)],
            [made_image(1), made_image(0)],
            weights=weights,
            device="cpu",
        )
    assert (value, count) == (pytest.approx(0, abs=1e-3), 2)


def test_bad_arguments_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match=r"dims must be one of \[64, 192, 768, 2048\], got 100"):
        FrechetInceptionDistance("cpu", dims=100, weights=weights)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        FrechetInceptionDistance("cpu", batch_size=0, weights=weights)
    with pytest.raises(WeightsError, match=r"needs pt_inception-2015-12-05-6726825d\.pth in"):
        FrechetInceptionDistance("cpu", dims=64, weights=tmp_path)
    fid = FrechetInceptionDistance("cpu", dims=64, weights=weights)
    with pytest.raises(ValueError, match="2 images a side or more, got 1 and 1"):
        fid.compute_fid(made_image(0), made_image(1))
