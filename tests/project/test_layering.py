"""Imports go downwards only: kernels <- core <- adapters <- API, with parallel beside the core.

The same holds inside each part, folder by folder (`ORDER`), and no imports go round in circles.
Read from the syntax tree, so imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("kernels", "adapters", "parallel")
SURFACE = ("integrations", "metrics")
OF_CACHE_DIT = ("cache_factory", "caching", "dropin", "ray", "refused")
"""Names and paths that cache-dit's users know."""

"""Facades that nothing imports but what users call."""

FACADE = (
    "api", "command", "compilation", "foreign", "given", "modifiers", "overview", "profiling",
    "quantization", "reporting", "started", "targets", "totals", "tuning",
    "__init__", "__main__", "cli", "demo", *OF_CACHE_DIT, *SURFACE,
)  # fmt: skip

ORDER = {
    "kernels": (
        ("common",),
        ("prediction", "distributed"),
        ("decision",),
        ("pruning", "by_row"),
        ("tuning",),
    ),
    "core": (("config",), ("lanes",), ("graphs",), ("results",)),
    "adapters": (
        ("patching",),
        ("blocks",),
        ("signals", "models"),
        ("stacks",),
        ("requests",),
        ("pipelines",),
    ),
}
"""Folders of each part, from the bottom up: a folder imports of those below it."""

CONFIGS = ("dbcache.config.options", "dbcache.config.parallelism")

MAY_IMPORT = {
    "kernels": {"kernels"},
    "core": {"core", "kernels"},
    "parallel": {"parallel", "kernels"},  # and CONFIGS
    "adapters": {"adapters", "core", "kernels"},
    "facade": {"facade", "adapters", "parallel", "core", "kernels"},
}


def layer(module: str) -> str:
    """Return the layer of a module of the project, by its import name."""
    head = module.split(".")[1] if "." in module else "__init__"
    if head in PARTS:
        return head
    return "facade" if head in FACADE else "core"


def is_in(module: str, folders: tuple[str, ...]) -> bool:
    """Whether a module lies in one of these folders, or is one."""
    return any(f"{module}.".startswith(f"{folder}.") for folder in folders)


def place(module: str) -> tuple[int, str] | None:
    """Return how high a module's folder is in the `ORDER` of its part, and the folder.

    None where the part has no order, or the order does not name the folder.
    """
    part = layer(module)
    above = "dbcache" if part == "core" else f"dbcache.{part}"
    for height, names in enumerate(ORDER.get(part, ())):
        for name in names:
            if is_in(module, (f"{above}.{name}",)):
                return height, name
    return None


def is_upward(module: str, name: str) -> bool:
    """Whether `module` must not import `name`."""
    if not is_in(name, ("dbcache",)):
        return False
    if is_in(name, tuple(f"dbcache.{facade}" for facade in SURFACE)):
        head = module.split(".")[1:2]
        return head not in (["api"], ["cli"], ["__main__"], ["tuning"], name.split(".")[1:2])
    if layer(module) == "parallel" and name in CONFIGS:
        return False
    if layer(name) not in MAY_IMPORT[layer(module)]:
        return True
    own, other = place(module), place(name)
    if layer(name) != layer(module) or own is None or other is None or own == other:
        return False
    return own[0] <= other[0]


