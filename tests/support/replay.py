"""What a cached step is to compute, in plain PyTorch around the model's own blocks."""

import contextlib
import inspect

import models
import torch


def _copied(values):
    """Return copies: the model's loop may write into what goes in and out of its blocks."""
    if isinstance(values, torch.Tensor):
        return values.clone()
    return None if values is None else tuple(map(_copied, values))


class Replay:
    """Middle blocks of a stack that add what they added on the last full step, in plain PyTorch.

    It wraps the forwards of the blocks. Which of two outputs is the hidden states' is told by the
    shape; the shapes of the two streams differ in all cases.
    """

    def __init__(self, blocks, names):
        self.blocks = blocks
        self.names = names
        self.forwards = [block.forward for block in blocks]
        self.signatures = [inspect.signature(forward) for forward in self.forwards]
        self.outputs = [None] * len(blocks)
        self.cached = False

    def __enter__(self):
        for i, block in enumerate(self.blocks):
            block.forward = lambda *args, i=i, **kwargs: self._forward(i, args, kwargs)
        return self

    def __exit__(self, *_):
        for block in self.blocks:
            del block.forward

    def _streams(self, i, args, kwargs):
        """Return hidden states and encoder states of a call (None where it has none)."""
        bound = self.signatures[i].bind(*args, **kwargs).arguments
        hidden, encoder = (*self.names, None)[:2]
        first = next(iter(bound.values()))
        text = bound.get(encoder)
        return bound.get(hidden, first), text if isinstance(text, torch.Tensor) else None

    def _forward(self, i, args, kwargs):
        streams = self._streams(i, args, kwargs)
        if i == 0:
            self.start = _copied(streams)
        is_last = i == len(self.blocks) - 1
        if not self.cached:
            output = self.forwards[i](*args, **kwargs)
            self.outputs[i] = _copied(output)
            if is_last:
                self.full_start = self.start
            return output
        if not is_last:
            return self._like(self.outputs[i], streams)
        # what goes in now, plus what came out on the full step less what went in then
        moved = [
            None if x is None or y is None else x - y
            for x, y in zip(self.start, self.full_start, strict=True)
        ]
        kept = self._by_stream(self.outputs[i])
        return self._like(
            self.outputs[i],
            [None if x is None else x + m for x, m in zip(kept, moved, strict=True)],
        )

    def _is_swapped(self, output):
        return output[0] is None or output[0].shape != self.full_start[0].shape

    def _by_stream(self, output):
        """Return (hidden states, encoder states or None) of what a block returned."""
        if isinstance(output, torch.Tensor):
            return output, None
        if len(output) == 1:
            return output[0], None
        return output[::-1] if self._is_swapped(output) else output

    def _like(self, output, streams):
        """Return the two streams in the form of `output`."""
        if isinstance(output, torch.Tensor):
            return streams[0]
        if len(output) == 1:
            return (streams[0],)
        streams = tuple(
            None if o is None else s for o, s in zip(self._by_stream(output), streams, strict=True)
        )
        return streams[: len(output)] if not self._is_swapped(output) else streams[::-1]


@contextlib.contextmanager
def replayed(name, fn, bn, transformer=None):
    """Replay the middle blocks of all stacks, of `models.model(name)` or another transformer."""
    with contextlib.ExitStack() as context:
        yield [
            context.enter_context(Replay(blocks[middle.start : middle.stop], names))
            for blocks, names, middle in zip(
                models.stacks_of(name, transformer),
                models.streams_of(name),
                models.middles_of(name, fn, bn, transformer),
                strict=True,
            )
        ]


class Branches:
    """Gives the replays of a transformer a memory for each branch of guidance.

    Args:
        replays: of its stacks.
        plan: (branch, whether cached) of each call.
    """

    def __init__(self, replays, plan):
        self.replays = replays
        self.plan = iter(plan)
        self.memories = {}

    def before(self, *_):
        """Turn to the branch of the call that begins."""
        self.branch, cached = next(self.plan)
        for i, replay in enumerate(self.replays):
            fresh = [None] * len(replay.blocks), None
            replay.outputs, replay.full_start = self.memories.get((self.branch, i), fresh)
            replay.cached = cached

    def after(self, *_):
        """Keep what the call left."""
        for i, replay in enumerate(self.replays):
            self.memories[self.branch, i] = replay.outputs, replay.full_start


@contextlib.contextmanager
def replayed_calls(name, fn, bn, transformer, plan):
    """Replay the middle blocks of all stacks over calls of several branches; see `Branches`."""
    with replayed(name, fn, bn, transformer) as replays:
        for replay in replays:
            replay.full_start = None
        branches = Branches(replays, plan)
        hooks = [
            transformer.register_forward_pre_hook(branches.before),
            transformer.register_forward_hook(branches.after),
        ]
        yield
        for hook in hooks:
            hook.remove()
