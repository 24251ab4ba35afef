"""What `tune`, `sweep` and `compare` have in common: a pipeline, and prompts to draw with it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbcache.cli.outcome import DTYPES

DEMOS = ("digits", "digits-student", "moving-digits")
"""Stand for the small trained models that the package has."""


def add_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add the model and the prompts.

    Args:
        parser: of a command.
        several: whether there may be several numbers of steps.
    """
    parser.add_argument(
        "model", help=f"a folder or a hub id of a pipeline, or one of {', '.join(DEMOS)}"
    )
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument("--prompts", type=Path, help="a text file, a prompt per line")
    parser.add_argument("--pictures", type=int, default=6, help="of digits: how many draws")
    count: dict[str, Any] = {"nargs": "+"} if several else {}
    text = "denoising steps, one or several" if several else "denoising steps"
    parser.add_argument("--steps", type=int, default=28, help=f"{text} (default: 28)", **count)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--device", help="cpu or cuda; the GPU where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU")
    parser.add_argument("--quiet", action="store_true", help="no lines of progress")


def load(arguments: argparse.Namespace) -> tuple[Any, list[Any], dict[str, Any]]:
    """Return a pipeline, what to draw, and the other arguments of `tune` and `sweep`.

    Raises:
        ValueError: there are no prompts. OSError: a file or the model cannot be read.
    """
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    steps = arguments.steps
    if isinstance(steps, list) and len(steps) == 1:
        (steps,) = steps
    given: dict[str, Any] = {"num_inference_steps": steps}
    given["progress"] = not (arguments.quiet or arguments.json)
    if arguments.model in DEMOS:
        first = steps[0] if isinstance(steps, list) else steps
        pipe, drawing = demo(arguments.model, device)
        return pipe, [drawing(seed, first) for seed in range(arguments.pictures)], given
    prompts = list(arguments.prompt)
    if arguments.prompts is not None:
        lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError("--prompt or --prompts must be given, got neither")
    from dbcache.cli import pipelines

    pipe, where = pipelines.load(arguments)
    pipe.to(where)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": arguments.height, "width": arguments.width}
    call["guidance_scale"] = arguments.guidance_scale
    return pipe, prompts, given | {k: v for k, v in call.items() if v is not None}


def demo(name: str, device: str) -> tuple[Any, Callable[[int, int], Any]]:
    """Return a pipeline of `DEMOS`, and what makes of a seed and steps a function that draws."""
    from dbcache.demo import digits, moving_digits

    pipe: Any
    if name == "moving-digits":
        pipe, drawing = moving_digits.load_pipeline(device=device), videos_drawing
    else:
        weights = digits.STUDENT if name == "digits-student" else digits.WEIGHTS
        pipe, drawing = digits.load_pipeline(weights, device=device), digits_drawing
    pipe.set_progress_bar_config(disable=True)
    return pipe, drawing


def digits_drawing(seed: int, steps: int) -> Any:
    """Return a function that draws five digits, from 0 or from 5 on, in `steps` or as told."""
    import torch

    from dbcache.demo import digits

    def draw(pipe: Any, steps: int = steps) -> torch.Tensor:
        arguments = digits.prompt([(5 * seed + i) % digits.NUM_CLASSES for i in range(5)])
        generator = torch.Generator("cpu").manual_seed(seed)
        call = {"num_inference_steps": steps, "generator": generator}
        return digits.decode(pipe(**arguments, **call).images)

    return draw


def videos_drawing(seed: int, steps: int) -> Any:
    """Return a function that draws five videos of digits from 0 or from 5 on, as above."""
    import torch

    from dbcache.demo import moving_digits

    directions = list(moving_digits.DIRECTIONS)
    videos = [((5 * seed + i) % 10, directions[(seed + i) % len(directions)]) for i in range(5)]

    def draw(pipe: Any, steps: int = steps) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        call = {"num_inference_steps": steps, "generator": generator}
        return moving_digits.decode(pipe(**moving_digits.prompt(videos), **call).frames)

    return draw


def settings(text: str) -> dict[str, Any]:
    """Return options of `enable` from ``name=value,name=value``, or from a file.

    Raises:
        ValueError: an entry has no ``=``.
    """
    import dbcache
    from dbcache.cli.outcome import pair

    if text.endswith((".yaml", ".yml")):
        return dbcache.load_configs(text)
    if text.endswith(".json") and "=" not in text:
        return {"schedule": text}
    found = dict(map(pair, filter(None, text.split(","))))
    if "preset" in found:
        family, _, level = str(found.pop("preset")).partition(":")
        found = {**dbcache.preset(family, level or "balanced"), **found}
    return found
