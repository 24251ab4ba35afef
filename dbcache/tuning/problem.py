"""The quality of a mask, and the weights that make it best, from measured errors.

A mask says per lane which calls are full. Call t that is cached has the ring s_0 > s_1 > ... of the
latest full calls; its weights add up to 1, so that a residual that does not change is predicted as
it is. With the error e_t = sum_j w_j E[t, s_j] of call t, the weights of all calls together
minimise

    |sum_t e_t|^2 + mu sum_t |e_t|^2 + ridge sum_tj D_tj (w_tj - w0_tj)^2

over all pictures: the final error, with the errors of single calls held small, since the rest of
the request sees them, and with a pull towards FoCa's weights w0, which need no calibration. D is
the diagonal of the first term. All of it follows from the inner products of the E.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dbcache.kernels.common.lane_state import Predictor
from dbcache.kernels.prediction.taylor import taylor_weights
from dbcache.tuning.errors import Lane, Pairs

Array = npt.NDArray[np.float64]
Mask = tuple[int, ...]
Masks = dict[Lane, Mask]
Weights = dict[Lane, dict[int, tuple[float, ...]]]

HORIZON = 0.5
"""FoCa's, as by default."""


@dataclass(frozen=True)
class Fit:
    """How weights are fitted: snapshots in the ring, `mu` and the ridge."""

    snapshots: int = 4
    mu: float = 0.1
    ridge: float = 1e-3


class Problem:
    """The inner products of the errors of all pictures so far.

    Attributes:
        calls: per lane how many there are.
        pictures: added so far.
    """

    def __init__(self) -> None:
        self.calls: dict[Lane, int] = {}
        self.pictures = 0
        self._index: dict[tuple[Lane, int, int], int] = {}
        self._ids: dict[Lane, npt.NDArray[np.int64]] = {}
        self._gram = np.zeros((0, 0))
        self._prior: dict[tuple[int, ...], list[float]] = {}

    def add(self, pairs: Pairs) -> None:
        """Add a picture; all count alike, however much their errors are.

        Raises:
            ValueError: it has other calls than those before.
        """
        if not self._index:
            self._index = pairs.index
            for lane, t, _ in pairs.index:
                self.calls[lane] = max(self.calls.get(lane, 0), t + 1)
            for lane, count in self.calls.items():
                self._ids[lane] = np.full((count, count), -1)
            for (lane, t, s), row in pairs.index.items():
                self._ids[lane][t, s] = row
            self._gram = np.zeros((len(pairs.index),) * 2)
        elif pairs.index.keys() != self._index.keys():
            raise ValueError(
                "tune: all pictures must have the same calls of the transformers, got pictures of "
                "other numbers of steps or branches; tune them one by one"
            )
        rows = pairs.rows
        nearest = [row for (_, t, s), row in pairs.index.items() if s == t - 1]
        scale = rows[nearest].double().square().sum().item()
        gram = (rows @ rows.T).double().numpy()
        self._gram += gram / max(scale, 1e-30)
        self.pictures += 1

    def ring(self, mask: Mask, snapshots: int) -> list[list[int]]:
        """Return the ring before each call, newest first."""
        found: list[list[int]] = []
        ring: list[int] = []
        for call, full in enumerate(mask):
            found.append(list(ring))
            if full:
                ring = [call, *ring][:snapshots]
        return found

    def prior(self, call: int, ring: Sequence[int]) -> list[float]:
        """Return FoCa's weights of a call."""
        ages = tuple(call - s for s in ring)
        if ages not in self._prior:
            foca = taylor_weights(ages[:3], 2, Predictor.FOCA, HORIZON)
            self._prior[ages] = [*foca, *[0.0] * (len(ages) - len(foca))]
        return self._prior[ages]

    def is_allowed(self, masks: Masks) -> bool:
        """Whether all residuals that would be reused were measured."""
        for lane, mask in masks.items():
            ids, newest = self._ids[lane], 0
            for call, full in enumerate(mask):
                if full:
                    newest = call
                elif ids[call, newest] < 0:
                    return False
        return bool(masks) and all(mask[0] for mask in masks.values())

    def _assemble(self, masks: Masks, snapshots: int) -> _System:
        base, rows, owner, prior, keys = [], [], [], [], []
        for lane, mask in masks.items():
            ids = self._ids[lane]
            for call, ring in enumerate(self.ring(mask, snapshots)):
                if mask[call]:
                    continue
                base.append(ids[call, ring[0]])
                weights = self.prior(call, ring)
                for j in range(1, len(ring)):
                    row = ids[call, ring[j]]
                    if row < 0:
                        break
                    rows.append(row)
                    owner.append(len(base) - 1)
                    prior.append(weights[j])
                    keys.append((lane, call, j))
        bases, unknowns, owners = (np.array(x, dtype=np.int64) for x in (base, rows, owner))
        return _System(self._gram, bases, unknowns, owners, np.array(prior), keys)

    def score(self, masks: Masks, fit: Fit) -> float:
        """Return the logarithm of what the best weights leave; lower is better."""
        return self._assemble(masks, fit.snapshots).solve(fit)[0]

    def weights(self, masks: Masks, fit: Fit) -> Weights:
        """Return the best weights of all cached calls, newest snapshot first."""
        system = self._assemble(masks, fit.snapshots)
        _, values = system.solve(fit)
        found: dict[tuple[Lane, int], dict[int, float]] = {}
        for (lane, call, j), value in zip(system.keys, values, strict=True):
            found.setdefault((lane, call), {})[j] = float(value)
        weights: Weights = {lane: {} for lane in masks}
        for lane, mask in masks.items():
            for call, full in enumerate(mask):
                if not full:
                    older = found.get((lane, call), {})
                    first = 1.0 - sum(older.values())
                    weights[lane][call] = (first, *(older[j] for j in sorted(older)))
        return weights

    def triple(self, lane: Lane, older: int | None, newer: int, call: int) -> tuple[int, int]:
        """Return the rows of the errors of `call` with `newer` and with `older`, -1 for none."""
        ids = self._ids[lane]
        return int(ids[call, newer]), -1 if older is None else int(ids[call, older])

    @property
    def gram(self) -> Array:
        """The inner products, by row."""
        return self._gram


