"""Tests of graphs that a GPU runs with CUDA's graphs and the CPU with tapes (`tape.py`).

Each check fails where nothing or everything is cached: a loop that never skips a block proves
nothing about the recorded branch that does.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_loops import (
    OPTIONS,
    SIDE,
    STEPS,
    WARMUP_STEPS,
    build,
    draw,
    guided_loop,
    inputs,
    loop,
    start,
)
from graph_runs import decide_as_recorded, graphs, same, traces

import dbcache
from dbcache import GraphOptions


def check_window(model: torch.nn.Module, least: int = 1, steps: int = STEPS) -> None:
    """See to it that steps of both kinds came after the warm-up, on all lanes.

    Args:
        model: has run a request with a cache.
        least: fewest steps of each kind.
        steps: of the request.
    """
    lanes = dbcache.summary(model).lanes
    assert lanes
    for lane in lanes:
        cached = len(lane.cached_steps)
        assert lane.steps == steps
        assert least <= cached <= steps - WARMUP_STEPS - least, (lane.counts, lane.percentiles)
        if lane.pruned is not None:
            assert 0 < lane.pruned_ratio < 1


def check_modes_agree(
    run: Callable, options: dict[str, Any], mode: str, device: str, steps: int = STEPS
) -> None:
    """Compare two recorded requests with an eager one: outputs and decisions, to the last bit."""
    model = build(device)
    dbcache.enable(model, **options)
    decide_as_recorded(model)
    expected = run(model, steps)
    decided = traces(model)
    check_window(model, least=2 if steps < STEPS else 6, steps=steps)
    dbcache.enable(model, **options, cuda_graph=mode)
    for _ in range(2):
        got = run(model, steps)
        assert traces(model) == decided
        assert same(got, expected)
        dbcache.refresh_context(model)
    assert not graphs(model).reasons
    assert graphs(model).replays == 2 * len(expected) - len(decided), "one eager call per branch"


def check_loop(options: dict[str, Any], mode: str, device: str, steps: int = STEPS) -> None:
    """One branch."""
    check_modes_agree(loop, options, mode, device, steps)


def check_guided_loop(options: dict[str, Any], mode: str, device: str, steps: int = STEPS) -> None:
    """Two branches that share a change."""
    check_modes_agree(guided_loop, options, mode, device, steps)


def prepared_steps(device: Any) -> list[dict[str, Any]]:
    """Return the inputs of ten steps that do not depend on outputs; some of them are cached."""
    x, change = start(device), draw(1, SIDE**2, 16, seed=5, device=device)
    # latents that stay would give EasyCache nothing to go by
    return [inputs(x + 0.02 * step * change, 1 - step / STEPS) for step in range(10)]


def check_user_capture(
    options: dict[str, Any], device: str, capture: Callable, steps: int = STEPS
) -> None:
    """A loop that the user captures as a whole ends where an eager one does.

    Args:
        options: for `enable`.
        device: of the model.
        capture: is given a function; returns a graph that does what the function does.
        steps: of the loop.
    """
    model = build(device)
    dbcache.enable(model, **options)
    decide_as_recorded(model)
    expected = loop(model, steps)[-1]
    decided = traces(model)
    check_window(model, least=2 if steps < STEPS else 6, steps=steps)
    x = start(device)
    arguments = [inputs(x, 1 - step / STEPS) for step in range(steps)]
    last = torch.empty_like(expected)

    @torch.no_grad()
    def whole() -> None:
        dbcache.refresh_context(model)
        for given in arguments:
            output = model(**given)[0]
            x.sub_(output * (2 / STEPS))
        last.copy_(output)

    graph = capture(whole)
    for _ in range(2):
        x.copy_(start(device))
        last.fill_(float("nan"))
        graph.replay()
        assert torch.equal(last, expected)
        assert traces(model) == decided


def check_memory(
    mode: str,
    device: str,
    held: Callable[[], tuple[int, ...]],
    most: tuple[int, ...],
    steps: int = STEPS,
) -> torch.nn.Module:
    """After the first of five requests, none holds on to more.

    Args:
        mode: of the graphs.
        device: of the model.
        held: waits for the device; returns kinds of memory that are in use.
        most: what each may grow by, in bytes.
        steps: of a request.

    Returns:
        the model, with its recording.
    """
    model = build(device)
    dbcache.enable(model, **OPTIONS, cuda_graph=mode)
    loop(model, steps)
    before = held()
    check_window(model, least=2 if steps < STEPS else 6, steps=steps)
    for _ in range(4):
        dbcache.refresh_context(model)
        loop(model, steps)
    after = held()
    assert graphs(model).replays == 5 * steps - 1
    assert all(x <= y + z for x, y, z in zip(after, before, most, strict=True)), (before, after)
    return model


def check_memory_of_recordings(
    mode: str, device: str, held: Callable[[], tuple[int, ...]], most: tuple[int, ...]
) -> None:
    """After the third of eight recordings that are given up, none leaves more behind."""
    model = build(device)
    dbcache.enable(model, **OPTIONS, cuda_graph=mode)
    seen = []
    for _ in range(8):
        dbcache.refresh_context(model)
        loop(model, 6)
        assert graphs(model).recordings
        graphs(model).retire()
        assert not graphs(model).recordings
        seen.append(held())
    assert all(x <= y + z for x, y, z in zip(seen[-1], seen[2], most, strict=True)), seen


def check_broken_capture(
    mode: str, other: str, device: str, use: Callable[[], object] = lambda: None
) -> None:
    """Reading a value breaks a capture, which PyTorch by itself does not clean up after.

    Args:
        mode: of the graphs, "auto" or one by name.
        other: mode of those that are recorded afterwards.
        device: of the model.
        use: does with the device what a capture that was left open would refuse.
    """
    model = build(device)
    hook = model.transformer_blocks[1].register_forward_hook(
        lambda module, args, output: (
            output[0] * (2 if output[0].abs().max().item() < 0 else 1),
            output[1],
        )
    )
    dbcache.enable(model, **OPTIONS)
    decide_as_recorded(model)
    expected = loop(model, 8)
    dbcache.enable(model, **OPTIONS, cuda_graph=mode)
    if mode == "auto":
        with pytest.warns(UserWarning, match="runs eagerly"):
            got = loop(model, 8)
        assert same(got, expected)
    else:
        with pytest.raises(RuntimeError, match="is impossible here"):
            loop(model, 8)
    assert not graphs(model).recordings
    use()
    hook.remove()
    dbcache.enable(model, **OPTIONS, cuda_graph=other)
    again = loop(model, 8)
    assert same(again, expected)
    assert graphs(model).replays == 7


def check_new_shapes(mode: str, device: str) -> None:
    """With room for one recording, calls of another shape give it up; results stay the same."""
    model = build(device)
    dbcache.enable(model, **OPTIONS)
    decide_as_recorded(model)
    expected = loop(model, 8)
    check_window(model, steps=8)
    options = GraphOptions(mode=mode, max_recordings=1)
    dbcache.enable(model, **OPTIONS, cuda_graph=options)
    first = loop(model, 8)
    with torch.no_grad():
        dbcache.refresh_context(model)
        for _ in range(4):
            big = inputs(start(device).repeat(2, 1, 1), 0.5)
            for name in ("encoder_hidden_states", "pooled_projections", "timestep"):
                big[name] = big[name].repeat(2, *[1] * (big[name].dim() - 1))
            model(**big)
    assert graphs(model).retired == 1
    dbcache.refresh_context(model)
    again = loop(model, 8)
    assert same(first, expected)
    assert same(again, expected)
