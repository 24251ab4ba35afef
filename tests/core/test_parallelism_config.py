"""ParallelismConfig: names, sizes and what excludes what, without any process group."""

import re

import pytest

from dbcache import ParallelismBackend, ParallelismConfig


def test_sizes_multiply_to_the_ranks() -> None:
    config = ParallelismConfig(ulysses_size=2, ring_size=2, tp_size=2)
    assert config.sizes(8) == {"dp": 1, "cfg": 1, "ring": 2, "ulysses": 2, "tp": 2}
    with pytest.raises(ValueError, match="multiply to the 4 ranks of this run, got ring 2 x uly"):
        config.sizes(4)
    with pytest.raises(ValueError, match="multiply to the 16 ranks"):
        config.sizes(16)


def test_auto_is_what_is_left() -> None:
    config = ParallelismConfig(ulysses_size="auto", tp_size=2)
    assert config.sizes(8)["ulysses"] == 4
    assert ParallelismConfig(dp_size="auto", ring_size=4).sizes(8)["dp"] == 2
    with pytest.raises(ValueError, match="multiply to the 9 ranks"):
        config.sizes(9)
    with pytest.raises(ValueError, match="at most one size may be 'auto'"):
        ParallelismConfig(ulysses_size="auto", tp_size="auto")
    with pytest.raises(ValueError, match="cfg_size must be 1 or 2, got 4"):
        ParallelismConfig(cfg_size="auto", ulysses_size=2).sizes(8)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, "must be above 1"),
        ({"dp_size": 2}, ValueError, "must be above 1"),
        ({"ulysses_size": 0}, ValueError, "ulysses_size must be an integer >= 1, got 0"),
        ({"ulysses_size": 2.0}, TypeError, "ulysses_size must be an integer, got 2.0"),
        ({"ulyses_size": 2}, TypeError, "did you mean 'ulysses_size'"),
        ({"cfg_size": 3}, ValueError, "cfg_size must be an integer from 1 to 2, got 3"),
        ({"tp_size": 2, "backend": "NATIVE_DIFFUSER"}, ValueError, "tp_size must be None or 1"),
        ({"ring_size": 2, "backend": "native_pytorch"}, ValueError, "ring_size must be None or 1"),
        ({"ring_size": 2, "backend": "nccl"}, ValueError, "backend must be one of"),
        ({"ring_size": 2, "backend": None}, ValueError, "backend must be one of"),
        ({"ring_size": 2, "timeout": 0}, ValueError, "timeout must be a number > 0"),
        ({"ring_size": 2, "parallel_kwargs": 1}, TypeError, "parallel_kwargs must be a mapping"),
    ],
)
def test_rejects(options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        ParallelismConfig(**options)


@pytest.mark.parametrize(
    ("sizes", "kwargs", "error", "text"),
    [
        ({"ring_size": 2}, {"ring_rotate": "p2p"}, TypeError, "did you mean 'ring_rotate_method'"),
        ({"ring_size": 2}, {"ring_rotate_method": "p3p"}, ValueError, "must be one of ('p2p'"),
        ({"ring_size": 2}, {"ring_convert_to_fp32": 1}, TypeError, "must be True or False"),
        ({"ring_size": 2}, {"cp_plan": [1]}, TypeError, "cp_plan must be a mapping"),
        (
            {"ring_size": 2},
            {"experimental_ulysses_float8": True},
            ValueError,
            "needs ulysses_size above 1, got None",
        ),
    ],
)
def test_rejects_options(sizes: dict, kwargs: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        ParallelismConfig(**sizes, parallel_kwargs=kwargs)


def test_fields_stand_for_options_of_the_sequence() -> None:
    flat = ParallelismConfig(
        ulysses_size=2,
        ring_size=2,
        cp_plan={"proj_out": None},
        attention_backend="native",
        ulysses_anything=True,
        ulysses_float8=True,
        ring_rotate_method="allgather",
        ring_convert_to_fp32=False,
    )
    kwargs = {
        "cp_plan": {"proj_out": None},
        "attention_backend": "native",
        "experimental_ulysses_anything": True,
        "ulysses_float8": True,
        "ring_rotate_method": "allgather",
        "ring_convert_to_fp32": False,
    }
    nested = ParallelismConfig(ulysses_size=2, ring_size=2, parallel_kwargs=kwargs)
    assert flat.context == nested.context
    assert flat.strify() == nested.strify() == "Ring2_Ulysses2_UAA_UF8"
    both = ParallelismConfig(ring_size=2, attention_backend="native", parallel_kwargs=None)
    assert both.context.attention_backend == "native"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"attention_backend": "flash", "parallel_kwargs": {"attention_backend": "native"}},
            ValueError,
            "attention_backend and parallel_kwargs must not differ, got 'flash' and 'native'",
        ),
        ({"ulysses_async": True}, ValueError, "ulysses_async needs ulysses_size above 1"),
        ({"ring_rotate_method": "p3p"}, ValueError, "ring_rotate_method must be one of ('p2p'"),
        ({"use_ray": True}, TypeError, "start one process per GPU with torchrun"),
        ({"ring_size": 2**31}, ValueError, "ring_size must be an integer from 1 to 2147483647"),
    ],
)
def test_rejects_fields(options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        ParallelismConfig(**{"ring_size": 2, **options})


def test_options_of_the_sequence_are_checked_with_ulysses_too() -> None:
    with pytest.raises(ValueError, match="ring_rotate_method must be one of"):
        ParallelismConfig(ulysses_size=2, parallel_kwargs={"ring_rotate_method": "p3p"})


def test_backends_have_the_names_of_cache_dit() -> None:
    for name in ("NATIVE_DIFFUSER", "native_diffuser", ParallelismBackend.NATIVE_DIFFUSER):
        config = ParallelismConfig(ulysses_size=2, backend=name)
        assert config.backend is ParallelismBackend.NATIVE_DIFFUSER


def test_strify_names_what_is_on() -> None:
    options = {"experimental_ulysses_anything": True, "experimental_ulysses_float8": True}
    config = ParallelismConfig(ulysses_size=2, ring_size=2, tp_size=2, parallel_kwargs=options)
    assert config.strify() == "Ring2_Ulysses2_TP2_UAA_UF8"
