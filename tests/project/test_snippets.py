"""Every Python block of README.md and docs/ runs, page by page, with tiny models for hub names.

What stands for what a reader has is in `tests/support/reader.py`. Pages with tests of their own,
and blocks that need what no CPU has, are listed with the reason.
"""

import ast
import contextlib
import io
import json
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import FluxPipeline
from pages import PAGES, ROOT, python_blocks
from reader import ReaderPipeline

import dbcache

OWN_TESTS = {
    "serving.md": "test_docs.py",
    "metrics.md": "tests/metrics/test_page.py",
    "engines.md": "tests/integrations",
    "parallel.md": "tests/parallel: the blocks need torchrun",
    "tuning.md": "tests/tuning: a search takes minutes, and draws the same picture twice",
}
"""Pages whose blocks are run elsewhere."""

LEFT_OUT = {
    ("architecture.md", "change = lane.measure"): "the step, as pseudocode",
    ("CONTRIBUTING.md", "Row("): "a row of the table of models",
    ("graphs.md", "dbcache.enable(pipe, cuda_graph=True)\nfor"): "graphs need a GPU",
    ("kernels.md", "from dbcache.kernels.tuning"): "tuning needs a GPU",
    ("guidance.md", "with transformer.cache_context"): "the call is cut short",
    ("options.md", "dbcache.enable(model,"): "the signature",
    ("options.md", "class OneStream"): "parts of a model that are the reader's",
    ("video.md", "import dbcache"): "a pipeline that diffusers does not have",
}
"""Blocks, by page and beginning, that are not run."""

TWO_MODELS = ("pipe.transformer_2", "params_modifiers=[")
"""Where a block has one of these, `pipe` is a pipeline of two transformers."""


class TwoModels:
    """Runs Wan 2.2 for any prompt."""

    def __init__(self):
        self.pipe = tiny.pipeline("wan2.2")

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def __call__(self, *_prompt, **_options):
        return tiny.generate(self.pipe, 6, guided=False, seed=1)


def is_python(block):
    """Whether a block is Python that does something; shell commands and tables are not."""
    try:
        tree = ast.parse(block)
    except SyntaxError:
        return False
    return any(
        isinstance(node, ast.Import | ast.ImportFrom | ast.Call | ast.With)
        for node in ast.walk(tree)
    )


def blocks_of(page):
    return [block for block in python_blocks(page) if is_python(block)]


def names():
    pipe = ReaderPipeline.from_pretrained()
    return {
        "dbcache": dbcache,
        "torch": torch,
        "pipe": pipe,
        "transformer": pipe.transformer,
        "prompt": "a cat",
        "prompts": ["a cat", "a dog"],
    }


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Give what the pages name: pipelines of the hub, files of the reader's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FluxPipeline, "from_pretrained", ReaderPipeline.from_pretrained)
    Path("cache.yaml").write_text("cache_config:\n  residual_diff_threshold: 0.12\n")
    Path("cache.json").write_text(json.dumps({"residual_diff_threshold": 0.12}))


PAGES_WITH_CODE = [page for page in PAGES if page.name not in OWN_TESTS and blocks_of(page)]


@pytest.mark.usefixtures("reader", "one_thread", "plain_kernels")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page):
    known = names()
    for number, block in enumerate(blocks_of(page)):
        if any(page.name == name and block.startswith(start) for name, start in LEFT_OUT):
            continue
        scope = known
        if any(part in block for part in TWO_MODELS):
            two = TwoModels()
            scope = {**known, "pipe": two if "pipe(" in block else two.pipe}
        elif "dbcache.calibrate(" in block:
            dbcache.disable(known["pipe"])
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, f"{page.name}, block {number}", "exec"), scope)
    dbcache.disable(known["pipe"])


def test_what_is_left_out_is_there():
    for name, start in LEFT_OUT:
        page = ROOT / name if name == "CONTRIBUTING.md" else ROOT / "docs" / name
        assert any(block.startswith(start) for block in python_blocks(page)), (name, start)
    assert all((ROOT / "docs" / name).exists() for name in OWN_TESTS)


def test_a_table_is_no_python():
    assert not is_python("stack   branch  policy\n")
    assert is_python(textwrap.dedent("    import dbcache\n"))
