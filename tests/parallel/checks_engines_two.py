"""Two ranks of an engine that share a sequence cache the same steps."""

from types import SimpleNamespace

import ranks
import tiny
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


if __name__ == "__main__":
    ranks.main(globals())
