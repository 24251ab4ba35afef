"""Stands for what SGLang's diffusion runtime needs a GPU for, so that its caching code is imported.

Real are the modules in `REAL`, of the wheel: its plugin registry, its cache-dit integration, its
denoising stage, its diffusers backend, its environment variables. All else of `sglang` that these
import is answered by stand-ins.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import vllm_stub

RUNTIME = "sglang.multimodal_gen.runtime"
REAL = (
    "sglang.srt.environ",
    "sglang.srt.plugins.hook_registry",
    "sglang.multimodal_gen.envs",
    f"{RUNTIME}.platforms.plugins",
    f"{RUNTIME}.cache.cache_dit_integration",
    f"{RUNTIME}.pipelines_core.stages.denoising",
    f"{RUNTIME}.pipelines.diffusers_pipeline",
)
WITHIN = {
    f"{RUNTIME}.platforms": {"get_selected_platform_dist": lambda: None},
    f"{RUNTIME}.utils.common": {
        "get_bool_env_var": lambda name, default: (
            os.environ.get(name, default).lower() in ("true", "1")
        )
    },
    f"{RUNTIME}.distributed": {"get_world_size": lambda: 1},
    f"{RUNTIME}.distributed.parallel_state": {"get_classifier_free_guidance_world_size": lambda: 1},
}
"""What stand-ins answer that is asked for more than to be there."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self) -> None:
        (folder,) = importlib.util.find_spec("sglang").submodule_search_locations
        self.folder = Path(folder)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "sglang":
            return None
        if name in REAL:
            file = self.folder.joinpath(*name.split(".")[1:]).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = vllm_stub._StubModule(spec.name)
        module.__path__ = []
        vars(module).update(WITHIN.get(spec.name, {}))
        return module

    def exec_module(self, module):
        pass


@contextmanager
def engine():
    """Import the real modules of `sglang` and yield them; afterwards none is imported."""
    finder, before = _Finder(), set(sys.modules)
    sys.meta_path.insert(0, finder)
    missing = [
        name for name in ("torchvision", "torchvision.transforms") if name not in sys.modules
    ]
    try:
        modules = {}
        for name in REAL:
            if name.endswith("diffusers_pipeline"):  # its pictures need torchvision, its cache not
                sys.modules.update({name: vllm_stub._StubModule(name) for name in missing})
            modules[name.rpartition(".")[2]] = importlib.import_module(name)
        for name in missing:
            sys.modules.pop(name, None)
        yield types.SimpleNamespace(**modules)
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "sglang":
                del sys.modules[name]


def batch(steps, **sampling):
    """Return a batch of one request, as the denoising stage gets it."""
    values = {"enable_cache_dit": True, "cache_dit_params": None} | sampling
    return types.SimpleNamespace(
        sampling_params=types.SimpleNamespace(**values),
        num_inference_steps=steps,
        do_classifier_free_guidance=False,
        is_warmup=False,
    )


def stage(denoising, transformer, transformer_2=None):
    """Return the engine's denoising stage, without the rest of a pipeline."""
    made = denoising.DenoisingStage.__new__(denoising.DenoisingStage)
    made.transformer, made.transformer_2 = transformer, transformer_2
    made._cache_dit_enabled, made._cache_dit_active_key = False, None
    made._cache_dit_request_overrides = {}
    made.server_args = MagicMock(enable_breakable_cuda_graph=False, enable_cfg_parallel=False)
    return made
