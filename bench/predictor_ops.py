"""The ops behind predictors and signals as rows of the kernel benchmark, beside PyTorch's sequence.

`fit_recurrence` reads the ring; the others are scalar arithmetic, whose time is that of a launch.
"""

from __future__ import annotations

import torch

from bench.cache_ops import GAP, cached_lane
from bench.kernel_op import Draw, Inputs, KernelOp, Outputs
from bench.shapes import Shape
from dbcache.kernels.common import lane_state as ls
from dbcache.kernels.common.select import Backend
from dbcache.kernels.common.sums import partition_of
from dbcache.kernels.decision.transformation_rate import transformation_rate
from dbcache.kernels.prediction import spectrum
from dbcache.kernels.prediction.fit_recurrence import fit_recurrence
from dbcache.kernels.prediction.recurrence import recurrence_weights
from dbcache.kernels.prediction.spectrum import spectrum_weights

SNAPSHOTS = 4
"""Snapshots in the ring, GAP steps apart, the newest in the last slot."""
RIDGE = 1.0
FIT = (0.6, 0.05)
"""alpha and gamma: two real roots below 1."""
ORDER, CHEBYSHEV_RIDGE, BLEND, LAST_STEP = 2, 1e-2, 0.5, 49


def _make_ring(shape: Shape, draw: Draw) -> Inputs:
    # sums of two exponentials, and as much at random as tells them from exact ones
    slow, fast = draw.hidden(shape), draw.hidden(shape)
    ring = [slow * 0.9**i + fast * 0.5**i + draw.hidden(shape, 0.05) for i in range(SNAPSHOTS)]
    fit = torch.full((2,), torch.nan, dtype=torch.float64, device=draw.device)
    state = cached_lane(draw.device, SNAPSHOTS - 1)
    return {"ring": torch.stack(ring), "state": state, "fit": fit}


def _fit(x: Inputs, impl: Backend) -> Outputs:
    fit_recurrence(x["ring"], x["state"], x["fit"], ridge=RIDGE, impl=impl)
    return ()


def _fitted(x: Inputs, _: Outputs) -> Outputs:
    return (x["fit"].float(),)


def _fit_eager(x: Inputs) -> Outputs:
    newest_first = x["ring"].float().flatten(1).flip(0)
    differences = newest_first[:-1] - newest_first[1:]
    older, level = differences[1:].flatten(), newest_first[1:-1].flatten()
    matrix = torch.stack([older, level])
    gram, target = matrix @ matrix.T, matrix @ differences[:-1].flatten()
    target[0] += RIDGE * gram[0, 0]
    p, q, r = gram[0, 0] * (1 + RIDGE), gram[1, 1] * (1 + RIDGE), gram[0, 1]
    determinant = p * q - r * r
    alpha = (target[0] * q - target[1] * r) / determinant
    return (torch.stack([alpha, (p * target[1] - r * target[0]) / determinant]),)


def _make_fit(_: Shape, draw: Draw) -> Inputs:
    fit = torch.tensor(FIT, dtype=torch.float64, device=draw.device)
    return {"state": cached_lane(draw.device, SNAPSHOTS - 1), "fit": fit}


def _recurrence(x: Inputs, impl: Backend) -> Outputs:
    recurrence_weights(x["state"], x["fit"], x["fit"], impl=impl)
    return ()


def _weights(x: Inputs, _: Outputs) -> Outputs:
    """Return the weights of the snapshots, newest first."""
    return (x["state"].weights[:SNAPSHOTS].flip(0),)


def _age(x: Inputs) -> float:
    """Return how many steps the newest snapshot is old."""
    return x["state"].counters[ls.STEP].item() - 1 - (SNAPSHOTS - 1) * GAP


