"""Blocks that change the dtype of a stream, as under autocast; float64; text of a batch of one."""

import contextlib

import diffusers
import models
import pytest
import tiny
import torch
from model_case import find_class
from replay import replayed
from together import pattern, same

import dbcache
from dbcache import BlockAdapter, DBPruneConfig, ForwardPattern

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

FLUX = tiny.FAMILIES["flux"]
STEPS = 5
FORCED = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 2,
    "residual_diff_threshold": 1.0,
    "max_continuous_cached_steps": 2,
}
RHYTHM = "FFccF"
ONE = {"enable_separate_cfg": False}
CHANGES_DTYPE = [
    "AllegroTransformer3DModel",
    "CosmosTransformer3DModel",
    "Krea2Transformer2DModel",
    "LTX2VideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "LatteTransformer3DModel",
    "LuminaNextDiT2DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "SanaVideoTransformer3DModel",
]


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


@pytest.fixture
def shared_model():
    """Give the tiny model of a class, which all tests share, back without the cache."""
    names = []

    def get(name):
        if find_class(name) is None:
            pytest.skip(f"absent in diffusers {diffusers.__version__}")
        names.append(name)
        return models.model(name)

    yield get
    for name in names:
        dbcache.disable(models.model(name))


def replay(name):
    """Return what a plain-PyTorch replay of the cached steps gives."""
    with replayed(name, 1, 0) as stacks:

        def mark(step):
            for stack in stacks:
                stack.cached = RHYTHM[step] == "c"
            return {}

        return models.run(name, STEPS, more=mark)


@pytest.mark.parametrize("name", CHANGES_DTYPE)
def test_under_autocast_steps_are_cached_as_a_replay_does(shared_model, name):
    model = shared_model(name)
    with autocast():
        plain, expected = models.run(name, STEPS), replay(name)
        dbcache.enable(model, Fn_compute_blocks=1, residual_diff_threshold=0.0, **ONE)
        assert same(models.run(name, STEPS), plain)
        dbcache.enable(model, **FORCED, **ONE)
        got = models.run(name, STEPS)
    assert set(pattern(dbcache.summary(model))) == {RHYTHM}
    for x, y, full in zip(got, expected, plain, strict=True):
        assert (x.dtype, y.dtype) == (full.dtype, full.dtype)
        assert (x - y).abs().max() < 0.03 * full.abs().max()


@pytest.mark.parametrize(
    "options",
    [{}, {"policy": "easycache"}, DBPruneConfig(max_warmup_steps=2)],
    ids=["probe", "no probe", "dbprune"],
)
def test_float64_is_cached_in_float32_and_stays_float64(options):
    """The decisions and pictures are those of the same model in float32, up to its rounding."""
    outputs = {}
    for dtype in (torch.float32, torch.float64):
        model = tiny.flux(double=2, single=4).to(dtype)
        plain = tiny.denoise(model, FLUX, STEPS)
        if isinstance(options, DBPruneConfig):
            dbcache.enable(model, options, Fn_compute_blocks=1, residual_diff_threshold=0.5)
        else:
            dbcache.enable(model, **FORCED | options)
        got = tiny.denoise(model, FLUX, STEPS)
        outputs[dtype] = [x.double() for x in got]
        assert {x.dtype for x in got} == {dtype}
        assert same(got[:2], plain[:2])
        (lane,) = dbcache.summary(model).lanes
        assert len(lane.cached_steps) > 1
        cached = lane.cached_steps
    for x, y in zip(*outputs.values(), strict=True):
        assert (x - y).abs().max() < 1e-4 * y.abs().max()
    assert cached == lane.cached_steps


class Block(torch.nn.Module):
    """A block that returns another dtype than it is given."""

    def __init__(self, width, dtype):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)
        self.dtype = dtype

    def forward(self, hidden_states, encoder_hidden_states):
        added = self.layer(hidden_states.float()) + encoder_hidden_states.float().mean(1, True)
        encoder = (encoder_hidden_states.float() * 1.01).to(self.dtype)
        return (hidden_states.float() + 0.1 * added).to(self.dtype), encoder


class Mixed(torch.nn.Module):
    """Six blocks, each with a dtype of its own."""

    def __init__(self, *dtypes):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(8, dtype) for dtype in dtypes])
        tiny.fill(self, 1)

    def forward(self, hidden_states, encoder_hidden_states):
        for block in self.blocks:
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states)
        return hidden_states, encoder_hidden_states


