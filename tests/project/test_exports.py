"""What `import dbcache` offers: all of it is there, in time, under old names, and as typed."""

from __future__ import annotations

import ast
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import dbcache
from dbcache.exports import ALIASES, HOME, MODULES, SUBMODULES

STUB = Path(dbcache.__file__).with_name("__init__.pyi")

FIRST = (
    "BlockAdapter", "BlockAdapterRegister", "BlockAdapterRegistry", "CacheType",
    "CalibratorConfig", "CustomCalibratorConfig", "DBCacheConfig", "DBPruneConfig",
    "DMDCalibratorConfig", "FoCaCalibratorConfig", "ForwardPattern", "GraphOptions",
    "HermiteCalibratorConfig", "ParallelismBackend", "ParallelismConfig", "ParamsModifier",
    "PatchFunctor", "SpectrumCalibratorConfig", "TaylorSeerCalibratorConfig", "block_range",
    "cache_type", "calibrate", "capture", "disable", "disable_cache", "enable", "enable_cache",
    "load_configs", "refresh_context", "register_predictor", "steps_mask", "strify", "summary",
    "supported_matrix", "supported_pipelines",
)  # fmt: skip
"""Names that were there before they were resolved on first use."""


def run(code: str) -> str:
    """Run `code` in a fresh interpreter and return what it prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_stub_and_table_agree_name_by_name():
    imported, listed = {}, None
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            imported |= {alias.asname: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Assign):
            listed = ast.literal_eval(node.value)
    assert imported == {
        name: (f"dbcache.{module}", ALIASES.get(name, name)) for name, module in HOME.items()
    }
    assert listed == dbcache.__all__ == sorted(HOME)


def test_each_name_is_what_its_module_defines():
    for module, names in MODULES.items():
        for name in names:
            found = getattr(dbcache, name)
            assert found is getattr(sys.modules[f"dbcache.{module}"], name)
            if hasattr(found, "__module__"):
                assert found.__module__ == f"dbcache.{module}", name
    for alias, name in ALIASES.items():
        assert getattr(dbcache, alias) is getattr(dbcache, name)


def test_the_names_of_the_first_version_and_of_requests_are_there():
    wanted = {*FIRST, "is_enabled", "start_request", "RequestHandle", "load_options"}
    assert wanted - set(dbcache.__all__) == set()
    assert set(dbcache.__all__) | set(SUBMODULES) <= set(dir(dbcache))


def test_import_alone_brings_no_torch_and_the_first_use_does():
    code = """
import sys
import dbcache as cache_dit
heavy = ("torch", "diffusers", "triton", "numpy", "transformers")
print([name for name in heavy if name in sys.modules], cache_dit.__version__)
from dbcache import DBCacheConfig, enable_cache
print("torch" in sys.modules, enable_cache is cache_dit.enable is cache_dit.api.enable)
print([name for name in ("torch._dynamo", "diffusers", "transformers") if name in sys.modules])
print(set(__import__("dbcache").exports.HOME) <= set(dir(cache_dit)))
"""
    assert run(code).splitlines() == [f"[] {dbcache.__version__}", "True True", "[]", "True"]


def test_submodules_need_no_import_of_their_own():
    """Each is the first that its process looks up; what takes long to import is there already."""
    code = f"""
import os, sys, torch, diffusers
for name in {SUBMODULES!r}:
    if not os.fork():
        import dbcache
        print(getattr(dbcache, name).__name__, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
assert "dbcache" not in sys.modules
"""
    assert run(code).split() == [f"dbcache.{name}" for name in SUBMODULES]


def test_star_import_gives_all_names_and_no_others():
    names: dict[str, object] = {}
    exec("from dbcache import *", names)
    assert names.keys() - {"__builtins__"} == set(HOME)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dbcache' has no attribute 'enabel'"):
        dbcache.enabel  # noqa: B018
    with pytest.raises(ImportError, match="enabel"):
        exec("from dbcache import enabel")


def test_configs_are_pickled_in_one_process_and_read_in_another(tmp_path):
    config = dbcache.DBCacheConfig(Fn_compute_blocks=3, residual_diff_threshold=0.2)
    predictor = dbcache.FoCaCalibratorConfig(foca_horizon=0.5)
    path = tmp_path / "configs"
    path.write_bytes(pickle.dumps((config, predictor, dbcache.ForwardPattern.Pattern_1)))
    code = f"""
import pickle
config, predictor, pattern = pickle.loads(open({str(path)!r}, "rb").read())
print(config.strify(), predictor.foca_horizon, pattern.name)
"""
    assert run(code) == f"{config.strify()} 0.5 Pattern_1"
    assert copy.deepcopy(config).as_dict() == config.as_dict()
