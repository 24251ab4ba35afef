"""The site of the documentation is built without a warning, and has all pages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_is_built_with_all_pages(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    page = tmp_path / "docs" / "reference.md"
    written = subprocess.run(
        [sys.executable, ROOT / ".ci" / "reference.py", page], capture_output=True, check=False
    )
    assert written.returncode == 0, written.stderr.decode()
    for name in ("start_request(model", "class DBCacheConfig", "Other names: `enable_cache`"):
        assert name in page.read_text()
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    built = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, check=False
    )
    assert built.returncode == 0, built.stdout.decode() + built.stderr.decode()
    pages = {path.stem for path in (tmp_path / "docs").glob("*.md")}
    assert {path.stem for path in (tmp_path / "site").glob("*.html")} - {"404"} == pages
    listed = set(_names(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert {Path(name).stem for name in listed} == pages


def _names(nav):
    for entry in nav:
        for value in entry.values():
            yield from _names(value) if isinstance(value, list) else (value,)
