"""Every command and every Python block of docs/metrics.md runs."""

import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import av
import pytest
from made_weights import made_image
from PIL import Image

from dbcache.metrics.cli import main

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::dbcache.metrics.inputs.MetricWarning"),
]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    dbcache-metrics (.*)$", TEXT, re.MULTILINE)
BLOCKS = [
    textwrap.dedent(block)
    for block in re.findall(r"(?:(?:^    .*|^)\n)+", TEXT, re.MULTILINE)
    if "import" in block
]


@pytest.fixture
def files(images, tmp_path, monkeypatch, weights, clip_model, reward_model):
    """What the page names, in the current folder; models from the environment."""
    for name, noise in (("plain", 0), ("fast", 40), ("slow", 8)):
        images(f"runs/{name}", "1.png", "2.png", noise=noise)
    shutil.copy(tmp_path / "runs" / "plain" / "1.png", tmp_path / "plain.png")
    shutil.copy(tmp_path / "runs" / "fast" / "1.png", tmp_path / "cached.png")
    for name, seed in (("plain", 0), ("cached", 9)):
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for i in range(3):
                frame = av.VideoFrame.from_ndarray(made_image(seed + i))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    (tmp_path / "prompts.txt").write_text("a cat\nthe dog\n")
    times = json.loads(re.search(r"`(\{\"plain\".*?\}\})`", TEXT)[1])
    (tmp_path / "times.json").write_text(json.dumps(times))
    (tmp_path / "perf.log").write_text("plain warm time: 8\nfast warm time: 2\nslow warm time: 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DBCACHE_METRICS_WEIGHTS", str(weights))
    monkeypatch.setenv("CLIP_MODEL_DIR", str(clip_model))
    monkeypatch.setenv("IMAGEREWARD_MODEL_DIR", str(reward_model))
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, files, capsys):
    assert main(shlex.split(command)) == 0, capsys.readouterr().err
    assert ("fast" in capsys.readouterr().out) == ("runs" in command)


def test_python_blocks_run(files):
    assert len(BLOCKS) == 2
    names: dict = {}
    for block in BLOCKS:
        exec(block, names)
    assert names["count"] == 2
    assert names["psnr"] < 100
    with Image.open("plain.png") as picture:
        assert picture.size == (64, 64)
