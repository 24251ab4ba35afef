"""`import dbcache as cache_dit`: every public name of cache-dit is there, or tells what to use."""

import dataclasses
import inspect
import logging
import re
import warnings
from contextlib import nullcontext

import cache_dit as original
import diffusers
import pytest
import tiny
import torch
from cache_dit.caching import patch_functors as their_functors
from cache_dit.summary import CacheStats

import dbcache
import dbcache as cache_dit
from dbcache import BlockAdapter, DBCacheConfig, DBPruneConfig, ForwardPattern, ParallelismConfig
from dbcache.adapters.models.series import SERIES
from dbcache.caching import patch_functors
from dbcache.config.renamed import INSTEAD

pytestmark = pytest.mark.usefixtures("one_thread", "plain_kernels")

STEPS = 8
FORCED = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}
PLACES = {
    "attention", "compile", "distributed", "envs", "logger", "offload", "platforms", "profiler",
    "quantization", "utils",
}  # fmt: skip
"""Modules of cache-dit's own, which its documents do not name; what they define is on top."""

REFUSED = {
    "layerwise_offload": "enable_group_offload",
    "layerwise_cpu_offload": "enable_group_offload",
    "remove_layerwise_offload": "enable_group_offload",
    "get_layerwise_offload_handles": "enable_group_offload",
    "LayerwiseOffloadHandle": "enable_group_offload",
    "LayerwiseOffloadHandleGroup": "enable_group_offload",
    "ProfilerContext": r"dbcache\.profile",
    "profile_function": r"dbcache\.profile",
    "create_profiler_context": r"dbcache\.profile",
    "get_profiler_output_dir": r"dbcache\.profile",
    "set_profiler_output_dir": r"dbcache\.profile",
    "load": "from_pretrained",
    "parse_extra_modules": "extra_parallel_modules",
}

NAMES = sorted(name for name in dir(original) if not name.startswith("_"))


def enabled(name, **options):
    return cache_dit.enable_cache(tiny.pipeline(name), **FORCED | options)


@pytest.mark.parametrize("name", sorted({*NAMES} - PLACES))
def test_each_public_name_can_be_imported(name):
    exec(f"from dbcache import {name}")
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match=REFUSED[name]):
            getattr(cache_dit, name)()


def test_what_is_left_out_is_known():
    missing = {name for name in NAMES if not hasattr(cache_dit, name)}
    assert missing <= PLACES
    with pytest.raises(AttributeError, match="no such variables"):
        cache_dit.ENV.CACHE_DIT_LOG_LEVEL  # noqa: B018
    from dbcache.ray import enable_ray_parallelism

    with pytest.raises(NotImplementedError, match="torchrun"):
        enable_ray_parallelism()


def test_constants_and_types():
    assert cache_dit.BasicCacheConfig is DBCacheConfig
    assert isinstance(DBPruneConfig(), cache_dit.BasicCacheConfig)
    for i in range(6):
        name = f"Pattern_{i}"
        assert getattr(cache_dit, name) is ForwardPattern[name]
        theirs = getattr(original, name)
        assert ForwardPattern[name].takes == ForwardPattern[name].In == tuple(theirs.In)
        assert ForwardPattern[name].returns == ForwardPattern[name].Out == tuple(theirs.Out)
    known = {pattern.name for pattern in ForwardPattern.supported_patterns()}
    assert known == {p.name for p in original.ForwardPattern.supported_patterns()}
    hints = ("DBCache", "db", "DB_CACHE", "dual_block_cache", "DBP", "db_prune", "NONE", "no_cache",
             "nc", None, cache_dit.DBPrune)  # fmt: skip
    for hint in hints:
        theirs = original.DBPrune if hint is cache_dit.DBPrune else hint
        assert cache_dit.cache_type(hint).value == original.cache_type(theirs).value
        assert cache_dit.CacheType.type(hint) is cache_dit.cache_type(hint)
    assert f"{cache_dit.CacheType.DBPrune}" == f"{original.CacheType.DBPrune}"
    with pytest.raises(ValueError, match="DBCach"):
        cache_dit.cache_type("DBCach")
    pipe = tiny.pipeline("flux")
    assert cache_dit.cache_factory.apply_cache_on_pipe(pipe, cache_type=cache_dit.NONE) is pipe
    assert not cache_dit.is_enabled(pipe)