def _recurrence_eager(x: Inputs) -> Outputs:
    alpha, gamma = x["fit"].unbind()
    top = torch.stack([1 + alpha + gamma, -alpha])
    companion = torch.stack([top, torch.tensor([1.0, 0.0]).to(top)])
    roots, vectors = torch.linalg.eig(companion)
    power = vectors @ torch.diag(roots ** (_age(x) / GAP)) @ torch.linalg.inv(vectors)
    return (torch.cat([power[0].real, top.new_zeros(SNAPSHOTS - 2)]).float(),)


def _make_parameters(_: Shape, draw: Draw) -> Inputs:
    parameters = [0.0] * spectrum.NUM_PARAMETERS
    parameters[spectrum.ORDER] = parameters[spectrum.ENCODER_ORDER] = ORDER
    parameters[spectrum.RIDGE], parameters[spectrum.BLEND] = CHEBYSHEV_RIDGE, BLEND
    parameters[spectrum.LAST_STEP] = LAST_STEP
    state = cached_lane(draw.device, SNAPSHOTS - 1)
    return {
        "state": state,
        "parameters": torch.tensor(parameters, dtype=torch.float64, device=draw.device),
    }


def _spectrum(x: Inputs, impl: Backend) -> Outputs:
    spectrum_weights(x["state"], x["parameters"], impl=impl)
    return ()


def _spectrum_eager(x: Inputs) -> Outputs:
    newest = (SNAPSHOTS - 1) * GAP
    steps = torch.arange(newest, -1, -GAP, dtype=torch.float64, device=x["parameters"].device)
    ahead = _age(x)
    degrees = torch.arange(ORDER + 1, device=steps.device)
    phi = torch.cos(degrees * torch.acos(2 * steps / LAST_STEP - 1)[:, None])
    at = torch.cos(degrees * torch.acos(2 * (steps[0] + ahead) / LAST_STEP - 1))
    gram = phi.T @ phi + CHEBYSHEV_RIDGE * torch.eye(ORDER + 1).to(phi)
    weights = BLEND * (phi @ torch.linalg.solve(gram, at))
    weights[0] += (1 - BLEND) * (1 + ahead / GAP)
    weights[1] -= (1 - BLEND) * ahead / GAP
    return (weights.float(),)


def _make_sums(shape: Shape, draw: Draw) -> Inputs:
    # only the size of the partial sums follows from the shape
    programs = partition_of(shape.hidden * shape.width)[1]
    outputs, inputs = (
        draw.normal(shape.batch, programs, 2, dtype=torch.float32).abs_() for _ in range(2)
    )
    state = cached_lane(draw.device)
    state.values[ls.RATE] = 1.0  # what the next full step replaces
    return {"state": state, "outputs": outputs, "inputs": inputs}


def _rate(x: Inputs, impl: Backend) -> Outputs:
    transformation_rate(x["state"], x["outputs"], x["inputs"], impl=impl)
    return ()


def _rate_of(x: Inputs, _: Outputs) -> Outputs:
    return (x["state"].values[ls.RATE].clone(),)


def _rate_eager(x: Inputs) -> Outputs:
    moved_out, size = x["outputs"].sum((0, 1))
    return (moved_out / x["inputs"][..., 0].sum() / size,)


PREDICTOR_OPS = (
    KernelOp(
        name=f"fit_recurrence K={SNAPSHOTS}",
        make=_make_ring,
        call=_fit,
        eager=_fit_eager,
        results=_fitted,
        moved=lambda shape: SNAPSHOTS * shape.hidden_bytes,
    ),
    KernelOp(
        name="recurrence_weights",
        make=_make_fit,
        call=_recurrence,
        eager=_recurrence_eager,
        results=_weights,
        moved=None,
        eager_waits=True,
    ),
    KernelOp(
        name="spectrum_weights",
        make=_make_parameters,
        call=_spectrum,
        eager=_spectrum_eager,
        results=_weights,
        moved=None,
        eager_waits=True,
    ),
    KernelOp(
        name="transformation_rate",
        make=_make_sums,
        call=_rate,
        eager=_rate_eager,
        results=_rate_of,
        moved=None,
    ),
)
