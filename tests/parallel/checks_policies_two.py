"""Two ranks: steps decided before the first block are those of one process, outputs too."""

from typing import Any

import inside
import ranks
import schedules
import spread
import torch
import torch.distributed as dist

import dbcache
from dbcache.config.parallelism import ParallelismConfig
from dbcache.kernels.common.lane_state import Reason

STEPS = 8
ASKED = {"max_warmup_steps": 2, "residual_diff_threshold": 0.4}
STATIC = {
    "steps_computation_mask": [1, 1, 0, 1, 0, 0, 1, 0],
    "steps_computation_policy": "static",
    "static_skip_probe": True,
}
PACKED = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")
SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "static": (STATIC, tuple(spread.SUBJECTS)),
    "schedule": ({"num_inference_steps": STEPS}, PACKED),
    "easycache": ({"policy": "easycache"} | ASKED, tuple(spread.SUBJECTS)),
    "seacache": ({"policy": "seacache"} | ASKED, PACKED),
    "teacache": ({"policy": "teacache"} | ASKED, (*PACKED, "WanTransformer3DModel")),
}
IDENTITY = [0.0, 0.0, 0.0, 1.0, 0.0]


def loop(model: torch.nn.Module, name: str, settings: dict[str, Any]) -> Any:
    """Return reasons and diffs of each lane, and the outputs of a loop with the cache on."""
    dbcache.enable(model, enable_separate_cfg=False, **settings)
    x, outputs = spread.inputs(name, "even")["hidden_states"], []
    for index in range(STEPS):
        given = spread.inputs(name, "even", time=1 - index / STEPS) | {"hidden_states": x}
        outputs.append(spread.step(model, given))
        x = x - outputs[-1][tuple(slice(0, n) for n in x.shape)] / STEPS
    stacks = inside.stacks(model)
    traces = [lane.steps.snapshot()() for stack in stacks for lane in stack.lanes.values()]
    dbcache.disable(model)
    return traces, outputs


def schedule_for(model: torch.nn.Module) -> dict[str, Any]:
    """Return a schedule with weights, for the mask above, in a file with another one."""
    name = type(model).__name__
    sizes = {"num_inference_steps": STEPS, "scheduler_steps": STEPS}
    calls = [{"model": name, "calls": STEPS}]
    mask = "".join(map(str, STATIC["steps_computation_mask"]))
    others = [schedules.content(name)]
    return schedules.content(name, (mask,), **sizes, transformers=calls, others=others)


def identity_for(model: torch.nn.Module) -> dict[str, Any]:
    """Return a calibration of TeaCache that takes the changes as they are."""
    dbcache.enable(model, policy="easycache")
    names = [stack.name for stack in inside.stacks(model)]
    dbcache.disable(model)
    return {
        "format": "dbcache calibration 1",
        "policy": "teacache",
        "model": type(model).__name__,
        "stacks": {name: {"coefficients": IDENTITY} for name in names},
    }


def check_policies_are_those_of_one_process() -> None:
    config = ParallelismConfig(ulysses_size=2)
    for what, (settings, names) in SETTINGS.items():
        taken = set()
        for name in names:
            model = spread.build(name, heads=4)
            known = {"calibration": identity_for(model)} if what == "teacache" else {}
            if what == "schedule":
                known = {"schedule": schedule_for(model)}
            expected, outputs = loop(model, name, settings | known)
            traces, found = loop(model, name, settings | known | {"parallelism_config": config})
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, traces)
            where = f"{name}, {what}"
            assert all(one == traces for one in everyone), f"{where}: ranks decided apart"
            for (reasons, diffs), (wanted, measured) in zip(traces, expected, strict=True):
                assert reasons == wanted, f"{where}: {reasons} instead of {wanted}"
                torch.testing.assert_close(diffs, measured, rtol=1e-3, atol=1e-5)
                taken |= set(reasons)
            error = max((a - b).abs().max().item() for a, b in zip(found, outputs, strict=True))
            assert error < 1e-4, f"{where}: off by {error}"
        assert Reason.STATIC in taken or Reason.BELOW_THRESHOLD in taken, f"{what}: nothing cached"


if __name__ == "__main__":
    ranks.main(globals())
