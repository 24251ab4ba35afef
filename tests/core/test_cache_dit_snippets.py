"""What users of cache-dit wrote runs with `import dbcache as cache_dit`, on tiny models.

One test per snippet of its user guide, for what exists here; thresholds that let tiny models cache.
At the end whole scripts, whose hub names and GPUs are replaced by tiny models on the CPU. Left out:
what needs several processes (tests/parallel has it) or a CUDA library (bitsandbytes), what measures
pictures (tests/metrics), and what upstream cannot run as printed: options written as ``...``, and a
refresh of ``pipe.transformer`` where ``pipe = enable_cache(pipe.transformer)`` made it no pipeline.
"""

import diffusers
import models
import pytest
import tiny
import torch

import dbcache as cache_dit
from dbcache import (
    BlockAdapter,
    BlockAdapterRegister,
    BlockAdapterRegistry,
    DBCacheConfig,
    ForwardPattern,
    ParamsModifier,
    PatchFunctor,
    TaylorSeerCalibratorConfig,
)

STEPS = 12


def cached(target):
    """Return the cached steps of each lane."""
    return [lane.cached_steps for lane in cache_dit.summary(target, logging=False).lanes]


def run(target):
    """Run one request and return the cached steps of each lane."""
    tiny.generate(target, STEPS, guided=False)
    return cached(target)


def same(first, second):
    """Whether two requests gave the same latents, to the bit."""
    return all(map(torch.equal, first, second))


def test_one_line_and_disable():
    pipe = tiny.pipeline("flux")
    plain = tiny.generate(pipe, STEPS, guided=False)
    assert cache_dit.enable_cache(pipe) is pipe
    tiny.generate(pipe, STEPS, guided=False)
    stats = cache_dit.summary(pipe)
    assert stats.lanes[0].counts["warm-up"] == STEPS // 2
    cache_dit.disable_cache(pipe)
    assert same(tiny.generate(pipe, STEPS, guided=False), plain)


@pytest.mark.parametrize("auto", [True, False])
def test_block_adapter_equals_the_pipeline_alone(auto):
    config = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.3)
    expected = cache_dit.enable_cache(tiny.pipeline("qwen"), cache_config=config)
    latents = tiny.generate(expected, STEPS, guided=False)
    pipe = tiny.pipeline("qwen")
    where = {"transformer": pipe.transformer, "blocks": pipe.transformer.transformer_blocks}
    adapter = BlockAdapter(
        pipe=pipe,
        forward_pattern=ForwardPattern.Pattern_1,
        **({"auto": True} if auto else where),
    )
    assert cache_dit.enable_cache(adapter, cache_config=config) is adapter
    assert same(tiny.generate(pipe, STEPS, guided=False), latents)
    assert cached(adapter) == cached(expected) != [[]]


def test_several_transformers_with_modifiers():
    pipe = tiny.pipeline("wan2.2")
    cache_dit.enable_cache(
        BlockAdapter(
            pipe=pipe,
            transformer=[pipe.transformer, pipe.transformer_2],
            blocks=[pipe.transformer.blocks, pipe.transformer_2.blocks],
            forward_pattern=[ForwardPattern.Pattern_2, ForwardPattern.Pattern_2],
            params_modifiers=[
                ParamsModifier(cache_config=DBCacheConfig().reset(max_warmup_steps=4)),
                ParamsModifier(
                    cache_config=DBCacheConfig().reset(max_warmup_steps=2, max_cached_steps=1)
                ),
            ],
            has_separate_cfg=True,
        ),
        cache_config=DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=1.0),
    )
    tiny.generate(pipe, STEPS)
    first, _, second, _ = cache_dit.summary(pipe).lanes
    assert first.cached_steps == list(range(4, first.steps))
    assert second.cached_steps == [2]


def test_two_stacks_of_one_transformer_with_modifiers():
    pipe = tiny.pipeline("flux")
    cache_dit.enable_cache(
        BlockAdapter(
            pipe=pipe,
            transformer=pipe.transformer,
            blocks=[
                pipe.transformer.transformer_blocks,
                pipe.transformer.single_transformer_blocks,
            ],
            forward_pattern=[ForwardPattern.Pattern_1, ForwardPattern.Pattern_1],
        ),
        cache_config=DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=1.0),
        params_modifiers=[
            ParamsModifier(cache_config=DBCacheConfig().reset(max_warmup_steps=10)),
            ParamsModifier(cache_config=DBCacheConfig().reset(max_warmup_steps=9)),
        ],
    )
    assert run(pipe) == [[10, 11], [9, 10, 11]]


