"""What dbcache must compute, written a second time in plain torch and float64.

It shares no code with dbcache and works differently: one `Segment` stands in for a whole block
list and loops over the blocks itself. Slow, synchronous, and meant to be read.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

CACHED = ("static", "below threshold", "threshold is 1 or more")
"""The reasons for a cached step; all others are reasons for a full step."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The options of a cache, named as dbcache names them; `order` 0 is reuse."""

    Fn_compute_blocks: int = 1
    Bn_compute_blocks: int = 0
    Bn_compute_blocks_ids: tuple[int, ...] = ()
    non_compute_blocks_diff_threshold: float = 0.08
    residual_diff_threshold: float = 0.08
    max_warmup_steps: int = 4
    warmup_interval: int = 1
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    max_accumulated_residual_diff_threshold: float | None = None
    num_inference_steps: int | None = None
    steps_computation_mask: tuple[int, ...] | None = None
    steps_computation_policy: str = "dynamic"
    static_skip_probe: bool = False
    enable_separate_cfg: bool | None = None
    cfg_compute_first: bool = False
    cfg_diff_compute_separate: bool = True
    batch_reduce: str = "mean"
    important_condition_threshold: float = 0.0
    l1_hidden_states_diff_threshold: float = 0.0
    policy: str = "dbcache"
    retention_ratio: float = 0.0
    order: int = 0
    exact: bool = False
    sigma: float | None = None  # Hermite polynomials instead of powers


@dataclass
class Trace:
    """What one lane did on each of its steps."""

    full: list[bool] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    diffs: dict[int, float] = field(default_factory=dict)

    @property
    def cached_steps(self) -> list[int]:
        """Steps on which the middle blocks were skipped."""
        return [step for step, full in enumerate(self.full) if not full]


class Decider:
    """The order of checks, for one lane."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self.trace = Trace()
        self.accumulated = 0.0
        self.consecutive = 0

    def decide(self, diff: Callable[[], float | str]) -> bool:
        """Return whether this step is full; `diff()` is the change, or why there is none."""
        step = len(self.trace.full)
        reason, change = self._why(step, diff)
        full = reason not in CACHED
        if change is not None:
            self.trace.diffs[step] = change
        self.accumulated = 0.0 if full else self.accumulated + (change or 0.0)
        self.consecutive = 0 if full else self.consecutive + 1
        self.trace.full.append(full)
        self.trace.reasons.append(reason)
        return full

    def _why(self, step: int, diff: Callable[[], float | str]) -> tuple[str, float | None]:
        rule, mask = self.rule, self.rule.steps_computation_mask
        warmup = rule.max_warmup_steps
        retained = int(rule.retention_ratio * (rule.num_inference_steps or 0) + 0.5)
        if mask is not None:
            leading_ones = (*mask, 0).index(0)
            warmup, retained = min(warmup, leading_ones), min(retained, leading_ones)
        if step < retained or (step < warmup and step % rule.warmup_interval == 0):
            return "warm-up", None
        if mask is not None:
            if step < len(mask) and mask[step] == 1:
                return "mask", None
            if rule.steps_computation_policy == "static":
                change = diff()
                return (change if isinstance(change, str) else "static"), None
        if 0 <= rule.max_cached_steps <= len(self.trace.cached_steps):
            return "count limit", None
        if 0 <= rule.max_continuous_cached_steps <= self.consecutive:
            return "consecutive limit", None
        limit = rule.max_accumulated_residual_diff_threshold
        if limit is not None and limit > 0 and self.accumulated >= limit:
            return "accumulated limit", None
        change = diff()
        threshold = rule.l1_hidden_states_diff_threshold or rule.residual_diff_threshold
        if isinstance(change, str):
            return change, None
        if threshold <= 0:
            return "threshold is 0", None
        if math.isnan(change):
            return "NaN diff", None
        if rule.policy != "dbcache":
            is_below = self.accumulated + change < threshold
            return ("below threshold" if is_below else "above threshold"), change
        if threshold >= 1:
            return "threshold is 1 or more", change
        return ("below threshold" if change < threshold else "above threshold"), change


class Series:
    """The block residuals of a lane's full steps, and the forecast from them."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self.order = rule.order
        self.steps: list[int] = []
        self.values: list[torch.Tensor] = []

    def add(self, step: int, value: torch.Tensor) -> None:
        """Append the residual of a full step."""
        self.steps.append(step)
        self.values.append(value)

    def derivative(self, degree: int, index: int) -> torch.Tensor:
        """Return D(degree) at the snapshot `index`, by its recursive definition."""
        if degree == 0:
            return self.values[index]
        gap = self.steps[index] - self.steps[index - 1]
        newer = self.derivative(degree - 1, index)
        return (newer - self.derivative(degree - 1, index - 1)) / gap

    def forecast(self, step: int) -> torch.Tensor:
        """Return the prediction for `step`, k steps after the newest snapshot.

        sum_i k**i / i! * D(i), with sigma**i * H_i(sigma * k) for k**i if there is a sigma;
        or, if exact, the polynomial through the newest snapshots (Lagrange).
        """
        newest = len(self.steps) - 1
        if self.rule.exact:
            nodes = self.steps[-self.order - 1 :]
            pairs = zip(nodes, self.values[-self.order - 1 :], strict=True)
            return sum(
                math.prod((step - o) / (node - o) for o in nodes if o != node) * value
                for node, value in pairs
            )
        k = step - self.steps[newest]
        sigma = self.rule.sigma
        settled = sum(s >= 3 for s in self.steps)  # TaylorSeer waits, as in cache-dit
        order = self.order if sigma is not None else min(self.order, settled)
        terms = range(min(order, newest) + 1)
        if sigma is None:
            powers = [k**i for i in terms]
        else:
            x = sigma * k
            hermite = (1, 2 * x, 4 * x**2 - 2, 8 * x**3 - 12 * x)
            powers = [sigma**i * hermite[i] for i in terms]
        return sum(p / math.factorial(i) * self.derivative(i, newest) for i, p in enumerate(powers))