F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.mark.parametrize("bn", [0, 2])
@pytest.mark.parametrize(
    "dtypes",
    [
        (BF16, F32, F32, F32, F32, F32),
        (F32, F32, BF16, F32, F32, BF16),
        (F16, F16, F16, F32, F32, F32),
        (F32, F64, F64, F64, F64, F64),
        (F64, BF16, F16, F64, F32, F16),
    ],
)
@pytest.mark.parametrize("how", ["probe", "taylor", "dbprune"])
def test_every_block_may_have_a_dtype_of_its_own(how, dtypes, bn):
    model = Mixed(*dtypes)
    hidden, text = tiny.noise(2, 5, 8, seed=1), tiny.noise(1, 3, 8, seed=2)
    with torch.no_grad():
        plain = model(hidden, text.expand(2, -1, -1))
        options = {"Fn_compute_blocks": 1, "Bn_compute_blocks": bn, "max_warmup_steps": 2}
        config = DBPruneConfig(**options) if how == "dbprune" else dbcache.DBCacheConfig(**options)
        adapter = BlockAdapter(
            transformer=model,
            blocks=model.blocks,
            forward_pattern=ForwardPattern.Pattern_0,
        )
        more = {"enable_taylorseer": True} if how == "taylor" else {}
        dbcache.enable(adapter, config, residual_diff_threshold=0.9, **more)
        for step in range(5):
            got = model(hidden, text.expand(2, -1, -1))
            for x, y in zip(got, plain, strict=True):
                assert x.dtype == y.dtype
                assert torch.equal(x, y) or step > 1
                torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
    (lane,) = dbcache.summary(adapter).lanes
    assert lane.cached_steps == [2, 3, 4]


@pytest.mark.parametrize("policy", ["dbcache", "easycache"])
def test_the_dtype_may_change_between_requests_and_within_one(policy):
    model = tiny.flux(double=2, single=4)
    dbcache.enable(model, num_inference_steps=STEPS, **FORCED, policy=policy)
    runs = {}
    for dtype in (F32, F64, F32, BF16, BF16):
        got = tiny.denoise(model.to(dtype), FLUX, STEPS)
        assert {x.dtype for x in got} == {dtype}
        assert pattern(dbcache.summary(model)) == [RHYTHM]
        assert same(got, runs.setdefault(dtype, got))
    model.float()
    x = tiny.noise(*FLUX.latent_shape, seed=5)
    with torch.no_grad():
        for step in range(STEPS):
            with autocast() if step in (1, 2, 3) else contextlib.nullcontext():
                x = x - model(**FLUX.arguments(x, 1 - step / STEPS, "cond"))[0].float() / STEPS
    assert x.isfinite().all()
    assert "c" in pattern(dbcache.summary(model))[0]


POLICIES = {
    "dbcache": {},
    "easycache": {},
    "seacache": {},
    "magcache": {},
    "teacache": {},
    "static": {
        "policy": "dbcache",
        "steps_computation_mask": [1, 1, 0, 0, 1],
        "steps_computation_policy": "static",
        "static_skip_probe": True,
    },
}


@pytest.mark.parametrize("policy", POLICIES)
def test_text_of_a_batch_of_one_is_repeated_by_the_first_block(policy):
    """As FLUX does with ready embeddings of one prompt and several images of it."""
    model = tiny.flux(double=2, single=4)
    options = FORCED | {"policy": policy, "num_inference_steps": STEPS} | POLICIES[policy]

    @torch.no_grad()
    def images(batch_of_text):
        x, outputs = tiny.noise(2, *FLUX.latent_shape[1:], seed=5), []
        for step in range(STEPS):
            given = FLUX.arguments(x, 1 - step / STEPS, "cond")
            given["encoder_hidden_states"] = given["encoder_hidden_states"][:batch_of_text]
            outputs.append(model(**given)[0])
            x = x - outputs[-1] / STEPS
        return outputs

    if policy in ("magcache", "teacache"):
        with dbcache.calibrate(model, policy=policy, num_inference_steps=STEPS) as calibration:
            images(1), images(1), images(1)
        options["calibration"] = calibration
    dbcache.enable(model, **options)
    want = images(2)
    rhythm = pattern(dbcache.summary(model))
    assert "c" in rhythm[0]
    assert same(images(1), want)
    assert pattern(dbcache.summary(model)) == rhythm
