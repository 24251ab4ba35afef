"""The names of `dbcache/exports.py`, for type checkers."""

from dbcache.adapters.blocks.block_adapter import BlockAdapter as BlockAdapter
from dbcache.adapters.blocks.patterns import ForwardPattern as ForwardPattern
from dbcache.adapters.blocks.patterns import Pattern_0 as Pattern_0
from dbcache.adapters.blocks.patterns import Pattern_1 as Pattern_1
from dbcache.adapters.blocks.patterns import Pattern_2 as Pattern_2
from dbcache.adapters.blocks.patterns import Pattern_3 as Pattern_3
from dbcache.adapters.blocks.patterns import Pattern_4 as Pattern_4
from dbcache.adapters.blocks.patterns import Pattern_5 as Pattern_5
from dbcache.adapters.blocks.registry import BlockAdapterRegistry as BlockAdapterRegister
from dbcache.adapters.blocks.registry import BlockAdapterRegistry as BlockAdapterRegistry
from dbcache.adapters.patching.patch_functor import PatchFunctor as PatchFunctor
from dbcache.adapters.requests.attention_backend import set_attn_backend as set_attn_backend
from dbcache.adapters.requests.request_handle import RequestHandle as RequestHandle
from dbcache.adapters.requests.rows import rows as rows
from dbcache.api import calibrate as calibrate
from dbcache.api import capture as capture
from dbcache.api import disable as disable
from dbcache.api import disable as disable_cache
from dbcache.api import enable as enable
from dbcache.api import enable as enable_cache
from dbcache.api import is_enabled as is_enabled
from dbcache.api import refresh_context as refresh_context
from dbcache.cache_factory import NONE as NONE
from dbcache.cache_factory import CacheType as CacheType
from dbcache.cache_factory import DBCache as DBCache
from dbcache.cache_factory import DBPrune as DBPrune
from dbcache.cache_factory import block_range as block_range
from dbcache.cache_factory import cache_type as cache_type
from dbcache.compilation import compile as compile
from dbcache.compilation import set_compile_configs as set_compile_configs
from dbcache.config.cache import DBCacheConfig as BasicCacheConfig
from dbcache.config.cache import DBCacheConfig as DBCacheConfig
from dbcache.config.cache import ParamsModifier as ParamsModifier
from dbcache.config.files import load_attn_backend_config as load_attn_backend_config
from dbcache.config.files import load_cache_config as load_cache_config
from dbcache.config.files import load_configs as load_configs
from dbcache.config.files import load_configs as load_options
from dbcache.config.files import load_parallelism_config as load_parallelism_config
from dbcache.config.files import load_quantize_config as load_quantize_config
from dbcache.config.parallelism import ParallelismBackend as ParallelismBackend
from dbcache.config.parallelism import ParallelismConfig as ParallelismConfig
from dbcache.config.predictor_registry import register_predictor as register_predictor
from dbcache.config.predictors import CalibratorConfig as CalibratorConfig
from dbcache.config.predictors import CustomCalibratorConfig as CustomCalibratorConfig
from dbcache.config.predictors import DMDCalibratorConfig as DMDCalibratorConfig
from dbcache.config.predictors import FoCaCalibratorConfig as FoCaCalibratorConfig
from dbcache.config.predictors import HermiteCalibratorConfig as HermiteCalibratorConfig
from dbcache.config.predictors import SpectrumCalibratorConfig as SpectrumCalibratorConfig
from dbcache.config.predictors import TaylorSeerCalibratorConfig as TaylorSeerCalibratorConfig
from dbcache.config.presets import preset as preset
from dbcache.config.presets import presets as presets
from dbcache.config.prune import DBPruneConfig as DBPruneConfig
from dbcache.config.quantize import QuantizeBackend as QuantizeBackend
from dbcache.config.quantize import QuantizeConfig as QuantizeConfig
from dbcache.config.steps_mask import steps_mask as steps_mask
from dbcache.dropin import disable_print as disable_print
from dbcache.dropin import init_logger as init_logger
from dbcache.dropin import maybe_empty_cache as maybe_empty_cache
from dbcache.dropin import version_tuple as version_tuple
from dbcache.graphs.graph import GraphOptions as GraphOptions
from dbcache.overview import get_adapter as get_adapter
from dbcache.overview import strify as strify
from dbcache.overview import summary as summary
from dbcache.overview import supported_matrix as supported_matrix
from dbcache.overview import supported_pipelines as supported_pipelines
from dbcache.profiling import profile as profile
from dbcache.quantization import quantize as quantize
from dbcache.refused import ENV as ENV
from dbcache.refused import LayerwiseOffloadHandle as LayerwiseOffloadHandle
from dbcache.refused import LayerwiseOffloadHandleGroup as LayerwiseOffloadHandleGroup
from dbcache.refused import ProfilerContext as ProfilerContext
from dbcache.refused import create_profiler_context as create_profiler_context
from dbcache.refused import get_layerwise_offload_handles as get_layerwise_offload_handles
from dbcache.refused import get_profiler_output_dir as get_profiler_output_dir
from dbcache.refused import layerwise_cpu_offload as layerwise_cpu_offload
from dbcache.refused import layerwise_offload as layerwise_offload
from dbcache.refused import load as load
from dbcache.refused import parse_extra_modules as parse_extra_modules
from dbcache.refused import profile_function as profile_function
from dbcache.refused import remove_layerwise_offload as remove_layerwise_offload
from dbcache.refused import set_profiler_output_dir as set_profiler_output_dir
from dbcache.reporting import report as report
from dbcache.started import start_request as start_request
from dbcache.totals import counters as counters
from dbcache.tuning.sweep import compare as compare
from dbcache.tuning.sweep import sweep as sweep
from dbcache.tuning.tables import sweep_plot as sweep_plot
from dbcache.tuning.tables import sweep_table as sweep_table
from dbcache.tuning.tune import tune as tune

