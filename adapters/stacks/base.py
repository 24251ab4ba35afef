"""The blocks of a stack as all requests see them: in which order they run, what stands for each."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from dbcache.adapters.blocks.block_list import Entry
from dbcache.adapters.blocks.patterns import ENCODER
from dbcache.adapters.blocks.spec import StackSpec
from dbcache.adapters.signals.measurements import SOURCES, Source
from dbcache.adapters.stacks.input_copies import KnownLoop
from dbcache.adapters.stacks.proxies import BlockProxy
from dbcache.adapters.stacks.prunable_blocks import PrunableBlocks
from dbcache.adapters.stacks.stack_run import StackRun
from dbcache.config.cache import StackSettings
from dbcache.config.checks import prepare
from dbcache.config.policies import POLICIES
from dbcache.lanes.sharding import Sharding
from dbcache.notices import say


class BlockStack:
    """Blocks that share one decision: one list, or a chain of lists that follow one another.

    Nothing of a request or of a step is kept here.

    Args:
        spec: the chain, in the order in which the forward runs it. If it is interleaved, the
            forward runs a block of each list in turn and rearranges the tokens in between (Latte:
            spatial, temporal). Fn and Bn then count rounds, and the middle ends after the first
            block of its last round: it gives back the arrangement that it got.
        settings: checked settings; Fn and Bn are clamped to the number of blocks, with a warning.
        index: place of the stack in its transformer.
        leader: the stack whose decisions this one takes over, without a probe of its own: Fn is 0.

    Attributes:
        entries: what stands for each list, as rows.
        has_own_encoder: the encoder states of a step are not those that blocks are given: they are
            made by the blocks, or none.
        makes_encoder: blocks return encoder states, and are given none.
        is_checked: a forward has compared what the blocks return with the pattern.
        loops: what is known of the model's loop, by the names of the model's inputs.
        generation: grows when blocks were exchanged; what was stored before no longer holds.
        sharding: ranks that vote on decisions; None where each decides for itself.
        recorder: notes of full steps what a calibration is made of.
        single_blocks: those that may be left out one by one; None without.
        fuses: of such neighbours that are left out only the last one returns what it would have.
    """

    step: Any
    """Class of the steps: made with the stack, what the request keeps, the branch, the forward."""

    KNOWN: tuple[str, ...] = ("entries", "generation", "is_checked", "loops", "single_blocks")
    """Attributes that hold what is known of the blocks."""

    single_blocks: PrunableBlocks | None = None
    fuses = False

    def __init__(
        self,
        spec: StackSpec,
        settings: StackSettings,
        index: int,
        leader: BlockStack | None = None,
    ) -> None:
        assert spec.pattern is not None
        self.spec = spec
        self.lists = list(spec.lists)
        self.round = len(self.lists) if spec.interleaved else 1
        self.pattern = spec.pattern
        self.streams = spec.streams
        self.name = spec.name
        # Pattern_2 takes encoder states, and returns none
        takes, returns = ENCODER in self.pattern.takes, ENCODER in self.pattern.returns
        self.has_own_encoder = not (takes and returns)
        self.makes_encoder = returns and not takes
        self.index = index
        self.leader = leader
        self.settings = prepare(settings, self.lists[0].owner, self.name)
        self.generation = 0
        self.sharding: Sharding | None = None
        self.recorder: Any = None
        self.fn, self.bn = self._clamp()
        self.check()
        self.make_source()  # raises now if the policy does not know the model
        self.loops: dict[frozenset[str], KnownLoop] = defaultdict(KnownLoop)
        self.entries = self.make_entries()
        self.is_checked = False

    @property
    def num_blocks(self) -> int:
        """How many blocks all lists have."""
        return sum(len(block_list.blocks) for block_list in self.lists)

    def in_order(self) -> list[torch.nn.Module]:
        """Return the blocks in the order in which the forward runs them."""
        lists = [block_list.blocks for block_list in self.lists]
        turns = lists if self.round == 1 else zip(*lists, strict=True)
        return [block for blocks in turns for block in blocks]

    def is_skipped(self, position: int) -> bool:
        """Whether a cached step leaves out the block at `position`."""
        return self.fn <= position <= self.last_middle

    @property
    def last_middle(self) -> int:
        """Position of the last block that a cached step leaves out."""
        return self.num_blocks - self.bn - 1

    @property
    def geometry(self) -> tuple[object, ...]:
        """Which blocks run always, and which may be skipped."""
        form = (type(self), self.name, self.pattern, self.streams, self.round, self.leader is None)
        single = self.single_blocks
        return (*form, self.fn, self.bn, None if single is None else single.start, *self.prunable)

    @property
    def prunable(self) -> list[bool]:
        """Which of the single blocks may be left out, from the first of them to the last."""
        return [] if self.single_blocks is None else self.single_blocks.prunable

    @property
    def recorded(self) -> tuple[object, ...]:
        """What buffers and recorded work depend on."""
        return (*self.geometry, *self.settings.recorded)

    def inherit(self, old: Any) -> None:
        """Take over what is known of the blocks from a stack of the same geometry."""
        for name in self.KNOWN:
            setattr(self, name, getattr(old, name))

    def check(self) -> None:
        """Raise a ValueError if the settings do not go with the blocks."""
        if self.spec.long_skips and self.bn > self.fn:
            # a block that always runs would take what a block that may be skipped has to make
            raise ValueError(
                f"{type(self.lists[0].owner).__name__}.{self.name}: Bn_compute_blocks must be at "
                f"most Fn_compute_blocks, got {self.bn} and {self.fn}: long skip connections feed "
                f"what the first blocks make to the last ones; raise Fn_compute_blocks"
            )

    def _clamp(self) -> tuple[int, int]:
        """Return Fn and Bn as they can be run."""
        cache, total = self.settings.cache, self.num_blocks
        fn = min(self.round * cache.probe_blocks, total) if self.leader is None else 0
        bn = min(self.round * (cache.Bn_compute_blocks + 1) - 1, total - fn)
        if fn + bn == total:
            wanted = f"Fn={cache.probe_blocks}, Bn={cache.Bn_compute_blocks}"
            say(
                f"{self.name}: {wanted} leaves none of the {total} blocks to skip; runs Fn={fn}, "
                f"Bn={bn}: every block on every step. Lower Fn_compute_blocks to cache here"
            )
        return fn, bn

    def make_entries(self) -> list[list[Entry]]:
        """Return what stands for each list; nothing where all blocks always run."""
        raise NotImplementedError

    def kind_of(self, position: int) -> type[BlockProxy]:
        """Return what stands for the block at `position` of the stack."""
        raise NotImplementedError

    def rows(self) -> list[list[Entry]]:
        """Return a row per list of what stands for its blocks."""
        rows: list[list[Entry]] = []
        start = 0
        for block_list in self.lists:
            row: list[Entry] = []
            for index, block in enumerate(block_list.blocks):
                position = start + index * self.round
                who = f"{block_list.path}[{index}] ({type(block).__name__})"
                row.append(self.kind_of(position)(self, block, who, position))
            rows.append(row)
            start += len(row) if self.round == 1 else 1
        return rows

    def take_up_blocks(self) -> None:
        """Take up the blocks that the model has now."""
        for block_list in self.lists:
            block_list.read()
        self.fn, self.bn = self._clamp()
        self.entries, self.is_checked = self.make_entries(), False
        self.generation += 1
        self.loops.clear()

    def forget_checks(self) -> None:
        """Let blocks that were checked stand for themselves."""
        self.is_checked = True
        self.entries = [
            [entry.block if type(entry) is BlockProxy else entry for entry in row]
            for row in self.entries
        ]

    def make_source(self) -> Source | None:
        """Return what a policy without a probe measures; None where it is the probe, or follows."""
        if self.leader is not None:
            return None
        first = self.lists[0]
        kind = SOURCES.get(POLICIES[self.settings.cache.policy].measures)
        return None if kind is None else kind(self.name, first.owner, first.blocks[0])

    def new_lane(self, run: StackRun, branch: str | None, device: torch.device, step: Any) -> Any:
        """Return a lane for a branch that has none; `step` is the one under way."""
        raise NotImplementedError

    def fits(self, lane: Any) -> bool:
        """Whether what a lane keeps of single blocks fits these."""
        return self.prunable == ([] if lane.tail is None else lane.tail.blocks.prunable)

    def check_recordable(self, settings: StackSettings) -> None:
        """Raise a ValueError if the stack's steps cannot be recorded as graphs."""

    def prepare_recording(self) -> None:
        """Get ready for steps that are recorded as graphs; raise a ValueError if they cannot be."""
        self.check_recordable(self.settings)

    def pruned_blocks(self, lane: Any) -> Any:
        """Return nothing: whole steps are cached."""
        return None