def test_registered_adapter_with_a_patch_functor():
    class HiDreamPatchFunctor(PatchFunctor):
        def apply(self, transformer):
            transformer.is_patched = True
            return transformer

    @BlockAdapterRegister.register("HiDream")
    def hidream_adapter(pipe, **kwargs) -> BlockAdapter:
        from diffusers import HiDreamImageTransformer2DModel

        assert isinstance(pipe, HiDreamImageTransformer2DModel)
        return BlockAdapter(
            transformer=pipe,
            blocks=[pipe.double_stream_blocks, pipe.single_stream_blocks],
            forward_pattern=[ForwardPattern.Pattern_0, ForwardPattern.Pattern_3],
            patch_functor=HiDreamPatchFunctor(),
            **kwargs,
        )

    name = "HiDreamImageTransformer2DModel"
    model, config = models.model(name), DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2)
    try:
        cache_dit.enable_cache(model, cache_config=config.update(residual_diff_threshold=1.0))
    finally:
        BlockAdapterRegistry.unregister("HiDream")
    models.run(name, 4)
    assert model.is_patched
    assert cached(model) == [[2, 3], [2, 3]]
    cache_dit.disable_cache(model)
    assert not hasattr(model, "is_patched")


def test_transformer_only():
    family = tiny.FAMILIES["qwen"]
    transformer = family.build()
    cache_dit.enable_cache(
        BlockAdapter(
            transformer=transformer,
            blocks=transformer.transformer_blocks,
            forward_pattern=ForwardPattern.Pattern_1,
        ),
        cache_config=DBCacheConfig(
            num_inference_steps=STEPS, Fn_compute_blocks=1, residual_diff_threshold=1.0
        ),
    )
    for _ in range(2):  # the second request begins anew by itself
        tiny.denoise(transformer, family, STEPS)
        assert cached(transformer) == [[6, 7, 8, 9, 10, 11]]  # warm-up: half of the steps