__version__: str
__all__ = [  # noqa: RUF022
    "BasicCacheConfig",
    "BlockAdapter",
    "BlockAdapterRegister",
    "BlockAdapterRegistry",
    "CacheType",
    "CalibratorConfig",
    "CustomCalibratorConfig",
    "DBCache",
    "DBCacheConfig",
    "DBPrune",
    "DBPruneConfig",
    "DMDCalibratorConfig",
    "ENV",
    "FoCaCalibratorConfig",
    "ForwardPattern",
    "GraphOptions",
    "HermiteCalibratorConfig",
    "LayerwiseOffloadHandle",
    "LayerwiseOffloadHandleGroup",
    "NONE",
    "ParallelismBackend",
    "ParallelismConfig",
    "ParamsModifier",
    "PatchFunctor",
    "Pattern_0",
    "Pattern_1",
    "Pattern_2",
    "Pattern_3",
    "Pattern_4",
    "Pattern_5",
    "ProfilerContext",
    "QuantizeBackend",
    "QuantizeConfig",
    "RequestHandle",
    "SpectrumCalibratorConfig",
    "TaylorSeerCalibratorConfig",
    "block_range",
    "cache_type",
    "calibrate",
    "capture",
    "compare",
    "compile",
    "counters",
    "create_profiler_context",
    "disable",
    "disable_cache",
    "disable_print",
    "enable",
    "enable_cache",
    "get_adapter",
    "get_layerwise_offload_handles",
    "get_profiler_output_dir",
    "init_logger",
    "is_enabled",
    "layerwise_cpu_offload",
    "layerwise_offload",
    "load",
    "load_attn_backend_config",
    "load_cache_config",
    "load_configs",
    "load_options",
    "load_parallelism_config",
    "load_quantize_config",
    "maybe_empty_cache",
    "parse_extra_modules",
    "preset",
    "presets",
    "profile",
    "profile_function",
    "quantize",
    "refresh_context",
    "register_predictor",
    "remove_layerwise_offload",
    "report",
    "rows",
    "set_attn_backend",
    "set_compile_configs",
    "set_profiler_output_dir",
    "start_request",
    "steps_mask",
    "strify",
    "summary",
    "supported_matrix",
    "supported_pipelines",
    "sweep",
    "sweep_plot",
    "sweep_table",
    "tune",
    "version_tuple",
]
