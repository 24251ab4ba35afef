"""A transformer that is spread over ranks: checked first, then installed, then undone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import AttentionBackendName

from dbcache.config.parallelism import ParallelismConfig
from dbcache.parallel.attention import SequenceAttention, must_divide_heads
from dbcache.parallel.extras import Extra, extras_of
from dbcache.parallel.guidance import PIPELINES, GuidanceSplit
from dbcache.parallel.mesh import Mesh, check_world, make_mesh, replica_axis, replica_size
from dbcache.parallel.plans import PLANS, TOKENS, PlanRow
from dbcache.parallel.processors import Site, reach
from dbcache.parallel.sequence import Each, PlanHooks, Shards, check_plan, input_entry, matching
from dbcache.parallel.tensor import SplitLayers
from dbcache.parallel.together import Ranks, Together


def prepare(
    modules: Sequence[torch.nn.Module],
    config: ParallelismConfig,
    pipe: object = None,
    groups: Sequence[Any] = (),
) -> list[Parallelized]:
    """Check that `config` fits each transformer, and return what installs it. No communication.

    Args:
        modules: the transformers.
        config: how they are spread.
        pipe: the pipeline that calls them; needed for `cfg_size` only.
        groups: process groups of other ranks that decide together with these.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        ValueError: sizes that do not multiply to the number of ranks, a model without a plan, heads
            or layers that cannot be split. Nothing is changed then.
    """
    if check_world(config)["cfg"] > 1 and type(pipe).__name__ not in PIPELINES:
        raise ValueError(
            f"ParallelismConfig: cfg_size=2 needs a pipeline that calls the transformer twice per "
            f"step, one of {', '.join(PIPELINES)}, got {type(pipe).__name__}; leave out cfg_size"
        )
    spread = [Parallelized(module, config, groups) for module in modules]
    spread[0].extras = extras_of(config, pipe, modules, Parallelized, replica_size(config))
    return spread


class Parallelized:
    """One transformer spread over ranks.

    Args:
        module: the transformer; all ranks have the same weights.
        config: how.
        groups: process groups of other ranks that decide together with these.
        row: how the class is spread; None: its row of `PLANS`.

    Attributes:
        extras: other modules that are spread and undone with this one.

    Raises:
        as `prepare`.
    """

    spreads = True

    def __init__(
        self,
        module: torch.nn.Module,
        config: ParallelismConfig,
        groups: Sequence[Any] = (),
        row: PlanRow | None = None,
    ) -> None:
        self.module = module
        self.config = config
        self.options = config.context
        self.who = type(module).__name__
        self.sizes = check_world(config)
        self.row = row or PLANS.get(self.who, PlanRow(layers=None))
        self.extras: Sequence[Extra] = ()
        self.splits_sequence = self.sizes["ulysses"] * self.sizes["ring"] > 1
        self.splits_guidance = self.sizes["cfg"] > 1
        self._check_free()
        self.together = Together(module, groups)
        self.together.look()  # what others have split; the DTensors of `tp_size` come later
        self._ranks = Ranks(self.together.ranks.groups)
        self.layers = self._layers()
        self.plan: dict[str, Any] = {}
        self.attentions: list[tuple[Any, tuple[str, ...]]] = []
        if self.splits_sequence:
            self.plan = self._plan()
            check_plan(module, self.plan, self.who)
            self.attentions = self._attentions()
            self._check_heads()
        self.mesh: Mesh | None = None
        self._shards: Shards | None = None
        self._hooks: PlanHooks | None = None
        self._processors: list[tuple[Any, Any]] = []

    def _check_free(self) -> None:
        if getattr(self.module, "_parallel_config", None) is not None:
            raise ValueError(
                f"{self.who}: must not be parallel already, got diffusers' enable_parallelism on "
                f"it; use one of the two"
            )
        config = getattr(self.module, "config", {})
        for name, values in self.row.rejected.items():
            if config.get(name) in values and self.splits_sequence:
                raise ValueError(
                    f"{self.who}: the sequence of a model with {name}={config[name]!r} cannot be "
                    f"split, since it treats tokens by their position; use tp_size"
                )

    def _layers(self) -> SplitLayers | None:
        if self.sizes["tp"] == 1:
            return None
        plan = self.row.layers
        if plan is None:
            plan = getattr(self.module, "_tp_plan", None)
        if not plan:
            raise ValueError(
                f"{self.who}: tp_size needs a plan of its layers, got none; known: "
                f"{', '.join(sorted(name for name, row in PLANS.items() if row.layers))}, and "
                f"classes with a _tp_plan"
            )
        return SplitLayers(self.module, plan, self.sizes["tp"], self.who)

    def _plan(self) -> dict[str, Any]:
        """Return what is split and gathered: the user's plan, the row's or diffusers'."""
        for plan in (
            self.options.cp_plan,
            self.row.sequence,
            getattr(self.module, "_cp_plan", None),
        ):
            if plan is not None:
                residuals = dict.fromkeys(self.row.residuals, Each(TOKENS))
                return {**plan, "": {**plan.get("", {}), **residuals}} if residuals else dict(plan)
        known = sorted(name for name, row in PLANS.items() if row.attention)
        raise ValueError(
            f"{self.who}: ulysses_size and ring_size need a plan of its sequence, got none; pass "
            f"cp_plan in parallel_kwargs; known: {', '.join(known)}, and classes with a _cp_plan"
        )

    def _attentions(self) -> list[tuple[Any, tuple[str, ...]]]:
        """Return the attention modules that see the whole sequence, with their streams."""
        found = [
            (module, streams)
            for pattern, streams in self.row.attention.items()
            for module in matching(self.module, pattern)
        ]
        if not found:
            raise ValueError(
                f"{self.who}: which attention modules see the whole sequence must be known, got no "
                f"row for this class; known: {', '.join(sorted(PLANS))}"
            )
        return found

    def _check_heads(self) -> None:
        size = self.sizes["ulysses"]
        for module, _ in self.attentions:
            heads = module.heads // self.sizes["tp"]
            if heads < size or (heads % size and not self.options.experimental_ulysses_anything):
                raise ValueError(must_divide_heads(self.who, heads, size))
            reach(type(module.processor), self.who)
            if self.options.experimental_ulysses_async and getattr(
                module, "fused_projections", False
            ):
                raise ValueError(
                    f"{self.who}: experimental_ulysses_async needs projections of their own, got "
                    f"fused ones; call unfuse_qkv_projections() first"
                )
        if self.options.experimental_ulysses_async and self.row.projections is None:
            known = sorted(name for name, row in PLANS.items() if row.projections)
            raise ValueError(
                f"{self.who}: experimental_ulysses_async must be off, got True; known for "
                f"{', '.join(known)}"
            )
        if self.options.attention_backend is not None:
            names = sorted(backend.value for backend in AttentionBackendName)
            if self.options.attention_backend not in names:
                raise ValueError(
                    f"ParallelismConfig.parallel_kwargs: attention_backend must be one of "
                    f"{', '.join(names)}, got {self.options.attention_backend!r}"
                )

    def install(self) -> None:
        """Spread the model, once; all ranks of the run must call this alike."""
        if self.mesh is not None:
            return
        try:
            self.mesh = make_mesh(self.config)
            self._ranks.add(self.mesh.groups)
            if self.together.votes and self.splits_sequence:
                self.together.ranks.add([self.mesh.sequence.group])
            if self.layers is not None:
                self.layers.install(self.mesh.tp)
            if self.splits_sequence:
                self._install_sequence(self.mesh)
            for extra in self.extras:
                extra.install(replica_axis(self.config))
        except BaseException:
            self.remove()
            raise

    @property
    def votes(self) -> bool:
        """Whether a decision takes a message."""
        return self.splits_sequence or self.together.votes

    @property
    def sees_whole(self) -> bool:
        """Whether each rank is given the latents of all that vote."""
        return not self.together.votes

    def meet(self, facts: Callable[[], Mapping[str, str]], device: torch.device) -> None:
        """See that all ranks of a replica begin a request alike.

        Args:
            facts: returns what must be the same on all of them.
            device: of the latents.

        Raises:
            ValueError: it is not.
        """
        if self.mesh is None:
            return
        self._ranks.check_equal(self.who, facts(), device)
        if self.together.votes:
            self.together.ranks.check_equal(self.who, facts(), device)

    def _install_sequence(self, mesh: Mesh) -> None:
        uneven = self.options.experimental_ulysses_anything or mesh.ulysses.size == 1
        shards = Shards(mesh.sequence, uneven=uneven, filled=self.row.filled, who=self.who)
        attention = SequenceAttention(mesh, self.options, shards)
        sites: dict[tuple[str, ...], Site] = {}
        for module, streams in self.attentions:
            new: Any
            if self.options.experimental_ulysses_async:
                new = self._async_processors()(attention, streams)
                new._attention_backend = module.processor._attention_backend
            else:
                new = sites.setdefault(streams, Site(attention, streams)).replacement(
                    module.processor
                )
            if self.options.attention_backend is not None:
                new._attention_backend = self.options.attention_backend
            self._processors.append((module, module.processor))
            module.processor = new
        self._hooks = PlanHooks(self.module, self.plan, shards)
        self._hooks.install()
        self._shards = shards

    def _async_processors(self) -> type[Any]:
        from dbcache.parallel.async_projections import PROJECTIONS

        assert self.row.projections is not None
        return PROJECTIONS[self.row.projections]

    def remove(self) -> None:
        """Undo all of it. Where weights are split, all ranks must call this alike."""
        for extra in reversed(self.extras):
            extra.remove()
        if self._hooks is not None:
            self._hooks.remove()
        for module, processor in self._processors:
            module.processor = processor
        self._hooks, self._shards, self._processors = None, None, []
        if self.layers is not None:
            self.layers.remove()
        self.mesh = None

    def new_request(self) -> Callable[[str | None, Callable[[], Any]], Any] | None:
        """Return what runs the calls of a request, here or on the rank of their guidance branch.

        The function takes the branch and what runs its call here, and returns the output. None
        where each rank runs all branches.
        """
        if not self.splits_guidance or self.mesh is None:
            return None
        return GuidanceSplit(self.mesh.cfg, self.who)

    def split_input(self, path: str, x: torch.Tensor, name: str = "hidden_states") -> torch.Tensor:
        """Return this rank's part of what goes into the module `path` as `name`, if it is split."""
        entry = input_entry(self.plan, path, name)
        if entry is None or self._shards is None:
            return x
        return self._shards.split_entry(x, entry, name)

    def vote(self, partials: torch.Tensor, *, per_sample: bool) -> torch.Tensor:
        """Return the sums of a step's change over the ranks that share a sequence, and only those.

        One message: 8 bytes, or 8 per sample; twice that where important tokens are told apart.
        A NaN on one rank is a NaN on all.

        Args:
            partials: what `probe_diff` gives, float32 (B, T, 2 or 4).
            per_sample: keep the samples apart, as `batch_reduce="max"` needs them.
        """
        assert self.mesh is not None
        if self.together.votes:
            return self.together.vote(partials, per_sample=per_sample)
        sums = partials.sum(1 if per_sample else (0, 1))
        dist.all_reduce(sums, group=self.mesh.sequence.group)
        return sums[:, None] if per_sample else sums[None, None]
