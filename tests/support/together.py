"""Runs things at the same time: threads that are switched as often as can be, requests in turn."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import tiny
import torch

import dbcache

FLUX = tiny.FAMILIES["flux"]
OPTIONS = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.2}


@contextmanager
def hasty(interval: float = 1e-5) -> Iterator[None]:
    """Let Python switch threads after `interval` seconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run `jobs` in a thread each, started together; return what they returned.

    Raises:
        BaseException: the first error of a job.
    """
    start = threading.Barrier(len(jobs))
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []

    def run(index: int, job: Callable[[], Any]) -> None:
        try:
            start.wait(60)
            results[index] = job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(jobs)]
    with hasty():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
    return results


def same(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor]) -> bool:
    """Return whether two runs have the same outputs, to the last bit."""
    return len(xs) == len(ys) and all(map(torch.equal, xs, ys))


def siblings(pipe: Any, count: int) -> list[Any]:
    """Return pipelines that share all of `pipe` but the scheduler; `pipe` is the first."""
    pipes = [pipe]
    for _ in range(count - 1):
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        parts = dict(pipe.components, scheduler=scheduler)
        config = {k: v for k, v in pipe.config.items() if k in ("boundary_ratio",)}
        pipes.append(type(pipe)(**parts, **config))
        pipes[-1].set_progress_bar_config(disable=True)
    return pipes


def euler(
    model: torch.nn.Module,
    steps: int,
    *,
    seed: int,
    shape: tuple[int, ...] = FLUX.latent_shape,
    inside: Callable[[str], Any] = lambda branch: nullcontext(),
    branches: tuple[str, ...] = ("cond",),
    family: tiny.Family = FLUX,
) -> Iterator[list[torch.Tensor]]:
    """Take a denoising loop a step at a time; yield the outputs of the branches of each step.

    Args:
        model: a transformer.
        steps: of the loop.
        seed: of the noise.
        shape: of the latents.
        inside: returns the context of a call of a branch.
        branches: in the order of their calls.
        family: how the model is called.
    """
    x = tiny.noise(*shape, seed=seed)
    for step in range(steps):
        outputs = []
        for branch in branches:
            with torch.no_grad(), inside(branch):
                outputs.append(model(**family.arguments(x, 1.0 - step / steps, branch))[0])
        velocity = outputs[0]
        if len(outputs) == 2:
            velocity = outputs[1] + tiny.CFG_SCALE * (outputs[0] - outputs[1])
        x = x - velocity / steps
        yield outputs


def flat(outputs: Iterator[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Return all outputs of a loop."""
    return [x for step in outputs for x in step]


def decisions(target: Any) -> list[str]:
    """Return F for full and c for cached steps, per lane of the request that closed last."""
    return pattern(dbcache.summary(target, logging=False))


def pattern(summary: Any) -> list[str]:
    """Return F for full and c for cached steps, per lane of a summary."""
    return [
        "".join("c" if s in lane.cached_steps else "F" for s in range(lane.steps))
        for lane in summary.lanes
    ]
