"""The bytes of docs/memory.md are those that a lane takes."""

import sys
from pathlib import Path

import pytest
import tiny
import torch

import dbcache

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

from bench.memory import SLOTS, lane_bytes, table  # noqa: E402
from bench.shapes import Shape  # noqa: E402

PREDICTORS = {
    "reuse": None,
    "TaylorSeer 1": dbcache.TaylorSeerCalibratorConfig(taylorseer_order=1),
    "FoCa": dbcache.FoCaCalibratorConfig(),
}


@pytest.mark.parametrize("dtype", ["model", "fp8"])
@pytest.mark.parametrize("predictor", SLOTS)
def test_bytes_of_a_lane_are_as_computed(predictor, dtype):
    model = tiny.flux().to(torch.bfloat16)
    dbcache.enable(
        model, Fn_compute_blocks=1, cache_dtype=dtype, calibrator_config=PREDICTORS[predictor]
    )
    x = tiny.noise(1, 16, 16, seed=1).to(torch.bfloat16)
    given = tiny.FAMILIES["flux"].arguments(x, 0.5, "cond")
    request = dbcache.start_request(model)
    with torch.no_grad(), request:
        model(**given)
    shape = Shape(name="tiny", hidden=16, encoder=tiny.TEXT_TOKENS, width=model.inner_dim)
    assert request.nbytes == lane_bytes(shape, SLOTS[predictor], fp8=dtype == "fp8")


def test_the_page_has_the_table_of_the_script():
    assert table() in (ROOT / "docs" / "memory.md").read_text()