class Tail:
    """What the last blocks did on the last full step, and which of them are left out now."""

    def __init__(self, rule: Rule):
        count = rule.Bn_compute_blocks
        listed = rule.Bn_compute_blocks_ids or range(count)
        self.unlisted = [i for i in range(count) if i not in listed]
        self.threshold = rule.non_compute_blocks_diff_threshold
        self.before: dict[int, torch.Tensor] = {}
        self.after: dict[int, torch.Tensor] = {}
        self.encoder: dict[int, torch.Tensor] = {}
        self.growth: dict[int, float] = {}

    def store(self, i, before, after, encoder, encoder_after) -> None:
        """Keep what block `i` of the tail was given and returned, and how a change grew in it."""
        before, after = before.double(), after.double()
        if i in self.before:
            moved = (before - self.before[i]).abs().sum()
            grown = (after - self.after[i]).abs().sum()
            self.growth[i] = (grown / moved).item() if moved > 0 else 1.0
        self.before[i], self.after[i] = before, after
        if encoder is not None and encoder_after is not None:
            self.encoder[i] = encoder_after.double() - encoder.double()

    def choose(self, hidden: torch.Tensor) -> list[int]:
        """Return which blocks are left out, given what the first unlisted one gets."""
        chosen, factor = [], 1.0
        moved = (hidden.double() - self.before[self.unlisted[0]]).abs().mean()
        for i in range(self.unlisted[0], self.unlisted[-1] + 1):
            diff = (moved / self.before[i].abs().mean()).item() * factor
            if i in self.unlisted and diff < self.threshold:
                chosen.append(i)
            else:
                factor *= self.growth.get(i, 1.0)
        return chosen


class Lane:
    """Decisions and snapshots of one stream of steps."""

    def __init__(self, rule: Rule):
        self.decider = Decider(rule)
        self.reference: torch.Tensor | None = None
        self.shapes: tuple | None = None
        self.hidden = Series(rule)
        self.encoder = Series(rule)
        self.tail = Tail(rule)
        self.left_out: list[list[int]] = []


