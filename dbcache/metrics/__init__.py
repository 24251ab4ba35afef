"""How good pictures and videos are: against the plain model's, as sets, and for their prompts.

    from dbcache.metrics import compute_psnr

    value, count = compute_psnr("plain/", "cached/")

Names and return values are those of cache-dit's `metrics`. `dbcache-metrics` is the same on the
command line. Libraries beyond NumPy are imported when a metric needs them.
"""

from dbcache.metrics.clip_score import compute_clip_score
from dbcache.metrics.fid import (
    FrechetInceptionDistance,
    compute_fid,
    compute_video_fid,
    frechet_distance,
)
from dbcache.metrics.image_reward import compute_image_reward
from dbcache.metrics.inputs import MetricWarning
from dbcache.metrics.lpips import compute_lpips, compute_video_lpips
from dbcache.metrics.pairwise import (
    compute_mse,
    compute_psnr,
    compute_ssim,
    compute_video_mse,
    compute_video_psnr,
    compute_video_ssim,
)
from dbcache.metrics.weights import WeightsError

__all__ = [
    "FrechetInceptionDistance",
    "MetricWarning",
    "WeightsError",
    "compute_clip_score",
    "compute_fid",
    "compute_image_reward",
    "compute_lpips",
    "compute_mse",
    "compute_psnr",
    "compute_ssim",
    "compute_video_fid",
    "compute_video_lpips",
    "compute_video_mse",
    "compute_video_psnr",
    "compute_video_ssim",
    "frechet_distance",
]
