"""The table of methods: what it measures, that it goes on where it was, and what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import inside
import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

import dbcache  # noqa: E402
from bench import methods  # noqa: E402
from bench.methods import BEGIN, BEST_ROWS, END, LEVELS, METHODS, Method  # noqa: E402
from dbcache.config.policies import POLICIES, SCHEDULED  # noqa: E402
from dbcache.demo import digits  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ONLY = "TaylorSeer 2"
MARKERS = BEGIN.format(BEST_ROWS, "methods"), END.format(BEST_ROWS)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs the bench and returns what it wrote: JSON, table, page."""
    pytest.importorskip("cache_dit", minversion="1.5.3")
    out, docs = tmp_path / "new" / "m.json", tmp_path / "m.md"
    docs.write_text(f"# Title\n\n{MARKERS[0]}\nold\n{MARKERS[1]}\n")

    def call(*arguments):
        paths = ["--out", str(out), "--docs", str(docs)]
        common = ["methods", "--digits", "1", "--batches", "1", *paths, "--only", ONLY]
        monkeypatch.setattr(sys, "argv", [*common, *arguments])
        methods.main()
        table = out.with_suffix(".md").read_text()
        return json.loads(out.read_text()), table, docs.read_text()

    return call


def test_predictors_are_compared_at_equal_decisions_and_a_second_run_measures_nothing(run, capsys):
    result, table, page = run("--steps", "9")
    rows = {(row["level"], row["engine"], row["method"]): row for row in result["rows"]}
    assert len(rows) == 2 * len(LEVELS)
    assert len(result["records"]) == len(rows)
    for level in LEVELS:
        of_level = [row for key, row in rows.items() if key[0] == level]
        assert len({row["cached"] for row in of_level}) == 1
        mine, peer = of_level
        assert mine["psnr"] == pytest.approx(peer["psnr"], abs=0.1)
    cached = [rows[level, "dbcache", ONLY]["cached"] for level in LEVELS]
    assert cached == [0, 2, 4, 5]
    assert table.startswith("10 images of the digits model, 9 steps")
    assert table.count("\n| 3x |") == 2
    assert page.startswith(f"# Title\n\n{MARKERS[0]}\n\n### About 1.5x")
    assert page.count(f"\n| {ONLY} | 4/9 |") == 1  # the short table of 3x
    assert page.count(f"\n| {ONLY} of cache-dit | 4/9 |") == 1
    assert page.endswith(f"\n\n{MARKERS[1]}\n")
    assert "old" not in page

    capsys.readouterr()
    assert run("--steps", "9") == (result, table, page)
    assert "batch 0" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"m\.json is of other settings"):
        run("--steps", "10")


def test_other_settings_of_a_method_are_measured_anew():
    record = {"level": "3x", "engine": "dbcache", "method": "mine", "seed": 0}
    method = Method("mine", ("FoCaCalibratorConfig", {"foca_horizon": 1.0}))
    record["settings"] = method.settings("3x")
    assert methods.missing((method,), [record], "3x", 0) == []
    assert methods.missing((method,), [record], "3x", 1) == [method]
    other = Method("mine", ("FoCaCalibratorConfig", {"foca_horizon": 2.0}))
    assert methods.missing((other,), [record], "3x", 0) == [other]
    some = Method("mine", levels={"2x": {}})
    assert methods.missing((some,), [], "3x", 0) == []


def test_the_rows_have_names_of_their_own():
    names = [(method.engine, method.name) for method in METHODS]
    assert len(set(names)) == len(names)


def test_the_policies_levels_are_settings_that_the_digits_model_takes():
    pipe = digits.load_pipeline()
    measured = {m.cache["policy"]: m for m in METHODS if "policy" in m.cache}
    assert set(measured) == set(POLICIES) - {"dbcache", *SCHEDULED}
    for policy, method in measured.items():
        thresholds = []
        for level in LEVELS:
            dbcache.enable(pipe, **method.options(level))
            (stack,) = inside.stacks(pipe.transformer)
            assert stack.settings.cache.policy == policy
            thresholds.append(stack.settings.cache.threshold)
            dbcache.disable(pipe)
        assert thresholds == sorted(thresholds)
        assert len(thresholds) == len(LEVELS)


def test_the_file_has_a_line_per_record_and_row():
    result = {"steps": 9, "about": {"device": "CPU"}, "records": [{"a": 1}, {"a": 2}], "rows": []}
    text = methods.as_json(result)
    assert json.loads(text) == result
    assert '\n  {"a": 1},\n  {"a": 2}\n' in text


def test_the_published_table_is_that_of_the_published_records():
    result = json.loads(methods.RESULTS.read_text())
    assert methods.as_json(result) == methods.RESULTS.read_text()
    assert methods.table(METHODS, result["records"]) == result["rows"]
    page = methods.DOCS.read_text()
    assert methods.best_rows(result) in page
    assert methods.markdown(result) + "\n" == methods.RESULTS.with_suffix(".md").read_text()
    assert {row["batches"] * result["images_per_batch"] for row in result["rows"]} == {100}
    names = {(row["level"], row["engine"], row["method"]) for row in result["rows"]}
    assert names == {(x, m.engine, m.name) for m in METHODS for x in LEVELS if m.options(x)}


def test_as_published_no_predictor_is_behind_cache_dits_and_foca_is_ahead_of_taylorseer():
    rows = json.loads(methods.RESULTS.read_text())["rows"]
    psnr = {(row["level"], row["engine"], row["method"]): row["psnr"] for row in rows}
    cached = {(row["level"], row["engine"], row["method"]): row["cached"] for row in rows}
    compared = [(x, name) for x, engine, name in psnr if engine == methods.PEER]
    assert len(compared) == 5 * len(LEVELS)
    for level, name in compared:
        mine, peer = (level, "dbcache", name), (level, methods.PEER, name)
        assert cached[mine] == cached[peer]
        assert psnr[mine] > psnr[peer] - 1e-4, mine  # dB; sums are rounded in another order
    assert psnr["3x", "dbcache", "FoCa"] > psnr["3x", "dbcache", "TaylorSeer 1"] + 1


def test_a_page_without_the_markers_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n")
    with pytest.raises(ValueError, match=r"page\.md must contain '<!-- best rows by"):
        methods.write_docs(page, "text", BEST_ROWS)
    assert page.read_text() == "# Title\n"
