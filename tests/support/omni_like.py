"""Pipelines of vLLM-Omni around tiny models, and the engine's modules in which dbcache is known."""

import ast
import logging
import textwrap
import types
from contextlib import contextmanager
from pathlib import Path

import tiny
import torch
import vllm_stub

BASE = {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.5, "max_continuous_cached_steps": 3}
OWN = BASE | {"max_warmup_steps": 4, "Bn_compute_blocks": 0}
SCALE = 2.5


@contextmanager
def engine():
    """Yield the engine's modules, with dbcache registered in them."""
    with vllm_stub.engine():
        from vllm_omni.diffusion.cache import cachedit, selector
        from vllm_omni.diffusion.cache.base import CacheBackend
        from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
        from vllm_omni.diffusion.worker.utils import StepRequestState

        from dbcache.integrations import vllm_omni as ours

        ours.register()
        yield types.SimpleNamespace(
            ours=ours,
            selector=selector,
            cachedit=cachedit,
            base=CacheBackend,
            mixin=CFGParallelMixin,
            state=StepRequestState,
            refresh=refresh_of_the_runner(selector),
        )
        ours.unregister()


def refresh_of_the_runner(selector):
    """Return the engine's function that drives `refresh`; its module needs all of vLLM."""
    path = selector.__file__.replace("cache/selector", "worker/diffusion_model_runner")
    source = Path(path).read_text()
    space = {"logger": logging.getLogger("runner")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "_refresh_cache_for_requests":
            text = textwrap.dedent(ast.get_source_segment(source, node, padded=True))
            exec("from __future__ import annotations\n" + text, space)
    function = space["_refresh_cache_for_requests"]

    def refresh(backend, pipeline, steps):
        params = types.SimpleNamespace(num_inference_steps=steps, timesteps=None, sigmas=None)
        runner = types.SimpleNamespace(cache_backend=backend, pipeline=pipeline)
        config = types.SimpleNamespace(cache_backend="dbcache")
        function(runner, [types.SimpleNamespace(sampling_params=params)], od_config=config)

    return refresh


class Scheduler:
    """Steps of the same length from 1 to 0."""

    config = types.SimpleNamespace(num_train_timesteps=1000)

    def set_timesteps(self, steps):
        self.timesteps = 1000 * (1 - torch.arange(steps) / steps)

    def step(self, velocity, index, sample, return_dict):
        return (sample - velocity,)


def pipeline(omni, name, *, declared=None):
    """Return a pipeline as the engine's are: a module with the guidance mixin."""
    family = tiny.FAMILIES[name]

    class Pipeline(torch.nn.Module, omni.mixin):
        _dit_modules = ["transformer", "transformer_2"] if name == "wan" else ["transformer"]
        boundary_ratio = 0.5

        def __init__(self):
            super().__init__()
            self.transformer = family.build()
            self.transformer_2 = family.build(seed=9) if name == "wan" else None
            self.scheduler = Scheduler()
            if declared is not None:
                cls = type(self.transformer)
                self.transformer.__class__ = type(
                    cls.__name__, (cls,), {"_cache_dit_adapter_config": declared}
                )

        def model_at(self, t):
            return (
                self.transformer_2
                if name == "wan" and t < self.boundary_ratio
                else self.transformer
            )

        def predict_noise(self, model, **kwargs):
            return model(**kwargs)[0]

        def velocity(self, x, t, guides, **others):
            branches = [
                {"model": self.model_at(t), **family.arguments(x, t, branch), **others}
                for branch in tiny.BRANCHES
            ]
            return self.predict_noise_maybe_with_cfg(guides, SCALE, *branches, cfg_normalize=False)

        @torch.inference_mode()  # as the engine's runner does
        def forward(self, steps, guides=False, seed=5):
            x = tiny.noise(*family.latent_shape, seed=seed)
            for i in range(steps):
                v = self.velocity(x, 1 - i / steps, guides)
                x = self.scheduler_step_maybe_with_cfg(v / steps, i, x, guides)
            return x

        # --- step-wise ---

        @torch.inference_mode()
        def denoise_step(self, batch, *, states=None):
            times = [1 - state.step_index / state.total_steps for state in states]
            x = torch.cat([state.latents for state in states])
            return self.velocity(x, times[0], True, timestep=torch.tensor(times))

        @torch.inference_mode()
        def step_scheduler(self, state, v):
            state.latents = self.scheduler_step(
                v / state.total_steps, state.step_index, state.latents
            )
            state.step_index += 1

        def post_decode(self, state):
            return state.latents

    return Pipeline()
