"""The house rules that a linter does not check: short files, classes and functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("dbcache", "kernels", "adapters", "parallel")

MOST_LINES = {"file": 500, "class": 300, "function": 60}

Item = tuple[str, str, int]
"""Kind, name and lines of something."""


def lines_of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a class or function, with decorators and docstring."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    assert node.end_lineno is not None
    return node.end_lineno - first + 1


def items(source: str, where: str) -> Iterator[Item]:
    """Yield a file, its classes and its functions, those inside of others too."""
    yield "file", where, len(source.splitlines())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield "class", f"{where}:{node.name}", lines_of(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "function", f"{where}:{node.name}", lines_of(node)


def too_long(root: Path, parts: tuple[str, ...] = PARTS) -> list[str]:
    """Return what has more lines than it may, as `file:name: lines`."""
    return [
        f"{kind} {name}: {count} lines, at most {MOST_LINES[kind]}"
        for part in parts
        for path in sorted((root / part).rglob("*.py"))
        for kind, name, count in items(path.read_text("utf-8"), str(path.relative_to(root)))
        if count > MOST_LINES[kind]
    ]


def test_no_file_class_or_function_of_the_package_is_too_long() -> None:
    assert too_long(ROOT) == []


def test_what_is_too_long_is_found_wherever_it_stands(tmp_path: Path) -> None:
    body = "\n".join(["        x = 1"] * 57)
    fits = f"class A:\n    @property\n    def f(self):\n{body}\n        return x\n"
    (tmp_path / "dbcache").mkdir()
    path = tmp_path / "dbcache" / "a.py"
    path.write_text(fits)
    assert too_long(tmp_path) == []
    path.write_text(fits.replace("return x", "y = x\n        return x"))
    assert too_long(tmp_path) == ["function dbcache/a.py:f: 61 lines, at most 60"]
    path.write_text("class A:\n" + "    x = 1\n" * 300 + "\n" * 200)
    assert too_long(tmp_path) == [
        "file dbcache/a.py: 501 lines, at most 500",
        "class dbcache/a.py:A: 301 lines, at most 300",
    ]
