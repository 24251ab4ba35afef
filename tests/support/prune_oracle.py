"""What DBPrune must compute, written a second time in plain torch and float64.

It shares no code with dbcache: it replaces the forward of each block by one that runs the block or
adds what the block added before, one after the other, and keeps every tensor that it estimates.
`exact=True` waits for each block and compares its real input, as cache-dit does.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from oracle import Decider, Rule


@dataclass(frozen=True, kw_only=True)
class PruneRule:
    """The options of DBPrune, named as dbcache names them."""

    Fn_compute_blocks: int = 1
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.08
    max_warmup_steps: int = 3
    warmup_interval: int = 1
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    steps_computation_mask: tuple[int, ...] | None = None
    steps_computation_policy: str = "dynamic"
    enable_separate_cfg: bool = False
    cfg_diff_compute_separate: bool = True
    batch_reduce: str = "mean"
    non_prune_block_ids: tuple[int, ...] = ()
    enable_dynamic_prune_threshold: bool = False
    max_dynamic_prune_threshold: float | None = None
    dynamic_prune_threshold_relax_ratio: float = 1.25
    residual_cache_update_interval: int = 1

    @property
    def of_steps(self) -> Rule:
        """The part that whole steps go by."""
        names = Rule.__dataclass_fields__.keys() & PruneRule.__dataclass_fields__.keys()
        return Rule(**{name: getattr(self, name) for name in names})


@dataclass
class Stored:
    """What one block left behind when it was last stored."""

    step: int
    before: torch.Tensor
    added: torch.Tensor
    encoder_added: torch.Tensor | None
    growth: float = 1.0


@dataclass
class Lane:
    """Decisions and stored blocks of one stream of steps."""

    decider: Decider
    blocks: dict[int, Stored] = field(default_factory=dict)
    skipped: list[list[int]] = field(default_factory=list)
    diffs: list[dict[int, float]] = field(default_factory=list)
    real: list[dict[int, float]] = field(default_factory=list)
    partials: dict[int, float] = field(default_factory=dict)


class PruneOracle:
    """Runs blocks under a rule. Use as a context manager around the calls of the model.

    Args:
        blocks: the blocks in the order they run.
        returns: names of the streams that a block returns, in order.
        takes_encoder: whether a block takes the encoder states that the one before returned.
        rule: the options.
        exact: compare each block's real input rather than the estimate.
    """

    def __init__(self, blocks, returns, takes_encoder, rule: PruneRule, exact=False):
        self.blocks, self.returns, self.takes_encoder = list(blocks), returns, takes_encoder
        self.rule, self.exact = rule, exact
        tail = len(self.blocks) - rule.Bn_compute_blocks
        always = set(rule.non_prune_block_ids)
        self.prunable = [i for i in range(rule.Fn_compute_blocks, tail) if i not in always]
        self.tracked = range(self.prunable[0], self.prunable[-1] + 1)
        self.lanes: dict[str | None, Lane] = {}
        self.calls, self.block_calls = 0, [0] * len(self.blocks)
        self.margin = 1.0
        self.last_encoder = None

    @contextmanager
    def __call__(self):
        forwards = [block.forward for block in self.blocks]
        for i, (block, forward) in enumerate(zip(self.blocks, forwards, strict=True)):
            block.forward = lambda *a, i=i, f=forward, **k: self._forward(i, f, a, k)
        yield self
        for block in self.blocks:
            del block.forward

    def _forward(self, i, forward, args, kwargs):
        named = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
        hidden = named["hidden_states"]
        encoder = named.get("encoder_hidden_states") if self.takes_encoder else self.last_encoder
        if i == 0:
            branch = None
            if self.rule.enable_separate_cfg:
                branch = ("cond", "uncond")[self.calls % 2]
            self.calls += 1
            self.lane = self.lanes.setdefault(branch, Lane(Decider(self.rule.of_steps)))
            self.last_encoder = encoder if self.takes_encoder else None
            encoder = self.last_encoder
        if i == self.tracked[0]:
            self._open(hidden.double())
        if i in self.tracked and self._skips(i, hidden.double()):
            stored = self.lane.blocks[i]
            self.lane.skipped[-1].append(i)
            out = (hidden.double() + stored.added).to(hidden.dtype)
            if encoder is not None and stored.encoder_added is not None:
                encoder = (encoder.double() + stored.encoder_added).to(encoder.dtype)
            self.last_encoder = encoder
            return self._pack(out, encoder)
        before, encoder_before = hidden.clone(), None if encoder is None else encoder.clone()
        output = forward(*args, **kwargs)
        self.block_calls[i] += 1
        out, encoder_out = self._unpack(output)
        if i in self.tracked and self.stores:
            self._store(i, before.double(), out.double(), encoder_before, encoder_out)
        self.last_encoder = encoder_out
        return output

    def _unpack(self, output):
        if len(self.returns) == 1:
            return (output[0] if isinstance(output, tuple) else output), None
        named = dict(zip(self.returns, output, strict=True))
        return named["hidden_states"], named["encoder_hidden_states"]

    def _pack(self, hidden, encoder):
        if len(self.returns) == 1:
            return hidden
        named = {"hidden_states": hidden, "encoder_hidden_states": encoder}
        return tuple(named[name] for name in self.returns)

    def _open(self, hidden: torch.Tensor) -> None:
        """Decide the step, and (unless `exact`) all its blocks."""
        lane, rule = self.lane, self.rule
        step = len(lane.skipped)
        chosen: list[int] = []
        diffs: dict[int, float] = {}

        def change():
            if not lane.blocks:
                return "no reference"
            if self.exact:
                return 0.0
            diffs.update(self._estimates(hidden, chosen))
            # the blocks have decided: bring what they say to the rule of the step
            threshold = rule.residual_diff_threshold
            if all(diff != diff for diff in diffs.values()):
                return float("nan")
            return (0.5 if chosen else 2.0) * threshold

        full = lane.decider.decide(change)
        is_open = lane.decider.trace.reasons[-1] in ("below threshold", "threshold is 1 or more")
        if lane.decider.trace.reasons[-1] == "static":
            chosen, diffs = list(self.prunable), {}
        self.chosen = "ask" if is_open and self.exact else [] if full else chosen
        interval = rule.residual_cache_update_interval
        self.stores = not lane.blocks or step % interval == 0
        lane.skipped.append([])
        lane.diffs.append(diffs)
        lane.real.append({})

    def _estimates(self, hidden: torch.Tensor, chosen: list[int]) -> dict[int, float]:
        """Return the change of each block's input; add those left out to `chosen`."""
        lane, rule = self.lane, self.rule
        threshold, diffs, factor = rule.residual_diff_threshold, {}, 1.0
        for i in self.tracked:
            stored, before = lane.blocks[i], lane.blocks.get(i - 1)
            if i == self.tracked[0]:
                difference = hidden - stored.before
            elif stored.step != before.step:
                difference = difference + before.before + before.added - stored.before
            own = self._relative_l1(difference, stored.before)
            own = self._shared(i, own)
            diff = own * factor
            limit = threshold
            known = [diffs[j] for j in self.prunable if j in diffs][:5]
            known = [d for d in known if d > 0]
            if rule.enable_dynamic_prune_threshold and known:
                most = rule.max_dynamic_prune_threshold or 2 * threshold
                risen = sum(known) / len(known) * rule.dynamic_prune_threshold_relax_ratio
                if risen < most:
                    limit = max(risen, threshold)
            diffs[i] = diff
            if i in self.prunable and (diff < limit or (limit >= 1 and diff == diff)):
                chosen.append(i)
            else:
                factor *= stored.growth
            if i in self.prunable and limit < 1:
                self.margin = min(self.margin, abs(diff - limit))
        return diffs

    def _shared(self, i: int, own: float) -> float:
        """Return the first branch's change of the same step if the branches share it."""
        lane, step = self.lane, len(self.lane.skipped)
        if self.rule.cfg_diff_compute_separate:
            return own
        first = next(iter(self.lanes.values()))
        if lane is first:
            lane.partials[step, i] = own
            return own
        return first.partials.get((step, i), own)

    def _relative_l1(self, difference, before) -> float:
        moved, size = difference.abs().flatten(1).sum(1), before.abs().flatten(1).sum(1)
        if self.rule.batch_reduce == "max":
            return (moved / size).max().item()
        return (moved.sum() / size.sum()).item()

    def _skips(self, i: int, hidden: torch.Tensor) -> bool:
        if i in self.lane.blocks:
            before = self.lane.blocks[i].before
            self.lane.real[-1][i] = self._relative_l1(hidden - before, before)
        if self.chosen != "ask":
            return i in self.chosen
        return i in self.prunable and self.lane.real[-1][i] < self.rule.residual_diff_threshold

    def _store(self, i, before, out, encoder, encoder_out) -> None:
        stored = Stored(len(self.lane.skipped) - 1, before, out - before, None)
        if encoder is not None and encoder_out is not None:
            stored.encoder_added = encoder_out.double() - encoder.double()
        old = self.lane.blocks.get(i)
        if old is not None:
            grown = (out - old.before - old.added).abs().sum()
            moved = (before - old.before).abs().sum()
            stored.growth = (grown / moved).item() if moved > 0 else 1.0
        self.lane.blocks[i] = stored
