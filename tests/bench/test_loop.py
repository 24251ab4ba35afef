"""The captured loop example, on the CPU with a fake driver."""

import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from fake_driver import FakeDriver
from tape import TapeCapture, TapeUserCapture, use_driver
from tiny import FAMILIES, noise

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `bench` is not installed
    sys.path.append(str(ROOT))

import dbcache  # noqa: E402
from bench.loop import OPTIONS, denoise  # noqa: E402
from dbcache.adapters.requests import request  # noqa: E402
from dbcache.graphs import cuda_capture  # noqa: E402

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
    monkeypatch.setitem(cuda_capture.USER_CAPTURES, "cpu", TapeUserCapture)
    x = noise(*flux.latent_shape, seed=3)
    monkeypatch.setattr(request, "is_capturing", lambda: True)
    with TapeCapture(fake) as graph:
        denoise(model, scheduler, x, inputs, times)
    monkeypatch.setattr(request, "is_capturing", lambda: False)
    for seed, latents in zip((1, 2), expected, strict=True):
        x.copy_(noise(*flux.latent_shape, seed=seed))
        graph.replay()
        assert torch.equal(x, latents)