def modules(root: Path) -> dict[str, Path]:
    """Return every shipped module by its import name."""
    found = {}
    for part in ("dbcache", *PARTS):
        prefix = ("dbcache",) if part == "dbcache" else ("dbcache", part)
        for path in sorted((root / part).rglob("*.py")):
            *folders, stem = path.relative_to(root / part).with_suffix("").parts
            found[".".join((*prefix, *folders, *([] if stem == "__init__" else [stem])))] = path
    return found


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Yield line and absolute name of everything that a module imports."""
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                # `from dbcache import x` is either a module x or something of the package's own
                is_module = name in known or (source == "dbcache" and alias.name in PARTS)
                yield node.lineno, name if is_module else source


def violations(root: Path) -> list[str]:
    """Return the imports that go against the layers, as `module:line imports name`."""
    known = modules(root)
    return [
        f"{module}:{line} imports {name}"
        for module, path in known.items()
        for line, name in imports(module, path, known)
        if is_upward(module, name) or name.partition(".")[0] in (*PARTS, "bench", "tests")
    ]


def circles(root: Path) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or by way of others.

    The package's own `__init__` is left out: it imports all that users call.
    """
    known = modules(root)
    graph = {
        module: {name for _, name in imports(module, path, known) if name in known}
        for module, path in known.items()
        if module != "dbcache"
    }
    reached = {module: _reached(graph, module) for module in graph}
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
        if module in reached[module]
    }
    return [list(group) for group in sorted(groups)]


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Return what a module imports, directly or by way of others; `dbcache` itself leads on to
    nothing."""
    found: set[str] = set()
    ahead = [start]
    while ahead:
        new = graph[ahead.pop()] - found - {"dbcache"}
        found |= new
        ahead += new
    return found


def test_imports_go_downwards() -> None:
    assert violations(ROOT) == []


def test_no_imports_go_round_in_circles() -> None:
    assert circles(ROOT) == []


@pytest.mark.parametrize(
    "back",
    [
        "from dbcache.lanes import plan",
        "def f():\n    import dbcache.lanes.plan",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..lanes.plan import Plan",
    ],
)
def test_a_circle_is_found_wherever_the_import_stands(tmp_path: Path, back: str) -> None:
    sources = {
        "__init__": "from dbcache.lanes import lane",
        "config/cache": back,
        "config/options": "import dbcache",
        "lanes/plan": "from dbcache.lanes.lane import Lane",
        "lanes/lane": "from dbcache.config.cache import Config\nfrom dbcache.config import options",
    }
    for name, text in sources.items():
        path = tmp_path / "dbcache" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    names = ["dbcache.config.cache", "dbcache.lanes.lane", "dbcache.lanes.plan"]
    assert circles(tmp_path) == [names]
    (tmp_path / "dbcache/config/cache.py").write_text("")
    assert circles(tmp_path) == []


def test_kernels_need_only_torch_and_triton() -> None:
    known = modules(ROOT)
    foreign = {
        f"{module}:{line} imports {name}"
        for module, path in known.items()
        if layer(module) == "kernels"
        for line, name in imports(module, path, known)
        if name.partition(".")[0] not in {"dbcache", "torch", "triton", *sys.stdlib_module_names}
    }
    assert foreign == set()


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("kernels/op.py", "from dbcache.config import CacheConfig"),
        ("kernels/op.py", "import dbcache"),
        ("kernels/op.py", "from kernels.other import f"),
        ("parallel/ring.py", "from dbcache import lane"),
        ("parallel/ring.py", "import dbcache.adapters.auto"),
        ("adapters/auto.py", "from dbcache import enable"),
        ("adapters/auto.py", "from dbcache.api import enable"),
        ("adapters/auto.py", "from ..api import enable"),
        ("adapters/auto.py", "import tests.support"),
        ("dbcache/lane.py", "from dbcache.adapters.auto import detect"),
        ("dbcache/lane.py", "from dbcache import adapters"),
        ("dbcache/lane.py", "def f():\n    from . import api"),
        ("dbcache/graphs/graph.py", "from ..api import enable"),
        ("dbcache/config/cache.py", "from dbcache.lanes.plan import make_plan"),
        ("dbcache/config/cache.py", "from dbcache.results.summary import Summary"),
        ("kernels/common/sums.py", "from dbcache.kernels.tuning import tune"),
        ("kernels/decision/decide.py", "from dbcache.kernels.pruning import decide_tail"),
        ("adapters/models/table.py", "from dbcache.adapters.signals.modulated import f"),
        ("adapters/patching/functor.py", "from ..blocks.patterns import f"),
        ("dbcache/demo/run.py", "from dbcache.metrics import compute_psnr"),
        ("dbcache/cache_factory.py", "import dbcache.integrations.comfy"),
    ],
)
def test_upward_import_is_found(tmp_path: Path, file: str, statement: str) -> None:
    for name in ("dbcache/__init__.py", "dbcache/api.py", "dbcache/config.py", "dbcache/lane.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / file).write_text(statement)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("kernels/op.py", "import torch\nfrom dbcache.kernels.other import f"),
        ("parallel/ring.py", "from dbcache.config.parallelism import ParallelismConfig"),
        ("adapters/auto.py", "from dbcache import lane\nfrom dbcache.kernels import op"),
        ("dbcache/lane.py", "from dbcache.kernels.op import f\nfrom . import config"),
        ("dbcache/api.py", "from dbcache.adapters.auto import f\nimport dbcache.parallel.ring"),
        ("dbcache/demo/run.py", "import dbcache\nfrom dbcache import adapters"),
        ("dbcache/lanes/plan.py", "from dbcache.config.cache import f\nfrom . import lane"),
        ("adapters/models/lookup.py", "from .table import MODELS\nfrom ..blocks import patterns"),
        ("kernels/decision/decide.py", "from dbcache.kernels.prediction.taylor import f"),
        ("dbcache/cli.py", "from dbcache.metrics import compute_psnr"),
        ("dbcache/api.py", "from dbcache.integrations import comfy"),
        ("dbcache/metrics/table.py", "from dbcache.metrics import compute_psnr"),
    ],
)
def test_downward_import_is_allowed(tmp_path: Path, file: str, statement: str) -> None:
    for name in ("dbcache/__init__.py", "dbcache/config.py", "dbcache/lane.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / file).write_text(statement)
    assert violations(tmp_path) == []
