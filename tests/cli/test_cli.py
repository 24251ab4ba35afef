"""`dbcache` as its users type it: what it prints, writes and returns, and how it fails."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import diffusers
import models
import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image
from schedules import content
from tokenizers import Tokenizer
from tokenizers import models as token_models
from tokenizers.pre_tokenizers import Whitespace

import dbcache
from dbcache.cli import COMMANDS, main, media
from dbcache.cli.pipelines import Result
from dbcache.metrics.inputs import VIDEO_ENDINGS

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

OPTIONS = "Fn_compute_blocks=1,max_warmup_steps=2,residual_diff_threshold=1.0"


def image_autoencoder():
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """A saved pipeline of images, complete but tiny: DiT, by the number of a class."""
    folder = tmp_path_factory.mktemp("dit")
    torch.manual_seed(0)
    diffusers.DiTPipeline(
        transformer=models.model("DiTTransformer2DModel"),
        vae=image_autoencoder(),
        scheduler=diffusers.DDIMScheduler(),
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory):
    """A saved pipeline of videos, complete but tiny: Wan, with a text encoder and a tokenizer."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    words = Tokenizer(token_models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "cat": 3}, "<pad>"))
    words.pre_tokenizer = Whitespace()
    config = transformers.UMT5Config(
        vocab_size=8, d_model=tiny.TEXT_DIM, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    diffusers.WanPipeline(
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
        ),
        text_encoder=transformers.UMT5EncoderModel(config).eval(),
        transformer=tiny.wan(layers=4),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)
    return str(folder)


def run(capsys, *argv):
    """Run a command line; return exit code, standard output and standard error."""
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def data_of(capsys, *argv):
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def failed(capsys, *argv):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert err.startswith(f"dbcache {argv[0]}: ")
    return err


# --- the frame ---------------------------------------------------------------------------


