"""The names of `dbcache/exports.py`, for type checkers."""

from dbcache.adapters.blocks.block_adapter import BlockAdapter as BlockAdapter
from dbcache.adapters.blocks.patterns import ForwardPattern as ForwardPattern
from dbcache.adapters.blocks.registry import BlockAdapterRegistry as BlockAdapterRegister
from dbcache.adapters.blocks.registry import BlockAdapterRegistry as BlockAdapterRegistry
from dbcache.adapters.patching.patch_functor import PatchFunctor as PatchFunctor
from dbcache.adapters.requests.request_handle import RequestHandle as RequestHandle
from dbcache.api import calibrate as calibrate
from dbcache.api import capture as capture
from dbcache.api import disable as disable
from dbcache.api import disable as disable_cache
from dbcache.api import enable as enable
from dbcache.api import enable as enable_cache
from dbcache.api import is_enabled as is_enabled
from dbcache.api import refresh_context as refresh_context
from dbcache.api import start_request as start_request
from dbcache.api import strify as strify
from dbcache.api import summary as summary
from dbcache.api import supported_matrix as supported_matrix
from dbcache.api import supported_pipelines as supported_pipelines
from dbcache.cache_factory import CacheType as CacheType
from dbcache.cache_factory import block_range as block_range
from dbcache.cache_factory import cache_type as cache_type
from dbcache.config.cache import DBCacheConfig as DBCacheConfig
from dbcache.config.cache import ParamsModifier as ParamsModifier
from dbcache.config.files import load_cache_config as load_cache_config
from dbcache.config.files import load_configs as load_configs
from dbcache.config.files import load_configs as load_options
from dbcache.config.files import load_parallelism_config as load_parallelism_config
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
from dbcache.config.steps_mask import steps_mask as steps_mask
from dbcache.graphs.graph import GraphOptions as GraphOptions

__version__: str
__all__ = [
    "BlockAdapter",
    "BlockAdapterRegister",
    "BlockAdapterRegistry",
    "CacheType",
    "CalibratorConfig",
    "CustomCalibratorConfig",
    "DBCacheConfig",
    "DBPruneConfig",
    "DMDCalibratorConfig",
    "FoCaCalibratorConfig",
    "ForwardPattern",
    "GraphOptions",
    "HermiteCalibratorConfig",
    "ParallelismBackend",
    "ParallelismConfig",
    "ParamsModifier",
    "PatchFunctor",
    "RequestHandle",
    "SpectrumCalibratorConfig",
    "TaylorSeerCalibratorConfig",
    "block_range",
    "cache_type",
    "calibrate",
    "capture",
    "disable",
    "disable_cache",
    "enable",
    "enable_cache",
    "is_enabled",
    "load_cache_config",
    "load_configs",
    "load_options",
    "load_parallelism_config",
    "preset",
    "presets",
    "refresh_context",
    "register_predictor",
    "start_request",
    "steps_mask",
    "strify",
    "summary",
    "supported_matrix",
    "supported_pipelines",
]
