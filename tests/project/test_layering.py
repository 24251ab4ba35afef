"""Imports go downwards only: kernels <- core <- adapters <- API, with parallel beside the core.

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
FACADE = ("api", "cache_factory", "__init__", "__main__", "cli", "demo")

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


def is_upward(module: str, name: str) -> bool:
    """Whether `module` must not import `name`."""
    if not f"{name}.".startswith("dbcache."):
        return False
    if layer(module) == "parallel" and name in CONFIGS:
        return False
    return layer(name) not in MAY_IMPORT[layer(module)]


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


def test_imports_go_downwards() -> None:
    assert violations(ROOT) == []


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
    ],
)
def test_upward_import_is_found(tmp_path: Path, file: str, statement: str) -> None:
    for name in ("dbcache/__init__.py", "dbcache/api.py", "dbcache/config.py", "dbcache/lane.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / file).parent.mkdir(exist_ok=True)
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
    ],
)
def test_downward_import_is_allowed(tmp_path: Path, file: str, statement: str) -> None:
    for name in ("dbcache/__init__.py", "dbcache/config.py", "dbcache/lane.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(statement)
    assert violations(tmp_path) == []