def test_help_needs_no_torch_and_names_all_commands():
    code = """
import sys
from dbcache.cli import main
for argv in (["--help"], ["generate", "--help"], ["--version"]):
    try:
        main(argv)
    except SystemExit as end:
        print(end.code)
print([name for name in ("torch", "numpy", "diffusers", "PIL") if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
    for name in (*COMMANDS, "--compare", dbcache.__version__):
        assert name in found.stdout


def test_a_wrong_command_line_is_exit_code_2(capsys):
    for argv in ([], ["gen"], ["masks", "--step", "3"], ["generate"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 2
    capsys.readouterr()


def test_errors_have_a_traceback_on_request_only(capsys):
    failed(capsys, "masks", "--policy", "fastest")
    assert main(["masks", "--policy", "fastest", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_exit_code_130(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(dbcache, "steps_mask", interrupted)
    assert run(capsys, "masks")[0] == 130


@pytest.mark.parametrize("ours_is_gone", [True, False])
def test_a_foreign_package_of_the_same_name_is_explained(tmp_path, ours_is_gone):
    source = Path(dbcache.__file__).parent
    for name in ("dbcache", "dbcache/cli"):
        (tmp_path / name).mkdir()
        for file in (source.parent / name).glob("*.py"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "dbcache-0.2.dist-info").mkdir()
    if ours_is_gone:
        (tmp_path / "dbcache" / "__init__.py").write_text("class Cache: ...\n")
    code = "import sys; from dbcache.cli import main; sys.exit(main(['masks']))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert found.returncode == 1
    assert "pip uninstall dbcache" in found.stderr
    assert "Traceback" not in found.stderr
    assert ("UserWarning" in found.stderr) is not ours_is_gone


# --- the small commands ----------------------------------------------------------------------


def test_masks(capsys):
    masks = data_of(capsys, "masks", "--steps", 20)
    assert masks["fast"] == dbcache.steps_mask(total_steps=20, mask_policy="fast")
    bins = data_of(capsys, "masks", "--compute-bins", 2, 1, "--cache-bins", 3)
    assert bins == {"bins": [1, 1, 0, 0, 0, 1]}
    text = run(capsys, "masks", "--policy", "ultra", "--steps", 6)[1]
    assert "111001" in text
    assert "together" in failed(capsys, "masks", "--compute-bins", 3)
    assert "--policy" in failed(capsys, "masks", "--compute-bins", 3, "--policy", "slow")


def test_models(capsys):
    everything = data_of(capsys, "models")["models"]
    assert len(everything) == len(dbcache.supported_matrix().splitlines()) - 2
    (qwen,) = data_of(capsys, "models", "QwenImageTransformer2DModel")["models"]
    assert qwen["cache"] is True
    assert "is a UNet" in run(capsys, "models", "UNet2DConditionModel")[1]
    assert run(capsys, "models", "--markdown")[1].strip() == dbcache.supported_matrix()
    assert "no model is called" in failed(capsys, "models", "nothing")


def test_info(capsys):
    found = data_of(capsys, "info")
    assert found["versions"]["torch"] == torch.__version__
    modes = found["modes"]
    assert modes["cache (PyTorch kernels)"] == {"works": True, "why_not": None}
    assert all(bool(mode["why_not"]) is not mode["works"] for mode in modes.values())
    assert modes["cache (Triton kernels)"]["works"] is torch.cuda.is_available()
    text = run(capsys, "info")[1]
    assert "diffusers" in text
    assert "CPU" in text


def test_metrics_are_those_of_their_own_command(capsys, tmp_path):
    for name, value in (("a", 10), ("b", 12)):
        Image.new("RGB", (16, 16), (value,) * 3).save(tmp_path / f"{name}.png")
    argv = ("metrics", "psnr", "-i1", tmp_path / "a.png", "-i2", tmp_path / "b.png")
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "42.1" in out
    assert run(capsys, *argv[:-1], tmp_path / "c.png")[0] != 0


def test_the_demo_gives_its_records(capsys, monkeypatch, tmp_path):
    from dbcache.demo import run as demo

    def drawn(out, **options):  # tests/demo runs the real one
        print("the table")
        return [{"psnr": float("inf"), "out": str(out), **options}]

    monkeypatch.setattr(demo, "run", drawn)
    (record,) = data_of(capsys, "demo", "--out", tmp_path, "--steps", 4)
    assert (record["psnr"], record["steps"], record["out"]) == (None, 4, str(tmp_path))
    assert run(capsys, "demo")[1] == "the table\n"
    assert "--steps" in failed(capsys, "demo", "--steps", 0)


# --- generate ----------------------------------------------------------------------------------


def test_pictures_with_and_without_the_cache(capsys, image_folder, tmp_path):
    argv = ["generate", image_folder, "--set", "class_labels=[1]", "--steps", 6, "--compare"]
    argv += ["--cache", OPTIONS, "--out", tmp_path / "a" / "dit.png"]
    argv += ["--report", tmp_path / "r.html", "--summary", tmp_path / "s.json"]
    found = data_of(capsys, *argv)
    (lane,) = found["summary"]["lanes"]
    assert lane["cached_steps"] == [2, 3, 4, 5]
    assert found["settings"].startswith("DBCache_F1B0_W2")
    assert found["speedup"] == pytest.approx(found["plain_seconds"] / found["seconds"])
    plain, cached = (np.asarray(Image.open(found[k][0])) for k in ("plain_files", "files"))
    mse = ((plain.astype(float) - cached) ** 2).mean()
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / mse), abs=0.01)
    pipe = diffusers.DiffusionPipeline.from_pretrained(image_folder)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    expected = pipe(class_labels=[1], num_inference_steps=6, generator=generator).images[0]
    assert np.array_equal(plain, np.asarray(expected))
    code, out, err = run(capsys, "report", tmp_path / "s.json", "--out", tmp_path / "again.html")
    assert code == 0, err
    assert "transformer_blocks" in out
    assert (tmp_path / "again.html").read_text() == (tmp_path / "r.html").read_text()


def test_a_video_from_a_prompt(capsys, video_folder, tmp_path):
    argv = ["generate", video_folder, "--prompt", "a cat", "--steps", 4, "--height", 16]
    argv += ["--width", 16, "--frames", 5, "--quiet", "--cache", OPTIONS]
    code, out, err = run(capsys, *argv, "--out", tmp_path / "wan.mp4")
    assert code == 0, err
    assert "uncond" in out
    assert "it/s" not in err
    import av

    with av.open(str(tmp_path / "wan.mp4")) as container:
        frames = list(container.decode(video=0))
    assert [(f.width, f.height) for f in frames] == [(16, 16)] * 5
    assert ".mp4" in VIDEO_ENDINGS


@pytest.mark.ranks
def test_a_video_on_two_ranks(video_folder, tmp_path):
    command = f"-m torch.distributed.run --nproc_per_node 2 -m dbcache generate {video_folder}"
    command += f" --prompt cat --steps 4 --height 16 --width 16 --frames 5 --cache {OPTIONS}"
    command += " --parallel-modules text_encoder vae"
    command += f" --parallel ulysses=2 --json --summary {tmp_path / 's.json'}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DBCACHE_KERNELS": "reference"}
    run = subprocess.run(
        [sys.executable, *command.split(), "--out", tmp_path / "wan.mp4"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (first,) = re.findall(r"^\{.*?^\}", run.stdout, re.DOTALL | re.MULTILINE)  # of one rank
    summary = json.loads(first)["summary"]
    assert [lane["cached_steps"] for lane in summary["lanes"]] == [[2, 3]] * 2
    assert json.loads((tmp_path / "s.json").read_text())["lanes"] == summary["lanes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "wan.mp4"]


def test_settings_come_from_files_levels_and_nowhere(capsys, image_folder, tmp_path, monkeypatch):
    argv = ["generate", image_folder, "--set", "class_labels=[1, 2]", "--steps", 4, "--quiet"]
    argv += ["--out", tmp_path / "x.png"]
    file = tmp_path / "cache.yaml"
    file.write_text("cache_config:\n  Fn_compute_blocks: 2\n  max_warmup_steps: 3\n")
    found = data_of(capsys, *argv, "--config", file)
    assert found["settings"].startswith("DBCache_F2B0_W3")
    assert [Path(name).name for name in found["files"]] == ["x-0.png", "x-1.png"]
    assert "summary" not in data_of(capsys, *argv, "--cache", "none")
    assert data_of(capsys, *argv)["settings"].startswith("DBCache_F8B0")
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **_: compiled.append(block))
    assert "DBCache" in data_of(capsys, *argv, "--cache", "fast", "--compile")["settings"]
    assert {type(block).__name__ for block in compiled} == {"BasicTransformerBlock"}


def test_a_schedule_and_the_row_of_it(capsys, image_folder, tmp_path):
    file = tmp_path / "dit.json"
    lane = {"weights": {}, "changes": {}}
    rows = [
        {"full": mask.count("1"), "speedup": {"expected": speed}, "psnr": {"mean": 40.0},
         "transformers": [{"": lane | {"mask": mask}}]}
        for mask, speed in (("110110", 1.4), ("110100", 1.8))
    ]  # fmt: skip
    schedule = content() | {
        "scheduler": "DDIMScheduler", "num_inference_steps": 6, "scheduler_steps": 6,
        "levels": {"high": 0, "balanced": 1, "fast": 1}, "rows": rows,
        "transformers": [{"model": "DiTTransformer2DModel", "calls": 6}],
    }  # fmt: skip
    file.write_text(json.dumps(schedule))
    argv = ["generate", image_folder, "--set", "class_labels=[1]", "--steps", 6, "--quiet"]
    argv += ["--out", tmp_path / "x.png", "--schedule", file]
    for target, cached in (("high", [2, 5]), ("fast", [2, 4, 5])):
        (lane,) = data_of(capsys, *argv, "--target", target)["summary"]["lanes"]
        assert lane["cached_steps"] == cached
    assert "9x" in failed(capsys, *argv, "--target", "9x")


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--height", "32"], "takes no height; it takes"),
        (["--set", "guidance"], "name=value"),
        (["--cache", "Fn_compute_block=1"], "did you mean 'Fn_compute_blocks'"),
        (["--cache", "fastest"], "fastest"),
        (["--config", "none.yaml"], "there is no file none.yaml"),
        (["--schedule", "none.json"], "there is no file none.json"),
        (["--target", "2x"], "give --schedule"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--report", "no/where.html"], "make it"),
        (["--cache", "none", "--summary", "s.json"], "needs the cache"),
        (["--parallel", "ulysses=2"], "torchrun"),
        (["--parallel-modules", "vae"], "give --parallel"),
        ([], "needs class_labels"),
    ],
)
def test_what_generate_refuses(capsys, image_folder, argv, match, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    given = [] if not argv or argv[0] == "--height" else ["--set", "class_labels=[1]"]
    assert match in failed(capsys, "generate", image_folder, "--quiet", *given, *argv)


def test_weights_are_quantised(capsys, image_folder, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(dbcache, "quantize", lambda part, **how: asked.append((part, how)))
    argv = ["generate", image_folder, "--set", "class_labels=[1]", "--steps", 2, "--quiet"]
    data_of(capsys, *argv, "--quantize", "int8_weight_only", "--out", tmp_path / "x.png")
    ((part, how),) = asked
    assert type(part).__name__ == "DiTTransformer2DModel"
    assert how == {"quant_type": "int8_weight_only"}


@pytest.mark.parametrize("command", ["generate", "compare", "sweep", "tune"])
def test_models_that_are_not_there(command, capsys, tmp_path):
    argv = [command, tmp_path, "--prompt", "x"]
    assert "model_index.json" in failed(capsys, *argv)
    argv[1] = tmp_path / "none"
    assert "no such folder" in failed(capsys, *argv, "--quiet")


def test_a_gpu_that_is_not_there(capsys, tmp_path):
    if not torch.cuda.is_available():
        assert "--device cpu" in failed(capsys, "generate", tmp_path, "--device", "cuda")


def test_reports_of_other_files(capsys, tmp_path):
    file = tmp_path / "s.json"
    assert "none.json" in failed(capsys, "report", tmp_path / "none.json")
    for text in ("{", "[]", '{"lanes": 3}'):
        file.write_text(text)
        assert "must be the JSON of a summary" in failed(capsys, "report", file)


# --- files ----------------------------------------------------------------------------------------


def test_all_kinds_of_outputs_are_written(tmp_path):
    frames = np.linspace(0, 1, 3 * 8 * 8 * 3).reshape(3, 8, 8, 3)
    for output, kind in (
        (SimpleNamespace(images=[frames[0]]), "images"),
        (SimpleNamespace(frames=[frames]), "frames"),
        (SimpleNamespace(videos=[frames]), "frames"),
        (SimpleNamespace(audios=[torch.zeros(2, 50)]), "audios"),
    ):
        found, entries = media.media_of(output)
        assert found == kind
        name = {"images": "a.png", "frames": "folder", "audios": "a.wav"}[kind]
        (path,) = media.save(kind, entries, tmp_path / kind / name, 8, 100)
        assert path.exists()
    pictures = sorted((tmp_path / "frames" / "folder").iterdir())
    assert np.abs(np.asarray(Image.open(pictures[1])) / 255 - frames[1]).max() < 0.003
    assert (tmp_path / "audios" / "a.wav").stat().st_size == 44 + 2 * 2 * 50
    media.save("frames", [frames], tmp_path / "a.gif", 8, 100)
    assert Image.open(tmp_path / "a.gif").n_frames == 3
    tensor = torch.from_numpy(frames[0]).permute(2, 0, 1)
    assert media.picture(tensor).tobytes() == media.picture(frames[0]).tobytes()
    with pytest.raises(TypeError, match="images, frames or audios"):
        media.media_of(SimpleNamespace(prior=1))
    same = Result("frames", [frames], 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same.psnr(same) == float("inf")
    assert Result("audios", [], 1.0).psnr(same) is None
