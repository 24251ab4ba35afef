"""Loads a pipeline of diffusers and calls it as a command line says."""

from __future__ import annotations

import argparse
import inspect
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import dbcache
from dbcache.cli.media import media_of, picture
from dbcache.cli.outcome import pair


@dataclass
class Result:
    """What one call returned: "images", "frames" or "audios", and what it took."""

    kind: str
    entries: list[Any]
    seconds: float

    def psnr(self, other: Result) -> float | None:
        """Return the PSNR of another result's pictures or frames against these, in dB.

        None for sounds, and infinite where all are equal.
        """
        if self.kind == "audios":
            return None
        from dbcache.metrics import compute_psnr

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of equal pictures, which are said as infinite
            return compute_psnr(self._pictures(), other._pictures())[0]

    def _pictures(self) -> list[Any]:
        frames = self.entries if self.kind == "images" else [f for e in self.entries for f in e]
        return [picture(frame).convert("RGB") for frame in frames]


class Runner:
    """A pipeline, and the arguments of its call.

    Args:
        pipe: on its device.
        device: of the pipeline.
        call: keyword arguments but the generator.
        seed: of the noise; each call begins with it.
    """

    def __init__(self, pipe: Any, device: torch.device, call: dict[str, Any], seed: int) -> None:
        self.pipe = pipe
        self.device = device
        self.call = call
        self.seed = seed

    @classmethod
    def load(cls, arguments: argparse.Namespace) -> Runner:
        """Load the pipeline that is asked for.

        Raises:
            OSError, ValueError: it cannot be loaded, or does not take an argument.
        """
        pipe, device = load(arguments)
        call = _call(pipe, arguments)  # before the model is moved
        if arguments.offload and device.type == "cuda":
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
        pipe.set_progress_bar_config(disable=arguments.quiet or arguments.json)
        return cls(pipe, device, call, arguments.seed)

    def transformers(self) -> list[torch.nn.Module]:
        """Return the models of the pipeline that may be cached."""
        parts = [x for x in self.pipe.components.values() if isinstance(x, torch.nn.Module)]
        return [part for part in parts if dbcache.get_adapter(part) is not None]

    @torch.no_grad()
    def run(self, warm: bool = False) -> Result:
        """Call the pipeline; with `warm` once before, untimed."""
        for _ in range(warm):
            self._generate()
        begin = clock(self.device)
        kind, entries = media_of(self._generate())
        return Result(kind, entries, clock(self.device) - begin)

    def _generate(self) -> Any:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        torch.manual_seed(self.seed)  # of what some pipelines sample without the generator
        takes = inspect.signature(self.pipe.__call__).parameters
        given = {"generator": generator} if "generator" in takes else {}
        return self.pipe(**self.call, **given)


def load(arguments: argparse.Namespace) -> tuple[Any, torch.device]:
    """Load the pipeline that is asked for, on the CPU; return it with the device to run on.

    Raises:
        OSError, ValueError: it cannot be loaded.
    """
    import diffusers

    has_gpu = torch.cuda.is_available()
    device = torch.device(arguments.device or ("cuda" if has_gpu else "cpu"))
    if device.type == "cuda" and not has_gpu:
        raise ValueError(f"--device {device}: torch finds no GPU here; use --device cpu")
    name = arguments.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, name)
    if arguments.quiet or arguments.json:
        diffusers.utils.logging.disable_progress_bar()
        if find_spec("transformers") is not None:
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
    folder = Path(arguments.model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: must be a folder with a model_index.json, as pipelines have")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it is called dtype in diffusers 1
            pipe = diffusers.DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=dtype)
    except AttributeError as error:
        raise ValueError(
            f"{arguments.model}: its model_index.json names what diffusers "
            f"{diffusers.__version__} does not have, got {error}; upgrade diffusers"
        ) from error
    except (OSError, ValueError) as error:
        if folder.exists():
            raise
        raise OSError(
            f"{arguments.model}: there is no such folder, and the hub did not give it: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    return pipe, device


def _read(value: Any) -> Any:
    """Return the tensor of ``@FILE``; other values as they are."""
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    if value.endswith(".npy"):
        import numpy as np

        return torch.from_numpy(np.load(value[1:], allow_pickle=False))
    return torch.load(value[1:], weights_only=True)


@contextmanager
def ranks(are_used: bool) -> Iterator[bool]:
    """Join the ranks that torchrun started, where they are used; give whether this is the first.

    They leave together: one that ends while others work takes away what these wait for.

    Raises:
        RuntimeError: torchrun started none.
    """
    if not are_used:
        yield True
        return
    if "RANK" not in os.environ:
        raise RuntimeError(
            "--parallel needs a process per rank: torchrun --nproc_per_node=2 -m dbcache ..."
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield torch.distributed.get_rank() == 0
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def enabled(pipe: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Keep the cache on inside."""
    if "level" in settings:
        level = settings.pop("level")
        settings = {**dbcache.preset(pipe, level), **settings}
    dbcache.enable(pipe, **settings)
    try:
        yield
    finally:
        dbcache.disable(pipe)


def _call(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of the pipeline's call."""
    call: dict[str, Any] = {
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
        "num_inference_steps": arguments.steps,
        "height": arguments.height,
        "width": arguments.width,
        "num_frames": arguments.frames,
        "guidance_scale": arguments.guidance_scale,
    }
    if arguments.image is not None:
        from PIL import Image

        call["image"] = Image.open(arguments.image).convert("RGB")
    call |= {name: _read(value) for name, value in map(pair, arguments.others)}
    call = {name: value for name, value in call.items() if value is not None}
    takes = inspect.signature(pipe.__call__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return call
    for name in call:
        if name not in takes:
            raise ValueError(
                f"{type(pipe).__name__} takes no {name}; it takes {', '.join(sorted(takes))}"
            )
    needed = [n for n, p in takes.items() if p.default is p.empty and n not in call]
    if needed:
        raise ValueError(
            f"{type(pipe).__name__} needs {', '.join(needed)}, got none; give it by its option, or "
            f"as --set {needed[0]}=..."
        )
    return call


def clock(device: torch.device) -> float:
    """Return the time, with the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