def test_refresh_context_between_requests(capsys):
    pipe, family = tiny.pipeline("qwen"), tiny.FAMILIES["qwen"]
    transformer = cache_dit.enable_cache(
        pipe.transformer,
        cache_config=DBCacheConfig(
            num_inference_steps=None,
            Fn_compute_blocks=1,
            residual_diff_threshold=1.0,
            enable_separate_cfg=False,
        ),
    )
    for steps in (10, 12):
        cache_dit.refresh_context(pipe.transformer, num_inference_steps=steps, verbose=True)
        tiny.denoise(transformer, family, steps)
        assert cached(pipe.transformer) == [list(range(steps // 2, steps))]
        assert f"_N{steps}_" in capsys.readouterr().out
    cache_dit.refresh_context(
        pipe.transformer,
        cache_config=DBCacheConfig(
            max_warmup_steps=3,
            max_cached_steps=5,
            max_continuous_cached_steps=2,
            num_inference_steps=STEPS,
        ),
        calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=1),
    )
    tiny.denoise(transformer, family, STEPS)
    assert cached(transformer) == [[3, 4, 6, 7, 9]]
    assert not capsys.readouterr().out


def test_masks_with_taylorseer():
    mask = cache_dit.steps_mask(mask_policy="fast", total_steps=STEPS)
    pipe = cache_dit.enable_cache(
        tiny.pipeline("flux"),
        cache_config=DBCacheConfig(
            Fn_compute_blocks=8,
            Bn_compute_blocks=0,
            residual_diff_threshold=1.0,
            steps_computation_mask=mask,
            steps_computation_policy="dynamic",
        ),
        calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=1),
    )
    assert run(pipe) == [[step for step, full in enumerate(mask) if not full]]


def test_taylorseer_by_shorthand_equals_the_config():
    options = {
        "Fn_compute_blocks": 1,
        "max_warmup_steps": 3,
        "max_continuous_cached_steps": 3,
        "residual_diff_threshold": 1.0,
    }
    by_config = cache_dit.enable_cache(
        tiny.pipeline("flux"),
        cache_config=DBCacheConfig(**options),
        calibrator_config=TaylorSeerCalibratorConfig(
            taylorseer_order=2, calibrator_cache_type="hidden_states"
        ),
    )
    by_name = cache_dit.enable_cache(
        tiny.pipeline("flux"),
        enable_taylorseer=True,
        enable_encoder_taylorseer=True,
        taylorseer_cache_type="hidden_states",
        taylorseer_order=2,
        **options,
    )
    expected = tiny.generate(by_config, STEPS, guided=False)
    assert same(tiny.generate(by_name, STEPS, guided=False), expected)
    reuse = cache_dit.enable_cache(tiny.pipeline("flux"), **options)
    assert not same(tiny.generate(reuse, STEPS, guided=False), expected)


def test_separate_guidance():
    family = tiny.FAMILIES["wan"]
    model = cache_dit.enable_cache(
        family.build(),
        cache_config=DBCacheConfig(
            Fn_compute_blocks=1,
            residual_diff_threshold=1.0,
            enable_separate_cfg=True,
            cfg_compute_first=False,
            cfg_diff_compute_separate=True,
        ),
    )
    tiny.denoise(model, family, STEPS, branches=tiny.BRANCHES)
    lanes = cache_dit.summary(model).lanes
    assert [(lane.branch, lane.cached_steps) for lane in lanes] == [
        ("cond", [8, 9, 10, 11]),
        ("uncond", [8, 9, 10, 11]),
    ]


def test_supported_matrix_is_a_markdown_table():
    header, rule, *lines = cache_dit.supported_matrix().splitlines()
    assert header.startswith("| Models | Transformer | Cache |")
    assert len({line.count("|") for line in (header, rule, *lines)}) == 1


HEAD = """
import cache_dit
import torch
from cache_dit import BlockAdapter, DBCacheConfig, DBPruneConfig, ForwardPattern, ParamsModifier
from cache_dit import BlockAdapterRegister, TaylorSeerCalibratorConfig
from diffusers import DiffusionPipeline, FluxPipeline
"""

FLUX = """
pipe = FluxPipeline.from_pretrained(
    "black-forest-labs/FLUX.1-dev",
    torch_dtype=torch.bfloat16,
).to("cuda")
"""

OF_V02 = "from cache_dit.cache_factory import CacheType, apply_cache_on_pipe\n" + FLUX

SCRIPTS = {
    "quick start": """
pipe = DiffusionPipeline.from_pretrained("Qwen/Qwen-Image")
cache_dit.enable_cache(pipe)
output = call(pipe)
stats = cache_dit.summary(pipe)
cache_dit.disable_cache(pipe)
""",
    "adapter": """
pipe = DiffusionPipeline.from_pretrained("Qwen/Qwen-Image")
cache_dit.enable_cache(
    BlockAdapter(pipe=pipe, auto=True, forward_pattern=ForwardPattern.Pattern_1),
)
call(pipe)
cache_dit.enable_cache(
    BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=pipe.transformer.transformer_blocks,
        forward_pattern=ForwardPattern.Pattern_1,
    ),
)
call(pipe)
stats = cache_dit.summary(pipe)
""",
    "hybrid": FLUX + """
cache_dit.enable_cache(
    BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=[
            pipe.transformer.transformer_blocks,
            pipe.transformer.single_transformer_blocks,
        ],
        forward_pattern=[ForwardPattern.Pattern_1, ForwardPattern.Pattern_3],
    ),
    cache_config=DBCacheConfig(Fn_compute_blocks=1),
    params_modifiers=[
        ParamsModifier(
            cache_config=DBCacheConfig().reset(
                Fn_compute_blocks=2,
                residual_diff_threshold=0.6,
            ),
        ),
        ParamsModifier(
            cache_config=DBCacheConfig().reset(
                Fn_compute_blocks=1,
                residual_diff_threshold=0.9,
            ),
        ),
    ],
)
call(pipe)
stats = cache_dit.summary(pipe)
assert [s.threshold for s in stats] == [0.6, 0.9]
""",
    "registered": FLUX + """
@BlockAdapterRegister.register("Flux")
def flux_adapter(pipe, **kwargs) -> BlockAdapter:
    from diffusers import FluxTransformer2DModel
    from cache_dit.caching.patch_functors import HiDreamPatchFunctor

    assert isinstance(pipe.transformer, FluxTransformer2DModel)
    return BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=[
            pipe.transformer.transformer_blocks,
            pipe.transformer.single_transformer_blocks,
        ],
        forward_pattern=[ForwardPattern.Pattern_1, ForwardPattern.Pattern_3],
        patch_functor=HiDreamPatchFunctor(),
        **kwargs,
    )

cache_dit.enable_cache(pipe, Fn_compute_blocks=1)
BlockAdapterRegister.unregister("Flux")
call(pipe)
stats = cache_dit.summary(pipe)
assert len(stats) == 2
""",
    "custom options": FLUX + """
cache_dit.enable_cache(pipe)
cache_dit.enable_cache(
    pipe,
    cache_config=DBCacheConfig(
        max_warmup_steps=8,
        max_cached_steps=-1,
        Fn_compute_blocks=8,
        Bn_compute_blocks=8,
        residual_diff_threshold=0.12,
        enable_separate_cfg=True,
        cfg_compute_first=False,
        cfg_diff_compute_separate=True,
    ),
    calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=1),
)
call(pipe)
stats = cache_dit.summary(pipe, details=True)
""",
    "pruning": FLUX + """
for more in ({}, {"Fn_compute_blocks": 1, "non_prune_block_ids": list(range(2, 4))}):
    cache_dit.enable_cache(
        pipe,
        cache_config=DBPruneConfig(
            max_warmup_steps=8,
            residual_diff_threshold=0.12,
            enable_dynamic_prune_threshold=True,
            **more,
        ),
    )
    call(pipe)
    stats = cache_dit.summary(pipe)
""",
    "masks": FLUX + """
cache_dit.enable_cache(
    pipe,
    cache_config=DBCacheConfig(
        Fn_compute_blocks=8,
        Bn_compute_blocks=0,
        residual_diff_threshold=0.12,
        steps_computation_mask=cache_dit.steps_mask(
            compute_bins=[6, 1, 1], cache_bins=[1, 1, 2],
        ),
        steps_computation_policy="dynamic",
    ),
    calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=1),
)
call(pipe)
stats = cache_dit.summary(pipe)
""",
    "compiled": FLUX + """
cache_dit.enable_cache(pipe, Fn_compute_blocks=1)
pipe.transformer = torch.compile(pipe.transformer, backend="eager")
call(pipe)
torch._dynamo.config.recompile_limit = 96
stats = cache_dit.summary(pipe)
""",
    "v0.2": OF_V02 + """
apply_cache_on_pipe(pipe, **CacheType.default_options(CacheType.DBPrune))
cache_options = CacheType.default_options(CacheType.FBCache)
cache_options = {
    "cache_type": CacheType.DBCache,
    "warmup_steps": 8,
    "max_cached_steps": 8,
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 4,
    "Bn_compute_blocks_ids": CacheType.range(0, 4, 2),
    "non_compute_blocks_diff_threshold": 0.08,
    "residual_diff_threshold": 0.12,
    "enable_taylorseer": True,
    "enable_encoder_taylorseer": True,
    "taylorseer_cache_type": "residual",
    "taylorseer_kwargs": {"n_derivatives": 2},
    "do_separate_classifier_free_guidance": True,
    "cfg_compute_first": False,
    "cfg_diff_compute_separate": True,
}
apply_cache_on_pipe(pipe, **cache_options)
call(pipe)
stats = cache_dit.summary(pipe)
""",
    "v0.2 pruning": OF_V02 + """
cache_options = {
    "cache_type": CacheType.DBPrune,
    "residual_diff_threshold": 0.05,
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 1,
    "warmup_steps": 8,
    "max_pruned_steps": 12,
    "enable_dynamic_prune_threshold": True,
    "max_dynamic_prune_threshold": 2 * 0.05,
    "dynamic_prune_threshold_relax_ratio": 1.25,
    "residual_cache_update_interval": 1,
    "non_prune_blocks_ids": [],
}
apply_cache_on_pipe(pipe, **cache_options)
call(pipe)
stats = cache_dit.summary(pipe)
assert "M12" in cache_dit.strify(pipe)
""",
}  # fmt: skip


def stand_in(hub, **options):
    """Return a tiny pipeline of the same class, with blocks enough for the defaults."""
    is_flux = hub == "black-forest-labs/FLUX.1-dev"
    pipe = tiny.pipeline("flux" if is_flux else "qwen")
    transformer = tiny.flux(double=8, single=12) if is_flux else tiny.qwen(layers=12)
    pipe.register_modules(transformer=transformer)
    return pipe


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread", "plain_kernels")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_with_another_import(name, monkeypatch, capsys):
    limit = torch._dynamo.config.recompile_limit
    for cls in (diffusers.DiffusionPipeline, diffusers.FluxPipeline):
        monkeypatch.setattr(cls, "from_pretrained", stand_in)
        monkeypatch.setattr(cls, "to", lambda self, device: self)
    script = (HEAD + SCRIPTS[name]).replace("import cache_dit\n", "import dbcache as cache_dit\n")
    script = script.replace("from cache_dit", "from dbcache")
    names = {"call": lambda pipe: tiny.generate(pipe, STEPS, guided=False)}
    try:
        exec(compile(script, name, "exec"), names)
    finally:
        torch._dynamo.config.recompile_limit = limit
    assert names["stats"][0].steps == STEPS
    assert names["stats"][0].stack in capsys.readouterr().out
