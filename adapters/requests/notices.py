"""What a request has to say, beside the lanes: each kind once, when it is known, and in summary.

Nothing here runs on each step: `begin_image` runs once per image, `end_image` or `close` after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from dbcache.adapters.patching.instance_method import EXPORTED
from dbcache.adapters.patching.other_caches import other_cache_of
from dbcache.adapters.requests import clock as clocks
from dbcache.adapters.requests.record import BLOCKS, RequestRecord, values_of
from dbcache.config.without_effect import without_effect
from dbcache.lanes.step_state import StepState
from dbcache.notices import nothing_cached, say

KINDS = {
    "blocks": BLOCKS,
    "gradients": (
        "{who}: gradients are on, and those through cached steps are those of a prediction; call "
        "it under torch.no_grad(), or switch the cache off (dbcache.disable) to train"
    ),
    "other cache": (
        "{who}: {cache} was enabled on the same model after dbcache: each skips what the other "
        "measures; remove one of them: {cure}, or dbcache.disable"
    ),
    "exchanged": (
        "{who}: the pipeline's transformer is another one than dbcache was enabled on, and runs "
        "without the cache, since {why}; call dbcache.enable on the pipeline again"
    ),
    "followed": (
        "{who}: the pipeline's transformer is another one than dbcache was enabled on, which goes "
        "on with it and the same settings; call dbcache.enable again for others"
    ),
    "steps": (
        "{who}: num_inference_steps={given} was given to dbcache, and the pipeline runs {ran} "
        "steps, which is what counts; leave it out"
    ),
    "branches": (
        "{who}: two conditionings took turns, in calls that have no name, and share one lane, so "
        "that a step may continue one of the other branch; put each call inside "
        "transformer.cache_context('cond') or 'uncond', or pass enable_separate_cfg=True"
    ),
    "mask": (
        "{who}: steps_computation_mask has {given} entries, and {ran} steps were run; make it as "
        "long as a request, or give it by name, as in 'medium'"
    ),
}
"""By kind, what is said of a request."""

TRANSFORMED = (
    "torch.func: {who} must be transformed (grad, jvp, vmap) without its cache, which would keep "
    "tensors that hold inside of the transform alone; call dbcache.disable on it first"
)

OUTSIDE = (
    "{who} was called outside of a call of the pipeline that dbcache was enabled on, and runs "
    "without the cache; enable the pipeline that calls it, or the transformer itself, or call "
    "dbcache.refresh_context first"
)
"""What is said of the first call that belongs to no request."""


MOST = 10
"""Requests of a transformer that say the same; those after them have it in their summaries."""


class Tally:
    """What all requests of a transformer add up to here.

    Attributes:
        begun: those that took a step.
        ended: those among them that were closed.
        said: how often each kind was said since the latest `enable`.
    """

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.said: Counter[str] = Counter()

    def say(self, kind: str, text: str, *, raises: bool = False) -> None:
        """Say it, unless too many requests have said the same."""
        self.said[kind] += 1
        if self.said[kind] <= MOST:
            is_last = self.said[kind] == MOST
            last = f" (said {MOST} times; from now on only in summary)" * is_last
            say(text + last, raises=raises)


class Notices:
    """What one request says.

    Attributes:
        is_over: all that is to be said of the image was said, or it was cut short.
        texts: what was said of the image under way, by kind.
        tally: of the requests of the transformer, this one among them.
        has_begun: it took a step.
        may_rerun: autograd may run forwards of the image again.
        last_step: steps after which an image is over that nobody ends; -1: that is not known.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.tally = Tally()
        self.has_begun = False
        self.last_step = -1
        self.may_rerun = False
        self.is_over = False

    def add(self, request: Any, kind: str, **values: Any) -> None:
        """Say something, once, and keep it for the summary."""
        if kind not in self.texts:
            who = type(request.module).__name__
            self.texts[kind] = KINDS[kind].format(who=who, **values)
            self.tally.say(kind, self.texts[kind], raises=not request.clock.calls)

    def begin_image(self, request: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Say what is known when the first step of an image begins."""
        module, clock = request.module, request.clock
        if torch.jit._trace.is_tracing():
            raise RuntimeError(EXPORTED.format(who=type(module).__name__))
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(TRANSFORMED.format(who=type(module).__name__))
        self.tally.begun += not self.has_begun
        self.has_begun = True
        if self.is_over:
            self.texts, self.is_over = {}, False
        self.may_rerun = False
        parameters = module.parameters() if torch.is_grad_enabled() else ()
        # under no_grad they may still be those of a checkpoint that comes back in backward
        self.look_for_gradients(request, (*args, *kwargs.values(), *parameters))
        self._look_for_other_caches(request)
        steps, given = clock.num_steps()[0], clock.config.num_inference_steps
        if clock.planned_steps is not None and given is not None and given != steps:
            self.add(request, "steps", given=given, ran=steps)
        self.last_step = -1 if clock.follows or steps is None else steps

    def look_for_gradients(self, request: Any, tensors: Iterable[Any]) -> None:
        """Note that `tensors`, which a forward was given or returned, need gradients."""
        if any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors):
            self.may_rerun = True
            if torch.is_grad_enabled() and any(map(may_cache, request.setup.stacks)):
                self.add(request, "gradients")

    def end_forward(
        self, request: Any, steps: list[Any], args: Any, kwargs: Any, output: Any
    ) -> None:
        """Keep what a forward did that backward may run again."""
        if not self.may_rerun:  # the first steps of an image may need none
            self.look_for_gradients(request, tree_leaves(output))
        if self.may_rerun:
            setup = request.setup
            setup.reruns.keep(setup, steps, args, kwargs)

    def _look_for_other_caches(self, request: Any) -> None:
        lists = [block_list.blocks for block_list in request.setup.lists]
        other = other_cache_of(request.module, lists)
        if other is not None:
            self.add(request, "other cache", cache=other[0], cure=other[1])

    def end_step(self, request: Any) -> None:
        """Note that a branch has taken the last step of its image."""
        if min(request.clock.branch_calls.values()) == self.last_step:
            self.end_image(request)

    def end_image(self, request: Any) -> None:
        """Say what is known of an image that is over, before the next one or after the last.

        Not while a graph is captured, which would hold what is read: then when the request ends.
        """
        if not self.is_over and not clocks.is_capturing():
            self.is_over = True
            self._say_of_lanes(request, RequestRecord.of(request), waits=True)

    def close(self, request: Any, record: RequestRecord) -> None:
        """Say what is known when the request ends, and add it to what is kept of it."""
        self.tally.ended += self.has_begun
        known = set(self.texts)
        if not request.clock.calls:
            self._look_for_other_caches(request)  # one that keeps calls from coming here
        elif not self.is_over:
            self._say_of_lanes(request, record, waits=False)
        new = [text for kind, text in self.texts.items() if kind not in known]
        record.notes += [text for text in new if text not in record.notes]

    def _say_of_lanes(self, request: Any, record: RequestRecord, *, waits: bool) -> None:
        """Say so if nothing was cached, and why.

        Args:
            request: whose image is over.
            record: of it.
            waits: for the device, where only that knows; else it is said when the record is read.
        """
        setup, clock = request.setup, request.clock
        if clock.mixes_branches:
            self.add(request, "branches")
        if not is_whole(clock):
            return
        if setup.stacks and not any(stack.entries for stack in setup.stacks):
            self.add(request, "blocks", **values_of(setup.stacks[0]))
            return
        mask, ran = setup.config.steps_computation_mask, max(clock.branch_calls.values())
        if isinstance(mask, list) and len(mask) != ran:
            self.add(request, "mask", given=len(mask), ran=ran)
        nothing = cached_nothing(request)
        if nothing is None and not waits:
            record.tally = self.tally
        elif nothing is not False:
            lanes = record.lanes()
            for text in nothing_cached(lanes[0].owner if lanes else "", lanes):
                self.tally.say("nothing cached", text)


def cached_nothing(request: Any) -> bool | None:
    """Return whether no step of a request was cached; None: only the device knows."""
    lanes = [lane for run in request.lane_set.runs for lane in run.lanes.values()]
    counts = [x.steps.counts for x in lanes if isinstance(x.steps, StepState) and x.steps.step]
    if any(count is not None and count[0] for count in counts):
        return False
    return None if None in counts or request.lane_set.is_captured else True


def may_cache(stack: Any) -> bool:
    """Whether the settings of a stack let any step be cached."""
    cache = stack.settings.cache
    is_static = cache.steps_computation_policy == "static"
    return bool(stack.entries) and (cache.threshold > 0 or is_static)


def is_whole(clock: Any) -> bool:
    """Whether a request ran all of its steps, as far as these are known."""
    steps = None if clock.shares_steps else clock.num_steps()[0]
    return clock.calls > 0 and (steps is None or max(clock.branch_calls.values()) >= steps)


def tell(setups: Sequence[Any], before: Sequence[Any] = ()) -> None:
    """Say which options of setups have no effect, but for what was said of those before."""
    known = {text for setup in before for text in texts_on_options(setup)}
    texts = {text: type(x.module).__name__ for x in setups for text in texts_on_options(x)}
    for text, who in texts.items():
        if text not in known:
            say(f"{who}: {text}")


def texts_on_options(setup: Any) -> list[str]:
    """Return texts on options of a setup that were given and have no effect."""
    each = [setup.base.modified(modifier) for modifier in setup.modifiers]
    texts = [text for settings in each for text in without_effect(settings)]
    if len(each) == 1 and "decision_scope" in setup.config.given and setup.stacks:
        texts.append("decision_scope has no effect: there is one block stack; leave it out")
    return list(dict.fromkeys(texts))
