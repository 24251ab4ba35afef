"""`BlockAdapter`: says which blocks of which transformers are cached, and what they look like."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dbcache.adapters.blocks.block_list import BlockList
from dbcache.adapters.blocks.declared import declared
from dbcache.adapters.blocks.discover import find_blocks, guess_pattern, pattern_of
from dbcache.adapters.blocks.patterns import HIDDEN, STREAMS, ForwardPattern, Streams
from dbcache.adapters.blocks.signature import parameter_names, unwrap
from dbcache.adapters.blocks.spec import Fills, StackSpec, TransformerSpec
from dbcache.adapters.patching.patch_functor import Functor, check_functor
from dbcache.config.cache import ParamsModifier
from dbcache.config.options import check_flag, check_type, reject_unknown, shown, unknown
from dbcache.notices import say

BLOCKS = torch.nn.ModuleList


@dataclass(kw_only=True)
class BlockAdapter:
    """Describes any model to `dbcache.enable`.

    Each list of blocks is a stack with a decision of its own. For two transformers give lists of
    lists, one per transformer.

    Args:
        pipe: the pipeline whose calls are requests; without it see `dbcache.refresh_context`.
        transformer: the module, or a list of modules, whose forward runs the blocks.
        blocks: an `nn.ModuleList` of the transformer, a list of them, or one list per transformer.
        forward_pattern: the pattern of the blocks, in the same nesting as `blocks`; one alone
            holds for all.
        params_modifiers: what single stacks do differently, in the same nesting as `blocks`.
        streams: names of the parameters of the blocks that take the hidden states and, where they
            take any, the encoder states: one or two names for all, or such a tuple per stack, in
            the same nesting as `blocks`, as in ``[("img", "txt"), ("x",)]``.
        has_separate_cfg: calls alternate between two guidance branches, where nothing else tells
            them apart: no `cache_context`, no pipeline or one without a scheduler.
        fills: takes the keyword arguments of a call as a dictionary and tells whether the call is
            no denoising step, but one whose blocks keep keys and values for the loop that follows.
            It runs all blocks, and a request begins after it.
        long_skips: the last block takes, beside the streams, what the first one made, the last but
            one what the second made, and so on (U-ViT, HunyuanDiT). Then `Bn_compute_blocks` may be
            at most `Fn_compute_blocks`.
        patch_functor: a `PatchFunctor`, or a function of the transformer, that rewrites parts of
            the instance for as long as the cache is on, for blocks that follow no pattern.
        blocks_name: in place of `blocks`, their names as attributes of the transformer.
        check_forward_pattern: False leaves the blocks' signature unchecked.
        auto: find what was not given: `blocks`, the lists of blocks of the transformer that hold
            most of its parameters, each a stack of its own; `forward_pattern`, from the source
            of the blocks or, where that leaves it open, from the first forward, which is full.

    Raises:
        TypeError: an unknown option (the error names the nearest one).
        ValueError, TypeError: from `dbcache.enable`, for what does not fit together.
    """

    pipe: Any = None
    transformer: torch.nn.Module | Sequence[torch.nn.Module] | None = None
    blocks: Any = None
    forward_pattern: Any = None
    params_modifiers: Any = None
    streams: Any = STREAMS
    has_separate_cfg: bool = False
    fills: Fills | None = None
    long_skips: bool = False
    patch_functor: Functor | None = None
    auto: bool = False
    blocks_name: Any = None
    check_forward_pattern: bool | None = None

    def __new__(cls, *args: Any, **options: Any) -> Any:
        reject_unknown(cls.__name__, options, cls.__dataclass_fields__)
        return super().__new__(cls)

    def specs(self) -> list[TransformerSpec]:
        """Return what is to be cached, checked and in one shape."""
        transformers = self.transformers()
        check_flag("BlockAdapter.long_skips", self.long_skips)
        blocks = self._blocks(transformers)
        counts = [len(lists) for lists in blocks]
        said = (
            like_blocks(f"BlockAdapter.{name}", given, counts, kind)
            for name, given, kind in (
                ("forward_pattern", self.forward_pattern, ForwardPattern),
                ("params_modifiers", self.params_modifiers, ParamsModifier),
                ("streams", _stream_names(self.streams), Streams),
            )
        )
        specs = []
        for transformer, lists, *rows in zip(transformers, blocks, *said, strict=True):
            places = [find_list(transformer, blocks_) for blocks_ in lists]
            stacks = tuple(map(self._stack, places, *rows))
            specs.append(TransformerSpec(transformer, stacks, self.has_separate_cfg, self.fills))
        return specs

    def _blocks(self, transformers: list[torch.nn.Module]) -> list[list[Any]]:
        """Return the lists of blocks of each transformer: as they were given, by name, or found."""
        given, count = self.blocks, len(transformers)
        if given is None and self.blocks_name is not None:
            rows = _per_transformer("BlockAdapter.blocks_name", self.blocks_name, count)
            pairs = zip(transformers, rows, strict=True)
            return [[_named(transformer, name) for name in row] for transformer, row in pairs]
        if given is None and self.auto:
            pattern = self.forward_pattern
            check_type("BlockAdapter(auto=True).forward_pattern", pattern, ForwardPattern)
            return [find_blocks(transformer, pattern) for transformer in transformers]
        lists = [blocks for row in _rows(_entries(given)) for blocks in row]
        wrong = [blocks for blocks in lists if not isinstance(blocks, BLOCKS)]
        if wrong or not lists:
            got = type(wrong[0] if wrong else given).__name__
            raise TypeError(
                f"BlockAdapter.blocks must be a ModuleList of the transformer or a list of them, "
                f"got {got}; pass the attribute itself, as in transformer.transformer_blocks"
            )
        return _per_transformer("BlockAdapter.blocks", given, count)

    def _stack(self, where: BlockList, pattern: Any, modifier: Any, streams: Streams) -> StackSpec:
        """Return the stack of a list of blocks, checked against the pattern."""
        first = where.blocks[0]
        if self.auto:
            pattern, known = pattern or pattern_of(first), declared(first)
            if known is not None and known[0] is pattern and streams == STREAMS:
                streams = known[1]
        elif pattern is None:
            raise TypeError(
                f"BlockAdapter.forward_pattern must be one of {[p.name for p in ForwardPattern]}, "
                f"got None; give one, or auto=True"
            )
        if pattern is not None and self.check_forward_pattern is not False:
            pattern = _true_pattern(where, pattern, streams)
            check_signatures(where, pattern, streams)
        return StackSpec((where,), pattern, streams, long_skips=self.long_skips, modifier=modifier)

    def transformers(self) -> list[torch.nn.Module]:
        """Return the transformers, without what `torch.compile` wrapped around them."""
        given = self.transformer
        if given is None:
            given = getattr(self.pipe, "transformer", None)
        transformers = list(given) if isinstance(given, list | tuple) else [given]
        for transformer in transformers:
            if not isinstance(transformer, torch.nn.Module):
                raise TypeError(
                    f"BlockAdapter.transformer must be an nn.Module or a list of them, got "
                    f"{shown(transformer)}"
                )
        check_functor(self.patch_functor)
        if self.fills is not None and not callable(self.fills):
            raise TypeError(
                f"BlockAdapter.fills must be a function of a call's keyword arguments, as in "
                f'lambda call: call.get("return_kv", False), got {shown(self.fills)}'
            )
        return list(map(unwrap, transformers))


def _named(transformer: torch.nn.Module, name: Any) -> torch.nn.Module:
    """Return the list of blocks of that name."""
    known = [own for own, module in transformer.named_children() if isinstance(module, BLOCKS)]
    if name not in known:
        who = f"BlockAdapter.blocks_name of {type(transformer).__name__}"
        raise ValueError(unknown(who, name, known))
    return getattr(transformer, name)


def _per_transformer(who: str, given: Any, count: int) -> list[list[Any]]:
    """Bring entries (one, several, or rows of them) into a row per transformer."""
    entries = _entries(given)
    is_row = count == 1 and not any(map(_is_row, entries))
    rows = [list(entries)] if is_row else _rows(entries)
    if len(rows) != count:
        raise ValueError(f"{who} must have one entry per transformer, got {len(rows)} for {count}")
    if not all(rows):
        raise ValueError(f"{who} must have at least one list per transformer, got {given!r}")
    return rows


def _entries(given: Any) -> Any:
    return given if isinstance(given, list | tuple) else [given]


def _is_row(value: Any) -> bool:
    return isinstance(value, list | tuple) and not isinstance(value, Streams)


def _rows(given: Any) -> list[list[Any]]:
    """Return the entries of a list as rows: what is none becomes a row of one."""
    return [list(row) if _is_row(row) else [row] for row in given]


def like_blocks(who: str, given: Any, counts: list[int], kind: type) -> list[list[Any]]:
    """Bring `given` into the nesting of the blocks; one alone (or none) holds for all."""
    if given is None or isinstance(given, kind):
        return [[given] * count for count in counts]
    if not isinstance(given, list | tuple):
        raise TypeError(f"{who} must be a {kind.__name__} or a list of them, got {shown(given)}")
    is_flat = not any(map(_is_row, given))
    nested = [list(given)] if is_flat else _rows(given)
    if is_flat and len(given) == sum(counts):
        flat = iter(given)
        nested = [list(itertools.islice(flat, count)) for count in counts]
    if [len(row) for row in nested] != counts:
        raise ValueError(
            f"{who} must have one entry per block stack, got {[len(row) for row in nested]} for "
            f"{counts} (stacks of each transformer)"
        )
    for entry in itertools.chain(*nested):
        check_type(f"{who}: each entry", entry, kind)
    return nested


def _true_pattern(where: BlockList, pattern: ForwardPattern, streams: Streams) -> ForwardPattern:
    """Return the pattern that the source of a block shows where it returns other streams."""
    seen = guess_pattern(where.blocks[0])
    if seen is None or streams != STREAMS or seen.returns in (pattern.returns, (HIDDEN,)):
        return pattern
    say(
        f"BlockAdapter: {where.path} was given as {pattern.name}, but its blocks return "
        f"({', '.join(seen.returns)}), which is {seen.name}; goes on with that. FLUX's single "
        f"blocks returned one stream up to diffusers 0.34; give forward_pattern={seen.name}"
    )
    return seen


def _stream_names(given: Any) -> Any:
    """Return `Streams`, or lists of them in the nesting of `given`.

    One name alone leaves the other stream its usual name.
    """
    names = list(given) if isinstance(given, list | tuple) else [given]
    if names and all(isinstance(name, list | tuple) for name in names):
        return [_stream_names(name) for name in names]
    if not 1 <= len(names) <= 2 or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"BlockAdapter.streams must be the names of one or two parameters of the blocks, as in "
            f'("hidden_states", "audio_hidden_states"), or such a tuple per stack, got '
            f"{shown(given)}"
        )
    return Streams(*names)


def find_list(transformer: torch.nn.Module, blocks: torch.nn.ModuleList) -> BlockList:
    """Return the place at which `transformer` holds `blocks`."""
    for path, module in transformer.named_modules():
        if module is blocks:
            if not len(blocks):
                raise ValueError(f"{path}: must hold at least one block, got none")
            return BlockList(transformer, path)
    raise ValueError(
        f"BlockAdapter.blocks must be lists of {type(transformer).__name__} itself, got a "
        f"{type(blocks).__name__} of {len(blocks)} that is none of its modules; pass the "
        f"attribute, not a copy or a slice"
    )


def check_signatures(block_list: BlockList, pattern: ForwardPattern, streams: Streams) -> None:
    """Raise if a block cannot be called with the streams that the pattern names."""
    taken = streams[: len(pattern.takes)]
    for index, block in enumerate(block_list.blocks):
        names = parameter_names(block)
        # under the usual names the first two parameters count, whatever they are called
        lacks = not set(taken) <= set(names) | set(STREAMS) or len(names) < len(taken)
        if lacks and not {"args", "kwargs"} & set(names):
            raise ValueError(
                f"{block_list.path}[{index}] ({type(block).__name__}): a block of {pattern.name} "
                f"must take ({', '.join(taken)}), got ({', '.join(names)})"
            )