def test_small_helpers(capsys):
    with cache_dit.disable_print():
        print("hidden")
    print("seen")
    assert capsys.readouterr().out == "seen\n"
    cache_dit.maybe_empty_cache()
    assert cache_dit.init_logger("my.part").name == "dbcache.my.part"
    assert ".".join(map(str, cache_dit.version_tuple)) == cache_dit.__version__


def test_patch_functors_have_nothing_to_patch():
    theirs = {name for name in vars(their_functors) if name.endswith("PatchFunctor")}
    for name in theirs - {"PatchFunctor", "ImportErrorPatchFunctor"}:
        functor = getattr(patch_functors, name)()
        assert isinstance(functor, cache_dit.PatchFunctor)
        model = torch.nn.Linear(2, 2)
        before = dict(model.__dict__)
        assert functor.apply(model) is None
        assert model.__dict__ == before
    from dbcache.caching import BlockAdapter, enable_cache

    assert (BlockAdapter, enable_cache) == (cache_dit.BlockAdapter, cache_dit.enable)


@pytest.mark.parametrize("family", ["flux", "wan2.2"])
def test_the_adapter_of_a_model_does_what_enable_does(family):
    guided = family != "flux"
    expected = tiny.generate(enabled(family), STEPS, guided=guided)
    pipe = tiny.pipeline(family)
    adapter = cache_dit.get_adapter(pipe)
    assert [type(m).__name__ for m in adapter.transformer] == [
        type(m).__name__ for m in (pipe.transformer, getattr(pipe, "transformer_2", None)) if m
    ]
    assert all(isinstance(x, torch.nn.ModuleList) for row in adapter.blocks for x in row)
    cache_dit.enable_cache(adapter, **FORCED)
    assert all(map(torch.equal, tiny.generate(pipe, STEPS, guided=guided), expected))
    assert cache_dit.get_adapter(torch.nn.Linear(1, 1)) is None
    with pytest.raises(TypeError, match="load it first"):
        cache_dit.get_adapter("FluxPipeline")


def test_blocks_by_name():
    pipe, other = tiny.pipeline("wan2.2"), tiny.pipeline("wan2.2")
    shared = {"forward_pattern": ForwardPattern.Pattern_2, "has_separate_cfg": True}
    both = [pipe.transformer, pipe.transformer_2]
    by_name = BlockAdapter(pipe=pipe, transformer=both, blocks_name=["blocks", "blocks"], **shared)
    cache_dit.enable_cache(by_name, **FORCED)
    cache_dit.enable_cache(other, **FORCED)
    outputs = (tiny.generate(p, STEPS) for p in (pipe, other))
    assert all(map(torch.equal, *outputs))
    for wrong in ("block", ["transformer_blocks"]):
        adapter = BlockAdapter(
            transformer=tiny.flux(), blocks_name=wrong, forward_pattern=ForwardPattern.Pattern_1
        )
        if wrong == "block":
            with pytest.raises(ValueError, match=r"blocks_name of FluxTrans.*'block'; .*known"):
                cache_dit.enable_cache(adapter)
        else:
            assert len(adapter.specs()[0].stacks) == 1


def test_other_options_of_adapters_are_refused():
    with pytest.raises(TypeError, match="did you mean 'blocks'"):
        BlockAdapter(transformer=None, block=1)


