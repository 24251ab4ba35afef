"""FID: how far one set of images is from another, as sets.

    FID = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

m and S are mean and covariance of the 2048 features that Inception v3 gives each image: the
Frechet distance of two normal distributions. Heusel et al. 2017, "GANs Trained by a Two Time-Scale
Update Rule Converge to a Local Nash Equilibrium".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from dbcache.metrics.inputs import Array, Images, MetricWarning, PathLike, frames, items, videos
from dbcache.metrics.weights import INCEPTION, load_into, read_tensors

if TYPE_CHECKING:
    import torch

    from dbcache.metrics.networks.inception import InceptionFeatures


def frechet_distance(true: torch.Tensor, test: torch.Tensor) -> float:
    """Return the Frechet distance of the normal distributions fitted to two sets of features.

    With centred features X = A sqrt(n - 1), covariances are A'A and B'B, and the trace of
    (A'A B'B)^(1/2) is the sum of the singular values of A B'. So no root of a matrix is taken, and
    sets smaller than their number of features, whose covariances are singular, need no correction.
    The identity is used by Mathiasen and Hvilshoj 2020, "Backpropagating through Frechet Inception
    Distance". In float64.

    Args:
        true: (N, D) features, N of at least 2.
        test: (M, D) features, M of at least 2.

    Raises:
        ValueError: other shapes.
    """
    import torch

    if true.ndim != 2 or test.ndim != 2 or true.shape[1] != test.shape[1]:
        shapes = f"{tuple(true.shape)} and {tuple(test.shape)}"
        raise ValueError(f"frechet_distance: needs features (N, D) and (M, D), got {shapes}")
    if min(len(true), len(test)) < 2:
        counts = f"{len(true)} and {len(test)}"
        raise ValueError(f"frechet_distance: needs 2 images a side or more, got {counts}")
    means, factors = [], []
    for features in (true.double(), test.double()):
        mean = features.mean(0)
        factor = (features - mean) / math.sqrt(len(features) - 1)
        if len(factor) > factor.shape[1]:  # the same covariance with fewer rows
            factor = torch.linalg.qr(factor, mode="r").R
        means.append(mean)
        factors.append(factor)
    overlap = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    spread = factors[0].square().sum() + factors[1].square().sum()
    # rounding may leave a tiny negative number for equal sets
    return max(0.0, ((means[0] - means[1]).square().sum() + spread - 2 * overlap).item())


class FrechetInceptionDistance:
    """FID with its network loaded once.

    Args:
        device: where the network runs; None is the GPU where there is one.
        dims: number of features; 2048 is FID, 768, 192 and 64 are from earlier layers.
        batch_size: images that the network takes at once.
        weights: pytorch-fid's file `pt_inception-2015-12-05-6726825d.pth`, or a folder that holds
            it; None takes the folder named by `DBCACHE_METRICS_WEIGHTS`, else torch's cache, and
            downloads the file if it is not there.

    Raises:
        ValueError: another number of features, or a batch size below 1.
        WeightsError: weights that cannot be had.
    """

    def __init__(
        self,
        device: str | None = None,
        dims: int = 2048,
        batch_size: int = 16,
        weights: PathLike | None = None,
    ) -> None:
        from dbcache.metrics.devices import default_device

        if batch_size < 1:
            raise ValueError(f"FID: batch_size must be at least 1, got {batch_size}")
        self.device = default_device(device)
        self.dims = dims
        self.batch_size = batch_size
        self.network = load_network(dims, None if weights is None else str(weights), self.device)

    def compute_fid(self, image_true: Images, image_test: Images) -> tuple[float, int]:
        """Return the FID, 0 for equal sets, lower is closer, and the number of images tested.

        Args:
            image_true: the reference: a folder, an array (B, H, W, 3) or a list, as `compute_psnr`
                takes them. Neither names nor counts need to match: sets are compared, not pairs.
            image_test: the images in question.

        Raises:
            ValueError: fewer than two images on a side, or a file that is no 8-bit image.
        """
        return self.distance(self.image_features(image_true), self.image_features(image_test))

    def compute_video_fid(self, video_true: PathLike, video_test: PathLike) -> tuple[float, int]:
        """Return the FID of all frames and the number of frames tested."""
        return self.distance(self.video_features(video_true), self.video_features(video_test))

    def image_features(self, images: Images) -> torch.Tensor:
        """Return the features of images, (N, dims), on the CPU."""
        return self._features(item.read() for item in items(images, "compute_fid"))

    def video_features(self, video: PathLike) -> torch.Tensor:
        """Return the features of the frames of a video, or of a folder of videos, (N, dims)."""
        who = "compute_video_fid"
        return self._features(x for item in videos(video, who) for x in frames(item.label, who))

    def distance(self, true: torch.Tensor, test: torch.Tensor) -> tuple[float, int]:
        """Return the FID of two sets of features and the number of images tested.

        Raises:
            ValueError: fewer than two images on a side.
        """
        value, fewest = frechet_distance(true, test), min(len(true), len(test))
        if fewest <= self.dims:
            warnings.warn(
                f"FID: {fewest} images are fewer than the {self.dims} features, so the value is "
                f"far too high; compare it only with values of as many images",
                MetricWarning,
                stacklevel=3,
            )
        return value, len(test)

    def _features(self, images: Iterable[Array]) -> torch.Tensor:
        import torch

        with torch.no_grad():
            found = [self.network(batch).cpu() for batch in self._batches(images)]
        return torch.cat(found)

    def _batches(self, images: Iterable[Array]) -> Iterator[torch.Tensor]:
        import torch

        from dbcache.metrics.devices import unit_tensor
        from dbcache.metrics.networks.inception import resize

        rest = iter(images)
        while batch := list(islice(rest, self.batch_size)):
            # sizes may differ within a set
            yield torch.cat([resize(unit_tensor(image, self.device)) for image in batch])


@lru_cache(maxsize=1)
def load_network(dims: int, weights: str | None, device: torch.device) -> InceptionFeatures:
    """Return the network with pytorch-fid's weights; the last one is kept.

    Raises:
        WeightsError: weights that cannot be had or do not fit.
    """
    from dbcache.metrics.networks.inception import InceptionFeatures

    network = InceptionFeatures(dims)
    path = INCEPTION.find(weights, "FID")
    load_into(network, read_tensors(path, "FID"), path, "FID")
    return network.to(device)


def compute_fid(
    image_true: Images,
    image_test: Images,
    *,
    weights: PathLike | None = None,
    device: str | None = None,
) -> tuple[float, int]:
    """Return the FID of two sets of images, 0 for equal sets, and the number of images tested.

    Arguments and errors are those of `FrechetInceptionDistance` and its `compute_fid`.
    """
    return FrechetInceptionDistance(device, weights=weights).compute_fid(image_true, image_test)


def compute_video_fid(
    video_true: PathLike,
    video_test: PathLike,
    *,
    weights: PathLike | None = None,
    device: str | None = None,
) -> tuple[float, int]:
    """Return the FID of the frames of two videos, or folders of videos, and the number tested.

    Arguments and errors are those of `FrechetInceptionDistance` and its `compute_fid`.
    """
    return FrechetInceptionDistance(device, weights=weights).compute_video_fid(
        video_true, video_test
    )
