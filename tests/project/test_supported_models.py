"""The table of models that users see says what the tests cover, and the page shows it."""

import ast

import pytest
import write_models
from model_case import find_class

import dbcache
from dbcache.adapters.models import matrix
from dbcache.adapters.models.series import SERIES
from dbcache.adapters.models.table import ELSEWHERE, MODELS, REFUSED
from dbcache.parallel.plans import PLANS

COLUMNS = ["Cache", "ControlNet", "Context parallel", "Tensor parallel"]


@pytest.fixture(scope="module")
def found():
    return write_models.scan()


@pytest.mark.parametrize("column", COLUMNS)
def test_what_is_ticked_is_what_the_tests_run(found, column):
    here = {row.transformer for row in MODELS if find_class(row.transformer) is not None}
    assert matrix.covered(PLANS)[column] & here == found[column]
    assert found[column]


def test_the_tests_exist():
    assert list(write_models.TESTS) == COLUMNS
    for test in write_models.TESTS.values():
        path, _, function = test.partition("::")
        tree = ast.parse((write_models.ROOT / path).read_text())
        assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_the_page_is_up_to_date():
    page = write_models.page()
    assert write_models.PAGE.read_text() == page, "run `python tests/support/write_models.py`"
    refused = page.split("refused, with the reason:")[1]
    for name in REFUSED:
        assert refused.count(f"`{name}`") == 1


def test_matrix_has_a_line_per_class_and_a_tick_per_test():
    header, _, *lines = dbcache.supported_matrix().splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")][2:] == COLUMNS
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert sorted(row[1].strip("`") for row in cells) == sorted(r.transformer for r in MODELS)
    for i, column in enumerate(COLUMNS):
        ticked = {row[1].strip("`") for row in cells if row[2 + i] == "✅"}
        assert ticked == matrix.covered(PLANS)[column]
        assert {row[2 + i] for row in cells} <= {"✅", "–"}


def test_each_class_has_a_series_of_pipelines():
    assert set(SERIES) == {row.transformer for row in (*MODELS, *ELSEWHERE)}
