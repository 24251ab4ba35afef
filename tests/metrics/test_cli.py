"""The command line: results, tables, errors without tracebacks, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dbcache.metrics import (
    FrechetInceptionDistance,
    compute_lpips,
    compute_mse,
    compute_psnr,
    compute_ssim,
)
from dbcache.metrics.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("0.png", "1.png", "2.png")


@pytest.fixture
def runs(images):
    """Three runs, `plain` and two with noise; the folder above them."""
    images("runs/far", *NAMES, noise=40)
    images("runs/near", *NAMES, noise=8)
    return images("runs/plain", *NAMES).parent


def run(capsys, *arguments):
    """Return exit code, standard output and standard error."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def usage_error(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_several_folders_against_one_reference_are_sorted_best_first(runs, capsys):
    code, out, err = run(capsys, "psnr", "ssim", "mse", "-r", runs / "plain", "-d", runs)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["run", "images", "PSNR", "(dB)", "↑", "SSIM", "↑", "MSE", "↓"]
    assert [line[0] for line in lines[2:]] == ["near", "far"]
    plain, near = runs / "plain", runs / "near"
    assert lines[2][1:] == [
        "3",
        f"{compute_psnr(plain, near)[0]:.2f}",
        f"{compute_ssim(plain, near)[0]:.4f}",
        f"{compute_mse(plain, near)[0]:.2f}",
    ]


def test_a_metric_whose_lower_end_is_better_sorts_from_there(runs, capsys):
    _, out, _ = run(capsys, "mse", "-i1", runs / "plain", "-i2", runs / "far", "-i2", runs / "near")
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["near", "far"]


def test_json_has_the_numbers_in_full(runs, capsys):
    code, out, _ = run(capsys, "psnr", "-i1", runs / "plain", "-i2", runs / "far", "--json")
    found = json.loads(out)
    value, count = compute_psnr(runs / "plain", runs / "far")
    assert code == 0
    assert found["rows"] == [{"name": "far", "n": count, "psnr": value}]
    assert found["reference"] == str(runs / "plain")


def test_infinite_values_are_text_in_json(runs, capsys):
    _, out, _ = run(capsys, "psnr", "-i1", runs / "plain", "-i2", runs / "plain", "--json")
    assert json.loads(out)["rows"][0]["psnr"] == "inf"


def test_csv_and_markdown_are_tables_of_their_kind(runs, capsys):
    inputs = ("-i1", runs / "plain" / "0.png", "-i2", runs / "far" / "0.png")
    value = compute_psnr(inputs[1], inputs[3])[0]
    assert run(capsys, "psnr", *inputs, "--format", "csv")[1] == f"name,n,psnr\n0,1,{value}\n"
    assert run(capsys, "psnr", *inputs, "-table")[1].splitlines() == [
        "| run | images | PSNR (dB) ↑ |",
        "| --- | ---: | ---: |",
        f"| 0 | 1 | {value:.2f} |",
    ]


def test_notes_go_to_stderr_and_into_json(images, capsys):
    true, test = images("true", *NAMES), images("test", *NAMES, noise=8)
    (true / "1.png").write_bytes((test / "1.png").read_bytes())
    _, out, err = run(capsys, "psnr", "-i1", true, "-i2", test, "--json")
    assert err.startswith("note: compute_psnr: 1 of 3 pairs are equal")
    assert json.loads(out)["notes"] == [err.removeprefix("note: ").strip()]


def test_networks_take_their_weights_from_the_folder(runs, weights, capsys):
    code, out, err = run(
        capsys, "lpips", "fid", "-r", runs / "plain", "-i2", runs / "far", "-i2", runs / "near",
        "--weights", weights, "--device", "cpu", "-b", 4, "--json", "-verbose",
    )  # fmt: skip
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    fid = FrechetInceptionDistance("cpu", weights=weights)
    for name in ("near", "far"):
        plain = runs / "plain"
        lpips = compute_lpips(plain, runs / name, weights=weights, device="cpu")[0]
        assert rows[name]["lpips"] == pytest.approx(lpips)
        with pytest.warns(UserWarning, match="fewer than the 2048"):
            expected = fid.compute_fid(plain, runs / name)[0]
        assert rows[name]["fid"] == pytest.approx(expected, rel=1e-3)
    assert "note: FID: 3 images are fewer" in err
    assert "fid of near" in err  # -verbose


