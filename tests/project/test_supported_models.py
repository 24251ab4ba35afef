"""The table of models that users see says what the tests cover, and the page shows it."""

import ast

import pytest
import write_models
from model_case import find_class

import dbcache
from dbcache.adapters.models import covered, matrix
from dbcache.adapters.models.table import MODELS, REFUSED

RENEW = "run `python tests/support/write_models.py`"


@pytest.fixture(scope="module")
def found():
    return write_models.scan()


def test_what_is_ticked_is_what_the_tests_run(found):
    assert write_models.MODULE.read_text() == write_models.module_text(found), RENEW
    assert {column: (test, tuple(names)) for column, (test, names) in found.items()} == (
        covered.COVERED
    ), RENEW


def test_every_class_has_a_test_of_its_cache(found):
    missing = {row.transformer for row in MODELS} - set(found["Cache"][1])
    assert {name for name in missing if find_class(name) is not None} == set()


def test_the_tests_exist():
    for column, (test, names) in covered.COVERED.items():
        assert bool(test) == bool(names), column
        if test:
            path, _, function = test.partition("::")
            tree = ast.parse((write_models.ROOT / path).read_text())
            names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert function in names, f"{test} of {column}: {RENEW}"


def test_the_page_is_up_to_date():
    assert write_models.PAGE.read_text() == matrix.page(), RENEW
    for name in REFUSED:
        assert f"- `{name}` " in matrix.page()


def test_matrix_has_a_line_per_class_and_a_tick_per_test():
    header, _, *lines = dbcache.supported_matrix().splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")][2:]
    assert columns == ["Cache", "ControlNet", "Context parallel", "Tensor parallel"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert sorted(row[1].strip("`") for row in cells) == sorted(r.transformer for r in MODELS)
    for i, column in enumerate(columns):
        ticked = {row[1].strip("`") for row in cells if row[2 + i] == "✅"}
        assert ticked == set(covered.COVERED[column][1])
        assert {row[2 + i] for row in cells} <= {"✅", "–"}


def test_supported_pipelines_names_the_same_classes():
    count, names = dbcache.supported_pipelines()
    assert count == len(names) == len(MODELS)
    assert [name.partition(":")[0] for name in names] == [row.transformer for row in MODELS]