class Oracle:
    """Runs a model with its middle blocks cached. Use as a context manager around the calls.

    Args:
        model: transformer whose `lists` are treated as one chain of blocks.
        lists: names of its block lists, in the order they run.
        encoder_first: whether blocks return (encoder, hidden); None where they return hidden alone.
        rule: the options.
    """

    def __init__(self, model, lists: tuple[str, ...], encoder_first: bool | None, rule: Rule):
        self.model, self.lists, self.encoder_first, self.rule = model, lists, encoder_first, rule
        self.blocks = [block for name in lists for block in getattr(model, name)]
        self.calls = 0
        self.left_out: list[int] = []
        self.branch: str | None = None
        self.requests: list[dict[str | None, Lane]] = [{}]

    @property
    def lanes(self) -> dict[str | None, Trace]:
        """Traces of the newest request by branch, in the order the branches first ran."""
        return {branch: lane.decider.trace for branch, lane in self.requests[-1].items()}

    def new_request(self) -> None:
        """Forget everything that earlier steps left."""
        self.requests.append({})
        self.calls = 0

    def __enter__(self) -> "Oracle":
        self.originals = {name: self.model._modules[name] for name in self.lists}
        start = 0
        for name, blocks in self.originals.items():
            segment = Segment(self, start, start + len(blocks))
            self.model._modules[name] = torch.nn.ModuleList([segment])
            start += len(blocks)
        self.model.cache_context = self._named
        return self

    def __exit__(self, *_) -> None:
        self.model._modules.update(self.originals)
        del self.model.cache_context

    @contextmanager
    def _named(self, name: str, **_):
        self.branch = name
        yield
        self.branch = None

    def begin(self, hidden: torch.Tensor) -> None:
        """Find the lane of the call that now starts, and keep the stack's input."""
        branch = self.branch
        if branch is None and self.rule.enable_separate_cfg:
            order = ("uncond", "cond") if self.rule.cfg_compute_first else ("cond", "uncond")
            branch = order[self.calls % 2]
        lane = self.requests[-1].get(branch)
        if lane is not None and len(lane.decider.trace.full) == self.rule.num_inference_steps:
            self.new_request()
            lane = None
        self.calls += 1
        self.lane = lane or self.requests[-1].setdefault(branch, Lane(self.rule))
        self.step = len(self.lane.decider.trace.full)
        self.input = hidden.double()

    def after_probe(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Decide, knowing what the first blocks added."""
        lane, self.hidden, self.encoder = self.lane, hidden, encoder
        probe = hidden.double()
        if self.rule.l1_hidden_states_diff_threshold == 0:
            probe = probe - self.input

        # what a skipped block would have added must fit both streams
        shapes = (hidden.shape, None if encoder is None else encoder.shape)

        def change() -> float | str:
            if lane.reference is None:
                return "no reference"
            if lane.shapes != shapes:
                return "shape changed"
            if not self.rule.cfg_diff_compute_separate:
                first = next(iter(self.lanes.values()))
                if first is not lane.decider.trace and self.step in first.diffs:
                    return first.diffs[self.step]
            if self.rule.batch_reduce == "max":
                pairs = zip(probe, lane.reference, strict=True)
                return max(self.relative_l1(now, before) for now, before in pairs)
            return self.relative_l1(probe, lane.reference)

        self.full = lane.decider.decide(change)
        if self.full:
            if lane.shapes != shapes:
                lane.hidden, lane.encoder = Series(self.rule), Series(self.rule)
            lane.reference, lane.shapes = probe, shapes

    def relative_l1(self, now: torch.Tensor, before: torch.Tensor) -> float:
        """Return mean|now - before| / mean|before|, over the important tokens if there are any."""
        moved, size = (now - before).abs(), before.abs()
        least = self.rule.important_condition_threshold
        important = moved.mean(-1) / size.mean(-1) > least
        if least > 0 and important.any():
            moved, size = moved[important], size[important]
        return (moved.mean() / size.mean()).item()

    def run_of_tail(self, i, hidden, encoder, text, args, kwargs):
        """Run block `i` of the last ones, or leave it out; return the streams."""
        tail = self.lane.tail
        if i == tail.unlisted[0]:
            self.left_out = [] if self.full else tail.choose(hidden)
            self.lane.left_out.append(self.left_out)
        if not self.full and i in self.left_out:
            added = tail.after[i] - tail.before[i]
            if i in tail.encoder:
                encoder = (encoder.double() + tail.encoder[i]).to(encoder.dtype)
            return (hidden.double() + added).to(hidden.dtype), encoder
        returns_encoder = self.encoder_first is not None
        block = self.blocks[len(self.blocks) - self.rule.Bn_compute_blocks + i]
        out = block(hidden, encoder if returns_encoder else text, *args, **kwargs)
        out = (out, None) if not returns_encoder else out[::-1] if self.encoder_first else out
        if self.full:
            tail.store(i, hidden, out[0], encoder, out[1])
        return out

    def after_middle(self, hidden: torch.Tensor, encoder: torch.Tensor | None):
        """Store what the middle blocks added, or add the forecast of it."""
        if self.full:
            self.lane.hidden.add(self.step, hidden.double() - self.hidden.double())
            if encoder is not None:
                self.lane.encoder.add(self.step, encoder.double() - self.encoder.double())
            return hidden, encoder
        hidden = (self.hidden.double() + self.lane.hidden.forecast(self.step)).to(hidden.dtype)
        if encoder is not None:
            forecast = self.lane.encoder.forecast(self.step)
            encoder = (self.encoder.double() + forecast).to(encoder.dtype)
        return hidden, encoder


class FollowingOracle(Oracle):
    """Blocks of a later stack, all skippable but the last Bn, when `leader` says so.

    Enter it before its leader, and leave it after.
    """

    def __init__(self, leader: Oracle, lists: tuple[str, ...], encoder_first: bool | None):
        super().__init__(
            leader.model, lists, encoder_first, replace(leader.rule, Fn_compute_blocks=0)
        )
        self.leader = leader
        self.own_lanes: dict[int, Lane] = {}

    def __exit__(self, *_) -> None:
        self.model._modules.update(self.originals)

    def begin(self, hidden: torch.Tensor) -> None:
        """Take the step and the decision from the leader."""
        self.lane = self.own_lanes.setdefault(id(self.leader.lane), Lane(self.rule))
        self.step, self.full = self.leader.step, self.leader.full

    def after_probe(self, hidden: torch.Tensor, encoder: torch.Tensor | None) -> None:
        """Note what goes into the blocks."""
        self.hidden, self.encoder = hidden, encoder


class Segment(torch.nn.Module):
    """Stands in for the blocks `start` to `stop` of the chain."""

    def __init__(self, oracle: Oracle, start: int, stop: int):
        super().__init__()
        self.__dict__["oracle"] = oracle
        self.start, self.stop = start, stop

    def forward(self, hidden_states, encoder_hidden_states, *args, **kwargs):
        """Run the blocks of one list, except skipped ones."""
        oracle = self.oracle
        rule, count = oracle.rule, len(oracle.blocks)
        returns_encoder = oracle.encoder_first is not None
        hidden, encoder = hidden_states, encoder_hidden_states if returns_encoder else None
        first_tail = count - rule.Bn_compute_blocks
        has_probe = rule.policy == "dbcache" and not rule.static_skip_probe
        probe = rule.Fn_compute_blocks if has_probe else 0
        for i in range(self.start, self.stop):
            if i == 0:
                oracle.block_arguments = (args, kwargs)
                oracle.begin(hidden)
                if probe == 0:
                    oracle.after_probe(hidden, encoder)
            tail = i - first_tail
            if tail >= 0 and oracle.lane.tail.unlisted:
                hidden, encoder = oracle.run_of_tail(
                    tail, hidden, encoder, encoder_hidden_states, args, kwargs
                )
                continue
            if i < probe or i >= first_tail or oracle.full:
                text = encoder if returns_encoder else encoder_hidden_states
                out = oracle.blocks[i](hidden, text, *args, **kwargs)
                if not returns_encoder:
                    hidden = out
                elif oracle.encoder_first:
                    encoder, hidden = out
                else:
                    hidden, encoder = out
            if i == probe - 1:
                oracle.after_probe(hidden, encoder)
            if i == first_tail - 1:
                hidden, encoder = oracle.after_middle(hidden, encoder)
        if not returns_encoder:
            return hidden
        return (encoder, hidden) if oracle.encoder_first else (hidden, encoder)
