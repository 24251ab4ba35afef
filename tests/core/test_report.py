"""The report: a page that a browser shows, with what the summary knows, and honest estimates."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import tiny
from PIL import Image

import dbcache
from dbcache import DBCacheConfig, FoCaCalibratorConfig
from dbcache.results import page as pages

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
