"""Masks: those of cache-dit, those of short requests, bins, and names fitted to a request."""

from types import SimpleNamespace

import pytest
import tiny

import dbcache
from dbcache import DBCacheConfig, ParamsModifier, steps_mask
from dbcache.config.steps_mask import MASKS

GOLDEN = {
    (4, "slow"): "1101",
    (6, "ultra"): "111001",
    (8, "medium"): "11110101",
    (9, "slow"): "111110111",
    (12, "fast"): "111010010011",
    (16, "ultra"): "1100000000000001",
    (20, "medium"): "11111101100011000101",
    (28, "slow"): "1111111101110011100110010001",
    (28, "fast"): "1111110100010000100000100001",
    (40, "ultra"): "1111110001100000000110000000000100000001",
    (50, "slow"): "11111111111111111111110011111000111110001110001101",
    (50, "medium"): "11111111111111110011100000111000001110000011100001",
}


def text(mask):
    """Return a mask as a string of digits."""
    return "".join(map(str, mask))


@pytest.mark.parametrize(("steps", "policy"), GOLDEN)
def test_policies_are_the_peers(steps, policy):
    assert text(steps_mask(total_steps=steps, mask_policy=policy)) == GOLDEN[steps, policy]


def test_equals_cache_dit_at_every_number_of_steps_that_it_accepts():
    cache_dit = pytest.importorskip("cache_dit", minversion="1.5.3")
    # from 101 on: where its arithmetic in floats shows
    for steps in (4, 6, *range(8, 101), 488, 920, 976):
        for policy in MASKS:
            expected = cache_dit.steps_mask(total_steps=steps, mask_policy=policy)
            assert steps_mask(total_steps=steps, mask_policy=policy) == expected, (steps, policy)


@pytest.mark.parametrize("policy", MASKS)
def test_short_requests_begin_and_end_with_full_steps(policy):
    masks = [text(steps_mask(total_steps=n, mask_policy=policy)) for n in (1, 2, 3, 5, 7)]
    assert masks == ["1", "11", "111", "11101", "1110101"]


def test_bins_alternate_and_are_cut_off():
    assert text(steps_mask([6, 1, 1, 1, 1], [1, 2, 5, 5, 5])) == "1111110100100000100000100000"
    assert text(steps_mask([3, 2, 1], [1, 2])) == "111011001"
    assert text(steps_mask([3, 2], [1, 2], total_steps=7)) == "1110110"


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "total_steps must be given with mask_policy='medium'"),
        ({"total_steps": 0}, ValueError, "total_steps"),
        ({"total_steps": 8.0}, TypeError, "total_steps"),
        ({"total_steps": 8, "mask_policy": "slwo"}, ValueError, "'slow'.* got 'slwo'"),
        ({"compute_bins": [2], "total_steps": 8}, ValueError, "got no cache_bins"),
        ({"cache_bins": [2], "total_steps": 8}, ValueError, "got no compute_bins"),
        ({"compute_bins": [], "cache_bins": []}, ValueError, "must alternate"),
        ({"compute_bins": [1], "cache_bins": [1, 1]}, ValueError, "must alternate"),
        ({"compute_bins": [1, 1, 1], "cache_bins": [1]}, ValueError, "must alternate"),
        ({"compute_bins": [1, 0], "cache_bins": [1]}, ValueError, "each of compute_bins"),
        ({"compute_bins": [1], "cache_bins": [1.0]}, TypeError, "each of cache_bins"),
        (
            {"compute_bins": [2, 1], "cache_bins": [1], "total_steps": 6},
            ValueError,
            "got 4 for 6 steps",
        ),
    ],
)
def test_refuses_what_makes_no_mask(arguments, error, match):
    with pytest.raises(error, match=match):
        steps_mask(**arguments)


STATIC = {
    "Fn_compute_blocks": 1,
    "steps_computation_policy": "static",
    "max_warmup_steps": 0,
}


def decisions(target):
    """Return each lane's steps as a mask, 1 for a full one."""
    return [
        "".join("0" if step in lane.cached_steps else "1" for step in range(lane.steps))
        for lane in dbcache.summary(target).lanes
    ]


def test_a_name_is_fitted_to_each_request_of_a_pipeline():
    pipe = dbcache.enable(tiny.pipeline("flux"), steps_computation_mask="fast", **STATIC)
    for steps in (8, 12, 9):
        tiny.generate(pipe, steps)
        mask = text(steps_mask(total_steps=steps, mask_policy="fast"))
        assert decisions(pipe) == [mask, mask]  # both guidance branches


def test_the_pipelines_own_steps_win_over_those_that_were_set():
    options = STATIC | {"num_inference_steps": 20, "steps_computation_mask": "slow"}
    pipe = dbcache.enable(tiny.pipeline("flux"), **options)
    tiny.generate(pipe, 8, guided=False)
    assert decisions(pipe) == ["11111011"]


