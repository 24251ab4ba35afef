"""``dbcache info``: versions, devices, and which modes work here."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from dbcache.cli.outcome import Outcome
from dbcache.results.markup import columns

HELP = "show versions, devices, and which modes work here, and why others do not"

PACKAGES = (
    "dbcache-dit", "torch", "triton", "diffusers", "transformers", "accelerate", "numpy",
    "cuda-bindings", "torchao", "pyyaml", "pillow", "av", "scikit-learn", "safetensors",
)  # fmt: skip

EXTRAS = {
    "accuracy in the demo": (("sklearn",), "bench"),
    "files in YAML": (("yaml",), "yaml"),
    "videos as files": (("av",), "metrics"),
    "quantisation": (("torchao",), "quantization"),
}
"""What modes need besides the package: modules, and the extra that brings them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing."""


def run(arguments: argparse.Namespace) -> Outcome:
    """Find it all out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "-"
    devices, modes = _devices(), _modes()
    rows = [["package", "version"], *([name, found] for name, found in versions.items())]
    shown = [["mode", "works", "why not"]]
    shown += [[name, "yes" if why is None else "no", why or ""] for name, why in modes.items()]
    where = [["device", "kind"], *([device["name"], device["kind"]] for device in devices)]
    text = "\n\n".join(map(columns, (rows, where, shown)))
    works = {name: {"works": why is None, "why_not": why} for name, why in modes.items()}
    return Outcome(text, {"versions": versions, "devices": devices, "modes": works})


def _devices() -> list[dict[str, Any]]:
    try:
        import torch
    except ImportError:
        return [{"name": "CPU", "kind": platform.machine()}]
    found = [{"name": f"CPU, {torch.get_num_threads()} threads", "kind": platform.machine()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        kind = getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}"
        found.append({"name": f"{properties.name}, {memory:.0f} GiB", "kind": kind})
    return found


def _modes() -> dict[str, str | None]:
    """Return why each mode does not work here, None where it does."""
    try:
        import torch
    except ImportError:
        return {"cache": "needs torch, which cannot be imported here: pip install torch"}
    has_gpu = torch.cuda.is_available()
    no_gpu = None if has_gpu else "torch finds no CUDA or ROCm device"
    no_triton = None if find_spec("triton") else "triton is not installed"
    modes: dict[str, str | None] = {"cache (PyTorch kernels)": None}
    modes["cache (Triton kernels)"] = no_gpu or no_triton
    modes["cuda_graph, the host decides"] = no_gpu
    modes["cuda_graph, the device decides"] = no_gpu or _why_no_branches()
    distributed = torch.distributed
    usable = distributed.is_available()
    modes["several ranks (gloo)"] = None if usable else "torch has no torch.distributed"
    nccl = usable and distributed.is_nccl_available()
    modes["several ranks (nccl)"] = no_gpu or (None if nccl else "torch was built without NCCL")
    for name, (modules, extra) in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        cure = f"needs {', '.join(missing)}: pip install 'dbcache-dit[{extra}]'"
        modes[name] = cure if missing else None
    return modes


def _why_no_branches() -> str | None:
    from dbcache.graphs.cuda_driver import find_driver

    driver, reason = find_driver()
    return None if driver is not None else reason
