"""LPIPS: how different two images look, by the features of a network."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dbcache.metrics.inputs import Array, Images, PathLike, frame_pairs, image_pairs
from dbcache.metrics.pairwise import mean_over_pairs
from dbcache.metrics.weights import BACKBONES, HEADS, WeightsError, load_into, read_tensors

if TYPE_CHECKING:
    import torch

    from dbcache.metrics.networks.perceptual import PerceptualDistance


def compute_lpips(
    image_true: Images,
    image_test: Images,
    *,
    net: Literal["alex", "vgg"] = "alex",
    weights: PathLike | None = None,
    device: str | None = None,
) -> tuple[float, int]:
    """Return the mean LPIPS distance, 0 where equal, lower is closer, and the number of pairs.

    Args:
        image_true: the reference, as `compute_psnr` takes it.
        image_test: as many images, matched as `compute_psnr` matches them.
        net: backbone; "alex" is what published LPIPS numbers mean unless they say otherwise.
        weights: folder with the files of the backbone and of the heads (`alexnet-owt-7be5be79.pth`
            and `alex.pth`, or `vgg16-397923af.pth` and `vgg.pth`); None takes the folder named by
            `DBCACHE_METRICS_WEIGHTS`, else torch's cache, and downloads what is not there.
        device: where the network runs; the GPU where there is one.

    Raises:
        ValueError: as `compute_psnr`; images of less than 31 pixels ("alex") or 16 ("vgg") a side.
        WeightsError: weights that cannot be had.
    """
    who = "compute_lpips"
    distance = _Distance(net, weights, device, who)
    return mean_over_pairs(image_pairs(image_true, image_test, who), distance, who)


def compute_video_lpips(
    video_true: PathLike,
    video_test: PathLike,
    *,
    net: Literal["alex", "vgg"] = "alex",
    weights: PathLike | None = None,
    device: str | None = None,
) -> tuple[float, int]:
    """Return the mean LPIPS distance over frames and the number of frames.

    Videos are those of `compute_video_psnr`, the other arguments those of `compute_lpips`.
    """
    who = "compute_video_lpips"
    distance = _Distance(net, weights, device, who)
    return mean_over_pairs(frame_pairs(video_true, video_test, who), distance, who)


class _Distance:
    """The network as a function of two images."""

    def __init__(
        self, net: Literal["alex", "vgg"], weights: PathLike | None, device: str | None, who: str
    ) -> None:
        from dbcache.metrics.devices import default_device

        self.device = default_device(device)
        folder = None if weights is None else str(weights)
        self.network = load_network(net, folder, self.device)
        self.who = who

    def __call__(self, true: Array, test: Array) -> float:
        from dbcache.metrics.devices import unit_tensor
        from dbcache.metrics.networks.perceptual import SMALLEST

        smallest = SMALLEST[self.network.net]
        if min(true.shape[:2]) < smallest:
            size = f"{true.shape[1]}x{true.shape[0]}"
            raise ValueError(f"{self.who}: images must have {smallest} pixels a side, got {size}")
        x, y = (unit_tensor(image, self.device) for image in (true, test))
        return float(self.network(x, y))


@lru_cache(maxsize=2)
def load_network(
    net: Literal["alex", "vgg"], weights: str | None, device: torch.device
) -> PerceptualDistance:
    """Return the network with its published weights; the last two are kept.

    Raises:
        WeightsError: weights that cannot be had or do not fit.
    """
    from dbcache.metrics.networks.perceptual import PerceptualDistance

    who = "LPIPS"
    if weights is not None and Path(weights).is_file():
        names = f"{BACKBONES[net].name} and {HEADS[net].name}"
        raise WeightsError(f"{who}: weights must be a folder with {names}, got a file, {weights}")
    network = PerceptualDistance(net)
    backbone, heads = BACKBONES[net].find(weights, who), HEADS[net].find(weights, who)
    state = {k: x for k, x in read_tensors(backbone, who).items() if k.startswith("features.")}
    for name, head in read_tensors(heads, who).items():  # lin0.model.1.weight
        state[f"heads.{name.removeprefix('lin').partition('.')[0]}"] = head
    load_into(network, state, backbone, who)
    return network.to(device)