def test_a_name_is_fitted_to_the_steps_that_refresh_context_gives():
    model, family = tiny.FAMILIES["wan"].build(), tiny.FAMILIES["wan"]
    config = DBCacheConfig(steps_computation_mask="ultra", enable_separate_cfg=False, **STATIC)
    dbcache.enable(model, config)
    with pytest.raises(ValueError, match="set num_inference_steps"):
        tiny.denoise(model, family, 1)
    for steps, mask in ((8, "11001001"), (6, "111001")):
        dbcache.refresh_context(model, num_inference_steps=steps)
        tiny.denoise(model, family, steps)
        assert decisions(model) == [mask]


@pytest.mark.parametrize("ratio", [0.5, 0.9, None])
@pytest.mark.parametrize("options", ["mask", "warm-up", "retention", "spectrum"])
def test_transformers_that_share_the_steps_know_the_part_of_each(ratio, options):
    pipe = tiny.pipeline("wan2.2")
    pipe.register_to_config(boundary_ratio=ratio)
    ran = []
    for part in (pipe.transformer, pipe.transformer_2):
        part.register_forward_pre_hook(lambda module, _: ran.append(module))
    tiny.generate(pipe, 12, guided=False)
    parts = [n for n in map(ran.count, (pipe.transformer, pipe.transformer_2)) if n]
    assert sum(parts) == 12
    more = {
        "mask": {"steps_computation_mask": "fast", "steps_computation_policy": "static"},
        "warm-up": {},
        "retention": {"retention_ratio": 0.5, "max_warmup_steps": 1},
        "spectrum": {"enable_spectrum": True, "max_warmup_steps": 1},
    }[options]
    dbcache.enable(pipe, Fn_compute_blocks=1, residual_diff_threshold=1.0, **more)
    tiny.generate(pipe, 12, guided=False)
    want = {
        "mask": lambda n: text(steps_mask(total_steps=n, mask_policy="fast")),
        "warm-up": lambda n: "1" * (n // 2) + "0" * (n - n // 2),
        "retention": lambda n: "1" * int(n / 2 + 0.5) + "0" * (n - int(n / 2 + 0.5)),
        "spectrum": lambda n: "1" + "0" * (n - 1),
    }[options]
    assert decisions(pipe) == [want(n) for n in parts]


def test_parts_of_many_steps_keep_the_warmup():
    """The first steps matter most, however few of them the first transformer runs."""
    pipe = tiny.pipeline("wan2.2")
    pipe.register_to_config(boundary_ratio=0.9)
    dbcache.enable(pipe, Fn_compute_blocks=1, residual_diff_threshold=1.0)
    for steps, want in ((15, ["10", "1" * 6 + "0" * 7]), (16, ["11", "1" * 8 + "0" * 6])):
        tiny.generate(pipe, steps, guided=False)
        assert decisions(pipe) == want


@pytest.mark.parametrize("config", [None, SimpleNamespace(boundary_ratio=0.5), {}])
def test_a_part_of_the_steps_that_nothing_tells_is_given_by_hand(config):
    call = tiny.FAMILIES["wan"].arguments(tiny.noise(1, 4, 3, 8, 8, seed=1), 1.0, "cond")

    class Own:
        def __init__(self):
            self.transformer, self.transformer_2 = tiny.wan(), tiny.wan(seed=3)
            self.config = config

        def __call__(self):
            return self.transformer(**call)

    pipe = dbcache.enable(Own(), steps_computation_mask="slow", **STATIC)
    with pytest.raises(ValueError, match="by its ParamsModifier"):
        pipe()


def test_a_part_of_the_steps_that_was_given_wins():
    pipe = tiny.pipeline("wan2.2")
    parts = [ParamsModifier(cache_config=DBCacheConfig(num_inference_steps=n)) for n in (4, 6)]
    dbcache.enable(pipe, steps_computation_mask="slow", params_modifiers=parts, **STATIC)
    tiny.generate(pipe, 8)
    masks = [text(steps_mask(total_steps=n, mask_policy="slow")) for n in (4, 6)]
    for got, mask in zip(decisions(pipe)[::2], masks, strict=True):
        ran = min(len(got), len(mask))
        assert got[:ran] == mask[:ran]


def test_stacks_may_have_masks_of_their_own():
    modifiers = [
        ParamsModifier(cache_config=DBCacheConfig(steps_computation_mask=mask))
        for mask in ("slow", [1, 0, 0, 0, 0, 0, 0, 1])
    ]
    model = tiny.pipeline("flux")
    adapter = dbcache.BlockAdapter(
        pipe=model,
        transformer=model.transformer,
        blocks=[
            model.transformer.transformer_blocks,
            model.transformer.single_transformer_blocks,
        ],
        forward_pattern=dbcache.ForwardPattern.Pattern_1,
    )
    dbcache.enable(adapter, params_modifiers=modifiers, **STATIC)
    tiny.generate(model, 8, guided=False)
    assert decisions(adapter) == ["11111011", "10000001"]
    with pytest.raises(ValueError, match="got 8 for 9 steps"):
        tiny.generate(model, 9, guided=False)


def test_an_unknown_name_is_refused_at_once():
    with pytest.raises(ValueError, match=r"'ultra'.* got 'ultrafast'"):
        DBCacheConfig(steps_computation_mask="ultrafast")
    config = DBCacheConfig(steps_computation_mask="fast", num_inference_steps=8)
    assert config.strify().endswith("_SCM11101001_dynamic_N8")
