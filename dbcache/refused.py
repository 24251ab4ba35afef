"""Names of cache-dit that are not offered: they can be imported, and tell what to use instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

_OFFLOAD = (
    "diffusers' group offload goes with the cache, and loads no skipped block: "
    'transformer.enable_group_offload(onload_device, offload_type="block_level", use_stream=True), '
    "or pipe.enable_model_cpu_offload()"
)
_PROFILE = "use `with dbcache.profile(): ...` inside of a torch.profiler.profile of your own"
_RAY = "start a process per GPU with torchrun, and enable(pipe, parallelism_config=...) in each"


def _refused(name: str, instead: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"dbcache.{name} is not offered: {instead}")

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = f"Raise a NotImplementedError: {instead}."
    return refuse


class _Refused:
    """A class that cannot be made, or an object without attributes."""

    def __init__(self, name: str, instead: str) -> None:
        self._text = f"dbcache.{name} is not offered: {instead}"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(self._text)


class LayerwiseOffloadHandle:
    """Is made by nothing here; see `layerwise_offload`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"dbcache.{type(self).__name__} is not offered: {_OFFLOAD}")


class LayerwiseOffloadHandleGroup(LayerwiseOffloadHandle):
    """Is made by nothing here; see `layerwise_offload`."""


class ProfilerContext:
    """Is not offered; see `dbcache.profile`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"dbcache.ProfilerContext is not offered: {_PROFILE}")


layerwise_offload = _refused("layerwise_offload", _OFFLOAD)
layerwise_cpu_offload = _refused("layerwise_cpu_offload", _OFFLOAD)
remove_layerwise_offload = _refused("remove_layerwise_offload", _OFFLOAD)
get_layerwise_offload_handles = _refused("get_layerwise_offload_handles", _OFFLOAD)
profile_function = _refused("profile_function", _PROFILE)
create_profiler_context = _refused("create_profiler_context", _PROFILE)
get_profiler_output_dir = _refused("get_profiler_output_dir", _PROFILE)
set_profiler_output_dir = _refused("set_profiler_output_dir", _PROFILE)
parse_extra_modules = _refused(
    "parse_extra_modules", "ParallelismConfig(extra_parallel_modules=[...]) takes names as well"
)
load = _refused("load", "load a quantised model with diffusers' from_pretrained (docs/quantize.md)")
enable_ray_parallelism = _refused("ray.enable_ray_parallelism", _RAY)
enable_ray_module_parallelism = _refused("ray.enable_ray_module_parallelism", _RAY)
enable_ray_pipeline_parallelism = _refused("ray.enable_ray_pipeline_parallelism", _RAY)
disable_ray_module_parallelism = _refused("ray.disable_ray_module_parallelism", _RAY)
disable_ray_pipeline_parallelism = _refused("ray.disable_ray_pipeline_parallelism", _RAY)
ENV = _Refused("ENV", "there are no such variables; options are given to `enable` and in files")
