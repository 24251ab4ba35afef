"""Nothing is used for the first time while a step is captured: it would be compiled there."""

import pytest
import torch
from graph_runs import FLUX, MODES, graphs, start, two_stacks
from tape import TapeRecorder, seen_ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import dbcache
from dbcache import DBCacheConfig, DBPruneConfig

pytestmark = pytest.mark.usefixtures("one_thread", "driver")

OPTIONS = {"Fn_compute_blocks": 1, "max_warmup_steps": 4, "residual_diff_threshold": 0.1}
CASES = {
    "reuse": (DBCacheConfig(**OPTIONS),),
    "fp8": (DBCacheConfig(**OPTIONS, cache_dtype="fp8"), dbcache.TaylorSeerCalibratorConfig()),
    "hidden states": (
        DBCacheConfig(Fn_compute_blocks=1, l1_hidden_states_diff_threshold=0.05),
        dbcache.SpectrumCalibratorConfig(),
    ),
    "tokens": (DBCacheConfig(**OPTIONS, important_condition_threshold=0.1),),
    "no probe": (
        DBCacheConfig(
            max_warmup_steps=2,
            steps_computation_mask=[1, 1, 0, 0],
            steps_computation_policy="static",
            static_skip_probe=True,
        ),
    ),
    "dmd": (DBCacheConfig(**OPTIONS), dbcache.DMDCalibratorConfig(dmd_ridge=1e-6)),
    "blocks": (DBPruneConfig(**OPTIONS),),
}


class Watch(TorchDispatchMode):
    """Notes with what arguments dbcache's kernels are called, and which first in a capture."""

    def __init__(self):
        super().__init__()
        self.used, self.captured, self.late = set(), set(), set()
        self.captures = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dbcache":
            like = tuple(
                (x.dtype, x.dim(), x.is_contiguous(), x.data_ptr() % 16 == 0)
                if isinstance(x, torch.Tensor)
                else x
                for x in tree_flatten((args, kwargs or {}))[0]
            )
            if self.captures:
                self.captured.add((func, like))
                self.late |= {(func, like)} - self.used
            self.used.add((func, like))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_a_capture_uses_only_kernels_that_ran_before(monkeypatch, case, mode):
    watch, begin, end = Watch(), TapeRecorder.begin, TapeRecorder.end

    def switch(call, captures):
        def switched(recorder):
            watch.captures = captures
            return call(recorder)

        return switched

    monkeypatch.setattr(TapeRecorder, "begin", switch(begin, True))
    monkeypatch.setattr(TapeRecorder, "end", switch(end, False))
    model = FLUX.build()
    dbcache.enable(two_stacks(model), *CASES[case], num_inference_steps=4, cuda_graph=mode)
    with torch.no_grad(), seen_ops(), watch:
        for step in range(2):
            model(**FLUX.arguments(start(step), 1.0 - step / 4, "cond"))
    assert graphs(model).replays == 1
    assert watch.captured, "the capture must have been seen"
    assert watch.late == set()
