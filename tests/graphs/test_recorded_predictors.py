"""Every predictor that runs on the device, recorded: the weights are those of eager steps."""

import pytest
import torch
from graph_runs import FLUX, MODES, both, graphs, start

import dbcache

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 24
PREDICTORS = {
    "taylor": dbcache.TaylorSeerCalibratorConfig(taylorseer_order=2),
    "newton": dbcache.TaylorSeerCalibratorConfig(taylorseer_order=2, exact=True),
    "hermite": dbcache.HermiteCalibratorConfig(hermite_order=2),
    "foca": dbcache.FoCaCalibratorConfig(),
    "spectrum": dbcache.SpectrumCalibratorConfig(),
    "dmd": dbcache.DMDCalibratorConfig(dmd_ridge=1e-6),
}
OPTIONS = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 4,
    "residual_diff_threshold": 0.3,
    "max_continuous_cached_steps": 3,
    "num_inference_steps": STEPS,
}


@torch.no_grad()
def run(model):
    """Denoise; from step 13 on calls are of another kind, whose first recording replays at 14."""
    x, outputs = start(5), []
    for step in range(STEPS):
        how = FLUX.arguments(x, 1.0 - step / STEPS, "cond") | {"return_dict": step >= 13}
        outputs.append(model(**how)[0])
        x = x - outputs[-1] / STEPS
    return outputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache_dtype", ["model", "fp8"])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_recorded_forecasts_are_those_of_eager_steps(driver, known, predictor, cache_dtype, mode):
    if (predictor, cache_dtype) == ("dmd", "fp8"):
        pytest.skip("DMD refuses a ring in fp8")
    config = dbcache.DBCacheConfig(**OPTIONS, cache_dtype=cache_dtype)
    model, _ = both(
        run,
        FLUX.build,
        config,
        PREDICTORS[predictor],
        mode=mode,
        known=known[predictor, cache_dtype],
    )
    (lane,) = dbcache.summary(model).lanes
    assert {13, 14} <= set(lane.cached_steps), "both kinds must begin with a cached step"
    assert graphs(model).replays == STEPS - 2
