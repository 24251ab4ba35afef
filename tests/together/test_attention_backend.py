"""The attention backend of a model: names, one model alone, put back, errors with the cure."""

import diffusers
import pytest
import tiny
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName

import dbcache

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

NAME = "_attention_backend"
ON = {"Fn_compute_blocks": 1, "residual_diff_threshold": 1.0, "max_warmup_steps": 1}


@pytest.fixture(autouse=True)
def process_wide():
    """The backend of the process stays what it was."""
    before = attention_dispatch._AttentionBackendRegistry._active_backend
    yield
    assert attention_dispatch._AttentionBackendRegistry._active_backend is before


def told(model):
    """Return what each processor's own attributes say."""
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    return [vars(processor).get(NAME, "not told") for processor in processors]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("native", AttentionBackendName.NATIVE),
        ("_sdpa_cudnn", AttentionBackendName._NATIVE_CUDNN),
        ("flex", AttentionBackendName.FLEX),
        (AttentionBackendName._NATIVE_MATH, AttentionBackendName._NATIVE_MATH),
    ],
)
@pytest.mark.parametrize("by", ["enable", "set_attn_backend", "load_configs"])
def test_one_model_is_told_and_gets_back_what_it_had(name, backend, by):
    model, other = tiny.flux(), tiny.flux()
    first = model.transformer_blocks[0].attn.processor
    vars(first)[NAME] = AttentionBackendName._NATIVE_EFFICIENT
    before = told(model)
    if by == "set_attn_backend":
        dbcache.set_attn_backend(model, name)
        dbcache.set_attn_backend(dbcache.enable(model, **ON), name)
        dbcache.disable(model)
    elif by == "enable":
        dbcache.enable(model, attention_backend=name, **ON)
    else:
        given = {"cache_config": ON, "attention_backend": getattr(name, "value", name)}
        dbcache.enable(model, **dbcache.load_configs(given))
    assert {*told(model)} == {backend}
    assert {*told(other)} == {"not told"}
    if by == "set_attn_backend":
        dbcache.set_attn_backend(model, None)
    else:
        dbcache.refresh_context(model, residual_diff_threshold=0.5)
        assert {*told(model)} == {backend}
        dbcache.disable(model)
    assert told(model) == before


def test_the_backend_runs_on_full_steps_and_the_picture_is_that_of_the_backend():
    family = tiny.FAMILIES["wan"]
    calls = []
    registry = attention_dispatch._AttentionBackendRegistry._backends
    own = registry[AttentionBackendName._NATIVE_MATH]
    with pytest.MonkeyPatch.context() as patch:

        def count(*args, **kwargs):
            calls.append(None)
            return own(*args, **kwargs)

        patch.setitem(registry, AttentionBackendName._NATIVE_MATH, count)
        model = dbcache.enable(family.build(), attention_backend="_native_math", **ON)
        pictures = tiny.denoise(model, family, 3, named=True)
    assert len(calls) == 2 * (8 + 1 + 1)  # self and cross, all blocks once and the probe twice
    plain = tiny.denoise(dbcache.enable(family.build(), **ON), family, 3, named=True)
    torch.testing.assert_close(pictures[-1], plain[-1])


def test_enabling_again_changes_or_returns_it_and_pipelines_that_share_must_agree():
    pipe = dbcache.enable(tiny.pipeline("flux"), attention_backend="_native_math", **ON)
    model = pipe.transformer
    dbcache.enable(pipe, attention_backend="native", **ON)
    assert {*told(model)} == {AttentionBackendName.NATIVE}
    twin = diffusers.FluxPipeline(**{**pipe.components})
    with pytest.raises(ValueError, match="must have the same attention_backend"):
        dbcache.enable(twin, attention_backend="_native_math", **ON)
    dbcache.enable(twin, attention_backend="native", **ON)
    dbcache.disable(pipe)
    assert {*told(model)} == {AttentionBackendName.NATIVE}
    dbcache.enable(twin, **ON)
    assert {*told(model)} == {"not told"}


def test_what_others_set_in_the_meantime_stays():
    model = dbcache.enable(tiny.flux(), attention_backend="_native_math", **ON)
    processor = model.transformer_blocks[0].attn.processor
    processor._attention_backend = AttentionBackendName.NATIVE
    dbcache.disable(model)
    assert {*told(model)} == {"not told", AttentionBackendName.NATIVE}


MISSING = {
    "sage": (ImportError, r"pip install 'sageattention"),
    "flash": (ImportError, r"pip install 'dbcache-dit\[flash-attn\]'"),
    "_flash_3": (ImportError, "hopper"),
    "sage3": (ImportError, "pip install 'kernels"),
    "xformers": (ImportError, "pip install xformers"),
    "ffpa": (ValueError, "FFPA is no backend of diffusers; use 'sage'"),
    "flesh": (ValueError, "must be one of .*flash.*got 'flesh'"),
    5: (TypeError, "must be a string or None, got 5"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_said_at_once_and_nothing_is_changed(name):
    kind, text = MISSING[name]
    pipe = tiny.pipeline("flux")
    before = dict(vars(pipe)), told(pipe.transformer)
    for call in (
        lambda: dbcache.enable(pipe, attention_backend=name, **ON),
        lambda: dbcache.set_attn_backend(pipe, name),
    ):
        with pytest.raises(kind, match=text):
            call()
    assert (dict(vars(pipe)), told(pipe.transformer)) == before
    assert not dbcache.is_enabled(pipe)
    with pytest.raises(TypeError, match="must be a pipeline with a transformer"):
        dbcache.set_attn_backend(object(), "native")


def test_aliases_hold_for_ranks_too_and_attention_without_a_choice_is_an_error():
    config = dbcache.ParallelismConfig(
        ulysses_size=2, parallel_kwargs={"attention_backend": "_sdpa_cudnn"}
    )
    assert config.context.attention_backend == "_native_cudnn"
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        text_embed_dim=8,
        time_embed_dim=8,
    )
    with pytest.raises(ValueError, match=r"left out for CogVideoX\w+, got 'native'.*PyTorch's"):
        dbcache.enable(model, attention_backend="native")
