"""The metrics of several runs against one reference: what the command line computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dbcache.metrics.clip_score import compute_clip_score
from dbcache.metrics.fid import FrechetInceptionDistance
from dbcache.metrics.image_reward import compute_image_reward
from dbcache.metrics.lpips import compute_lpips, compute_video_lpips
from dbcache.metrics.pairwise import (
    compute_mse,
    compute_psnr,
    compute_ssim,
    compute_video_mse,
    compute_video_psnr,
    compute_video_ssim,
)
from dbcache.metrics.tables import Column, Value
from dbcache.metrics.weights import WeightsError

if TYPE_CHECKING:
    import torch

COLUMNS = {
    "psnr": Column("psnr", "PSNR (dB)", 2, higher=True),
    "ssim": Column("ssim", "SSIM", 4, higher=True),
    "mse": Column("mse", "MSE", 2, higher=False),
    "lpips": Column("lpips", "LPIPS", 4, higher=False),
    "fid": Column("fid", "FID", 3, higher=False),
    "clip_score": Column("clip_score", "CLIP score", 3, higher=True),
    "image_reward": Column("image_reward", "ImageReward", 4, higher=True),
}
PROMPTED = ("clip_score", "image_reward")
WITH_REFERENCE = tuple(metric for metric in COLUMNS if metric not in PROMPTED)

BY_PAIRS = {
    "psnr": (compute_psnr, compute_video_psnr),
    "ssim": (compute_ssim, compute_video_ssim),
    "mse": (compute_mse, compute_video_mse),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is compared, and with which models."""

    reference: str | None
    """Image, video or folder of these; None without one."""

    prompts: str | None = None
    """File of prompts; None without one."""

    video: bool = False
    """Whether reference and runs are videos."""

    weights: str | None = None
    lpips_net: Literal["alex", "vgg"] = "alex"
    clip_model: str | None = None
    reward_model: str | None = None
    device: str | None = None
    batch_size: int = 16

    report: Callable[[str], None] | None = None
    """Is told what is computed next."""


class Runs:
    """Computes metrics of runs; `unavailable` says which could not be, and why."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.unavailable: dict[str, Exception] = {}

    def expand(self, metrics: Sequence[str], tests: Sequence[tuple[str, str]]) -> list[str]:
        """Return the metrics once each, "all" as every one that the inputs allow."""
        if "all" not in metrics:
            return list(dict.fromkeys(metrics))
        allowed = list(WITH_REFERENCE) if self.settings.reference is not None else []
        single = not all(Path(path).is_dir() for _, path in tests)
        if single and not self.settings.video and "fid" in allowed:
            allowed.remove("fid")  # of one image there is none
        return allowed + (list(PROMPTED) if self.settings.prompts is not None else [])

    def rows(
        self, metrics: Sequence[str], tests: Sequence[tuple[str, str]]
    ) -> list[dict[str, Value]]:
        """Return a row per run: name, n, and the value of each metric that could be computed."""
        rows: list[dict[str, Value]] = [{"name": name, "n": None} for name, _ in tests]
        for metric in metrics:
            for row, (name, path) in zip(rows, tests, strict=True):
                if self.settings.report is not None:
                    self.settings.report(f"{metric} of {name}")
                try:
                    row[metric], row["n"] = self.one(metric, path)
                except (ImportError, WeightsError) as error:
                    self.unavailable[metric] = error
                    break
        return rows

    def one(self, metric: str, path: str) -> tuple[float, int]:
        """Return value and count of one metric for one run."""
        own, prompts = self.settings, self.settings.prompts or ""
        if metric == "clip_score":
            return compute_clip_score(path, Path(prompts), own.clip_model, device=own.device)
        if metric == "image_reward":
            return compute_image_reward(path, Path(prompts), own.reward_model, device=own.device)
        if metric == "fid":
            return self.fid.distance(self.true_features, self._features(path))
        if metric == "lpips":
            lpips = compute_video_lpips if own.video else compute_lpips
            return lpips(
                own.reference or "",
                path,
                net=own.lpips_net,
                weights=own.weights,
                device=own.device,
            )
        return BY_PAIRS[metric][own.video](own.reference or "", path)

    @cached_property
    def fid(self) -> FrechetInceptionDistance:
        """FID with its network."""
        own = self.settings
        return FrechetInceptionDistance(own.device, batch_size=own.batch_size, weights=own.weights)

    @cached_property
    def true_features(self) -> torch.Tensor:
        """Features of the reference, computed once for all runs."""
        return self._features(self.settings.reference or "")

    def _features(self, path: str) -> torch.Tensor:
        read = self.fid.video_features if self.settings.video else self.fid.image_features
        return read(path)
