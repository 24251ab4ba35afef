"""The report: a page that a browser shows, with what the summary knows, and honest estimates."""

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import tiny
from PIL import Image
from schedules import content

import dbcache
from dbcache import DBCacheConfig, DBPruneConfig, FoCaCalibratorConfig, ParamsModifier
from dbcache.results import page as pages
from dbcache.results.lane import LaneSummary
from dbcache.results.replay import estimates, replayed
from dbcache.results.summary import Summary

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

STEPS = 20
OPTIONS = {"Fn_compute_blocks": 1, "max_warmup_steps": 3, "residual_diff_threshold": 0.12}


def run(family="wan", config=None, **options):
    pipe = dbcache.enable(tiny.pipeline(family), config or DBCacheConfig(**OPTIONS), **options)
    tiny.generate(pipe, STEPS, guided=family == "wan")
    return pipe


def browser():
    """Return the path of a browser of Chromium's family."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("DBCACHE_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    assert found, "the page must be looked at: apt-get install chromium, or set DBCACHE_BROWSER"
    return found


def shown(file, tmp_path):
    """Return what a headless browser draws of a page."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--force-device-scale-factor=1 --window-size=1000,1900"
    )
    picture = tmp_path / "page.png"
    command = [browser(), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--screenshot={picture}", file.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return Image.open(picture).convert("RGB")


class Tags(HTMLParser):
    """Notes tags, whether they are closed, and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_browser_shows_a_page_that_needs_nothing_else(tmp_path):
    pipe = dbcache.enable(tiny.pipeline("wan"), DBCacheConfig(**OPTIONS), FoCaCalibratorConfig())
    with dbcache.profile():
        tiny.generate(pipe, STEPS)
    file = dbcache.report(pipe, tmp_path / "run.html")
    text = file.read_text()
    tags = Tags()
    tags.feed(text)
    assert (tags.open, tags.addresses) == ([], [])
    assert not re.search(r"<script|url\(|@import", text)
    summary = dbcache.summary(pipe, logging=False)
    for lane in summary:
        assert f"{lane.name}: {len(lane.cached_steps)} of {STEPS} steps cached" in tags.text
    cached = sum(len(lane.cached_steps) for lane in summary)
    assert text.count('class="cached"') == cached > 0
    assert text.count('class="full"') == 2 * STEPS - cached
    for part in ("WanPipeline", "(measured)", "(estimate)", f"{summary.nbytes:,} bytes"):
        assert part in tags.text
    picture = shown(file, tmp_path)
    colours = {colour: count for count, colour in picture.getcolors(1 << 24)}
    width, height = picture.size
    assert colours[255, 255, 255] > 0.6 * width * height  # a light page, not a blank one
    strip = tuple(int(pages.COLOURS["warm-up"][i : i + 2], 16) for i in (1, 3, 5))
    assert colours[strip] > 6 * 18 * 18  # six full steps of the warm-up
    bar = [0.75 * int(pages.COLOURS["below threshold"][i : i + 2], 16) + 64 for i in (1, 3, 5)]
    near = sum(
        count
        for colour, count in colours.items()
        if max(abs(x - y) for x, y in zip(colour, bar, strict=True)) < 3
    )
    assert near > 2000


def test_the_settings_on_the_page_do_the_same():
    pipe = run("flux", None, params_modifiers=ParamsModifier(max_warmup_steps=5))
    expected = dbcache.summary(pipe, logging=False)
    other = tiny.pipeline("flux")
    exec(expected.config, {"dbcache": dbcache, "pipe": other})
    tiny.generate(other, STEPS, guided=False)
    found = dbcache.summary(other, logging=False)
    assert found[0].reasons == expected[0].reasons
    assert found.config == expected.config
    assert "max_warmup_steps=5" in expected.config


def test_of_a_schedule_the_page_says_that_there_was_one(tmp_path):
    pipe = dbcache.enable(tiny.pipeline("flux"), schedule=content(), target="fast")
    tiny.generate(pipe, 12, guided=False)
    text = dbcache.report(pipe, tmp_path / "run.html").read_text()
    assert "schedule=&quot;...&quot;" in text
    assert "No change was compared" in text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_continuous_cached_steps": 2},
        {"max_cached_steps": 4, "residual_diff_threshold": 0.3},
        {"max_accumulated_residual_diff_threshold": 0.2, "residual_diff_threshold": 0.5},
        {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": 3},
        {"residual_diff_threshold": 0.0},
        {"warmup_interval": 2, "max_warmup_steps": 8},
        {"policy": "easycache", "residual_diff_threshold": 0.3},
    ],
)
@pytest.mark.filterwarnings("ignore:.*nothing was cached")
def test_a_replay_under_the_same_threshold_caches_the_same_steps(options):
    pipe = run("wan", DBCacheConfig(**OPTIONS | options))
    for lane in dbcache.summary(pipe, logging=False):
        assert replayed(lane, lane.threshold) == lane.cached_steps
        found = dict(estimates(lane))
        assert found[lane.threshold] == len(lane.cached_steps)
        assert found[max(found)] >= max(found.values()) - ("max_acc" in str(options))


def test_a_cache_that_never_hits_is_shown_thresholds_that_would():
    lane = LaneSummary(
        "T", "blocks", None, 0.01, ["warm-up"] + ["above threshold"] * 4,
        {1: 0.2, 2: 0.3, 3: 0.25, 4: 0.5}, 1.0,
    )  # fmt: skip
    found = dict(estimates(lane))
    assert found[0.01] == 0
    assert found[max(found)] == 4
    assert sorted(set(found.values())) == [0, 1, 2, 3, 4]


def test_what_is_not_compared_has_no_estimate():
    pipe = run("wan", DBPruneConfig(**OPTIONS))
    text = pages.page(dbcache.summary(pipe, logging=False))
    assert "Blocks are left out one by one" in text
    assert "of the blocks left out" in text
    assert "by blocks, not measured" in text
    assert text.count('class="ran"') == text.count('class="cached"') > 0


def test_the_bound_is_that_of_medians():
    reasons = ["warm-up", "warm-up", "below threshold", "below threshold"]
    lane = LaneSummary(
        "T", "blocks", None, 0.1, reasons, {2: 0.01, 3: 0.02}, 1.0, seconds=[9.0, 1.0, 0.2, 0.4]
    )
    assert pages.costs(lane) == (1.0, pytest.approx(0.3))
    assert pages.bound(0.5, 0.3) == pytest.approx(1 / 0.65)
    text = pages.page(Summary([lane]))
    assert "0.30 (measured)" in text
    assert "1.54x" in text


def test_what_models_are_called_cannot_break_the_page():
    lane = LaneSummary("T", "<b>&", '"x"', math.inf, ["NaN diff"], {0: math.nan}, 1.0)
    summary = Summary([lane], ["<script>alert(1)</script>"], name="</title>")
    for text in (pages.page(summary), summary._repr_html_(), summary.plot().svg):
        assert "<script" not in text
        assert "<b>" not in text
    assert json.loads(summary.to_json())["lanes"][0]["diffs"] == {"0": None}
    assert "no step" in pages.page(Summary())


def test_notebooks_and_files(tmp_path):
    summary = dbcache.summary(run("wan"), logging=False)
    shown = summary._repr_html_()
    assert "<table>" in shown
    assert "<svg" in shown
    assert "WanPipeline" in shown
    data = json.loads(summary.to_json())
    assert data["lanes"][0]["cached_steps"] == summary[0].cached_steps
    assert data == json.loads(summary.to_json(indent=None))
    assert json.loads(Summary.from_dict(data).to_json()) == data
    assert pages.page(Summary.from_dict(data)) == pages.page(summary)
    with pytest.raises(TypeError, match="int"):
        Summary.from_dict(data | {"totals": 5})
    assert summary.seconds > 0
    cached = sum(len(lane.cached_steps) for lane in summary)
    assert repr(summary) == f"<Summary of WanPipeline: 2 lanes, {cached} of 40 steps cached>"
    plot = summary.plot()
    plot.save(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text() == plot.svg == plot._repr_svg_()
    cached = plot.svg.count('class="cached"')
    assert cached == sum(len(lane.cached_steps) for lane in summary) > 0


@pytest.mark.filterwarnings("ignore:.*nothing was cached")
def test_bad_paths_and_targets(tmp_path):
    pipe = run("flux")
    with pytest.raises(FileNotFoundError, match="make it"):
        dbcache.report(pipe, tmp_path / "none" / "run.html")
    with pytest.raises(TypeError, match="path must be"):
        dbcache.report(pipe, 3)
    with pytest.raises(RuntimeError, match="enabled on it first"):
        dbcache.report(tiny.pipeline("flux"), tmp_path / "run.html")
    assert list(tmp_path.iterdir()) == []