def test_all_leaves_out_what_cannot_be_had_and_says_so(runs, tmp_path, capsys):
    code, out, err = run(
        capsys, "all", "-i1", runs / "plain", "-i2", runs / "far", "--weights", tmp_path
    )
    assert code == 1
    assert out.splitlines()[0].split("  ")[-1].strip() == "MSE ↓"
    assert "dbcache-metrics: no lpips: LPIPS: needs alexnet" in err
    assert "dbcache-metrics: no fid: FID: needs pt_inception" in err
    assert "Traceback" not in err


def test_all_of_one_picture_has_no_fid(runs, tmp_path, capsys):
    inputs = ("-i1", runs / "plain" / "0.png", "-i2", runs / "far" / "0.png")
    code, _, err = run(capsys, "all", *inputs, "--weights", tmp_path)
    assert code == 1
    assert "no lpips" in err
    assert "fid" not in err.lower()


def test_nothing_that_can_be_had_is_no_table(runs, tmp_path, capsys):
    inputs = ("-i1", runs / "plain", "-i2", runs / "far", "--weights", tmp_path)
    code, out, err = run(capsys, "lpips", *inputs)
    assert (code, out) == (1, "")
    assert err.startswith("dbcache-metrics: no lpips:")
    code, out, _ = run(capsys, "lpips", *inputs, "--json")
    assert code == 1
    assert json.loads(out)["unavailable"]["lpips"].startswith("LPIPS: needs")


def test_prompts_are_scored(images, reward_model, tmp_path, capsys):
    images("runs/a", "0.png", size=(48, 64))
    images("runs/b", "0.png", seed=1, size=(48, 64))
    (tmp_path / "prompts.txt").write_text("a cat on the moon\n")
    code, out, _ = run(
        capsys, "image_reward", "-d", tmp_path / "runs", "-rp", tmp_path / "prompts.txt",
        "--reward-model", reward_model, "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    assert [line.split() for line in out.splitlines()[2:]] == [
        ["a", "1", "-5.1993"],  # image-reward's values, see test_prompted.py
        ["b", "1", "-7.5905"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("psnr",), "give images (-i2 or -d) or videos (-v2 or -vd)"),
        (("psnr", "-i2", "x"), "psnr needs a reference: -i1 (-r)"),
        (("psnr", "-v2", "x"), "psnr needs a reference: -v1 (-rv)"),
        (("psnr", "-i2", "x", "-v2", "y"), "not both"),
        (("psnr", "-i1", "x", "-v2", "y"), "videos go with -v1 (-rv)"),
        (("psnr", "-v1", "x", "-i2", "y"), "-v1 (-rv) is for videos"),
        (("clip_score", "-i2", "x"), "clip_score needs images and a file of prompts: -p (-rp)"),
        (("all", "-i2", "x"), "all needs a reference (-i1 or -v1) or a file of prompts (-p)"),
        (("blur", "-i1", "x", "-i2", "y"), "invalid choice: 'blur'"),
        (("psnr", "-i1", "x", "-i2", "y", "-ptags", "time"), "-ptags and --cal-speedup need -plog"),
        (("psnr", "-i1", "x", "-i2", "y", "-plog", "z"), "-plog needs -ptags"),
    ],
)
def test_inputs_that_do_not_serve_are_usage_errors(arguments, message, capsys):
    assert message in usage_error(capsys, *arguments)


def test_errors_come_without_a_traceback(runs, capsys):
    arguments = ("psnr", "-i1", runs / "plain", "-i2", runs / "absent")
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    path = f"'{runs}/absent'"
    assert err == f"dbcache-metrics: -i2: {path} must be a file or a folder, not found\n"
    with pytest.raises(FileNotFoundError):
        main([*map(str, arguments), "--debug"])


