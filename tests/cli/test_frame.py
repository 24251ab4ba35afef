"""How commands end: without a traceback, with what to do, before anything is computed."""

import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dbcache.cli import main, media
from dbcache.command import DONE, FAILED, INTERRUPTED, error_text, run_command
from dbcache.metrics import cli as metrics


def raises(error):
    def body(*_):
        raise error

    return body


@pytest.mark.parametrize("debug", [False, True])
def test_an_unforeseen_error_is_a_line_that_says_how_to_see_more(capsys, debug):
    assert run_command("dbcache x", raises(IndexError("out of range")), debug) == FAILED
    err = capsys.readouterr().err
    assert err.endswith("dbcache x: IndexError: out of range; --debug shows where\n")
    assert ("Traceback" in err) is debug


def test_metrics_end_as_the_other_commands_do(capsys, monkeypatch, tmp_path):
    argv = ["metrics", "psnr", "-i1", "a.png", "-i2", "b.png"]
    for error, code, text in (
        (KeyboardInterrupt(), INTERRUPTED, "dbcache-metrics: interrupted\n"),
        (IndexError("3"), FAILED, "dbcache-metrics: IndexError: 3; --debug shows where\n"),
        (ModuleNotFoundError("No module", name="PIL.Image"), FAILED, "pip install pillow"),
    ):
        monkeypatch.setattr(metrics, "_compute", raises(error))
        assert main(argv) == code
        assert text in capsys.readouterr().err
    with (tmp_path / "out").open("w") as out:  # its descriptor goes to /dev/null
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(metrics, "_compute", raises(BrokenPipeError()))
        assert main(argv) == DONE


def test_errors_of_missing_packages_say_what_to_install():
    assert "pip install pyyaml" in error_text(ImportError("no", name="yaml"))
    own = ImportError("needs av: pip install 'dbcache-dit[metrics]'", name="av")
    assert error_text(own) == str(own)


def test_without_torch_info_says_so_and_others_what_to_install(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('gone', name='torch')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(*argv):
        command = [sys.executable, "-m", "dbcache", *argv]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    info = run("info", "--json")
    assert info.returncode == 0, info.stderr
    (mode,) = json.loads(info.stdout)["modes"].values()
    assert "pip install torch" in mode["why_not"]
    found = run("models")
    assert (found.returncode, found.stdout) == (FAILED, "")
    assert found.stderr.strip().splitlines()[-1].startswith("dbcache models: needs torch, which is")


def test_terminals_without_unicode_and_without_an_output(capsys, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["models", "flux"]) == DONE
    assert b"FluxTransformer2DModel" in written.getvalue()
    assert b"yes" in written.getvalue()
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["masks"]) == DONE
    assert capsys.readouterr().err == ""


def test_warnings_are_lines(capsys):
    before, found = warnings.formatwarning, []

    def body():
        found.append(warnings.formatwarning("so it is", UserWarning, "file.py", 3))
        return DONE

    assert run_command("dbcache x", body) == DONE
    assert found == ["warning: so it is\n"]
    assert warnings.formatwarning is before


def test_where_to_write_is_checked_before_anything_is_loaded(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for argv, text in (
        (["generate", "none", "--out", "a.xyz"], "--out: must end in one of .avi, .bmp"),
        (["generate", "none", "--out", file / "a.png"], "--out: .* cannot be written, since"),
        (["generate", "none", "--summary", file / "s.json"], "--summary: .* cannot be written"),
        (["demo", "--out", file / "a"], "cannot be written"),
        (["sweep", "none", "--plot", file / "a.svg"], "--plot: .* cannot be written"),
        (["report", "none.json", "--out", file / "a.html"], "--out: .* cannot be written"),
    ):
        assert main([str(word) for word in argv]) == FAILED
        err = capsys.readouterr().err
        assert re.search(text, err), err


def test_what_cannot_be_written_so_gets_another_ending(tmp_path):
    assert media.file_of("images", Path("a.mp4")) == Path("a.png")
    assert media.file_of("audios", None) == Path("out.wav")
    assert media.file_of("frames", Path("folder")) == Path("folder")
    from PIL import Image

    two = [Image.new("RGB", (4, 4))] * 2
    paths = media.save("images", two, tmp_path / "folder", 1, 1)
    assert [path.name for path in paths] == ["00000.png", "00001.png"]
    assert all(path.exists() for path in paths)


def test_a_pipeline_that_diffusers_does_not_have(capsys, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "TomorrowPipeline"}')
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == FAILED
    assert "TomorrowPipeline; upgrade diffusers" in capsys.readouterr().err