CONFIGS = {
    "DBCacheConfig": {}, "DBPruneConfig": {}, "ParamsModifier": {}, "QuantizeConfig": {},
    "CalibratorConfig": {}, "TaylorSeerCalibratorConfig": {}, "FoCaCalibratorConfig": {},
    "DMDCalibratorConfig": {}, "ParallelismConfig": {"ulysses_size": 2},
    "BlockAdapter": {"transformer": None},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_each_field_is_taken_or_refused_with_what_to_do(name):
    theirs, ours = getattr(original, name), getattr(cache_dit, name)
    if dataclasses.is_dataclass(theirs):
        made = theirs(**CONFIGS[name])
        fields = [(x.name, getattr(made, x.name)) for x in dataclasses.fields(theirs)]
        fields = [(name, getattr(value, "name", value)) for name, value in fields]
    else:
        fields = [(x, None) for x in list(inspect.signature(theirs).parameters)]
    for field, value in fields:
        if field.startswith("_") or field in ("args", "kwargs", "cache_type"):
            continue
        cure = INSTEAD.get("use_ray" if field.startswith("ray_") else field)
        with pytest.raises(TypeError, match=re.escape(cure)) if cure else nullcontext():
            ours(**{field: value} | CONFIGS[name])


def test_enumerations_have_all_members():
    for name in ("CacheType", "ForwardPattern", "ParallelismBackend", "QuantizeBackend"):
        assert {*getattr(original, name).__members__} <= {*getattr(cache_dit, name).__members__}
    backend = cache_dit.ParallelismBackend
    assert ParallelismConfig(ring_size=2, backend="Native_Hybrid").backend is backend.AUTO
    assert ParallelismConfig(ring_size=2, backend=backend.CACHE_DIT).backend.value == (
        "native_diffuser"
    )
    with pytest.raises(ValueError, match="leave out parallelism_config"):
        ParallelismConfig(ring_size=2, backend=backend.NONE)
    for wrong, cure in (("CACHE_DIT", "Nunchaku"), ("NONE", "leave out quantize_config")):
        with pytest.raises(ValueError, match=cure):
            cache_dit.QuantizeConfig(backend=getattr(cache_dit.QuantizeBackend, wrong))


def test_arguments_go_by_the_names_of_cache_dit():
    pipe = tiny.pipeline("flux")
    assert cache_dit.enable_cache(pipe_or_adapter=pipe, cache_config=DBCacheConfig()) is pipe
    assert len(cache_dit.summary(adapter_or_others=pipe, logging=False)) == 0
    assert cache_dit.strify(adapter_or_others=pipe).startswith("DBCache_F8")
    cache_dit.refresh_context(transformer=pipe.transformer, num_inference_steps=4)
    cache_dit.set_attn_backend(pipe_or_adapter=pipe, attention_backend="native")
    assert cache_dit.get_adapter(pipe=pipe).pipe is pipe
    assert cache_dit.disable_cache(pipe_or_adapter=pipe) is pipe
    with pytest.raises(ValueError, match="quant_type"):
        cache_dit.quantize(module=pipe.transformer, quant_type="int5")
    given = {"cache_config": {"Fn_compute_blocks": 2}, "attention_backend": "native"}
    found = cache_dit.load_configs(path_or_dict=given, return_dict=False)
    assert (found[0].Fn_compute_blocks, found[1:]) == (2, (None, None, "native", None))
    assert list(inspect.signature(cache_dit.enable_cache).parameters)[:2] == [
        "model",
        "cache_config",
    ]
    with pytest.raises(TypeError, match="model"):
        cache_dit.enable_cache()


@pytest.mark.parametrize("patterns", [(1, 3), (0, 3), (0, 1)])
def test_patterns_of_older_diffusers_go_on_with_what_the_blocks_return(patterns):
    plain, expected = tiny.pipeline("flux"), None
    for numbers in ((1, 1), patterns):
        pipe = tiny.pipeline("flux")
        lists = [pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks]
        adapter = BlockAdapter(
            pipe=pipe,
            transformer=pipe.transformer,
            blocks=lists,
            forward_pattern=[ForwardPattern[f"Pattern_{number}"] for number in numbers],
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache_dit.enable_cache(adapter, **FORCED)
        said = [str(w.message) for w in caught if "goes on with that" in str(w.message)]
        assert len(said) == sum(number != 1 for number in numbers)
        assert all("which is Pattern_1" in text for text in said)
        latents = tiny.generate(pipe, STEPS, guided=False)
        expected = expected or latents
        assert all(map(torch.equal, latents, expected))
        cache_dit.enable_cache(adapter, Fn_compute_blocks=1, residual_diff_threshold=0.0)
        assert all(
            map(
                torch.equal,
                tiny.generate(pipe, STEPS, guided=False),
                tiny.generate(plain, STEPS, guided=False),
            )
        )


def test_a_pattern_is_kept_where_the_source_leaves_it_open_or_checks_are_off():
    class Block(torch.nn.Module):
        def forward(self, hidden_states):
            return (hidden_states + 1,)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(4))

    for options in ({}, {"check_forward_pattern": False}):
        model = Model()
        spec = BlockAdapter(
            transformer=model,
            blocks=model.blocks,
            forward_pattern=ForwardPattern.Pattern_3,
            **options,
        ).specs()
        assert spec[0].stacks[0].pattern is ForwardPattern.Pattern_3
    flux = tiny.flux()
    unchecked = BlockAdapter(
        transformer=flux,
        blocks_name="transformer_blocks",
        forward_pattern=ForwardPattern.Pattern_0,
        check_forward_pattern=False,
    )
    assert unchecked.specs()[0].stacks[0].pattern is ForwardPattern.Pattern_0


def test_supported_pipelines_have_the_documented_names():
    documented = (
        "Flux Mochi CogVideoX Wan HunyuanVideo QwenImage LTX Allegro CogView3Plus CogView4 Cosmos "
        "EasyAnimate SkyReelsV2 StableDiffusion3 ConsisID DiT Amused Bria Lumina OmniGen PixArt "
        "Sana StableAudio VisualCloze AuraFlow Chroma ShapE HiDream HunyuanDiT HunyuanDiTPAG "
        "Kandinsky5 PRX"
    )
    count, names = cache_dit.supported_pipelines()
    assert count == len(names) == len(set(names))
    assert {f"{name}*" for name in documented.split()} <= set(names)


def test_each_series_is_one_of_pipelines_that_have_the_transformer():
    found = 0
    for transformer, series in SERIES.items():
        for name in series.split():
            pipelines = [
                getattr(diffusers, pipe)
                for pipe in dir(diffusers)
                if pipe.startswith(name) and pipe.endswith("Pipeline")
            ]
            hints = [
                str(p.annotation)
                for pipe in pipelines
                for p in inspect.signature(pipe.__init__).parameters.values()
            ]
            if not hasattr(diffusers, transformer) or not any(transformer in h for h in hints):
                continue  # younger or older than this diffusers
            found += 1
    assert found >= 60


def test_statistics_under_their_old_names():
    pipe = enabled("wan", max_warmup_steps=3)
    tiny.generate(pipe, STEPS)
    stats = cache_dit.summary(pipe, logging=False)
    first, second = stats
    own = {field.name for field in dataclasses.fields(CacheStats)}
    assert {n for n in own if not hasattr(first, n)} == {"parallelism_config", "quantize_config"}
    assert first.cached_steps == list(range(3, STEPS))
    assert first.accumulated_cached_steps == first.cfg_accumulated_cached_steps == STEPS - 3
    assert first.accumulated_executed_steps == STEPS
    assert first.accumulated_transformer_executed_steps == 2 * STEPS
    assert first.residual_diffs == {str(step): diff for step, diff in first.diffs.items()} != {}
    assert (first.cfg_cached_steps, first.cfg_residual_diffs) == (
        second.cached_steps,
        second.residual_diffs,
    )
    assert (second.cfg_cached_steps, second.cfg_residual_diffs) == ([], {})
    assert first.cache_options["max_warmup_steps"] == 3
    assert (first.pruned_steps, first.actual_blocks) == ([], [])
    cache_dit.enable_cache(pipe, DBPruneConfig(**FORCED))
    tiny.generate(pipe, STEPS)
    lane = cache_dit.summary(pipe, logging=False)[0]
    assert lane.actual_blocks == [8, 8, *[1] * (STEPS - 2)]
    assert lane.cfg_actual_blocks == lane.actual_blocks
    assert lane.pruned_steps == lane.cfg_pruned_steps == list(range(2, STEPS))
    assert lane.cfg_pruned_ratio == lane.pruned_ratio > 0.5


@pytest.mark.parametrize("as_adapter", [False, True])
@pytest.mark.parametrize("name", ["qwen", "wan2.2"])
def test_a_pipeline_stands_for_its_transformers_that_were_enabled_alone(name, as_adapter):
    pipe, other = tiny.pipeline(name), tiny.pipeline(name)
    other.transformer = module = pipe.transformer
    plain = tiny.generate(pipe, STEPS)
    target = module
    if as_adapter:
        blocks = module.transformer_blocks if name == "qwen" else module.blocks
        pattern = ForwardPattern.Pattern_1 if name == "qwen" else ForwardPattern.Pattern_2
        target = BlockAdapter(transformer=module, blocks=blocks, forward_pattern=pattern)
    cache_dit.enable_cache(target, **FORCED)
    cached = tiny.generate(pipe, STEPS)
    assert not torch.equal(cached[-1], plain[-1])
    assert cache_dit.is_enabled(pipe)
    assert cache_dit.summary(pipe, logging=False)[0].cached_steps
    assert cache_dit.strify(pipe) == cache_dit.strify(module)
    cache_dit.refresh_context(pipe, max_warmup_steps=STEPS)
    tiny.generate(pipe, STEPS)
    assert not cache_dit.summary(pipe, logging=False)[0].cached_steps
    assert cache_dit.disable_cache(pipe) is pipe
    assert not cache_dit.is_enabled(module)
    assert all(map(torch.equal, tiny.generate(pipe, STEPS), plain))
    with pytest.raises(RuntimeError, match="must be enabled on it first"):
        cache_dit.summary(pipe)
    cache_dit.enable_cache(pipe, **FORCED)  # what another pipeline was enabled with is its own
    cache_dit.disable_cache(other)
    assert not cache_dit.is_enabled(other)
    assert cache_dit.is_enabled(module)


def test_fields_of_none_are_not_given():
    for options in ({"max_warmup_steps": None, "Fn_compute_blocks": 3}, {"num_inference_steps": 7}):
        ours, theirs = DBCacheConfig(), original.DBCacheConfig()
        ours.reset(**options)
        theirs.reset(**options)
        given = {name: value for name, value in options.items() if value is not None}
        assert ours.given == given
        assert {name: getattr(theirs, name) for name in given} == given
        ours.update(max_warmup_steps=None)
        assert ours.given == given


@pytest.mark.parametrize("alone", [False, True])
def test_options_of_none_are_not_given(alone):
    """In files and among the options of `enable`; those whose default is None take back others."""
    unset = {"residual_diff_threshold": None, "Fn_compute_blocks": None, "enable_taylorseer": None}
    unset |= {"max_continuous_cached_steps": None, "taylorseer_order": None}
    loaded = cache_dit.load_configs({"cache_config": {**unset, "max_warmup_steps": 3}})
    assert loaded["cache_config"].given == {"max_warmup_steps": 3}
    assert loaded["calibrator_config"] is None
    pipe = tiny.pipeline("flux")
    pipe = pipe.transformer if alone else pipe
    cache_dit.enable_cache(pipe, **FORCED | {"steps_computation_mask": [1] * STEPS})
    cache_dit.refresh_context(pipe, **unset, steps_computation_mask=None)
    assert cache_dit.strify(pipe) == "DBCache_F1B0_W2I1M0MC0_R1_T0O0"


def test_names_of_settings_are_those_of_cache_dit():
    for threshold in (0.08, 0.1, 1, 2.5):
        ours, theirs = (
            m.DBCacheConfig(residual_diff_threshold=threshold) for m in (cache_dit, original)
        )
        assert ours.strify() == theirs.strify()
    for options in ({"max_warmup_steps": 4}, {"enable_taylorseer": True}):
        assert cache_dit.strify({"cache_config": options}) == original.strify(
            {"cache_config": options}
        )
    for kind in ("int8_weight_only", "float8_per_row"):
        assert cache_dit.QuantizeConfig(quant_type=kind).strify() == kind
    parts = {"transformer": "int8_weight_only", "text_encoder": {}, "vae": "int8_weight_only"}
    config = cache_dit.QuantizeConfig(components_to_quantize=parts)
    assert cache_dit.strify(config) == "int8_weight_only_float8_per_row"


def test_names_of_settings_say_limits_and_masks():
    assert "M12" in cache_dit.strify(DBPruneConfig(max_pruned_steps=12))
    assert "M0" in cache_dit.strify(DBPruneConfig())
    mask = "".join(map(str, cache_dit.steps_mask(total_steps=STEPS, mask_policy="fast")))
    for known in (None, STEPS):
        pipe = enabled("flux", steps_computation_mask="fast", num_inference_steps=known)
        tiny.generate(pipe, STEPS, guided=False)
        assert f"SCM{mask}_dynamic" in cache_dit.strify(pipe)


def test_names_of_summaries_lanes_and_options():
    options = {"max_warmup_steps": 3, "enable_taylorseer": True, "taylorseer_order": 2}
    name = "DBCache_F8B0_W3I1M0MC0_R0.08_T1O2"
    assert cache_dit.strify(options) == name
    assert cache_dit.strify({"cache_config": options, "parallelism_config": {"tp": 2}}) == (
        f"{name}_TP2"
    )
    pipe = enabled("flux", **options)
    tiny.generate(pipe, STEPS, guided=False)
    stats = cache_dit.summary(pipe, logging=False)
    for target in (pipe, stats, stats[0], list(stats)):
        assert cache_dit.strify(target) == "DBCache_F1B0_W3I1M0MC0_R1_T1O2_S5"
    cache_dit.enable_cache(pipe, DBPruneConfig(**FORCED))
    tiny.generate(pipe, STEPS, guided=False)
    assert cache_dit.strify(cache_dit.summary(pipe, logging=False)) == cache_dit.strify(pipe)


def test_a_refresh_takes_a_config_and_options():
    family = tiny.FAMILIES["qwen"]
    model = cache_dit.enable_cache(family.build(), **FORCED, enable_separate_cfg=False)
    cache_dit.refresh_context(model, DBCacheConfig(max_warmup_steps=4), num_inference_steps=STEPS)
    tiny.denoise(model, family, STEPS)
    assert cache_dit.summary(model, logging=False)[0].cached_steps == list(range(4, STEPS))


def test_a_summary_is_seen_unless_it_is_not_wanted(capsys, caplog):
    pipe = enabled("flux")
    tiny.generate(pipe, STEPS, guided=False)
    found = cache_dit.summary(pipe)
    assert capsys.readouterr().out == f"{found}\n"
    cache_dit.summary(pipe, logging=False)
    assert capsys.readouterr().out == ""
    with caplog.at_level(logging.INFO, "dbcache"):
        cache_dit.summary(pipe)
    assert str(found) in caplog.text
    assert capsys.readouterr().out == ""
    cache_dit.summary(pipe, details=True)
    title, _, head, rule, *_ = capsys.readouterr().out.splitlines()
    assert "FluxPipeline" in title
    assert head.startswith("| stack |")
    assert re.fullmatch(r"\|(---\|)+", rule)


def test_parts_of_a_file_by_themselves(tmp_path):
    file = tmp_path / "all.json"
    file.write_text(
        '{"cache_config": {"max_warmup_steps": 3}, "attention_backend": "native", '
        '"parallelism_config": {"ulysses": 2}}'
    )
    assert cache_dit.load_attn_backend_config(file) == "native"
    assert cache_dit.load_attn_backend_config({"max_warmup_steps": 3}) is None
    assert cache_dit.load_parallelism_config(file).ulysses_size == 2
    assert cache_dit.load_cache_config(file)[0].given == {"max_warmup_steps": 3}
    assert cache_dit.load_options(file).keys() >= {"cache_config", "attention_backend"}


def test_modifiers_take_options_by_name():
    modifier = cache_dit.ParamsModifier(Fn_compute_blocks=1, max_warmup_steps=3)
    assert modifier.cache_config.given == {"Fn_compute_blocks": 1, "max_warmup_steps": 3}


def test_an_unknown_name_of_version_0_2_tells_the_new_one():
    with pytest.raises(TypeError, match="enable_separate_cfg is its name now"):
        dbcache.enable(tiny.pipeline("flux"), do_separate_classifier_free_guidance=True)
