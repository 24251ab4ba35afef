"""The loop benchmark on the CPU: its window, its errors, and the capture with a fake driver."""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from fake_driver import FakeDriver
from tape import TapeCapture, use_driver
from tiny import FAMILIES, noise

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

import dbcache  # noqa: E402
from bench import loop as bench_loop  # noqa: E402
from bench.loop import OPTIONS, TINY, Loop, build, denoise  # noqa: E402
from dbcache.adapters.requests import clock  # noqa: E402

STEPS = 12


def test_one_replay_is_one_image(monkeypatch, one_thread):
    flux, fake = FAMILIES["flux"], FakeDriver()
    model = flux.build()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    times = [(t / 1000).expand(1) for t in scheduler.timesteps]
    inputs = flux.arguments(noise(*flux.latent_shape, seed=0), 1.0, "cond")
    for name in ("hidden_states", "timestep", "return_dict"):
        del inputs[name]
    dbcache.enable(model, num_inference_steps=STEPS, **OPTIONS)
    expected = []
    for seed in (1, 2):
        x = noise(*flux.latent_shape, seed=seed)
        denoise(model, scheduler, x, inputs, times)
        expected.append(x)
    assert dbcache.summary(model).lanes[0].cached_steps

    use_driver(monkeypatch, fake)
    x = noise(*flux.latent_shape, seed=3)
    monkeypatch.setattr(clock, "is_capturing", lambda: True)
    with TapeCapture(fake) as graph:
        denoise(model, scheduler, x, inputs, times)
    monkeypatch.setattr(clock, "is_capturing", lambda: False)
    for seed, latents in zip((1, 2), expected, strict=True):
        x.copy_(noise(*flux.latent_shape, seed=seed))
        graph.replay()
        assert torch.equal(x, latents)


def test_a_rehearsal_caches_some_steps_and_not_all(tmp_path, capsys, one_thread):
    file = tmp_path / "loop.json"
    bench_loop.main(
        ["--device", "cpu", "--size", "64", "--images", "1", "--steps", "14", "--json", str(file)]
    )
    content = json.loads(file.read_text())
    assert 0 < len(content["cached"]) < 10
    assert content["equal"]
    assert content["seconds"].keys() == {"eager"}
    assert f"{len(content['cached'])} of 14 steps cached" in capsys.readouterr().out


def test_on_a_gpu_the_loop_becomes_one_graph_per_image(monkeypatch, tmp_path, one_thread):
    """The program as on a GPU, with what runs inside the capture on a tape."""
    fake, here = FakeDriver(), bench_loop.build
    use_driver(monkeypatch, fake)

    @contextlib.contextmanager
    def captured(graph):
        with monkeypatch.context() as patch, TapeCapture(fake) as tape:
            patch.setattr(clock, "is_capturing", lambda: True)
            yield
        graph.replay = tape.replay

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "is_available": lambda: True,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": SimpleNamespace,
        "graph": captured,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(bench_loop, "build", lambda device, *blocks: here("cpu", **TINY))
    monkeypatch.setattr(bench_loop, "header", lambda device: f"# {device}")
    file = tmp_path / "loop.json"
    bench_loop.main(["--size", "64", "--images", "1", "--steps", "8", "--json", str(file)])
    content = json.loads(file.read_text())
    assert content["header"] == "# cuda"
    assert content["seconds"].keys() == {"eager", "one graph per image"}
    assert content["equal"]


@pytest.mark.parametrize(
    ("threshold", "cached", "limit"), [(1e-6, 0, 4), (0.99, 4, -1)], ids=["nothing", "everything"]
)
def test_nothing_or_everything_cached_is_an_error(threshold, cached, limit, one_thread):
    torch.manual_seed(0)
    loop = Loop(build("cpu", **TINY), 8, 64)
    options = OPTIONS | {"residual_diff_threshold": threshold}
    dbcache.enable(loop.model, **options | {"max_continuous_cached_steps": limit})
    loop.eager()
    assert len(dbcache.summary(loop.model).lanes[0].cached_steps) == cached
    with pytest.raises(
        SystemExit, match=f"some of the 4 steps.*not none and not all, got {cached}"
    ):
        loop.check_window()


def test_fewer_steps_than_the_warmup_are_an_error():
    with pytest.raises(SystemExit, match=r"--steps must be at least 6.*got 5"):
        bench_loop.main(["--device", "cpu", "--steps", "5"])