def test_a_missing_library_is_an_error_with_the_install_line(runs, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").touch()
    code, _, err = run(capsys, "psnr", "-v1", tmp_path / "a.mp4", "-v2", tmp_path / "a.mp4")
    assert code == 1
    assert 'needs av; pip install "dbcache-dit[metrics]"' in err


def test_folders_without_runs_are_refused(runs, capsys):
    code, _, err = run(capsys, "psnr", "-r", runs / "plain", "-d", runs / "far")
    assert code == 1
    assert "far: must hold sub-folders beside the reference; has none" in err
    code, _, err = run(capsys, "psnr", "-r", runs / "plain", "-d", runs / "far" / "0.png")
    assert "-d: must be a folder" in err


def test_times_become_speed_ups_against_the_reference(runs, tmp_path, capsys):
    times = {"plain": {"time": 10}, "far": {"time": 4}, "near": {"time": 8}}
    (tmp_path / "times.json").write_text(json.dumps(times))
    _, out, err = run(
        capsys, "psnr", "-r", runs / "plain", "-d", runs, "-plog", tmp_path / "times.json",
        "-ptags", "time", "--cal-speedup",
    )  # fmt: skip
    assert [line.split()[0::3] for line in out.splitlines()[2:]] == [
        ["near", "8.00"],
        ["far", "4.00"],
    ]
    assert [line.split()[-1] for line in out.splitlines()[2:]] == ["1.25x", "2.50x"]
    assert err == "note: speed-ups are against plain\n"


def test_without_the_reference_the_slowest_run_is_the_baseline(runs, tmp_path, capsys):
    log = "far: warm, time: 4.0 s\nfar: time: 2.0 s\nnear: time: 9 s, TFLOPs: 30\nfar TFLOPs: 20\n"
    (tmp_path / "perf.log").write_text(log)
    arguments = ["psnr", "-r", runs / "plain", "-d", runs, "-plog", tmp_path / "perf.log"]
    arguments += ["-ptags", "time", "TFLOPs", "--cal-speedup", "--json"]
    _, out, err = run(capsys, *arguments)
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert err == "note: speed-ups are against near\n"
    assert rows["far"]["time"] == 3.0  # the mean of its two lines
    assert (rows["far"]["time_speedup"], rows["far"]["tflops_ratio"]) == (3.0, 1.5)
    _, out, _ = run(capsys, *arguments, "--baseline", "far")
    assert json.loads(out)["rows"][0]["time_speedup"] == pytest.approx(1 / 3)
    code, _, err = run(capsys, *arguments, "--baseline", "none")
    assert code == 1
    assert "the baseline must be one of far, near, got 'none'" in err


def test_runs_that_the_log_lacks_are_said(runs, tmp_path, capsys):
    (tmp_path / "perf.log").write_text("near time: 9\n")
    arguments = ("psnr", "-r", runs / "plain", "-d", runs, "-plog", tmp_path / "perf.log")
    code, _, err = run(capsys, *arguments, "-ptags", "time")
    assert code == 0
    assert "perf.log has no time of far" in err
    (tmp_path / "perf.log").write_text("other time: 9\n")
    code, _, err = run(capsys, *arguments, "-ptags", "time")
    assert code == 1
    assert "perf.log: must have figures of a run, got none of far, near" in err


def test_command_lines_of_cache_dit_are_understood(runs, tmp_path, capsys):
    (tmp_path / "perf.log").write_text("near time: 2\nfar time: 1\nplain time: 4\n")
    code, out, _ = run(
        capsys, "psnr", "--img-source-dir", runs, "--ref-img-dir", runs / "plain", "--summary",
        "--psnr-type", "skimage", "--perf-log", tmp_path / "perf.log", "--perf-tags", "time",
        "--cal-speedup", "--gen-markdown-table", "--fid-batch-size", 1, "--enable-verbose",
    )  # fmt: skip
    assert code == 0
    assert out.splitlines()[-1].startswith("| far | 3 |")
    assert out.splitlines()[-1].endswith("| 1.00 | 4.00x |")


def test_help_needs_no_torch():
    # a bare package in place of dbcache, whose own import is not the subject
    code = f"""
import sys, types
package = types.ModuleType("dbcache")
package.__path__ = [{str(ROOT / "dbcache")!r}]
sys.modules["dbcache"] = package
from dbcache.metrics.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    heavy = {{"torch", "PIL", "av", "transformers", "scipy"}} & set(sys.modules)
    print(stop.code, sorted(heavy), file=sys.stderr)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stderr == "0 []\n"
    assert result.stdout.startswith("usage: dbcache-metrics")


def test_the_module_runs_as_a_command(runs):
    result = subprocess.run(
        [sys.executable, "-m", "dbcache.metrics", "psnr", "-i1", runs / "plain", "-i2", runs / "x"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("dbcache-metrics: ")