@dataclass(frozen=True)
class _System:
    """The normal equations of one mask.

    Attributes:
        base: rows of the errors with the newest snapshot, per cached call.
        rows: rows of those with an older one, per unknown; `owner` is the cached call.
        prior: FoCa's weight of each unknown.
        keys: (lane, call, snapshot) of each unknown.
    """

    gram: Array
    base: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    owner: npt.NDArray[np.int64]
    prior: Array
    keys: list[tuple[Lane, int, int]]

    def solve(self, fit: Fit) -> tuple[float, Array]:
        """Return the logarithm of the objective, and the weights of the older snapshots."""
        gram, base = self.gram, self.base
        if not len(base):
            return -math.inf, np.zeros(0)
        bases = gram[np.ix_(base, base)]
        constant = float(bases.sum() + fit.mu * np.trace(bases))
        if not len(self.rows):
            return math.log(max(constant, 1e-300)), np.zeros(0)
        rows, owner = self.rows, self.owner
        own = base[owner]
        crossed = gram[np.ix_(rows, own)]
        products = gram[np.ix_(rows, rows)] - crossed - crossed.T + bases[np.ix_(owner, owner)]
        with_base = gram[np.ix_(rows, base)] - bases[owner]
        own_base = with_base[np.arange(len(rows)), owner]
        right = -(with_base.sum(1) + fit.mu * own_base)
        matrix = products * (1 + fit.mu * (owner[:, None] == owner[None, :]))
        pull = fit.ridge * np.diag(matrix) + 1e-12
        pulled = matrix + np.diag(pull)
        values = np.linalg.solve(pulled, right + pull * self.prior)
        left = constant - 2 * right @ values + values @ matrix @ values
        left += pull @ (values - self.prior) ** 2
        return math.log(max(left, 1e-300)), values
