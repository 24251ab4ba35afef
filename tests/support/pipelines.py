"""Complete tiny pipelines of diffusers, built and called as `recipes.RECIPES` says."""

import inspect
from typing import Any

import diffusers
import models
import recipes
import recipes_control
import recipes_video
import tiny
import torch
from model_case import find_class

import dbcache

STEPS = 6
RECIPES = recipes.RECIPES | recipes_control.RECIPES | recipes_video.RECIPES


def build(name: str) -> Any:
    """Return a tiny pipeline; those with one transformer in common share it."""
    recipe = RECIPES[name]
    cls = getattr(diffusers, recipe.pipeline)
    if recipe.changes:
        config = models.CASES[recipe.transformer].config | recipe.changes
        transformer = tiny.fill(find_class(recipe.transformer)(**config), seed=3)
    else:
        transformer = models.model(recipe.transformer)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    parts = {p.name: None for p in parameters if p.default is inspect.Parameter.empty}
    parts |= {"transformer": transformer, "scheduler": recipe.scheduler()}
    torch.manual_seed(0)
    parts |= {part: make() for part, make in recipe.parts.items()}
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(pipe: Any, name: str, *, guided: bool, accepts_all: bool = False) -> dict[str, Any]:
    """Return what a tiny pipeline is called with; its signature tells some, or `accepts_all`."""
    recipe = RECIPES[name]
    tensors: dict[str, Any] = {}
    for sign in ("", "negative_")[: 1 + guided]:
        for i, (key, shape) in enumerate(recipe.text.items(), 11 + 100 * bool(sign)):
            tensors[sign + key] = tiny.noise(*shape, seed=i)
        for key, tokens in recipe.masks.items():
            tensors[sign + key] = torch.ones(1, tokens, dtype=torch.bool)
    if recipe.as_lists:
        tensors = {key: list(value) for key, value in tensors.items()}
    accepted = inspect.signature(pipe.__call__).parameters
    tensors = {k: v for k, v in tensors.items() if accepts_all or k in accepted}
    if tensors and "negative_prompt" in accepted and accepted["negative_prompt"].default == "":
        tensors["negative_prompt"] = None
    more = {} if accepts_all else recipe.guided if guided else recipe.plain
    return recipe.call | more | tensors


@torch.no_grad()
def draw(
    pipe: Any, name: str, *, guided: bool, steps: int = STEPS, seed: int = 5, **more: Any
) -> torch.Tensor:
    """Call a tiny pipeline; return the latents, or what else comes out first."""
    options = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "return_dict": False,
    }
    prepare = RECIPES[name].prepare
    if prepare is not None:
        prepare(pipe, guided)
    torch.manual_seed(seed)  # some pipelines sample what their VAE makes without the generator
    output = pipe(**options | arguments(pipe, name, guided=guided) | more)[0]
    return torch.as_tensor(output)


def decisions(pipe: Any) -> list[tuple[str | None, str]]:
    """Return (branch, F for full and c for cached by step) of each lane."""
    return [
        (lane.branch, "".join("c" if s in lane.cached_steps else "F" for s in range(lane.steps)))
        for lane in dbcache.summary(pipe).lanes
    ]
