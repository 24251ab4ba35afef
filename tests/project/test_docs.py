"""Links between pages, and from them to files, lead somewhere; the names in snippets exist.

The snippets of docs/serving.md are run, one after another, on a tiny pipeline.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pages import PAGES, ROOT, python_blocks
from reader import GIVEN

import dbcache

WRITTEN = ROOT / "docs" / "reference.md"
"""Is written when the site is built; test_site.py does."""

LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"(?<![\w/.-])((?:docs|bench|tests|adapters|kernels|parallel|dbcache)/[\w/.-]+)")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for line in page.read_text(encoding="utf-8").splitlines():
        if re.match(r"#{1,6} ", line):
            text = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower())
            found.add(text.replace(" ", "-"))
    return found


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        if to == WRITTEN:
            continue
        if not to.exists() or (anchor and anchor not in anchors(to)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "b.md").write_text("# The `rule`: what, and why\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[x](b.md#the-rule-what-and-why) [y](b.md#other) [z](c.md) [w](https://x.org)\n"
    )
    assert broken_links(page) == ["b.md#other", "c.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_are_named_exist(page):
    names = {name.rstrip("./") for name in NAMED.findall(page.read_text(encoding="utf-8"))}
    missing = {name for name in names if "::" not in name and not (ROOT / name).exists()}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_that_use_the_package_are_python_with_names_that_exist(page):
    blocks = re.findall(r"(?:(?:^    .*|^)\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    for block in blocks:
        code = textwrap.dedent(block)
        if not re.search(r"^(?:import|from|dbcache\.|with |for |\w+ = )", code, re.MULTILINE):
            continue
        if "dbcache" not in code or re.search(r"^(?:make|python|bench/|pip) ", code, re.MULTILINE):
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "dbcache":
                    assert hasattr(dbcache, node.attr), f"{page.name}: dbcache.{node.attr}"
            elif isinstance(node, ast.ImportFrom) and node.module == "dbcache":
                for alias in node.names:
                    assert hasattr(dbcache, alias.name), f"{page.name}: {alias.name}"


def test_external_links_are_listed_on_one_page():
    listed = ROOT / "docs" / "links.md"
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES if page != listed)
    links = {link for link in LINK.findall(pages) if link.startswith("http")}
    rows = re.findall(r"\| (https?://\S+) \|", listed.read_text(encoding="utf-8"))
    assert sorted(rows) == sorted(links)


def names_of_the_serving_page() -> dict[str, Any]:
    """Return what the page says that its snippets find."""
    flux, pipe = tiny.FAMILIES["flux"], tiny.pipeline("flux")
    job = GIVEN | {"height": 64, "width": 64}
    return {
        "pipe": pipe,
        "transformer": pipe.transformer,
        "jobs": [job | {"num_inference_steps": steps} for steps in (5, 6, 7)],
        "noise": tiny.noise(*flux.latent_shape, seed=3),
        "inputs": lambda x, t: flux.arguments(x, t, "cond"),
    }


@pytest.mark.usefixtures("one_thread", "plain_kernels")
def test_the_snippets_of_the_serving_page_run():
    page = ROOT / "docs" / "serving.md"
    blocks, names = python_blocks(page), names_of_the_serving_page()
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, snippet {number}", "exec"), names)
    assert sum("dbcache" in block for block in blocks) >= 8
    assert all(torch.isfinite(image).all() for image in names["images"])
    assert names["request"].is_closed
    assert names["active"] == []
    lanes = dbcache.summary(names["transformer"], logging=False).lanes
    assert [lane.steps for lane in lanes] == [8]  # the second image began anew
    assert lanes[0].cached_steps
