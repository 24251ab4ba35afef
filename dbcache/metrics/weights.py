"""Published weight files: found in a folder or in torch's cache, or downloaded."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

from dbcache.metrics.inputs import PathLike

if TYPE_CHECKING:
    import torch

FOLDER = "DBCACHE_METRICS_WEIGHTS"
"""Environment variable that names a folder of weight files."""

LPIPS_HEADS = (
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
)


class WeightsError(RuntimeError):
    """Weights that a metric needs cannot be had, or do not fit its network."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One published file: its name, where it is, the start of its SHA-256."""

    name: str
    url: str
    sha256: str
    cached_as: str | None = None
    """Name in torch's cache, where the published one is too short to be unique."""

    def find(self, weights: PathLike | None, who: str) -> Path:
        """Return the path of the file: in `weights`, in the folder of the environment, or cached.

        Args:
            weights: the file itself, or a folder that holds it by its published name.
            who: the metric, for errors.

        Raises:
            WeightsError: not there, or not to be downloaded.
        """
        folder = weights if weights is not None else os.environ.get(FOLDER)
        if not folder:
            return self._download(who)
        path = Path(folder).expanduser()
        found = path / self.name if path.is_dir() else path
        if not found.is_file():
            raise WeightsError(f"{who}: needs {self.name} in {path}, not found; it is {self.url}")
        return found

    def _download(self, who: str) -> Path:
        import torch.hub

        target = Path(torch.hub.get_dir()) / "checkpoints" / (self.cached_as or self.name)
        if target.is_file():
            return target
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(target), hash_prefix=self.sha256)
        except (URLError, OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise WeightsError(
                f"{who}: {self.url} could not be downloaded ({error}); put the file in a folder "
                f"and name the folder: weights=..., --weights or the variable {FOLDER}"
            ) from error
        return target


INCEPTION = WeightFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d",
)
BACKBONES = {
    "alex": WeightFile(
        "alexnet-owt-7be5be79.pth",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "7be5be79",
    ),
    "vgg": WeightFile(
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af",
    ),
}
HEADS = {
    "alex": WeightFile("alex.pth", f"{LPIPS_HEADS}/alex.pth", "df73285e35b2", "lpips_alex.pth"),
    "vgg": WeightFile("vgg.pth", f"{LPIPS_HEADS}/vgg.pth", "a78928a0af1e", "lpips_vgg.pth"),
}


def read_tensors(path: Path, who: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file that `torch.save` wrote, on the CPU.

    Raises:
        WeightsError: not readable, or something else than named tensors.
    """
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{who}: {path} must be a file of PyTorch weights ({error})") from error
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise WeightsError(f"{who}: {path} must hold named tensors, got {type(state).__name__}")
    return state


def load_into(
    module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path, who: str
) -> None:
    """Load exactly the parameters of a module; what the file holds beyond them is left.

    Raises:
        WeightsError: a parameter is missing or has another shape.
    """
    own = {key: x for key, x in module.state_dict().items() if not key.endswith("batches_tracked")}
    missing = [key for key in own if key not in state]
    if missing:
        raise WeightsError(f"{who}: {path} must hold {len(own)} tensors, {missing[0]!r} is missing")
    for key, x in own.items():
        if state[key].shape != x.shape:
            shapes = f"{tuple(x.shape)}, got {tuple(state[key].shape)}"
            raise WeightsError(f"{who}: {path}: {key!r} must have the shape {shapes}")
    module.load_state_dict({key: state[key] for key in own}, strict=False)
    module.eval().requires_grad_(False)
