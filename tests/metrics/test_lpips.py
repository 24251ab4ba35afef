"""LPIPS against the values of its authors' package on the same weights."""

import pytest
import torch
from made_weights import made_image, save_lpips

from dbcache.metrics import WeightsError, compute_lpips
from dbcache.metrics.lpips import load_network
from dbcache.metrics.networks.perceptual import PerceptualDistance

pytestmark = pytest.mark.usefixtures("one_thread")

VALUES = {
    ("alex", (64, 64)): 0.19795483350753784,
    ("alex", (70, 95)): 0.21242693066596985,
    ("vgg", (64, 64)): 0.2043367624282837,
    ("vgg", (70, 95)): 0.2079288214445114,
}
"""lpips 0.1.4, `LPIPS(net)(x, y, normalize=True)`, with the weights that `save_lpips` writes."""


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_values_are_those_of_the_published_package(net, tmp_path):
    save_lpips(tmp_path, net)
    for size in ((64, 64), (70, 95)):
        x, y = made_image(0, *size), made_image(1, *size)
        value, count = compute_lpips(x, y, net=net, weights=tmp_path, device="cpu")
        assert (value, count) == (pytest.approx(VALUES[net, size], rel=1e-4), 1)
    assert compute_lpips(x, x, net=net, weights=tmp_path, device="cpu") == (0.0, 1)


def test_the_folder_may_be_named_by_the_environment(weights, monkeypatch):
    monkeypatch.setenv("DBCACHE_METRICS_WEIGHTS", str(weights))
    load_network.cache_clear()
    value, _ = compute_lpips(made_image(0), made_image(1), device="cpu")
    load_network.cache_clear()
    assert value == pytest.approx(VALUES["alex", (64, 64)], rel=1e-4)


def test_small_pictures_are_refused(weights):
    x = made_image(0, 30, 64)
    with pytest.raises(ValueError, match="must have 31 pixels a side, got 64x30"):
        compute_lpips(x, x, weights=weights, device="cpu")
    x = made_image(0, 31, 64)
    assert compute_lpips(x, x, weights=weights, device="cpu") == (0.0, 1)


def test_an_unknown_net_is_refused():
    with pytest.raises(ValueError, match=r"net must be one of \('alex', 'vgg'\), got 'squeeze'"):
        PerceptualDistance("squeeze")


def test_weights_that_are_not_there_are_named(tmp_path):
    x = made_image(0)
    with pytest.raises(WeightsError, match=r"needs alexnet-owt-7be5be79\.pth in .*https://"):
        compute_lpips(x, x, weights=tmp_path, device="cpu")
    (tmp_path / "file.pth").touch()
    with pytest.raises(WeightsError, match=r"must be a folder with alexnet.* and alex\.pth"):
        compute_lpips(x, x, weights=tmp_path / "file.pth", device="cpu")


def test_weights_that_do_not_fit_are_named(tmp_path):
    save_lpips(tmp_path, "alex")
    heads, x = tmp_path / "alex.pth", made_image(0)
    state = torch.load(heads, weights_only=True)
    torch.save(state | {"lin2.model.1.weight": torch.zeros(1, 5, 1, 1)}, heads)
    with pytest.raises(WeightsError, match=r"'heads\.2' must have the shape \(1, 384, 1, 1\), got"):
        compute_lpips(x, x, weights=tmp_path, device="cpu")
    del state["lin4.model.1.weight"]
    torch.save(state, heads)
    with pytest.raises(WeightsError, match=r"'heads\.4' is missing"):
        compute_lpips(x, x, weights=tmp_path, device="cpu")
    torch.save([1, 2], heads)
    with pytest.raises(WeightsError, match=r"alex\.pth must hold named tensors, got list"):
        compute_lpips(x, x, weights=tmp_path, device="cpu")
    heads.write_bytes(b"no weights")
    with pytest.raises(WeightsError, match=r"alex\.pth must be a file of PyTorch weights"):
        compute_lpips(x, x, weights=tmp_path, device="cpu")
