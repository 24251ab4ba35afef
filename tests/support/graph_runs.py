"""What tests of graphs share: eager runs, recorded ones, and what both are compared by."""

from collections.abc import Callable
from typing import Any

import inside
import torch
from fake_driver import Graph
from tiny import FAMILIES, noise

import dbcache
from dbcache import BlockAdapter, ForwardPattern

FLUX = FAMILIES["flux"]
MODES = ("host", "device")
OPTIONS = {"Fn_compute_blocks": 1, "max_warmup_steps": 3, "residual_diff_threshold": 0.15}


def start(seed: int) -> torch.Tensor:
    """Return the noise that a FLUX loop begins with."""
    return noise(*FLUX.latent_shape, seed=seed)


def same(xs: list[torch.Tensor], ys: list[torch.Tensor]) -> bool:
    """Return whether two runs have the same outputs, to the last bit."""
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def traces(target: Any) -> list[tuple]:
    """Return (stack, branch, reasons, changes, left out blocks) of each lane, to the last bit."""
    lanes = dbcache.summary(target, logging=False).lanes
    return [(lane.stack, lane.branch, lane.reasons, lane.diffs, lane.pruned) for lane in lanes]


def graphs(target: Any) -> Any:
    """Return the graph executor of a transformer, or of what holds one."""
    return inside.graphs(target)


def recordings(target: Any) -> list:
    """Return what was recorded of a transformer, or of what holds one."""
    return list(graphs(target).recordings.values())


def branches(recording: Any) -> list:
    """Return the branches of a recording, in their order."""
    return [item for item in recording.replay.program if type(item).__name__ == "Branch"]


def conditional_nodes(graph: Graph) -> int:
    """Return how many IF nodes a graph has that a user captured."""
    return sum(node.kind.name.endswith("CONDITIONAL") for node in graph.nodes)


def decide_as_recorded(target: Any) -> None:
    """Make eager steps round as recorded ones: each block that is left out adds its own residual.

    Who has measured a change that branches share is still told as without graphs.
    """
    for stack in inside.stacks(target):
        by_device = stack.shared.by_device
        stack.prepare_recording()
        stack.shared.by_device = by_device


def eagerly(
    run: Callable, target: Any, *configs: Any, **options: Any
) -> tuple[list[torch.Tensor], list[tuple]]:
    """Enable without graphs and run; return the outputs and the traces."""
    dbcache.enable(target, *configs, **options)
    decide_as_recorded(target)
    return run(target), traces(target)


def both(
    run: Callable,
    build: Callable,
    *configs: Any,
    mode: str,
    known: dict | None = None,
    **options: Any,
) -> tuple[Any, list[tuple]]:
    """Run eagerly and recorded, each on a target of its own; check that they agree.

    Args:
        run: is given what `build` returned; returns the outputs.
        build: makes a transformer, a pipeline or a `BlockAdapter`.
        configs: for `enable`, as are the `options`.
        mode: of the graphs.
        known: keeps the eager run, which does not depend on the mode, for the next call.

    Returns:
        What was recorded, and the traces.
    """
    known = {} if known is None else known
    if not known:
        known["eager"] = eagerly(run, build(), *configs, **options)
    expected, eager = known["eager"]
    target = build()
    dbcache.enable(target, *configs, **options, cuda_graph=mode)
    got = run(target)
    assert traces(target) == eager
    assert same(got, expected)
    assert not graphs(target).reasons
    return target, eager


class Loop:
    """Steps of a model that change latents in place, as those must that a user captures.

    Args:
        model: a transformer with a cache.
        steps: of a loop.
        step: changes x at time t, ``step(x, t)``; an Euler step of FLUX where it is None.
        shape: of the latents.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        steps: int = 20,
        step: Callable | None = None,
        shape: tuple[int, ...] = FLUX.latent_shape,
    ) -> None:
        self.model, self.shape = model, shape
        self.times = [1.0 - i / steps for i in range(steps)]
        self.x, self.t = noise(*shape, seed=3), torch.ones(1)
        self.given = FLUX.arguments(start(0), 1.0, "cond")
        self.step = self._euler if step is None else step

    def _euler(self, x: torch.Tensor, t: torch.Tensor) -> None:
        given = self.given | {"hidden_states": x, "timestep": t}
        x.sub_(self.model(**given)[0] / len(self.times))

    @torch.no_grad()
    def one(self) -> None:
        """Take the step that is to serve all."""
        self.step(self.x, self.t)

    def whole(self) -> None:
        """Begin a request and take all its steps."""
        dbcache.refresh_context(self.model)
        for time in self.times:
            self.t.fill_(time)
            self.one()

    def run(self, seed: int) -> tuple[torch.Tensor, list[tuple]]:
        """Return the latents and the traces of a loop."""
        self.x.copy_(noise(*self.shape, seed=seed))
        self.whole()
        return self.x.clone(), traces(self.model)

    def replay(self, graph: Any, seed: int) -> tuple[torch.Tensor, list[tuple]]:
        """Return the same of a graph that `whole` was captured in."""
        self.x.copy_(noise(*self.shape, seed=seed))
        graph.replay()
        return self.x.clone(), traces(self.model)

    def replay_steps(
        self, graph: Any, seed: int, after: Callable = lambda: None
    ) -> tuple[torch.Tensor, list[tuple]]:
        """Return the same of a graph that `one` was captured in; `after` is called each time."""
        dbcache.refresh_context(self.model)
        self.x.copy_(noise(*self.shape, seed=seed))
        for time in self.times:
            self.t.fill_(time)
            graph.replay()
            after()
        return self.x.clone(), traces(self.model)


def agree(run: tuple[torch.Tensor, list[tuple]], other: tuple[torch.Tensor, list[tuple]]) -> bool:
    """Return whether two loops ended in the same latents and decided the same on all steps."""
    return run[1] == other[1] and torch.equal(run[0], other[0])


def two_stacks(model: torch.nn.Module) -> BlockAdapter:
    """Return an adapter of a FLUX whose lists of blocks decide apart."""
    return BlockAdapter(
        transformer=model,
        blocks=[model.transformer_blocks, model.single_transformer_blocks],
        forward_pattern=[ForwardPattern.Pattern_1, ForwardPattern.Pattern_1],
    )


def one_stream(model: torch.nn.Module, *names: str) -> BlockAdapter:
    """Return an adapter of a model whose blocks take hidden states alone."""
    return BlockAdapter(
        transformer=model,
        blocks=[getattr(model, name) for name in names or ("blocks",)],
        forward_pattern=[ForwardPattern.Pattern_3] * len(names or ("blocks",)),
    )


class Step(torch.nn.Module):
    """The smallest block whose weights its output tells."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(noise(4, 4, seed=seed))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + 0.1 * torch.tanh(hidden_states @ self.weight)
