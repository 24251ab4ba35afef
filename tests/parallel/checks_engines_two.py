"""Two ranks of an engine that share a sequence cache the same steps."""

import importlib.metadata
import os
from types import SimpleNamespace

import omni_like
import ranks
import sglang_stub
import tiny
import torch
import torch.distributed as dist
import vllm_stub

import dbcache

OPTIONS = {"max_warmup_steps": 2, "residual_diff_threshold": 0.15}


def check_ranks_of_vllm_omni_decide_together() -> None:
    model, family = tiny.qwen(), tiny.FAMILIES["qwen"]
    seed = 5 + dist.get_rank()  # as if each rank had other tokens
    pipe = SimpleNamespace(transformer=model)
    pipe.forward = lambda: tiny.denoise(model, family, 12, seed=seed)
    with vllm_stub.engine():
        import vllm.distributed.parallel_state as of_vllm
        from vllm_omni.diffusion.cache import selector
        from vllm_omni.diffusion.distributed import parallel_state

        from dbcache.integrations import vllm_omni as ours

        ours.register()
        of_vllm._TP = None
        found = []
        for group in (None, SimpleNamespace(world_size=2, device_group=dist.group.WORLD)):
            parallel_state._SP = group
            backend = selector.get_cache_backend("dbcache", dict(OPTIONS))
            backend.enable(pipe)
            pipe.forward()
            (lane,) = dbcache.summary(model, logging=False)
            both: list[object] = [None, None]
            dist.all_gather_object(both, (lane.reasons, lane.diffs))
            found.append(both)
            backend.disable(pipe)
    (alone, other), (together, same) = found
    assert alone != other
    assert together == same
    assert "below threshold" in together[0]


def check_ranks_of_vllm_omni_that_share_guidance_run_a_branch_each() -> None:
    def all_gather(x, separate_tensors):
        assert separate_tensors
        both = [torch.empty_like(x) for _ in range(2)]
        dist.all_gather(both, x.contiguous())
        return both

    with omni_like.engine() as omni:
        import vllm.distributed.parallel_state as of_vllm
        from vllm_omni.diffusion.distributed import cfg_parallel

        of_vllm._TP = None
        pipe = omni_like.pipeline(omni, "qwen")
        backend = omni.selector.get_cache_backend("dbcache", dict(omni_like.OWN))
        backend.enable(pipe)
        expected = pipe(12, True)
        alone = [lane.reasons for lane in dbcache.summary(pipe.transformer, logging=False)]
        cfg_parallel._get_cfg_world_size_or_one = lambda: 2
        cfg_parallel.get_classifier_free_guidance_rank = dist.get_rank
        cfg_parallel.get_cfg_group = lambda: SimpleNamespace(all_gather=all_gather)
        for _ in range(2):
            assert torch.allclose(pipe(12, True), expected, atol=1e-6)
            (lane,) = dbcache.summary(pipe.transformer, logging=False)
            assert lane.reasons == alone[dist.get_rank()]
            assert lane.cached_steps
        backend.disable(pipe)


def check_ranks_of_sglang_decide_together() -> None:
    cached = {"ENABLED": "true", "WARMUP": "2", "RDT": "0.15"}
    os.environ.update({f"SGLANG_CACHE_DIT_{name}": value for name, value in cached.items()})
    os.environ["SGLANG_DBCACHE"] = "1"
    value = "dbcache.integrations.sglang:register"
    point = importlib.metadata.EntryPoint("dbcache", value, "sglang.multimodal_gen.plugins")
    with sglang_stub.engine() as engine:
        engine.plugins.entry_points = lambda group: [point] if group == point.group else []
        engine.plugins.apply_plugin_hooks()
        found = []
        for ranks_ in (1, 2):
            group = SimpleNamespace(world_size=ranks_, device_group=dist.group.WORLD)
            alone = SimpleNamespace(world_size=1, device_group=None)
            engine.denoising.get_world_size = lambda ranks_=ranks_: ranks_
            engine.denoising.get_sp_group = lambda group=group: group
            engine.denoising.get_tp_group = lambda alone=alone: alone
            stage = sglang_stub.stage(engine.denoising, tiny.flux())
            stage._maybe_enable_cache_dit(12, sglang_stub.batch(12))
            tiny.denoise(stage.transformer, tiny.FAMILIES["flux"], 12, seed=5 + dist.get_rank())
            (lane,) = dbcache.summary(stage.transformer, logging=False)
            both: list[object] = [None, None]
            dist.all_gather_object(both, (lane.reasons, lane.diffs))
            found.append(both)
            stage._unmount_cache_dit()
    (one, other), (together, same) = found
    assert one != other
    assert together == same
    assert "below threshold" in together[0]


if __name__ == "__main__":
    ranks.main(globals())
